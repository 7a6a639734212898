"""Rules of notebook 07: stages of training."""

from collections.abc import Iterator

import pandas as pd

from ...report.tables import Tables
from ...report.verdicts import Finding, advice, check, span


@check
def redundant_from_the_start(tables: Tables, first: float) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["means"]):
        others = seeds[seeds["kind"] != "attention"]
        late = others[others["progress"] >= first]
        if late["position"].nunique() < 2:
            yield model, None, "it has no two stages after the first ninth of its training"
            continue
        text = []
        for layers, rows in late.groupby("layers", sort=False):
            worst = rows.sort_values("above_low").iloc[0]
            found = f"{layers}: least at {worst['stage']} of seed {worst['seed']}, where {worst['kind']} is "
            found += (
                f"{worst['above_attention']:+.4f} ({worst['above_low']:+.4f} to {worst['above_high']:+.4f}) above attention"
            )
            text.append(f"{found}, {_since(others[others['layers'] == layers])}")
        yield model, bool((late["above_low"] > 0).all()), "; ".join(text)


@check
def others_rise(tables: Tables, first: float) -> Iterator[Finding]:
    change = tables["change"]
    for model, _ in _by_model(tables["means"]):
        rows = change[(change["model"] == model) & (change["progress"] >= first)] if len(change) else change
        if rows.empty:
            yield model, None, "it has no two stages after the first ninth of its training"
            continue
        holds, text = [], []
        for (layers, seed), of_seed in rows.groupby(["layers", "seed"], sort=False):
            found = of_seed[of_seed["position"] == of_seed["position"].min()]
            by_kind = found.set_index("kind")
            others = by_kind.drop(index="attention")
            flat = abs(by_kind.loc["attention", "change"]) < others["change"].abs().min()
            holds.append(bool((others["low"] > 0).all() and flat))
            changes = ", ".join(f"{kind} {row['change']:+.4f}" for kind, row in by_kind.iterrows())
            text.append(f"{layers}, seed {seed}, from {found['stage'].iloc[0]}: {changes}")
        yield model, all(holds), f"change to the last stage, {'; '.join(text)}"


@check
def same_layers_at_every_stage(tables: Tables, first: float, correlation: float) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["agreement"].query("kind == 'attention'")):
        seen = seeds[(seeds["progress"] >= first) & (seeds["progress"] < 1)]
        if seen.empty:
            yield model, None, "it has no stage between the first ninth and the end of its training"
            continue
        worst = seen.sort_values("low").iloc[0]
        text = f"lowest rank correlation with the last stage {worst['correlation']:.2f} ({span(worst)}; seed {worst['seed']}, "
        text += f"{worst['stage']}; {worst['shared']} of the {worst['n']} most droppable shared)"
        yield model, bool((seen["low"] >= correlation).all()), text


@check
def redundant_at_random(tables: Tables) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["means"]):
        rows = seeds[seeds["step"] == 0]
        if rows.empty:
            yield model, None, "its untrained weights are unavailable"
            continue
        text = []
        for layers, found in rows.groupby("layers", sort=False):
            mean = found.groupby("kind", sort=False)["importance"].mean()
            text.append(f"{layers}: " + ", ".join(f"{kind} {value:.4f}" for kind, value in mean.items()))
        others = rows[rows["kind"] != "attention"]
        yield model, bool((others["above_low"] > 0).all()), f"{rows['seed'].nunique()} seeds, {'; '.join(text)}"


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
        return "and it is not so at the last stage"
    return f"and it is so from {after.sort_values('position')['stage'].iloc[0]} on"
