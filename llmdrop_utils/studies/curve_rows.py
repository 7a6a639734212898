"""From values to rows: what the tables of notebooks 02 and 03 are made of. Arrays have one column for each cell.

The first cell is the dense model. Intervals are 95 % bootstrap intervals over documents of tasks, or over samples of text, of
which neighbours are drawn together. Cells share their samples, so differences are paired.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from ..base import stats
from ..dropping.plan import DropPlan
from ..report.tables import Column, Key, table
from .work import Cell

AGAINST = {"attention": ("mlp", "block"), "joint": ("attention", "mlp", "block")}  # what a kind is compared with at equal n
KEEP = 0.9  # so much of the dense model's next-token accuracy must be retained (paper, Sec. 7: 90 % of MMLU)
KEEP_TASKS = 0.95  # and so much of what lies above guessing in the tasks

SCORE = Column("value", "Score", ".3f", "low", "high")
RETAINED = Column("retained", "Retained", ".1%", "retained_low", "retained_high")
TABLES = {
    "models": table("model", Column("n_layers", "Layers", "d")),
    "plans": table(
        "model kind", Key("n", "Dropped", "d"), Column("attention", "Attention of layers"), Column("mlp", "MLP of layers")
    ),
    "text": table(
        "model corpus kind", Key("n", "Dropped", "d"), Column("sub_layers", "Sub-layers", "d"),
        Column("samples", "Samples", "d"),
        Column("perplexity", "Perplexity", ".1f", "perplexity_low", "perplexity_high"), "perplexity_low perplexity_high",
        Column("accuracy", "Next-token accuracy", ".1%", "accuracy_low", "accuracy_high"), "accuracy_low accuracy_high",
        Column("kl", "KL from dense, nats per token", ".3f", "kl_low", "kl_high"), "kl_low kl_high",
        RETAINED, "retained_low retained_high",
    ),
    "reach": table(
        "model kind", Column("n", "Retains 90 % of next-token accuracy up to", "d", "low", "high"), "low high",
        Column("tried_up_to", "Tried up to", "d"),
    ),
    "task_reach": table(
        "model kind", Column("n", "Retains 95 % of the tasks up to", "d", "low", "high"), "low high",
        Column("tried_up_to", "Tried up to", "d"), Column("tasks", "Tasks above guessing"),
    ),
    "tasks": table(
        "model task kind", Key("n", "Dropped", "d"), "metric", Column("num_fewshot", "Shots", "d"),
        Column("documents", "Documents", ",d"), SCORE, Column("stderr", "Standard error", ".3f"), "low high",
        Column("chance", "By guessing", ".3f"),
    ),
    "average": table(
        "model kind", Key("n", "Dropped", "d"), Column("tasks", "Tasks", "d"),
        Column("value", "Mean score", ".3f", "low", "high"), "low high", Column("chance", "By guessing", ".3f"),
        Column("retained", "Retained of what lies above guessing", ".1%", "retained_low", "retained_high"),
        "retained_low retained_high",
        Column("points_lost", "Points lost", ".1f", "points_lost_low", "points_lost_high"), "points_lost_low points_lost_high",
    ),
    "gaps": table(
        "model", Key("n", "Dropped", "d"), "kind", Key("other", "Minus"), "measure",
        Column("difference", "Difference", "+.3f", "low", "high"), "low high",
        Column("detectable", "Found in 80 % of runs", ".3f"), Column("same_plan", "The same plan"),
    ),
    "without": table(
        "model", Key("left_out", "Task left out"), Key("n", "Dropped", "d"), "kind", Key("other", "Minus"),
        Column("difference", "Difference of the mean of the others", "+.3f", "low", "high"), "low high",
    ),
}  # fmt: skip


# ---- values ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextValues:
    """How well held-out text is predicted in each cell: float64 (n_samples, n_cells)."""

    cells: list[Cell]
    nll: np.ndarray  # negative log-probability, nats per token
    hits: np.ndarray  # share of tokens that were the most probable
    kl: np.ndarray  # divergence from the dense model, nats per token

    def draws(self, name: str) -> np.ndarray:
        """Bootstrap over samples of the mean of "nll", "hits" or "kl": (REPEATS, n_cells)."""
        rows = getattr(self, name)
        return stats.text_means(rows, np.ones(len(rows)))

    def interval(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval of what was made from draws."""
        return stats.text_interval(draws, len(self.nll))


@dataclasses.dataclass(frozen=True)
class TaskValues:
    """The scores of one task in each cell."""

    task: str
    metric: str
    num_fewshot: int
    scores: np.ndarray  # float64 (n_documents, n_cells)
    chance: float  # the score of guessing
    seed: int  # of the bootstrap: one for each task, since tasks share no documents

    @functools.cached_property
    def draws(self) -> np.ndarray:
        """Bootstrap over documents of the mean score: (REPEATS, n_cells)."""
        return stats.bootstrap_means(self.scores, np.ones(len(self.scores)), self.seed)


