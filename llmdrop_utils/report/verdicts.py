"""The paper's claims, and a verdict for each from the tables of a run.

data/claims.yaml lists the claims and their rules. A check reads the tables of its notebook and judges each model; a claim is
reproduced if it holds for all of them. The scorecard lists every claim, run or not.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pandas as pd
import yaml

from ..base import files
from ..base.files import replacing, write_text
from .show import as_markdown
from .tables import Tables, read_tables

REPRODUCED, DEVIATES, NOT_RUN = "reproduced", "deviates", "not run"

Finding = tuple[str, bool | None, str]  # model, does the claim hold (None: could not be tested), the numbers

CHECKS: dict[str, Callable[..., Iterator[Finding]]] = {}  # rule -> (tables, thresholds by name) -> findings
ADVICE: dict[str, Callable[[Tables], str]] = {}  # notebook -> tables -> what they mean for a user


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
    """data/claims.yaml, with each rule's sentence made from its thresholds."""
    claims = yaml.safe_load((files.DATA / "claims.yaml").read_text(encoding="utf-8"))
    rule = lambda claim: claim["rule"].format(**claim.get("thresholds", {}))  # noqa: E731
    return [claim | {"rule": re.sub(r"(\d)%", r"\1 %", rule(claim))} for claim in claims]


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
    findings = list(CHECKS[claim["check"]](tables, **claim.get("thresholds", {})))
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
    """Write scorecard.md (to read) and scorecard.csv (to compute with)."""
    with replacing(folder / "scorecard.csv") as temporary:
        pd.DataFrame([dataclasses.asdict(v) for v in verdicts]).to_csv(temporary, index=False, lineterminator="\n")
    counts = [f"{sum(v.verdict == kind for v in verdicts)} {kind}" for kind in (REPRODUCED, DEVIATES, NOT_RUN)]
    summary = f"{', '.join(counts)}, of {len(verdicts)} claims."
    rules = "\n".join(f"- *{v.claim}* {v.rule}" for v in verdicts if v.verdict != NOT_RUN)
    parts = [f"# Scorecard: {run}", about, summary, _listed(verdicts, evidence=True), "How each verdict is reached:", rules]
    return write_text(folder / "scorecard.md", "\n\n".join(parts).rstrip() + "\n")


def as_html(verdicts: list[Verdict]) -> str:
    """The verdicts for a notebook, in Markdown; the evidence and the rule of each are folded away."""
    folded = [f"<details><summary>{v.claim}</summary>\n\n{v.evidence}\n\n*Rule: {v.rule}*\n\n</details>" for v in verdicts]
    return f"{_listed(verdicts, evidence=False)}\n\nEvidence and rules (unfold a claim):\n\n" + "\n".join(folded)


def _listed(verdicts: list[Verdict], evidence: bool) -> str:
    rows = [
        {"Claim": v.claim, "Where": v.where, "Notebook": v.notebook, "Verdict": f"**{v.verdict}**"}
        | ({"Evidence": v.evidence} if evidence else {})
        for v in verdicts
    ]
    return as_markdown(pd.DataFrame(rows))


# ---- what rules are made of ------------------------------------------------------------------------------------------


C = TypeVar("C", bound=Callable[..., Iterator[Finding]])


def check(function: C) -> C:
    """Register a rule under its name, for `check:` in data/claims.yaml, which also gives its thresholds."""
    CHECKS[function.__name__] = function
    return function


def advice(notebook: str) -> Callable[[Callable[[Tables], str]], Callable[[Tables], str]]:
    """Register what a notebook says under "what to do with your model"."""

    def register(function: Callable[[Tables], str]) -> Callable[[Tables], str]:
        ADVICE[notebook] = function
        return function

    return register


def percent(row: pd.Series, name: str) -> str:
    return f"{100 * row[f'{name}_low']:.1f} to {100 * row[f'{name}_high']:.1f} %"


def lowest_of(rows: pd.DataFrame) -> list[pd.Series]:
    """For each kind, the row with the lowest correlation."""
    return [of_kind.loc[of_kind["correlation"].idxmin()] for _, of_kind in rows.groupby("kind", sort=False)]


def span(row: pd.Series, digits: int | None = None) -> str:
    digits = digits or (2 if abs(row["low"]) >= 0.1 else 3)
    return f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"
