"""The rule engine by hand: each outcome at its threshold, Holm's correction, and how large a run would settle a claim."""

import math

import pytest
from scipy.stats import norm

from llmdrop_utils.report.rules import (
    DEVIATES,
    INCONCLUSIVE,
    NOT_RUN,
    REPRODUCED,
    Comparison,
    Finding,
    decide,
    holm,
)

NAN, INF = math.nan, math.inf


def number(low, value, high, **threshold):
    return Comparison("it is", value, low, high, **threshold)


# ---- one comparison ---------------------------------------------------------------------------------------------------

UP = [  # (low, value, high), with the threshold at 1: closed, and open
    ((1.1, 2, 3), REPRODUCED, REPRODUCED),
    ((1, 2, 3), REPRODUCED, INCONCLUSIVE),  # one end is the threshold, which fits a closed one alone
    ((0.999, 2, 3), INCONCLUSIVE, INCONCLUSIVE),
    ((0, 1, 2), INCONCLUSIVE, INCONCLUSIVE),
    ((0, 0.5, 1.001), INCONCLUSIVE, INCONCLUSIVE),
    ((0, 0.5, 1), INCONCLUSIVE, DEVIATES),
    ((0, 0.5, 0.999), DEVIATES, DEVIATES),
    ((1, 1, 1), REPRODUCED, DEVIATES),  # without width
    ((1.001, 1.001, 1.001), REPRODUCED, REPRODUCED),
    ((0.999, 0.999, 0.999), DEVIATES, DEVIATES),
    ((NAN, 2, 3), INCONCLUSIVE, INCONCLUSIVE),
    ((2, 3, NAN), INCONCLUSIVE, INCONCLUSIVE),
    ((2, NAN, 3), INCONCLUSIVE, INCONCLUSIVE),
    ((NAN, 0, NAN), INCONCLUSIVE, INCONCLUSIVE),
    ((-INF, 0, 0.5), INCONCLUSIVE, INCONCLUSIVE),
    ((2, 0.9, 3), INCONCLUSIVE, INCONCLUSIVE),  # all draws lie above the number, and the threshold between
    ((0, 1.1, 0.9), INCONCLUSIVE, INCONCLUSIVE),
    ((2, 1.5, 3), REPRODUCED, REPRODUCED),
]


@pytest.mark.parametrize(("ends", "closed", "open_"), UP)
def test_an_interval_at_its_threshold(ends, closed, open_):
    low, value, high = ends
    assert number(low, value, high, at_least=1).outcome == closed
    assert number(low, value, high, above=1).outcome == open_
    assert number(-high, -value, -low, at_most=-1).outcome == closed, "the mirror image"
    assert number(-high, -value, -low, below=-1).outcome == open_
    for threshold, outcome in (({"at_least": 1}, closed), ({"above": 1}, open_)):
        assert decide([Finding("m", "", [number(low, value, high, **threshold)])])[0] == outcome, "alone, it decides"


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        ((1, 1.5, 2), REPRODUCED),
        ((0.9, 1.5, 2), INCONCLUSIVE),
        ((1, 1.5, 2.1), INCONCLUSIVE),
        ((0, 1.5, 3), INCONCLUSIVE),
        ((1.5, 2.1, 2.5), INCONCLUSIVE),
        ((2.1, 2.2, 2.5), DEVIATES),
        ((0.1, 0.2, 0.5), DEVIATES),
        ((2, 2, 2), REPRODUCED),
    ],
)
def test_a_region_of_two_sides(ends, outcome):
    assert number(*ends, at_least=1, at_most=2).outcome == outcome
    assert decide([Finding("m", "", [number(*ends, at_least=1, at_most=2)])])[0] == outcome


