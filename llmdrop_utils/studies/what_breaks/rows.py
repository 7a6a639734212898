"""Notebook 08, from scores to rows: what each ability is worth with layers dropped, and which is the first to go."""

import re
from collections.abc import Sequence

import numpy as np

from ...base import stats
from ...measure.confidence import binned_gaps, calibration_error
from ..curve_rows import KEEP, furthest, share_of_dense, tried_of
from ..work import Cell
from .abilities import Ability, Pooled

GRAM = 4  # tokens in a row that count as repeated if they were written before


def ability_rows(abilities: Sequence[Ability]) -> list[dict]:
    """The mean score of each ability in each cell, and the share of the dense model's, above guessing, that is retained."""
    rows = []
    for ability in abilities:
        mean, draws = ability.scores.mean(0), ability.draws
        low, high = stats.interval(draws, ability.n)
        retained, drawn = (share_of_dense(values, ability.chance) for values in (mean, draws))
        if not has_something(ability):
            retained, drawn = np.full_like(retained, np.nan), np.full_like(drawn, np.nan)
        retained_low, retained_high = stats.interval(drawn, ability.n)
        for i, cell in enumerate(ability.cells):
            rows.append({"ability": ability.name, "kind": cell.kind, "n": cell.n, "samples": len(ability.scores),
                         "value": mean[i], "low": low[i], "high": high[i], "chance": ability.chance,
                         "retained": retained[i], "retained_low": retained_low[i],
                         "retained_high": retained_high[i]})  # fmt: skip
    return rows


def has_something(ability: Ability) -> bool:
    """Is the dense model above guessing, by the lower end of its interval? Otherwise there is nothing that could be lost."""
    low, _ = stats.interval(ability.draws[:, 0], ability.n)
    return bool(low > ability.chance)


def break_rows(abilities: Sequence[Ability]) -> list[dict]:
    """How many layers of a kind can go before less than 90 % of an ability is retained; what breaks first comes first."""
    rows = []
    for ability in abilities:
        for kind in dict.fromkeys(cell.kind for cell in ability.cells[1:]):
            last = tried_of(ability.cells, kind)[-1]
            row = {"ability": ability.name, "kind": kind, "tried_up_to": last}
            if has_something(ability):
                retained = share_of_dense(np.vstack([ability.scores.mean(0), ability.draws]), ability.chance)
                reach = furthest(retained, ability.cells, kind, KEEP)
                low, high = stats.interval(reach[1:].astype(float), ability.n)
                most = retained[0, list(ability.cells).index(Cell(kind, last))]
                row |= {"n": float(reach[0]), "low": low, "high": high, "retained": most}
            else:
                row |= dict.fromkeys(("n", "low", "high", "retained"), np.nan)
            rows.append(row)
    return sorted(rows, key=lambda row: (row["kind"], np.isnan(row["n"]), row["n"], row["retained"]))


def context_rows(abilities: Sequence[Ability]) -> list[dict]:
    """Accuracy in questions about the context, by its length (paper, Table 12), and the mean over lengths."""
    rows = []
    for probe, group in by_probe(abilities).items():
        named = {ability.context: [ability] for ability in group} | ({"mean": group} if len(group) > 1 else {})
        for context, several in named.items():
            mean, draws, n = mean_of(several)
            low, high = stats.interval(draws, n)
            for i, cell in enumerate(group[0].cells):
                rows.append({"probe": probe, "context": context, "kind": cell.kind, "n": cell.n, "accuracy": mean[i],
                             "low": low[i], "high": high[i], "chance": group[0].chance})  # fmt: skip
    return rows


def mean_of(abilities: Sequence[Ability]) -> tuple[np.ndarray, np.ndarray, float]:
    """The mean score of several abilities with the same cells, its bootstrap, and the fewest samples among them."""
    scores, draws = [ability.scores.mean(0) for ability in abilities], [ability.draws for ability in abilities]
    return np.mean(scores, axis=0), np.mean(draws, axis=0), min(ability.n for ability in abilities)


