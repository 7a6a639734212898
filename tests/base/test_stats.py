"""Intervals and rankings against scipy and against known truths."""

import itertools
from collections import Counter

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


def test_weights_count():
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


MANY = 10**9  # draws: percentiles are then those of the normal distribution


def test_an_interval_holds_95_of_100_draws():
    assert stats.interval(np.arange(1001.0), MANY) == pytest.approx((25, 975))
    low, high = stats.interval(np.stack([np.arange(1001.0), np.full(1001, 7.0)], axis=1), MANY)
    np.testing.assert_allclose([low, high], [[25, 7], [975, 7]])


def test_a_single_draw_has_no_interval():
    """Not one of no width, which would decide any rule."""
    low, high = stats.interval(np.zeros((2000, 3)), 1)
    assert np.isnan([low, high]).all()
    assert low.shape == (3,)
    assert all(isinstance(end, float) for end in stats.interval(np.zeros(2000), 1)), "a number for tables, as of several draws"
    assert np.isnan(stats.text_interval(stats.text_means(np.array([0.4]), np.ones(1)), 1)).all()


def test_correlations_reach_as_far_up_as_down():
    """Draws from 0.7 to 0.82 around 0.8: the upper end is 0.9. It never falls, and never passes 1."""
    percentiles = lambda low, high: np.repeat([low, high], 5000)  # noqa: E731
    assert stats.correlation_interval(0.8, percentiles(0.7, 0.82), 64) == pytest.approx((0.7, 0.9))
    assert stats.correlation_interval(0.8, percentiles(0.75, 0.95), 64) == pytest.approx((0.75, 0.95))
    assert stats.correlation_interval(0.95, percentiles(0.7, 0.96), 64) == pytest.approx((0.7, 1))
    assert np.isnan(stats.correlation_interval(0.8, np.zeros(10), 1)).all()


def test_few_draws_have_wider_percentiles():
    """Student's quantile for n - 1 degrees of freedom, times the root of n / (n - 1), as a percentile of the normal one."""
    assert stats.percentiles(32) == pytest.approx((0.01913, 1 - 0.01913), abs=1e-5)  # -2.03951 x 1.01600 = -2.07214
    assert stats.percentiles(2)[0] == pytest.approx(0, abs=1e-12)  # -12.7062 x 1.41421
    assert stats.interval(np.arange(10001.0), 32) == pytest.approx((191.3, 9808.7), abs=0.1)


@pytest.mark.parametrize(("n_samples", "length"), [(1, 1), (2, 1), (3, 1), (4, 2), (16, 4), (32, 5), (64, 6), (256, 10)])
def test_neighbours_of_text_are_drawn_together(n_samples, length):
    assert stats.block_length(n_samples) == length


def test_draws_of_neighbours():
    """Four samples in blocks of two, the last one before the first: two of 0 1, 1 2, 2 3, 3 0."""
    rows, blocks = np.array([1.0, 10, 100, 1000]), [11, 110, 1100, 1001]
    expected = Counter((a + b) / 4 for a, b in itertools.product(blocks, repeat=2))
    found = Counter(stats.text_means(rows, np.ones(4)))
    assert set(found) == set(expected)
    for value, among in expected.items():
        assert abs(found[value] / stats.REPEATS - among / 16) < 0.05, value
    low, high = stats.text_interval(np.arange(10001.0), 256)  # as of 25.6 draws
    assert (low, high) == pytest.approx(stats.interval(np.arange(10001.0), 25.6))


def test_three_in_blocks_of_two_are_three():
    """Two blocks would be four samples: the last is left out. So 0 1 2, but also 0 1 0, are drawn."""
    found = set(stats.bootstrap_means(np.array([1.0, 10, 100]), np.ones(3), block=2) * 3)
    assert {round(value) for value in found} == {a + b for a in (11, 110, 101) for b in (1, 10, 100)}


def test_interval_of_a_mean():
    """1, 2, 3: mean 2, standard error 1 / root of 3, and Student's quantile 4.3027 for two degrees of freedom."""
    assert stats.mean_interval(np.array([1.0, 2, 3])) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert np.isnan(stats.mean_interval(np.array([1.0]))).all()


