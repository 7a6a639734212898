"""Notebook 08, what is measured of changed weights, beside dropping alone: items of one model, and their values by version.

A version is an `Arm`: what is dropped, and by which change ("none": the weights as they are). Of a pruned version, kind and
number say what has as many weights.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ...base.errors import LLMDropError
from ...derive.quantise import quantised_bytes
from ...derive.tuning import Tuning
from ...derive.wanda import sparsity_for
from ...dropping.plan import DropPlan
from ...dropping.units import skipping
from ...measure.importance import Importance
from ...models.load import model_of_shape
from ...models.locate import LocatedModel
from ...selection.ranking import drop_sequence, select
from ..ablations.rows import TASKS, TEXT, Arm, Values, mean_of_tasks, of_text
from ..curve_rows import TaskValues, in_mean
from ..curves import metric_of, task_work, text_work
from ..run import Run
from ..work import DENSE, ImportanceWork, TaskWork, TextWork, Work
from .changes import LORA, NONE, WANDA, ChangedSpeedWork, ChangedWork, Changes, bits_name

DENSE_KIND = "dense"
Part = TextWork | TaskWork


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """One model: the versions, and the items that their values are read from."""

    item: ImportanceWork
    plans: dict[Arm, DropPlan]  # what is dropped in each version
    groups: list[tuple[list[Arm], list[Part | ChangedWork]]]  # versions measured together, and their items
    rankings: dict[str, ChangedWork]  # importance with weights of so many bits
    speed: ChangedSpeedWork
    timed: list[Arm]

    @property
    def work(self) -> list[Work]:
        return [*(work for _, several in self.groups for work in several), *self.rankings.values(), self.speed]


def obstacles_to_changes(settings: Changes, model: LocatedModel) -> dict[str, str]:
    """Which changes cannot be made of a model here, and why. Asked of a model without memory."""
    shape = model_of_shape(model, torch.bfloat16, "meta")
    asked: dict[str, tuple[str | None, Callable[[], object]]] = {
        bits_name(bits): ("torchao", functools.partial(quantised_bytes, shape, bits)) for bits in settings.bits
    }
    asked |= {WANDA: (None, lambda: sparsity_for(shape, DENSE)), LORA: ("peft", lambda: None)}
    found = {}
    for change, (library, attempt) in asked.items():
        if library and importlib.util.find_spec(library) is None:
            found[change] = f"It takes the library {library}: pip install {library}."
            continue
        try:
            attempt()
        except LLMDropError as error:
            found[change] = str(error)
    return found


def shrink(run: Run, item: ImportanceWork, scores: Importance, tasks: dict[str, list]) -> Shrunk:
    """The items of one model. item: importance on the first corpus. tasks: name -> what `load_task` gives."""
    settings = run.section(Changes)
    obstacles = obstacles_to_changes(settings, item.model)
    run.not_run |= {f"{item.model.name}, {change}": reason for change, reason in obstacles.items()}
    tokens = item.tokens[: settings.n_samples]
    tuned = item.tokens[: settings.tuning_samples]
    dense = {Arm(DENSE_KIND, NONE, 0): DENSE}
    dropped = _plans(scores, {"attention": settings.n_drop})
    before = _plans(scores, settings.tuned)

    training = Tuning(epochs=settings.tuning_epochs, batch_size=settings.tuning_batch, learning_rate=settings.tuning_rate)

    def items(plans: Sequence[DropPlan]) -> list[Part]:
        text = text_work(run, item, plans)
        text = dataclasses.replace(text, tokens=text.tokens[: settings.text_samples])
        return [text, *task_work(run, item.model, tasks, plans, settings.task_limit)]

    def changed(change: str, read: torch.LongTensor, what: Sequence, plan: DropPlan = DENSE) -> ChangedWork:
        shared = item.identity | {"plan": plan, "tokens": read, "settings": training}
        return ChangedWork(**shared, change=change, items=tuple(what))

    plans = dense | dropped | before
    groups: list[tuple[list[Arm], list[Part | ChangedWork]]] = [(list(plans), [*items(list(plans.values()))])]
    nothing, rankings = tokens[:0], {}
    for name in (name for name in map(bits_name, settings.bits) if name not in obstacles):
        arms = {arm._replace(method=name): plan for arm, plan in (dense | dropped).items()}
        groups.append((list(arms), [changed(name, nothing, items(list(arms.values())))]))
        ranking = dataclasses.replace(item, tokens=tokens)
        rankings[name] = changed(name, nothing, [ranking])
        plans |= arms
    for arm, plan in dropped.items() if WANDA not in obstacles else ():
        pruned = arm._replace(method=WANDA)
        groups.append(([pruned], [changed(WANDA, tokens, items([DENSE]), plan)]))
        plans[pruned] = DENSE
    for arm, plan in (dense | before).items() if LORA not in obstacles else ():
        groups.append(([arm._replace(method=LORA)], [changed(LORA, tuned, items([plan]), plan)]))
        plans[arm._replace(method=LORA)] = plan
    timed = [arm for arm in plans if arm.method != LORA and arm.kind != "mlp"]
    versions = tuple((arm.method, dropped[arm._replace(method=NONE)] if arm.method == WANDA else plans[arm]) for arm in timed)
    speed = ChangedSpeedWork(**item.identity, versions=versions, context=settings.context, steps=settings.steps,
                             repeats=settings.repeats, tokens=tokens)  # fmt: skip
    return Shrunk(item, plans, groups, rankings, speed, timed)


def _plans(scores: Importance, counts: Mapping[str, Sequence[int]]) -> dict[Arm, DropPlan]:
    """Of the counts those that the model has: a profile serves several."""
    possible = [(kind, n) for kind, several in counts.items() for n in several if n < len(drop_sequence(scores, kind))]
    return {Arm(kind, NONE, n): select(scores, kind, n) for kind, n in possible}


# ---- values ---------------------------------------------------------------------------------------------------------------


def measures_of(run: Run, shrunk: Shrunk) -> tuple[dict[str, Values], list[TaskValues]]:
    """Minus nats per token, and the mean score of tasks, of each version; and each task's scores, one column a version."""
    text: dict[Arm, list[float]] = {}
    scores: dict[str, dict[Arm, list[float]]] = {}
    about: dict[str, tuple[str, int, float]] = {}
    for arms, works in shrunk.groups:
        for part, values in _parts(run, works):
            for arm in arms:
                keys = [plan.key for plan in part.plans]
                value = values[keys.index(shrunk.plans[arm].key)]
                if isinstance(part, TextWork):
                    text[arm] = value["nll"]
                else:
                    metric = metric_of(part.task, value["metrics"])
                    scores.setdefault(part.task, {})[arm] = value["metrics"][metric]
                    about[part.task] = (metric, part.num_fewshot, value["chance"])
    arms = list(text)
    tasks = [
        TaskValues(task, metric, shots, np.array([scores[task][arm] for arm in arms]).T, chance, seed)
        for seed, (task, (metric, shots, chance)) in enumerate(about.items())
    ]
    found = {TEXT: of_text(arms, -np.array([text[arm] for arm in arms]).T)}
    if tasks:
        found[TASKS] = mean_of_tasks(in_mean(tasks), arms)
    return found, tasks


