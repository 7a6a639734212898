"""Notebook 12, from values to rows: what embeddings keep, and what can still be found by them. Plans share their samples."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ...base import stats
from ...report.tables import Tables
from ..work import DENSE_CELL, Cell
from .work import NEAREST, RANK

MEAN = "mean"  # over the data sets of a model
FINDING = {"text": RANK, "images": NEAREST}  # by which kinds are compared, by what a model reads


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A measure under every plan, the dense model first: values (n_cells,), and their bootstrap (REPEATS, n_cells)."""

    values: np.ndarray
    draws: np.ndarray
    n: int  # groups of samples that are drawn
    samples: int
    chance: float  # its value by guessing

    def row(self, i: int) -> dict:
        """The value of one plan, and what it retains of what the dense model has above guessing."""
        above = np.vstack([self.values, self.draws]) - self.chance
        dense = np.where(above[:, 0] > 0, above[:, 0], np.nan)
        kept = above[:, i] / dense
        low, high = stats.interval(self.draws[:, i], self.n)
        kept_low, kept_high = stats.interval(kept[1:], self.n)
        return {
            "samples": self.samples, "chance": self.chance, "value": self.values[i], "low": low, "high": high,
            "retained": kept[0], "retained_low": kept_low, "retained_high": kept_high,
        }  # fmt: skip

    def minus(self, i: int, j: int) -> dict:
        """One plan minus another on the same samples."""
        low, high = stats.interval(self.draws[:, i] - self.draws[:, j], self.n)
        return {"difference": self.values[i] - self.values[j], "low": low, "high": high}


Measures = Mapping[str, Mapping[str, Drawn]]  # measure -> data set -> what was measured


def drawn(values: Sequence[Sequence[float]], groups: np.ndarray, chance: float, seed: int) -> Drawn:
    """The mean over samples of each plan's values (n_cells, n_samples), and its bootstrap.

    Samples of one group (crops of one photograph) are drawn together: groups of 3 and 1 samples with values 1 1 0 and 0 have
    means 2/3 and 0 and weights 3 and 1, so that the mean of all is 1/2.
    """
    rows = np.array(values, dtype=np.float64).T
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.zeros((len(sizes), rows.shape[1]))
    np.add.at(means, group, rows)
    means /= sizes[:, None]
    return Drawn(rows.mean(0), stats.bootstrap_means(means, sizes, seed), len(sizes), len(rows), chance)


def measures_of(parts: Mapping[str, tuple[Sequence[dict], np.ndarray, Mapping[str, float]]]) -> Measures:
    """All measures on each data set, and as the mean of them. parts: data set -> a value for each plan, groups, chances."""
    found: dict[str, dict[str, Drawn]] = {}
    for seed, (name, (values, groups, chances)) in enumerate(parts.items()):  # data sets share no samples
        for measure in values[0]:
            of_plans = [value[measure] for value in values]
            found.setdefault(measure, {})[name] = drawn(of_plans, groups, chances.get(measure, 0.0), seed)
    for of_measure in found.values():
        each = list(of_measure.values())
        of_measure[MEAN] = Drawn(
            np.mean([one.values for one in each], 0),
            np.mean([one.draws for one in each], 0),
            min(one.n for one in each),
            sum(one.samples for one in each),
            float(np.mean([one.chance for one in each])),
        )
    return found


def quality_rows(cells: Sequence[Cell], measures: Measures, n_layers: int) -> list[dict]:
    """Every measure on every data set, and as their mean, under every plan."""
    return [
        {"data": data, "measure": measure, "kind": cell.kind, "n": cell.n, "share": cell.n / n_layers} | one.row(i)
        for measure, several in measures.items() for data, one in several.items() for i, cell in enumerate(cells)
    ]  # fmt: skip


def gap_rows(cells: Sequence[Cell], measures: Measures, n_layers: int) -> list[dict]:
    """Without n attention layers minus without n MLPs, or blocks, as a mean over data sets."""
    return [
        {"measure": measure, "other": other, "n": cell.n, "share": cell.n / n_layers}
        | several[MEAN].minus(i, cells.index(Cell(other, cell.n)))
        for measure, several in measures.items() for i, cell in enumerate(cells) if cell.kind == "attention"
        for other in ("mlp", "block")
    ]  # fmt: skip


def half_rows(cells: Sequence[Cell], measures: Measures, n_layers: int) -> list[dict]:
    """Half of the attention layers dropped beside half of the MLPs, as a mean over data sets; nothing if that was not tried."""
    n = n_layers // 2
    if Cell("attention", n) not in cells:
        return []
    dense, attention, mlp = (cells.index(cell) for cell in (DENSE_CELL, Cell("attention", n), Cell("mlp", n)))
    rows = []
    for measure, several in measures.items():
        mean = several[MEAN]
        row = {"measure": measure, "n": n, "chance": mean.chance, "dense": mean.values[dense]}
        for kind, i in (("attention", attention), ("mlp", mlp)):
            of_kind = mean.row(i)
            row |= {kind: of_kind["value"], f"{kind}_low": of_kind["low"], f"{kind}_high": of_kind["high"]}
        rows.append(row | mean.minus(attention, mlp))
    return rows


# ---- the decoder beside them ----------------------------------------------------------------------------------------------


def decoder_rows(tables: Tables) -> list[dict]:
    """Importance in the first decoder of a run, on its first corpus. tables: of notebook 01, empty if it was not run."""
    if not tables:
        return []
    rows = tables["importance"]
    rows = rows[(rows["model"] == rows["model"].iloc[0]) & (rows["corpus"] == rows["corpus"].iloc[0])]
    return rows[["model", "kind", "layer", "importance", "low", "high"]].to_dict("records")


def decoder_quality_rows(tables: Tables) -> list[dict]:
    """What it retains of its next-token accuracy on held-out text. tables: of notebook 02, empty if it was not run."""
    if not tables:
        return []
    rows, n_layers = tables["text"], tables["models"]["n_layers"].iloc[0]
    rows = rows[(rows["model"] == tables["models"]["model"].iloc[0]) & (rows["corpus"] == rows["corpus"].iloc[0])]
    rows = rows[rows["kind"].isin(["dense", "attention", "mlp", "block"])].assign(share=rows["n"] / n_layers)
    return rows[["model", "kind", "n", "share", "retained", "retained_low", "retained_high"]].to_dict("records")
