"""Rules of notebook 07: stages of training."""

import math
from collections.abc import Iterator

import pandas as pd

from ...base.stats import difference_interval
from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, kth_least, span, triple


@check
def redundant_from_the_start(tables: Tables, first: float) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["means"]):
        others = seeds[seeds["kind"] != "attention"]
        late = others[others["progress"] >= first]
        if late["position"].nunique() < 2:
            yield Finding(model, "it has no two stages after the first ninth of its training")
            continue
        text = []
        for layers, rows in late.groupby("layers", sort=False):
            worst = rows.sort_values("above_low").iloc[0]
            margin = f"{worst['above_attention']:+.4f} ({worst['above_low']:+.4f} to {worst['above_high']:+.4f})"
            text.append(
                f"{layers}: {_since(others[others['layers'] == layers])} (smallest margin over attention: {margin} for "
                f"{worst['kind']} at {worst['stage']} of seed {worst['seed']})"
            )
        compared = [
            Comparison(f"{r.kind} minus attention, {r.layers}, {r.stage} of seed {r.seed}", r.above_attention, r.above_low,
                       r.above_high, above=0, form="+.4f")
            for r in late.itertuples()
        ]  # fmt: skip
        yield Finding(model, "; ".join(text), [*compared, *_lacking(late, seeds)])


@check
def others_rise(tables: Tables, first: float) -> Iterator[Finding]:
    change = tables["change"]
    for model, seeds in _by_model(tables["means"]):
        late = change[(change["model"] == model) & (change["progress"] >= first)] if len(change) else change
        if late.empty:
            yield Finding(model, "it has no two stages after the first ninth of its training")
            continue
        start = late[late["position"] == late["position"].min()]
        text, compared = [], _lacking(start, seeds)
        for (layers, seed), of_seed in start.groupby(["layers", "seed"], sort=False):
            by_kind = {row["kind"]: triple(row, "change") for row in of_seed.to_dict("records")}
            where = f"{layers}, seed {seed}"
            for kind in ("mlp", "block"):
                more = difference_interval(by_kind[kind], _size(by_kind["attention"]))
                compared.append(Comparison(f"{kind} rises, {where}, by", *by_kind[kind], above=0, form="+.4f"))
                compared.append(Comparison(f"{kind} by more than attention changes, {where},", *more, above=0, form="+.4f"))
            changes = ", ".join(f"{k} {value:+.4f} ({low:+.4f} to {high:+.4f})" for k, (value, low, high) in by_kind.items())
            text.append(f"{where}, from {of_seed['stage'].iloc[0]}: {changes}")
        yield Finding(model, f"change to the last stage, {'; '.join(text)}", compared)


@check
def same_layers_at_every_stage(tables: Tables, first: float, correlation: float) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["agreement"].query("kind == 'attention'")):
        seen = seeds[(seeds["progress"] >= first) & (seeds["progress"] < 1)]
        if seen.empty:
            yield Finding(model, "it has no stage between the first ninth and the end of its training")
            continue
        worst = seen.sort_values("low").iloc[0]
        text = f"lowest rank correlation with the last stage {worst['correlation']:.2f} ({span(worst)}; seed {worst['seed']}, "
        text += f"{worst['stage']}; {worst['shared']} of the {worst['n']} most droppable shared)"
        compared = [
            Comparison(f"{r.stage} of seed {r.seed}", r.correlation, r.low, r.high, at_least=correlation)
            for r in seen.itertuples()
        ]
        yield Finding(model, text, [*compared, *_lacking(seen, seeds)])


@check
def redundant_at_random(tables: Tables, layers: float, importance: float) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["importance"].query("kind == 'attention'")):
        untrained = seeds[seeds["step"] == 0]
        if untrained.empty:
            yield Finding(model, "its untrained weights are unavailable")
            continue
        last = [kth_least(rows, layers) for _, rows in untrained.groupby("seed", sort=False)]
        compared = [
            Comparison(f"seed {row['seed']}", *triple(row, "importance"), at_most=importance, form=".4f") for row in last
        ]
        text = f"with random weights, the least important {layers:.0%} of the attention layers have an importance of at most"
        found = f"{text.replace('%', ' %')} {', '.join(map(str, compared))}"
        yield Finding(model, found, [*compared, *_lacking(untrained, seeds)])


def _size(change: tuple[float, float, float]) -> tuple[float, float, float]:
    """A change without its sign: -3 (-4 to 1) is 3 (0 to 4)."""
    value, low, high = change
    ends = sorted((abs(low), abs(high)))
    return abs(value), (0.0 if low < 0 < high else ends[0]), ends[1]


def _lacking(rows: pd.DataFrame, seeds: pd.DataFrame) -> list[Comparison]:
    """What cannot be compared: a stage that some seeds have, and another lacks."""
    have = set(zip(rows["seed"], rows["position"], strict=True))
    stages = dict(zip(rows["position"], rows["stage"], strict=True))
    return [
        Comparison(f"seed {seed} lacks the stage {stage}", math.nan, math.nan, math.nan)
        for seed in seeds["seed"].unique()
        for position, stage in stages.items()
        if (seed, position) not in have
    ]


@advice("07_training_stages")
def what_to_do(tables: Tables) -> str:
    """When a choice of layers can be made, and what it costs at the end."""
    attention = {name: tables[name].query("kind == 'attention'") for name in ("agreement", "settled", "cost")}
    text = []
    for model, settled in _by_model(attention["settled"].query("share == 'quarter'")):
        n = settled["n"].iloc[0]
        agreement = attention["agreement"].query("model == @model and progress < 1")
        if agreement["position"].nunique() == 1:  # random weights and one checkpoint: nothing is known of the way between
            found = (
                "measure importance on the trained weights, not on random weights of the same shape: those rank the attention "
                f"layers with a correlation of {agreement['correlation'].mean():.2f} with the trained ones."
            )
        elif settled["progress"].max() == 0:
            found = f"an early checkpoint will do. The {n} least important attention layers are the same at every stage."
        else:
            found = (
                f"choose layers on the final checkpoint. Its {n} least important attention layers stand out only once "
                f"{_spread(settled['progress'])} of the training is done."
            )
        cost = attention["cost"].query("model == @model and share == 'quarter' and progress == 1")["cost"]
        text.append(f"**{model}**: {found} Dropping these {n} adds {cost.mean():+.3f} nats per token at the end.")
    return "\n\n".join(text)


def _spread(share: pd.Series) -> str:
    """A share as it is for all seeds, or its range over them: "50 %", "25 to 100 % (range over seeds)"."""
    low, high = (f"{100 * value:.0f}" for value in (share.min(), share.max()))
    return f"{high} %" if low == high else f"{low} to {high} % (range over seeds)"


def _by_model(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    return iter(rows.groupby("model", sort=False))


def _since(others: pd.DataFrame) -> str:
    """From which stage on MLP and block exceed attention for every seed, and stay so."""
    lost = others[others["above_low"] <= 0]["position"].max()  # the last stage at which one does not; NaN: none
    after = others[others["position"] > lost] if lost == lost else others
    if after.empty:
        return "it is not so at the last stage"
    return f"it is so for all seeds from {after.sort_values('position')['stage'].iloc[0]} on"
