"""Notebook 08: which ability breaks first as layers are dropped, and what dropping is worth beside other ways to shrink."""

import numpy as np

from ...base.errors import NotAvailable
from ...measure.importance import Importance
from ...models.load import load_tokenizer
from ...report.tables import Column, Key, Tables, table
from ...selection.ranking import drop_sequence
from .. import paper
from ..ablations.rows import TEXT, task_rows
from ..curve_rows import SCORE
from ..curves import Tasks, Text, rank_layers, under_plans
from ..profile import Calibration
from ..run import Run, importance_work, study
from ..work import ImportanceWork
from .abilities import Asked, WhatBreaks, abilities_of, ask, pooled
from .change_rows import change_rows, pruned_rows, ranking_rows, recovered_rows, speed_rows
from .changes import Changes
from .rows import (
    ability_rows,
    answer_rows,
    break_rows,
    confidence_rows,
    context_gap_rows,
    context_rows,
    generation_rows,
)
from .shrinking import Shrunk, bytes_of, measures_of, shrink, sparsities_of

DROPPED = Key("n", "Dropped", "d")
TABLES = {
    "abilities": table(
        "model ability kind", DROPPED, Column("samples", "Samples", "d"), Column("value", "Score", ".3f", "low", "high"),
        "low high", Column("chance", "By guessing", ".3f"),
        Column("retained", "Retained", ".0%", "retained_low", "retained_high"), "retained_low retained_high",
    ),
    "breaks": table(
        "model ability kind", Column("n", "Retains 90 % up to", ".0f", "low", "high"), "low high",
        Column("tried_up_to", "Tried up to", "d"), Column("retained", "Retained there", ".0%"),
    ),
    "generation": table(
        "model kind", DROPPED, Column("prompts", "Prompts", "d"),
        Column("repeated", "Repeated runs of 4 tokens", ".0%", "repeated_low", "repeated_high"), "repeated_low repeated_high",
        Column("more", "More than dense", "+.0%", "more_low", "more_high"), "more_low more_high",
        Column("same", "As dense up to the first difference", ".0%", "same_low", "same_high"), "same_low same_high",
    ),
    "confidence": table(
        "model kind", DROPPED, Column("documents", "Documents", ",d"),
        Column("accuracy", "Accuracy", ".1%", "accuracy_low", "accuracy_high"), "accuracy_low accuracy_high",
        Column("confidence", "Confidence", ".1%", "confidence_low", "confidence_high"), "confidence_low confidence_high",
        Column("gap", "Confidence above accuracy", "+.1%", "gap_low", "gap_high"), "gap_low gap_high",
        Column("error", "Calibration error", ".1%", "error_low", "error_high"), "error_low error_high",
    ),
    "long_context": table(
        "model", Key("probe", "Question"), Key("context", "Tokens read"), "kind", DROPPED,
        Column("accuracy", "Found", ".1%", "low", "high"), "low high", Column("chance", "By guessing", ".1%"),
    ),
    "context_gaps": table(
        "model", Key("probe", "Question"), DROPPED, Column("difference", "Attention minus MLP", "+.1%", "low", "high"),
        "low high", Column("dense", "Dense", ".1%"), Column("told", "Above guessing"),
    ),
    "answers": table(
        "model kind", DROPPED, Column("answer", "Answer", ".6g"), Column("marked", "Marked as answer"),
        Column("text", "It ends"),
    ),
    "changes": table(
        "model change kind", DROPPED, "measure", Column("bytes", "Bytes of weights", ",d"),
        Column("value", "Value", ".3f", "low", "high"), "low high",
        Column("from_dense", "More than dense", "+.3f", "from_dense_low", "from_dense_high"), "from_dense_low from_dense_high",
        Column("cost", "By the change alone", "+.3f", "cost_low", "cost_high"), "cost_low cost_high",
    ),
    "tasks": table(
        "model task kind", DROPPED, "method metric", Column("num_fewshot", "Shots", "d"),
        Column("documents", "Documents", ",d"), SCORE, "low high", Column("chance", "By guessing", ".3f"),
    ),
    "pruned": table(
        "model", DROPPED, "measure", Column("sparsity", "Weights pruned", ".1%"),
        Column("difference", "Attention dropped minus pruned", "+.3f", "low", "high"), "low high",
    ),
    "recovered": table(
        "model kind", DROPPED, "measure", Column("lost", "Lost by dropping", ".3f"),
        Column("gained", "Gained by tuning", ".3f"), Column("dense_gained", "Gained by the dense model", ".3f"),
        Column("recovered", "Share regained", ".0%", "low", "high"), "low high",
    ),
    "speed": table(
        "model method kind", DROPPED, Column("milliseconds", "Milliseconds a token", ".1f"),
        Column("speedup", "Speed-up", ".2f", "low", "high"), "low high", Column("repeats", "Repeats", "d"),
    ),
    "rankings": table(
        "model change", DROPPED, Column("shared", "Layers in common", "d"), Column("correlation", "Rank correlation", ".2f"),
    ),
    "paper": table(
        Key("where", "Table"), "model", Key("method", "What"), DROPPED, Key("what", "Measure"),
        Column("paper", "In the paper", ".2f"),
    ),
}  # fmt: skip