def test_how_likely_a_number_is_at_the_threshold():
    """2.5 % where the interval ends at the threshold; a third of the way to it, 3 x 1.96 standard errors."""
    assert number(-5, 0, 1, at_least=1).p() == pytest.approx(0.025)
    assert number(-5, 0, 1, at_least=3).p() == pytest.approx(norm.sf(3 * 1.959964))
    assert number(-5, 0, 4, at_least=1).p() == pytest.approx(norm.sf(1.959964 / 4))
    assert number(0, 1, 9, at_most=0).p() == pytest.approx(0.025)
    assert number(1, 2, 9, at_least=1).p() == 1, "it fits"
    assert number(1, 2, 9, at_least=1).p(against=DEVIATES) == pytest.approx(0.025)
    assert number(-5, 0, 1, at_least=1).p(against=DEVIATES) == 1
    assert number(0, 0, 0, at_least=1).p() == 0, "a count has no chance"
    assert number(1, 1, 1, at_least=1).p(against=DEVIATES) == 0
    for unknown in (number(NAN, 0, 0.1, at_least=1), number(0, NAN, 0.1, at_least=1), number(-0.1, 0, NAN, at_least=1)):
        assert (unknown.p(), unknown.p(against=DEVIATES)) == (1, 1)


def test_which_of_two_thresholds_decides():
    """Inside, the one that is reached first as the interval grows; outside, the nearer one."""
    assert number(3.9, 4, 9, at_least=0, at_most=10).nearest == (10, 6, 5)
    assert number(0.1, 4, 4.1, at_least=0, at_most=10).nearest == (0, 4, 3.9)
    assert number(9, 12, 13, at_least=0, at_most=10).nearest == (10, 2, 3)
    assert number(-4, -1, 3, at_least=0, at_most=10).nearest == (0, 1, 4)


def test_how_a_number_is_told():
    assert str(number(1, 2, 3, at_least=0)) == "it is 2.00 (1.00 to 3.00)"
    assert str(Comparison("share", 0.98, 0.952, 1.008, form=".1%")) == "share 98.0 % (95.2 % to 100.8 %)"
    assert str(number(2, 2, 2)) == "it is 2.00"
    assert str(number(NAN, 2, NAN)) == "it is 2.00"
    assert str(number(NAN, NAN, NAN)) == "it is"


