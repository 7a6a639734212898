"""Notebook 10, from values to rows: is importance by layer, and with it what goes next, still that of the dense model?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...base import stats
from ...dropping.plan import DropPlan
from ...measure.importance import Importance, drop_order
from ...measure.metrics import KINDS
from ..work import TextWork
from .ranking import RankingWork
from .rows import DENSE_VERSION, Version, more_than_dense
from .work import MadeWork


class Ranked(NamedTuple):
    """A version whose importance was measured."""

    plan: DropPlan  # layers that it drops, or has something else in the place of, are compared with nothing
    more: int  # attention layers that were dropped further
    scores: Importance
    by_dense_order: Sequence[Sequence[float]]  # nats per token without these, by corpus and sample
    by_own_order: Sequence[Sequence[float]]

    def left(self, kind: str) -> list[int]:
        """Layers that have all of a kind."""
        lacking = {*(self.plan.attention if kind != "mlp" else ()), *(self.plan.mlp if kind != "attention" else ())}
        return [layer for layer in range(self.scores.importance[kind].size) if layer not in lacking]


def ranked(works: Mapping[Version, MadeWork], values: Mapping[Version, Sequence[dict]]) -> dict[Version, Ranked]:
    """The versions whose importance was measured."""
    return {
        version: Ranked(work.plan, item.more, Importance.from_json(value["importance"]), value["by_dense_order"],
                        value["by_own_order"])
        for version, work in works.items() for item, value in zip(work.items, values[version], strict=True)
        if isinstance(item, RankingWork)
    }  # fmt: skip


def importance_rows(dense: Importance, found: Mapping[Version, Ranked]) -> list[dict]:
    """Importance of what is left in each version, after that of all layers of the dense model."""
    rows = []
    everything = {DENSE_VERSION: Ranked(DropPlan(), 0, dense, (), ())} if found else {}
    for version, each in (everything | dict(found)).items():
        for kind in KINDS:
            low, high = stats.text_interval(_draws(each.scores, kind), len(each.scores.weights))
            rows += [
                version._asdict() | {"kind": kind, "layer": layer, "importance": each.scores.importance[kind][layer],
                                     "low": low[layer], "high": high[layer]}
                for layer in each.left(kind)
            ]  # fmt: skip
    return rows


def ranking_rows(dense: Importance, found: Mapping[Version, Ranked]) -> list[dict]:
    """How the layers that are left rank in each version, beside the same layers in the dense model, on the same samples.

    Importance 0.1, 0.2, 0.4 in the dense model and 0.3, 0.2, 0.8 here: a rank correlation of 0.5, and a mean that is 1.86 times
    the dense one's. One layer further, the dense order takes the first, and its own order the second.
    """
    rows = []
    for version, each in found.items():
        for kind in KINDS:
            left = each.left(kind)
            before, now = (scores.importance[kind][left] for scores in (dense, each.scores))
            drawn_before, drawn_now = (_draws(scores, kind)[:, left] for scores in (dense, each.scores))
            n_samples = len(each.scores.weights)
            correlation = float(stats.rank_correlation(before, now))
            drawn = stats.rank_correlation(drawn_before, drawn_now)
            low, high = stats.correlation_interval(correlation, drawn, n_samples)
            relative_low, relative_high = stats.text_interval(drawn_now.mean(1) / drawn_before.mean(1), n_samples)
            dense_next, own_next = ([left[i] for i in drop_order(values)[: each.more]] for values in (before, now))
            rows.append(version._asdict() | {
                "kind": kind, "samples": n_samples, "n_left": len(left), "correlation": correlation, "low": low, "high": high,
                "relative": now.mean() / before.mean(), "relative_low": relative_low, "relative_high": relative_high,
                "more": each.more, "dense_next": " ".join(map(str, dense_next)), "own_next": " ".join(map(str, own_next)),
                "shared": len({*dense_next} & {*own_next}), "by_chance": each.more**2 / len(left),
            })  # fmt: skip
    return rows


def _draws(scores: Importance, kind: str) -> np.ndarray:
    """Bootstrap of importance (REPEATS, n_layers), with the same draws for each version: they share their samples."""
    return stats.text_means(scores.per_sample[kind], scores.weights)


def further_rows(
    works: Mapping[Version, MadeWork], values: Mapping[Version, Sequence[dict]], found: Mapping[Version, Ranked]
) -> list[dict]:
    """What each version loses without more attention layers, as a mean over corpora: those that come next in the dense order,
    those that come next in its own, and how much less it loses without the latter."""
    if not found:
        return []
    texts = [(place, item.corpus) for place, item in enumerate(works[DENSE_VERSION].items) if isinstance(item, TextWork)]
    nll = {
        corpus: np.array([values[DENSE_VERSION][place]["nll"],
                          *(order[i] for each in found.values() for order in (each.by_dense_order, each.by_own_order))]).T
        for i, (place, corpus) in enumerate(texts)
    }  # fmt: skip
    mean, rows = more_than_dense(nll, dense=0)["mean"], []
    for i, (version, each) in enumerate(found.items()):
        row = version._asdict() | {"more": each.more}
        for name, column in (("dense", 2 * i + 1), ("own", 2 * i + 2)):
            drawn = mean.row(column)
            row |= {f"by_{name}_order": drawn["value"], f"{name}_low": drawn["low"], f"{name}_high": drawn["high"]}
        low, high = stats.interval(mean.draws[:, 2 * i + 1] - mean.draws[:, 2 * i + 2], mean.n)
        gained = row["by_dense_order"] - row["by_own_order"]
        rows.append(row | {"gained": gained, "gained_low": low, "gained_high": high})
    return rows
