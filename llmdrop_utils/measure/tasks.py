"""Quality on tasks, as lm-eval defines them, under many drop plans at once."""

import contextlib
import copy
import dataclasses
import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan, check_plans
from ..dropping.units import skipping
from ..models.families import find_anatomy, need_decoder
from ..sources.task_data import build_requests, load_task, silent
from .guard import finite_generation, measuring
from .rotary import rotary_following
from .scoring import Scores, score

logging.getLogger("lm_eval").setLevel(logging.ERROR)

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used


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
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # lm-eval would ask the hub for one
            raise LLMDropError(f"Expected a tokenizer, found {tokenizer!r}. (Models with random weights have none.)")
        batch_size = whole(batch_size, "The batch size")
        plans = check_plans(model, plans)
        need_decoder(find_anatomy(model))
        lacks_padding = all(token is None for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token))
        if lacks_padding:
            tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token, which the model does not know
        if lacks_padding or rotary_following(model):
            batch_size = 1  # of generation: without padding, and where a long prompt would change how the others are read
        with measuring(model), _untied(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.plans = list(plans)
        self.on_batch: Callable[[float], None] = lambda share: None
        self.scores: Scores | None = None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs):
        if self.prefix_token_id is not None:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens = self.tokenizer.encode(string, **special)
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_decode(self, tokens, skip_special_tokens: bool = True):
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)  # there may be no end-of-text token

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # The choices of a question share its text.
        self.tok_encode = functools.lru_cache(maxsize=16)(self.tok_encode)  # type: ignore[method-assign]
        try:
            encoded = [(request.args, *self._encode_request(*request.args)) for request in requests]
        finally:
            del self.tok_encode  # it refers to self, and would keep the model in memory
        return self._loglikelihood_tokens(encoded, disable_tqdm)

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval does it: what has no context follows the begin-of-text (or end-of-text) token."""
        before, tokens = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation, False))
        return (before, tokens) if before else self._after_prefix(self.prefix_token_id, tokens)

    @staticmethod
    def _after_prefix(prefix: int | None, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Nothing is said of a first token that begins the text itself, or that nothing comes before."""
        return (tokens[:1], tokens[1:]) if prefix is None or tokens[:1] == [prefix] else ([prefix], tokens)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        longest = max((request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests), default=0)
        if longest >= self.max_length:
            raise LLMDropError(
                f"The task asks for answers of up to {longest} tokens, which leaves no room for a question: the model reads "
                f"{self.max_length} tokens."
            )
        with measuring(self.model), skipping(self.model, self.plans[0]), finite_generation(self.model):
            return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        pairs = [
            self._after_prefix(None, continuation) if context == [None] else (context, continuation)  # a rolling window
            for _, context, continuation in requests
        ]
        self.scores = _score(self.model, pairs, self.plans, self.max_length, self.on_batch)
        answers = self.scores.answers(0)
        for (text, *_), answer in zip(requests, answers, strict=True):
            if text is not None:  # as lm-eval does, for its cache of answers
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers


def _score(model, pairs: list, plans: Sequence[DropPlan], max_length: int, on_batch) -> Scores:
    """`score`; a continuation of no tokens, which lm-eval refuses together with all other requests, is certain: 0 nats."""
    asked = [i for i, (_, continuation) in enumerate(pairs) if continuation]
    found = score(model, [pairs[i] for i in asked], plans, max_length, on_batch=on_batch)
    if len(asked) == len(pairs):
        return found
    parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    spread = {name: np.zeros((*part.shape[:-1], len(pairs)), part.dtype) for name, part in parts.items()}
    for name, part in parts.items():
        spread[name][..., asked] = part
    return Scores(**spread)


@contextlib.contextmanager
def _untied(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `tie_weights` does nothing. lm-eval calls it on each model, and would tie a head that was loaded with weights
    of its own."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


def run_tasks(
    model: torch.nn.Module,
    tokenizer,
    names: Sequence[str] | str,
    limit: int | None = None,
    num_fewshot: int | None = None,
    source: str = "package",
) -> dict[str, dict[str, float]]:
    """Run tasks on the model as it is (inside `dropped`, on the dropped one): task -> metric -> mean and standard error.

    limit: documents of a task (of each subject of a group), drawn by a fixed seed; None: all. num_fewshot: None takes the
    paper's number. source: "package" (data/tasks.yaml) or "hub" (any task of lm-eval). Raises what `load_task` raises.
    """
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise LLMDropError(f"Expected names of tasks, found {names!r}.")
    limit = None if limit is None else whole(limit, "The number of documents")
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
    """Score what `load_task` gave under each plan. Documents of all members of a group stand side by side.

    The model is measured in eval mode and left as it was. Raises LLMDropError for numbers that are not finite.
    """
    if not isinstance(members, list | tuple) or not all(isinstance(task, Task) for task in members):
        raise LLMDropError(f"Expected what `load_task` returns, found {members!r}.")
    plans = check_plans(model, plans)
    lm = FastLM(model, tokenizer, plans)
    lm.on_batch = on_batch
    build_requests(members, limit)
    instances = [instance for task in members for instance in task.instances]
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
    for name, array in metrics.items():
        if len(bad := np.argwhere(~np.isfinite(array))):
            number, document = bad[0]
            raise LLMDropError(f"The {name} of document {document} under plan {number} is {array[number, document]}.")
    return TaskScores(metrics, chance)


def _answers(lm: FastLM, instances: list) -> list[list]:
    """For each plan, the model's answer to each instance."""
    (kind,) = {instance.request_type for instance in instances}
    if kind == "loglikelihood":
        lm.loglikelihood(instances, disable_tqdm=True)
        assert lm.scores is not None
        return [lm.scores.answers(i) for i in range(len(lm.plans))]
    answers = []
    plans = lm.plans
    for plan in plans:
        lm.plans = [plan]
        with silent():
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
