"""A run beside the same in another dtype: which number moves how far, and which verdict."""

import json

import pandas as pd
import pytest

from llmdrop_utils.base import files
from llmdrop_utils.report.dtypes import moves, other_dtype, write_dtypes
from llmdrop_utils.report.tables import Column, Key, table

DECLARED = {"means": table("model", Key("n", "n", "d"), Column("value", "Value", ".2f", "low", "high"), "low high",
                           Column("plain", "No interval", ".2f"))}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Write the tables of one notebook of a run, committed or local."""
    monkeypatch.setattr(files, "RESULTS", tmp_path / "local")
    monkeypatch.setattr(files, "REFERENCE", tmp_path / "committed")

    def write(name, dtype, values, where=files.committed, notebook="01_x"):
        folder = where(name).tables / notebook
        folder.mkdir(parents=True)
        rows = {"model": "m", "n": [1, 2], "value": values, "low": [0.0, 1.0], "high": [1.0, 3.0], "plain": [7.0, 7.0]}
        pd.DataFrame(rows).to_csv(folder / "means.csv", index=False)
        (folder / "provenance.json").write_text(json.dumps([{"dtype": dtype, "model": "m"}]))
        return folder

    return write


def test_each_number_with_an_interval_is_listed_once(run):
    here, there = run("cpu", "float32", [0.5, 2.0]), run("cpu-bfloat16", "bfloat16", [0.75, 3.5])
    rows = moves(here, there, DECLARED)
    assert rows.to_dict("records") == [
        {"table": "means", "row": "m, 1", "column": "value", "here": 0.5, "low": 0.0, "high": 1.0, "there": 0.75,
         "difference": 0.25, "inside": True},
        {"table": "means", "row": "m, 2", "column": "value", "here": 2.0, "low": 1.0, "high": 3.0, "there": 3.5,
         "difference": 1.5, "inside": False},
    ]  # fmt: skip


def test_the_scorecard_s_sentence_counts_and_measures(run, tmp_path):
    run("cpu", "float32", [0.5, 2.0])
    run("cpu-bfloat16", "bfloat16", [0.75, 3.5])
    # 0.25 of a width of 1 and 1.5 of a width of 2: the median of 0.25 and 0.75 is 0.5.
    sentence = write_dtypes("cpu", files.committed("cpu").tables, tmp_path, {"01_x": DECLARED})
    assert "01_x in bfloat16: of 2 numbers 50 % stay inside their 95 % interval, and half move by less than 0.50" in sentence
    written = pd.read_csv(tmp_path / "dtypes.csv")
    assert written["difference"].tolist() == [0.25, 1.5]
    assert {*written["dtype_here"]} == {"float32"}
    assert {*written["dtype_there"]} == {"bfloat16"}


def test_the_other_dtype_of_one_model_of_a_profile(run):
    run("ladder-gemma3-270m", "bfloat16", [0.5, 2.0])
    there = run("ladder-float32-gemma3-270m", "float32", [0.5, 2.0])
    run("ladder-float32-smollm2-135m", "float32", [0.5, 2.0])
    other = run("ladder", "bfloat16", [0.5, 2.0])
    record = run("ladder-float32", "float32", [0.5, 2.0]) / "provenance.json"
    record.write_text(json.dumps([{"dtype": "float32", "model": "another"}]))
    assert other_dtype("ladder", "01_x", other.parent) is None, "another choice of models"
    assert other_dtype("ladder-gemma3-270m", "01_x", files.committed("ladder-gemma3-270m").tables) == ("float32", there)


def test_a_local_run_in_the_other_dtype_comes_before_the_committed_one(run):
    run("cpu", "float32", [0.5, 2.0])
    run("cpu", "float32", [0.5, 2.0], files.local)
    committed = run("cpu-bfloat16", "bfloat16", [0.6, 2.0])
    assert other_dtype("cpu", "01_x", files.local("cpu").tables) == ("bfloat16", committed)
    local = run("cpu-bfloat16", "bfloat16", [0.7, 2.0], files.local)
    assert other_dtype("cpu", "01_x", files.local("cpu").tables) == ("bfloat16", local)
    assert other_dtype("cpu", "01_x", files.committed("cpu").tables) == ("bfloat16", committed), (
        "what is committed stands alone"
    )


def test_a_run_without_the_notebook(run, tmp_path):
    """`make reproduce NOTEBOOKS=05` beside a committed notebook 01 in another dtype."""
    run("cpu", "float32", [0.5, 2.0], files.local, notebook="05_x")
    run("cpu-bfloat16", "bfloat16", [0.6, 2.0])
    assert other_dtype("cpu", "01_x", files.local("cpu").tables) is None
    assert write_dtypes("cpu", files.local("cpu").tables, tmp_path, {"01_x": DECLARED, "05_x": DECLARED}) is None


def test_what_was_not_measured_twice_is_left_out(run, tmp_path):
    """Another notebook, another dtype than the folder's name says, or the dtype of the run itself."""
    run("cpu", "float32", [0.5, 2.0])
    run("cpu-float32", "float32", [0.5, 2.0])
    run("cpu-bfloat16", "float32", [0.5, 2.0])
    run("cpu-bfloat16", "bfloat16", [0.5, 2.0], notebook="02_x")
    (tmp_path / "dtypes.csv").write_text("of an earlier run")
    assert other_dtype("cpu", "01_x", files.committed("cpu").tables) is None
    assert write_dtypes("cpu", files.committed("cpu").tables, tmp_path, {"01_x": DECLARED}) is None
    assert not (tmp_path / "dtypes.csv").exists()
