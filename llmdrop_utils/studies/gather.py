"""The tables of several runs together: what a comparison of models reads."""

import json
from pathlib import Path

import pandas as pd

from ..base import files
from ..report.tables import Tables, read_tables
from .profile import Profile


def runs_of(profile: Profile) -> dict[str, Profile]:
    """The runs that hold a profile's models, by model: one for each, or the profile's own for all."""
    return {model: profile.of(model) if profile.one_by_one else profile for model in profile.models}


def gathered(profile: Profile, notebook: str) -> tuple[Tables, dict[str, str]]:
    """The tables of a notebook, of all runs together; and what is not run, with the reason: the runs that lack them."""
    parts: dict[str, list[pd.DataFrame]] = {}
    lacking: list[str] = []
    for name, folder in _folders(profile, notebook).items():
        if not folder.is_dir():
            lacking.append(name)
            continue
        for table, rows in read_tables(folder).items():
            parts.setdefault(table, []).append(rows[:0] if table == "not_run" else rows)  # each run says its own
    filled = {table: [rows for rows in several if len(rows)] or several[:1] for table, several in parts.items()}
    not_run = {f"notebook {notebook[:2]} of {', '.join(lacking)}": "There are no results of it."} if lacking else {}
    return {table: pd.concat(several, ignore_index=True) for table, several in filled.items()}, not_run


def provenance(profile: Profile, notebook: str) -> list[dict]:
    """How the gathered tables came about."""
    records = [folder / "provenance.json" for folder in _folders(profile, notebook).values()]
    return [entry for record in records if record.exists() for entry in json.loads(record.read_text(encoding="utf-8"))]


def state_of(profile: Profile, notebooks: tuple[str, ...]) -> list[str]:
    """All tables that are gathered, and how they came about: what is made from them is up to date while this stays the same."""
    found = [file for notebook in notebooks for folder in _folders(profile, notebook).values() for file in folder.glob("*.*")]
    return [file.read_text(encoding="utf-8") for file in sorted(found)]


def _folders(profile: Profile, notebook: str) -> dict[str, Path]:
    """Run -> the folder of a notebook's tables."""
    return {run.run: files.local(run.run).tables / notebook for run in runs_of(profile).values()}


def of_model(tables: Tables, model: str) -> Tables:
    """The rows of one model."""
    return {name: rows[rows["model"] == model] if "model" in rows else rows for name, rows in tables.items()}
