"""Which layers make a claim fail, by the model's own numbers: found one by one, each time the one that helps most."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import pandas as pd

from ...base import stats
from ...report.tables import Column, Tables, table
from ...report.verdicts import threshold

MOST = 6  # layers that are left out at most

EXCEPTIONS = table(
    "model claim kind corpus",
    Column("value", "Value", ".2f"), Column("layers", "Layers that make it fail"), Column("without", "Without them", ".2f"),
)  # fmt: skip


def exception_rows(own: Tables, others: Mapping[str, Tables]) -> Iterator[dict]:
    """Of claims about importance: for each kind the corpus (or pair) on which the claim fails by most, by its number alone.

    Of claims about dropping: where attention does worse than another kind in the tasks, by the number alone, the dropped
    attention layer that costs most when it is dropped alone.
    """
    models = list(own["models"]["model"])
    if tables := others["01_similarity"]:
        for model in (model for model in models if model in set(tables["importance"]["model"])):
            rows = tables["importance"][tables["importance"]["model"] == model]
            grid = {
                kind: of_kind.pivot(index="corpus", columns="layer", values="importance")
                for kind, of_kind in rows.groupby("kind", sort=False)
            }
            for row in (*_deeper(grid), *_attention(grid), *_corpora(grid)):
                yield {"model": model} | row
    if tables := others["02_drop_curves"]:
        yield from _costliest(own, {name: rows[rows["model"].isin(models)] for name, rows in tables.items() if "model" in rows})


def _deeper(grid: dict[str, pd.DataFrame]) -> Iterator[dict]:
    limit = threshold("deeper_more_redundant", "correlation")
    for kind, values in grid.items():
        depth = np.arange(values.shape[1])
        numbers = {corpus: partial(_correlation, depth, values.loc[corpus].to_numpy()) for corpus in values.index}
        yield from _worst("deeper-more-redundant", kind, numbers, depth[:-1], limit, sign=1)


def _attention(grid: dict[str, pd.DataFrame]) -> Iterator[dict]:
    for other in ("mlp", "block"):
        difference = grid["attention"] - grid[other]
        numbers = {corpus: partial(_mean, difference.loc[corpus].to_numpy()) for corpus in difference.index}
        yield from _worst("attention-most-redundant", other, numbers, np.arange(difference.shape[1]), 0.0, sign=1)


def _corpora(grid: dict[str, pd.DataFrame]) -> Iterator[dict]:
    limit = threshold("corpus_does_not_matter", "correlation")
    for kind, values in grid.items():
        pairs = itertools.combinations(values.index, 2)
        numbers = {f"{a} and {b}": partial(_correlation, values.loc[a].to_numpy(), values.loc[b].to_numpy()) for a, b in pairs}
        yield from _worst("corpus-does-not-matter", kind, numbers, np.arange(values.shape[1]), limit, sign=-1)


def _correlation(a: np.ndarray, b: np.ndarray, layers: np.ndarray) -> float:
    return float(stats.rank_correlation(a[layers], b[layers]))


def _mean(values: np.ndarray, layers: np.ndarray) -> float:
    return float(values[layers].mean())


Number = Callable[[np.ndarray], float]  # of some layers


def _worst(claim: str, kind: str, numbers: Mapping[str, Number], layers: np.ndarray, limit: float, sign: int) -> Iterator[dict]:
    """The row of the corpus with the worst number, if that is on the wrong side of the limit: above it for a sign of 1."""
    if not numbers or not len(layers):
        return
    corpus = max(numbers, key=lambda name: sign * numbers[name](layers))
    if sign * numbers[corpus](layers) > sign * limit:
        left_out, without = fewest(numbers[corpus], layers, limit, sign)
        yield {"claim": claim, "kind": kind, "corpus": corpus, "value": numbers[corpus](layers),
               "layers": " ".join(map(str, sorted(left_out))), "without": without}  # fmt: skip


def fewest(number: Number, layers: np.ndarray, limit: float, sign: int) -> tuple[list[int], float]:
    """Leave out layers one by one, each time the one that helps most, until the number of the others is not beyond the limit.

    sign: 1 if numbers above the limit are beyond it, -1 if those below. At most `MOST` layers are left out.
    """
    kept, left_out = list(layers), list[int]()
    while sign * number(np.array(kept)) > sign * limit and len(left_out) < MOST and len(kept) > 3:
        best = min(kept, key=lambda layer: sign * number(np.array([other for other in kept if other != layer])))
        kept.remove(best)
        left_out.append(int(best))
    return left_out, number(np.array(kept))


def _costliest(own: Tables, tables: Tables) -> Iterator[dict]:
    """Where attention does worse than another kind at equal n: the dropped layer that costs most alone, and how much."""
    gaps = tables["gaps"].query("kind == 'attention' and difference < 0 and measure == 'tasks'")
    damage = own["layers"].set_index(["model", "layer"])["kl"]
    plans = tables["plans"].set_index(["model", "kind", "n"])["attention"]
    for row in gaps.to_dict("records"):
        layers = [int(layer) for layer in plans[row["model"], "attention", row["n"]].split()]
        alone = damage[row["model"]].loc[layers]
        yield {"model": row["model"], "claim": "attention-beats-mlp-and-block", "kind": f"{row['other']}-{row['n']}",
               "corpus": "tasks", "value": row["difference"], "layers": str(alone.idxmax()), "without": np.nan}  # fmt: skip
