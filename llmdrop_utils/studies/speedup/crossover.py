"""Notebook 05, the context from which dropping attention saves more time than dropping as many MLP layers."""

from collections.abc import Mapping

import numpy as np
import pandas as pd


def crossover_rows(timings: pd.DataFrame, n: int) -> list[dict]:
    """Where the speed-ups of n attention and of n MLP layers cross, measured and predicted, for each load and batch.

    timings: the table "speed". Loads that were timed at a single context are left out.
    """
    rows = []
    swept = timings[(timings["n"] == n) & timings["what"].isin(["prefill", "decode"]) & timings["room"].isna()]
    swept = swept[~swept["fill"].astype(bool)]
    for (model, backend, what, size), group in swept.groupby(["model", "backend", "what", "batch_size"], sort=False):
        attention, mlp = (group[group["kind"] == kind].drop_duplicates("context") for kind in ("attention", "mlp"))
        both = attention.merge(mlp, on="context", suffixes=("_attention", "_mlp")).sort_values("context")
        if len(both) < 2:
            continue
        contexts = both["context"].to_numpy()
        gain = {name: crossing(contexts, both[f"{name}_attention"] - both[f"{name}_mlp"]) for name in ("speedup", "predicted")}
        apart = (both["speedup_low_attention"] > both["speedup_high_mlp"]) | (
            both["speedup_low_mlp"] > both["speedup_high_attention"]
        )
        rows.append({"model": model, "backend": backend, "what": what, "batch_size": size, "n": n,
                     "tried_from": contexts[0], "tried_to": contexts[-1], "measured": gain["speedup"],
                     "predicted": gain["predicted"], "apart_somewhere": bool(apart.any())})  # fmt: skip
    return rows


def crossing(x, y) -> float:
    """Where y turns positive, between neighbours on a logarithmic x; 0 if it always is, infinity if it never is.

    y = -1, -1, 1 at x = 1024, 2048, 4096 turns positive half-way from 2048 to 4096: at 2896.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if y[0] > 0:
        return 0.0
    above = np.flatnonzero(y > 0)
    if not len(above):
        return float("inf")
    i = above[0]
    share = -y[i - 1] / (y[i] - y[i - 1])
    return float(np.exp(np.log(x[i - 1]) + share * (np.log(x[i]) - np.log(x[i - 1]))))


def crossing_in_words(row: Mapping) -> str:
    """From which context on dropping attention gains more than dropping MLP, for a row of the table "crossover"."""
    predicted = f"(predicted: attention gains more {_where(row['predicted'], row)})"
    if not row["apart_somewhere"]:
        return f"the speed-ups without attention and without MLP layers cannot be told apart at any context {predicted}"
    gains = f"dropping {row['n']} attention layers gains more than dropping {row['n']} MLP layers"
    return f"{gains} {_where(row['measured'], row)} {predicted}"


def _where(tokens: float, row: Mapping) -> str:
    if tokens == 0:
        return f"at every context from {row['tried_from']:,} to {row['tried_to']:,} tokens"
    return f"at no context up to {row['tried_to']:,} tokens" if np.isinf(tokens) else f"from about {tokens:,.0f} tokens on"
