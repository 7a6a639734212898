"""Figures from the committed reference tables: complete, and the same to the byte whoever draws them."""

import re

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from llmdrop_utils.base.files import REFERENCE, ROOT
from llmdrop_utils.report import style, tables
from llmdrop_utils.report import style as figures

BESIDE = {
    "11_sizes_and_causes": "ladder",
    "12_other_transformers": "cpu",
}  # their figures show several models beside each other
RUNS = {spec.notebook: BESIDE.get(spec.notebook, "cpu") for spec in figures.FIGURES.values()}
ALL = {notebook: tables.read_tables(REFERENCE / run / notebook) for notebook, run in RUNS.items()}
TABLES = ALL["01_similarity"]
SUFFIXES = (".svg", ".pdf", ".png", ".csv")


MEASURED = [name for name, spec in figures.FIGURES.items() if ALL[spec.notebook]]  # what is committed; others are drawn by hand


def test_every_figure_is_measured():
    """The reference has tables for all of them."""
    assert set(MEASURED) == set(figures.FIGURES)


@pytest.mark.parametrize("name", MEASURED)
def test_same_bytes_twice(name, tmp_path):
    for folder in ("a", "b"):
        figures.draw(name, ALL[figures.FIGURES[name].notebook], tmp_path / folder)
    for suffix in SUFFIXES:
        first, second = ((tmp_path / folder / f"{name}{suffix}").read_bytes() for folder in ("a", "b"))
        assert first
        assert first == second, suffix


def test_committed_figures_are_all_there():
    for name, spec in ((name, figures.FIGURES[name]) for name in MEASURED):
        for suffix in SUFFIXES:
            assert (ROOT / "figures" / RUNS[spec.notebook] / f"{name}{suffix}").exists(), f"{name}{suffix}: run `make figures`"


def test_many_models_share_a_figure():
    """One row of panels for each model."""
    for name, spec in ((name, figures.FIGURES[name]) for name in MEASURED):
        if spec.notebook in BESIDE:
            continue
        one = ALL[spec.notebook]
        if "runs" in one:  # the reference follows two models already
            first = one["runs"]["model"].iloc[0]
            one = {table: t[t["model"] == first] if "model" in t else t for table, t in one.items()}
        two = {table: pd.concat([t, t.assign(model="other-model")]) if "model" in t else t for table, t in one.items()}
        one_row, two_rows = (spec.draw(content)[0] for content in (one, two))
        panels = len(one_row.axes)
        assert len(two_rows.axes) in (2 * panels, 2 * panels - 1), name  # a colour bar is shared
        plt.close("all")


@pytest.mark.parametrize("name", MEASURED)
def test_every_figure_says_what_to_see(name):
    """A caption from its docstring, and a takeaway with numbers of the run: others if the numbers are others."""
    spec = figures.FIGURES[name]
    drawing = spec.draw(ALL[spec.notebook])
    plt.close(drawing.figure)
    assert spec.caption
    if name == "figS17_sizes" and drawing.data.empty:
        pytest.skip(
            "no model of the ladder has been through notebook 02 yet; test_sizes_and_causes.py draws it from other tables"
        )
    assert 20 < len(drawing.takeaway) < 900
    assert re.search(r"\d", drawing.takeaway)
    assert "nan" not in drawing.takeaway.split()


def test_one_corpus_has_nothing_to_compare(tmp_path):
    figures.draw("figS3_corpus_agreement", TABLES | {"corpora": TABLES["corpora"].iloc[:0]}, tmp_path)
    assert (tmp_path / "figS3_corpus_agreement.png").exists()


def test_user_s_own_style_changes_nothing(tmp_path):
    figures.draw("figS1_depth_profile", TABLES, tmp_path / "a")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "image.cmap": "hot"}):
        figures.draw("figS1_depth_profile", TABLES, tmp_path / "b")
    assert (tmp_path / "a" / "figS1_depth_profile.png").read_bytes() == (
        tmp_path / "b" / "figS1_depth_profile.png"
    ).read_bytes()


def test_every_kind_looks_different():
    for values in (style.COLORS, style.MARKERS):
        assert len(set(values.values())) == len(values)
