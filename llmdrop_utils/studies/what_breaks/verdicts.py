"""Rules of notebook 08: what breaks first."""

import math
from collections.abc import Iterator

import pandas as pd

from ...base.stats import difference_interval
from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, triple
from ..ablations.rows import TASKS, TEXT
from .abilities import ANSWERS
from .changes import NONE, WANDA, bits_name

DOCUMENTS = "documents"
FEW_BITS = bits_name(4)  # as in Table 11
UNKNOWN = (math.nan, math.nan, math.nan)  # where the dense model is at chance: inconclusive


@check
def mathematics_holds(tables: Tables, below: int, retained: float) -> Iterator[Finding]:
    rows = tables["abilities"][tables["abilities"]["ability"] == ANSWERS]
    for model, of_model in rows.groupby("model", sort=False):
        few = of_model[(of_model["kind"] == "attention") & (of_model["n"] < below)]
        dense = of_model[of_model["kind"] == "dense"].iloc[0]
        score = Comparison("dense", *triple(dense, "value"), form=".1%")
        said = f"exact answers to {dense['samples']} word problems: {score}"
        if few.empty:
            yield Finding(str(model), f"{said}; no count of layers below {below} was tried")
            continue
        compared = [
            Comparison(f"{r['n']} dropped", *triple(r, "retained", "retained_"), at_least=retained, form=".0%",
                       size=r["samples"], unit=DOCUMENTS)
            for r in few.to_dict("records")
        ]  # fmt: skip
        if math.isnan(few["retained"].iloc[0]):
            said += ", no better than guessing, so there is nothing to keep"
        else:
            said += f"; retained: {'; '.join(map(str, compared))}"
        yield Finding(str(model), said, compared)


@check
def attention_drop_keeps_context(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["context_gaps"].groupby("model", sort=False):
        compared = [
            Comparison(f"{r['probe']}, {r['n']} dropped", *(triple(r, "difference", "") if r["told"] else UNKNOWN), above=0,
                       form="+.1%")
            for r in rows.to_dict("records")
        ]  # fmt: skip
        at_chance = sorted(set(rows[~rows["told"].astype(bool)]["probe"]))
        said = f"found with attention dropped minus with MLPs dropped: {'; '.join(c for c in map(str, compared))}"
        if at_chance:
            said += f" (at guessing without any dropped: {', '.join(at_chance)})"
        yield Finding(str(model), said, compared)


@check
def quantising_costs_little(tables: Tables, points: float) -> Iterator[Finding]:
    rows = tables["changes"]
    rows = rows[(rows["change"] == FEW_BITS) & (rows["measure"] == TASKS)]
    for model, of_model in rows.groupby("model", sort=False):
        compared = [
            Comparison(f"{r['n']} dropped" if r["n"] else "dense", *points_lost(r), below=points, form=".1f", unit=DOCUMENTS)
            for r in of_model.to_dict("records")
        ]
        yield Finding(str(model), f"points that 4 bits cost: {'; '.join(map(str, compared))}", compared)


def points_lost(row: dict) -> tuple[float, float, float]:
    """What a change costs, in hundredths of the score."""
    return -100 * row["cost"], -100 * row["cost_high"], -100 * row["cost_low"]


@check
def dropping_beats_pruning(tables: Tables, points: float) -> Iterator[Finding]:
    rows = tables["pruned"][tables["pruned"]["measure"] == TASKS]
    for model, of_model in rows.groupby("model", sort=False):
        speed = tables["speed"][tables["speed"]["model"] == model].set_index(["method", "n"])
        compared = []
        for r in of_model.to_dict("records"):
            gap = (100 * r["difference"], 100 * r["low"], 100 * r["high"])
            compared.append(
                Comparison(
                    f"points, {r['n']} dropped minus as many weights pruned",
                    *gap,
                    at_least=-points,
                    form="+.1f",
                    unit=DOCUMENTS,
                )
            )
            dropped, pruned = (triple(speed.loc[method, r["n"]], "speedup") for method in (NONE, WANDA))
            faster = difference_interval(dropped, pruned)
            compared.append(Comparison(f"speed-up, {r['n']} dropped minus pruned", *faster, above=0, form="+.2f"))
        yield Finding(str(model), "; ".join(map(str, compared)), compared)


@check
def tuning_recovers(tables: Tables, share: float) -> Iterator[Finding]:
    rows = tables["recovered"][tables["recovered"]["kind"] == "attention"]
    for model, of_model in rows.groupby("model", sort=False):
        compared = [
            Comparison(f"of {r['measure']}, {r['n']} dropped", *triple(r, "recovered"), at_least=share, form=".0%")
            for r in of_model.to_dict("records")
        ]
        yield Finding(str(model), f"share of the loss that tuning regains: {'; '.join(map(str, compared))}", compared)


@advice("08_what_breaks")
def what_to_do(tables: Tables) -> str:
    """Which ability goes first, and up to which count each holds."""
    text = []
    for model, rows in tables["breaks"].groupby("model", sort=False):
        told = []
        for kind, name in (("attention", "attention layers"), ("mlp", "MLPs")):
            known = rows[rows["kind"] == kind].dropna(subset=["n"])
            if known.empty:
                continue
            least, most = known["n"].min(), known["n"].max()
            first = ", ".join(known[known["n"] == least]["ability"])
            last = ", ".join(known[known["n"] == most]["ability"])
            if least == most:
                told.append(f"Without up to {least:.0f} {name}, 90 % of each ability is left.")
            else:
                told.append(f"Of {name}, {least:.0f} can go before less than 90 % is left of {first}; {most:.0f} for {last}.")
        lost = rows[rows["n"].isna()]["ability"].unique()
        if len(lost):
            told.append(f"The dense model is at chance in {', '.join(lost)}, so nothing is said of these.")
        told += [_sure(tables["confidence"], model), _rounded(tables, model)]
        text.append(f"**{model}**: {' '.join(part for part in told if part)}")
    text.append("Test a dropped model on the ability that you need, and not on choices alone: what it writes may break before.")
    return "\n\n".join(text)


def _sure(confidence: pd.DataFrame, model) -> str:
    """Whether dropping makes a model too sure of itself."""
    rows = confidence[(confidence["model"] == model) & (confidence["kind"] == "attention")]
    dense = confidence[(confidence["model"] == model) & (confidence["kind"] == "dense")]
    if rows.empty or dense.empty:
        return ""
    last = rows.loc[rows["n"].idxmax()]
    change = f"{dense['error'].iloc[0]:.1%} to {last['error']:.1%}".replace("%", " %")
    return f"The calibration error of choices goes from {change} without {last['n']} attention layers."


def _rounded(tables: Tables, model) -> str:
    """What 4 bits cost with and without layers dropped, and whether to choose layers before or after."""
    rows, rankings = (tables[name][tables[name]["model"] == model] for name in ("changes", "rankings"))
    rows = rows[(rows["change"] == FEW_BITS) & (rows["measure"] == TEXT)].sort_values("n")
    same = rankings[rankings["change"] == FEW_BITS].sort_values("n")
    if rows.empty or same.empty:
        return ""
    of = lambda n: f"without {n} layers" if n else "of the dense model"  # noqa: E731
    costs = ", ".join(f"{-r.cost:+z.3f} {of(r.n)}" for r in rows.itertuples())
    shared, n = same["shared"].iloc[-1], same["n"].iloc[-1]
    order = "so quantise before or after" if shared == n else "so choose the layers before you quantise"
    return f"{FEW_BITS} cost, in nats per token, {costs}; they choose {shared} of the {n} layers alike, {order}."
