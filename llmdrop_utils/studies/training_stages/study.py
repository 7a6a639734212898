"""Notebook 07: importance, and what dropping costs, at each stage of training."""

import dataclasses
import itertools
import sys

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ...base import files, stats
from ...base.errors import DiskFull, LLMDropError, NotAvailable
from ...base.store import Store
from ...drop.plan import DropPlan
from ...measure.importance import KINDS, Importance
from ...models.load import load_tokenizer
from ...models.series import Series, locate_series
from ...models.training import load_recipe, untrained
from ...report.tables import Tables, write_tables
from ...selection.ranking import select
from ...sources.catalogue import catalogue
from ...sources.texts import load_documents, load_tokens, pack
from ..profile import Profile
from ..queue import distinct, measure_all, not_run_table, one_of_many
from ..run import identity_of, importance_of
from ..work import DENSE, ImportanceWork, TextWork, Work, plan_key

SHARES = {"quarter": 0.25, "half": 0.5}  # of the layers of a kind that are dropped

LAYERS = {"all layers": 0, "all but the first": 1}  # the paper shows the first layer apart, since it is far more important

LOSS_POINTS = 150  # of a training's losses, in the table

MAYBE_EMPTY = {  # columns of the tables that can be without rows
    "losses": ["model", "seed", "step", "tokens", "loss"],
    "change": ["model", "seed", "position", "stage", "progress", "kind", "layers", "change", "low", "high"],
}


def training_stages(profile: Profile, force: bool = False) -> Tables:
    """Notebook 07: importance at every stage of the profile's series, and what dropping the finally chosen layers costs there.

    Trains what has to be trained here (never again: `force` measures anew, on the same checkpoints), measures what is missing,
    writes the tables to data/results/<run>/07_training_stages and returns them. Raises LLMDropError if the profile's only
    series cannot be had; of several series or stages, one that cannot is listed in the table `not_run`.
    """
    store, not_run = Store(), {}
    found = _locate(profile, not_run)
    last, held_out = [], []
    for series in found:
        with one_of_many(series.stages[-1].model, len(found) > 1, not_run):
            for_scores, for_text = _tokens(series, profile)
            last.append((series, _importance_work(series, -1, for_scores, profile)))
            held_out.append((for_scores, for_text))
    measure_all([item for _, item in last], store, force, True, not_run)  # first: it says which layers would go
    followed, work = [], []
    for (series, item), (for_scores, for_text) in zip(last, held_out, strict=True):
        if item.model.name in not_run:  # which says why
            continue
        plans = _plans(importance_of(item, store))
        pairs = []
        for i, stage in enumerate(series.stages):
            score = _importance_work(series, i, for_scores, profile)
            text = TextWork(**identity_of(stage.model), corpus=profile.stages.corpus, tokens=for_text,
                            plans=(DENSE, *plans.values()))  # fmt: skip
            pairs.append((score, text))
        followed.append((series, plans, pairs))
        work += [item for pair in pairs for item in pair]
    measure_all(work, store, force, True, not_run)
    rows: dict[str, list[dict]] = {}
    done: list[Work] = []
    for series, plans, pairs in followed:
        had = {i: pair for i, pair in enumerate(pairs) if pair[0].model.name not in not_run}
        pairs = list(had.values())
        for table, more in _Followed(series, plans, had, store).rows().items():
            rows.setdefault(table, []).extend({"model": series.name, "seed": series.seed} | row for row in more)
        done += [item for pair in pairs for item in pair]
    if not done:
        raise NotAvailable("Nothing could be measured:\n" + "\n".join(not_run.values()))
    tables = {name: pd.DataFrame(r) if r else pd.DataFrame(columns=MAYBE_EMPTY[name]) for name, r in rows.items()}
    tables["not_run"] = not_run_table(not_run)
    provenance = [store.get(key)["provenance"] for item in done for key in item.keys]
    provenance += [_training_provenance(series) for series, *_ in followed if series.recipe is not None]
    return write_tables(tables, files.RESULTS / profile.run / "07_training_stages", distinct(provenance))


def _training_provenance(series: Series) -> dict:
    """What was recorded when a series was trained here."""
    return series.run | {"model": series.name, "dtype": "bfloat16" if series.run["bf16"] else "float32"}


# ---- what to measure ------------------------------------------------------------------------------------------------


def _locate(profile: Profile, not_run: dict[str, str]) -> list[Series]:
    """The profile's series under each seed; training shows a bar with the time left."""
    names, found = profile.stages.series, []
    for name in names:
        is_trained = "trained" in catalogue()["series"].get(name, {})
        try:
            left = untrained(name, list(range(profile.stages.seeds))) if is_trained else []
            total = load_recipe(name).tokens * len(left) if left else 0
            with tqdm(total=total, unit=" tokens", unit_scale=True, mininterval=2, desc=f"training {name}", file=sys.stderr,
                      disable=not total, leave=False) as bar:  # fmt: skip
                series, missing = locate_series(name, profile.stages.seeds, bar.update)
        except DiskFull:
            raise
        except LLMDropError as reason:
            if len(names) == 1:
                raise
            not_run[name] = str(reason)
            continue
        found += series
        not_run |= missing
    if not found:
        raise NotAvailable("None of these series can be had here:\n" + "\n".join(not_run.values()))
    return found


