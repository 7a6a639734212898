"""Notebook 05: how much faster models get, what that costs, and what bytes and operations would give."""

import pandas as pd
import torch

from ...base.errors import NotApplicable, NotAvailable
from ...base.provenance import code_provenance
from ...dropping.plan import DropPlan
from ...models.locate import LocatedModel
from ...report.tables import Column, Key, Tables, table
from .. import paper
from ..drop_curves.study import drop_curves
from ..profile import Calibration
from ..run import Run, study
from ..work import Cell
from .crossover import crossover_rows
from .generation import GENERATION, Timed, compose_generations, read_timings
from .loads import Speed, SpeedWork, models_or_shapes, n_layers_of, plans_of, speed_work, too_long
from .trade import TRADE_PAIRS, pair_rows, trade_rows

SPEEDUP = Column("speedup", "Speed-up", ".2f", "speedup_low", "speedup_high")
LEVEL = Column("level", "Intervals cover", ".1%")
LOAD = (
    Key("what", "Load"),
    Key("batch_size", "Batch", "d"),
    Key("context", "Context", ",d"),
    Key("new_tokens", "New tokens", ",d"),
)
DROPPED = (Key("kind", "Dropped"), Key("n", "n", "d"))
LOST = Column("points_lost", "Points lost", ".1f", "points_lost_low", "points_lost_high")
SDR = Column("sdr", "SDR, points per percent", ".2f", "sdr_low", "sdr_high")
TABLES = {
    "speed": table(
        "model", Key("backend", "Back end"), *LOAD, Column("room", "Room of a static cache", ",.0f"), *DROPPED,
        Column("kv_bytes", "Cache, bytes", ",d"), Column("peak_bytes", "Peak memory, bytes", ",.0f"),
        Column("fill", "Fills the GPU"), Column("seconds", "Seconds", ".3g", "seconds_low", "seconds_high"),
        "seconds_low seconds_high", LEVEL, Column("spread", "Spread", ".0%"), Column("dense_spread", "Spread of dense", ".0%"),
        Column("noisy", "Noisy"), SPEEDUP, "speedup_low speedup_high", Column("predicted", "Predicted", ".2f"),
        Column("share_of_limit", "Share of what bytes and operations allow, parts one after the other", ".0%"),
    ),
    "trade": table(
        "model", Key("backend", "Back end"), *DROPPED, SPEEDUP, "speedup_low speedup_high", LEVEL, Column("noisy", "Noisy"),
        LOST, "points_lost_low points_lost_high", Column("retained", "Retained", ".1%"), SDR, "sdr_low sdr_high",
    ),
    "trade_pairs": TRADE_PAIRS,
    "protocol": table(
        "model", Key("backend", "Back end"), Key("batch_size", "Batch", "d"), *DROPPED,
        Column("prompt", "Prompt", ",d"), Column("new_tokens", "New tokens", ",d"),
        Column("whole", "Whole, once, s", ".3g"),
        Column("from_samples", "From samples, s", ".3g", "from_samples_low", "from_samples_high"),
        "from_samples_low from_samples_high", LEVEL, Column("ratio", "From samples over whole", ".3f"),
        Column("speedup_whole", "Speed-up, whole", ".2f"),
        Column("speedup", "Speed-up, from samples", ".2f", "speedup_low", "speedup_high"), "speedup_low speedup_high",
        Column("steps_whole", "Steps of the whole", ",d"), Column("steps_sampled", "Steps sampled", ",d"),
    ),
    "crossover": table(
        "model", Key("backend", "Back end"), Key("what", "Load"), Key("batch_size", "Batch", "d"),
        Key("n", "n", "d"), Column("tried_from", "Tried from", ",d"), Column("tried_to", "Tried to", ",d"),
        Column("measured", "Attention gains more from (tokens; 0: at all that were tried, inf: at none)", ",.0f"),
        Column("predicted", "Predicted", ",.0f"), Column("apart_somewhere", "Intervals apart somewhere"),
    ),
    "limits": table(
        "model", Column("bandwidth", "Moves, bytes/s", ".3g"), Column("rate", "Multiplies, operations/s", ".3g")
    ),
    "paper": table("model", *DROPPED, Key("what", "What"), Column("paper", "In the paper", ".2f")),
    "models": table("model", Column("n_layers", "Layers", "d"), Column("device", "Device"), Column("dtype", "Dtype")),
}  # fmt: skip


