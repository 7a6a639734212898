"""Rules of notebook 05: speed."""

from collections.abc import Iterator

import pandas as pd

from ...base.stats import LEVEL
from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, triple
from .crossover import crossing_in_words
from .generation import GENERATION


@check
def half_of_attention_is_faster(tables: Tables, speedup: float) -> Iterator[Finding]:
    layers = tables["models"].set_index("model")["n_layers"]
    rows = tables["speed"].query("kind == 'attention' and context == 2048 and new_tokens == 2048")
    rows = rows[rows["what"] == GENERATION]
    for model in layers.index:
        half = rows[(rows["model"] == model) & (2 * rows["n"] == layers[model])]
        if "llama-2-70b" not in model.lower() or half.empty:
            reason = "the claim is about Llama-2-70B on a GPU: `make reproduce PROFILE=gpu-shapes NOTEBOOKS=05` times its shape"
            if len(half):
                row = half.iloc[0]
                reason += f" (in this run, Attn-{row['n']} of {layers[model]}: {row['speedup']:.2f} x)"
            yield Finding(model, reason)
            continue
        # A noisy timing has no say, whichever way it points.
        counts = is_judged(half)
        compared = [
            Comparison(row["backend"], *triple(row, "speedup", "speedup_"), at_least=speedup, unit="repeats")
            for row in half[counts].to_dict("records")
        ]
        told = [*map(str, compared), *(f"{row.backend}: not judged, {_why_not(row)}" for row in half[~counts].itertuples())]
        text = f"Attn-{half.iloc[0]['n']} of {layers[model]}, 2,048 tokens in and out: {'; '.join(told)}"
        yield Finding(model, text, compared, enough="one")


def is_judged(timings: pd.DataFrame) -> pd.Series:
    """Timings that a rule may rest on: not noisy, and of so many repeats that their interval covers 95 %."""
    return ~timings["noisy"].astype(bool) & (timings["level"] >= LEVEL)


def _why_not(timing) -> str:
    return "too noisy" if timing.noisy else "too few repeats"


@check
def attention_is_best_trade(tables: Tables) -> Iterator[Finding]:
    pairs = tables["trade_pairs"]
    for model in tables["models"]["model"]:
        rows = pairs[pairs["model"] == model]
        if rows.empty:
            yield Finding(model, "this run has no quality and speed of two kinds at equal n")
            continue
        compared = [
            Comparison(f"n = {r.n}, {r.backend}: attention minus {r.other}", r.difference, r.low, r.high, below=0,
                       unit="documents and repeats")
            for r in rows.itertuples() if r.low == r.low
        ]  # fmt: skip
        text = "; ".join(map(str, compared))
        if slow := [f"n = {r.n}, {r.backend}: {r.other}" for r in rows.itertuples() if r.low != r.low]:
            reason = "a speed-up is not clear of noise, or both gain points"
            text += f"{'; ' if text else ''}not judged, since {reason}: {', '.join(slow)}"
        yield Finding(model, f"points lost per percent of speed-up: {text}", compared)


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
            found += f" At batch {c['batch_size']}, {crossing_in_words(c)}."
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
