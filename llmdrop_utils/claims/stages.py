"""Rules of notebook 07: stages of training."""

from collections.abc import Iterator

import pandas as pd

from ..tables import Tables
from .verdicts import Finding, check, span

FIRST_OF_PAPER = 1 / 9  # of the training: the paper's first checkpoint, untrained weights apart, is 500 of 4,500 B tokens


@check
def redundant_from_the_start(tables: Tables) -> Iterator[Finding]:
    for model, seeds in _by_model(tables["means"]):
        holds, text = [], []
        for seed, rows in seeds.groupby("seed", sort=False):
            others = rows[rows["kind"] != "attention"]
            late = others[others["progress"] >= FIRST_OF_PAPER]
            worst = late.sort_values("above_low").iloc[0]
            holds.append(bool((late["above_low"] > 0).all()))
            lost = others[others["above_low"] <= 0]["position"].max()  # the last stage at which it was not so
            since = 0 if lost != lost else int(lost) + 1
            text.append(
                f"seed {seed}: least at {worst['stage']}, where {worst['kind']} lies {worst['above_attention']:+.4f} "
                f"({worst['above_low']:+.4f} to {worst['above_high']:+.4f}) above attention; "
                + (f"so from {_stage(rows, since)} on" if since <= others["position"].max() else "not so at the last stage")
            )
        yield model, all(holds), "; ".join(text)


@check
def others_rise(tables: Tables) -> Iterator[Finding]:
    change = tables["change"]
    for model, _ in _by_model(tables["means"]):
        rows = change[(change["model"] == model) & (change["progress"] >= FIRST_OF_PAPER)] if len(change) else change
        if rows.empty:
            yield model, None, "it has no two stages after the first ninth of its training"
            continue
        holds, text = [], []
        for seed, seen in rows.groupby("seed", sort=False):
            first = seen[seen["position"] == seen["position"].min()].set_index("kind")
            others = first.drop(index="attention")
            flat = abs(first.loc["attention", "change"]) < others["change"].abs().min()
            holds.append(bool((others["low"] > 0).all() and flat))
            found = ", ".join(f"{kind} {row['change']:+.4f} ({span(row, digits=4)})" for kind, row in first.iterrows())
            text.append(f"seed {seed}, from {first['stage'].iloc[0]} to the last stage: {found}")
        yield model, all(holds), "; ".join(text)


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
    for model, seeds in _by_model(tables["means"].query("kind != 'attention'")):
        rows = seeds[seeds["step"] == 0]
        if rows.empty:
            yield model, None, "its untrained weights could not be had"
            continue
        attention = tables["means"].query("model == @model and kind == 'attention' and step == 0")["importance"].mean()
        text = [
            f"{kind} lies {found['above_attention'].mean():+.5f} (lowest end {found['above_low'].min():+.5f}) above attention"
            for kind, found in rows.groupby("kind", sort=False)
        ]
        text = f"{rows['seed'].nunique()} seeds, attention {attention:.5f}; {'; '.join(text)}"
        yield model, bool((rows["above_low"] > 0).all()), text


def _by_model(rows: pd.DataFrame):
    return rows.groupby("model", sort=False)


def _stage(rows: pd.DataFrame, position: int) -> str:
    return rows[rows["position"] == position]["stage"].iloc[0]
