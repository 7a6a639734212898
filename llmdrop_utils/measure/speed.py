"""Seconds of prefill, of decoding and of whole generations, beside what bytes and operations would take.

Every step gets the cache of the steps before it, and the cache is checked to have grown. Speed does not depend on values,
so a context is put into the cache without being read, and weights may be random.
"""

import dataclasses
import functools
import sys
import time
import timeit
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from ..base.checks import as_whole, whole
from ..base.errors import LLMDropError, NotAvailable
from ..dropping.plan import DropPlan, check_plans
from ..dropping.units import skipping
from ..models.families import find_anatomy, learned_positions
from .decoding import BACKENDS, check_length, device_of, holding_layers, new_cache, next_token, random_tokens, rewinder, stepper
from .floors import cache_bytes, floor_seconds, kv_bytes, parts_of_pass
from .guard import measuring

VERSION = 1  # raise when a change to the measurement changes what is measured

NOISY = 0.1  # a spread above this marks a timing as noisy


@dataclasses.dataclass(frozen=True)
class Load:
    """What is timed. `context` counts tokens a sequence: of the prompt (prefill, generation), or in the cache (decode)."""

    what: str  # "prefill": the prompt in one pass; "decode": one token after a context; "generation": both, to the end
    context: int
    new_tokens: int = 0  # decode: steps timed together; generation: tokens generated
    batch_size: int = 1
    backend: str = "eager"  # of decoding; a prompt is read eagerly by both
    room: int | None = None  # tokens that a static cache has room for, and attends over; None: context + new_tokens

    def __post_init__(self):
        if self.what not in ("prefill", "decode", "generation"):
            raise LLMDropError(f"Unknown load {self.what!r}. There are: prefill, decode, generation.")
        if self.backend not in BACKENDS:
            raise LLMDropError(f"Unknown back end {self.backend!r}. There are: {', '.join(BACKENDS)}.")
        for name in ("context", "new_tokens", "batch_size", *(["room"] if self.room is not None else [])):
            if (number := as_whole(getattr(self, name))) is None:
                raise LLMDropError(f"The {name} of a load must be a whole number, but is {getattr(self, name)!r}.")
            object.__setattr__(self, name, number)
        if min(self.context, self.batch_size, self.new_tokens + (self.what == "prefill")) < 1:
            raise LLMDropError(f"Nothing to time in {self}: context, batch size and new tokens must be at least 1.")
        if self.room is not None and self.room < self.context + self.new_tokens:
            raise LLMDropError(f"A cache with room for {self.room} tokens cannot hold {self.context + self.new_tokens}.")


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a load takes under one plan."""

    seconds: tuple[float, ...]  # one for each repeat: of the prefill, of one decode step, of the generation
    floor_seconds: float  # what its bytes and operations would take: an estimate, no bound (see `floors.floor_seconds`)
    kv_bytes: int  # of the prompt (prefill), the context (decode), all that was read (generation), counted from the cache;
    # a static cache takes its whole room from the start
    peak_bytes: int | None  # most memory the GPU held at once, with what is left of the weights; None on a CPU
    batch_size: int  # smaller than asked for if memory ran out

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """See `spread_of`."""
        return spread_of(self.seconds)


def spread_of(seconds: Sequence[float] | np.ndarray) -> float:
    """The middle half of the repeats, as a share of their median; NaN for a single one."""
    if len(seconds) < 2:
        return float("nan")
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return float((high - low) / median)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the device does at best, as measured on it."""

    bandwidth: float  # bytes/s moved, the better of copying a large tensor and of multiplying a matrix with a vector
    rate: float  # operations/s of multiplying two large matrices


