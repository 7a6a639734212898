"""Notebook 05, what speed costs in quality: points lost for each percent of speed-up (paper, eq. 7)."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ...base.stats import LEVEL, Z
from ...report.tables import Column, Key, table
from .generation import GENERATION
from .loads import Speed

TRADE_PAIRS = table(
    "model", Key("backend", "Back end"), Key("n", "n", "d"), Key("other", "Compared with"),
    Column("difference", "SDR of attention minus the other, points per percent", "+.2f", "low", "high"), "low high",
)  # fmt: skip


def sdr(points_lost: float, speedup: float) -> float:
    """Speedup degradation ratio (paper, eq. 7): points lost for each percent of speed-up. NaN where nothing is faster.

    2 points for a speed-up of 1.25 are 2 / 25 = 0.08 points per percent.
    """
    percent = 100 * (speedup - 1)
    return points_lost / percent if percent > 0 else float("nan")


def trade_rows(timings: pd.DataFrame, quality: pd.DataFrame, settings: Speed) -> list[dict]:
    """What the paper's generation gains, against what it costs in quality (NaN where that was not measured).

    timings: the table "speed". quality: the table "average" of notebook 02. The interval of SDR is the widest that the
    intervals of points and of speed-up allow; where the latter is not clearly above 1, the ratio has none.
    """
    gained = ["model", "backend", "kind", "n", "speedup", "speedup_low", "speedup_high", "level", "noisy"]
    lost = ["points_lost", "points_lost_low", "points_lost_high", "retained"]
    costs = {(cost["model"], cost["kind"], cost["n"]): cost for cost in quality.to_dict("records")}
    protocol = (timings["context"] == settings.prompt) & (timings["new_tokens"] == settings.new_tokens)
    chosen = timings[protocol & (timings["what"] == GENERATION) & (timings["kind"] != "dense")]
    rows = []
    for gain in chosen.to_dict("records"):
        row = {name: gain[name] for name in gained} | dict.fromkeys([*lost, "sdr", "sdr_low", "sdr_high"], np.nan)
        if cost := costs.get((gain["model"], gain["kind"], gain["n"])):
            row |= {name: cost[name] for name in lost} | {"sdr": sdr(cost["points_lost"], gain["speedup"])}
            if gain["speedup_low"] > 1:  # a division by what may be zero has no interval
                ends = itertools.product(("low", "high"), repeat=2)
                corners = [sdr(cost[f"points_lost_{a}"], gain[f"speedup_{b}"]) for a, b in ends]
                row |= {"sdr_low": min(corners), "sdr_high": max(corners)}
        rows.append(row)
    return rows


def pair_rows(trade: Sequence[Mapping], gaps: pd.DataFrame) -> list[dict]:
    """SDR of attention drop minus that of MLP and of block drop at equal n, with a 95 % interval.

    trade: rows of that table. gaps: that of notebook 02, whose intervals are paired by document. A pair has no interval (NaN)
    where a speed-up is noisy, of too few repeats or not clearly above 1, and where both gain points: of two such ratios, the
    slower model has the lower one.
    """
    cells = {(row["model"], row["backend"], row["kind"], row["n"]): row for row in trade if not np.isnan(row["sdr"])}
    on_tasks = gaps[gaps["measure"] == "tasks"].to_dict("records")
    paired = {(gap["model"], gap["kind"], gap["other"], gap["n"]): gap for gap in on_tasks}
    rows = []
    for (model, backend, kind, n), a in cells.items():
        for other in ("mlp", "block") if kind == "attention" else ():
            b, gap = cells.get((model, backend, other, n)), paired.get((model, kind, other, n))
            if b is not None and gap is not None:
                difference, low, high = sdr_difference(a, b, 100 * (gap["high"] - gap["low"]))
                rows.append({"model": model, "backend": backend, "n": n, "other": other, "difference": difference, "low": low,
                             "high": high})  # fmt: skip
    return rows


def sdr_difference(a: Mapping, b: Mapping, width_of_gap: float) -> tuple[float, float, float]:
    """SDR of one row of the table "trade" minus that of another, and its 95 % interval.

    With points p lost and percent g gained, d is the difference p_a / g_a - p_b / g_b if p_a g_b - p_b g_a - d g_a g_b is zero.
    This product has no small number to divide by. Its standard error s(d) follows from those of points and percents (delta
    method), and the interval is of all d for which the product is within 1.96 s(d) of zero (Fieller 1954), the roots of a
    quadratic. NaN where `pair_rows` says so, and where both are so uncertain that no d is excluded.

    Points are paired by document: their covariance follows from the width of the interval of their difference,
    2 cov = var_a + var_b - var(a - b). Speed-ups count as independent, which is too wide for those of the same rounds where
    both lose points.
    """
    (p_a, var_p_a), (p_b, var_p_b) = (_with_variance(row, "points_lost", 1) for row in (a, b))
    (s_a, var_g_a), (s_b, var_g_b) = (_with_variance(row, "speedup", 100) for row in (a, b))
    g_a, g_b = s_a - 100, s_b - 100
    difference = p_a / g_a - p_b / g_b
    # z^2 s(d)^2 = points + v_a (p_b + d g_b)^2 + v_b (p_a - d g_a)^2, so (p_a g_b - p_b g_a - d g_a g_b)^2 less that is
    # square d^2 - 2 half d + rest.
    v_a, v_b = Z**2 * var_g_a, Z**2 * var_g_b
    covariance = (var_p_a + var_p_b - (width_of_gap / (2 * Z)) ** 2) / 2
    points = Z**2 * (g_b**2 * var_p_a + g_a**2 * var_p_b - 2 * g_a * g_b * covariance)
    product = p_a * g_b - p_b * g_a
    square = (g_a * g_b) ** 2 - g_b**2 * v_a - g_a**2 * v_b
    half = product * g_a * g_b + p_b * g_b * v_a - p_a * g_a * v_b
    rest = product**2 - points - p_b**2 * v_a - p_a**2 * v_b
    is_sure = all(row["speedup_low"] > 1 and row["level"] >= LEVEL and not row["noisy"] for row in (a, b))
    is_clear = is_sure and max(p_a, p_b) >= 0
    if not is_clear or not square > 0 or math.isnan(rest):
        return difference, np.nan, np.nan
    root = math.sqrt(max(0.0, half**2 - square * rest))
    return difference, (half - root) / square, (half + root) / square


def _with_variance(row: Mapping, name: str, factor: float) -> tuple[float, float]:
    """A number of a row times `factor`, and the variance that the width of its 95 % interval says."""
    return factor * row[name], (factor * (row[f"{name}_high"] - row[f"{name}_low"]) / (2 * Z)) ** 2
