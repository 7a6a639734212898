"""Work items: what has to be measured, what is stored already, and the loop that measures the rest.

An item knows the keys of its values and how to measure them on a loaded model. One model is in memory at a time; values
are stored as soon as they are there, so a killed run goes on where it stopped.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch
from tqdm import tqdm

from .. import evaluation, importance, speed
from ..anatomy import family_of
from ..calibration import fingerprint, load_documents, load_tokens
from ..dropping import DropPlan
from ..evaluation import fingerprint_task, score_task, score_text
from ..importance import Importance, measure_importance
from ..models import (
    LocatedModel,
    attention_implementation,
    default_dtype,
    load_config,
    load_located,
    load_tokenizer,
)
from ..profiles import Profile
from ..selection import select_iteratively
from ..series import weights_at_hand
from ..speed import Load
from ..store import Store, code_provenance
from ..tables import without_paths
from ..workspace import DiskFull, LLMDropError, NotAvailable

DENSE = DropPlan()


@dataclasses.dataclass(frozen=True)
class Work:
    """Values that one model gives in one go."""

    model: LocatedModel
    dtype: torch.dtype
    attention: str  # "sdpa" or "eager"

    @property
    def keys(self) -> list[dict]:
        """One key for each value: everything that determines it. Batch sizes do not: they move results by rounding only."""
        raise NotImplementedError

    @property
    def tokens_to_pass(self) -> int:
        """About how many tokens go through the model, for a bar that tells the time left."""
        raise NotImplementedError

    @property
    def about(self) -> dict:
        """What the provenance of a value says beside model, machine and code."""
        raise NotImplementedError

    def only(self, missing: list[int]) -> "Work":
        """The same for some of the values."""
        return self

    def measure(self, model: torch.nn.Module, tokenizer, update: Callable[[float], None]) -> list[dict]:
        """The values, in the order of `keys`; `update` is called with the number of tokens newly done."""
        raise NotImplementedError

    def _key(self, measurement: str, version: int, **more) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        identity = {"model": self.model.identity, "dtype": dtype, "attention": self.attention}
        return {"measurement": measurement, "version": version} | identity | more


@dataclasses.dataclass(frozen=True)
class ImportanceWork(Work):
    """Importance of all sub-layers on one corpus."""

    corpus: str
    tokens: torch.LongTensor
    batch_size: int

    @property
    def keys(self) -> list[dict]:
        return [self._key("importance", importance.VERSION, tokens=fingerprint(self.tokens))]

    @property
    def tokens_to_pass(self) -> int:
        return self.tokens.numel()

    @property
    def about(self) -> dict:
        return {"corpus": self.corpus, "tokens": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}

    def measure(self, model, tokenizer, update) -> list[dict]:
        return [measure_importance(model, self.tokens, self.batch_size, on_batch=update).to_json()]


@dataclasses.dataclass(frozen=True)
class TextWork(Work):
    """How well held-out text is predicted under each of several plans."""

    corpus: str
    tokens: torch.LongTensor
    plans: tuple[DropPlan, ...]

    @property
    def keys(self) -> list[dict]:
        tokens = fingerprint(self.tokens)
        return [self._key("text", evaluation.VERSION, tokens=tokens, plan=plan_key(plan)) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        return self.tokens.numel() * len(self.plans)

    @property
    def about(self) -> dict:
        return {"corpus": self.corpus, "tokens": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}

    def only(self, missing: list[int]) -> "TextWork":
        return dataclasses.replace(self, plans=tuple(self.plans[i] for i in missing))

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
    fingerprint: str
    num_fewshot: int
    limit: int | None
    plans: tuple[DropPlan, ...]

    @property
    def keys(self) -> list[dict]:
        harness = importlib.metadata.version("lm_eval")
        more = {"task": self.fingerprint, "lm_eval": harness}
        return [self._key("task", evaluation.VERSION, plan=plan_key(plan), **more) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        texts = {text for task in self.members for instance in task.instances for text in instance.arguments[:2]}
        return sum(len(text) for text in texts if isinstance(text, str)) // 4 * len(self.plans)

    @property
    def about(self) -> dict:
        return {"task": self.task, "num_fewshot": self.num_fewshot, "limit": self.limit}

    def only(self, missing: list[int]) -> "TaskWork":
        return dataclasses.replace(self, plans=tuple(self.plans[i] for i in missing))

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
        more = {"tokens": fingerprint(self.tokens), "n_drop": self.n_drop}
        return [self._key("iterative", importance.VERSION, **more)]

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


@dataclasses.dataclass(frozen=True)
class SpeedWork(Work):
    """Seconds of one load under each of several plans, each beside the dense model's of the same rounds."""

    load: Load
    fill: bool  # take as many sequences as fit the GPU beside the dense model
    longest: int  # tokens that these sequences grow to
    repeats: int
    plans: tuple[DropPlan, ...]

    @property
    def keys(self) -> list[dict]:
        code = code_provenance()
        machine = {name: code[name] for name in ("processor", "gpus", "cpu_threads")}
        libraries = {name: code["versions"][name] for name in ("torch", "transformers")}
        load = dataclasses.asdict(self.load) | ({"batch_size": None, "longest": self.longest} if self.fill else {})
        more = {"machine": machine, "libraries": libraries, "load": load, "repeats": self.repeats}
        return [self._key("speed", speed.VERSION, plan=plan_key(plan), **more) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        load, steps = self.load, self.load.new_tokens
        # A step costs about what 16 tokens of a prompt do: weights are read for one token instead of for many.
        tokens = {"prefill": load.context, "decode": 16 * steps, "generation": load.context + 16 * steps}[load.what]
        return tokens * load.batch_size * self.repeats * (1 + len(self.plans))

    @property
    def about(self) -> dict:
        return dataclasses.asdict(self.load) | {"repeats": self.repeats}

    def only(self, missing: list[int]) -> "SpeedWork":
        return dataclasses.replace(self, plans=tuple(self.plans[i] for i in missing))

    def measure(self, model, tokenizer, update) -> list[dict]:
        load, plans = self.load, (DENSE, *self.plans)
        if self.fill:
            load = dataclasses.replace(load, batch_size=speed.largest_batch(model, self.longest))
        each = self.tokens_to_pass / self.repeats / len(plans)
        found = speed.measure_speed(model, load, plans, self.repeats, on_repeat=lambda: update(each))
        limits = dataclasses.asdict(speed.device_limits(model.get_input_embeddings().weight.device, model.dtype))
        dense = dataclasses.asdict(found[0])
        return [{"dense": dense, "plan": dataclasses.asdict(each), "limits": limits} for each in found[1:]]


def distinct(provenance: list[dict]) -> list[dict]:
    """Values that were measured together share one entry."""
    return list({json.dumps(entry, sort_keys=True): entry for entry in provenance}.values())


def plan_key(plan: DropPlan) -> dict:
    """What a plan drops, whatever the order."""
    return {"attention": sorted(plan.attention), "mlp": sorted(plan.mlp)}


# ---- from a profile to items ----------------------------------------------------------------------------------------


def available_corpora(profile: Profile, not_run: dict[str, str]) -> list[str]:
    """The corpora that can be had here; of several, those that cannot go into `not_run`. Unknown ones are an error."""
    available = []
    for corpus in profile.calibration.corpora:
        try:
            load_documents(corpus)
            available.append(corpus)
        except NotAvailable as reason:
            if len(profile.calibration.corpora) == 1:
                raise
            not_run[f"corpus {corpus}"] = str(reason)
    if not available:
        raise NotAvailable("None of the corpora can be had here:\n" + "\n".join(not_run.values()))
    return available


def identity_of(model: LocatedModel) -> dict:
    """What every item about a model begins with. An unknown family is refused before its weights are loaded."""
    family_of(load_config(model))
    return {"model": model, "dtype": default_dtype(), "attention": attention_implementation(model)}


def importance_work(model: LocatedModel, corpora: list[str], profile: Profile) -> list[ImportanceWork]:
    """Importance of a model on each corpus; the first one also serves the sample-count study."""
    shared, calibration, tokenizer = identity_of(model), profile.calibration, load_tokenizer(model)
    work = []
    for i, corpus in enumerate(corpora):
        n_samples = max([calibration.n_samples, *calibration.sample_counts]) if i == 0 else calibration.n_samples
        tokens = load_tokens(corpus, tokenizer, n_samples, calibration.seq_len)
        work.append(ImportanceWork(**shared, corpus=corpus, tokens=tokens, batch_size=calibration.batch_size))
    return work


def importance_of(item: ImportanceWork, store: Store) -> Importance:
    """What an item measured."""
    return Importance.from_json(store.get(item.keys[0])["value"], item.model.identity)


def task_work(model: LocatedModel, members: dict[str, list], plans: tuple[DropPlan, ...], profile: Profile) -> list[TaskWork]:
    """The profile's tasks under each plan. `members`: task -> what `load_task` gave."""
    shared, work = identity_of(model), []
    for task, tasks in members.items():
        fingerprint = fingerprint_task(tasks, profile.tasks.limit)
        shots = tasks[0].config.num_fewshot
        work.append(TaskWork(**shared, task=task, members=tuple(tasks), fingerprint=fingerprint, num_fewshot=shots,
                             limit=profile.tasks.limit, plans=plans))  # fmt: skip
    return work


# ---- measuring ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_of_many(model: LocatedModel, several: bool, not_run: dict[str, str]):
    """What keeps one of several models from being measured goes into `not_run`; the others are still measured."""
    try:
        yield
    except DiskFull:
        raise
    except LLMDropError as reason:
        if not several:
            raise
        not_run[model.name] = str(reason)


def not_run_table(not_run: dict[str, str]) -> pd.DataFrame:
    """What could not be run, and why, without paths of this machine."""
    rows = [{"what": what, "reason": without_paths(reason)} for what, reason in not_run.items()]
    return pd.DataFrame(rows, columns=["what", "reason"])


def measure_all(work: list[Work], store: Store, force: bool, several: bool, not_run: dict[str, str]) -> None:
    """Measure what the store lacks (everything if `force`), one model in memory at a time, with a bar for the whole."""
    missing, queued = [], set()
    for item in work:
        paths = [store.path(key) for key in item.keys]
        lacking = [i for i, key in enumerate(item.keys) if paths[i] not in queued and (force or store.get(key) is None)]
        queued.update(paths)  # two items may want the same value
        if lacking:
            missing.append(item.only(lacking))
    if not missing:
        return
    total = sum(item.tokens_to_pass for item in missing)
    with tqdm(total=total, unit=" tokens", unit_scale=True, mininterval=2, desc="measuring", file=sys.stderr) as bar:
        for model, items in itertools.groupby(missing, key=lambda item: item.model):
            with one_of_many(model, several, not_run):
                _measure_model(list(items), store, bar)


def _measure_model(items: list[Work], store: Store, bar: tqdm) -> None:
    """Load the model that all items share, measure them, and let go of its memory, errors included."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    model = None
    try:
        with weights_at_hand(items[0].model):
            model, tokenizer = load_located(items[0].model, items[0].dtype)
            for item in items:
                bar.set_postfix_str(f"{item.model.name}, {next(iter(item.about.values()))}")
                started = time.monotonic()
                values = item.measure(model, tokenizer, bar.update)
                provenance = _provenance(item, model, time.monotonic() - started)
                for key, value in zip(item.keys, values, strict=True):
                    store.put(key, value, provenance)
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _provenance(item: Work, model: torch.nn.Module, seconds: float) -> dict:
    """Where values come from; `seconds` is the time of all that were measured together."""
    devices = sorted({str(p.device) for p in model.parameters()})
    # On a CPU, the peak of the whole process so far; on GPUs, of this model.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return code_provenance() | item.about | {
        "model": item.model.name,
        "model_identity": item.model.identity,
        "dtype": str(item.dtype).removeprefix("torch."),
        "devices": devices,
        "values_together": len(item.keys),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
