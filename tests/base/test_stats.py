"""Intervals and rankings against scipy and against known truths."""

import numpy as np
from scipy.stats import spearmanr

from llmdrop_utils.base import stats


def test_rank_correlation_is_spearman():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 20)), rng.integers(0, 6, size=(5, 20))  # with ties
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(stats.rank_correlation(a, b), expected)
    np.testing.assert_allclose(stats.rank_correlation(a[0], b), [spearmanr(a[0], y).statistic for y in b])
    assert stats.rank_correlation(np.ones(4), np.arange(4)) == 0


def test_bootstrap_covers_the_mean():
    """The 95 % interval holds the true mean in about 95 of 100 cases, and weights count."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        rows = rng.normal(3.0, 1.0, size=(40, 1))
        low, high = stats.interval(stats.bootstrap_means(rows, np.ones(40)))
        hits += low[0] < 3.0 < high[0]
    assert 0.88 <= hits / 200 <= 0.99
    rows, weights = np.array([[0.0], [1.0]]), np.array([1, 10**9])
    assert np.median(stats.bootstrap_means(rows, weights)) > 0.999


def test_bootstrap_stays_paired():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(30, 1)) * 10
    difference = stats.bootstrap_means(noise + 1, np.ones(30)) - stats.bootstrap_means(noise, np.ones(30))
    np.testing.assert_allclose(difference, 1.0)


def test_overlap_and_groups():
    assert stats.overlap((5, 3, 1, 0), (1, 5, 2, 4), 2) == 1
    assert stats.overlap((5, 3, 1, 0), (1, 5, 2, 4), 3) == 2
    rng = np.random.default_rng(3)
    rows = np.arange(10.0) + rng.normal(size=(8, 10)) * 1e-3
    agreement = stats.group_agreement(rows, np.ones(8), 3)
    assert agreement.shape == (2,)
    np.testing.assert_allclose(agreement, 1.0)
