"""Intervals that studies make of others cover what they say: in simulated runs, whose true values are known."""

import numpy as np
import pytest
from scipy.stats import norm

from llmdrop_utils.base import stats
from llmdrop_utils.base.files import REFERENCE
from llmdrop_utils.report.tables import read_tables
from llmdrop_utils.studies.curve_rows import share_of_dense
from llmdrop_utils.studies.speedup.trade import sdr_difference

RUNS = 1000
SCORES = {"dense": 0.46, "attention": 0.45, "mlp": 0.42}  # true shares of right answers
SPEEDUPS = {"attention": 1.28, "mlp": 1.10}


def covered(ends, truth):
    low, high = map(np.asarray, ends)
    return np.mean((low <= truth) & (truth <= high))


def answers(rng, n_documents):
    """Right and wrong of each model on the same documents, of which some are easy for all: kind -> (n_documents, RUNS)."""
    ease = rng.normal(size=(n_documents, RUNS))
    own = lambda: rng.normal(size=(n_documents, RUNS))  # noqa: E731
    return {
        kind: (np.sqrt(0.7) * ease + np.sqrt(0.3) * own() < norm.ppf(score)).astype(float) for kind, score in SCORES.items()
    }


def three(name, value, low, high):
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def simulated_trade(n_documents, repeats, noise, seed):
    """The interval of the trade of attention minus MLP, from answers and from times: (low, high), each (RUNS,)."""
    rng = np.random.default_rng(seed)
    scores = answers(rng, n_documents)
    draws = {kind: stats.bootstrap_means(rows, np.ones(n_documents)) for kind, rows in scores.items()}
    dense = np.exp(rng.normal(0, noise, (RUNS, repeats)))
    rows = {}
    for kind, speedup in SPEEDUPS.items():
        lost = 100 * (scores["dense"] - scores[kind]).mean(0)
        rows[kind] = three("points_lost", lost, *stats.interval(100 * (draws["dense"] - draws[kind]), n_documents))
        ratios = dense / np.exp(rng.normal(0, noise, (RUNS, repeats))) * speedup
        ends = np.array([stats.median_interval(ratio)[:2] for ratio in ratios]).T
        rows[kind] |= three("speedup", np.median(ratios, axis=1), *ends) | {"noisy": [False] * RUNS, "level": [0.96] * RUNS}
    low, high = stats.interval(draws["attention"] - draws["mlp"], n_documents)
    run = lambda kind, i: {name: values[i] for name, values in rows[kind].items()}  # noqa: E731
    found = [sdr_difference(run("attention", i), run("mlp", i), 100 * (high - low)[i]) for i in range(RUNS)]
    return np.array(found)[:, 1:].T


@pytest.mark.parametrize(
    ("n_documents", "repeats", "noise"),
    [
        (500, 6, 0.02),  # the documents decide how wide it is
        (1500, 6, 0.02),
        (2000, 9, 0.02),  # the times do
    ],
)
def test_trades_are_covered(n_documents, repeats, noise):
    """Whichever ingredient is the uncertain one, though a speed-up of 1.1 is near what may not be divided by."""
    low, high = simulated_trade(n_documents, repeats, noise, seed=n_documents)
    truth = 1 / 28 - 4 / 10
    known = np.isfinite(low)
    assert known.mean() > 0.97, "where both gain points there is none"
    assert 0.93 <= covered((low[known], high[known]), truth) <= 0.97


def test_shares_above_guessing_are_covered():
    n = 500
    scores = answers(np.random.default_rng(3), n)
    draws = np.stack([stats.bootstrap_means(scores[kind], np.ones(n)) for kind in ("dense", "attention")], axis=-1)
    ends = stats.interval(share_of_dense(draws, 0.25)[..., 1], n)
    assert 0.93 <= covered(ends, (0.45 - 0.25) / (0.46 - 0.25)) <= 0.97


def test_rank_correlations_are_too_low_if_anything(monkeypatch):
    """As the docstrings of the rows say: with means and noise of the committed run, neighbours correlated by 0.2.

    Each resample adds noise to what already has noise, so ranks agree less in the draws than they do in truth. What is claimed
    to be at least so high is never reproduced by that.
    """
    monkeypatch.setattr(stats, "REPEATS", 300)
    table = read_tables(REFERENCE / "cpu" / "01_similarity")["importance"].query("kind == 'attention'")
    corpora, runs, rng = list(table["corpus"].unique())[:2], 200, np.random.default_rng(0)
    means, draws = [], []
    for seed, corpus in enumerate(corpora):
        rows = table[table["corpus"] == corpus]
        n = int(rows["n_samples"].iloc[0])
        noise = rng.normal(size=(n + 1, runs, len(rows)))
        spread = (rows["high"] - rows["low"]).to_numpy() / 3.92 * np.sqrt(n)
        means.append(rows["importance"].to_numpy())
        samples = means[-1] + spread * (noise[1:] + 0.2 * noise[:-1]) / np.hypot(1, 0.2)
        draws.append(stats.text_means(samples, np.ones(n), seed))
    depth = np.arange(len(means[0]) - 1)
    for drawn, truth in (
        (stats.rank_correlation(depth, draws[0][..., :-1]), stats.rank_correlation(depth, means[0][:-1])),
        (stats.rank_correlation(*draws), stats.rank_correlation(*means)),
    ):
        low, high = stats.text_interval(drawn, n)
        assert covered((low, high), truth) >= 0.93
        assert np.mean(low > truth) <= 0.03
