"""The paper's printed numbers as the tables of our studies, as if a run had measured them: what every rule can be fed."""

import json

import numpy as np
import pandas as pd

from llmdrop_utils.base.files import ROOT
from llmdrop_utils.report.tables import Tables
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.sources.task_data import known_tasks
from llmdrop_utils.studies.curve_rows import KEEP
from llmdrop_utils.studies.run import NOT_RUN, STUDIES
from llmdrop_utils.studies.sizes_and_causes.compare import compared
from llmdrop_utils.studies.sizes_and_causes.study import READ
from llmdrop_utils.studies.speedup.generation import GENERATION
from llmdrop_utils.studies.speedup.trade import pair_rows

PAPER = json.loads((ROOT / "data" / "paper_claims.json").read_text(encoding="utf-8"))
MODELS = {"Mistral-7B": "mistral-7b-v0.1", "Llama-2-13B": "llama-2-13b", "Llama-3-8B": "llama-3-8b",
          "Llama-2-70B": "llama-2-70b", "Llama-3-70B": "llama-3-70b"}  # fmt: skip
KINDS = {"Baseline": "dense", "Attn Drop": "attention", "MLP Drop": "mlp", "Block Drop": "block"}
LISTS = {"Attn": "attention", "MLP": "mlp", "Block": "block"}
TASKS = {task["table"]: name for name, task in known_tasks().items()}
CHANCE = {name: 0.5 if name in ("boolq", "rte", "piqa", "winogrande") else 0.25 for name in TASKS.values()}
GIB = 2**30


