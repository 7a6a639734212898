"""Where a run has each of the paper's numbers: `RULES`, by groups of identifiers in data/paper_claims.json.

A rule names a table and values of its keys. What a run does not have is not compared; the reason says what would run it.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..report.tables import read_tables
from ..report.verdicts import load_claims
from ..sources.task_data import known_tasks
from . import paper
from .run import STUDIES
from .speedup.generation import GENERATION


class NotRun(Exception):
    """Why a number is not compared: `args` are a key of `WHY` in numbers.py, and a sentence on what would run it."""


class Ours(NamedTuple):
    """A number of a run in the paper's unit, with its 95 % interval (NaN: none), and the table that it was read from."""

    value: float
    low: float
    high: float
    source: str


# ---- what a run has ---------------------------------------------------------------------------------------------------


class RunTables:
    """The tables of a run, and under which names they have the paper's models."""

    def __init__(self, folder: Path):
        """folder: <notebook>/*.csv and <notebook>/provenance.json, which says which model a name stands for."""
        self.tables = {path.name: read_tables(path) for path in sorted(folder.glob("*")) if path.is_dir()}
        self._indexes: dict[tuple, dict[tuple, dict[str, Any]]] = {}
        self.names: dict[str, dict[str, None]] = {}
        for record in folder.glob("*/provenance.json"):
            for entry in json.loads(record.read_text(encoding="utf-8")):
                if known := paper.name_in_catalogue(entry["model"], entry.get("model_identity", "")):
                    self.names.setdefault(known, {})[entry["model"]] = None

    def row(self, place: str, of: str | None = None, **where: Any) -> dict[str, Any]:
        """The first row with these values. Raises NotRun if there is none.

        place: "<notebook>/<table>". of: a model as data/sources.yaml names it.
        """
        notebook, table = place.split("/")
        if notebook not in STUDIES:
            raise NotRun("table", f"notebook {notebook} is not written yet")
        if not {*where} <= {column.name for column in STUDIES[notebook].tables.get(table, ())}:
            raise NotRun("table", f"notebook {notebook} has no table {table!r} with {', '.join(where)} yet")
        needs = NotRun("model", f"needs {of}: make reproduce PROFILE=gpu{_only(of, notebook)}")
        if of and of not in self.names:
            raise needs
        if table not in self.tables.get(notebook, {}):
            raise NotRun("notebook", f"notebook {notebook} was not run: make reproduce NOTEBOOKS={notebook[:2]}")
        names: list[tuple] = [(name,) for name in self.names[of] if (name,) in self._index(place, ("model",))] if of else [()]
        if not names:  # it is in other notebooks alone: a shape with random weights has no quality
            raise needs
        rows = self._index(place, (*(["model"] if of else []), *where))
        found = [rows[key] for name in names if (key := (*name, *where.values())) in rows]
        if not found:
            named = ", ".join(f"{column} {value}" for column, value in where.items())
            raise NotRun("row", f"{place} has no row for {named}: add it to the profile")
        return found[0]

    def _index(self, place: str, columns: tuple[str, ...]) -> dict[tuple, dict[str, Any]]:
        """Values of these columns -> the first row that has them. Made once, since hundreds of numbers are looked up."""
        if (place, columns) not in self._indexes:
            notebook, table = place.split("/")
            rows = self.tables[notebook][table].to_dict("records")
            self._indexes[place, columns] = {tuple(row[c] for c in columns): row for row in reversed(rows)}
        return self._indexes[place, columns]

    def read(self, place: str, column: str, factor: float = 1, of: str | None = None, **where: Any) -> Ours:
        """A cell of `row` and its interval, times `factor`."""
        row = self.row(place, of, **where)
        ends = ("low", "high") if "low" in row else (f"{column}_low", f"{column}_high")
        value, low, high = (factor * row.get(name, np.nan) for name in (column, *ends))
        if np.isnan(value):
            raise NotRun("row", f"{place} could not say: its {column} is empty")
        return Ours(value, low, high, place)


def _only(model: str | None, notebook: str) -> str:
    """What to add to the command for a model that no profile has."""
    return f" MODEL={hub} NOTEBOOKS={notebook[:2]}" if (hub := paper.OF_ONE_TABLE.get(model or "")) else ""


# ---- rules: (run, claim) -> ours ----------------------------------------------------------------------------------------