@study("08_what_breaks", needs=[Calibration, Text, Tasks, WhatBreaks], tables=TABLES)
def what_breaks(run: Run) -> Tables:
    """Notebook 08: abilities with attention layers and with MLPs dropped."""
    scoring, tasks = rank_layers(run)
    choices = {name: members for name, members in tasks.items() if members[0].OUTPUT_TYPE == "multiple_choice"}
    asked: list[Asked] = []
    shrunk: list[Shrunk] = []
    for item in scoring:
        with run.one_of(item.model):
            scores = run.importance(item).first(run.section(Calibration).n_samples)
            asked.append(ask(run, item, _others(run, item), scores, choices))
        if Changes not in run.profile.sections:
            continue
        with run.one_of(item.model):
            shrunk.append(shrink(run, item, scores, choices))
    run.measure([work for each in asked for work in each.work])
    run.measure([work for each in shrunk for work in each.work], several=True, what="{}, changed weights")
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
    of_abilities = [each for each in asked if each.item.model.name not in run.not_run]
    of_changes = [each for each in shrunk if f"{each.item.model.name}, changed weights" not in run.not_run]
    found = [(each.item.model, _rows(run, each)) for each in of_abilities]
    found += [(each.item.model, _changed_rows(run, each)) for each in of_changes]
    for model, several in found:
        for name, rows in several.items():
            tables[name] += [{"model": model.name} | row for row in rows]
    tables["paper"] = paper_rows()
    if not tables["abilities"]:
        raise NotAvailable("Nothing could be measured:\n" + "\n".join(run.not_run.values()))
    work = [*(w for each in of_abilities for w in each.work), *(w for each in of_changes for w in each.work)]
    return run.write(tables, run.measured([*scoring, *work]))


def _others(run: Run, item: ImportanceWork) -> list[ImportanceWork]:
    """The same model on the other corpora, whose held-out text is read."""
    return importance_work(item.model, run.corpora(), run.profile)[1:]


def _rows(run: Run, asked: Asked) -> dict[str, list[dict]]:
    choices, cells = pooled(run, asked), list(asked.plans)
    abilities = abilities_of(run, asked, choices)
    written = [value["tokens"] for value in under_plans(run, asked.generation, asked.plans.values())]
    rows = {
        "abilities": ability_rows(abilities),
        "breaks": break_rows(abilities),
        "generation": generation_rows(np.array(written), cells),
        "long_context": context_rows(abilities),
        "context_gaps": context_gap_rows(abilities),
    }
    if choices:
        rows["confidence"] = confidence_rows(choices, cells)
    if asked.first_answer:
        tokenizer = load_tokenizer(asked.item.model)
        values = under_plans(run, asked.first_answer, asked.answer_plans.values())
        texts = [tokenizer.decode(value["tokens"][0], skip_special_tokens=True) for value in values]
        rows["answers"] = answer_rows(texts, list(asked.answer_plans))
    return rows


def _changed_rows(run: Run, shrunk: Shrunk) -> dict[str, list[dict]]:
    settings = run.section(Changes)
    measures, tasks = measures_of(run, shrunk)
    scores = run.importance(shrunk.item).first(settings.n_samples)
    orders = {name: drop_sequence(Importance.from_json(run.values(work)[0], shrunk.item.model.identity), "attention")
              for name, work in shrunk.rankings.items()}  # fmt: skip
    indices = {name: [index for _, index in order] for name, order in orders.items()}
    plain = [index for _, index in drop_sequence(scores, "attention")]
    return {
        "changes": change_rows(measures, bytes_of(shrunk, settings.bits)),
        "tasks": task_rows(tasks, list(measures[TEXT].arms)),
        "pruned": pruned_rows(measures, sparsities_of(shrunk)),
        "recovered": recovered_rows(measures),
        "speed": speed_rows(shrunk.timed, run.values(shrunk.speed)[0]),
        "rankings": ranking_rows(plain, indices, settings.n_drop),
    }


def paper_rows() -> list[dict]:
    """The paper's own numbers of Tables 9 to 12 and of the figure on tuning in its repository: means where it has them."""
    rows = []
    for claim in (claim for group in ("T9", "T11", "T12", "PT") for claim in paper.numbers(group)):
        if any(word in claim["what"] for word in ("mean", "speedup", "average")):
            what = claim["what"].split(", ")[-1]
            rows.append({"where": claim["where"], "model": claim["model"], "method": claim["method"],
                         "n": claim["n_drop"] or 0, "what": what, "paper": claim["value"]})  # fmt: skip
    return rows
