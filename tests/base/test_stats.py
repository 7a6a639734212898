"""Intervals and rankings against scipy and against known truths."""

import numpy as np
import pytest
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


@pytest.mark.parametrize(
    ("n", "low", "high", "level"),
    [  # of the values 1 to n
        (2, 1, 2, 0.5),  # both on one side: 2 x 1/4
        (3, 1, 3, 0.75),  # all on one side: 2 x 1/8
        (5, 1, 5, 1 - 2 / 32),  # 93.8 %: five do not reach 95 %
        (6, 1, 6, 1 - 2 / 64),  # 96.9 %
        (7, 1, 7, 1 - 2 / 128),  # 98.4 %; the 2nd and the 6th would cover 1 - 2 x 8 / 128 = 87.5 %
        (8, 1, 8, 1 - 2 / 256),  # the 2nd and the 7th: 1 - 2 x 9 / 256 = 93.0 %
        (9, 2, 8, 1 - 2 * (1 + 9) / 512),  # 96.1 %
        (12, 3, 10, 1 - 2 * (1 + 12 + 66) / 4096),  # 96.1 %
    ],
)
def test_median_interval_by_hand(n, low, high, level):
    values = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert stats.median_interval(values) == (low, high, pytest.approx(level))


def test_a_single_value_has_no_interval():
    assert np.isnan(stats.median_interval(np.array([3.0]))).all()


@pytest.mark.parametrize("n", [3, 5, 6, 7, 9, 12])
@pytest.mark.parametrize("shape", ["normal", "lognormal", "ties"])
def test_median_interval_covers_what_it_says(n, shape):
    """As often as it says, whatever the distribution; with ties at least as often."""
    rng = np.random.default_rng(n)
    draws, median = {
        "normal": (rng.normal(3.0, 1.0, (4000, n)), 3.0),
        "lognormal": (rng.lognormal(0.0, 1.5, (4000, n)), 1.0),
        "ties": (np.round(rng.normal(0.0, 1.0, (4000, n))), 0.0),
    }[shape]
    found = [stats.median_interval(values) for values in draws]
    level = found[0][2]
    assert level >= 0.95 or n < 6
    covered = np.mean([low <= median <= high for low, high, _ in found])
    assert covered >= level - 0.015
    assert covered <= level + 0.015 or shape == "ties"


def test_overlap_and_groups():
    assert stats.overlap((5, 3, 1, 0), (1, 5, 2, 4), 2) == 1
    assert stats.overlap((5, 3, 1, 0), (1, 5, 2, 4), 3) == 2
    rng = np.random.default_rng(3)
    rows = np.arange(10.0) + rng.normal(size=(8, 10)) * 1e-3
    agreement = stats.group_agreement(rows, np.ones(8), 3)
    assert agreement.shape == (2,)
    np.testing.assert_allclose(agreement, 1.0)
