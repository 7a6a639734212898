"""Quality of a model, dense or dropped: perplexity and divergence on text, and the paper's tasks as lm-eval defines them."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from .dropping import DropPlan, check_plan, skipping
from .scoring import Scores, score
from .sources import catalogue, fetch_package_files
from .workspace import ROOT, LLMDropError, NotAvailable

logging.getLogger("lm_eval").setLevel(logging.ERROR)
from lm_eval.api.metrics import mean_stderr  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used
FEWSHOT_SEED = 1234  # lm-eval's own


# ---- text -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextScores:
    """How well text is predicted, by plan and sample; each sample has the same number of predicted tokens."""

    nll: np.ndarray  # float64 (n_plans, n_samples): mean negative log-probability of a token, in nats
    hits: np.ndarray  # float64 (n_plans, n_samples): share of tokens that were the most probable
    kl: np.ndarray  # float64 (n_plans, n_samples): mean KL(first plan || plan) of the next-token distribution, in nats

    @property
    def perplexity(self) -> np.ndarray:
        """float64 (n_plans,): exp of the mean over all tokens."""
        return np.exp(self.nll.mean(1))


def score_text(
    model: torch.nn.Module,
    tokens: torch.LongTensor,
    plans: Sequence[DropPlan] = (DropPlan(),),
    on_batch: Callable[[float], None] = lambda share: None,
) -> TextScores:
    """Predict each token of (n_samples, seq_len) from those before it in its sample, under each plan.

    The divergence is from the first plan: give `DropPlan()`, the dense model, first. Raises LLMDropError for wrong input.
    """
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2 or tokens.is_floating_point():
        raise LLMDropError(f"Expected token ids (n_samples, seq_len >= 2), found {tokens.dtype} {tuple(tokens.shape)}.")
    requests = [(sample[:1], sample[1:]) for sample in tokens.tolist()]
    longest = tokens.shape[1] - 1
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known is not None and longest > known:
        raise LLMDropError(f"Samples of {longest + 1} tokens are too long for this model, which knows {known} positions.")
    scores = score(model, requests, plans, max_length=longest, kl=True, on_batch=on_batch)
    return TextScores(-scores.logprob / longest, scores.hits / longest, scores.kl / longest)


def perplexity(model: torch.nn.Module, tokens: torch.LongTensor) -> float:
    """Perplexity of the model as it is (inside `dropped`, of the dropped one) on token ids (n_samples, seq_len)."""
    return float(score_text(model, tokens).perplexity[0])


# ---- tasks ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What came out for each document of a task."""

    metrics: dict[str, np.ndarray]  # metric -> float64 (n_plans, n_documents)
    chance: float  # what guessing gives: mean of 1 / number of choices; 0 where nothing is chosen from

    def summary(self, plan: int = 0) -> dict[str, float]:
        """metric -> mean over documents, metric_stderr -> its standard error, as in lm-eval; NaN for a single document."""
        means = {name: float(values[plan].mean()) for name, values in self.metrics.items()}
        error = lambda values: float(mean_stderr(values.tolist())) if len(values) > 1 else float("nan")  # noqa: E731
        return means | {f"{name}_stderr": error(values[plan]) for name, values in self.metrics.items()}


