"""Notebook 09: what a dropped model's files hold, and how fast another program runs them."""

import hashlib
import importlib.metadata
import itertools

import numpy as np
import torch

from ...base.errors import LLMDropError, NotApplicable, NotAvailable
from ...base.provenance import code_provenance
from ...dropping.plan import DropPlan
from ...export.gguf import check_supported
from ...export.gguf_vocabulary import find_split
from ...export.llamacpp import library
from ...measure.floors import kv_bytes
from ...measure.speed import Load
from ...models.load import load_config, load_tokenizer, model_of_shape
from ...models.locate import LocatedModel, locate_available
from ...report.tables import Column, Key, Tables, table
from ...selection.ranking import select
from ...sources.texts import fingerprint_tokenizer, load_tokens
from ..profile import Calibration, Profile
from ..run import Run, identity_of, study
from ..speedup.generation import Timed, read_timings
from ..speedup.loads import Speed, SpeedWork, n_layers_of
from ..speedup.study import where_timed
from ..work import DENSE, Cell
from .work import CheckpointWork, ServedWork, TakeAway

TORCH = "torch"  # what tables call the runtime that notebook 05 times
DROPPED = Key("n", "Attention dropped", "d")
SPEEDUP = Column("speedup", "Speed-up", ".2f", "speedup_low", "speedup_high")
TABLES = {
    "files": table(
        "model", Key("file", "File"), DROPPED, Column("file_bytes", "File, bytes", ",d"),
        Column("dense_file_bytes", "Dense file, bytes", ",d"), Column("saved_bytes", "Fewer bytes of tensors", ",d"),
        Column("dropped_bytes", "Dropped tensors, bytes", ",d"), Column("stand_in_bytes", "Zeros in their place, bytes", ",d"),
    ),
    "caches": table(
        "model", Key("file", "File"), DROPPED, Column("counted_bytes", "A token in llama.cpp's cache, bytes", ",d"),
        Column("formula_bytes", "By the formula, bytes", ",d"), Column("dense_bytes", "Dense, bytes", ",d"),
    ),
    "gate": table(
        "model", Key("file", "File"), DROPPED, Column("divergence", "From the zeroed model, nats", ".2g"),
        Column("log_probability", "Farthest of the five likeliest tokens, nats", ".2g"),
        Column("equal_tokens", "Equal greedy tokens", "d"),
    ),
    "speed": table(
        "model", Key("runtime", "Runtime"), Key("what", "Load"), Key("context", "Context", ",d"), DROPPED,
        Column("seconds", "Seconds", ".3g", "seconds_low", "seconds_high"), "seconds_low seconds_high",
        Column("tokens_per_second", "Tokens per second", ",.0f"), Column("level", "Intervals cover", ".1%"),
        Column("spread", "Spread", ".0%"), Column("dense_spread", "Spread of dense", ".0%"), Column("noisy", "Noisy"),
        SPEEDUP, "speedup_low speedup_high", Column("predicted", "Predicted", ".2f"),
    ),
    "answers": table("model", Key("file", "File"), DROPPED, Column("answer", "Answer")),
    "models": table(
        "model", Column("n_layers", "Layers", "d"), Column("device", "Device"), Column("dtype", "Dtype in torch"),
        Column("torch", "torch"), Column("llama_cpp", "llama.cpp, in the wheel cyllama"),
    ),
}  # fmt: skip


def servable(profile: Profile) -> tuple[list[LocatedModel], dict[str, str]]:
    """The profile's models that llama.cpp can run without layers, and why others are not run.

    Raises NotApplicable for a single one that it cannot, without llama.cpp, and where torch uses a GPU.
    """
    if torch.cuda.is_available():
        raise NotApplicable(
            "This notebook times llama.cpp and torch on the CPU, side by side, and torch takes the GPU here: hide it with "
            "CUDA_VISIBLE_DEVICES= to run it."
        )
    try:
        library()
    except NotAvailable as reason:  # an optional extra: the rest of a run goes on
        raise NotApplicable(str(reason)) from reason
    located, unavailable = locate_available(profile.models)
    found: list[LocatedModel] = []
    for model in located:
        try:
            if model.is_random:
                raise LLMDropError("Random weights have no tokenizer, and there is nothing to take away.")
            for kind in profile.section(TakeAway).kinds:
                check_supported(model_of_shape(model, torch.float32, "meta"), DENSE, kind)
            find_split(load_tokenizer(model), load_config(model).get_text_config().vocab_size)
            found.append(model)
        except LLMDropError as reason:
            if not profile.several:
                raise NotApplicable(str(reason)) from reason
            unavailable[model.name] = str(reason)
    return found, unavailable


