"""Intervals and rankings: bootstrap over samples, medians of few repeats, rank correlation, overlap of drop sets."""

import numpy as np
from scipy.stats import binom, rankdata

REPEATS = 1000

INTERVAL = (0.025, 0.975)  # 95 %, percentile bootstrap

LEVEL = 0.95  # what an interval of a median covers at least, if there are six repeats or more


def bootstrap_means(rows: np.ndarray, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """Weighted means of resampled samples: rows (n_samples, ...), weights (n_samples,) -> (REPEATS, ...).

    The same seed draws the same samples, so differences between arrays that share their samples stay paired.
    """
    n = len(rows)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=REPEATS) * weights
    return np.tensordot(draws / draws.sum(1, keepdims=True), rows, axes=1)


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The interval of a median of few values, and how often such an interval covers the true one: (low, high, level).

    The k-th smallest and the k-th largest of n values have the true median between them unless fewer than k values fall on one
    side of it. Whatever the distribution, that is so with probability 1 - 2 P(X < k), X ~ Binomial(n, 1/2). k is the largest
    that reaches LEVEL. Fewer than six values reach it with no k: their interval is the whole range, at its own lower level. A
    single value has no interval (NaN). The 2nd and the 8th of 9 values: 1 - 2 (1 + 9) / 512 = 96.1 %.
    """
    n = len(values)
    if n < 2:
        return (np.nan,) * 3
    level = lambda k: 1 - 2 * binom.cdf(k - 1, n, 0.5)  # noqa: E731
    k = max((k for k in range(1, n // 2 + 1) if level(k) >= LEVEL), default=1)
    ordered = np.sort(values)
    return float(ordered[k - 1]), float(ordered[n - k]), float(level(k))


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