class FastLM(HFLM):
    """lm-eval's `hf` model with faster `loglikelihood` (scoring.py); everything else is lm-eval's.

    Use it as any lm-eval model: `lm_eval.simple_evaluate(model=FastLM(model, tokenizer), tasks=load_task("hellaswag", 0))`.
    What it returns is said under the first plan; of log-likelihoods, `scores` holds the last call's under all plans.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, plans: Sequence[DropPlan] = (DropPlan(),), batch_size: int = 8):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.plans = list(plans)
        self.on_batch: Callable[[float], None] = lambda share: None
        self.scores: Scores | None = None

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.tok_encode = functools.lru_cache(maxsize=16)(super().tok_encode)  # the choices of a question share its text
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            del self.tok_encode  # it refers to self: left there, it would keep the model in memory

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        with skipping(self.model, self.plans[0]):
            return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        pairs = [(context, continuation) for _, context, continuation in requests]
        self.scores = score(self.model, pairs, self.plans, self.max_length, on_batch=self.on_batch)
        answers = self.scores.answers(0)
        for (text, *_), answer in zip(requests, answers, strict=True):
            if text is not None:  # as lm-eval does, for its cache of answers
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers


def run_tasks(
    model: torch.nn.Module,
    tokenizer,
    names: Sequence[str] | str,
    limit: int | None = None,
    num_fewshot: int | None = None,
    source: str = "package",
) -> dict[str, dict[str, float]]:
    """Run tasks on the model as it is (inside `dropped`, on the dropped one): task -> metric -> mean and standard error.

    limit: documents of a task (of each subject of a group); None: all. num_fewshot: None takes the paper's number.
    source: "package" (data/tasks.yaml) or "hub" (any task of lm-eval). Raises what `load_task` raises.
    """
    if isinstance(names, str):
        names = [names]
    tasks = {name: load_task(name, num_fewshot, source) for name in names}  # whatever is wrong shows before work starts
    return {name: score_task(model, tokenizer, members, limit=limit).summary() for name, members in tasks.items()}


def score_task(
    model: torch.nn.Module,
    tokenizer,
    members: list,
    plans: Sequence[DropPlan] = (DropPlan(),),
    limit: int | None = None,
    on_batch: Callable[[float], None] = lambda share: None,
) -> TaskScores:
    """Score what `load_task` gave under each plan. Documents of all members of a group stand side by side."""
    for plan in plans:
        check_plan(model, plan)
    if limit is not None and limit < 1:
        raise LLMDropError(f"The number of documents must be 1 or more, but is {limit}.")
    lm = FastLM(model, tokenizer, plans)
    lm.on_batch = on_batch
    instances = []
    for task in members:
        task.set_fewshot_seed(FEWSHOT_SEED)
        with _silent():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
        instances += task.instances
    answers = _answers(lm, instances)
    by_metric: dict[str, list[list[float]]] = defaultdict(list)
    for i in range(len(plans)):
        for instance, answer in zip(instances, answers[i], strict=True):
            instance.resps = [answer]
        values: dict[str, list[float]] = defaultdict(list)
        for task in members:
            for metric, value in _results(task):
                values[metric].append(value)
        for metric, row in values.items():
            by_metric[metric].append(row)
    choices = Counter(
        (i.task_name, i.doc_id) for task in members if task.OUTPUT_TYPE == "multiple_choice" for i in task.instances
    )
    chance = float(np.mean([1 / n for n in choices.values()])) if choices else 0.0
    metrics = {name: np.array(rows, dtype=float) for name, rows in by_metric.items()}
    return TaskScores(metrics, chance)


def _answers(lm: FastLM, instances: list) -> list[list]:
    """For each plan, the model's answer to each instance."""
    (kind,) = {instance.request_type for instance in instances}
    if kind == "loglikelihood":
        lm.loglikelihood(instances, disable_tqdm=True)
        return [lm.scores.answers(i) for i in range(len(lm.plans))]
    answers = []
    plans = lm.plans
    for plan in plans:
        lm.plans = [plan]
        with _silent():
            answers.append(getattr(lm, kind)(instances))
        lm.on_batch(1 / len(plans))
    return answers


def _results(task):
    """(metric, value) of every document, by lm-eval's own filters and metrics; of several filters, the first."""
    task.apply_filters()
    by_document = defaultdict(list)
    for instance in task.instances:
        by_document[instance.doc_id].append(instance)
    for group in by_document.values():
        group.sort(key=lambda instance: instance.idx)
        key = next(iter(group[0].filtered_resps))
        answers = [instance.filtered_resps[key] for instance in group]
        yield from ((m, v) for m, v in task.process_results(group[0].doc, answers).items() if np.isscalar(v))


# ---- where tasks and their data come from -----------------------------------------------------------------------------


@functools.cache
def known_tasks() -> dict[str, dict]:
    """data/tasks.yaml."""
    return yaml.safe_load((ROOT / "data" / "tasks.yaml").read_text(encoding="utf-8"))


