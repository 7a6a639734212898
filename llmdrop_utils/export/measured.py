"""What a card tells of a dropped model: its quality and speed beside the dense one, measured here."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ..base import stats
from ..dropping.plan import DropPlan
from ..measure.floors import kv_bytes
from ..measure.speed import Load, measure_speed
from ..measure.tasks import score_task
from ..measure.text import TextScores, score_text
from ..sources.task_data import known_tasks, load_task
from ..sources.texts import load_tokens

CORPORA = ("web", "encyclopedia", "code", "mathematics")
TASKS = ("arc_easy", "piqa")
N_SAMPLES, SEQ_LEN, N_DOCUMENTS = 32, 256, 100

Three = tuple[float, float, float]  # a value, and its 95 % interval


@dataclasses.dataclass(frozen=True)
class Text:
    """What is left on one corpus."""

    retained: Three  # share of the dense model's next-token accuracy
    perplexity: Three  # over the dense model's


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of lm-eval: metric -> mean, and its standard error, of the dense and of the dropped model."""

    data_set: str  # on the hub
    data_name: str | None
    metric: str  # the paper's
    n_shots: int
    n_documents: int
    dense: Mapping[str, float]
    dropped: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that a card tells."""

    base: str
    identity: str
    licence: str
    plan: DropPlan
    calibration: str
    held_out: str
    command: str
    text: Mapping[str, Text]
    tasks: Mapping[str, Task]
    speed: Mapping[str, tuple[float, float]]  # load -> speed-up, spread of the dropped model's times
    kv_bytes: tuple[int, int]  # that a token leaves in a 16-bit cache: dense, dropped
    mended: str = ""  # how the kept weights were changed, as a sentence


def held_out(tokenizer, corpus: str, skipped: int = 0) -> torch.LongTensor:
    """Samples of a corpus, after `skipped` tokens that layers were chosen or refitted on."""
    # Those were read in longer samples. Each sample may begin with a token of the tokenizer's own, so that shorter ones reach
    # less far in the text: one more is skipped.
    first = -(-skipped // SEQ_LEN) + 1 if skipped else 0
    return load_tokens(corpus, tokenizer, first + N_SAMPLES, SEQ_LEN)[first:]


def text_left(
    model: nn.Module, tokens: torch.LongTensor, plans: Sequence[DropPlan], dense: nn.Module | None = None
) -> list[Text]:
    """What each plan leaves on these samples. dense: what is compared with; None: the model itself, whole."""
    if dense is None:
        scores = score_text(model, tokens, [DropPlan(), *plans])
    else:
        whole, left = score_text(dense, tokens), score_text(model, tokens, plans)
        nll, hits = (np.concatenate([getattr(each, name) for each in (whole, left)]) for name in ("nll", "hits"))
        scores = TextScores(nll, hits, np.full_like(nll, np.nan))  # a divergence takes both in one model
    return [of_scores(scores, i) for i in range(1, len(plans) + 1)]


def of_scores(scores: TextScores, i: int) -> Text:
    """Plan `i` beside plan 0; samples are drawn in blocks of neighbours, for both together.

    Of a dense model that predicts no token, or in some draws none, what is retained is not finite.
    """
    rows = np.stack([scores.hits[0], scores.hits[i], scores.nll[0], scores.nll[i]], 1)
    draws = stats.text_means(rows, np.ones(len(rows)))
    means = rows.mean(0)

    def three(value: float, drawn: np.ndarray) -> Three:
        low, high = stats.text_interval(drawn, len(rows))
        return value, float(low), float(high)

    with np.errstate(divide="ignore", invalid="ignore"):
        retained = three(float(means[1] / means[0]), draws[:, 1] / draws[:, 0])
    return Text(
        retained,
        three(float(np.exp(means[3] - means[2])), np.exp(draws[:, 3] - draws[:, 2])),
    )


def tasks_left(model: nn.Module, tokenizer, plan: DropPlan, dense: nn.Module | None = None) -> dict[str, Task]:
    """The dense and the dropped model on `TASKS`; dense as in `text_left`."""
    left = {}
    for name in TASKS:
        members = load_task(name)
        if dense is None:
            scores = score_task(model, tokenizer, members, [DropPlan(), plan], limit=N_DOCUMENTS)
            found = [scores.summary(0), scores.summary(1)]
        else:
            scores = score_task(model, tokenizer, members, [plan], limit=N_DOCUMENTS)
            whole = score_task(dense, tokenizer, members, [DropPlan()], limit=N_DOCUMENTS)
            found = [whole.summary(0), scores.summary(0)]
        config = members[0].config
        (n_documents,) = {values.shape[1] for values in scores.metrics.values()}
        metric = known_tasks()[name]["metric"]
        left[name] = Task(config.dataset_path, config.dataset_name, metric, config.num_fewshot, n_documents, *found)
    return left


def speed_ups(model: nn.Module, plan: DropPlan) -> dict[str, tuple[float, float]]:
    """How much faster prefill and decoding are."""
    left = {}
    for said, load in {
        "prefill of 512 tokens": Load("prefill", 512),
        "decoding after 512 tokens": Load("decode", 512, 8),
    }.items():
        dense, dropped = measure_speed(model, load, [DropPlan(), plan])
        left[said] = dense.median / dropped.median, dropped.spread
    return left


def cached(model: nn.Module, plan: DropPlan) -> tuple[int, int]:
    """Bytes that a token leaves in a 16-bit cache, of the dense and of the dropped model."""
    return kv_bytes(model.config, DropPlan(), 1, 1, 2), kv_bytes(model.config, plan, 1, 1, 2)
