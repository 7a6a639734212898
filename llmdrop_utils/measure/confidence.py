"""How sure a model is of the choices that it makes, and how far that is from how often they are right."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan, check_plans
from ..sources.task_data import build_requests
from .tasks import FastLM

BINS = 10
VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a model chose in each document of a task with choices, under each plan."""

    confidence: np.ndarray  # float64 (n_plans, n_documents): probability of the most probable choice among all choices
    right: np.ndarray  # float64 (n_plans, n_documents): 1 where it is the right one (lm-eval's metric acc)
    chance: float  # what guessing gives: mean of 1 / number of choices


def score_choices(
    model: torch.nn.Module,
    tokenizer,
    members: list,
    plans: Sequence[DropPlan] = (DropPlan(),),
    limit: int | None = None,
    on_batch: Callable[[float], None] = lambda share: None,
) -> Choices:
    """Confidence in the choices of a task, of what `load_task` gave.

    The probability of a choice is the softmax, over the choices of its document, of their summed log-probabilities. Raises
    LLMDropError for a task without choices.
    """
    if any(task.OUTPUT_TYPE != "multiple_choice" for task in members):
        raise LLMDropError("Confidence is that in one of several choices, and this task has none. Name a task with choices.")
    plans = check_plans(model, plans)
    lm = FastLM(model, tokenizer, plans)
    lm.on_batch = on_batch
    build_requests(members, limit)
    instances = [(task, instance) for task in members for instance in task.instances]
    lm.loglikelihood([instance for _, instance in instances], disable_tqdm=True)
    assert lm.scores is not None
    documents: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, (task, instance) in enumerate(instances):
        documents[task.config.task, instance.doc_id].append(i)
    answers = [lm.scores.answers(plan) for plan in range(len(plans))]
    confidence, right = np.zeros((2, len(plans), len(documents)))
    for column, places in enumerate(documents.values()):
        places = sorted(places, key=lambda i: instances[i][1].idx)
        task, first = instances[places[0]]
        logprobs = lm.scores.logprob[:, places]
        confidence[:, column] = 1 / np.exp(logprobs - logprobs.max(1, keepdims=True)).sum(1)
        for plan in range(len(plans)):
            metrics = task.process_results(first.doc, [answers[plan][i] for i in places])
            if "acc" not in metrics:
                raise LLMDropError(f"The task {task.config.task} does not say which choice is right: it lacks the metric acc.")
            right[plan, column] = metrics["acc"]
    return Choices(confidence, right, float(np.mean([1 / len(places) for places in documents.values()])))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): sum over bins of |accuracy - confidence|, times the share in a bin.

    For confidence of 0.95, 0.95 and 0.4, of which the first and the last are right: 2/3 |0.5 - 0.95| + 1/3 |1 - 0.4| = 0.5.
    """
    return float(np.abs(binned_gaps(confidence, right).mean(0)).sum())


def binned_gaps(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """What each document adds to each of ten bins of equal width: right - confidence in its own, (n_documents, 10).

    confidence, right: (n_documents,), confidence from 0 to 1; an edge belongs to the lower bin. The calibration error is the
    sum of the sizes of the column means, also of means over resampled documents.
    """
    bin_of = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return np.equal.outer(bin_of, np.arange(BINS)) * (right - confidence)[:, None]