@functools.cache
def _task_manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_task(name: str, num_fewshot: int | None = None, source: str = "package") -> list:
    """An lm-eval task with its data, as a list of its members (one, unless it is a group such as MMLU).

    Raises LLMDropError for an unknown task or one without data in a package, NotAvailable if data cannot be fetched.
    """
    if source not in ("package", "hub"):
        raise LLMDropError(f"Data of tasks come from 'package' or 'hub', not from {source!r}.")
    if num_fewshot is not None and num_fewshot < 0:
        raise LLMDropError(f"The number of few-shot examples must be 0 or more, but is {num_fewshot}.")
    here = known_tasks().get(name)
    if source == "package" and here is None:
        raise LLMDropError(f"No package holds data for the task {name!r}. data/tasks.yaml has: {', '.join(known_tasks())}.")
    if num_fewshot is None and here is not None:
        num_fewshot = here["num_fewshot"]
    members = _from_package(name, here) if source == "package" else _from_hub(name)
    if num_fewshot is not None:  # the paper has no number for other tasks: they keep lm-eval's
        for task in members:
            task.set_config("num_fewshot", num_fewshot)
    return members


def _from_package(name: str, here: dict) -> list:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    files = fetch_package_files(catalogue()["task_packages"][here["package"]]["packages"])
    members = {name: ""}
    if "subjects" in here:
        subjects = sorted({path.parts[-3] for path in files if f"/{here['subjects']}/" in path.as_posix()})
        members = {f"{name}_{subject}": f"{here['subjects']}/{subject}/" for subject in subjects}
    tasks = []
    for member, folder in members.items():
        paths = {split: _one(files, folder + part) for split, part in here["files"].items()}
        config = load_yaml(_task_manager().task_index[member].yaml_path)
        splits = {key: config.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")}
        config |= {key: split if split in paths else None for key, split in splits.items()}
        config["custom_dataset"] = functools.partial(_read_splits, paths, here)
        with _silent():
            tasks.append(ConfigurableTask(config=config))
    return tasks


def _one(files: list[Path], part: str) -> Path:
    (path,) = [path for path in files if f"/{part}" in path.as_posix()]
    return path


def _read_splits(paths: dict[str, Path], here: dict, **_) -> dict:
    """What lm-eval calls for a task's data: split -> data set. `here`: the task's entry in data/tasks.yaml."""
    import datasets

    splits = {}
    for split, path in paths.items():
        if path.suffix == ".arrow":
            rows = datasets.Dataset.from_file(str(path))
        else:
            rows = datasets.Dataset.from_list([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
        if column := here.get("shortest_first"):
            rows = rows.select(np.argsort([len(text) for text in rows[column]], kind="stable"))
        for new, old in here.get("columns", {}).items():
            rows = rows.add_column(new, [int(value) for value in rows[old]])
        splits[split] = rows
    return splits


def _from_hub(name: str) -> list:
    try:
        with _silent():
            return list(_task_manager().load([name])["tasks"].values())
    except KeyError as error:
        raise LLMDropError(f"lm-eval has no task {name!r}.") from error
    except Exception as error:  # whatever the hub's libraries raise; the task itself is known to lm-eval
        raise NotAvailable(
            f"The data of the task {name!r} could not be fetched from the hub ({type(error).__name__}). Check the network "
            f"and HF_ENDPOINT, or take them from the package index (data: package in the profile): {', '.join(known_tasks())}."
        ) from error


def fingerprint_task(members: list, limit: int | None) -> str:
    """sha256 over what a task asks (its documents with few-shot examples) and how answers are judged, in hex."""
    content = hashlib.sha256()
    for task in members:
        task.set_fewshot_seed(FEWSHOT_SEED)
        with _silent():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
        content.update(f"{task.task_name} {task.VERSION} {task.OUTPUT_TYPE}".encode())
        for instance in task.instances:
            content.update(repr((instance.doc_id, instance.arguments)).encode())
    return content.hexdigest()


@contextlib.contextmanager
def _silent():
    """Without lm-eval's own progress bars and notes: a study shows one bar for the whole."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