# ---- several at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_values", "rejected"),
    [
        ([0.02, 0.012, 0.001], [True, True, True]),  # 0.001 <= 0.025 / 3, 0.012 <= 0.025 / 2, 0.02 <= 0.025
        ([0.02, 0.013, 0.001], [False, False, True]),  # 0.013 > 0.0125, so the greatest is not looked at
        ([0.001, 0.02, 0.013], [True, False, False]),
        ([0.009, 0.009, 0.009], [False, False, False]),  # 0.025 / 3 = 0.0083
        ([0.0125, 0.0125], [True, True]),  # a tie, at the limit itself
        ([0.0126, 0.0126], [False, False]),
        ([0.025], [True]),
        ([0.0251], [False]),
        ([1, 0], [False, True]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, rejected):
    assert holm(p_values) == rejected


def failing(p, **more):
    """0 where at least 1 is claimed, with an interval so wide that chance explains it with this probability."""
    high = norm.isf(0.025) / norm.isf(p)
    return Comparison("it is", 0, -high, high, at_least=1, **more)


def fitting(p, **more):
    """2 where at least 1 is claimed."""
    reach = norm.isf(0.025) / norm.isf(p)
    return Comparison("it is", 2, 2 - reach, 2 + reach, at_least=1, **more)


def outcome_of(*findings):
    return decide([Finding(f"model {i}", "", comparisons) for i, comparisons in enumerate(findings)])[0]


def test_one_that_fails_must_stand_out_among_all():
    assert failing(0.013).p() == pytest.approx(0.013)
    assert failing(0.013).outcome == DEVIATES, "by its own interval"
    assert outcome_of([failing(0.013)]) == DEVIATES
    assert outcome_of([failing(0.013), fitting(0.01)]) == INCONCLUSIVE
    assert outcome_of([failing(0.012), fitting(0.01)]) == DEVIATES
    assert outcome_of([failing(0.012), failing(0.013)]) == DEVIATES
    assert outcome_of([failing(0.013), failing(0.013)]) == INCONCLUSIVE
    assert outcome_of([failing(0.013), number(NAN, NAN, NAN, at_least=1)]) == INCONCLUSIVE


def test_all_that_hold_need_no_correction():
    assert outcome_of([fitting(0.024)] * 50) == REPRODUCED
    assert outcome_of([fitting(0.024)] * 49 + [fitting(0.026)]) == INCONCLUSIVE


def test_models_are_corrected_for_together():
    assert outcome_of([failing(0.013)], [fitting(0.01)]) == INCONCLUSIVE
    assert outcome_of([failing(0.012)], [fitting(0.01)]) == DEVIATES
    assert outcome_of([fitting(0.01)], [fitting(0.01)]) == REPRODUCED
    assert outcome_of([fitting(0.01)], [fitting(0.1)]) == INCONCLUSIVE
    assert outcome_of([fitting(0.01)], []) == REPRODUCED, "a model without comparisons is not run"


def test_one_model_that_deviates_is_enough():
    """And what would settle another is then beside the point."""
    findings = [Finding("clear", "", [failing(0.001)]), Finding("open", "", [fitting(0.3)])]
    assert decide(findings) == (DEVIATES, [])
    assert decide(findings[::-1]) == (DEVIATES, [])


def one_is_enough(*comparisons):
    return decide([Finding("m", "", comparisons, enough="one")])


def test_one_is_enough_for_some_claims():
    """The mirror image: one that fits must stand out among all, and all that fail need no correction."""
    assert one_is_enough(fitting(0.012), failing(0.001))[0] == REPRODUCED
    assert one_is_enough(fitting(0.013), failing(0.001))[0] == INCONCLUSIVE
    assert one_is_enough(fitting(0.024))[0] == REPRODUCED
    assert one_is_enough(*[failing(0.024)] * 50)[0] == DEVIATES
    assert one_is_enough(*[failing(0.024)] * 49, failing(0.026))[0] == INCONCLUSIVE
    assert one_is_enough(number(1, 1, 1, at_least=1), failing(0.001))[0] == REPRODUCED
    assert one_is_enough(failing(0.001), number(NAN, NAN, NAN, at_least=1)) == (INCONCLUSIVE, ["Left open: it is"])


def test_one_is_enough_is_corrected_for_by_itself():
    """Its comparisons do not count among those that must hold together."""
    other = Finding("other", "", [failing(0.024)])
    assert decide([other, Finding("m", "", [fitting(0.001)] * 9, enough="one")])[0] == DEVIATES


def test_nothing_to_compare_is_not_run():
    assert decide([]) == (NOT_RUN, [])
    assert decide([Finding("m", "no reason to compare")]) == (NOT_RUN, [])


# ---- what would settle it -----------------------------------------------------------------------------------------------


def note(*comparisons, **more):
    outcome, notes = decide([Finding("m", "", comparisons, **more)])
    assert outcome == INCONCLUSIVE
    (text,) = notes
    return text


def test_how_many_documents_would_settle_it():
    """98.0 (95.2 to 100.8) against 99: the interval reaches 2.8 up, and 1 is needed. 2.8^2 x 500 = 3,920."""
    share = Comparison("Attn-8", 0.98, 0.952, 1.008, at_least=0.99, size=500, unit="documents", form=".1%")
    assert share.needed() == pytest.approx(2.8**2)
    assert note(share) == (
        "To settle it: Attn-8 98.0 % (95.2 % to 100.8 %), where the threshold is 99.0 %: about 4,000 documents instead of 500 "
        "would settle it"
    )


@pytest.mark.parametrize(("low", "factor"), [(0, "4.0"), (-1, "16"), (-5.5, "170"), (-35.5, "5,400")])  # squares of 2 (1 - low)
def test_without_a_size_the_factor_is_told(low, factor):
    assert note(number(low, 1, 2, at_least=0.5, unit="repeats")) == (
        f"To settle it: it is 1.00 ({low:.2f} to 2.00), where the threshold is 0.50: about {factor} times as many repeats "
        "would settle it"
    )


def test_among_several_the_factor_is_wider():
    """One of four is enough to deviate if it lies 2.4977 standard errors outside, not 1.96."""
    assert failing(0.1).needed(4) == pytest.approx(failing(0.1).needed() * (2.49771 / 1.959964) ** 2, rel=1e-5)
    assert failing(0.00625).needed(4) == pytest.approx(1)


def test_the_one_that_settles_it_is_told():
    """Where all must hold: the first that fails; else the last that fits. Where one is enough, the other way round."""
    soon, late = {"size": 100, "unit": "soon"}, {"size": 100, "unit": "late"}
    assert "about 380 late" in note(fitting(0.1, **soon), fitting(0.155, **late))  # (1.96 / 1.0152)^2 = 3.727
    assert "about 240 soon" in note(fitting(0.1, **soon))  # (1.96 / 1.2816)^2 = 2.339
    assert "about 310 soon" in note(failing(0.1, **soon), failing(0.155, **late))  # (2.2414 / 1.2816)^2 = 3.059
    assert "about 310 soon" in note(failing(0.1, **soon), fitting(0.3, **late))
    assert "about 310 soon" in note(fitting(0.1, **soon), failing(0.3, **late), enough="one")
    assert "about 380 late" in note(failing(0.1, **soon), failing(0.155, **late), enough="one")
    holds = [fitting(0.001)] * 7
    assert "about 460 soon" in note(failing(0.1, **soon), *holds)  # among eight: (2.7344 / 1.2816)^2 = 4.552


def test_one_that_already_holds_does_not_settle_it():
    assert "would settle" in note(fitting(0.001, unit="far", size=1), fitting(0.1, unit="near", size=100))
    assert "near" in note(fitting(0.001, unit="far", size=1), fitting(0.1, unit="near", size=100))


@pytest.mark.parametrize(
    ("at", "threshold", "shown"),
    [(1, {"at_least": 1}, "1.00"), (0, {"above": 0}, "0.00"), (0, {"below": 0}, "0.00"), (1 + 1e-9, {"above": 1}, "1.00")],
)
@pytest.mark.parametrize("reach", [1, 1e-3, 5e-16])
def test_a_number_at_the_threshold(at, threshold, shown, reach):
    if at > 1 and reach < 1:
        return  # the interval is then too narrow to hold it
    text = note(number(at - reach, at, at + reach, size=5, **threshold))
    assert text.endswith(f"the threshold is {shown}: too close to the threshold to say how large a run would settle it")


def test_a_number_without_interval_is_named():
    assert note(number(NAN, 2, NAN, at_least=1), fitting(0.1)) == "Left open: it is 2.00"
    assert note(fitting(0.1), number(NAN, NAN, NAN)) == "Left open: it is"


def test_each_open_model_has_its_note():
    findings = [Finding("a", "", [fitting(0.1, unit="x")]), Finding("b", "", [fitting(0.2, unit="y")])]
    outcome, notes = decide([*findings, Finding("c", "", [fitting(0.01)])])
    assert outcome == INCONCLUSIVE
    assert [text.split(" would")[0][-1] for text in notes] == ["x", "y"]


@pytest.mark.parametrize(
    ("times", "told"), [(1.0, "1,000"), (1.001, "1,100"), (1.234, "1,300"), (9.91, "10,000"), (1234.5, "1,300,000")]
)
def test_needed_sizes_are_rounded_up_to_two_digits(times, told):
    """Of 1,000 samples, so many times as many: the interval reaches the root of that times the distance."""
    reach = math.sqrt(times * (1 + 1e-9))
    assert f"about {told} samples of text instead of 1,000" in note(number(2 - reach, 2, 3, at_least=1, size=1000))


def test_few_units_are_told_as_they_are():
    assert "about 7 groups instead of 5" in note(number(2 - math.sqrt(1.3), 2, 3, at_least=1, size=5, unit="groups"))
