"""Notebook 10, from values to rows: what each version keeps, and what it regains. Versions share their samples."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...base import stats
from ...measure.confidence import binned_gaps, calibration_error
from ...models.cache_shape import cache_geometry
from ..what_breaks.work import ConfidenceWork, ProbeWork
from ..work import TextWork
from .work import PLAIN, WIDTH, WINDOW, MadeWork

CONTEXT = 2048  # tokens, of which a cache is counted
MEAN, CHOICES, ERROR = "perplexity over dense (mean)", "choices", "calibration error"


class Version(NamedTuple):
    """A model that is compared: by what its layers were chosen, what makes up for them, and how many are dropped."""

    layers: str  # "dense" if none is dropped
    way: str
    n: int


DENSE_VERSION = Version("dense", PLAIN, 0)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A measure of every version: values (n_versions,), and its bootstrap (REPEATS, n_versions)."""

    values: np.ndarray
    draws: np.ndarray
    n: float  # independent samples
    samples: int

    def row(self, i: int) -> dict:
        low, high = stats.interval(self.draws[:, i], self.n)
        return {"samples": self.samples, "value": self.values[i], "low": low, "high": high}


def losses(works: Mapping[Version, MadeWork], values: Mapping[Version, Sequence[dict]]) -> dict[str, Drawn]:
    """Nats per token more than the dense model, of each version on each corpus, and the mean over corpora."""
    versions = list(works)
    nll = {
        item.corpus: np.array([values[version][place]["nll"] for version in versions]).T
        for place, item in enumerate(works[DENSE_VERSION].items) if isinstance(item, TextWork)
    }  # fmt: skip
    return more_than_dense(nll, versions.index(DENSE_VERSION))


def more_than_dense(nll: Mapping[str, np.ndarray], dense: int) -> dict[str, Drawn]:
    """Corpus -> nats per token of its samples (n_samples, n_versions), as more than those of the dense one, and their mean."""
    found: dict[str, Drawn] = {}
    for corpus, values in nll.items():
        more = values - values[:, [dense]]
        draws = stats.text_means(more, np.ones(len(more)), seed=len(found))
        found[corpus] = Drawn(more.mean(0), draws, stats.independent(len(more)), len(more))
    each = list(found.values())
    mean = Drawn(
        np.mean([one.values for one in each], 0),
        np.mean([one.draws for one in each], 0),
        min(one.n for one in each),
        sum(one.samples for one in each),
    )
    return found | {"mean": mean}


def quality_rows(works: Mapping[Version, MadeWork], values: Mapping[Version, Sequence[dict]]) -> list[dict]:
    """Each version in each measure: perplexity over the dense model's, right choices, how far confidence is from being right,
    and what of the context and of the dense model's own continuation is found."""
    versions = list(works)
    measures: dict[str, Drawn] = {}
    for corpus, lost in losses(works, values).items():
        name = f"perplexity over dense ({corpus})"
        measures[name] = dataclasses.replace(lost, values=np.exp(lost.values), draws=np.exp(lost.draws))
    sure, right = [], []
    for place, item in enumerate(works[DENSE_VERSION].items):
        if isinstance(item, ConfidenceWork):
            sure.append([values[version][place]["confidence"] for version in versions])
            right.append([values[version][place]["right"] for version in versions])
        elif isinstance(item, ProbeWork):
            shares = np.array([values[version][place]["found"] for version in versions]).T
            measures[item.probe] = shares_drawn(shares, seed=20 + place)
    if sure:
        measures |= choices_drawn(np.hstack(sure).T, np.hstack(right).T)
    return [
        version._asdict() | {"measure": measure} | drawn.row(i)
        for i, version in enumerate(versions) for measure, drawn in measures.items()
    ]  # fmt: skip


