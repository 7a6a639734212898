"""From values of one model to rows of notebook 11, without the column `model`.

Intervals of means are 95 % bootstrap intervals over samples of text. A rank correlation is about layers, so its interval comes
from drawing layers and texts anew, together; neighbouring layers are alike, and are drawn together.
"""

from collections.abc import Sequence

import numpy as np

from ...base import stats
from ...measure.causes import Causes
from ...measure.importance import Importance
from ..work import Cell

IMPORTANCE, DAMAGE = "importance", "damage"  # what causes may predict; importance may predict damage
TARGETS = (IMPORTANCE, DAMAGE)


def layer_rows(scores: Importance, kl: np.ndarray) -> list[dict]:
    """Importance of each layer's attention, and the divergence from the dense model when it is dropped alone.

    kl: (n_samples, n_layers), of other samples than the importance.
    """
    importance = scores.per_sample["attention"]
    low, high = stats.text_interval(_draws(importance), len(importance))
    kl_low, kl_high = stats.text_interval(_draws(kl, seed=1), len(kl))
    return [
        {"layer": layer, "importance": importance[:, layer].mean(), "low": low[layer], "high": high[layer],
         "kl": kl[:, layer].mean(), "kl_low": kl_low[layer], "kl_high": kl_high[layer]}
        for layer in range(kl.shape[1])
    ]  # fmt: skip


def cause_rows(causes: Causes, scores: Importance, kl: np.ndarray) -> dict[str, list[dict]]:
    """Tables `causes` and `predictors`. `scores`: of the same samples as the causes.

    A cause that a model does not tell (NaN), or that is the same in all layers, predicts nothing and has no correlation.
    """
    importance = scores.per_sample["attention"]
    targets = {IMPORTANCE: (importance.mean(0), _draws(importance)), DAMAGE: (kl.mean(0), _draws(kl, seed=1))}
    values = {name: (rows.mean(0), _draws(rows)) for name, rows in causes.per_sample.items()}
    values |= {name: (of_layer, of_layer[None]) for name, of_layer in causes.of_layer.items()}
    rows, predictors = [], []
    for name, (value, draws) in values.items():
        known = len(causes.per_sample[name]) if name in causes.per_sample else 0
        low, high = stats.text_interval(draws, known) if known else (value, value)
        rows += [
            {"cause": name, "layer": layer, "value": value[layer], "low": low[layer], "high": high[layer]}
            for layer in range(len(value))
        ]
    for name, cause in (values | {IMPORTANCE: targets[IMPORTANCE]}).items():
        for target in TARGETS:
            if name != target and np.isfinite(cause[0]).all() and np.ptp(cause[0]) > 0:
                predictors.append(
                    {"cause": name, "target": target, "n_layers": len(cause[0])} | _correlation(cause, targets[target])
                )
    return {"causes": rows, "predictors": predictors}


def rank_rows(cells: Sequence[Cell], ranks: np.ndarray) -> dict[str, list[dict]]:
    """Tables `ranks` and `rank_gaps` from (n_samples, n_cells); gaps are paired by sample."""
    draws = _draws(ranks)
    low, high = stats.text_interval(draws, len(ranks))
    rows = [
        {"kind": cell.kind, "n": cell.n, "rank": ranks[:, i].mean(), "low": low[i], "high": high[i]}
        for i, cell in enumerate(cells)
    ]
    gaps = []
    for i, cell in enumerate(cells):
        if cell.kind == "attention":
            j = list(cells).index(Cell("mlp", cell.n))
            low, high = stats.text_interval(draws[:, i] - draws[:, j], len(ranks))
            gaps.append({"n": cell.n, "difference": (ranks[:, i] - ranks[:, j]).mean(), "low": low, "high": high})
    return {"ranks": rows, "rank_gaps": gaps}


def _draws(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap over samples: (REPEATS, n_layers). What shares its samples shares its seed."""
    return stats.text_means(values, np.ones(len(values)), seed)


def _correlation(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> dict:
    """Rank correlation over layers of two values, each given as (n_layers,) and as draws (REPEATS or 1, n_layers)."""
    n_layers = len(a[0])
    layers = stats.drawn_blocks(n_layers)
    drawn = [np.take_along_axis(np.broadcast_to(draws, layers.shape), layers, axis=1) for _, draws in (a, b)]
    low, high = stats.text_interval(stats.rank_correlation(*drawn), n_layers)
    return {"correlation": float(stats.rank_correlation(a[0], b[0])), "low": low, "high": high}