@study("09_take_away", needs=[Calibration, Speed, TakeAway], tables=TABLES)
def take_away(run: Run) -> Tables:
    """Notebook 09: files of a dropped model, the gate that each passed, and their speed in llama.cpp beside that in torch.

    Attention layers are chosen as in notebook 05, and its timings serve here, too.
    """
    located, unavailable = servable(run.profile)
    run.not_run |= unavailable
    plans: dict[str, dict[int, DropPlan]] = {}
    for model in located:
        with run.one_of(model):
            plans[model.name] = plans_of(run, model)
            if not plans[model.name] and model.name not in run.not_run:
                fewest = min(run.section(TakeAway).n_drop)
                raise NotApplicable(f"{model.name} has {n_layers_of(model)} layers, and the profile drops {fewest} or more.")
    located = [model for model in located if plans.get(model.name)]
    checkpoints = [
        CheckpointWork(**_in_float32(model, run.profile), plans=tuple(plans[model.name].values())) for model in located
    ]
    served = [work for model in located for work in served_work(model, plans[model.name], run.profile)]
    timed = [work for model in located for work in torch_work(model, plans[model.name], run.profile)]
    run.measure([*checkpoints, *served])
    run.measure(timed)
    checkpoints, served, timed = run.measured(checkpoints), run.measured(served), run.measured(timed)
    in_torch = [each for item in timed for each in read_timings(item, run.values(item), _cells(plans[item.model.name]))]
    versions = {"torch": code_provenance()["versions"]["torch"], "llama_cpp": importlib.metadata.version("cyllama")}
    tables = {
        "files": [row for several in (checkpoints, served) for i in several for row in file_rows(i, run.values(i))],
        "caches": [row for item in served for row in cache_rows(item, run.values(item))],
        "gate": [row for item in served for row in gate_rows(item, run.values(item))],
        "speed": [*map(torch_row, in_torch)] + [row for i in served for row in served_rows(i, run.values(i), in_torch)],
        "answers": [row for item in served for row in answer_rows(item, run.values(item))],
        "models": [
            {"model": model.name, "n_layers": n_layers_of(model)} | where_timed(run.profile.dtype) | versions
            for model in located
        ],
    }
    return run.write(tables, [*checkpoints, *served, *timed])


# ---- what is measured ---------------------------------------------------------------------------------------------------


def plans_of(run: Run, model: LocatedModel) -> dict[int, DropPlan]:
    """The least important attention layers, by their number; without those counts that the model does not have."""
    scores = run.scores(model, run.section(Calibration).corpora[0])
    if scores is None:
        return {}
    return {n: select(scores, "attention", n) for n in run.section(TakeAway).n_drop if n < n_layers_of(model)}


def contexts_of(profile: Profile) -> tuple[int, ...]:
    speed = profile.section(Speed)
    return tuple(context for context in speed.contexts if context <= speed.prompt)


def served_work(model: LocatedModel, plans: dict[int, DropPlan], profile: Profile) -> list[ServedWork]:
    settings, contexts = profile.section(TakeAway), contexts_of(profile)
    (corpus, *_) = profile.section(Calibration).corpora
    tokenizer = load_tokenizer(model)
    (tokens,) = load_tokens(corpus, tokenizer, 1, max(contexts) + settings.steps)
    form = hashlib.sha256(repr((fingerprint_tokenizer(tokenizer), tokenizer.chat_template)).encode()).hexdigest()
    more = {"tokens": tokens, "contexts": contexts, "steps": settings.steps, "new_tokens": settings.new_tokens,
            "repeats": profile.section(Speed).repeats, "tokenizer": form}  # fmt: skip
    shared = _in_float32(model, profile) | {"plans": tuple(plans.values())}
    return [ServedWork(**shared, kind=kind, **more) for kind in settings.kinds]


def torch_work(model: LocatedModel, plans: dict[int, DropPlan], profile: Profile) -> list[SpeedWork]:
    """The same loads as notebook 05 times them, under the same keys where it does."""
    speed = profile.section(Speed)
    shared = identity_of(model, profile) | {"fill": False, "repeats": speed.repeats, "plans": tuple(plans.values()),
                                            "longest": speed.prompt + speed.new_tokens + speed.steps}  # fmt: skip
    loads = [load for c in contexts_of(profile) for load in (Load("prefill", c), Load("decode", c, speed.steps))]
    return [SpeedWork(**shared, load=load) for load in loads]