def paper_tables() -> dict[str, Tables]:
    """Notebook -> table -> rows, with every declared column. The paper prints no intervals: low = high = value.

    What a cell is not printed for is NaN. Tables that are not named here are empty.

    - 01_similarity: `published` (the authors' lists as ours too; corpus "c4"), and these models' names in `importance`.
    - 02_drop_curves: `models`; `tasks` (Tables 1 to 3, and Attn-12 of Llama-2-13B from Table 9: value, low, high, num_fewshot,
      metric, chance); `average` (the printed mean, points lost by it, and what is retained of it above guessing; Llama-3 has
      four tasks, the others eight); `gaps` (differences of printed means; measure "tasks" alone, since the paper has no
      held-out text); `paper`.
    - 03_joint_drop: the same, the joint drop's MMLU in `tasks` (90 % of 55.1 with 31 sub-layers), `first_mlp` (14 and 18), and
      `further` (joint drop against attention drop, by MMLU).
    - 05_speedup: `speed` (generations of 2,048 tokens in and out, back end "eager", not noisy; of half the attention of the 70B
      models with the digits of the text, 48.4 and 43.4 %), `trade` (the printed SDR), `trade_pairs` (of printed means and
      speed-ups), `models`, `paper`.
    - 08_what_breaks: `changes` (Table 11), `pruned` and `speed` (Table 9), `context_gaps` (the means of Table 12), `recovered`
      (the figure on tuning); of means, by the measure "tasks".
    - 11_sizes_and_causes: `models`, `half` and `sizes`, from the means of 02.
    - 06_kv_cache: `paper` (Table 4; bytes are the printed GB as GiB, with the slip of 52 and 26, and the formula is the count),
      `fits` (weights of Llama-2-70B: the printed 128 GB).

    What of it each rule reads, and which claims have nothing in it, is in tests/studies/test_verdicts.py.
    """
    claims = [c for c in PAPER["claims"] if c["id"].split(".")[0] in ("T1", "T2", "T3")]
    claims += [c for c in PAPER["claims"] if c["id"].startswith("T9.Attn-12.")]
    cells: dict[tuple[str, str, int], dict[str, float]] = {}
    for c in claims:
        name = {"Avg": "mean", "SpeedUp": "speedup"}.get(what := c["id"].split(".")[-1], what)
        cells.setdefault((MODELS[c["model"]], KINDS[c["method"]], c["n_drop"]), {})[name] = c["value"]
    for model, identifier in (("llama-2-70b", "X.abs.70b.speedup"), ("llama-3-70b", "TMLR.speedup")):
        cells[model, "attention", 40]["speedup"] = 1 + next(c["value"] for c in PAPER["claims"] if c["id"] == identifier) / 100
    layers = {model: catalogue()["shapes"][model]["num_hidden_layers"] for model in MODELS.values()}
    models = [{"model": model, "n_layers": n, "device": "RTX 6000 Ada"} for model, n in layers.items()]
    curves = {
        "models": models,
        "tasks": [row for (model, kind, n), cell in cells.items() for row in _task_rows(model, kind, n, cell)],
        "average": [_average_row(cells, *key) for key, cell in cells.items() if "mean" in cell],
        "gaps": _gap_rows(cells),
        "paper": [{"model": MODELS[c["model"]], "kind": KINDS[c["method"]], "n": c["n_drop"], "what": c["what"],
                   "paper": c["value"]} for c in claims],
    }  # fmt: skip
    joint = _task_rows("llama-2-13b", "joint", 31, {"MMLU": 0.9 * cells["llama-2-13b", "dense", 0]["MMLU"]})
    first = {MODELS[c["model"]]: c["value"] for c in PAPER["claims"] if c["id"].startswith("X.joint.first.")}
    tables = {
        "01_similarity": {
            "published": (published := _published_rows(layers)),
            "importance": [{"model": model, "corpus": "c4"} for model in dict.fromkeys(row["model"] for row in published)],
        },
        "02_drop_curves": curves,
        "03_joint_drop": {name: rows for name, rows in curves.items() if name != "paper"}
        | {
            "tasks": curves["tasks"] + joint,
            "first_mlp": [{"model": model, "n_layers": layers[model]} | _exact("attention_before", n, "low", "high")
                          for model, n in first.items()],
            "further": [_further_row(cells)],
        },
        "05_speedup": {
            "speed": [_speed_row(*key, cell["speedup"]) for key, cell in cells.items() if "speedup" in cell],
            "trade": (trade := [_trade_row(cells, *key) for key, cell in cells.items() if "SDR" in cell]),
            "trade_pairs": pair_rows([row for row in trade if row["n"]], pd.DataFrame(curves["gaps"])),
            "models": models,
            "paper": [row for row in curves["paper"] if "speedup" in row["what"].lower()],
        },
        "08_what_breaks": _what_breaks(),
        "06_kv_cache": {"paper": _cache_rows(), "fits": [{"model": "llama-2-70b", "n": 0, "weights_bytes": 128 * GIB}]},
    }  # fmt: skip
    declared = {notebook: _as_declared(notebook, rows) for notebook, rows in tables.items()}
    return declared | {"11_sizes_and_causes": _as_declared("11_sizes_and_causes", _size_tables(declared, layers))}