def measure_speed(
    model: nn.Module,
    load: Load,
    plans: Sequence[DropPlan] = (DropPlan(),),
    repeats: int = 5,
    on_repeat: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """Time a load under each plan.

    Eager plans take turns, repeat by repeat, so that whatever slows the machine meets all of them; when compiled, all repeats
    of a plan follow each other. Before the first repeat of each turn comes a short untimed warm-up; a GPU has one round at full
    length instead, in which it takes memory and chooses kernels for these lengths. Times end when the device is done. If memory
    runs out, the batch of all plans is halved, with a message.

    Returns one `Speed` for each plan. Raises LLMDropError for a plan that does not fit the model and for a load that is too
    large even as a single sequence, NotAvailable if the compiled back end cannot run the model.
    """
    if not isinstance(load, Load):
        raise LLMDropError(f'Expected a Load, such as Load("prefill", 2048), found {load!r}.')
    plans, repeats = check_plans(model, plans), whole(repeats, "The number of repeats")
    longest, known = load.context + load.new_tokens, learned_positions(find_anatomy(model).decoder.config)
    if known is not None and longest > known:
        raise LLMDropError(f"{longest} tokens are more than the {known} positions that the model knows.")
    while True:
        try:
            with measuring(model):
                return _measure(model, load, plans, repeats, on_repeat)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if load.batch_size == 1:
                raise LLMDropError(f"Out of memory with a single sequence of {longest} tokens.") from error
            load = dataclasses.replace(load, batch_size=load.batch_size // 2)
            print(f"out of memory: going on with a batch of {load.batch_size}", file=sys.stderr)
        torch.cuda.empty_cache()


@functools.cache
def device_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure what a device can do; takes a second, and is done once in a process."""
    device = torch.device(device)
    size = 2**28 if device.type == "cpu" else 2**30
    a, b = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    matrix = torch.ones(size // 4096 // dtype.itemsize, 4096, dtype=dtype, device=device)
    vector = torch.ones(4096, dtype=dtype, device=device)
    copied = 2 * size / _best(lambda: a.copy_(b), device)
    read = matrix.nbytes / _best(lambda: matrix @ vector, device)
    rates = []
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        square = torch.randn(n, n, device=device).to(dtype)
        rates.append(2 * n**3 / _best(functools.partial(torch.matmul, square, square), device))
    return Limits(bandwidth=max(copied, read), rate=max(rates))


def largest_batch(model: nn.Module, length: int) -> int:
    """About how many sequences of `length` tokens fit into the GPU's free memory, with a fifth of it kept for the rest.

    Raises NotAvailable without a GPU.
    """
    config, device = find_anatomy(model).decoder.config, device_of(model)
    if device.type != "cuda":
        raise NotAvailable("Filling the memory with sequences takes a GPU. Set the profile's speed.batch_size to a number.")
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    each = kv_bytes(config, DropPlan(), 1, length, model.dtype.itemsize)
    return max(1, int(0.8 * free / each))


# ---- taking times ---------------------------------------------------------------------------------------------------


def _measure(model, load: Load, plans: Sequence[DropPlan], repeats: int, on_repeat) -> list[Speed]:
    device = device_of(model)
    limits = device_limits(device, model.dtype)
    turns, each = (repeats, 1) if load.backend == "eager" else (1, repeats)
    untimed = int(device.type == "cuda" and load.backend == "eager" and load.what != "generation")
    all_bytes = _weight_bytes(model)
    seconds: list[list[float]] = [[] for _ in plans]
    facts: list[dict] = [{} for _ in plans]
    for turn in range(-untimed, turns):
        for i, plan in enumerate(plans):
            with skipping(model, plan):  # what is dropped stays on a GPU: moving it would take longer than what is timed
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                job = {"prefill": _prefill, "decode": _decode, "generation": _generation}[load.what](model, load)
                if not untimed:
                    job(warm_up=True)
                for _ in range(each):
                    taken, cache = job()
                    if turn >= 0:
                        seconds[i].append(taken)
                        on_repeat()
                gone = all_bytes - _weight_bytes(model)
                peak = torch.cuda.max_memory_allocated(device) - gone if device.type == "cuda" else None
                floor = _floor(model, load, limits)
                facts[i] = {"floor_seconds": floor, "kv_bytes": cache_bytes(cache), "peak_bytes": peak}
                del job, cache
    return [Speed(seconds=tuple(s), batch_size=load.batch_size, **f) for s, f in zip(seconds, facts, strict=True)]


def _weight_bytes(model) -> int:
    """Bytes of the weights and buffers that the model has now."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _prefill(model, load: Load):
    """The prompt in one pass, logits of its last token only."""
    tokens = random_tokens(model, load.batch_size, load.context)

    def job(warm_up: bool = False):
        if warm_up:
            next_token(model, _some(tokens), new_cache(model, "eager", load.context))
            return None
        cache = new_cache(model, "eager", load.context)
        taken = _seconds(lambda: next_token(model, tokens, cache), tokens.device)
        check_length(cache, load.context)
        return taken, cache

    return job


def _decode(model, load: Load):
    """`new_tokens` steps after a context, each with the cache of those before; time of one."""
    cache = _filled_cache(model, load)
    rewind = rewinder(cache, load.context)
    first = random_tokens(model, load.batch_size, 1)
    step = stepper(model, first, cache, load.backend)

    def steps(n: int) -> None:
        token = first
        for _ in range(n):
            token = step(token)

    def job(warm_up: bool = False):
        if warm_up:
            steps(1)
            rewind()
            return None
        taken = _seconds(lambda: steps(load.new_tokens), first.device) / load.new_tokens
        check_length(cache, load.context + load.new_tokens)
        rewind()
        return taken, cache

    return job


def _generation(model, load: Load):
    """Prompt and decoding, to the last token."""
    tokens = random_tokens(model, load.batch_size, load.context)
    room = load.room or load.context + load.new_tokens
    state: dict = {}

    def generate(prompt: torch.Tensor = tokens, steps: int = load.new_tokens - 1) -> None:
        cache = state["cache"]
        token = next_token(model, prompt, cache)
        step = state.get("step") or stepper(model, token, cache, load.backend)
        state["step"] = step
        for _ in range(steps):
            token = step(token)

    def job(warm_up: bool = False):
        if load.backend == "eager" or "cache" not in state:
            state.clear()
            state["cache"] = new_cache(model, load.backend, room)
        else:  # what was compiled and captured holds this very cache
            rewinder(state["cache"], 0)()
        if warm_up:
            generate(_some(tokens), min(1, load.new_tokens - 1))
            return None
        taken = _seconds(generate, tokens.device)
        check_length(state["cache"], load.context + load.new_tokens - 1)
        return taken, state["cache"]

    return job


def _some(tokens: torch.Tensor) -> torch.Tensor:
    """What a warm-up reads of a prompt. A GPU takes memory and chooses kernels for this very length the first time."""
    return tokens if tokens.is_cuda else tokens[:, :16]


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, from a device at rest to a device at rest. Python's garbage collection waits."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def to_the_end() -> None:
        function()
        wait()

    wait()
    return timeit.timeit(to_the_end, number=1, timer=time.perf_counter)


def _best(function: Callable[[], object], device: torch.device) -> float:
    """Least of several times: what the device does when nothing disturbs it."""
    function()
    return min(_seconds(function, device) for _ in range(8))


def _floor(model, load: Load, limits: Limits) -> float:
    parts = functools.partial(parts_of_pass, model, load.batch_size)
    floor = lambda n_new, context: floor_seconds(parts(n_new, context), limits.bandwidth, limits.rate)  # noqa: E731
    if load.what == "prefill":
        return floor(load.context, 0)
    if load.backend == "compiled":  # attends over all that its cache has room for
        middle = floor(1, (load.room or load.context + load.new_tokens) - 1)
    else:
        middle = floor(1, load.context + load.new_tokens // 2)  # bytes and operations grow evenly with the context
    return middle if load.what == "decode" else floor(load.context, 0) + (load.new_tokens - 1) * middle


def _filled_cache(model, load: Load) -> Cache:
    """A cache that holds `context` tokens without having read them all: keys and values of a few, again and again."""
    cache = new_cache(model, load.backend, load.room or load.context + load.new_tokens)
    next_token(model, random_tokens(model, load.batch_size, min(16, load.context)), cache)
    for layer in holding_layers(cache):
        if load.backend == "compiled":
            layer.keys.normal_()
            layer.values.normal_()
            continue
        kept = load.context if not layer.is_sliding else min(load.context, layer.sliding_window - 1)
        times = -(-kept // layer.keys.shape[-2])
        layer.keys, layer.values = (x.repeat(1, 1, times, 1)[:, :, :kept].clone() for x in (layer.keys, layer.values))
    rewinder(cache, load.context)()
    return cache