TASKS = {task["table"]: name for name, task in known_tasks().items()}  # by column of the paper's tables
FOUR_TASKS = ("HellaSwag", "MMLU", "OBQA", "WinoGrande")  # of Tables 6 and 7
METRICS = {"accuracy": "acc", "accuracy, length-normalised": "acc_norm", "exact match": "exact_match"}  # of Table 5
KINDS = {"Baseline": "dense", "Attn": "attention", "MLP": "mlp", "Block": "block", "Joint": "joint",
         "Wanda": "attention"}  # at the parameter budget of attention drop  # fmt: skip
PAPERS_GENERATION: dict[str, Any] = {"what": GENERATION, "backend": "eager", "context": 2048, "new_tokens": 2048}


def where_of(claim: dict) -> dict[str, Any]:
    """Model and cell that a number is about: "Attn Drop, AWQ 4-bit" with 8 layers is {kind: attention, n: 8}."""
    kind = KINDS[re.split("[ ,]", claim["method"])[0]]
    return {"of": paper.model_of(claim), "kind": kind, "n": claim["n_drop"]}


def score(run: RunTables, claim: dict, place: str = "02_drop_curves/tasks", task: str = "", **more: Any) -> Ours:
    """A task's score in percent: by the paper's metric and number of examples, since others cannot be compared."""
    name = TASKS[task or claim["what"]]
    known, where = known_tasks()[name], {**where_of(claim), "task": name, **more}
    shots = run.row(place, **where)["num_fewshot"]
    if shots != known["num_fewshot"]:
        raise NotRun("row", f"{name} was measured {shots}-shot; num_fewshot: null in the profile is the paper's number")
    return run.read(place, "value", 100, metric=known["metric"], **where)


def mean(run: RunTables, claim: dict, **more: Any) -> Ours:
    """The mean over the tasks that are printed beside it (in Tables 6 and 7: named). All of them must be measured.

    It is made from the table "tasks": "average" is about all tasks of a run, which may be more or fewer. Tasks share no
    documents, so the squares of their intervals' half-widths add up.
    """
    tasks = [c["what"] for c in paper.numbers() if row_of(c) == row_of(claim) and c["what"] in TASKS] or FOUR_TASKS
    scores = [score(run, claim, task=task, **more) for task in tasks]
    value = float(np.mean([s.value for s in scores]))
    below, above = (np.sqrt(sum((s.value - end) ** 2 for s, end in zip(scores, ends, strict=True))) / len(scores)
                    for ends in ([s.low for s in scores], [s.high for s in scores]))  # fmt: skip
    return Ours(value, value - below, value + above, f"{scores[0].source}, {len(scores)} tasks")


def speedup(run: RunTables, claim: dict, place: str = "05_speedup/speed", **more: Any) -> Ours:
    """Of a generation of 2,048 tokens in and out, dense = 1."""
    return run.read(place, "speedup", **{**PAPERS_GENERATION, **where_of(claim), **more})


def pruned_speedup(run: RunTables, claim: dict) -> Ours:
    """Of decoding alone: zeros are multiplied like other weights, whatever is timed."""
    return run.read("08_what_breaks/speed", "speedup", method="Wanda", **where_of(claim))


def cache(run: RunTables, claim: dict) -> Ours:
    """GiB of keys and values at the batch and length of Table 4, which prints them as GB."""
    return run.read("06_kv_cache/paper", "counted_bytes", 2**-30, model=claim["model"], n=claim["n_drop"])


def shots(run: RunTables, claim: dict) -> Ours:
    """Few-shot examples of a task; the source says whether its metric is the paper's too."""
    name, metric = TASKS[claim["id"].split(".")[1]], METRICS[claim["what"].split("metric = ")[1]]
    row = run.row("02_drop_curves/tasks", task=name)
    same = "the paper's metric" if row["metric"] == metric else f"not the paper's metric {metric}"
    return Ours(row["num_fewshot"], np.nan, np.nan, f"02_drop_curves/tasks, {row['metric']}: {same}")


def long_context(run: RunTables, claim: dict) -> Ours:
    """Percent correct at one length of context ("2k"), or the mean over all ("mean")."""
    asked = where_of(claim) | {"probe": "banking77", "context": claim["id"].rpartition(".")[2]}
    return run.read("08_what_breaks/long_context", "accuracy", 100, **asked)


def answer(run: RunTables, claim: dict) -> Ours:
    """The number that a model gives as its answer."""
    return run.read("08_what_breaks/answers", "answer", **where_of(claim) | ({} if claim["n_drop"] else {"kind": "dense"}))


