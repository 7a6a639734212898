"""About how long the notebooks take, and how much memory: what follows from a profile, and what a device does.

What a CPU does was measured: in bfloat16, on 2 threads of an AMD EPYC with instructions for it. What a GPU does is assumed.
"""

import dataclasses
import math
from collections.abc import Collection

import psutil
import torch

from ..models.outlook import Shape
from ..models.recipe import Recipe
from ..sources.catalogue import catalogue
from ..sources.task_data import known_tasks

ESTIMATED = ("01", "02", "03", "05", "06", "07", "09", "11")  # notebooks that this file has an estimate for
TOKENS = 100  # of one question with its choices, and of one example before it
GENERATED, TOGETHER = 200, 8  # tokens of an answer that is generated, and answers generated side by side
SUBJECTS = 57  # of MMLU: a limit counts documents of each
BATCH = 16384  # tokens that are scored in one pass on a GPU
OVERHEAD = 45.0  # seconds of a notebook for all but measuring: it reads texts, makes tokens, draws, is rendered
EXPORTING = 1.6e-7  # seconds of a file for each parameter: written twice, opened in llama.cpp, compared
COMPILING = 20  # seconds for each plan on the compiled back end
PYTHON = 2e9  # bytes of Python, its libraries and texts, as measured in the reference run
BUS = 25e9  # bytes/s from the memory of the CPU to a GPU; assumed

# How many operations the reference run did in the time in which importance takes one, if plans shared nothing: text and
# tasks share layers between plans, and choices share their question. llama.cpp ("served") has one rate, whatever torch's dtype.
RELATIVE_RATE = {
    "importance": 1.0,
    "iterative": 1.1,
    "text": 1.75,
    "tasks": 3.9,
    "prefill": 0.89,
    "training": 0.37,
    "served": 0.25,
}


# ---- devices --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """What a machine does, in the run's dtype."""

    name: str
    is_gpu: bool
    memory: int  # bytes: of the GPUs, or of the machine
    bytes_per_number: int
    operations: float  # 1/s while importance is measured
    weights: float  # bytes/s at which one decode step reads the weights
    cache: float  # and keys and values
    per_layer: float  # seconds of a decode step for each layer, whatever its size
    basis: str  # where these numbers come from


GPUS = {  # name -> operations/s in 16 bit and bytes/s, as the maker states them
    "H100": (990e12, 3.3e12), "H200": (990e12, 4.8e12), "A100": (312e12, 2.0e12), "6000 Ada": (364e12, 0.96e12),
    "L40": (362e12, 0.86e12), "4090": (165e12, 1.0e12), "V100": (112e12, 0.9e12), "T4": (65e12, 0.3e12),
}  # fmt: skip
OTHER_GPU = (100e12, 0.5e12)


def this_device(dtype: torch.dtype) -> Device:
    """The GPUs of this machine, or its CPU."""
    if torch.cuda.is_available():
        each = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return gpu(torch.cuda.get_device_name(), sum(properties.total_memory for properties in each), len(each))
    return cpu(torch.get_num_threads(), dtype, psutil.virtual_memory().total)


def gpu(name: str, memory: int, count: int = 1) -> Device:
    """A GPU in bfloat16. Several hold a model together, but take turns."""
    operations, bandwidth = next((rates for known, rates in GPUS.items() if known in name), OTHER_GPU)
    basis = f"assumed: 40 % of {operations / 1e12:.0f} TFLOP/s and 60 % of {bandwidth / 1e12:.1f} TB/s"
    title = name if count == 1 else f"{count} x {name}"
    return Device(title, True, memory, 2, 0.4 * operations, 0.6 * bandwidth, 0.6 * bandwidth, 0.8e-3, basis)


def cpu(threads: int, dtype: torch.dtype, memory: int) -> Device:
    """A CPU, from measured rates: as much faster as it has more threads, 2.5 times slower in float32."""
    is_bf16 = dtype == torch.bfloat16
    share = threads / 2 / (1.0 if is_bf16 else 2.5)
    basis = "rates measured on 2 threads of an AMD EPYC in bfloat16"
    if threads != 2:
        basis += f", taken to grow with the number of threads (times {threads / 2:g})"
    basis += "" if is_bf16 else ", 2.5 times slower in float32"
    rates = 0.457e12 * share, 12.5e9 * share, 2.1e9 * share
    return Device(f"CPU, {threads} thread{'s' if threads > 1 else ''}", False, memory, dtype.itemsize, *rates, 0.0, basis)


