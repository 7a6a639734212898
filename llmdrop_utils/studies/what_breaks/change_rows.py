"""Notebook 08, from versions to rows: what each change costs, what it saves, and how much of a loss tuning regains."""

from collections.abc import Mapping, Sequence

import numpy as np

from ...base import stats
from ..ablations.rows import Arm, Values
from .changes import LORA, NONE, WANDA

DENSE_ARM = Arm("dense", NONE, 0)


def change_rows(measures: Mapping[str, Values], sizes: Mapping[Arm, int]) -> list[dict]:
    """Each version in each measure, beside the same layers dropped without the change, and beside the dense model."""
    rows = []
    for measure, values in measures.items():
        for arm in values.arms:
            found, kept = values.estimate(arm.all_seeds), values.estimate(arm.all_seeds, DENSE_ARM.all_seeds)
            plain = DENSE_ARM if arm.method == WANDA else arm._replace(method=NONE)
            cost = values.estimate(arm.all_seeds, plain.all_seeds)
            rows.append({"change": arm.method, "kind": arm.kind, "n": arm.n, "measure": measure, "bytes": sizes[arm],
                         "value": found.value, "low": found.low, "high": found.high,
                         "from_dense": kept.value, "from_dense_low": kept.low, "from_dense_high": kept.high,
                         "cost": cost.value, "cost_low": cost.low, "cost_high": cost.high})  # fmt: skip
    return rows


def pruned_rows(measures: Mapping[str, Values], sparsities: Mapping[int, float]) -> list[dict]:
    """Attention dropped minus as many weights pruned (Table 9), paired; more is better."""
    rows = []
    for measure, values in measures.items():
        for arm in (arm for arm in values.arms if arm.method == WANDA):
            found = values.estimate(arm._replace(method=NONE).all_seeds, arm.all_seeds)
            rows.append({"n": arm.n, "sparsity": sparsities[arm.n], "measure": measure, "difference": found.value,
                         "low": found.low, "high": found.high})  # fmt: skip
    return rows


def recovered_rows(measures: Mapping[str, Values]) -> list[dict]:
    """The share of what dropping lost that tuning regains, beside the dense model that is tuned alike.

    Of a dense model 60 and once tuned 62, of the dropped one 50 and 59: 10 points apart before and 3 after, so 0.7. What the
    dense model gains too is no recovery. NaN where nothing was lost, by the lower end of its interval.
    """
    rows = []
    for measure, values in measures.items():
        points = np.vstack([values.means, values.draws])
        of = {arm: points[:, i] for i, arm in enumerate(values.arms)}
        for arm in (arm for arm in of if arm.method == LORA and arm.kind != "dense"):
            tuned, plain = of[arm], of[arm._replace(method=NONE)]
            dense, tuned_dense = of[DENSE_ARM], of[DENSE_ARM._replace(method=LORA)]
            lost, left = dense - plain, tuned_dense - tuned
            low, _ = stats.interval(lost[1:], values.n)
            nothing = 0.0 if low > 0 else np.nan
            shares = np.divide(lost - left, lost, out=np.full(len(lost), nothing), where=(lost > 0) & (low > 0))
            share_low, share_high = stats.interval(shares[1:], values.n)
            rows.append({"kind": arm.kind, "n": arm.n, "measure": measure, "lost": lost[0], "gained": (tuned - plain)[0],
                         "dense_gained": (tuned_dense - dense)[0], "recovered": shares[0],
                         "low": share_low, "high": share_high})  # fmt: skip
    return rows


def speed_rows(timed: Sequence[Arm], value: Mapping[str, Sequence[Sequence[float]]]) -> list[dict]:
    """Milliseconds of a decode step, and the speed-up over the dense model in the same turns: median of their ratios.

    value: "seconds" of each version in each turn, and "dense", those of the dense model beside it.
    """
    rows = []
    for arm, taken, dense in zip(timed, value["seconds"], value["dense"], strict=True):
        ratios = np.array(dense) / np.array(taken)
        low, high, _ = stats.median_interval(ratios)
        rows.append({"method": arm.method, "kind": arm.kind, "n": arm.n, "milliseconds": 1e3 * float(np.median(taken)),
                     "speedup": float(np.median(ratios)), "low": low, "high": high, "repeats": len(ratios)})  # fmt: skip
    return rows


def ranking_rows(plain: Sequence[int], changed: Mapping[str, Sequence[int]], counts: Sequence[int]) -> list[dict]:
    """Are the same attention layers chosen once weights are rounded? plain, changed: orders in which layers are dropped."""
    return [
        {"change": change, "n": n, "shared": stats.overlap(tuple(plain), tuple(order), n),
         "correlation": float(stats.rank_correlation(np.argsort(plain), np.argsort(order)))}
        for change, order in changed.items() for n in counts
    ]  # fmt: skip
