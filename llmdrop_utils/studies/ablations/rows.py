"""Notebook 04, from values to rows. Arms share their samples, so differences are paired; more is better in every measure."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from ...base import stats
from ...dropping.plan import DropPlan
from ..curve_rows import TaskValues, in_mean, mean_score
from .work import OrderWork, order_of

COSINE = "cosine"  # what tables call the paper's method
BETTER, WORSE = "better", "worse"  # outcomes of a comparison that holds after Holm's correction
TEXT, TASKS, CONTINUATION = "text", "tasks", "continuation"  # measures: minus nats per token, mean score, share of equal tokens
SAME_SAMPLES = "cosine, few samples"  # as few as the stepwise methods see, which are compared with it
READS = {"reverse order": "nothing", "random": "nothing", "Taylor": "text, and gradients",
         "output change": "text, a layer less at a time", "greedy KL": "text, all layers at every step",
         "iterative": "text, after every layer"}  # fmt: skip
SHARED_OF = 8
ALPHA = 0.05  # of all comparisons of one measure together (Holm)


class Arm(NamedTuple):
    """A plan that is tested: what it drops, how that was chosen, and how many."""

    kind: str
    method: str
    n: int
    seed: int = 0

    @property
    def all_seeds(self) -> tuple[str, str, int]:
        return self.kind, self.method, self.n


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, and the degrees of freedom of Student's t in it."""

    value: float
    low: float
    high: float
    freedom: float

    @property
    def p(self) -> float:
        """How likely a number this far from zero would be if the true one were zero; NaN without an interval."""
        reach = self.value - self.low if self.value > 0 else self.high - self.value
        if not np.isfinite(reach):
            return math.nan
        error = reach / t.isf(stats.TAIL, self.freedom)
        return 2 * float(t.sf(abs(self.value) / error, self.freedom)) if error > 0 else float(self.value == 0)


@dataclasses.dataclass(frozen=True)
class Values:
    """A measure under each arm, over the same samples or documents."""

    arms: Sequence[Arm]
    means: np.ndarray  # float64 (n_arms,)
    draws: np.ndarray  # (REPEATS, n_arms): bootstrap of the means
    n: float  # independent samples or documents

    def at(self, key: tuple[str, str, int]) -> list[int]:
        """Places of a method: one for each seed."""
        return [i for i, arm in enumerate(self.arms) if arm.all_seeds == key]

    def estimate(self, key: tuple[str, str, int], minus: tuple[str, str, int] | None = None) -> Estimate:
        """The mean over seeds, or its difference from another method's.

        Of several seeds the interval covers both: the reaches over samples, and over seeds (Student's t), add as squares.
        """
        places = self.at(key)
        means, draws = self.means[places], self.draws[:, places].mean(1)
        if minus is not None:
            (other,) = self.at(minus)
            means, draws = means - self.means[other], draws - self.draws[:, other]
        value, freedom = float(means.mean()), self.n - 1
        low, high = map(float, stats.interval(draws, self.n))
        if len(means) > 1:
            reach = stats.mean_interval(means)[1] - value
            low, high = value - math.hypot(value - low, reach), value + math.hypot(high - value, reach)
            freedom = min(freedom, len(means) - 1)
        return Estimate(value, low, high, freedom)


# ---- values -------------------------------------------------------------------------------------------------------------


def of_text(arms: Sequence[Arm], rows: np.ndarray) -> Values:
    """A measure of samples of one text, of which neighbours are drawn together. rows: float64 (n_samples, n_arms)."""
    draws = stats.text_means(rows, np.ones(len(rows)))
    return Values(arms, rows.mean(0), draws, stats.independent(len(rows)))


def mean_of_tasks(tasks: Sequence[TaskValues], arms: Sequence[Arm]) -> Values:
    """The mean score of tasks with choices."""
    chosen = in_mean(tasks)
    means, draws = mean_score(chosen)
    return Values(list(arms), means, draws, min(len(task.scores) for task in chosen))


# ---- rows of one model, without the column `model` ------------------------------------------------------------------------


def method_rows(orders: Mapping[tuple[str, str, int], tuple[OrderWork, dict]]) -> list[dict]:
    """What each method reads, and what it took, once. Of several seeds the first."""
    rows = []
    for (kind, method, seed), (work, value) in orders.items():
        if seed == 0:
            reads_text = value["passes"] > 0
            reads = READS.get(method, "text" if reads_text else "weights")
            rows.append({"kind": kind, "method": method, "reads": reads, "tokens": work.tokens.numel() if reads_text else 0,
                         "passes": value["passes"], "seconds": value["seconds"]})  # fmt: skip
    return rows


def order_rows(orders: Mapping[tuple[str, str, int], tuple[OrderWork, dict]]) -> list[dict]:
    """Layers in the order in which each method drops them; positions are counted from one."""
    return [
        {"kind": kind, "method": method, "position": i + 1, "layer": layer}
        for (kind, method, seed), (_, value) in orders.items() if seed == 0
        for i, layer in enumerate(order_of(value))
    ]  # fmt: skip