# ---- numbers of the text, which follow from those of a row: "T1.Llama-2-13B.Attn-8" ----------------------------------------


def row_of(claim: dict) -> str:
    """ "T1.Llama-2-13B.Attn-8.Avg" -> "T1.Llama-2-13B.Attn-8"."""
    return claim["id"].rpartition(".")[0]


def number(run: RunTables, identifier: str) -> Ours:
    """Ours of another number."""
    (claim,) = (claim for claim in paper.numbers() if claim["id"] == identifier)
    return look_up(run, claim)


def with_dense(run: RunTables, row: str) -> tuple[Ours, Ours]:
    """The mean scores of a row and of the dense model."""
    return number(run, f"{row}.Avg"), number(run, f"{row.rpartition('.')[0]}.Baseline.Avg")


def lost(run: RunTables, claim: dict, row: str) -> Ours:
    """Points of the mean score that a row loses. The run's tables pair other tasks, so there is no interval."""
    dropped, dense = with_dense(run, row)
    return Ours(dense.value - dropped.value, np.nan, np.nan, dropped.source)


def kept(run: RunTables, claim: dict, rows: list[str]) -> Ours:
    """Percent of the dense model's mean score that a row keeps; of several rows, the least."""
    pairs = [with_dense(run, row) for row in rows]
    return Ours(min(100 * dropped.value / dense.value for dropped, dense in pairs), np.nan, np.nan, pairs[0][0].source)


def gained(run: RunTables, claim: dict, row: str) -> Ours:
    """Percent by which a row is faster."""
    times = number(run, f"{row}.SpeedUp")
    return Ours(100 * (times.value - 1), 100 * (times.low - 1), 100 * (times.high - 1), times.source)


def sdr(run: RunTables, claim: dict) -> Ours:
    """Points lost per percent of speed-up (eq. 7, as the paper computes it)."""
    points, faster = lost(run, claim, row_of(claim)), gained(run, claim, row_of(claim))
    if not faster.value > 0:
        raise NotRun("row", "there is no speed-up to divide by")
    return Ours(points.value / faster.value, np.nan, np.nan, f"{points.source}; {faster.source}")


def fastest(run: RunTables, claim: dict) -> Ours:
    """The largest speed-up of attention drop in Table 1, in percent, with more than 95 % of the mean score kept."""
    rows = dict.fromkeys(row_of(c) for c in paper.numbers("T1") if c["method"] == "Attn Drop")
    found = [gained(run, claim, row) for row in rows if kept(run, claim, [row]).value > 95]
    if not found:
        raise NotRun("row", "no row of Table 1 keeps more than 95 % in this run")
    return max(found)


def quantised(run: RunTables, claim: dict) -> Ours:
    """The most points of the mean score that quantising costs in Table 11."""
    rows = dict.fromkeys(row_of(c).rpartition(".")[0] for c in paper.numbers("T11"))
    pairs = [[number(run, f"{row}.{bits}.mean_of_4_tasks") for bits in ("q", "fp")] for row in rows]
    return Ours(max(full.value - less.value for less, full in pairs), np.nan, np.nan, pairs[0][0].source)


def joint_mmlu(run: RunTables, claim: dict) -> Ours:
    """Percent of the dense model's MMLU that a joint drop keeps."""
    joint, dense = (score(run, c, "03_joint_drop/tasks", "MMLU") for c in (claim, claim | {"method": "Baseline", "n_drop": 0}))
    return Ours(100 * joint.value / dense.value, np.nan, np.nan, joint.source)


def first_mlp(run: RunTables, claim: dict) -> Ours:
    return run.read("03_joint_drop/first_mlp", "attention_before", of=paper.model_of(claim))


def cache_share(run: RunTables, claim: dict) -> Ours:
    """Percent by which the cache of Table 4 shrinks."""
    row = run.row("06_kv_cache/paper", model=claim["model"], n=claim["n_drop"])
    return Ours(100 * (1 - row["counted_bytes"] / row["dense_bytes"]), np.nan, np.nan, "06_kv_cache/paper")


def weights(run: RunTables, claim: dict) -> Ours:
    """GiB of a model's weights in 16 bit."""
    return run.read("06_kv_cache/fits", "weights_bytes", 2**-30, model=paper.model_of(claim), n=0)


def statement(run: RunTables, claim: dict) -> Ours:
    rules = [c["id"] for c in load_claims() if claim["id"].startswith(tuple(c["paper"]))]
    raise NotRun("statement", f"a statement, judged by the rule {' and '.join(rules)}")