def share_of_dense(values: np.ndarray, chance: float = 0.0) -> np.ndarray:
    """Share of the dense model's value, the first along the last axis, of what lies above chance.

    Scores of 0.6, 0.5 and 0.35 where guessing gives 0.4 are shares of 1, 0.5 and -0.25. NaN where the dense model is not
    above chance: then there is nothing to retain.
    """
    above = values - chance
    dense = above[..., :1]
    return np.divide(above, dense, out=np.full(values.shape, np.nan), where=dense > 0)


# ---- rows of one model, without the column `model` --------------------------------------------------------------------


def plan_rows(plans: Mapping[Cell, DropPlan]) -> list[dict]:
    """Which layers are dropped in each cell, most droppable first."""
    listed = lambda layers: " ".join(map(str, layers))  # noqa: E731
    return [
        {"kind": cell.label, "n": cell.n, "attention": listed(plan.attention), "mlp": listed(plan.mlp)}
        for cell, plan in plans.items()
    ]


def text_rows(text: TextValues, corpus: str, plans: Mapping[Cell, DropPlan]) -> list[dict]:
    """Perplexity (exp of the mean of `nll`), next-token accuracy and divergence, with intervals over samples."""
    points = {"perplexity": np.exp(text.nll.mean(0)), "accuracy": text.hits.mean(0), "kl": text.kl.mean(0)}
    points["retained"] = share_of_dense(points["accuracy"])
    draws = {"perplexity": np.exp(text.draws("nll")), "accuracy": text.draws("hits"), "kl": text.draws("kl")}
    draws["retained"] = share_of_dense(draws["accuracy"])
    intervals = {name: text.interval(values) for name, values in draws.items()}
    rows = []
    for i, cell in enumerate(text.cells):
        if not cell.on_curve:
            continue
        row = {"corpus": corpus, "kind": cell.kind, "n": cell.n, "sub_layers": plans[cell].n_drop}
        row["samples"] = len(text.nll)
        for name, (low, high) in intervals.items():
            row |= {name: points[name][i], f"{name}_low": low[i], f"{name}_high": high[i]}
        rows.append(row)
    return rows


def reach_rows(text: TextValues) -> list[dict]:
    """How many of a kind can be dropped before less than 90 % of the dense model's next-token accuracy is retained."""
    rows = []
    for kind in dict.fromkeys(cell.kind for cell in text.cells[1:] if cell.on_curve):
        reach = reach_of(text, kind)
        low, high = text.interval(reach[1:])
        rows.append({"kind": kind, "n": int(reach[0]), "low": low, "high": high, "tried_up_to": tried_of(text.cells, kind)[-1]})
    return rows


def reach_of(text: TextValues, kind: str) -> np.ndarray:
    """The number of `reach_rows`, followed by its bootstrap: (1 + REPEATS,)."""
    return furthest(share_of_dense(np.vstack([text.hits.mean(0), text.draws("hits")])), text.cells, kind, KEEP)


def task_reach_rows(cells: Sequence[Cell], tasks: Sequence[TaskValues]) -> list[dict]:
    """How many of a kind can be dropped before less than 95 % of what lies above guessing is retained.

    It is the mean over the tasks on which the dense model is above guessing by the lower end of its interval: on the others
    there is nothing to retain. No rows if there are none.
    """
    above = [task for task in tasks if stats.interval(task.draws, len(task.scores))[0][0] > task.chance]
    if not above:
        return []
    mean, draws = mean_score(above)
    retained = share_of_dense(np.vstack([mean, draws]), float(np.mean([task.chance for task in above])))
    rows = []
    for kind in dict.fromkeys(cell.kind for cell in cells[1:]):
        reach = furthest(retained, cells, kind, KEEP_TASKS)
        low, high = stats.interval(reach[1:], fewest_documents(above))
        rows.append({"kind": kind, "n": int(reach[0]), "low": low, "high": high, "tried_up_to": tried_of(cells, kind)[-1],
                     "tasks": " ".join(task.task for task in above)})  # fmt: skip
    return rows


def tried_of(cells: Sequence[Cell], kind: str) -> list[int]:
    """How many of a kind were dropped on its curve, in order."""
    return sorted(cell.n for cell in cells if cell.kind == kind and cell.on_curve)


def furthest(retained: np.ndarray, cells: Sequence[Cell], kind: str, keep: float) -> np.ndarray:
    """The largest number dropped up to which so much is retained, for each row of (..., n_cells).

    Counts are tried in order, and the last before the first that fails is given: 0.95, 0.85, 0.92 at n = 1, 2, 3 reach 1.
    """
    counts = tried_of(cells, kind)
    holds = retained[:, [list(cells).index(Cell(kind, n)) for n in counts]] >= keep
    without_break = np.where(holds.all(1), len(counts), holds.argmin(1))
    return np.array([0, *counts])[without_break]


