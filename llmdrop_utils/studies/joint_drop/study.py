"""Notebook 03: attention and MLP dropped in one ranking, and one by one."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import ValidationInfo, field_validator

from ...base import stats
from ...base.settings import Counts, Positive, Settings
from ...dropping.plan import DropPlan
from ...measure.importance import Importance
from ...report.tables import Column, Key, Tables, table
from ...selection.ranking import drop_sequence, select
from .. import curve_rows
from ..curve_rows import TaskValues, TextValues, fewest_documents, in_mean, mean_score, reach_of, task_rows, tried_of
from ..curves import SINGLE, Measured, Tasks, Text, cells_beside, collect, measure_curves, rank_layers
from ..profile import Calibration, section
from ..run import Run, study
from ..work import Cell, ImportanceWork, IterativeWork

ITERATIVE, SAME_SAMPLES = "iterative", "one-shot on the same samples"

TABLES = curve_rows.TABLES | {
    "order": table("model", Key("position", "Position", "d"), Column("kind", "Kind"), Column("layer", "Layer"),
                   Column("importance", "Importance", ".4f")),
    "first_mlp": table(
        "model", Column("attention_before", "Attention layers ahead of the first MLP", "d", "low", "high"), "low high",
        Column("n_layers", "Layers", "d"),
    ),
    "further": table(
        "model", Key("other", "Compared with"), Column("joint", "Joint drop, sub-layers", "d"),
        Column("compared", "The other, sub-layers", "d"), Column("difference", "Joint reaches further by", "+d", "low", "high"),
        "low high", Column("is_cut", "Up to the largest number tried"), Column("same_up_to", "The same plan up to", "d"),
    ),
    "iterative": table(
        "model", Key("n", "Dropped", "d"), Column("shared", "Shared layers", "d"),
        Column("one_shot", "Perplexity, one-shot", ".1f"), Column("iterative", "Perplexity, iterative", ".1f"),
        Column("difference", "Iterative minus one-shot, nats per token", "+.3f", "low", "high"), "low high",
        Column("one_shot_layers", "One-shot drops"), Column("layers", "Iterative drops"),
    ),
    "iterative_tasks": (
        *curve_rows.TABLES["tasks"],
        *table(Column("difference", "Iterative minus one-shot", "+.3f", "difference_low", "difference_high"),
               "difference_low difference_high"),
    ),
    "iterative_average": table(
        "model", Key("n", "Dropped", "d"), Column("shared", "Shared layers", "d"), Column("tasks", "Tasks", "d"),
        Column("one_shot", "Mean score, one-shot", ".3f"), Column("iterative", "Mean score, iterative", ".3f"),
        Column("difference", "Iterative minus one-shot", "+.3f", "low", "high"), "low high",
    ),
}  # fmt: skip


@section("iterative")
class Iterative(Settings):
    """Attention dropped one layer at a time, measuring again in between, against all at once (paper, Fig. 9)."""

    n_samples: Positive  # the first blocks of the first corpus, for both ways
    n_drop: Counts
    task_n: Counts | None  # of these numbers the ones that the tasks are scored at too

    @field_validator("task_n")
    @classmethod
    def _are_dropped(cls, task_n: list[int] | None, info: ValidationInfo) -> list[int] | None:
        n_drop = info.data.get("n_drop")
        if task_n and n_drop and not {*task_n} <= {*n_drop}:
            raise ValueError(f"The key 'task_n' in {{where}} must hold numbers of 'n_drop', {n_drop}, but is {task_n}.")
        return task_n


@study("03_joint_drop", needs=[Calibration, Text, Tasks, Iterative], tables=TABLES)
def joint_drop(run: Run) -> Tables:
    """Notebook 03: attention and MLP in one ranking, against single kinds; iterative against one-shot dropping."""
    scoring, tasks = rank_layers(run)
    settings = run.section(Iterative)
    few = {item.model.name: run.importance(item).first(settings.n_samples) for item in scoring}
    # A count that a model does not have is left out, as on the curves: a profile serves several models.
    counts = {name: [n for n in settings.n_drop if n < len(scores.order("attention"))] for name, scores in few.items()}
    compared = [item for item in scoring if counts[item.model.name]]
    iterative = [iterative_work(item, settings.n_samples, max(counts[item.model.name])) for item in compared]
    run.measure(iterative)
    further = {
        name: iterative_plans(few[name], run.values(item)[0]["attention"], counts[name])
        for name, item in {item.model.name: item for item in iterative}.items()
        if name not in run.not_run
    }
    measured = measure_curves(run, scoring, tasks, (*SINGLE, "joint"), further, settings.task_n or ())
    rows = collect(measured, _more_rows, TABLES)
    return run.write(rows, [*run.measured([*scoring, *iterative]), *(item for m in measured for item in m.work)])


def _more_rows(m: Measured) -> dict[str, list[dict]]:
    both_ways = cells_beside(m.plans, m.run.section(Iterative).task_n or ())
    tasks = m.tasks_in(both_ways) if both_ways else []
    return {
        "order": order_rows(m.scores),
        "first_mlp": [first_mlp_row(m.scores)],
        "further": further_rows(m.text, m.plans),
        "iterative": iterative_rows(m.text, m.plans),
        "iterative_tasks": iterative_task_rows(both_ways, tasks),
        "iterative_average": iterative_average_rows(both_ways, tasks, m.plans),
    }


# ---- one by one, or all at once ---------------------------------------------------------------------------------------


def iterative_work(item: ImportanceWork, n_samples: int, n_drop: int) -> IterativeWork:
    """Attention dropped one by one, on the first samples that importance was measured on."""
    shared = {"tokens": item.tokens[:n_samples], "batch_size": item.batch_size, "n_drop": n_drop}
    return IterativeWork(**item.identity, **shared)


def iterative_plans(few: Importance, one_by_one: list[int], counts: list[int]) -> dict[Cell, DropPlan]:
    """Both ways to drop n attention layers. few: importance on the samples that both see; one_by_one: the iterative order."""
    plans = {}
    for n in counts:
        at_once = select(few, "attention", n)
        plans[Cell("attention", n, SAME_SAMPLES)] = at_once
        plans[Cell("attention", n, ITERATIVE)] = dataclasses.replace(at_once, attention=tuple(one_by_one[:n]))
    return plans


def iterative_rows(text: TextValues, plans: dict[Cell, DropPlan]) -> list[dict]:
    """Iterative minus one-shot, paired: nats per token of held-out text (negative: iterative predicts it better)."""
    draws = text.draws("nll")
    rows = []
    for i, cell in enumerate(text.cells):
        if cell.method != ITERATIVE:
            continue
        at_once = cell._replace(method=SAME_SAMPLES)
        j = text.cells.index(at_once)
        low, high = text.interval(draws[:, i] - draws[:, j])
        ours, theirs = plans[cell].attention, plans[at_once].attention
        rows.append({"n": cell.n, "shared": len({*ours} & {*theirs}), "one_shot": np.exp(text.nll[:, j].mean()),
                     "iterative": np.exp(text.nll[:, i].mean()), "difference": (text.nll[:, i] - text.nll[:, j]).mean(),
                     "low": low, "high": high, "one_shot_layers": " ".join(map(str, theirs)),
                     "layers": " ".join(map(str, ours))})  # fmt: skip
    return rows


def iterative_task_rows(cells: Sequence[Cell], tasks: Sequence[TaskValues]) -> list[dict]:
    """The score of iterative dropping in each task, and its paired difference from one-shot. Columns are these cells."""
    rows = []
    for task in tasks:
        of_cells = task_rows(cells, [task])
        for i, j in _both_ways(cells):
            low, high = stats.interval(task.draws[:, i] - task.draws[:, j], len(task.scores))
            difference = of_cells[i]["value"] - of_cells[j]["value"]
            rows.append(of_cells[i] | {"difference": difference, "difference_low": low, "difference_high": high})
    return rows


def iterative_average_rows(cells: Sequence[Cell], tasks: Sequence[TaskValues], plans: Mapping[Cell, DropPlan]) -> list[dict]:
    """The mean over tasks of both ways, and their paired difference (paper, Fig. 9)."""
    if not tasks:
        return []
    asked = in_mean(tasks)
    mean, draws = mean_score(asked)
    rows = []
    for i, j in _both_ways(cells):
        low, high = stats.interval(draws[:, i] - draws[:, j], fewest_documents(asked))
        shared = len({*plans[cells[i]].attention} & {*plans[cells[j]].attention})
        rows.append({"n": cells[i].n, "shared": shared, "tasks": len(asked), "one_shot": mean[j], "iterative": mean[i],
                     "difference": mean[i] - mean[j], "low": low, "high": high})  # fmt: skip
    return rows


def _both_ways(cells: Sequence[Cell]) -> list[tuple[int, int]]:
    """Positions of iterative cells, and of the one-shot cells that they are compared with."""
    return [(i, cells.index(cell._replace(method=SAME_SAMPLES))) for i, cell in enumerate(cells) if cell.method == ITERATIVE]


# ---- the joint ranking ------------------------------------------------------------------------------------------------


def order_rows(scores: Importance) -> list[dict]:
    """The joint ranking of attention and MLP, most droppable first; positions are counted from one."""
    importance = scores.importance
    return [
        {"position": i + 1, "kind": kind, "layer": layer, "importance": importance[kind][layer]}
        for i, (kind, layer) in enumerate(drop_sequence(scores, "joint"))
    ]


def further_rows(text: TextValues, plans: Mapping[Cell, DropPlan]) -> list[dict]:
    """How many more sub-layers joint drop can do without than each kind alone, with 90 % of next-token accuracy retained.

    A block is two sub-layers. The interval is wider by what lies between the numbers that were tried. `is_cut`: one of the two
    retains so much at every number that was tried. `same_up_to`: the two are the same plan up to this number (joint drop is
    attention drop until its first MLP). A kind of which a shallow model has too few to drop any is left out.
    """
    tried = {cell.kind for cell in text.cells if cell.on_curve}
    if "joint" not in tried:
        return []
    rows, joint = [], reach_of(text, "joint")
    for other in (kind for kind in SINGLE if kind in tried):
        size = 2 if other == "block" else 1
        reached = reach_of(text, other)
        compared = reached * size
        low, high = text.interval(joint[1:] - compared[1:])
        is_cut = any(reach[0] == tried_of(text.cells, kind)[-1] for kind, reach in (("joint", joint), (other, reached)))
        both = [n for n in tried_of(text.cells, "joint") if Cell(other, n) in plans]
        same = [n for n in both if plans[Cell(other, n)].key == plans[Cell("joint", n)].key]
        rows.append({"other": other, "joint": int(joint[0]), "compared": int(compared[0]),
                     "difference": int(joint[0] - compared[0]), "low": low - size * _untried(text, other, reached[0]),
                     "high": high + _untried(text, "joint", joint[0]), "is_cut": is_cut,
                     "same_up_to": max(same, default=0)})  # fmt: skip
    return rows


def _untried(text: TextValues, kind: str, n: int) -> int:
    """How many numbers between n and the next one that was tried were not."""
    return min((m for m in tried_of(text.cells, kind) if m > n), default=n + 1) - n - 1


def first_mlp_row(scores: Importance) -> dict:
    """How many attention layers stand ahead of the first MLP in the joint ranking, with an interval over samples."""
    first = next(i for i, (kind, _) in enumerate(drop_sequence(scores, "joint")) if kind == "mlp")
    draws = {kind: stats.text_means(scores.per_sample[kind], scores.weights) for kind in ("attention", "mlp")}
    ahead = (draws["attention"] <= draws["mlp"].min(1, keepdims=True)).sum(1)
    low, high = stats.text_interval(ahead, len(scores.weights))
    return {"attention_before": first, "low": low, "high": high, "n_layers": scores.importance["block"].size}
