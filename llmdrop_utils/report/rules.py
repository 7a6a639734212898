"""The rule engine: intervals and thresholds -> one of four outcomes. No check decides by itself, and no point estimate alone.

A check (studies/*/verdicts.py) says which numbers of a run its claim is about and between which thresholds the claim has them.
*Reproduced*: all their intervals lie inside. *Deviates*: one lies outside, by a test that is corrected for their number (Holm).
*Inconclusive*: neither, so the run is too small to tell. *Not run*: there is nothing to compare.

That all must hold at once makes *reproduced* no likelier by chance with more comparisons, so it needs no correction. One is
enough for *deviates*, so that needs one. A claim for which one comparison is enough (`enough="one"`) is the mirror image.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import norm

from ..base.stats import TAIL, Z

REPRODUCED, DEVIATES, INCONCLUSIVE, NOT_RUN = "reproduced", "deviates", "inconclusive", "not run"
OUTCOMES = (REPRODUCED, DEVIATES, INCONCLUSIVE, NOT_RUN)


@dataclass(frozen=True)
class Comparison:
    """A number of a run with its 95 % interval, and between which thresholds the claim has it."""

    what: str
    value: float
    low: float
    high: float
    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf  # like at_least, without the threshold itself
    below: float = math.inf
    size: float = math.nan  # how many units the interval comes from, if a table says so
    unit: str = "samples of text"
    form: str = ".2f"

    @property
    def lower(self) -> float:
        """The smallest number that fits the claim."""
        return max(self.at_least, self.above if math.isinf(self.above) else math.nextafter(self.above, math.inf))

    @property
    def upper(self) -> float:
        """The largest number that fits the claim."""
        return min(self.at_most, self.below if math.isinf(self.below) else math.nextafter(self.below, -math.inf))

    @property
    def is_known(self) -> bool:
        """Are there a number and an interval at all?"""
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    @property
    def is_inside(self) -> bool:
        """Does the number itself fit the claim?"""
        return self.lower <= self.value <= self.upper

    @property
    def outcome(self) -> str:
        """By its own interval alone, which the number belongs to. A number without an interval is inconclusive."""
        if not self.is_known:
            return INCONCLUSIVE
        low, high = min(self.low, self.value), max(self.high, self.value)  # draws may all lie on one side of it
        if self.lower <= low and high <= self.upper:
            return REPRODUCED
        return DEVIATES if high < self.lower or low > self.upper else INCONCLUSIVE

    def p(self, against: str = REPRODUCED) -> float:
        """How likely a number this far from the threshold would be if the true one lay at it; the interval is taken for normal.

        against REPRODUCED: this far outside; against DEVIATES: this far inside. 1 where the number lies on the other side, and
        0.025 where the interval ends at the threshold.
        """
        _, distance, reach = self.nearest
        if not self.is_known or self.is_inside == (against == REPRODUCED):
            return 1.0
        return float(norm.sf(Z * distance / reach)) if reach > 0 else 0.0

    def needed(self, comparisons: int = 1) -> float:
        """How many times as many units would take the threshold out of the interval, if number and spread stay as they are.

        comparisons: among how many this one has to stand out (Holm). Infinite where the number equals the threshold.
        """
        _, distance, reach = self.nearest
        wider = float(norm.isf(TAIL / comparisons)) / Z
        times = wider * reach / distance if distance > 0 else math.inf
        return times * times  # inf where ** would raise OverflowError

    @property
    def nearest(self) -> tuple[float, float, float]:
        """The threshold that decides, how far the number is from it, and how far the interval reaches in that direction."""
        ends = []
        for end in (end for end in (self.lower, self.upper) if math.isfinite(end)):
            below, above = self.value - self.low, self.high - self.value
            reach = below if self.value > end else above
            ends.append((end, abs(self.value - end), reach if reach > 0 else max(below, above)))  # draws may lie on one side
        if self.is_inside:  # the one that is reached first as the interval grows
            ends.sort(key=lambda end: end[1] / end[2] if end[2] > 0 else math.inf)
        else:
            ends.sort(key=lambda end: end[1])
        return ends[0] if ends else (math.inf, math.nan, math.nan)

    def __str__(self) -> str:
        if math.isnan(self.value):
            return self.what
        number = lambda x: format(x, self.form.replace(".", "z.")).replace("%", " %")  # noqa: E731 (no "-0.0")
        ends = f" ({number(self.low)} to {number(self.high)})" if self.low < self.high else ""
        return f"{self.what} {number(self.value)}{ends}"


def exactly(what: str, ratio: float, tolerance: float = 0.0) -> Comparison:
    """A ratio of counts that is to be one. A count has no interval: it is one or it is not."""
    return Comparison(what, ratio, ratio, ratio, at_least=1 - tolerance, at_most=1 + tolerance, form=".4f")


@dataclass(frozen=True)
class Finding:
    """What a check has to say of one model."""

    model: str
    text: str  # the numbers, in words; without comparisons, why there are none
    comparisons: Sequence[Comparison] = ()
    enough: str = "all"  # "one": a single comparison inside is enough for the claim


def holm(p_values: Sequence[float], tail: float = TAIL) -> list[bool]:
    """Which of several hypotheses are rejected so that any wrong rejection has a probability of `tail` at most (Holm 1979).

    0.02, 0.012, 0.001 at 0.025: 0.001 <= 0.025 / 3, and 0.012 <= 0.025 / 2, and 0.02 <= 0.025, so all three.
    """
    rejected, order = [False] * len(p_values), sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > tail / (len(order) - rank):
            break
        rejected[i] = True
    return rejected


def decide(findings: Iterable[Finding]) -> tuple[str, list[str]]:
    """The outcome of a claim over all models, and what would settle it where it is inconclusive."""
    tested = [finding for finding in findings if finding.comparisons]
    if not tested:
        return NOT_RUN, []
    strict = [c for finding in tested if finding.enough == "all" for c in finding.comparisons]
    fails = dict(zip(map(id, strict), holm([c.p() for c in strict]), strict=True))
    outcomes, notes = [], []
    for finding in tested:
        outcome, open_ones, among = _outcome(finding, fails, len(strict))
        outcomes.append(outcome)
        if outcome == INCONCLUSIVE:
            notes.append(_what_settles(finding.enough, open_ones, among))
    worst = next(outcome for outcome in (DEVIATES, INCONCLUSIVE, REPRODUCED) if outcome in outcomes)
    return worst, notes if worst == INCONCLUSIVE else []


def _outcome(finding: Finding, fails: dict[int, bool], n_strict: int) -> tuple[str, list[Comparison], int]:
    """The outcome for one model, the comparisons that leave it open, and among how many one of them must stand out."""
    each = finding.comparisons
    if finding.enough == "all":
        if any(fails[id(c)] and c.outcome == DEVIATES for c in each):  # where an interval ends at the threshold, p is 0.025 too
            return DEVIATES, [], 1
        open_ones = [c for c in each if c.outcome != REPRODUCED]
        return (INCONCLUSIVE if open_ones else REPRODUCED), open_ones, n_strict
    holds = holm([c.p(against=DEVIATES) for c in each])
    if any(stands_out and c.outcome == REPRODUCED for c, stands_out in zip(each, holds, strict=True)):
        return REPRODUCED, [], 1
    open_ones = [c for c in each if c.outcome != DEVIATES]
    return (INCONCLUSIVE if open_ones else DEVIATES), open_ones, len(each)


def _what_settles(enough: str, open_ones: Sequence[Comparison], among: int) -> str:
    """Why a claim is open, and how large a run would have to be."""
    unknown = [c for c in open_ones if not c.is_known]
    if unknown:
        return f"Left open: {unknown[0]}"
    # A single one settles it if it stands out among all: outside where all must hold, inside where one is enough. If there is
    # none, every other has to leave the threshold.
    if single := [(c.needed(among), c) for c in open_ones if c.is_inside == (enough == "one")]:
        times, c = min(single, key=lambda pair: pair[0])
    else:
        times, c = max(((c.needed(), c) for c in open_ones), key=lambda pair: pair[0])
    threshold = round(c.nearest[0], 12) + 0.0  # 0 instead of the number next to it, and of -0
    text = f"To settle it: {c}, where the threshold is {format(threshold, c.form).replace('%', ' %')}: "
    if times > 1e4:
        return text + "too close to the threshold to say how large a run would settle it"
    if math.isnan(c.size):
        factor = f"{times:.1f}" if times < 10 else _rounded(times)
        return text + f"about {factor} times as many {c.unit} would settle it"
    return text + f"about {_rounded(times * c.size)} {c.unit} instead of {c.size:,.0f} would settle it"


def _rounded(n: float) -> str:
    """Two digits, rounded up: 1,234 -> "1,300"; 1,200 with an error of rounding is 1,200."""
    step = 10 ** max(0, math.floor(math.log10(n)) - 1)
    return f"{math.ceil(n / step - 1e-6) * step:,}"
