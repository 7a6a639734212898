"""The paper's claims, and a verdict for each from the tables of a run.

data/claims.yaml lists the claims and their rules. A check reads the tables of its notebook and says what is compared with which
threshold; the rule engine (rules.py) decides. The scorecard lists every claim, run or not.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml
from pandas.errors import UndefinedVariableError

from ..base import files
from ..base.files import replacing, write_text
from ..sources.catalogue import exact_name
from .rules import NOT_RUN, OUTCOMES, Finding, decide
from .show import as_markdown
from .tables import Tables, read_tables

CHECKS: dict[str, Callable[..., Iterator[Finding]]] = {}  # rule -> (tables, thresholds by name) -> findings
ADVICE: dict[str, Callable[[Tables], str]] = {}  # notebook -> tables -> what they mean for a user


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line of the scorecard."""

    id: str
    claim: str
    where: str
    notebook: str
    verdict: str  # one of `rules.OUTCOMES`
    evidence: str  # the numbers, or why it was not run and what would run it
    rule: str
    history: tuple[
        dict, ...
    ] = ()  # date, rule, verdicts (run -> verdict), why: of earlier rules, changed after numbers were seen


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
        verdict, evidence = verdict_of(claim, read_tables(results / claim["notebook"]))
        shown = {key: claim[key] for key in ("id", "claim", "where", "notebook", "rule")}
        verdicts.append(Verdict(**shown, verdict=verdict, evidence=evidence, history=tuple(claim.get("history", ()))))
    return verdicts


def verdict_of(claim: dict, tables: Tables) -> tuple[str, str]:
    """The verdict on one claim, and its evidence, from the tables of its notebook."""
    if "check" not in claim:
        return NOT_RUN, f"notebook {claim['notebook']} is not written yet"
    if not tables:
        return NOT_RUN, f"notebook {claim['notebook']} has not been run: `make reproduce NOTEBOOKS={claim['notebook'][:2]}`"
    try:
        findings = list(CHECKS[claim["check"]](tables, **claim.get("thresholds", {})))
    except (KeyError, AttributeError, UndefinedVariableError) as error:
        message = str(error.args[0])  # "correlation", or "Column not found: correlation", or "name 'correlation' is ..."
        missing = (re.findall(r"'(\w+)'", message) or message.split())[-1]
        return NOT_RUN, (
            f"the tables of notebook {claim['notebook']} are of an older version, without {missing!r}: "
            f"`make reproduce NOTEBOOKS={claim['notebook'][:2]}` makes them anew"
        )
    findings += [Finding(row.what, row.reason) for row in tables["not_run"].itertuples()]
    outcome, settles = decide(findings)
    named = len(findings) > 1  # a single model needs no name in each line
    evidence = "; ".join(
        (f"{exact_name(f.model)}: " + ("" if f.comparisons else "not run: ")) * named + f.text for f in findings
    )
    if outcome == NOT_RUN:
        return NOT_RUN, evidence or "this run has nothing to compare: see the corpora and sample counts of its profile"
    return outcome, ". ".join([evidence, *settles])


def write_scorecard(
    verdicts: list[Verdict], folder: Path, run: str, about: str, other_dtype: dict[str, str] | None = None
) -> Path:
    """Write scorecard.md (to read) and scorecard.csv (to compute with). other_dtype: claim -> its verdict in another dtype."""
    with replacing(folder / "scorecard.csv") as temporary:
        rows = pd.DataFrame([dataclasses.asdict(v) for v in verdicts])
        rows.drop(columns="history").to_csv(temporary, index=False, lineterminator="\n")
    counts = [f"{sum(v.verdict == kind for v in verdicts)} {kind}" for kind in OUTCOMES]
    summary = f"{', '.join(counts)}, of {len(verdicts)} claims."
    rules = "\n".join(f"- *{v.claim}* {v.rule}" for v in verdicts)
    parts = [f"# Scorecard: {run}", about, summary, _listed(verdicts, other_dtype or {}, evidence=True)]
    parts += ["## How each verdict is reached", ENGINE, rules]
    if changed := [_history(v, run) for v in verdicts if v.history]:
        count = f"{len(changed)} of {len(verdicts)} rules were changed after numbers of some run had been seen."
        parts += ["## Rules that changed after numbers were seen", count, "\n".join(changed)]
    return write_text(folder / "scorecard.md", "\n\n".join(parts).rstrip() + "\n")


ENGINE = (
    "Every rule is decided by the same engine from 95 % intervals. *Reproduced*: all intervals lie on the claim's side of the "
    "threshold. *Deviates*: one lies on the other side, with Holm's correction for the number of comparisons in the rule. "
    "*Inconclusive*: neither, and the evidence says how large a run would settle it; a task that has fewer documents cannot. "
    "Where a rule says that one comparison is enough, the two are reversed: one inside reproduces the claim (by Holm's "
    "correction), and it deviates if all lie outside."
)


def _history(verdict: Verdict, run: str) -> str:
    """What a rule said before, and its verdict then on this run."""
    entries = []
    for entry in verdict.history:
        then = entry["verdicts"].get(run, "not run")
        entries.append(f"  - until {entry['date']} ({then}): {entry['rule']} Why it was changed: {entry['why'].strip()}")
    return "\n".join([f"- *{verdict.claim}* Now {verdict.verdict}.", *entries])


def as_html(verdicts: list[Verdict]) -> str:
    """The verdicts for a notebook, in Markdown; the evidence and the rule of each are folded away."""
    folded = [f"<details><summary>{v.claim}</summary>\n\n{v.evidence}\n\n*Rule: {v.rule}*\n\n</details>" for v in verdicts]
    return f"{_listed(verdicts, {}, evidence=False)}\n\nEvidence and rules (unfold a claim):\n\n" + "\n".join(folded)


def _listed(verdicts: list[Verdict], other_dtype: dict[str, str], evidence: bool) -> str:
    rows = [
        {"Claim": v.claim, "Where": v.where, "Notebook": v.notebook, "Verdict": f"**{v.verdict}**"}
        | ({"In another dtype": other_dtype.get(v.id, "not run")} if other_dtype else {})
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


def triple(row: Any, name: str, prefix: str = "") -> tuple[float, float, float]:
    """A number of a row and the ends of its interval: columns `name`, `low` and `high` (or with a prefix: `speedup_low`)."""
    return row[name], row[f"{prefix}low"], row[f"{prefix}high"]


def threshold(check_name: str, name: str) -> float:
    """A threshold of the rule with this check, for a figure that shows where it lies."""
    (claim,) = [claim for claim in load_claims() if claim.get("check") == check_name]
    return float(claim["thresholds"][name])


def kth_least(rows: pd.DataFrame, share: float) -> pd.Series:
    """The last of the least important layers of a kind: rows have one layer each, and a share of them counts (one at least)."""
    return rows.sort_values("importance", kind="stable").iloc[max(1, int(share * len(rows))) - 1]


def percent(row: pd.Series, name: str) -> str:
    return f"{100 * row[f'{name}_low']:.1f} to {100 * row[f'{name}_high']:.1f} %"


def lowest_of(rows: pd.DataFrame) -> list[pd.Series]:
    """For each kind, the row with the lowest correlation."""
    return [of_kind.loc[of_kind["correlation"].idxmin()] for _, of_kind in rows.groupby("kind", sort=False)]


def span(row: pd.Series, digits: int | None = None) -> str:
    digits = digits or (2 if abs(row["low"]) >= 0.1 else 3)
    return f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"