def _parts(run: Run, works: Sequence[Part | ChangedWork]) -> Iterator[tuple[Part, list[dict]]]:
    """Each item with the values of its plans; those of a changed item come one after the other."""
    for work in works:
        values = iter(run.values(work))
        for part in work.items if isinstance(work, ChangedWork) else [work]:
            found = [next(values) for _ in part.keys]
            if isinstance(part, TextWork | TaskWork):
                yield part, found


def bytes_of(shrunk: Shrunk, bits: Sequence[int]) -> dict[Arm, int]:
    """Bytes of the weights of each version, what is not rounded in 16 bits. Counted on a model without memory."""
    shape = model_of_shape(shrunk.item.model, torch.bfloat16, "meta")
    found = {}
    for arm, plan in shrunk.plans.items():
        with skipping(shape, plan):
            number = next((b for b in bits if bits_name(b) == arm.method), None)
            full = sum(parameter.nbytes for parameter in shape.parameters())
            found[arm] = full if number is None else quantised_bytes(shape, number)
    return found


def sparsities_of(shrunk: Shrunk) -> dict[int, float]:
    """Share of the weights of linear maps that as many attention layers have."""
    if not any(arm.method == WANDA for arm in shrunk.plans):
        return {}
    shape = model_of_shape(shrunk.item.model, torch.bfloat16, "meta")
    plain = {arm.n: plan for arm, plan in shrunk.plans.items() if (arm.kind, arm.method) == ("attention", NONE)}
    return {n: sparsity_for(shape, plan) for n, plan in plain.items()}