# ---- pieces of work -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Piece:
    """Measurements of one model that are made together. Notebooks share those with the same `key`."""

    key: tuple
    kind: str  # a key of RELATIVE_RATE
    shape: Shape
    basis: str  # what its size follows from; {plans} stands for `plans`
    plans: int = 0
    tokens: float = 0  # that pass through the model, over all plans
    passes: float = 0  # forward passes: each reads all weights once
    steps: float = 0  # decode steps, likewise
    context: float = 0  # tokens of keys and values that all steps read together
    fixed: float = 0  # seconds
    is_random: bool = False  # random weights are not offloaded: what does not fit is not run

    @property
    def model(self) -> str:
        """Name of the model or series."""
        return self.key[1]

    def seconds(self, device: Device) -> float:
        """About how long it takes. Weights that do not fit into a GPU cross the bus in each pass."""
        shape, beside = self.shape, offloaded(self.shape, device)
        if self.is_random and beside:
            return 0.0
        operations = (6 if self.kind == "training" else 2) * shape.parameters * self.tokens
        taken = self.fixed + operations / (device.operations * RELATIVE_RATE[self.kind])
        taken += self.steps * (2 * shape.parameters / device.weights + shape.layers * device.per_layer)
        taken += 2 * self.context * shape.cache / device.cache
        return taken + (self.passes + self.steps) * beside / BUS


def offloaded(shape: Shape, device: Device) -> float:
    """Bytes of weights that do not fit into the GPUs, of which a tenth is kept for the rest."""
    return max(0.0, device.bytes_per_number * shape.parameters - 0.9 * device.memory) if device.is_gpu else 0.0


def pieces_of(notebook: str, profile: dict, model: str, shape: Shape, is_random: bool) -> list[Piece]:
    """What a notebook (its number) measures of a model. `profile`: `Profile.to_json()`."""
    has_scores = not is_random and "calibration" in profile
    has_quality = has_scores and {"text", "tasks"} <= set(profile)
    if notebook == "01":
        return [_importance(profile, i, model, shape) for i in range(len(profile["calibration"]["corpora"]))]
    if notebook in ("02", "03"):
        found = [_importance(profile, 0, model, shape), *_curves(profile, model, shape)]
        return found + (_joint(profile, model, shape) if notebook == "03" else [])
    if notebook == "05":
        found = [_importance(profile, 0, model, shape)] if has_scores else []
        return (
            found
            + (_curves(profile, model, shape) if has_quality else [])
            + [_speed(profile["speed"], model, shape, is_random)]
        )
    if notebook == "09" and not is_random:
        return [_importance(profile, 0, model, shape), *_served(profile, model, shape)]
    if notebook == "11":
        return [_importance(profile, 0, model, shape), *_causes(profile, model, shape)]
    return []


def _importance(profile: dict, i: int, model: str, shape: Shape) -> Piece:
    part = profile["calibration"]
    n_samples = max(part["n_samples"], *part["sample_counts"]) if i == 0 else part["n_samples"]
    names = part["corpora"][:1] if i == 0 else part["corpora"][1:] if i == 1 else []  # the others are like the second
    basis = f"importance: {n_samples:,} x {part['seq_len']:,} tokens of {', '.join(names)}" if names else ""
    key = ("importance", model, part["corpora"][i])
    return Piece(key, "importance", shape, basis, 0, n_samples * part["seq_len"], n_samples / part["batch_size"])