def _what_breaks() -> dict[str, list[dict]]:
    """Means in hundredths; the figure on tuning does not say how many layers are dropped: 0 stands for it."""
    value = {c["id"]: c["value"] for c in PAPER["claims"]}
    counts = {"Llama-2-13B": (0, 4, 8), "Mistral-7B": (0, 4, 8)}
    changes = [
        {"model": MODELS[model], "change": "4 bits", "kind": "attention" if n else "dense", "n": n, "measure": "tasks"}
        | _exact("cost", (value[f"T11.{model}.{n}.q.mean_of_4_tasks"] - value[f"T11.{model}.{n}.fp.mean_of_4_tasks"]) / 100)
        for model, several in counts.items() for n in several
    ]  # fmt: skip
    of_table_9 = {"model": "llama-2-13b", "kind": "attention"}
    pruned = [of_table_9 | {"n": n, "measure": "tasks"} | _exact("difference", (value[f"T9.Attn-{n}.mean_of_4_tasks"]
              - value[f"T9.Wanda-{n}.mean_of_4_tasks"]) / 100, "low", "high") for n in (4, 8, 12)]  # fmt: skip
    speed = [of_table_9 | {"n": n, "method": method} | _exact("speedup", value[f"T9.{name}-{n}.speedup"], "low", "high")
             for n in (4, 8, 12) for method, name in (("none", "Attn"), ("Wanda", "Wanda"))]  # fmt: skip
    gaps = [{"model": "llama-2-7b-32k", "probe": "banking77", "n": n, "told": True}
            | _exact("difference", (value[f"T12.Attn-{n}.mean"] - value[f"T12.MLP-{n}.mean"]) / 100, "low", "high")
            for n in (2, 4, 6, 8)]  # fmt: skip
    recovered = []
    for kind, name in (("attention", "Attn_Drop"), ("mlp", "MLP_Drop")):
        (dense, plain), (tuned_dense, tuned) = (
            [value[f"PT.{how}.{row}"] for row in ("Baseline", name)] for how in ("no_finetune", "LoRA_finetune")
        )
        share = _exact("recovered", 1 - (tuned_dense - tuned) / (dense - plain), "low", "high")
        recovered.append({"model": "not named", "kind": kind, "n": 0, "measure": "tasks"} | share)
    return {"changes": changes, "pruned": pruned, "speed": speed, "context_gaps": gaps, "recovered": recovered}


def _size_tables(declared: dict[str, Tables], layers: dict[str, int]) -> dict[str, list[dict]]:
    """Models beside each other, from the printed tables; the paper measures no causes."""
    parameters = [1e9 * float(model.split("b")[0].split("-")[-1]) for model in (name.removesuffix("-v0.1") for name in layers)]
    pairs = zip(layers.items(), parameters, strict=True)
    models = [{"model": model, "parameters": size, "n_layers": n} for (model, n), size in pairs]
    own = _as_declared("11_sizes_and_causes", {"models": models})
    return compared(own, {name: {} for name in READ} | {"02_drop_curves": declared["02_drop_curves"]})


def _as_declared(notebook: str, rows: dict[str, list[dict]]) -> Tables:
    declared = {**STUDIES[notebook].tables, **NOT_RUN}
    columns = {name: [column.name for column in several if "*" not in column.name] for name, several in declared.items()}
    return {name: pd.DataFrame(rows.get(name, []), columns=several) for name, several in columns.items()}


def _exact(name: str, value: float, low: str | None = None, high: str | None = None) -> dict:
    """A value and both ends of its interval."""
    return {name: value, low or f"{name}_low": value, high or f"{name}_high": value}


def _task_rows(model: str, kind: str, n: int, cell: dict) -> list[dict]:
    shots = {c["id"].split(".")[1]: c["value"] for c in PAPER["claims"] if c["id"].startswith("T5.")}
    return [
        {"model": model, "task": TASKS[what], "kind": kind, "n": n, "metric": known_tasks()[TASKS[what]]["metric"],
         "num_fewshot": shots[what], "documents": np.nan, "stderr": 0.0, "chance": CHANCE[TASKS[what]]}
        | _exact("value", value / 100, "low", "high")
        for what, value in cell.items() if what in TASKS
    ]  # fmt: skip


def _average_row(cells: dict, model: str, kind: str, n: int) -> dict:
    cell, dense = cells[model, kind, n], cells[model, "dense", 0]["mean"]
    tasks = [TASKS[what] for what in cell if what in TASKS]
    chance = np.mean([CHANCE[task] for task in tasks])
    row = {"model": model, "kind": kind, "n": n, "tasks": len(tasks), "chance": chance}
    retained = (cell["mean"] - 100 * chance) / (dense - 100 * chance)
    lost = _exact("points_lost", dense - cell["mean"])
    return row | _exact("value", cell["mean"] / 100, "low", "high") | _exact("retained", retained) | lost


