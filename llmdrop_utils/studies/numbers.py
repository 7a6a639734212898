"""The paper's 732 numbers beside ours: numbers.csv has a row for each, with where ours was read, or why it was not."""

from pathlib import Path

import numpy as np
import pandas as pd

from ..base.files import replacing
from ..report.rules import NOT_RUN
from . import paper
from .number_rules import NotRun, RunTables, look_up

COMPARED = "compared"
WHY = {  # kinds of reasons why a number is not compared, as the scorecard counts them
    "model": "need a model that this run does not have",
    "table": "belong to tables that no notebook writes yet",
    "notebook": "belong to notebooks that this run leaves out",
    "row": "were measured in another way, or not at all",
    "statement": "are statements without a number",
    "setting": "are settings, not results",
    "unlabelled": "are printed without their model, task or count",
}


def compare(folder: Path) -> pd.DataFrame:
    """A row for each of the paper's numbers, in their order. folder: the tables of a run (see `RunTables`).

    id, where, model, method, n_drop, what, unit, paper (as printed); status ("compared" or "not run"); ours, low, high and
    difference (ours minus the paper's) in the paper's unit; source; reason (why it is not run); why (a key of `WHY`); note.
    """
    run, rows = RunTables(folder), []
    for claim in paper.numbers():
        row = {name: claim[name] for name in ("id", "where", "model", "method", "n_drop", "what", "unit")}
        row |= {"paper": str(claim["value"]), "status": NOT_RUN, **dict.fromkeys(("ours", "low", "high", "difference"), np.nan)}
        row |= {"source": None, "reason": None, "note": claim.get("note"), "why": None}
        try:
            ours = look_up(run, claim)
            row |= {"status": COMPARED, "difference": ours.value - paper.value_of(claim), "ours": ours.value}
            row |= {"low": ours.low, "high": ours.high, "source": ours.source}
        except NotRun as reason:
            row["why"], row["reason"] = reason.args
        rows.append(row)
    return pd.DataFrame(rows).astype({"n_drop": "Int64"})


def write_numbers(tables: Path, folder: Path) -> str:
    """Write `compare` to numbers.csv in `folder`; returns the sentence that counts them, for the scorecard."""
    compared = compare(tables)
    with replacing(folder / "numbers.csv") as temporary:
        compared.drop(columns="why").to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    n = (compared["status"] == COMPARED).sum()
    counts = compared["why"].value_counts(sort=True)
    reasons = ", ".join(f"{count} {WHY[why]}" for why, count in counts.items())
    settings = ((compared["status"] == COMPARED) & compared["id"].str.startswith("T5.")).sum()  # numbers of examples
    of_these = f", {settings} of them settings" if settings else ""
    return (
        f"Of the paper's {len(compared)} numbers {n} were compared with ours{of_these} ([numbers.csv](numbers.csv)), "
        f"{len(compared) - n} not run: {reasons}."
    )
