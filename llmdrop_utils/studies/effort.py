"""About how long the notebooks take, and how much memory: what follows from a profile, and what a device does.

What a CPU does was measured: in bfloat16, on 2 threads of an AMD EPYC with instructions for it. What a GPU does is assumed.
"""

import dataclasses
from collections.abc import Collection

import psutil
import torch

from ..models.outlook import Shape

BATCH = 16384  # tokens that are scored in one pass on a GPU
OVERHEAD = 45.0  # seconds of a notebook for all but measuring: it reads texts, makes tokens, draws, is rendered
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


# ---- memory ---------------------------------------------------------------------------------------------------------------


def working_memory(notebooks: Collection[str], profile: dict, shape: Shape, device: Device) -> float:
    """Bytes beside the weights at the largest load of some notebooks (`WORKING` says the formula).

    On a GPU one sequence is counted, since what is too large for it is halved; on a CPU all that are timed, twice: filling a
    cache copies it.
    """
    tokens = scored = states = cached = files = 0
    if {"01", "02", "03", "04", "05", "08", "10", "11"} & set(notebooks) and "calibration" in profile:
        tokens = profile["calibration"]["batch_size"] * profile["calibration"]["seq_len"]
    if {"02", "03", "04", "08", "10", "11"} & set(notebooks):
        batch, head = (BATCH, 4096) if device.is_gpu else (1024, 1024)  # as in measure/scoring.py and measure/passes.py
        tokens, scored, states = max(tokens, batch), batch + 2 * head, batch * 3 * len(profile["text"]["n_drop"])
    if "05" in notebooks and (device.is_gpu or profile["speed"]["batch_size"]):
        part = profile["speed"]
        tokens = max(tokens, part["prompt"])
        cached = max(part["contexts"]) * (1 if device.is_gpu else 2 * max(part["sweep_batches"]))
    if "09" in notebooks and "take_away" in profile:  # it is in float32, and its files of 16 bits are open at once
        files = (4 - device.bytes_per_number + 2 * (1 + len(profile["take_away"]["n_drop"]))) * shape.parameters
    if "08" in notebooks and "changes" in profile:  # a changed copy is timed beside the model
        files = max(files, device.bytes_per_number * shape.parameters)
    if "10" in notebooks and "keep_more" in profile:  # a copy of the model; trained weights take 12 bytes each beside it
        ways = [way for some in (profile["keep_more"]["chosen"] or {}).values() for way in some] + profile["keep_more"]["ways"]
        trained = 12 * any("healing" in way for way in ways)
        files = max(files, (device.bytes_per_number + trained) * shape.parameters)
    if "12" in notebooks and "others" in profile:  # images of 257 tokens
        tokens = max(tokens, 257 * profile["others"]["batch_size"])
    if "07" in notebooks:
        tokens = max(tokens, profile["stages"]["seq_len"] * profile["stages"].get("batch_size", 4))
        scored = max(scored, 3072)
    of_text = 48 * shape.width * tokens + 4 * shape.vocabulary * scored + device.bytes_per_number * shape.width * states
    return of_text + device.bytes_per_number * shape.cache * cached + files + (0 if device.is_gpu else PYTHON)


WORKING = (
    "48 bytes x width x tokens of a pass; the states that plans share;",
    "4 bytes x vocabulary x tokens that are scored together; keys and values of the longest context; exported files",
)