def by_probe(abilities: Sequence[Ability]) -> dict[str, list[Ability]]:
    """Abilities that are asked for at several lengths of context."""
    found: dict[str, list[Ability]] = {}
    for ability in abilities:
        if ability.context:
            found.setdefault(ability.what, []).append(ability)
    return found


def context_gap_rows(abilities: Sequence[Ability]) -> list[dict]:
    """Accuracy with attention layers dropped minus that with as many MLPs dropped, over all lengths of a probe, paired."""
    rows = []
    for probe, group in by_probe(abilities).items():
        cells = list(group[0].cells)
        mean, draws, n = mean_of(group)
        for i, cell in enumerate(cells):
            other = Cell("mlp", cell.n)
            if cell.kind == "attention" and other in cells:
                j = cells.index(other)
                low, high = stats.interval(draws[:, i] - draws[:, j], n)
                rows.append({"probe": probe, "n": cell.n, "difference": mean[i] - mean[j], "low": low, "high": high,
                             "dense": mean[0], "told": all(has_something(a) for a in group)})  # fmt: skip
    return rows


def confidence_rows(choices: Pooled, cells: Sequence[Cell]) -> list[dict]:
    """Accuracy, mean confidence, and the expected calibration error of the choices in all tasks, in each cell."""
    rows = []
    for i, cell in enumerate(cells):
        sure, hits = choices.confidence[:, i], choices.right[:, i]
        of_documents = np.column_stack([hits, sure, sure - hits, binned_gaps(sure, hits)])
        draws = stats.bootstrap_means(of_documents, np.ones(len(hits)))
        found = {"accuracy": (hits.mean(), draws[:, 0]), "confidence": (sure.mean(), draws[:, 1]),
                 "gap": ((sure - hits).mean(), draws[:, 2]),
                 "error": (calibration_error(sure, hits), np.abs(draws[:, 3:]).sum(1))}  # fmt: skip
        row = {"kind": cell.kind, "n": cell.n, "documents": len(hits)}
        for name, (value, drawn) in found.items():
            low, high = stats.interval(drawn, len(hits))
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def generation_rows(written: np.ndarray, cells: Sequence[Cell]) -> list[dict]:
    """How much of what a model writes repeats itself, and how far it writes what the dense model does.

    written: token ids (n_cells, n_prompts, new_tokens), the dense model first.
    """
    repeated = np.array([[repetition(text) for text in of_cell] for of_cell in written.tolist()]).T
    same = (written == written[:1]).cumprod(-1).mean(-1).T  # up to the first difference
    rows = []
    columns = {"repeated": repeated, "same": same, "more": repeated - repeated[:, :1]}
    n = stats.independent(len(repeated))
    ends = {name: stats.interval(stats.text_means(values, np.ones(len(values))), n) for name, values in columns.items()}
    for i, cell in enumerate(cells):
        row = {"kind": cell.kind, "n": cell.n, "prompts": len(repeated)}
        for name, values in columns.items():
            row |= {name: values[:, i].mean(), f"{name}_low": ends[name][0][i], f"{name}_high": ends[name][1][i]}
        rows.append(row)
    return rows


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that were written before: 1 2 3 4 1 2 3 4 has 5 runs, of which the last repeats: 0.2."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answer_rows(texts: Sequence[str], cells: Sequence[Cell]) -> list[dict]:
    """What a model gives as the answer to a word problem (Table 10): the marked number, or else the last that it writes."""
    rows = []
    for text, cell in zip(texts, cells, strict=True):
        text = text.split("\nQuestion:")[0].split("\n\n")[0].strip()
        marked = re.search(r"#### *(-?[\d.,]*\d)", text)
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        last = marked[1] if marked else numbers[-1] if numbers else None
        rows.append({"kind": cell.kind, "n": cell.n, "answer": float(last.replace(",", "")) if last else np.nan,
                     "marked": bool(marked), "text": " ".join(text.split())[-120:]})  # fmt: skip
    return rows
