"""Quality against the number of dropped sub-layers: what notebooks 02 and 03 share."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import torch

from ..base.errors import NotAvailable
from ..base.settings import Counts, Names, NotNegative, Positive, Settings
from ..dropping.plan import DropPlan, PlanKey
from ..measure.importance import Importance
from ..models.load import load_tokenizer
from ..models.locate import LocatedModel
from ..selection.ranking import drop_sequence, select
from ..sources.task_data import fingerprint_task, known_tasks, load_task
from ..sources.texts import check_held_out, fingerprint_tokenizer, load_tokens, text_beginning
from .curve_rows import (
    TaskValues,
    TextValues,
    average_rows,
    gap_rows,
    in_mean,
    plan_rows,
    reach_rows,
    task_reach_rows,
    task_rows,
    text_rows,
    without_rows,
)
from .profile import Calibration, CountsByKind, section
from .run import Run, fitting_length, identity_of, importance_work
from .work import DENSE, DENSE_CELL, Cell, ImportanceWork, TaskWork, TextWork, Work

SINGLE = ("attention", "mlp", "block")


@section("text")
class Text(Settings):
    """Held-out text of the first calibration corpus: the blocks after those that importance is measured on."""

    n_samples: Positive
    seq_len: Positive
    n_drop: Counts  # how many sub-layers of each kind (and jointly) are dropped, dense apart
    across: Counts  # how many attention layers are dropped as each corpus chooses them, and tested on all corpora


@section("tasks")
class Tasks(Settings):
    """Tasks of data/tasks.yaml, and how many sub-layers of which kind are dropped for them, dense apart."""

    names: Names
    data: str  # "package" or "hub"
    limit: Positive | None  # documents of each task (of each subject of a group), drawn by a fixed seed; null: all
    num_fewshot: NotNegative | None  # null: the paper's number for each task
    n_drop: CountsByKind


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """One model: its importance, the plan of every cell, and what was measured under the plans."""

    run: Run
    model: LocatedModel
    scores: Importance  # of the samples that the profile calibrates on
    plans: dict[Cell, DropPlan]
    text_work: TextWork
    task_work: list[TaskWork]

    @property
    def work(self) -> list[Work]:
        """All items that values are read from, but for those of importance."""
        return [self.text_work, *self.task_work]

    @functools.cached_property
    def text(self) -> TextValues:
        """Values of held-out text, in all cells."""
        nll, hits, kl = (sample_values(self.run, self.text_work, self.plans.values(), name) for name in ("nll", "hits", "kl"))
        return TextValues(list(self.plans), nll, hits, kl)

    @property
    def task_cells(self) -> list[Cell]:
        """The cells that tasks were measured in."""
        return cells_for_tasks(self.plans, self.run.section(Tasks))

    @functools.cached_property
    def tasks(self) -> list[TaskValues]:
        """Values of each task, in `task_cells`."""
        return self.tasks_in(self.task_cells)

    def tasks_in(self, cells: Iterable[Cell]) -> list[TaskValues]:
        """Values of each task, in these of the cells that tasks were measured in."""
        return task_values(self.run, self.task_work, [self.plans[cell] for cell in cells])

    def rows(self) -> dict[str, list[dict]]:
        """Rows of all tables that 02 and 03 share, without the column `model`."""
        text, tasks, cells, plans = self.text, self.tasks, self.task_cells, self.plans
        return {
            "models": [{"n_layers": self.scores.importance["block"].size}],
            "plans": plan_rows(plans),
            "text": text_rows(text, self.text_work.corpus, plans),
            "reach": reach_rows(text),
            "task_reach": task_reach_rows(cells, in_mean(tasks)),
            "tasks": task_rows(cells, tasks),
            "average": average_rows(cells, in_mean(tasks)),
            "gaps": gap_rows(text, cells, in_mean(tasks), plans),
            "without": without_rows(cells, in_mean(tasks)),
        }


def under_plans(run: Run, item: Work, plans: Iterable[DropPlan]) -> list[dict]:
    """The stored values of an item that has plans, under each of these; several may be the same."""
    values: dict[PlanKey, dict] = dict(zip((plan.key for plan in item.plans), run.values(item), strict=True))  # type: ignore[attr-defined]
    return [values[plan.key] for plan in plans]


def sample_values(run: Run, item: Work, plans: Iterable[DropPlan], name: str) -> np.ndarray:
    """One of the values of an item, of each sample under each plan: float64 (n_samples, n_plans)."""
    return np.array([value[name] for value in under_plans(run, item, plans)]).T


def task_values(run: Run, work: Iterable[TaskWork], plans: Sequence[DropPlan]) -> list[TaskValues]:
    """The scores of each task under each of these plans, in the metric that counts."""
    found = []
    for seed, item in enumerate(work):
        rows = under_plans(run, item, plans)
        metric = metric_of(item.task, rows[0]["metrics"])
        scores = np.array([row["metrics"][metric] for row in rows]).T
        found.append(TaskValues(item.task, metric, item.num_fewshot, scores, rows[0]["chance"], seed))
    return found


def collect(
    measured: list[Measured], more: Callable[[Measured], dict[str, list[dict]]], names: Iterable[str]
) -> dict[str, list[dict]]:
    """The rows of all models, with the column `model`: those that 02 and 03 share, and `more`."""
    tables: dict[str, list[dict]] = {name: [] for name in names}
    for m in measured:
        for name, rows in (m.rows() | more(m)).items():
            tables[name] += [{"model": m.model.name} | row for row in rows]
    return tables


def rank_layers(run: Run, with_tasks: bool = True) -> tuple[list[ImportanceWork], dict[str, list]]:
    """What comes first: the items that hold the importance of each model, which says what is dropped, and the tasks.

    Tasks (name -> what `load_task` gives) are loaded before anything is measured, so that a mistake in them costs nothing.
    """
    corpus, tasks = run.corpora()[0], _available_tasks(run) if with_tasks else {}
    scoring: list[ImportanceWork] = []
    for model in run.models():
        with run.one_of(model):
            scoring += importance_work(model, [corpus], run.profile)
    run.measure(scoring, force=False)  # notebook 01 measures it
    return run.measured(scoring), tasks


def measure_curves(
    run: Run,
    scoring: list[ImportanceWork],
    tasks: dict[str, list],
    kinds: tuple[str, ...],
    further: dict[str, dict[Cell, DropPlan]] | None = None,
    further_n: Collection[int] = (),
) -> list[Measured]:
    """Measure text and tasks on each model, under all plans together: those of `kinds`, and `further` ones by model name.

    further_n: the numbers dropped at which tasks are measured under the further plans too.
    """
    planned: list[Measured] = []
    for item in run.measured(scoring):
        scores = run.importance(item).first(run.section(Calibration).n_samples)
        plans = plans_of(scores, kinds, run.section(Text), run.section(Tasks)) | (further or {}).get(item.model.name, {})
        with run.one_of(item.model):
            settings = run.section(Tasks)
            asked = [plans[cell] for cell in (*cells_for_tasks(plans, settings), *cells_beside(plans, further_n))]
            on_text, on_tasks = text_work(run, item, plans.values()), task_work(run, item.model, tasks, asked, settings.limit)
            planned.append(Measured(run, item.model, scores, plans, on_text, on_tasks))
    work = [item for m in planned for item in m.work]
    run.measure(work)
    available = {item.model.name for item in run.measured(work)}
    return [m for m in planned if m.model.name in available]


def _available_tasks(run: Run) -> dict[str, list]:
    tasks = run.section(Tasks)
    load = lambda name: (name, load_task(name, tasks.num_fewshot, tasks.data))  # noqa: E731
    return dict(run.available(tasks.names, load, "tasks", NotAvailable, name=lambda name: f"task {name}"))


def plans_of(scores: Importance, kinds: tuple[str, ...], text: Text, tasks: Tasks) -> dict[Cell, DropPlan]:
    """The plan of every cell of the curves."""
    return plans_for(scores, {kind: {*text.n_drop, *tasks.n_drop.get(kind, [])} for kind in kinds})


def plans_for(scores: Importance, counts: Mapping[str, Iterable[int]]) -> dict[Cell, DropPlan]:
    """Nothing dropped, and so many of each kind. A count that the model does not have is left out: a profile serves several."""
    plans = {DENSE_CELL: DENSE}
    for kind, several in counts.items():
        available = len(drop_sequence(scores, kind))
        for n in sorted(n for n in several if n < available):  # without any of a kind there is nothing left to compare
            plans[Cell(kind, n)] = select(scores, kind, n)
    return plans


def cells_for_tasks(plans: dict[Cell, DropPlan], tasks: Tasks) -> list[Cell]:
    """The cells that tasks are measured in: fewer than those of text, which costs less."""
    return [c for c in plans if c.on_curve and (c == DENSE_CELL or c.n in tasks.n_drop.get(c.kind, []))]


def cells_beside(plans: Iterable[Cell], counts: Collection[int]) -> list[Cell]:
    """The cells beside the curves that drop so many."""
    return [cell for cell in plans if not cell.on_curve and cell.n in counts]


def _distinct(plans: Iterable[DropPlan]) -> tuple[DropPlan, ...]:
    """Each plan once: a joint plan is an attention plan as long as it drops no MLP."""
    return tuple({plan.key: plan for plan in plans}.values())


def text_work(run: Run, item: ImportanceWork, plans: Iterable[DropPlan], at_most: int | None = None) -> TextWork:
    """Blocks of the item's corpus that no importance was measured on, under each plan; of the profile's the first `at_most`."""
    text = run.section(Text)
    n_samples = min(text.n_samples, at_most or text.n_samples)
    tokens = held_out(item, load_tokenizer(item.model), n_samples, fitting_length(item.model, text.seq_len))
    return TextWork(**item.identity, corpus=item.corpus, tokens=tokens, plans=_distinct(plans))


def held_out(item: ImportanceWork, tokenizer, n_samples: int, seq_len: int) -> torch.LongTensor:
    """Blocks (n_samples, seq_len) of the item's corpus after those that importance was measured on."""
    n_begin = len(text_beginning(tokenizer))  # of each block; the rest is the corpus, cut without a gap
    skip = -(-item.tokens[:, n_begin:].numel() // (seq_len - n_begin))
    tokens = load_tokens(item.corpus, tokenizer, skip + n_samples, seq_len)[skip:]
    check_held_out(tokens, item.tokens, n_begin)
    return tokens


def task_work(
    run: Run,
    model: LocatedModel,
    tasks: dict[str, list],
    plans: Iterable[DropPlan],
    limit: int | None,
    form: type[TaskWork] = TaskWork,
) -> list[TaskWork]:
    """Each task under each plan. tasks: name -> what `load_task` gives. limit: documents of each; None: all.

    form: of the items, which says what is measured.
    """
    tokenizer = fingerprint_tokenizer(load_tokenizer(model))
    shared = identity_of(model, run.profile) | {"tokenizer": tokenizer, "limit": limit}
    distinct = _distinct(plans)
    return [
        form(**shared, task=task, members=tuple(members), fingerprint=fingerprint_task(members, limit),
             num_fewshot=members[0].config.num_fewshot, plans=distinct)
        for task, members in tasks.items()
    ]  # fmt: skip


def metric_of(task: str, metrics: dict) -> str:
    """The paper's metric; for a task that it does not have, the one that lm-eval lists first."""
    return known_tasks().get(task, {}).get("metric") or next(iter(metrics))
