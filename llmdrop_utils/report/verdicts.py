"""The paper's claims, and a verdict for each from the tables of a run.

data/claims.yaml lists the claims and their rules. A check reads the tables of its notebook and judges each model; a claim is
reproduced if it holds for all of them. The scorecard lists every claim, run or not.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import yaml

from ..base import files
from ..base.files import replacing, write_text
from .tables import Tables, read_tables

REPRODUCED, DEVIATES, NOT_RUN = "reproduced", "deviates", "not run"

Finding = tuple[str, bool | None, str]  # model, does the claim hold (None: could not be tested), the numbers

CHECKS: dict[str, Callable[[Tables], Iterator[Finding]]] = {}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line of the scorecard."""

    id: str
    claim: str
    where: str
    notebook: str
    verdict: str  # REPRODUCED, DEVIATES or NOT_RUN
    evidence: str  # the numbers, or why it was not run and what would run it
    rule: str


def load_claims() -> list[dict]:
    """data/claims.yaml."""
    return yaml.safe_load((files.ROOT / "data" / "claims.yaml").read_text(encoding="utf-8"))


def judge(results: Path, notebook: str | None = None) -> list[Verdict]:
    """The verdict on every claim (or on those of one notebook) from the tables under `results`, data/results/<run>."""
    verdicts = []
    for claim in load_claims():
        if notebook not in (None, claim["notebook"]):
            continue
        verdict, evidence = _judge(claim, read_tables(results / claim["notebook"]))
        shown = {key: claim[key] for key in ("id", "claim", "where", "notebook", "rule")}
        verdicts.append(Verdict(**shown, verdict=verdict, evidence=evidence))
    return verdicts


def _judge(claim: dict, tables: Tables) -> tuple[str, str]:
    if "check" not in claim:
        return NOT_RUN, f"notebook {claim['notebook']} is not written yet"
    if not tables:
        return NOT_RUN, f"notebook {claim['notebook']} has not been run: `make reproduce NOTEBOOKS={claim['notebook'][:2]}`"
    findings = list(CHECKS[claim["check"]](tables))
    findings += [(row.what, None, row.reason) for row in tables["not_run"].itertuples()]
    tested = [holds for _, holds, _ in findings if holds is not None]
    named = len(findings) > 1  # a single model needs no name in each line
    evidence = "; ".join(
        (f"{model}: " if named else "") + ("" if holds is not None else "not run: ") * named + text
        for model, holds, text in findings
    )
    if not tested:
        return NOT_RUN, evidence or "this run has nothing to compare: see the corpora and sample counts of its profile"
    return (REPRODUCED if all(tested) else DEVIATES), evidence


def write_scorecard(verdicts: list[Verdict], folder: Path, run: str, about: str) -> Path:
    """Write figures/<run>/scorecard.md (to read) and scorecard.csv (to compute with)."""
    table = pd.DataFrame([dataclasses.asdict(v) for v in verdicts])
    with replacing(folder / "scorecard.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return write_text(folder / "scorecard.md", f"# Scorecard: {run}\n\n{about}\n\n{as_markdown(verdicts, totals=True)}")


def as_markdown(verdicts: list[Verdict], totals: bool = False) -> str:
    """The verdicts as a table, with the rules below it."""
    counts = [f"{sum(v.verdict == kind for v in verdicts)} {kind}" for kind in (REPRODUCED, DEVIATES, NOT_RUN)]
    lines = [", ".join(counts) + f", of {len(verdicts)} claims.", ""] if totals else []
    lines += ["| Claim | Where | Notebook | Verdict | Evidence |", "|---|---|---|---|---|"]
    for v in verdicts:
        cells = [v.claim, v.where, v.notebook, f"**{v.verdict}**", v.evidence]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "How each verdict is reached:", ""]
    lines += [f"- *{v.claim}* {v.rule}" for v in verdicts if v.verdict != NOT_RUN]
    return "\n".join(lines) + "\n"


# ---- what rules are made of ------------------------------------------------------------------------------------------


def check(function: Callable[[Tables], Iterator[Finding]]):
    """Register a rule under its name, for `check:` in data/claims.yaml."""
    CHECKS[function.__name__] = function
    return function


def percent(row: pd.Series, name: str) -> str:
    return f"{100 * row[f'{name}_low']:.1f} to {100 * row[f'{name}_high']:.1f} %"


def lowest_of(rows: pd.DataFrame) -> list[pd.Series]:
    """For each kind, the row with the lowest correlation."""
    return [of_kind.loc[of_kind["correlation"].idxmin()] for _, of_kind in rows.groupby("kind", sort=False)]


def span(row: pd.Series, digits: int | None = None) -> str:
    digits = digits or (2 if abs(row["low"]) >= 0.1 else 3)
    return f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"
