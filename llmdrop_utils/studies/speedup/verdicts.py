"""Rules of notebook 05: speed."""

from collections.abc import Iterator

import pandas as pd

from ...report.tables import Tables
from ...report.verdicts import Finding, advice, check
from .crossover import in_words
from .generation import GENERATION


@check
def half_of_attention_is_faster(tables: Tables, speedup: float) -> Iterator[Finding]:
    layers = tables["models"].set_index("model")["n_layers"]
    rows = tables["speed"].query("kind == 'attention' and context == 2048")
    rows = rows[rows["what"] == GENERATION]
    for model in layers.index:
        half = rows[(rows["model"] == model) & (2 * rows["n"] == layers[model])]
        if "llama-2-70b" not in model or half.empty:
            reason = "the claim is about Llama-2-70B on a GPU: `make reproduce PROFILE=gpu-shapes NOTEBOOKS=05` times its shape"
            if len(half):
                row = half.iloc[0]
                reason += f" (in this run, Attn-{row['n']} of {layers[model]}: {row['speedup']:.2f} x)"
            yield model, None, reason
            continue
        text = [f"{r.backend} {r.speedup:.2f} x ({r.speedup_low:.2f} to {r.speedup_high:.2f})" for r in half.itertuples()]
        holds = bool((half["speedup_high"] >= speedup).any() and not half["noisy"].astype(bool).all())
        yield model, holds, f"Attn-{half.iloc[0]['n']} of {layers[model]}, 2,048 tokens in and out: " + ", ".join(text)


@check
def attention_is_best_trade(tables: Tables) -> Iterator[Finding]:
    trade = tables["trade"]
    for model in tables["models"]["model"]:
        rows = trade[(trade["model"] == model) & trade["sdr"].notna()] if len(trade) else trade
        attention = rows[rows["kind"] == "attention"].set_index(["backend", "n"]) if len(rows) else rows
        pairs = [
            (attention.loc[r.backend, r.n], r)
            for r in rows.itertuples()
            if r.kind in ("mlp", "block") and (r.backend, r.n) in attention.index
        ]
        if not pairs:
            yield model, None, "this run has no quality and speed of two kinds at equal n"
            continue
        text, judged = [], []
        for a, r in pairs:
            known = a["sdr_high"] == a["sdr_high"] and r.sdr_low == r.sdr_low
            judged += [a["sdr_high"] < r.sdr_low] if known else []
            found = f"attention {a['sdr']:.2f} ({a['sdr_low']:.2f} to {a['sdr_high']:.2f}), {r.kind} {r.sdr:.2f} "
            found += f"({r.sdr_low:.2f} to {r.sdr_high:.2f})"
            text.append(f"n = {r.n}, {r.backend}: {found if known else f'against {r.kind} a speed-up is within noise'}")
        yield model, all(judged) if judged else None, "points lost per percent of speed-up: " + "; ".join(text)


@advice("05_speedup")
def what_to_do(tables: Tables) -> str:
    """How much speed dropping attention brings on this machine, what it costs, and from which context it beats dropping MLP."""
    text = []
    for model, rows in tables["trade"].groupby("model", sort=False):
        attention = rows[(rows["kind"] == "attention") & (rows["backend"] == "eager")].sort_values("n")
        if attention.empty:
            continue
        found = _gain(attention)
        crossover = tables["crossover"]
        decode = crossover[(crossover["model"] == model) & (crossover["what"] == "decode")] if len(crossover) else crossover
        if len(decode):
            c = decode.iloc[0]
            found += (
                f" At batch {c['batch_size']}, dropping attention speeds decoding up as much as dropping MLP "
                f"{in_words(c['measured'], c['tried_from'], c['tried_to'])} in the cache, and more at longer contexts."
            )
        text.append(f"**{model}**: {found}")
    text.append(
        "Times are of this machine alone. Measure on the device, with the back end, the batch and the context that you will "
        "serve: a prediction from bytes and operations can miss in both directions."
    )
    return "\n\n".join(text)


def _gain(attention: pd.DataFrame) -> str:
    """The most attention layers whose cost in quality is known, or the most that were timed."""
    known = attention.dropna(subset=["points_lost"])
    best = (known if len(known) else attention).iloc[-1]
    found = (
        f"with {best['n']} attention layers dropped, the whole generation is {best['speedup']:.2f} times as fast "
        f"({best['speedup_low']:.2f} to {best['speedup_high']:.2f})"
    )
    if not len(known):
        return f"{found}. What that costs in quality, only the real model can tell: run notebook 02 on it."
    return (
        f"{found}, for {best['points_lost']:.1f} points of the mean task score ({best['points_lost_low']:.1f} to "
        f"{best['points_lost_high']:.1f})."
    )
