"""Work items: the keys of their values, and how to measure them on a loaded model."""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple, Self

import torch

from ..dropping.plan import DropPlan
from ..measure.importance import VERSION as IMPORTANCE_VERSION
from ..measure.importance import measure_importance
from ..measure.tasks import VERSION as TASKS_VERSION
from ..measure.tasks import score_task
from ..measure.text import VERSION as TEXT_VERSION
from ..measure.text import score_text
from ..models.load import load_located
from ..models.locate import LocatedModel
from ..selection.methods import select_iteratively
from ..sources.texts import fingerprint

DENSE = DropPlan()
METRIC = "cosine"  # of all importance that is stored


class Cell(NamedTuple):
    """One point of a curve: how many sub-layers of which kind are dropped, and how they were chosen."""

    kind: str  # "attention", "mlp", "block" or "joint"; "dense" is the model as it is
    n: int
    method: str = "one-shot"  # others are compared with "one-shot on the same samples", if they see fewer of them

    @property
    def on_curve(self) -> bool:
        """Does it belong to the curve of its kind, and not to a comparison of methods?"""
        return self.method == "one-shot"

    @property
    def label(self) -> str:
        """What tables call it: its kind, or the method where methods are compared for one kind."""
        return self.kind if self.on_curve else self.method.removesuffix(" on the same samples")


DENSE_CELL = Cell("dense", 0)


@dataclasses.dataclass(frozen=True)
class Work:
    """Values that one model gives in one go."""

    model: LocatedModel
    dtype: torch.dtype
    attention: str  # "sdpa" or "eager"

    @property
    def identity(self) -> dict:
        """What another item about the same model begins with."""
        return {"model": self.model, "dtype": self.dtype, "attention": self.attention}

    @property
    def keys(self) -> list[dict]:
        """One key for each value: everything that determines it.

        Batch sizes, devices and versions of torch are not in it: they move results by rounding only, and provenance has them.
        """
        raise NotImplementedError

    @property
    def tokens_to_pass(self) -> int:
        """About how many tokens go through the model, for a bar that tells the time left."""
        raise NotImplementedError

    @property
    def about(self) -> dict:
        """What the provenance of a value says beside model, machine and code."""
        raise NotImplementedError

    def loaded(self):
        """The model, and what makes its input: a tokenizer, as a rule."""
        return load_located(self.model, self.dtype)

    def only(self, missing: list[int]) -> Self:
        """The same for some of the values: under those of its plans, if it has plans."""
        plans = getattr(self, "plans", None)
        return self if plans is None else dataclasses.replace(self, plans=tuple(plans[i] for i in missing))  # type: ignore[call-arg]

    def measure(self, model: torch.nn.Module, tokenizer, update: Callable[[float], None]) -> list[dict]:
        """The values, in the order of `keys`; `update` is called with the number of tokens newly done."""
        raise NotImplementedError

    def _key(self, measurement: str, version: int, **more) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        # A major version may change what the code of a model computes.
        transformers = importlib.metadata.version("transformers").partition(".")[0]
        identity = {"model": self.model.identity, "dtype": dtype, "attention": self.attention, "transformers": transformers}
        if self.model.is_random:  # one seed draws other weights on another kind of device
            identity["drawn_on"] = "cuda" if torch.cuda.is_available() else "cpu"
        return {"measurement": measurement, "version": version} | identity | more


@dataclasses.dataclass(frozen=True)
class CorpusWork(Work):
    """What is measured while a model reads samples of one corpus."""

    corpus: str
    tokens: torch.LongTensor

    @property
    def tokens_to_pass(self) -> int:
        return self.tokens.numel()

    @property
    def about(self) -> dict:
        return {"corpus": self.corpus, "tokens": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}


@dataclasses.dataclass(frozen=True)
class PlansWork(CorpusWork):
    """The same under each of several plans: a value for each."""

    plans: tuple[DropPlan, ...]

    @property
    def tokens_to_pass(self) -> int:
        return self.tokens.numel() * len(self.plans)

    def _keys(self, measurement: str, version: int) -> list[dict]:
        tokens = fingerprint(self.tokens)
        return [self._key(measurement, version, tokens=tokens, plan=plan.key.to_json()) for plan in self.plans]


