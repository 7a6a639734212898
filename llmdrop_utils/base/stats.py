"""Intervals and rankings: bootstrap over samples, medians of few repeats, rank correlation, overlap of drop sets."""

import functools
import math

import numpy as np
from scipy.stats import binom, norm, rankdata, t

REPEATS = 2000

LEVEL = 0.95  # what an interval covers; that of a median covers at least this, if there are six repeats or more
TAIL = (1 - LEVEL) / 2  # what lies beyond it on each side
Z = float(norm.isf(TAIL))  # 1.96: how many standard errors it reaches, if it is normal


def block_length(n_samples: int) -> int:
    """How many neighbouring samples of text are drawn together: 4 of 16, 5 of 32, 6 of 64, 10 of 256.

    Neighbouring blocks of a corpus are alike (their lag-one correlation reaches 0.35), so single draws would make intervals
    too narrow. The length grows with the cube root of the number, as for a mean of a short-range dependent series.
    """
    return max(1, min(round(1.5 * n_samples ** (1 / 3)), n_samples // 2))


def text_means(rows: np.ndarray, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """`bootstrap_means` over consecutive samples of one text, of which neighbours are drawn together."""
    return bootstrap_means(rows, weights, seed, block_length(len(rows)))


def text_interval(draws: np.ndarray, n_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of what was made from `text_means` of so many samples."""
    return interval(draws, independent(n_samples))


def independent(n_samples: int) -> float:
    """How many independent draws so many samples of one text count as."""
    return n_samples / block_length(n_samples)


def bootstrap_means(rows: np.ndarray, weights: np.ndarray, seed: int = 0, block: int = 1) -> np.ndarray:
    """Weighted means of resampled samples: rows (n_samples, ...), weights (n_samples,) -> (REPEATS, ...).

    block: so many neighbours are drawn together, the last sample being a neighbour of the first (circular block bootstrap). The
    same seed draws the same samples, so differences between arrays that share their samples stay paired.
    """
    n, drawn = len(rows), _drawn(len(rows), block, seed)
    counts = np.apply_along_axis(np.bincount, 1, drawn, minlength=n) * weights
    return np.tensordot(counts / counts.sum(1, keepdims=True), rows, axes=1)


def drawn_blocks(n: int, seed: int = 0) -> np.ndarray:
    """Positions of n neighbours (samples of text, layers) that resamples draw: int (REPEATS, n), some neighbours together."""
    return _drawn(n, block_length(n), seed)


def _drawn(n: int, block: int, seed: int) -> np.ndarray:
    starts = np.random.default_rng(seed).integers(n, size=(REPEATS, -(-n // block)))
    return ((starts[:, :, None] + np.arange(block)) % n).reshape(REPEATS, -1)[:, :n]


def interval(values: np.ndarray, n: float) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of bootstrap values along the first axis, from `n` independent draws (of documents, say).

    NaN for a single draw, which tells nothing of the spread.
    """
    if n <= 1:
        return (np.full(np.shape(values)[1:], np.nan)[()],) * 2
    low, high = np.quantile(values, percentiles(n), axis=0)
    return low, high


def correlation_interval(value: float, draws: np.ndarray, n_samples: int) -> tuple[float, float]:
    """95 % interval of a rank correlation of means over text, from its bootstrap `draws` (`text_means`).

    Each resample adds noise to means that hold noise already, so the draws lie too low: all that plain percentiles miss lies
    above them. The upper end is therefore as far from the value as the lower one, or further: 0.80 and 0.70 to 0.82 give
    0.70 to 0.90.
    """
    low, high = (float(end) for end in text_interval(draws, n_samples))
    return low, min(1.0, max(high, 2 * value - low)) if math.isfinite(low) else high


def percentiles(n: float) -> tuple[float, float]:
    """Which percentiles of a bootstrap of `n` draws make a 95 % interval: 0.019 and 0.981 for 32, nearly 0.025 for 500.

    Plain percentiles are too narrow for few draws: they lack Student's quantile, and the factor n / (n - 1) of the variance.
    These are wider by both ("expanded percentiles", Hesterberg 2015, sec. 5.3). With fewer than about 12 draws that is not
    enough, since no percentile leaves the range of the draws: 3 to 6 cover 66 to 75 %, and 8 cover 88 %.
    """
    tail = float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf(TAIL, n - 1)))
    return tail, 1 - tail


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of independent values by Student's t; NaN for a single one."""
    if len(values) < 2:
        return float("nan"), float("nan")
    reach = t.isf(TAIL, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def combination_interval(
    weights: np.ndarray, values: np.ndarray, lows: np.ndarray, highs: np.ndarray
) -> tuple[float, float, float]:
    """A weighted sum of values with 95 % intervals, and its own, by MOVER (Zou and Donner 2008): (sum, low, high).

    True for independent values, too wide for paired ones that rise and fall together. 5 (4 to 7) minus 2 (1 to 2) is 3, from
    3 - sqrt(1 + 0) = 2 to 3 + sqrt(4 + 1) = 5.24.
    """
    ends = np.sort([weights * lows, weights * highs], axis=0)
    total = float((weights * values).sum())
    below, above = weights * values - ends[0], ends[1] - weights * values
    return total, total - float(np.sqrt((below**2).sum())), total + float(np.sqrt((above**2).sum()))


def difference_interval(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """a - b and its 95 % interval from two values with theirs, (value, low, high): `combination_interval` of 1 and -1."""
    return combination_interval(np.array([1.0, -1.0]), *np.array([a, b], dtype=float).T)


def slope_interval(x: np.ndarray, values: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> tuple[float, float, float]:
    """The least-squares slope of values over x, with the 95 % interval that follows from the intervals of the values.

    It says how sure the slope through these very points is, not how well a line fits them. 1, 2, 3 at x = 0, 1, 2, each with
    0.5 on either side, have a slope of 1, 1 - sqrt(0.25² + 0.25²) to 1 + 0.354.
    """
    centred = x - x.mean()
    return combination_interval(centred / (centred**2).sum(), values, lows, highs)


def slope_spread(x: np.ndarray, values: np.ndarray) -> float:
    """How far the 95 % interval of a least-squares slope reaches on either side, from the spread of values around the line.

    Student's t with n - 2 degrees of freedom; infinite for two values. 1, 3, 2 at x = 0, 1, 2 lie around a slope of 0.5 with
    residuals -0.5, 1 and -0.5: 12.71 x sqrt(1.5 / 1) / sqrt(2) = 11.0.
    """
    n, centred = len(x), x - x.mean()
    slope = (centred * values).sum() / (centred**2).sum()
    residuals = values - values.mean() - slope * centred
    return float(t.isf(TAIL, n - 2) * np.sqrt((residuals**2).sum() / (n - 2) / (centred**2).sum())) if n > 2 else math.inf


def mean_correlation(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of independent correlations, and its 95 % interval by Student's t, both of Fisher's z: (mean, low, high).

    A correlation of 1 counts as 0.999. Of a single one there is no interval (NaN).
    """
    z = np.arctanh(np.clip(values, -0.999, 0.999))
    low, high = mean_interval(z)
    return float(np.tanh(z.mean())) if len(z) > 1 else float(values[0]), math.tanh(low), math.tanh(high)


def detectable(low: float | np.ndarray, high: float | np.ndarray) -> float:
    """The true difference that a comparison with an interval of this width finds in 80 % of runs.

    Its standard error is the width over 2 x 1.96; it is found if it lies 1.96 + 0.84 standard errors from zero.
    """
    return float((high - low) / (2 * Z) * (Z + norm.ppf(0.8)))


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
    k, level = _rank_of_end(n)
    ordered = np.sort(values)
    return float(ordered[k - 1]), float(ordered[n - k]), level


@functools.cache
def _rank_of_end(n: int) -> tuple[int, float]:
    """k of `median_interval`, and the level that it reaches."""
    level = lambda k: float(1 - 2 * binom.cdf(k - 1, n, 0.5))  # noqa: E731
    k = max((k for k in range(1, n // 2 + 1) if level(k) >= LEVEL), default=1)
    return k, level(k)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis; leading axes broadcast. A constant array gives 0."""
    a, b = rankdata(a, axis=-1), rankdata(b, axis=-1)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros(np.broadcast(scale).shape), where=scale > 0)


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