def agreement_rows(orders: Mapping[tuple[str, str, int], tuple[OrderWork, dict]]) -> list[dict]:
    """Pairs of methods for attention: layers in common among the first 8, and the correlation of whole rankings.

    NaN where a method ranks no more than the layers that it drops.
    """
    found = {m: order_of(value) for (kind, m, seed), (_, value) in orders.items() if kind == "attention" and seed == 0}
    whole = max(map(len, found.values()))
    rows = []
    for method, order in found.items():
        for other, theirs in found.items():
            if method == other:
                continue
            complete = len(order) == len(theirs) == whole
            correlation = float(stats.rank_correlation(np.argsort(order), np.argsort(theirs))) if complete else np.nan
            rows.append({"method": method, "other": other, "shared": stats.overlap(order, theirs, SHARED_OF),
                         "correlation": correlation})  # fmt: skip
    return rows


def quality_rows(
    plans: Mapping[Arm, DropPlan], methods: Sequence[Arm], measures: Mapping[str, Values], few: Collection[str] = ()
) -> list[dict]:
    """Each method in each measure, beside cosine at the same number dropped; which differ, by Holm's correction.

    few: methods that see fewer samples; they stand beside cosine on the same ones.
    """
    rows = []
    for measure, values in measures.items():
        keys = dict.fromkeys(arm.all_seeds for arm in values.arms if arm in set(methods))
        found = [_quality_row(plans, values, key, SAME_SAMPLES if key[1] in few else COSINE) for key in keys]
        _settle(found)
        rows += [row | {"measure": measure} for row in found]
    return rows


def _quality_row(plans: Mapping[Arm, DropPlan], values: Values, key: tuple[str, str, int], against: str) -> dict:
    kind, method, n = key
    found, base = values.estimate(key), (kind, against, n)
    row = {"kind": kind, "method": method, "n": n, "value": found.value, "low": found.low, "high": found.high}
    if method == against:
        ends = dict.fromkeys(("difference", "difference_low", "difference_high"), 0.0)
        return row | {"against": against} | ends | {"p": np.nan, "outcome": "itself"}
    difference = values.estimate(key, base)
    same = all(plans[arm].key == plans[Arm(*base)].key for arm in plans if arm.all_seeds == key)
    outcome = "the same layers" if same else "" if np.isfinite(difference.p) else "no interval"
    return row | {"against": against, "difference": difference.value, "difference_low": difference.low,
                  "difference_high": difference.high, "p": 1.0 if same else difference.p, "outcome": outcome}  # fmt: skip


def _settle(rows: list[dict]) -> None:
    """Say which methods differ from cosine, all comparisons of a measure taken together (Holm)."""
    open_ones = sorted((row for row in rows if not row["outcome"]), key=lambda row: row["p"])
    holds = True
    for i, row in enumerate(open_ones):
        holds = holds and row["p"] <= ALPHA / (len(open_ones) - i)
        row["outcome"] = "no difference seen" if not holds else BETTER if row["difference"] > 0 else WORSE


def task_rows(tasks: Sequence[TaskValues], asked: Sequence[Arm]) -> list[dict]:
    """The score of each task under each method. Of several seeds the mean."""
    rows = []
    for task in tasks:
        values = mean_of_tasks([task], asked)
        for kind, method, n in dict.fromkeys(arm.all_seeds for arm in asked):
            found = values.estimate((kind, method, n))
            rows.append({"task": task.task, "kind": kind, "n": n, "method": method, "metric": task.metric,
                         "num_fewshot": task.num_fewshot, "documents": len(task.scores), "value": found.value,
                         "low": found.low, "high": found.high, "chance": task.chance})  # fmt: skip
    return rows


def calibration_rows(plans: Mapping[Arm, DropPlan], text: Values, varied: Mapping[tuple[str, str], OrderWork]) -> list[dict]:
    """Cosine on other text, beside cosine on all samples of the first corpus: layers in common, and nats per token more."""
    rows = []
    for what, setting in varied:
        for arm in (arm for arm in plans if arm.method == f"{what} {setting}"):
            base = Arm("attention", COSINE, arm.n)
            found = text.estimate(base.all_seeds, arm.all_seeds)
            shared = stats.overlap(plans[arm].attention, plans[base].attention, arm.n)
            rows.append({"varied": what, "setting": setting, "n": arm.n, "shared": shared, "difference": found.value,
                         "difference_low": found.low, "difference_high": found.high})  # fmt: skip
    return rows


def n_parameters(plan: DropPlan, parameters: Mapping[str, int]) -> int:
    """How many a plan drops. parameters: of one attention and of one MLP."""
    return sum(len(getattr(plan, kind)) * each for kind, each in parameters.items())


def block_rows(plans: Mapping[Arm, DropPlan], text: Values, parameters: Mapping[str, int]) -> list[dict]:
    """What goes in place of n blocks with at least as many parameters; nats per token more than without the blocks."""
    rows = []
    for arm in (arm for arm in plans if arm.kind == "block"):
        found, more = text.estimate(arm.all_seeds), text.estimate(("block", "blocks", arm.n), arm.all_seeds)
        rows.append({"n": arm.n, "arm": arm.method, "sub_layers": plans[arm].n_drop,
                     "parameters": n_parameters(plans[arm], parameters),
                     "perplexity": np.exp(-found.value), "low": np.exp(-found.high), "high": np.exp(-found.low),
                     "difference": more.value, "difference_low": more.low, "difference_high": more.high})  # fmt: skip
    return rows