def _tokens(series: Series, profile: Profile) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Blocks to measure importance on, and further ones to see what dropping costs; neither was trained on here."""
    stages, tokenizer = profile.stages, load_tokenizer(series.stages[-1].model)
    n = stages.n_samples + stages.text_samples
    if series.recipe is not None and stages.corpus in series.recipe.corpora:
        held_out = load_documents(stages.corpus)[: series.recipe.held_out]
        blocks = len(pack(held_out, tokenizer, stages.seq_len))
        if blocks < n:
            raise LLMDropError(
                f"The profile asks for {n} blocks of {stages.seq_len} tokens of {stages.corpus!r}, but the {len(held_out)} "
                f"documents that {series.name} was not trained on hold {blocks}. Ask for fewer, or hold more out."
            )
    tokens = load_tokens(stages.corpus, tokenizer, n, stages.seq_len)
    return tokens[: stages.n_samples], tokens[stages.n_samples :]


def _importance_work(series: Series, stage: int, tokens: torch.LongTensor, profile: Profile) -> ImportanceWork:
    shared = {"corpus": profile.stages.corpus, "tokens": tokens, "batch_size": profile.calibration.batch_size}
    return ImportanceWork(**identity_of(series.stages[stage].model), **shared)


def _plans(scores: Importance) -> dict[tuple[str, str], DropPlan]:
    """(kind, share) -> what goes by the scores of the last stage; plans forget that model, since earlier stages lose it too."""
    n_layers = scores.importance["block"].size
    return {
        (kind, share): dataclasses.replace(select(scores, kind, _count(n_layers, share)), model=None)
        for kind in KINDS
        for share in SHARES
    }


def _count(n_layers: int, share: str) -> int:
    return max(1, int(n_layers * SHARES[share]))


# ---- from values to rows --------------------------------------------------------------------------------------------


class _Followed:
    """One series with the values of those of its stages that could be had (position -> work)."""

    def __init__(self, series: Series, plans: dict, had: dict[int, tuple[ImportanceWork, TextWork]], store: Store):
        self.series, self.plans = series, plans
        self.scores = [importance_of(score, store) for score, _ in had.values()]
        self.text = [{str(key["plan"]): store.get(key)["value"] for key in text.keys} for _, text in had.values()]
        # The same draws at every stage: stages share their samples, so what is compared between them stays paired.
        self.draws = [{kind: stats.bootstrap_means(s.per_sample[kind], s.weights, 0) for kind in KINDS} for s in self.scores]
        self.n_layers = self.scores[-1].importance["block"].size
        self.where = [
            {"position": i, "stage": stage.name, "step": stage.step, "tokens": stage.tokens, "progress": self._progress(i)}
            for i, stage in enumerate(series.stages)
            if i in had
        ]

    def rows(self) -> dict[str, list[dict]]:
        """All rows, without the columns `model` and `seed`."""
        return {
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

    def _progress(self, i: int) -> float:
        """Share of the training that is done, by tokens or else by steps; a single trained checkpoint is its end."""
        stages = self.series.stages
        for name in ("tokens", "step"):
            values = [getattr(stage, name) for stage in stages]
            if None not in values and values[-1]:
                return values[i] / values[-1]
        return float(i == len(stages) - 1)

    def _run_row(self) -> dict:
        run = self.series.run
        return {"n_layers": self.n_layers} | {
            name: run.get(name) for name in ("parameters", "tokens", "text_tokens", "unigram_entropy")
        }

    def _stage_row(self, i: int) -> dict:
        """Loss of the dense model on held-out text; and a warning where two checkpoints are one (this happens on the hub)."""
        nll = np.array(self.text[i][str(plan_key(DENSE))]["nll"])
        low, high = stats.interval(stats.bootstrap_means(nll, np.ones(len(nll)), 1))
        twins = [k for k in range(i) if self.scores[k].fingerprint == self.scores[i].fingerprint]
        same_as = self.where[twins[0]]["stage"] if twins else None
        return self.where[i] | {"nll": nll.mean(), "low": low, "high": high, "same_as": same_as}

    def _importance_rows(self) -> list[dict]:
        rows = []
        for where, scores, draws in zip(self.where, self.scores, self.draws, strict=True):
            for kind in KINDS:
                low, high = stats.interval(draws[kind])
                for layer, value in enumerate(scores.importance[kind]):
                    rows.append(where | {"kind": kind, "layer": layer, "importance": value, "low": low[layer],
                                         "high": high[layer]})  # fmt: skip
        return rows

    def _mean_rows(self) -> list[dict]:
        """Mean over layers, and by how much MLP and block lie above attention, paired by sample."""
        rows = []
        for i, (kind, (layers, first)) in itertools.product(range(len(self.scores)), itertools.product(KINDS, LAYERS.items())):
            mean, draws = self._mean(i, kind, first)
            attention, attention_draws = self._mean(i, "attention", first)
            (low, high), (above_low, above_high) = stats.interval(draws), stats.interval(draws - attention_draws)
            rows.append(self.where[i] | {"kind": kind, "layers": layers, "importance": mean, "low": low, "high": high,
                                         "above_attention": mean - attention, "above_low": above_low,
                                         "above_high": above_high})  # fmt: skip
        return rows

    def _change_rows(self) -> list[dict]:
        """How mean importance changes from each stage to the last, paired by sample."""
        rows = []
        earlier = range(len(self.scores) - 1)
        for i, (kind, (layers, first)) in itertools.product(earlier, itertools.product(KINDS, LAYERS.items())):
            (mean, draws), (last, last_draws) = self._mean(i, kind, first), self._mean(-1, kind, first)
            low, high = stats.interval(last_draws - draws)
            rows.append(self.where[i] | {"kind": kind, "layers": layers, "change": last - mean, "low": low, "high": high})
        return rows

    def _mean(self, i: int, kind: str, first: int) -> tuple[float, np.ndarray]:
        """Mean importance over the layers from `first` on at a stage, and its draws."""
        return self.scores[i].importance[kind][first:].mean(), self.draws[i][kind][:, first:].mean(1)

    def _agreement_rows(self) -> list[dict]:
        """Does a stage rank the layers as the last one does? Rank correlation, and how many of a quarter both would drop."""
        n, rows = _count(self.n_layers, "quarter"), []
        for where, scores, draws in zip(self.where, self.scores, self.draws, strict=True):
            for kind in KINDS:
                last = self.scores[-1]
                correlation = float(stats.rank_correlation(scores.importance[kind], last.importance[kind]))
                low, high = stats.interval(stats.rank_correlation(draws[kind], self.draws[-1][kind]))
                shared = stats.overlap(scores.order(kind), last.order(kind), n)
                rows.append(where | {"kind": kind, "correlation": correlation, "low": low, "high": high, "n": n,
                                     "shared": shared, "by_chance": n * n / self.n_layers})  # fmt: skip
        return rows

    def _settled_row(self, kind: str, share: str) -> dict:
        """From which stage on the n layers that would be dropped are those of the last stage, with an interval over samples."""
        n = _count(self.n_layers, share)
        point = _settled(np.array([[scores.importance[kind]] for scores in self.scores]), n)[0]
        low, high = np.quantile(_settled(np.array([draws[kind] for draws in self.draws]), n), stats.INTERVAL, method="nearest")
        low, high = self.where[int(low)], self.where[int(high)]
        plan = self.plans[kind, share]
        layers = " ".join(map(str, plan.mlp if kind == "mlp" else plan.attention))
        return self.where[point] | {
            "kind": kind, "share": share, "n": n, "layers": layers, "low": low["progress"], "high": high["progress"],
            "low_stage": low["stage"], "high_stage": high["stage"],
        }  # fmt: skip

    def _cost_rows(self) -> list[dict]:
        """Nats a token that are lost at each stage without the layers chosen at the last one."""
        rows = []
        for where, values in zip(self.where, self.text, strict=True):
            dense = np.array(values[str(plan_key(DENSE))]["nll"])
            for (kind, share), plan in self.plans.items():
                value = values[str(plan_key(plan))]
                lost, kl = np.array(value["nll"]) - dense, np.array(value["kl"])
                low, high = stats.interval(stats.bootstrap_means(lost, np.ones(len(lost)), 1))
                rows.append(where | {"kind": kind, "share": share, "n": _count(self.n_layers, share), "cost": lost.mean(),
                                     "low": low, "high": high, "kl": kl.mean()})  # fmt: skip
        return rows

    def _loss_rows(self) -> list[dict]:
        """Training loss, averaged over steps between points that lie evenly on a logarithmic axis."""
        losses = self.series.losses
        if losses is None or losses.empty:
            return []
        edges = np.unique(np.geomspace(1, len(losses), min(LOSS_POINTS, len(losses))).round().astype(int))
        groups = np.searchsorted(edges, np.arange(1, len(losses) + 1))
        return losses.groupby(groups).agg({"step": "max", "tokens": "max", "loss": "mean"}).to_dict("records")


def _settled(importance: np.ndarray, n: int) -> np.ndarray:
    """importance (n_stages, n_draws, n_layers) -> (n_draws,): the first stage from which on the n least are the last one's."""
    chosen = np.argsort(importance, axis=-1, kind="stable")[..., :n]
    sets = np.sort(chosen, axis=-1)
    differs = (sets != sets[-1]).any(-1)  # (n_stages, n_draws)
    return np.where(differs.any(0), len(differs) - differs[::-1].argmax(0), 0)
