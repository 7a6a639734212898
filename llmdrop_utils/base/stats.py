"""Intervals and rankings: bootstrap over samples, rank correlation, overlap of drop sets."""

import numpy as np
from scipy.stats import rankdata

REPEATS = 1000

INTERVAL = (0.025, 0.975)  # 95 %, percentile bootstrap


def bootstrap_means(rows: np.ndarray, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """Weighted means of resampled samples: rows (n_samples, ...), weights (n_samples,) -> (REPEATS, ...).

    The same seed draws the same samples, so differences between arrays that share their samples stay paired.
    """
    n = len(rows)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=REPEATS) * weights
    return np.tensordot(draws / draws.sum(1, keepdims=True), rows, axes=1)


def bootstrap_medians(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Medians of resampled repeats: (n,) -> (REPEATS,)."""
    draws = np.random.default_rng(seed).integers(len(values), size=(REPEATS, len(values)))
    return np.median(np.asarray(values)[draws], axis=1)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of bootstrap values along the first axis."""
    low, high = np.quantile(values, INTERVAL, axis=0)
    return low, high


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis; leading axes broadcast. A constant array gives 0."""
    a, b = rankdata(a, axis=-1), rankdata(b, axis=-1)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), norm, out=np.zeros(np.broadcast(norm).shape), where=norm > 0)


def overlap(a: tuple[int, ...], b: tuple[int, ...], n: int) -> int:
    """How many layers two drop orders have in common among their first n."""
    return len(set(a[:n]) & set(b[:n]))


def group_agreement(rows: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """How well `size` samples rank the layers: correlation of each disjoint group's ranking with that of all others.

    rows (n_samples, n_layers), size < n_samples -> (n_samples // size,).
    """
    groups = [slice(start, start + size) for start in range(0, len(rows) - size + 1, size)]
    mean = lambda keep: np.average(rows[keep], axis=0, weights=weights[keep])  # noqa: E731
    others = [np.r_[0 : g.start, g.stop : len(rows)] for g in groups]
    return np.array([rank_correlation(mean(g), mean(o)) for g, o in zip(groups, others, strict=True)])