@study("05_speedup", needs=[Speed], tables=TABLES, models=models_or_shapes)
def speedup(run: Run) -> Tables:
    """Notebook 05: how much faster models get, beside what they lose (notebook 02), and beside what bytes and operations give.

    A model that is unavailable is measured with random weights if its shape is known, under the name "random:<model>": speed
    does not depend on values.
    """
    settings = run.section(Speed)
    located, unavailable = models_or_shapes(run.profile)
    run.not_run |= unavailable
    quality = _quality(run, located)
    with_scores = Calibration in run.profile.sections and not all(model.is_random for model in located)
    corpora = run.corpora() if with_scores else []
    plans: dict[str, dict[Cell, DropPlan]] = {}
    work: list[SpeedWork] = []
    for model in located:
        with run.one_of(model):
            plans[model.name] = plans_of(run, model, corpora)
            work += speed_work(model, plans[model.name], run.profile)
            run.not_run |= too_long(model, settings)
    run.measure([item for item in work if item.load.backend == "eager"])
    compiled = [item for item in work if item.load.backend == "compiled"]
    run.measure(compiled, several=True, what="{}, compiled back end")  # it is an addition: eager timings stand alone
    work = [item for item in work if all(run.store.get(key) for key in item.keys)]
    if plans and not any(plans.values()) and not run.not_run:
        depth = ", ".join(f"{model.name} has {n_layers_of(model)}" for model in located)
        raise NotApplicable(f"The profile times more dropped layers than there are: {depth}. Change n_drop under speed.")
    if not work:
        raise NotAvailable("Nothing could be timed:\n" + "\n".join(run.not_run.values()))
    timed: list[Timed] = []
    values: dict[str, list[dict]] = {}
    for item in work:
        timed += read_timings(item, run.values(item), plans[item.model.name])
        values.setdefault(item.model.name, []).extend(run.values(item))
    generations, not_composed = compose_generations(timed, settings)
    run.not_run |= not_composed
    timings = pd.DataFrame([t.as_row() for t in [*timed, *generations]])
    tables = {
        "speed": timings,
        "trade": (trade := trade_rows(timings, quality["average"], settings)),
        "trade_pairs": pair_rows(trade, quality["gaps"]),
        "protocol": protocol_rows(timings, settings),
        "crossover": crossover_rows(timings, settings.sweep_n),
        "limits": limit_rows(values),
        "paper": [{"model": m.name} | row for m in located for row in paper.rows_for(m) if "speedup" in row["what"].lower()],
        "models": [{"model": m.name, "n_layers": n_layers_of(m)} | where_timed(run.profile.dtype) for m in located],
    }
    return run.write(tables, work)


def _quality(run: Run, located: list[LocatedModel]) -> Tables:
    """The tables of notebook 02, which are measured if they are missing; empty ones for random weights."""
    nothing = {name: pd.DataFrame(columns=["model", "kind", "n", "other", "measure"]) for name in ("average", "gaps")}
    if all(model.is_random for model in located):
        return nothing
    try:
        return drop_curves(run.profile)
    except NotAvailable as reason:
        run.not_run["quality"] = str(reason)
        return nothing


# ---- from timings to rows -----------------------------------------------------------------------------------------------


def protocol_rows(timings: pd.DataFrame, settings: Speed) -> list[dict]:
    """The protocol's generation as it was timed whole, against the one composed from samples. timings: the table "speed"."""
    prompt, new_tokens = settings.prompt, settings.new_tokens
    sampled = [context for context in settings.contexts if prompt <= context <= prompt + new_tokens]
    keys = ["model", "backend", "batch_size", "kind", "n"]
    same = timings[(timings["context"] == prompt) & (timings["new_tokens"] == new_tokens)]
    whole, composed = (same[same["what"] == what].set_index(keys) for what in ("generation", GENERATION))
    rows = []
    for key in whole.index.intersection(composed.index, sort=False):
        w, c = whole.loc[key], composed.loc[key]
        rows.append(dict(zip(keys, key, strict=True)) | {
            "prompt": prompt, "new_tokens": new_tokens, "whole": w["seconds"], "from_samples": c["seconds"],
            "from_samples_low": c["seconds_low"], "from_samples_high": c["seconds_high"], "level": c["level"],
            "ratio": c["seconds"] / w["seconds"], "speedup_whole": w["speedup"], "speedup": c["speedup"],
            "speedup_low": c["speedup_low"], "speedup_high": c["speedup_high"], "steps_whole": new_tokens - 1,
            "steps_sampled": settings.steps * len(sampled),
        })  # fmt: skip
    return rows


def limit_rows(values: dict[str, list[dict]]) -> list[dict]:
    """What the device does at best, as measured beside each timing: the best of them. `values`: model -> stored values."""
    return [
        {"model": model} | {name: max(value["limits"][name] for value in of_model) for name in ("bandwidth", "rate")}
        for model, of_model in values.items()
    ]


def where_timed(dtype: torch.dtype) -> dict[str, str]:
    """The device, and the dtype that models are in."""
    code = code_provenance()
    device = code["gpus"][0] if code["gpus"] else f"{code['processor']}, {code['cpu_threads']} threads"
    return {"device": device, "dtype": str(dtype).removeprefix("torch.")}
