"""Notebook 05, what speed costs in quality: the difference of two trades, worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from llmdrop_utils.base.stats import Z
from llmdrop_utils.report.tables import frame
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.speedup.trade import pair_rows, sdr, sdr_difference

NAN = float("nan")


def cell(points, speedup, kind="attention", **more):
    """A row of the table "trade": points and speed-up as (value, low, high)."""
    lost = dict(zip(("points_lost", "points_lost_low", "points_lost_high"), points, strict=True))
    gained = dict(zip(("speedup", "speedup_low", "speedup_high"), speedup, strict=True))
    sdr = points[0] / (100 * (speedup[0] - 1))
    return (
        {"model": "m", "backend": "eager", "kind": kind, "n": 8, "sdr": sdr, "noisy": False, "level": 0.97}
        | lost
        | gained
        | more
    )


def exactly(value):
    return (value, value, value)


def around(value, error):
    """With this standard error."""
    return (value, value - Z * error, value + Z * error)


def test_exact_numbers_have_an_exact_difference():
    """2 points for 20 percent, and 6 for 10: 0.1 - 0.6."""
    found = sdr_difference(cell(exactly(2), exactly(1.2)), cell(exactly(6), exactly(1.1)), 0)
    assert found == pytest.approx((-0.5,) * 3)


def test_exact_speed_ups_leave_the_difference_of_points():
    """Standard errors of 0.05 x 20 = 1 and 0.1 x 10 = 1 points, unpaired: the root of 0.05^2 + 0.1^2 points per percent."""
    a, b = cell(around(2, 1), exactly(1.2)), cell(around(6, 1), exactly(1.1))
    value, low, high = sdr_difference(a, b, 2 * Z * math.sqrt(2))
    assert value == pytest.approx(-0.5)
    assert (value - low, high - value) == pytest.approx((Z * math.hypot(0.05, 0.1),) * 2)


def test_points_are_paired():
    """At equal speed-up it is the interval of the gap itself, over 20 percent. Alike in all documents: it has no width."""
    a, b = cell(around(2, 1), exactly(1.2)), cell(around(6, 1), exactly(1.2))
    for width in (4.0, 1.0, 0.0):
        value, low, high = sdr_difference(a, b, width)
        assert (value, value - low, high - value) == pytest.approx((-0.2, width / 40, width / 40), abs=1e-7)


def test_points_that_exclude_each_other():
    """More than unpaired: what one keeps the other loses, so var(a - b) is 4 and not 2."""
    a, b = cell(around(2, 1), exactly(1.2)), cell(around(6, 1), exactly(1.2))
    _, low, high = sdr_difference(a, b, 2 * Z * 2)
    assert high - low == pytest.approx(2 * Z * 2 / 20)


def test_an_uncertain_speed_up():
    """Fieller's interval of -6 / g for g = 10 percent with a standard error of 1: from -6 / (10 - 1.96) to -6 / (10 + 1.96).

    Attention drop loses nothing for sure, so the difference is that of MLP alone.
    """
    a, b = cell(exactly(0), exactly(1.2)), cell(exactly(6), around(1.1, 0.01))
    value, low, high = sdr_difference(a, b, 0)
    assert (value, low, high) == pytest.approx((-0.6, -6 / (10 - Z), -6 / (10 + Z)))
    value, low, high = sdr_difference(b, a, 0)
    assert (value, low, high) == pytest.approx((0.6, 6 / (10 + Z), 6 / (10 - Z)))


def test_zero_is_held_where_the_products_may_be_equal():
    """2 / 20 against 1.5 / 10: equal if the 10 percent were 15, so if they may be 15."""
    a = cell(exactly(2), exactly(1.2))
    for error, ends in ((0.02, -1), (0.0255106, 0), (0.03, 1)):  # 1.96 x 0.0255 = 0.05
        _, _, high = sdr_difference(a, cell(exactly(1.5), around(1.1, error)), 0)
        assert (high > 1e-6) - (high < -1e-6) == ends


@pytest.mark.parametrize("ends", [(0.99, 1.3), (0.99, 1.12), (1.0, 1.12), (NAN, NAN), (1.05, NAN)])
def test_a_speed_up_within_noise_has_no_interval(ends):
    """Or one that was timed once."""
    clear, noisy = cell(around(2, 1), (1.2, 1.1, 1.3)), cell(around(2, 1), (1.1, *ends))
    for pair in ((clear, noisy), (noisy, clear)):
        value, low, high = sdr_difference(*pair, 1)
        assert abs(value) == pytest.approx(0.1)
        assert math.isnan(low)
        assert math.isnan(high)


def test_a_noisy_speed_up_or_one_of_three_repeats_has_no_interval():
    a, b = cell(around(2, 1), exactly(1.2)), cell(around(6, 1), exactly(1.1), noisy=True)
    few = cell(around(6, 1), exactly(1.1), level=0.75)
    for other in (b, few):
        assert np.isnan([*sdr_difference(a, other, 1)[1:], *sdr_difference(other, a, 1)[1:]]).all()


def test_kinds_that_gain_points_are_not_compared():
    """Both gain one point. Per percent the slower one gains more, 0.2 against 0.02, and yet the faster one is better."""
    slow, fast = cell(exactly(-1), exactly(1.05)), cell(exactly(-1), exactly(1.5))
    value, low, high = sdr_difference(slow, fast, 0)
    assert value == pytest.approx(-0.18)
    assert np.isnan([low, high]).all()
    assert sdr_difference(fast, cell(exactly(1), exactly(1.05)), 0) == pytest.approx((-0.22,) * 3), "a gain beats a loss"


def test_nothing_is_paid_for_a_slow_down():
    """3 points for -10 percent would be -0.3, better than free."""
    assert math.isnan(sdr(3, 0.9))
    assert math.isnan(sdr(3, 1.0))
    assert sdr(2, 1.25) == pytest.approx(0.08)


def test_points_without_interval_have_none():
    value, low, high = sdr_difference(cell((2, NAN, NAN), exactly(1.2)), cell(exactly(2), exactly(1.1)), 1)
    assert value == pytest.approx(-0.1)
    assert np.isnan([low, high]).all()


def test_speed_ups_that_exclude_nothing_have_no_interval():
    """Either one is clear of 1, by 1.01; together they are not, since 99 % of either is uncertain."""
    a, b = (cell(around(points, 1), (1.2, 1.003, 1.397)) for points in (2, 6))
    assert np.isnan(sdr_difference(a, b, 1)[1:]).all()


# ---- pairs --------------------------------------------------------------------------------------------------------------


def gap(kind="attention", other="mlp", n=8, measure="tasks", low=0.01, high=0.03, model="m"):
    return {"model": model, "kind": kind, "other": other, "n": n, "measure": measure, "low": low, "high": high,
            "difference": (low + high) / 2}  # fmt: skip


def test_pairs_of_equal_n():
    """Attention against MLP and block, by the gap of the same model, kinds and n, on tasks; a share of 0.02 is 2 points."""
    a = cell(around(2, 1), (1.2, 1.19, 1.21))
    mlp, block = cell(around(6, 1), exactly(1.1), "mlp"), cell(around(5, 1), exactly(1.25), "block")
    trade = [
        a, mlp, block, a | {"n": 4}, mlp | {"n": 12}, a | {"backend": "compiled"}, block | {"backend": "compiled"},
        a | {"model": "other"}, mlp | {"model": "other", "sdr": NAN},
    ]  # fmt: skip
    wrong = [gap(n=4, high=1), gap(measure="text", high=1), gap(kind="joint", high=1), gap(model="other", high=1)]
    right = [gap(), gap(other="block", low=0.0, high=0.1)]
    gaps = pd.DataFrame([*wrong, *right, gap(other="attention", kind="joint"), *wrong])
    rows = pair_rows(trade, gaps)
    assert [(row["model"], row["backend"], row["n"], row["other"]) for row in rows] == [
        ("m", "eager", 8, "mlp"), ("m", "eager", 8, "block"), ("m", "compiled", 8, "block"),
    ]  # fmt: skip
    for row, (other, width) in zip(rows, ((mlp, 2), (block, 10), (block, 10)), strict=True):
        assert (row["difference"], row["low"], row["high"]) == pytest.approx(sdr_difference(a, other, width))
    assert len(frame("trade_pairs", rows, STUDIES["05_speedup"].tables)) == 3


def test_no_gap_no_pair():
    trade = [cell(around(2, 1), exactly(1.2)), cell(around(6, 1), exactly(1.1), "mlp")]
    assert pair_rows(trade, pd.DataFrame([gap(other="block")])) == []
    assert pair_rows([], pd.DataFrame([gap()])) == []
    empty = pd.DataFrame(columns=["model", "kind", "n", "other", "measure"])
    assert pair_rows(trade, empty) == [], "as of random weights"


def test_a_pair_within_noise_is_told_without_interval():
    trade = [cell(around(2, 1), exactly(1.2)), cell(around(6, 1), (1.01, 0.9, 1.1), "mlp")]
    (row,) = pair_rows(trade, pd.DataFrame([gap()]))
    assert row["difference"] == pytest.approx(0.1 - 6)
    assert np.isnan([row["low"], row["high"]]).all()