@dataclasses.dataclass(frozen=True)
class ImportanceWork(CorpusWork):
    """Importance of all sub-layers on one corpus."""

    batch_size: int

    @property
    def keys(self) -> list[dict]:
        return [self._key("importance", IMPORTANCE_VERSION, tokens=fingerprint(self.tokens), metric=METRIC)]

    def measure(self, model, tokenizer, update) -> list[dict]:
        return [measure_importance(model, self.tokens, self.batch_size, on_batch=update, metric=METRIC).to_json()]


@dataclasses.dataclass(frozen=True)
class TextWork(PlansWork):
    """How well held-out text is predicted under each of several plans."""

    @property
    def keys(self) -> list[dict]:
        return self._keys("text", TEXT_VERSION)

    def measure(self, model, tokenizer, update) -> list[dict]:
        done = lambda share: update(share * self.tokens_to_pass)  # noqa: E731
        scores = score_text(model, self.tokens, (DENSE, *self.plans), on_batch=done)
        rows = zip(scores.nll[1:], scores.hits[1:], scores.kl[1:], strict=True)
        return [{"nll": nll.tolist(), "hits": hits.tolist(), "kl": kl.tolist()} for nll, hits, kl in rows]


@dataclasses.dataclass(frozen=True)
class TaskWork(Work):
    """One task under each of several plans."""

    task: str
    members: tuple  # lm-eval's task objects
    fingerprint: str  # of what is asked (`fingerprint_task`)
    tokenizer: str  # and of what makes tokens of it (`fingerprint_tokenizer`)
    num_fewshot: int
    limit: int | None
    plans: tuple[DropPlan, ...]

    @property
    def keys(self) -> list[dict]:
        harness = importlib.metadata.version("lm_eval")
        more: dict[str, str | None] = {"task": self.fingerprint, "tokenizer": self.tokenizer, "lm_eval": harness}
        if any(task.OUTPUT_TYPE == "generate_until" for task in self.members):
            more["generation"] = self._generation
        return [self._key("task", TASKS_VERSION, plan=plan.key.to_json(), **more) for plan in self.plans]

    @property
    def _generation(self) -> str | None:
        """sha256 of the defaults by which the model generates: penalties, for example. They are no part of its identity."""
        file = self.model.folder / "generation_config.json"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None

    @property
    def tokens_to_pass(self) -> int:
        given = [part for task in self.members for instance in task.instances for part in instance.arguments[:2]]
        texts = {part for part in given if isinstance(part, str)}  # what is generated comes with settings
        return sum(map(len, texts)) // 4 * len(self.plans)

    @property
    def about(self) -> dict:
        return {"task": self.task, "num_fewshot": self.num_fewshot, "limit": self.limit}

    def measure(self, model, tokenizer, update) -> list[dict]:
        done = lambda share: update(share * self.tokens_to_pass)  # noqa: E731
        scores = score_task(model, tokenizer, list(self.members), self.plans, self.limit, on_batch=done)
        by_plan = [{metric: rows[i].tolist() for metric, rows in scores.metrics.items()} for i in range(len(self.plans))]
        return [{"metrics": metrics, "chance": scores.chance} for metrics in by_plan]


@dataclasses.dataclass(frozen=True)
class IterativeWork(Work):
    """The order in which attention layers go when importance is measured again after each."""

    tokens: torch.LongTensor
    batch_size: int
    n_drop: int

    @property
    def keys(self) -> list[dict]:
        more = {"tokens": fingerprint(self.tokens), "n_drop": self.n_drop, "kind": "attention", "metric": METRIC}
        return [self._key("iterative", IMPORTANCE_VERSION, **more)]

    @property
    def tokens_to_pass(self) -> int:
        return self.tokens.numel() * self.n_drop

    @property
    def about(self) -> dict:
        return {"tokens": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens), "n_drop": self.n_drop}

    def measure(self, model, tokenizer, update) -> list[dict]:
        step = lambda _: update(self.tokens.numel())  # noqa: E731
        plan = select_iteratively(model, self.tokens, "attention", self.n_drop, self.batch_size, on_step=step)
        return [{"attention": list(plan.attention)}]
