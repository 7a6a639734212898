"""Rules of notebook 07: stages of training."""

from collections.abc import Iterator

import pandas as pd

from ...report.tables import Tables
from ...report.verdicts import Finding, check, span

FIRST_OF_PAPER = 1 / 9  # of the training: the paper's first checkpoint, untrained weights apart, is 500 of 4,500 B tokens


@check
def redundant_from_the_start(tables: Tables) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["means"]):
        others = seeds[seeds["kind"] != "attention"]
        late = others[others["progress"] >= FIRST_OF_PAPER]
        if late["position"].nunique() < 2:
            yield model, None, "it has no two stages after the first ninth of its training"
            continue
        text = []
        for layers, rows in late.groupby("layers", sort=False):
            worst = rows.sort_values("above_low").iloc[0]
            found = f"{layers}: least at {worst['stage']} of seed {worst['seed']}, where {worst['kind']} lies "
            found += (
                f"{worst['above_attention']:+.4f} ({worst['above_low']:+.4f} to {worst['above_high']:+.4f}) above attention"
            )
            text.append(f"{found}, {_since(others[others['layers'] == layers])}")
        yield model, bool((late["above_low"] > 0).all()), "; ".join(text)


@check
def others_rise(tables: Tables) -> Iterator[Finding]:
    change = tables["change"]
    for model, _ in _by_model(tables["means"]):
        rows = change[(change["model"] == model) & (change["progress"] >= FIRST_OF_PAPER)] if len(change) else change
        if rows.empty:
            yield model, None, "it has no two stages after the first ninth of its training"
            continue
        rows = rows[rows["position"] == rows["position"].min()]
        holds, text = [], []
        for (layers, seed), found in rows.groupby(["layers", "seed"], sort=False):
            by_kind = found.set_index("kind")
            others = by_kind.drop(index="attention")
            flat = abs(by_kind.loc["attention", "change"]) < others["change"].abs().min()
            holds.append(bool((others["low"] > 0).all() and flat))
            changes = ", ".join(f"{kind} {row['change']:+.4f}" for kind, row in by_kind.iterrows())
            text.append(f"{layers}, seed {seed}: {changes}")
        yield model, all(holds), f"from {rows['stage'].iloc[0]} to the last stage, {'; '.join(text)}"


@check
def same_layers_at_every_stage(tables: Tables) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["agreement"].query("kind == 'attention'")):
        seen = seeds[(seeds["progress"] >= FIRST_OF_PAPER) & (seeds["progress"] < 1)]
        if seen.empty:
            yield model, None, "it has no stage between the first ninth and the end of its training"
            continue
        worst = seen.sort_values("low").iloc[0]
        text = f"lowest rank correlation with the last stage {worst['correlation']:.2f} ({span(worst)}; seed {worst['seed']}, "
        text += f"{worst['stage']}; {worst['shared']} of the {worst['n']} most droppable shared)"
        yield model, bool((seen["low"] >= 0.8).all()), text


@check
def redundant_at_random(tables: Tables) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["means"]):
        rows = seeds[seeds["step"] == 0]
        if rows.empty:
            yield model, None, "its untrained weights could not be had"
            continue
        text = []
        for layers, found in rows.groupby("layers", sort=False):
            mean = found.groupby("kind", sort=False)["importance"].mean()
            text.append(f"{layers}: " + ", ".join(f"{kind} {value:.4f}" for kind, value in mean.items()))
        others = rows[rows["kind"] != "attention"]
        yield model, bool((others["above_low"] > 0).all()), f"{rows['seed'].nunique()} seeds, {'; '.join(text)}"


def _by_model(rows: pd.DataFrame):
    return rows.groupby("model", sort=False)


def _since(others: pd.DataFrame) -> str:
    """From which stage on MLP and block lie above attention for every seed, and stay there."""
    lost = others[others["above_low"] <= 0]["position"].max()  # the last stage at which one does not; NaN: none
    after = others[others["position"] > lost] if lost == lost else others
    if after.empty:
        return "and it is not so at the last stage"
    return f"and it is so from {after.sort_values('position')['stage'].iloc[0]} on"