def _gap_rows(cells: dict) -> list[dict]:
    return [
        {"model": model, "n": n, "kind": "attention", "other": other, "measure": "tasks", "same_plan": False}
        | _exact("difference", (cell["mean"] - cells[model, other, n]["mean"]) / 100, "low", "high")
        for (model, kind, n), cell in cells.items()
        for other in ("mlp", "block")
        if kind == "attention" and "mean" in cell and (model, other, n) in cells
    ]


def _speed_row(model: str, kind: str, n: int, speedup: float) -> dict:
    load = {
        "what": GENERATION,
        "context": 2048,
        "new_tokens": 2048,
        "backend": "eager",
        "fill": True,
        "noisy": False,
        "level": 1.0,
    }
    return {"model": model, "kind": kind, "n": n, "spread": 0.0} | load | _exact("speedup", speedup)


def _trade_row(cells: dict, model: str, kind: str, n: int) -> dict:
    average, cell = _average_row(cells, model, kind, n), cells[model, kind, n]
    row = {"model": model, "backend": "eager", "kind": kind, "n": n, "noisy": False, "level": 1.0}
    row |= _exact("speedup", cell["speedup"]) | _exact("sdr", cell["SDR"])
    return row | {name: average[name] for name in ("points_lost", "points_lost_low", "points_lost_high", "retained")}


def _further_row(cells: dict) -> dict:
    """Joint drop of Llama-2-13B retains 90 % of MMLU with 31 sub-layers, and attention drop with 12: with 16, 48.2 of 55.1.

    That Attn-20 is above 90 % again (51.5) does not count, as in `reach_of`. MLP and block drop are printed up to 8 alone,
    where they retain more. The first MLP comes after 18 attention layers.
    """
    model, joint = "llama-2-13b", 31
    mmlu = {n: cell["MMLU"] for (of, kind, n), cell in cells.items() if (of, kind) == (model, "attention") and "MMLU" in cell}
    fails = min(n for n, score in mmlu.items() if score < KEEP * cells[model, "dense", 0]["MMLU"])
    attention = max(n for n in mmlu if n < fails)
    row = {"model": model, "other": "attention", "joint": joint, "compared": attention, "is_cut": False, "same_up_to": 18}
    return row | _exact("difference", joint - attention, "low", "high")


def _cache_rows() -> list[dict]:
    rows, dense = [], {}
    for c in PAPER["claims"]:
        if not c["id"].startswith("T4."):
            continue
        dense = dense | {c["model"]: c["value"]} if not c["n_drop"] else dense  # a model's dense row comes first
        length, batch_size = (int(c["what"].split(f"{word} ")[1].split(",")[0]) for word in ("seq", "batch"))
        n_layers = catalogue()["shapes"][MODELS[c["model"]]]["num_hidden_layers"]
        rows.append({"model": c["model"], "n_layers": n_layers, "n": c["n_drop"], "batch_size": batch_size, "length": length,
                     "paper_gib": c["value"], "formula_bytes": c["value"] * GIB, "counted_bytes": c["value"] * GIB,
                     "dense_bytes": dense[c["model"]] * GIB})  # fmt: skip
    return rows


def _published_rows(layers: dict[str, int]) -> list[dict]:
    names = {source["hub"]: name for name, source in catalogue()["models"].items() if "hub" in source}
    rows = []
    for entry in PAPER["published_drop_lists"]:
        if entry["method"] not in LISTS:  # consecutive blocks are another method
            continue
        model, n, listed = names[entry["model"]], len(entry["layers"]), " ".join(map(str, entry["layers"]))
        rows.append({"model": model, "corpus": "c4", "kind": LISTS[entry["method"]], "n_drop": n, "shared": n,
                     "by_chance": n**2 / layers[model], "theirs": listed, "ours": listed, "low": n, "high": n})  # fmt: skip
    return rows