def shares_drawn(shares: np.ndarray, seed: int) -> Drawn:
    """What is found of each answer, (n_answers, n_versions), of which those of one text may go together."""
    return Drawn(
        shares.mean(0), stats.text_means(shares, np.ones(len(shares)), seed), stats.independent(len(shares)), len(shares)
    )


def choices_drawn(sure: np.ndarray, right: np.ndarray) -> dict[str, Drawn]:
    """Right choices and calibration error of all tasks' documents together. sure, right: (n_documents, n_versions)."""
    n, versions = right.shape
    hits = stats.bootstrap_means(right, np.ones(n), seed=50)
    gaps = np.stack([binned_gaps(sure[:, i], right[:, i]) for i in range(versions)], 1)
    error = np.array([calibration_error(sure[:, i], right[:, i]) for i in range(versions)])
    drawn = np.abs(stats.bootstrap_means(gaps, np.ones(n), seed=50)).sum(-1)
    return {CHOICES: Drawn(right.mean(0), hits, n, n), ERROR: Drawn(error, drawn, n, n)}


def regained_rows(works: Mapping[Version, MadeWork], values: Mapping[Version, Sequence[dict]]) -> list[dict]:
    """The share of what dropping the same layers loses, in nats per token as a mean over corpora, that each way regains.

    Beside it, how much less is lost than by each other way: 0.5 nats lost by dropping and 0.2 after a repair are 60 % regained,
    and 0.1 nats less than 0.3 after another.
    """
    versions = list(works)
    mean = losses(works, values)["mean"]
    points = np.vstack([mean.values, mean.draws])
    of = {version: points[:, i] for i, version in enumerate(versions)}
    rows = []
    for version in (version for version in versions if version.way != PLAIN and version.n):
        plain = version._replace(way=PLAIN)
        if plain not in of:
            continue
        lost = of[plain]
        share = np.where(lost > 0, 1 - of[version] / np.where(lost > 0, lost, 1.0), np.nan)
        low, high = stats.interval(share[1:], mean.n)
        others = [other for other in versions if other[::2] == version[::2] and other != version]
        for other in others:
            less = of[other] - of[version]
            less_low, less_high = stats.interval(less[1:], mean.n)
            rows.append(version._asdict() | {
                "regained": share[0], "low": low, "high": high, "against": other.way, "difference": less[0],
                "difference_low": less_low, "difference_high": less_high,
            })  # fmt: skip
    return rows


def made_rows(works: Mapping[Version, MadeWork], values: Mapping[Version, Sequence[dict]], config) -> list[dict]:
    """What each version took, and what it takes: seconds, tokens read, parameters added, and its cache of a text of CONTEXT
    tokens as a share of the dense model's."""
    return [
        version._asdict() | {"seconds": values[version][0]["seconds"], "parameters": values[version][0]["parameters"],
                             "tokens": work.tokens_read, "cache": cached_share(config, work)}
        for version, work in works.items() if work.way != PLAIN or work.plan.n_drop
    ]  # fmt: skip


def cached_share(config, work: MadeWork) -> float:
    """A layer with a window keeps that many tokens, and one without attention none."""
    geometry = cache_geometry(config.get_text_config())
    dense = [numbers * min(window or CONTEXT, CONTEXT) for numbers, window in geometry]
    left = WIDTH if work.way == WINDOW else 0
    kept = [
        numbers * min(left, window or CONTEXT) if index in work.plan.attention else whole
        for index, ((numbers, window), whole) in enumerate(zip(geometry, dense, strict=True))
    ]
    return sum(kept) / sum(dense)


def order_rows(orders: Mapping[str, tuple[Sequence[int], Sequence[float] | None]]) -> list[dict]:
    """Layers in the order in which they are dropped, positions counted from one, and the divergence that a repair leaves."""
    return [
        {"layers": name, "position": i + 1, "layer": layer, "divergence": np.nan if left is None else left[i]}
        for name, (layers, left) in orders.items() for i, layer in enumerate(layers)
    ]  # fmt: skip
