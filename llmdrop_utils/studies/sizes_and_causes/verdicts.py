"""Rules of notebook 11: sizes and causes."""

from collections.abc import Iterator
from functools import partial

import pandas as pd

from ...measure.causes import ENTROPY, OUTPUT, RANK
from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, span
from .compare import ALL, SERIES, TOGETHER
from .rows import DAMAGE, IMPORTANCE

CLAIMED = {ENTROPY: "entropy of attention weights", RANK: "effective rank of the input", OUTPUT: "size of the output"}
MEASURES = {"text": "next-token accuracy", "tasks": "what lies above guessing in the tasks"}


@check
def larger_models_lose_less(tables: Tables) -> Iterator[Finding]:
    rows = tables["sizes"].query("what == 'retained without half'")
    for small, large in SERIES:
        pair = f"{large} minus {small}"
        yield _retained(rows[rows["models"] == pair], f"{small} and {large}", pair, "both are needed")


@check
def larger_models_lose_less_across(tables: Tables) -> Iterator[Finding]:
    rows = tables["sizes"].query("what == 'retained without half'")
    yield _retained(
        rows[rows["models"] == ALL],
        ALL,
        "per tenfold number of parameters",
        "three models of different sizes or more are needed",
    )


def _retained(rows: pd.DataFrame, who: str, what: str, lacking: str) -> Finding:
    if not len(rows):
        return Finding(who, f"{lacking}: `make reproduce PROFILE=ladder`, or PROFILE=gpu")
    compared = [
        Comparison(
            f"{what}, {MEASURES[r.measure]},", r.change, r.low, r.high, at_least=0, form="+.1%", unit="documents or samples"
        )
        for r in rows.itertuples()
    ]
    return Finding(who, "; ".join(map(str, compared)), compared)


@check
def causes_predict_importance(tables: Tables, correlation: float) -> Iterator[Finding]:
    rows = tables["overall"]
    rows = rows[(rows["target"] == IMPORTANCE) & rows["cause"].isin(CLAIMED)]
    if set(rows["cause"]) != set(CLAIMED) or rows["models"].min() < 3:
        yield Finding(ALL, "all three, of three models or more, are needed: `make reproduce PROFILE=ladder`")
        return
    compared = [
        Comparison(
            CLAIMED[r.cause], r.correlation, r.low, r.high, at_least=correlation, size=r.models, unit="models", form="+.2f"
        )
        for r in rows.itertuples()
    ]
    yield Finding(ALL, f"mean correlation with importance: {'; '.join(map(str, compared))}", compared)


@check
def mlp_keeps_tokens_apart(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["rank_gaps"].groupby("model", sort=False):
        compared = [Comparison(f"at n = {r.n}", r.difference, r.low, r.high, above=0, form="+.1f") for r in rows.itertuples()]
        yield Finding(model, f"rank without attention minus rank without MLPs: {'; '.join(map(str, compared))}", compared)


@advice("11_sizes_and_causes")
def what_to_do(tables: Tables) -> str:
    """What can go by size, and which number tells the layers."""
    lines = []
    for model, rows in tables["reach"].groupby("model", sort=False) if len(tables["reach"]) else []:
        of = partial(_can_go, rows.set_index(["measure", "kind"]))
        lines.append(
            f"- **{model}**: {of('text', 'attention')} attention layers and {of('text', 'mlp')} MLPs keep 90 % of next-token "
            f"accuracy; {of('tasks', 'attention')} and {of('tasks', 'mlp')} keep 95 % of the tasks."
        )
    best = {target: _best(tables, target) for target in (IMPORTANCE, DAMAGE)}
    if all(row is not None for row in best.values()):
        told = [
            f"{target} goes best with {row['cause']} ({row['correlation']:+.2f}, {span(row)})" for target, row in best.items()
        ]
        lines.append(f"\nOver {best[DAMAGE]['models']} models, {' and '.join(told)}.")
        lines.append(_without_forward_pass(tables))
    return "\n".join(lines)


def _can_go(rows: pd.DataFrame, measure: str, kind: str) -> str:
    """How many of a kind; "8 or more" where no more were tried."""
    if (measure, kind) not in rows.index:
        return "an unknown number of"
    found = rows.loc[(measure, kind)]
    return f"{found['n']}{' or more' if found['is_cut'] else ''}"


def _best(tables: Tables, target: str):
    rows = tables["overall"]
    rows = rows[(rows["target"] == target) & (rows["models"] == rows["models"].max()) & (rows["models"] > 1)]
    return None if rows.empty else rows.loc[rows["correlation"].abs().idxmax()]


def _without_forward_pass(tables: Tables) -> str:
    """What can be told of a model's layers before it reads anything, by what other models say."""
    rows = tables["left_out"]
    found = []
    for name in (*TOGETHER, IMPORTANCE):
        of_name = rows[(rows["predictor"] == name) & (rows["target"] == DAMAGE)]
        label = {IMPORTANCE: "importance, measured on it"}.get(name, name)
        found.append(f"{label} {of_name['correlation'].mean():+.2f} ({of_name['correlation'].min():+.2f} at worst)")
    return f"The damage in a model that was left out follows, by mean rank correlation, from {'; '.join(found)}."
