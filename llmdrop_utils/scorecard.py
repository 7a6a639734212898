"""The scorecard of a run: the verdict on every claim, what was measured, and the paper's numbers beside ours."""

import json
from pathlib import Path

import pandas as pd

from .base.files import RunFolders
from .report.dtypes import other_dtype, write_dtypes
from .report.show import as_markdown
from .report.tables import Declaration, models_measured, read_tables, with_exact_names
from .report.verdicts import Verdict, judge, load_claims, write_scorecard
from .studies.numbers import write_numbers
from .studies.run import STUDIES


def judge_run(run: str, folders: RunFolders, description: str) -> list[Verdict]:
    """Write the scorecard of a run's tables, and the paper's numbers beside ours; returns the verdicts."""
    verdicts, about = judge(folders.tables), [_about(folders.tables, description)]
    if (beside := _claims_of_each_model(folders.tables)) and not (folders.tables / "01_similarity").is_dir():
        about.append(beside)  # the runs of the models have a scorecard each
        verdicts = [verdict for verdict in verdicts if (folders.tables / verdict.notebook).is_dir()]
    else:
        about.append(write_numbers(folders.tables, folders.figures))
    if moved := write_dtypes(run, folders.tables, folders.figures, declared()):
        about.append(moved)
    write_scorecard(verdicts, folders.figures, run, "\n\n".join(about), _in_other_dtype(run, folders, verdicts))
    return verdicts


def _claims_of_each_model(tables: Path) -> str:
    """The verdicts that notebook 11 lists, as a table of claims and models; empty if it has none of several models."""
    rows = with_exact_names(read_tables(tables / "11_sizes_and_causes").get("claims", pd.DataFrame({"model": []})))
    if rows["model"].nunique() < 2:
        return ""
    words = {claim["id"]: claim["claim"] for claim in load_claims()}
    grid = rows.pivot(index="claim", columns="model", values="verdict").loc[rows["claim"].unique(), rows["model"].unique()]
    shown = grid.fillna("not run").rename(index=words).rename_axis("Claim, for each model alone").reset_index()
    return as_markdown(shown)


def declared() -> dict[str, Declaration]:
    """What columns the tables of each notebook have."""
    return {notebook: study.tables for notebook, study in STUDIES.items()}


def _in_other_dtype(run: str, folders: RunFolders, verdicts: list[Verdict]) -> dict[str, str]:
    """Claim -> its verdict in the other dtype, of the notebooks that were measured in both."""
    found: dict[str, str] = {}
    for notebook in dict.fromkeys(verdict.notebook for verdict in verdicts):
        if notebook in STUDIES and (other := other_dtype(run, notebook, folders.tables)):
            dtype, tables = other
            found |= {v.id: f"{v.verdict} ({dtype})" for v in judge(tables.parent, notebook)}
    return found


def _about(tables: Path, description: str) -> str:
    """What a run is about: its profile's description, and what was measured."""
    lines = [description]
    for record in sorted(tables.glob("*/provenance.json")):
        entries = json.loads(record.read_text(encoding="utf-8"))
        models = models_measured(record)
        texts = [f"{e['corpus']} ({e['tokens'][0]} x {e['tokens'][1]} tokens)" for e in entries if "corpus" in e]
        tasks = [f"{e['task']} ({e['num_fewshot'] or 0}-shot)" for e in entries if "task" in e]
        on = f"; on {', '.join(dict.fromkeys(texts + tasks))}" if texts + tasks else ""
        lines.append(f"{record.parent.name}: {', '.join(models)}{on}.")
    return "\n".join(lines)
