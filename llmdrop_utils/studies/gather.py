"""The tables of several runs together: what a comparison of models reads."""

import json
from pathlib import Path

import pandas as pd

from ..base import files
from ..report.tables import Tables, read_tables
from .profile import Profile
from .run import STUDIES


def runs_of(profile: Profile) -> dict[str, Profile]:
    """The runs that hold a profile's models, by model: one for each, or the profile's own for all."""
    return {model: profile.of(model) if profile.one_by_one else profile for model in profile.models}


def gathered(profile: Profile, notebook: str) -> tuple[Tables, dict[str, str]]:
    """The tables of a notebook, of all runs together; and what is not run, with the reason: the runs that lack them.

    A run whose profile has no section for the notebook lacks nothing.
    """
    parts: dict[str, list[pd.DataFrame]] = {}
    lacking: list[str] = []
    for run in runs_of(profile).values():
        folder = _folder(run, notebook)
        if not folder.is_dir():
            lacking += [run.run] if all(need in run.sections for need in STUDIES[notebook].needs) else []
            continue
        for table, rows in read_tables(folder).items():
            parts.setdefault(table, []).append(rows[:0] if table == "not_run" else rows)  # each run says its own
    filled = {table: [rows for rows in several if len(rows)] or several[:1] for table, several in parts.items()}
    not_run = {f"notebook {notebook[:2]} of {', '.join(lacking)}": "There are no results of it."} if lacking else {}
    return {table: pd.concat(several, ignore_index=True) for table, several in filled.items()}, not_run


def provenance(profile: Profile, notebook: str) -> list[dict]:
    """How the gathered tables came about."""
    records = [_folder(run, notebook) / "provenance.json" for run in runs_of(profile).values()]
    return [entry for record in records if record.exists() for entry in json.loads(record.read_text(encoding="utf-8"))]


def state_of(profile: Profile, notebooks: tuple[str, ...]) -> list[str]:
    """All tables that are gathered, and how they came about: what is made from them is up to date while this stays the same."""
    folders = [_folder(run, notebook) for notebook in notebooks for run in runs_of(profile).values()]
    found = [file for folder in folders for file in folder.glob("*.*")]
    return [file.read_text(encoding="utf-8") for file in sorted(found)]


def _folder(run: Profile, notebook: str) -> Path:
    """Where a run has the tables of a notebook."""
    return files.local(run.run).tables / notebook


def of_model(tables: Tables, model: str) -> Tables:
    """The rows of one model."""
    return {name: rows[rows["model"] == model] if "model" in rows else rows for name, rows in tables.items()}
