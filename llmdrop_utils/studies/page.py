"""What a notebook shows of its study: figures with takeaways, tables, advice and verdicts."""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from IPython.display import Image, Markdown, display

from ..base import files
from ..models.encoder_decoders import load_located_other
from ..models.load import load_located, said_of_parts
from ..models.locate import LocatedModel
from ..report.show import show
from ..report.style import FIGURES, draw
from ..report.tables import models_measured, read_tables, with_exact_names
from ..report.verdicts import ADVICE, as_html, judge
from .profile import load_profile
from .run import NOT_RUN, STUDIES

TABLES = "LLMDROP_TABLES"  # a folder with the tables of a run: pages are made from them, and nothing is measured


class Page:
    """The study of a notebook, opened: measured, or read from the store where it was measured before."""

    def __init__(self, notebook: str, profile: str = "cpu", model: str = ""):
        """notebook: "01_similarity"; profile, model: the notebook's parameters. Raises what the study raises."""
        self.study = STUDIES[notebook]
        self.profile = load_profile(profile, model or None)
        self.folders = files.local(self.profile.run)
        if folder := os.environ.get(TABLES):
            self.scratch = tempfile.TemporaryDirectory()  # the run's own figures stay as they are
            self.folders = dataclasses.replace(self.folders, tables=Path(folder), figures=Path(self.scratch.name))
            self.tables, parts = read_tables(self.folders.tables / notebook), []
        else:
            self.tables = self.study(self.profile)
            parts = [said_of_parts(model) for model in self.study.models(self.profile)[0]]
        if links := _neighbours(notebook, self._has_page):
            self.say(links)
        self.say(f"Run `{self.profile.run}`: {self.profile.description}")
        for said in filter(None, dict.fromkeys(parts)):
            self.say(said)
        for row in self.tables["not_run"].itertuples():
            self.say(f"**Not run:** {row.what}: {row.reason}")

    def _has_page(self, notebook: str) -> bool:
        """Has this run a page of another notebook: one that has tables, or that its profile is about to measure?"""
        study, profile = STUDIES[notebook], self.profile
        is_planned = all(need in profile.sections for need in study.needs) and not study.passes_over(profile.model)
        return (is_planned and TABLES not in os.environ) or (self.folders.tables / notebook).is_dir()

    def say(self, text: str) -> None:
        """Show a sentence."""
        display(Markdown(text))

    def figure(self, name: str) -> None:
        """Draw a figure into the run's folder, and show it with its caption and what to see in it."""
        drawing = draw(name, self.tables, self.folders.figures)
        display(Image(self.folders.figures / f"{name}.png", alt=FIGURES[name].caption))
        number = name.split("_")[0].removeprefix("fig")
        self.say(f"*Figure {number}. {FIGURES[name].caption} {self._measured()}*\n\n{drawing.takeaway}".rstrip())

    def _measured(self) -> str:
        """What the figures show, exactly: "SmolLM2-135M-Instruct (Q4_1), float32."."""
        record = self.folders.tables / self.study.notebook / "provenance.json"
        return f"{', '.join(models_measured(record, ', '))}."

    def table(self, name: str, *columns: str, where: str = "") -> None:
        """Show columns of a table (none named: all that stand for themselves), those rows for which `where` holds.

        Ends of intervals are shown behind their value, so they need not be named.
        """
        if name not in self.tables:  # pages are rendered from committed tables, too
            number = self.study.notebook[:2]
            self.say(f"*Not run:* this run has no table `{name}` yet. `make reproduce NOTEBOOKS={number}` makes it.")
            return
        rows: pd.DataFrame = self.tables[name].query(where) if where else self.tables[name]
        declared = {column.name: column for column in {**self.study.tables, **NOT_RUN}[name]}
        ends = {end for column in declared.values() for end in (column.low, column.high)}
        chosen = [declared[column] for column in columns] or [c for c in declared.values() if c.name not in ends]
        self.say(show(with_exact_names(rows), chosen) if len(rows) else "Nothing to show: this run has no such rows.")

    def example_model(self, name: str | None = None):
        """One model of the run (the first, or the one of this name) and what makes its input, for a live example."""
        load = load_located if "decoder" in self.study.kinds else load_located_other
        return load(self.located(name), self.profile.dtype)

    def located(self, name: str | None = None) -> LocatedModel:
        """One model of the run: the first, or the one of this name."""
        models = {model.name: model for model in self.study.models(self.profile)[0]}
        return models[name] if name else next(iter(models.values()))

    def advice(self) -> None:
        """What the run's numbers mean for somebody who wants to use a model like these."""
        self.say(ADVICE[self.study.notebook]({name: with_exact_names(rows) for name, rows in self.tables.items()}))

    def verdicts(self) -> None:
        """The verdict on each claim of the notebook; evidence and rules are folded away."""
        self.say(as_html(judge(self.folders.tables, self.study.notebook)))


def _neighbours(notebook: str, has_page: Callable[[str], bool]) -> str:
    """Links to the pages before and after this one: "Previous: [01 similarity](01_similarity.ipynb)"."""
    names = sorted(name for name in STUDIES if name == notebook or has_page(name))
    i = names.index(notebook)
    found = {"Previous": names[max(i - 1, 0) : i], "Next": names[i + 1 : i + 2]}
    links = [f"{word}: [{name.replace('_', ' ')}]({name}.ipynb)" for word, several in found.items() for name in several]
    return " · ".join(links)
