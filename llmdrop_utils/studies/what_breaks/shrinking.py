"""Notebook 08, what is measured of changed weights, beside dropping alone: items of one model, and their values by version.

A version is an `Arm`: what is dropped, and by which change ("none": the weights as they are). Of a pruned version, kind and
number say what has as many weights.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
from ..ablations.rows import TASKS, TEXT, Arm, Values, mean_of_tasks, of_text
from ..curve_rows import TaskValues, in_mean
from ..curves import metric_of, plans_for, task_work, text_work
from ..run import Run
from ..work import DENSE, ImportanceWork, TaskWork, TextWork, Work
from .change_rows import DENSE_ARM
from .changes import LORA, NONE, WANDA, ChangedSpeedWork, ChangedWork, Changes, bits_name

Part = TextWork | TaskWork


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """One model: the versions, and the items that their values are read from."""

    item: ImportanceWork
    shape: torch.nn.Module  # the model without memory, in 16 bits
    plans: dict[Arm, DropPlan]  # what is dropped in each version
    groups: list[tuple[list[Arm], list[Part | ChangedWork]]]  # versions measured together, and their items
    rankings: dict[str, ChangedWork]  # importance with weights of so many bits
    speed: ChangedSpeedWork
    timed: list[Arm]

    @property
    def work(self) -> list[Work]:
        return [*(work for _, several in self.groups for work in several), *self.rankings.values(), self.speed]


def obstacles_to_changes(settings: Changes, shape: torch.nn.Module) -> dict[str, str]:
    """Which changes cannot be made of a model here, and why. shape: the model without memory."""
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
    settings, shape = run.section(Changes), model_of_shape(item.model, torch.bfloat16, "meta")
    obstacles = obstacles_to_changes(settings, shape)
    run.not_run |= {f"{item.model.name}, {change}": reason for change, reason in obstacles.items()}
    tokens = item.tokens[: settings.n_samples]
    beside, tuned = _versions(scores, {"attention": settings.n_drop}), _versions(scores, settings.tuned)
    training = Tuning(epochs=settings.tuning_epochs, batch_size=settings.tuning_batch, learning_rate=settings.tuning_rate)

    plans = beside | tuned
    parts: list[Part] = [text_work(run, item, plans.values(), settings.text_samples)]
    parts += task_work(run, item.model, tasks, plans.values(), settings.task_limit)

    def changed(change: str, read: torch.LongTensor, what: Sequence, plan: DropPlan = DENSE) -> ChangedWork:
        shared = item.identity | {"plan": plan, "tokens": read, "settings": training}
        return ChangedWork(**shared, change=change, items=tuple(what))

    def under(plans: Iterable[DropPlan]) -> list[Part]:
        return [dataclasses.replace(part, plans=tuple(plans)) for part in parts]

    groups: list[tuple[list[Arm], list[Part | ChangedWork]]] = [(list(plans), [*parts])]
    nothing, rankings = tokens[:0], {}
    for name in (name for name in map(bits_name, settings.bits) if name not in obstacles):
        arms = {arm._replace(method=name): plan for arm, plan in beside.items()}
        groups.append((list(arms), [changed(name, nothing, under([*arms.values()]))]))
        rankings[name] = changed(name, nothing, [dataclasses.replace(item, tokens=tokens)])
        plans |= arms
    for arm, plan in beside.items() if WANDA not in obstacles else ():
        if arm == DENSE_ARM:
            continue
        pruned = arm._replace(method=WANDA)
        groups.append(([pruned], [changed(WANDA, tokens, under([DENSE]), plan)]))
        plans[pruned] = DENSE
    for arm, plan in tuned.items() if LORA not in obstacles else ():
        groups.append(
            ([arm._replace(method=LORA)], [changed(LORA, item.tokens[: settings.tuning_samples], under([plan]), plan)])
        )
        plans[arm._replace(method=LORA)] = plan
    timed = [arm for arm in plans if arm.method != LORA and arm.kind != "mlp"]
    versions = tuple((arm.method, plans[arm._replace(method=NONE)] if arm.method == WANDA else plans[arm]) for arm in timed)
    speed = ChangedSpeedWork(**item.identity, versions=versions, context=settings.context, steps=settings.steps,
                             repeats=settings.repeats, tokens=tokens)  # fmt: skip
    return Shrunk(item, shape, plans, groups, rankings, speed, timed)


def _versions(scores: Importance, counts: Mapping[str, Sequence[int]]) -> dict[Arm, DropPlan]:
    """What is dropped, with the weights as they are."""
    return {Arm(cell.kind, NONE, cell.n): plan for cell, plan in plans_for(scores, counts).items()}


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
    """Bytes of the weights of each version, what is not rounded in 16 bits."""
    found, by_name = {}, {bits_name(number): number for number in bits}
    for arm, plan in shrunk.plans.items():
        with skipping(shrunk.shape, plan):
            full = sum(parameter.nbytes for parameter in shrunk.shape.parameters())
            found[arm] = quantised_bytes(shrunk.shape, by_name[arm.method]) if arm.method in by_name else full
    return found


def sparsities_of(shrunk: Shrunk) -> dict[int, float]:
    """Share of the weights of linear maps that is pruned, by the number of attention layers that have as many."""
    pruned = [arm for arm in shrunk.plans if arm.method == WANDA]
    return {arm.n: sparsity_for(shrunk.shape, shrunk.plans[arm._replace(method=NONE)]) for arm in pruned}