# ---- which rule belongs to which numbers --------------------------------------------------------------------------------

RULES: list[tuple[str, Callable[[RunTables, dict], Ours] | NotRun]] = [  # the first pattern that fits the identifier counts
    (r"T[123]\..*\.SpeedUp", speedup),
    (r"T[123]\..*\.SDR", sdr),
    (r"T[123]\..*\.Avg", mean),
    (r"T[123]\..*", score),
    (r"T4\..*", cache),
    (r"T5\..*", shots),
    # The caption of Table 6 names another model than the one whose means of Tables 1 and 9 it prints.
    (r"T6\..*\.wres", partial(mean, of="llama-2-13b")),
    (r"T6\..*\.wores", partial(mean, place="04_ablations/tasks", of="llama-2-13b", method="without residual")),
    (r"T7\.Cosine\..*", mean),
    (r"T7\.Random\..*", partial(mean, place="04_ablations/tasks", method="random")),
    (r"T7\.Reverse\..*", partial(mean, place="04_ablations/tasks", method="reverse order")),
    (r"T7\.Relative\..*", partial(mean, place="04_ablations/tasks", method="relative magnitude")),
    (r"T8\..*", NotRun("unlabelled", "Table 8 does not say how many sub-layers were dropped")),
    (r"T9\.Attn.*\.speedup", speedup),
    (r"T9\.Attn.*\.mean_of_4_tasks", mean),
    (r"T9\.Attn.*", score),
    (r"T9\.Wanda.*\.speedup", pruned_speedup),
    (r"T9\.Wanda.*\.mean_of_4_tasks", partial(mean, place="08_what_breaks/tasks", method="Wanda")),
    (r"T9\.Wanda.*", partial(score, place="08_what_breaks/tasks", method="Wanda")),
    (r"T10\..*", answer),
    (r"T11\..*\.fp\.mean_of_4_tasks", mean),
    (r"T11\..*\.fp\..*", score),
    (r"T11\..*\.q\.mean_of_4_tasks", partial(mean, place="08_what_breaks/tasks", method="4 bits")),
    (r"T11\..*\.q\..*", partial(score, place="08_what_breaks/tasks", method="4 bits")),
    (r"T12\..*", long_context),
    (r"F9\.One-shot\..*\.mean_of_4_tasks", mean),
    (r"F9\.One-shot\..*", score),
    (r"F9\.Iterative\..*\.mean_of_4_tasks", partial(mean, place="03_joint_drop/iterative_tasks")),
    (r"F9\.Iterative\..*", partial(score, place="03_joint_drop/iterative_tasks")),
    (r"X\.abs\.70b\.speedup", partial(gained, row="T3.Llama-2-70B.Attn-40")),
    (r"X\.abs\.70b\.drop", partial(lost, row="T3.Llama-2-70B.Attn-40")),
    (r"TMLR\.speedup", partial(gained, row="T2.Llama-3-70B.Attn-40")),
    (r"TMLR\.drop", partial(lost, row="T2.Llama-3-70B.Attn-40")),
    (r"X\.block4\.13b", partial(lost, row="T1.Llama-2-13B.Block-4")),
    (r"X\.block8\.13b", partial(lost, row="T1.Llama-2-13B.Block-8")),
    (r"X\.mlp4\.13b", partial(lost, row="T1.Llama-2-13B.MLP-4")),
    (r"X\.mlp8\.13b", partial(lost, row="T1.Llama-2-13B.MLP-8")),
    (r"X\.99at8", partial(kept, rows=["T1.Llama-2-13B.Attn-8", "T1.Mistral-7B.Attn-8"])),
    (r"X\.40at95", fastest),
    (r"X\.quant", quantised),
    (r"X\.joint31", joint_mmlu),
    (r"X\.joint\.first\..*", first_mlp),
    (r"X\.kv50", cache_share),
    (r"X\.size", weights),
    (r"X\.(seq|samples)", NotRun("setting", "a setting, which the profile has under calibration")),
    (r"(X|TMLR)\..*", statement),
    (r"PTM?\..*", NotRun("unlabelled", "a figure file whose model or task is not labelled")),
]


def look_up(run: RunTables, claim: dict) -> Ours:
    """Ours of a number, by the rule of its identifier. Raises NotRun if the run does not have it."""
    rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, claim["id"]))
    if isinstance(rule, NotRun):
        raise NotRun(*rule.args)
    return rule(run, claim)