def _in_float32(model: LocatedModel, profile: Profile) -> dict:
    """What exports begin with: they are compared in float32."""
    return identity_of(model, profile) | {"dtype": torch.float32}


def _cells(plans: dict[int, DropPlan]) -> dict[Cell, DropPlan]:
    return {Cell("attention", n): plan for n, plan in plans.items()}


# ---- from values to rows ------------------------------------------------------------------------------------------------


def _name(item: CheckpointWork | ServedWork) -> str:
    return f"GGUF {item.kind}" if isinstance(item, ServedWork) else "transformers float32"


def _each(item: CheckpointWork | ServedWork, values: list[dict]) -> list[tuple[dict, DropPlan, dict]]:
    """The dense model and each plan: how a row begins, the plan, what was measured."""
    plans = [(DENSE, values[0]["dense"]), *((plan, value["plan"]) for plan, value in zip(item.plans, values, strict=True))]
    return [({"model": item.model.name, "file": _name(item), "n": len(plan.attention)}, plan, found) for plan, found in plans]


def file_rows(item: CheckpointWork | ServedWork, values: list[dict]) -> list[dict]:
    """Sizes of files, and of the tensors in them, beside the dense file's."""
    dense = values[0]["dense"]
    return [
        row | {"file_bytes": found["file_bytes"], "dense_file_bytes": dense["file_bytes"],
               "saved_bytes": dense["tensor_bytes"] - found["tensor_bytes"],
               "dropped_bytes": found["dropped_bytes"], "stand_in_bytes": found["stand_in_bytes"]}
        for row, _, found in _each(item, values)
    ]  # fmt: skip


def cache_rows(item: ServedWork, values: list[dict]) -> list[dict]:
    """What a token takes in llama.cpp's cache of 16 bits."""
    config = load_config(item.model)
    dense = kv_bytes(config, DENSE, 1, 1, 2)
    return [
        row | {"counted_bytes": found["cached_bytes"], "formula_bytes": kv_bytes(config, plan, 1, 1, 2), "dense_bytes": dense}
        for row, plan, found in _each(item, values)
    ]


def gate_rows(item: ServedWork, values: list[dict]) -> list[dict]:
    """How far each file is from the dense model whose attention is set to zero in these layers."""
    wanted = ("divergence", "log_probability", "equal_tokens")
    return [row | {name: found[name] for name in wanted} for row, _, found in _each(item, values)]


def answer_rows(item: ServedWork, values: list[dict]) -> list[dict]:
    return [row | {"answer": found["answer"]} for row, _, found in _each(item, values)]


COLUMNS = ("seconds", "seconds_low", "seconds_high", "level", "spread", "dense_spread", "noisy", "speedup", "speedup_low",
           "speedup_high", "predicted")  # fmt: skip


def torch_row(timed: Timed) -> dict:
    """A timing of notebook 05."""
    row = timed.as_row()
    return {"model": row["model"], "runtime": TORCH} | _rate({name: row[name] for name in ("what", "context", "n", *COLUMNS)})


def served_rows(item: ServedWork, values: list[dict], in_torch: list[Timed]) -> list[dict]:
    """Timings in llama.cpp, beside what bytes and operations predict of torch at the same load."""
    floors = {(t.row["model"], t.row["what"], t.row["context"], t.row["n"]): (t.floor, t.dense_floor) for t in in_torch}
    rows = []
    dense = values[0]["dense"]["seconds"]
    pairs = [(0, dense, dense)] + [
        (len(plan.attention), value["plan"]["seconds"], value["dense"]["seconds"])
        for plan, value in zip(item.plans, values, strict=True)
    ]
    for n, seconds, dense in pairs:
        for what, context in itertools.product(("prefill", "decode"), item.contexts):
            model, load = item.model.name, f"{what} {context}"
            key = {"model": model, "what": what, "context": context, "n": n}
            floor, dense_floor = floors.get((model, what, context, n), (np.nan, np.nan))
            timed = Timed({}, 1, np.array(seconds[load]), floor, np.array(dense[load]), dense_floor).as_row()
            rows.append(_rate(key | {"runtime": f"llama.cpp {item.kind}"} | {name: timed[name] for name in COLUMNS}))
    return rows


def _rate(row: dict) -> dict:
    """With tokens per second: of a prompt all, of a decode step one."""
    return row | {"tokens_per_second": (row["context"] if row["what"] == "prefill" else 1) / row["seconds"]}
