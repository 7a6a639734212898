"""Notebook 07: from what was measured at the stages of one series to the rows of its tables."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ...base import stats
from ...dropping.plan import DropPlan, PlanKey
from ...measure.importance import Importance
from ...measure.metrics import KINDS
from ...models.series import Series
from ..work import DENSE

SHARES = {"quarter": 0.25, "half": 0.5}  # of the layers of a kind that are dropped
LAYERS = {"all layers": 0, "all but the first": 1}  # the paper shows the first layer apart, since it is far more important
LOSS_POINTS = 150  # of a training's losses, in the table
Plans = Mapping[tuple[str, str], DropPlan]  # (kind, share) -> what is dropped


class StageValues(NamedTuple):
    """What was measured of one stage."""

    scores: Importance
    text: Mapping[PlanKey, dict]  # of the dense model and of each plan: "nll" and "kl", lists of one value per sample


def count(n_layers: int, share: str) -> int:
    """How many layers are a "quarter" or a "half" of them; one at least."""
    return max(1, int(n_layers * SHARES[share]))


class Followed:
    """One series and what was measured of its stages. `rows` makes its part of each table."""

    def __init__(self, series: Series, plans: Plans, measured: Mapping[int, StageValues]):
        """measured: position in the series -> values. A stage that is unavailable is left out; the last one is needed."""
        self.series, self.plans = series, plans
        self.scores = [values.scores for values in measured.values()]
        self.text = [values.text for values in measured.values()]
        # The same draws at every stage: stages share their samples, so what is compared between them stays paired.
        self.draws = [{kind: stats.text_means(s.per_sample[kind], s.weights) for kind in KINDS} for s in self.scores]
        self.n_layers = self.scores[-1].importance["block"].size
        self.layers = {name: first for name, first in LAYERS.items() if first < self.n_layers}
        self.where = [
            {"position": i, "stage": stage.name, "step": stage.step, "tokens": stage.tokens, "progress": self._progress(i)}
            for i, stage in enumerate(series.stages)
            if i in measured
        ]

    def rows(self) -> dict[str, list[dict]]:
        """The rows of each table."""
        rows = {
            "runs": [self._run_row()],
            "stages": [self._stage_row(i) for i in range(len(self.scores))],
            "importance": self._importance_rows(),
            "means": self._mean_rows(),
            "change": self._change_rows(),
            "agreement": self._agreement_rows(),
            "settled": [self._settled_row(kind, share) for kind in KINDS for share in SHARES],
            "cost": self._cost_rows(),
            "losses": self._loss_rows(),
        }
        series = {"model": self.series.name, "seed": self.series.seed}
        return {table: [series | row for row in more] for table, more in rows.items()}

    def _progress(self, i: int) -> float:
        """Share of the training that is done, by tokens or else by steps; a single trained checkpoint is its end."""
        stages = self.series.stages
        for name in ("tokens", "step"):
            values = [getattr(stage, name) for stage in stages]
            if None not in values and values[-1]:
                return values[i] / values[-1]
        return float(i == len(stages) - 1)

    # ---- what there is ------------------------------------------------------------------------------------------------

    def _run_row(self) -> dict:
        run = self.series.run
        return {"n_layers": self.n_layers} | {
            name: run.get(name) for name in ("parameters", "tokens", "text_tokens", "unigram_entropy")
        }

    def _stage_row(self, i: int) -> dict:
        """Loss of the dense model on held-out text; and a warning where two checkpoints are one (this happens on the hub)."""
        nll = np.array(self.text[i][DENSE.key]["nll"])
        low, high = _interval_of_mean(nll)
        twins = [k for k in range(i) if self.scores[k].fingerprint == self.scores[i].fingerprint]
        same_as = self.where[twins[0]]["stage"] if twins else None
        return self.where[i] | {"nll": nll.mean(), "low": low, "high": high, "same_as": same_as}

    def _loss_rows(self) -> list[dict]:
        """Training loss, averaged over the steps between points that are evenly spaced on a logarithmic axis."""
        losses = self.series.losses
        if losses is None or losses.empty:
            return []
        edges = np.unique(np.geomspace(1, len(losses), min(LOSS_POINTS, len(losses))).round().astype(int))
        groups = np.searchsorted(edges, np.arange(1, len(losses) + 1))
        return losses.groupby(groups).agg({"step": "max", "tokens": "max", "loss": "mean"}).to_dict("records")

    # ---- importance ---------------------------------------------------------------------------------------------------

    def _importance_rows(self) -> list[dict]:
        rows = []
        for where, scores, draws in zip(self.where, self.scores, self.draws, strict=True):
            for kind in KINDS:
                low, high = self._interval(draws[kind])
                for layer, value in enumerate(scores.importance[kind]):
                    rows.append(where | {"kind": kind, "layer": layer, "importance": value, "low": low[layer],
                                         "high": high[layer]})  # fmt: skip
        return rows

    def _mean_rows(self) -> list[dict]:
        """Mean over layers, and by how much MLP and block exceed attention, paired by sample."""
        rows = []
        stages = range(len(self.scores))
        for i, (kind, (layers, first)) in itertools.product(stages, itertools.product(KINDS, self.layers.items())):
            mean, draws = self._mean(i, kind, first)
            attention, attention_draws = self._mean(i, "attention", first)
            (low, high), (above_low, above_high) = self._interval(draws), self._interval(draws - attention_draws)
            rows.append(self.where[i] | {"kind": kind, "layers": layers, "importance": mean, "low": low, "high": high,
                                         "above_attention": mean - attention, "above_low": above_low,
                                         "above_high": above_high})  # fmt: skip
        return rows

    def _change_rows(self) -> list[dict]:
        """How mean importance changes from each stage to the last (last minus stage), paired by sample."""
        rows = []
        earlier = range(len(self.scores) - 1)
        for i, (kind, (layers, first)) in itertools.product(earlier, itertools.product(KINDS, self.layers.items())):
            (mean, draws), (last, last_draws) = self._mean(i, kind, first), self._mean(-1, kind, first)
            low, high = self._interval(last_draws - draws)
            rows.append(self.where[i] | {"kind": kind, "layers": layers, "change": last - mean, "low": low, "high": high})
        return rows

    def _mean(self, i: int, kind: str, first: int) -> tuple[float, np.ndarray]:
        """Mean importance over the layers from `first` on at a stage, and its draws (REPEATS,)."""
        return self.scores[i].importance[kind][first:].mean(), self.draws[i][kind][:, first:].mean(1)

    def _interval(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval over the samples of importance."""
        return stats.text_interval(draws, len(self.scores[-1].weights))

    # ---- which layers would be dropped --------------------------------------------------------------------------------

    def _agreement_rows(self) -> list[dict]:
        """Does a stage rank the layers as the last one does? Rank correlation, and how many of a quarter both would drop."""
        n, rows = count(self.n_layers, "quarter"), []
        for where, scores, draws in zip(self.where, self.scores, self.draws, strict=True):
            for kind in KINDS:
                last = self.scores[-1]
                correlation = float(stats.rank_correlation(scores.importance[kind], last.importance[kind]))
                drawn = stats.rank_correlation(draws[kind], self.draws[-1][kind])
                low, high = stats.correlation_interval(correlation, drawn, len(last.weights))
                shared = stats.overlap(scores.order(kind), last.order(kind), n)
                rows.append(where | {"kind": kind, "correlation": correlation, "low": low, "high": high, "n": n,
                                     "shared": shared, "by_chance": n * n / self.n_layers})  # fmt: skip
        return rows

    def _settled_row(self, kind: str, share: str) -> dict:
        """From which stage on the n layers that would be dropped are those of the last stage, with an interval over samples."""
        n = count(self.n_layers, share)
        point = first_settled(np.array([[scores.importance[kind]] for scores in self.scores]), n)[0]
        settled = first_settled(np.array([draws[kind] for draws in self.draws]), n)
        low, high = (self.where[round(float(i))] for i in self._interval(settled))
        plan = self.plans[kind, share]
        layers = " ".join(map(str, plan.mlp if kind == "mlp" else plan.attention))
        return self.where[point] | {
            "kind": kind, "share": share, "n": n, "layers": layers, "low": low["progress"], "high": high["progress"],
            "low_stage": low["stage"], "high_stage": high["stage"],
        }  # fmt: skip

    def _cost_rows(self) -> list[dict]:
        """Loss per token that is added at each stage by dropping the layers chosen at the last one (dropped minus dense)."""
        rows = []
        for where, values in zip(self.where, self.text, strict=True):
            dense = np.array(values[DENSE.key]["nll"])
            for (kind, share), plan in self.plans.items():
                value = values[plan.key]
                added, kl = np.array(value["nll"]) - dense, np.array(value["kl"])
                low, high = _interval_of_mean(added)
                rows.append(where | {"kind": kind, "share": share, "n": count(self.n_layers, share), "cost": added.mean(),
                                     "low": low, "high": high, "kl": kl.mean()})  # fmt: skip
        return rows


def _interval_of_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean over samples of text."""
    return stats.text_interval(stats.text_means(values, np.ones(len(values)), seed=1), len(values))


def first_settled(importance: np.ndarray, n: int) -> np.ndarray:
    """importance (n_stages, n_draws, n_layers) -> (n_draws,): the first stage from which on the n least are the last one's.

    Sets by stage {0, 1}, {1, 2}, {0, 1}, {0, 1} -> 2: the first stage chose the same two, but the second did not.
    """
    chosen = np.argsort(importance, axis=-1, kind="stable")[..., :n]
    sets = np.sort(chosen, axis=-1)
    differs = (sets != sets[-1]).any(-1)  # (n_stages, n_draws)
    return np.where(differs.any(0), len(differs) - differs[::-1].argmax(0), 0)