def _curves(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Text and tasks under the plans that drop one kind, and on the dense model."""
    text, tasks = profile["text"], profile["tasks"]["n_drop"]
    counts = {kind: {n for n in (*text["n_drop"], *tasks.get(kind, [])) if n < shape.layers} for kind in SINGLE}
    n_tasks = 1 + sum(n < shape.layers for kind in SINGLE for n in tasks.get(kind, []))
    corpora = len(profile["calibration"]["corpora"])
    across = 1 + corpora * sum(n < shape.layers for n in text["across"])  # plans, on each corpus
    return [_text(text, ("text", model), shape, 1 + sum(map(len, counts.values()))),
            *([_across(text, model, shape, across, corpora)] if corpora > 1 else []),
            *_tasks(profile["tasks"], model, shape, n_tasks, "single")]  # fmt: skip


SINGLE = ("attention", "mlp", "block")


def _joint(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """What notebook 03 adds. A joint plan is taken to drop no MLP, and to be measured already, up to half of the layers."""
    text, tasks, part = profile["text"], profile["tasks"]["n_drop"].get("joint", []), profile["iterative"]
    new = {n for n in (*text["n_drop"], *tasks) if shape.layers / 2 < n < 2 * shape.layers}
    one_by_one = max([n for n in part["n_drop"] if n < shape.layers], default=0)
    basis = f"one by one: {part['n_samples']:,} x {profile['calibration']['seq_len']:,} tokens x {one_by_one} layers"
    tokens = part["n_samples"] * profile["calibration"]["seq_len"] * one_by_one
    passes = part["n_samples"] / profile["calibration"]["batch_size"] * one_by_one
    n_tasks = sum(n in new for n in tasks)
    return [
        Piece(("iterative", model), "iterative", shape, basis, 0, tokens, passes),
        _text(text, ("joint text", model), shape, len(new) + len(part["n_drop"])),
        *(_tasks(profile["tasks"], model, shape, n_tasks, "joint") if n_tasks else []),
    ]


def _causes(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Causes and ranks of hidden states, and each attention layer dropped alone: half of a pass on average."""
    part, seq_len = profile["causes"], profile["calibration"]["seq_len"]
    plans = 2 + 2 * sum(n < shape.layers for n in part["n_drop"])  # all causes, the dense model, and both kinds
    basis = f"causes: {part['n_samples']:,} x {seq_len:,} tokens x {plans} passes"
    tokens = part["n_samples"] * seq_len * plans
    causes = Piece(("causes", model), "importance", shape, basis, 0, tokens, part["n_samples"] * plans)
    return [causes, _text(profile["text"], ("damage", model), shape, 1 + shape.layers)]


def _across(text: dict, model: str, shape: Shape, plans: int, corpora: int) -> Piece:
    """Layers that each corpus chooses, on held-out text of all."""
    basis = f"text of {corpora} corpora: {text['n_samples']:,} x {text['seq_len']:,} tokens x {plans} plans each"
    return dataclasses.replace(_text(text, ("across text", model), shape, plans * corpora), basis=basis)


def _text(text: dict, key: tuple, shape: Shape, plans: int) -> Piece:
    basis = f"text: {text['n_samples']:,} x {text['seq_len']:,} tokens x {{plans}} plans"
    tokens = text["n_samples"] * text["seq_len"] * plans
    return Piece(key, "text", shape, basis, plans, tokens, math.ceil(tokens / plans / BATCH) * plans)


def _tasks(part: dict, model: str, shape: Shape, plans: int, which: str) -> list[Piece]:
    """Multiple choice and generated answers. A task that is in no list is taken to have 1,000 documents."""
    documents = tokens = steps = context = 0.0
    for task in part["names"]:
        about = catalogue()["task_sets"].get(task, {"documents": 1000})
        limit = part["limit"] * (SUBJECTS if "subjects" in known_tasks().get(task, {}) else 1) if part["limit"] else math.inf
        n = min(about["documents"], limit)
        shots = known_tasks().get(task, {}).get("num_fewshot", 0) if part["num_fewshot"] is None else part["num_fewshot"]
        documents += n
        tokens += n * TOKENS * (1 + shots)
        if about.get("generates"):
            steps += n * GENERATED / TOGETHER
            context += n * GENERATED * (TOKENS * (1 + shots) + GENERATED / 2)
    basis = f"tasks: {documents:,.0f} documents of {len(part['names'])} tasks, {tokens / 1e6:.2g} M tokens, x {{plans}} plans"
    key, passes = ("tasks", model, which), math.ceil(tokens / BATCH) * plans
    return [Piece(key, "tasks", shape, basis, plans, tokens * plans, passes, steps * plans, context * plans)]


def _speed(part: dict, model: str, shape: Shape, is_random: bool) -> Piece:
    """All loads of notebook 05 (`speedup/loads.py`), each under its plans and on the dense model."""
    listed = 1 + sum(n < shape.layers for several in part["n_drop"].values() for n in several)
    swept = 1 + 2 * (part["sweep_n"] < shape.layers)
    compiled = sum(n < shape.layers for several in (part["compiled"] or {}).values() for n in several)
    whole = sum(n < shape.layers for several in (part["whole"] or {}).values() for n in several)
    whole += bool(whole)  # and the dense model
    batch = part["batch_size"] or 8  # a GPU is filled: with about so many
    rounds = part["repeats"]
    prefill = part["prompt"] * batch * listed + sum(c for c in part["contexts"] if c <= part["prompt"]) * swept
    decode = []  # context, batch, plans
    for context in part["contexts"]:
        decode += [(context, 1, listed)] + [(context, size, swept) for size in part["sweep_batches"] if size > 1]
        if part["batch_size"] is None and part["prompt"] <= context <= part["prompt"] + part["new_tokens"]:
            decode.append((context, batch, listed))
    decode += [(part["prompt"], batch, 1 + compiled)] if compiled else []
    each = part["steps"] + 1  # one untimed step before those that are timed
    steps = rounds * sum(plans for *_, plans in decode) * each + whole * part["new_tokens"]
    context = rounds * sum(c * b * plans for c, b, plans in decode) * each
    context += whole * part["new_tokens"] * batch * (part["prompt"] + part["new_tokens"] / 2)
    tokens = rounds * prefill + whole * part["prompt"] * batch
    basis = f"timing: {steps:,.0f} decode steps, prompts of {tokens / 1e6:.2g} M tokens"
    key, passes = ("speed", model), tokens / part["prompt"]
    fixed = COMPILING * (1 + compiled) if compiled else 0
    return Piece(key, "prefill", shape, basis, 0, tokens, passes, steps, context, fixed, is_random)


def _served(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Exports with their gates, their times in llama.cpp, and those in torch that notebook 05 does not take."""
    part, speed = profile["take_away"], profile["speed"]
    contexts = [c for c in speed["contexts"] if c <= speed["prompt"]]
    plans = 1 + sum(n < shape.layers for n in part["n_drop"])
    files, rounds = plans * len(part["kinds"]), speed["repeats"]
    basis = f"{files} GGUF files, each on {rounds} x {sum(contexts):,} tokens in llama.cpp"
    tokens, new = rounds * files * sum(contexts), rounds * plans * sum(c for c in contexts if c < speed["prompt"])
    fixed = EXPORTING * shape.parameters * files
    served = Piece(("served", model), "served", shape, basis, 0, tokens, fixed=fixed)
    return [served, Piece(("served in torch", model), "prefill", shape, "", 0, new)]


def stage_pieces(part: dict, series: str, shape: Shape, stages: int) -> list[Piece]:
    """Importance and text at each stage of a series. `part`: the section stages."""
    n, m = part["n_samples"], part["text_samples"]
    basis = f"{stages} stages of {series}: {n} x {part['seq_len']:,} tokens, and {m} x {part['seq_len']:,} x 7 plans"
    passes = stages * (n / part.get("batch_size", 4) + 7)
    scores = Piece(("stages", series), "importance", shape, basis, 0, stages * n * part["seq_len"], passes)
    text = Piece(("stages text", series), "text", shape, "", 0, stages * m * part["seq_len"] * 7, passes)  # dense and six plans
    return [scores, text]


def training_piece(series: str, shape: Shape, recipe: Recipe, seeds: int) -> Piece:
    """Training a series under each seed that is not trained yet."""
    basis = f"training {series}: {recipe.tokens / 1e6:,.2g} M tokens x {seeds} {'seed' if seeds == 1 else 'seeds'}"
    return Piece(("training", series), "training", shape, basis, 0, recipe.tokens * seeds)


# ---- memory ---------------------------------------------------------------------------------------------------------------


def working_memory(notebooks: Collection[str], profile: dict, shape: Shape, device: Device) -> float:
    """Bytes beside the weights at the largest load of some notebooks (`WORKING` says the formula).

    On a GPU one sequence is counted, since what is too large for it is halved; on a CPU all that are timed, twice: filling a
    cache copies it.
    """
    tokens = scored = states = cached = files = 0
    if {"01", "02", "03", "05", "11"} & set(notebooks) and "calibration" in profile:
        tokens = profile["calibration"]["batch_size"] * profile["calibration"]["seq_len"]
    if {"02", "03", "11"} & set(notebooks):
        batch, head = (BATCH, 4096) if device.is_gpu else (1024, 1024)  # as in measure/scoring.py and measure/passes.py
        tokens, scored, states = max(tokens, batch), batch + 2 * head, batch * 3 * len(profile["text"]["n_drop"])
    if "05" in notebooks and (device.is_gpu or profile["speed"]["batch_size"]):
        part = profile["speed"]
        tokens = max(tokens, part["prompt"])
        cached = max(part["contexts"]) * (1 if device.is_gpu else 2 * max(part["sweep_batches"]))
    if "09" in notebooks and "take_away" in profile:  # it is in float32, and its files of 16 bits are open at once
        files = (4 - device.bytes_per_number + 2 * (1 + len(profile["take_away"]["n_drop"]))) * shape.parameters
    if "07" in notebooks:
        tokens = max(tokens, profile["stages"]["seq_len"] * profile["stages"].get("batch_size", 4))
        scored = max(scored, 3072)
    of_text = 48 * shape.width * tokens + 4 * shape.vocabulary * scored + device.bytes_per_number * shape.width * states
    return of_text + device.bytes_per_number * shape.cache * cached + files + (0 if device.is_gpu else PYTHON)


WORKING = (
    "48 bytes x width x tokens of a pass; the states that plans share;",
    "4 bytes x vocabulary x tokens that are scored together; keys and values of the longest context; exported files",
)