def test_interval_of_a_difference():
    assert stats.difference_interval((5, 4, 7), (2, 1, 2)) == pytest.approx((3, 2, 3 + np.sqrt(5)))


def test_interval_of_a_slope():
    """1, 2, 3 at x = 0, 1, 2, each with 0.5 on either side: the weights are -1/2, 0 and 1/2."""
    x, values = np.array([0.0, 1, 2]), np.array([1.0, 2, 3])
    assert stats.slope_interval(x, values, values - 0.5, values + 0.5) == pytest.approx(
        (1, 1 - np.hypot(0.25, 0.25), 1 + np.hypot(0.25, 0.25))
    )
    low, high = np.array([0.0, 2, 3]), np.array([1.0, 2, 3.2])  # 1 may be 1 less, 3 may be 0.2 more: both make it steeper
    assert stats.slope_interval(x + 5, values, low, high) == pytest.approx((1, 1, 1 + np.hypot(0.5, 0.1)))


def test_spread_around_a_slope():
    """1, 3, 2 at 0, 1, 2: a slope of 0.5, residuals -0.5, 1 and -0.5, and Student's 12.706 for one degree of freedom."""
    spread = stats.slope_spread(np.array([0.0, 1, 2]), np.array([1.0, 3, 2]))
    assert spread == pytest.approx(12.7062 * np.sqrt(1.5) / np.sqrt(2), rel=1e-4)
    assert stats.slope_spread(np.array([0.0, 1]), np.array([1.0, 3])) == np.inf


def test_mean_of_correlations():
    z = np.arctanh([0.2, 0.6])
    reach = 12.7062 * np.std(z, ddof=1) / np.sqrt(2)
    expected = np.tanh([z.mean(), z.mean() - reach, z.mean() + reach])
    assert stats.mean_correlation(np.array([0.2, 0.6])) == pytest.approx(tuple(expected), rel=1e-4)
    mean, low, high = stats.mean_correlation(np.array([1.0]))
    assert (mean, np.isnan(low), np.isnan(high)) == (1, True, True)
    assert stats.mean_correlation(np.array([1.0, 1, 1])) == pytest.approx((0.999, 0.999, 0.999))


def test_what_a_comparison_would_find():
    """An interval of plus and minus 1.96 standard errors of 1: found in 80 % of runs if it is 1.96 + 0.84 from zero."""
    assert stats.detectable(3 - 1.959964, 3 + 1.959964) == pytest.approx(1.959964 + 0.841621)


def test_draws_are_resamples():
    """Three samples of unequal weight have 27 resamples: each of their means is drawn about as often as it is among these."""
    rows, weights = np.array([0.0, 1.0, 5.0]), np.array([1, 2, 4])
    resamples = [list(drawn) for drawn in itertools.product(range(3), repeat=3)]
    expected = Counter(round(np.average(rows[drawn], weights=weights[drawn]), 9) for drawn in resamples)
    found = Counter(np.round(stats.bootstrap_means(rows, weights, seed=3), 9))
    assert set(found) == set(expected)
    for value, among in expected.items():
        assert abs(found[value] / stats.REPEATS - among / 27) < 0.05, value


def test_another_seed_draws_apart():
    rows, weights = np.arange(5.0), np.ones(5)
    assert np.array_equal(stats.bootstrap_means(rows, weights, 1), stats.bootstrap_means(rows, weights, 1))
    apart = np.corrcoef(stats.bootstrap_means(rows, weights, 1), stats.bootstrap_means(rows, weights, 2))[0, 1]
    assert abs(apart) < 0.2


# ---- intervals cover what they say ------------------------------------------------------------------------------------------
# Each column is a run of its own. All draw the same samples, as the runs of one profile do.

RUNS = 2000  # of which 95 % are 1,900, give or take 10


def covered(ends, truth):
    """Share of the runs whose interval (low, high) holds the true value."""
    low, high = map(np.asarray, ends)
    return np.mean((low <= truth) & (truth <= high))