def task_rows(cells: Sequence[Cell], tasks: Sequence[TaskValues]) -> list[dict]:
    """The mean score of each task, its standard error (NaN for a single document) and its interval over documents."""
    rows = []
    for task in tasks:
        n_documents = len(task.scores)
        low, high = stats.interval(task.draws, n_documents)
        error = task.scores.std(0, ddof=1) / np.sqrt(n_documents) if n_documents > 1 else np.full(len(cells), np.nan)
        for i, cell in enumerate(cells):
            rows.append({"task": task.task, "kind": cell.kind, "n": cell.n, "metric": task.metric,
                         "num_fewshot": task.num_fewshot, "documents": n_documents, "value": task.scores[:, i].mean(),
                         "stderr": error[i], "low": low[i], "high": high[i], "chance": task.chance})  # fmt: skip
    return rows


def mean_score(tasks: Sequence[TaskValues]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over tasks, each counting as one: (n_cells,), and its bootstrap over documents, (REPEATS, n_cells)."""
    return np.mean([task.scores.mean(0) for task in tasks], axis=0), np.mean([task.draws for task in tasks], axis=0)


def in_mean(tasks: Sequence[TaskValues]) -> list[TaskValues]:
    """The tasks that a mean is of: those with choices, as in the paper's Tables 1 and 2; GSM8K, which is generated, stands
    apart. All of them if none has choices."""
    return [task for task in tasks if task.chance > 0] or list(tasks)


def fewest_documents(tasks: Sequence[TaskValues]) -> int:
    return min(len(task.scores) for task in tasks)


def average_rows(cells: Sequence[Cell], tasks: Sequence[TaskValues]) -> list[dict]:
    """The mean over tasks, the share of it above guessing that is retained, and the points (hundredths) that are lost."""
    mean, draws = mean_score(tasks)
    chance = float(np.mean([task.chance for task in tasks]))
    columns = {
        "value": (mean, draws),
        "retained": (share_of_dense(mean, chance), share_of_dense(draws, chance)),
        "points_lost": (100 * (mean[0] - mean), 100 * (draws[:, :1] - draws)),
    }
    low, high = {}, {}
    for name, (_, drawn) in columns.items():
        low[name], high[name] = stats.interval(drawn, fewest_documents(tasks))
    return [
        {
            "kind": cell.kind,
            "n": cell.n,
            "tasks": len(tasks),
            "value": mean[i],
            "low": low["value"][i],
            "high": high["value"][i],
            "chance": chance,
            "retained": columns["retained"][0][i],
            "retained_low": low["retained"][i],
            "retained_high": high["retained"][i],
            "points_lost": columns["points_lost"][0][i],
            "points_lost_low": low["points_lost"][i],
            "points_lost_high": high["points_lost"][i],
        }
        for i, cell in enumerate(cells)
    ]


def gap_rows(
    text: TextValues, cells: Sequence[Cell], tasks: Sequence[TaskValues], plans: Mapping[Cell, DropPlan]
) -> list[dict]:
    """Attention and joint minus the other kinds at equal n, paired; more is better.

    Of tasks it is the mean score, of text minus nats per token. `cells` are those of the tasks.
    """
    measures = {
        "tasks": (list(cells), *mean_score(tasks), lambda draws: stats.interval(draws, fewest_documents(tasks))),
        "text": (text.cells, -text.nll.mean(0), -text.draws("nll"), text.interval),
    }
    rows = []
    for measure, (measured, point, draws, interval) in measures.items():
        for i, j in _pairs(measured):
            low, high = interval(draws[:, i] - draws[:, j])
            cell, other = measured[i], measured[j]
            rows.append({"n": cell.n, "kind": cell.kind, "other": other.kind, "measure": measure,
                         "difference": point[i] - point[j], "low": low, "high": high,
                         "detectable": stats.detectable(low, high),
                         "same_plan": plans[cell].key == plans[other].key})  # fmt: skip
    return rows


def without_rows(cells: Sequence[Cell], tasks: Sequence[TaskValues]) -> list[dict]:
    """The gaps of the mean task score with each task left out: does a single one decide?"""
    rows = []
    for left_out in tasks if len(tasks) > 1 else ():
        others = [task for task in tasks if task is not left_out]
        point, draws = mean_score(others)
        for i, j in _pairs(cells):
            low, high = stats.interval(draws[:, i] - draws[:, j], fewest_documents(others))
            rows.append({"left_out": left_out.task, "n": cells[i].n, "kind": cells[i].kind, "other": cells[j].kind,
                         "difference": point[i] - point[j], "low": low, "high": high})  # fmt: skip
    return rows


def _pairs(cells: Sequence[Cell]) -> list[tuple[int, int]]:
    """Positions of cells on the curves that are compared: the kinds of `AGAINST` at equal n."""
    return [
        (i, j)
        for (i, cell), (j, other) in itertools.product(enumerate(cells), enumerate(cells))
        if cell.n == other.n and other.kind in AGAINST.get(cell.kind, ()) and cell.on_curve and other.on_curve
    ]