def sampled(shape, n, seed=0):
    """n samples of each run, and their true mean. Right and wrong answers (0/1) are right as often as the name says."""
    rng = np.random.default_rng([n, seed])
    if shape == "normal":
        return rng.normal(3.0, 1.0, (n, RUNS)), 3.0
    return (rng.random((n, RUNS)) < float(shape)).astype(float), float(shape)


@pytest.mark.parametrize(
    ("n", "shape"),
    # Of 16 answers, the intervals of neighbouring scores are so far apart that none has 95 %.
    [(16, "normal"), *itertools.product((32, 100, 500), ("normal", "0.45", "0.7"))],
)
def test_means_over_documents_are_covered(n, shape):
    rows, truth = sampled(shape, n)
    assert 0.93 <= covered(stats.interval(stats.bootstrap_means(rows, np.ones(n)), n), truth) <= 0.97


def neighbours(n, correlation, seed=0):
    """Samples of a moving average of two, mean 0: each is correlated with the next one, and with no other."""
    share = (1 - np.sqrt(1 - 4 * correlation**2)) / (2 * correlation) if correlation else 0.0
    noise = np.random.default_rng([n, seed]).normal(size=(n + 1, RUNS))
    return noise[1:] + share * noise[:-1]


def test_neighbours_are_correlated_as_asked():
    rows = neighbours(64, 0.35)
    assert np.mean(rows[1:] * rows[:-1]) / rows.var() == pytest.approx(0.35, abs=0.01)
    assert np.mean(rows[2:] * rows[:-2]) / rows.var() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("n", [32, 64])
@pytest.mark.parametrize("correlation", [0.0, 0.2, 0.35])
def test_means_over_text_are_covered(n, correlation):
    """Whether neighbouring samples are alike (up to what was seen in real text) or not."""
    rows = neighbours(n, correlation)
    assert 0.93 <= covered(stats.text_interval(stats.text_means(rows, np.ones(n)), n), 0) <= 0.97


def test_single_draws_of_neighbours_would_be_too_narrow():
    rows = neighbours(64, 0.35)
    assert covered(stats.interval(stats.bootstrap_means(rows, np.ones(64)), 64), 0) < 0.91


def test_paired_differences_are_covered():
    """Documents differ much more than the two models do on each. The interval for independent ones covers too much."""
    n = 100
    shared, ours, theirs = (sampled("normal", n, seed)[0] for seed in range(3))
    a, b = 5 * shared + ours + 1, 5 * shared + theirs
    draws = [stats.bootstrap_means(rows, np.ones(n)) for rows in (a, b)]
    assert 0.93 <= covered(stats.interval(draws[0] - draws[1], n), 1) <= 0.97
    sides = [np.array([rows.mean(0), *stats.interval(drawn, n)]).T for rows, drawn in zip((a, b), draws, strict=True)]
    found = np.array([stats.difference_interval(*pair) for pair in zip(*sides, strict=True)])
    assert covered(found[:, 1:].T, 1) == 1


@pytest.mark.parametrize("n", [5, 16])
def test_means_of_few_groups_are_covered(n):
    rows, truth = sampled("normal", n)
    assert 0.93 <= covered(np.transpose([stats.mean_interval(values) for values in rows.T]), truth) <= 0.97


@pytest.mark.parametrize(("n", "m"), [(32, 32), (32, 100), (100, 500)])
@pytest.mark.parametrize("shape", ["normal", "0.7"])
def test_differences_of_independent_means_are_covered(n, m, shape):
    sides = []
    for seed, size in enumerate((n, m)):
        rows, truth = sampled(shape, size, seed + 1)
        rows, truth = rows * (1 + 2 * seed), truth * (1 + 2 * seed)
        draws = stats.bootstrap_means(rows, np.ones(size), seed)
        sides.append((np.array([rows.mean(0), *stats.interval(draws, size)]).T, truth))
    (a, true_a), (b, true_b) = sides
    found = np.array([stats.difference_interval(*pair) for pair in zip(a, b, strict=True)])
    assert 0.93 <= covered(found[:, 1:].T, true_a - true_b) <= 0.97
