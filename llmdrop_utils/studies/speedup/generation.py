"""Notebook 05, from stored values to timings; and whole generations, composed from a prefill and samples of decode steps.

A generation of 2,048 tokens in and out takes minutes, so it is timed in samples under most plans: the prompt, and a few decode
steps at several contexts. A decode step's time hardly bends between neighbouring contexts, so steps between them follow a line.
Under the plans that the profile lists under `whole` it is timed whole too, once, and compared with its samples.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from ...base import stats
from ...dropping.plan import DropPlan, PlanKey
from ...measure.speed import NOISY, spread_of
from ..work import DENSE_CELL, Cell
from .loads import Speed, SpeedWork

GENERATION = "generation from samples"  # what tables call it


@dataclasses.dataclass(frozen=True)
class Timed:
    """One load under one plan, and the dense model in the same rounds."""

    row: dict  # what was timed, and its place in the tables
    asked: int | None  # batch that was asked for; None: as many sequences as fit. Less in `row` if memory ran out
    seconds: np.ndarray  # (repeats,)
    floor: float  # seconds that its bytes and operations would take, parts one after the other
    dense_seconds: np.ndarray  # (repeats,)
    dense_floor: float

    @property
    def cell(self) -> tuple[str, str, int]:
        """Model, kind, number dropped."""
        return self.row["model"], self.row["kind"], self.row["n"]

    def as_row(self) -> dict:
        """With median, spread, speed-up over dense, and both beside what bytes and operations would give.

        Each repeat is compared with the dense model's of the same number. Eager plans take turns, so these are of one round,
        and what slows the machine for a while slows both; on the compiled back end all repeats of a plan follow each other.
        Dense 2.0, 4.0, 2.2 s and dropped 1.0, 2.0, 1.1 s is a speed-up of exactly 2, however noisy. It is noisy if either is.
        `level` is what the intervals cover (see `stats.median_interval`).
        """
        ratio = self.dense_seconds / self.seconds
        seconds_low, seconds_high, level = stats.median_interval(self.seconds)
        speedup_low, speedup_high, _ = stats.median_interval(ratio)
        median, spread, dense_spread = np.median(self.seconds), spread_of(self.seconds), spread_of(self.dense_seconds)
        return self.row | {
            "seconds": median, "seconds_low": seconds_low, "seconds_high": seconds_high, "level": level, "spread": spread,
            "dense_spread": dense_spread, "noisy": spread > NOISY or dense_spread > NOISY, "speedup": np.median(ratio),
            "speedup_low": speedup_low, "speedup_high": speedup_high, "predicted": self.dense_floor / self.floor,
            "share_of_limit": self.floor / median,
        }  # fmt: skip


def read_timings(item: SpeedWork, values: list[dict], plans: dict[Cell, DropPlan]) -> list[Timed]:
    """What an item measured: the dense model once, and each plan. `values`: in the order of the item's plans."""
    cells: dict[PlanKey, list[Cell]] = {}
    for cell, plan in plans.items():  # a joint plan is an attention plan as long as it drops no MLP
        cells.setdefault(plan.key, []).append(cell)
    measured = [(DENSE_CELL, values[0]["dense"], values[0]["dense"])]
    for plan, value in zip(item.plans, values, strict=True):
        measured += [(cell, value["plan"], value["dense"]) for cell in cells[plan.key]]
    load, asked = item.load, None if item.fill else item.load.batch_size
    timed = []
    for cell, found, dense in measured:
        row = {"model": item.model.name, "backend": load.backend, "what": load.what, "batch_size": found["batch_size"],
               "context": load.context, "new_tokens": load.new_tokens, "room": load.room, "kind": cell.kind, "n": cell.n,
               "kv_bytes": found["kv_bytes"], "peak_bytes": found["peak_bytes"], "fill": item.fill}  # fmt: skip
        times = np.array(found["seconds"]), found["floor_seconds"], np.array(dense["seconds"]), dense["floor_seconds"]
        timed.append(Timed(row, asked, *times))
    return timed


def compose_generations(timed: list[Timed], settings: Speed) -> tuple[list[Timed], dict[str, str]]:
    """The paper's protocol on each back end.

    Returns them, and why others cannot be composed (what -> reason).
    """
    prompt, new_tokens = settings.prompt, settings.new_tokens
    of_batch = [t for t in timed if t.asked == settings.batch_size]
    composed, not_run = [], {}
    for backend in ("eager", "compiled"):
        # 1. Prefill and samples of decoding, of each model and plan.
        prefills = {t.cell: t for t in of_batch if t.row["what"] == "prefill" and t.row["context"] == prompt}
        samples: dict[tuple, dict[int, Timed]] = {}
        for t in of_batch:
            context = t.row["context"]
            if t.row["what"] == "decode" and t.row["backend"] == backend and prompt <= context <= prompt + new_tokens:
                samples.setdefault(t.cell, {})[context] = t
        # 2. What a static cache attends over does not depend on how full it is: one sample stands for all of its steps.
        ends = {prompt, prompt + new_tokens} if backend == "eager" else {prompt}
        for cell, decode in samples.items():
            if cell not in prefills or not ends <= set(decode):
                continue
            # 3. Times of different batches do not add up.
            if len({t.row["batch_size"] for t in (prefills[cell], *decode.values())}) > 1:
                not_run[f"{cell[0]}, {GENERATION}, {backend}"] = (
                    "Memory ran out at some of its contexts, so they were timed with different batches. "
                    "Set the profile's speed.batch_size to a number that fits."
                )
                continue
            composed.append(integrate(prefills[cell], decode, prompt, new_tokens))
    return composed, not_run


def integrate(prefill: Timed, decode: dict[int, Timed], prompt: int, new_tokens: int) -> Timed:
    """Prefill and all decode steps but the first token's, which the prefill gives; times between samples by a line.

    decode: context -> a decode step there; several that were timed together stand for the one in their middle. Sums are made
    round by round, so they stay paired with the dense model's. For 100 tokens in and 3 out, with single steps of 1 s at a
    context of 100 and 2 s at 110: prefill + 1.0 + 1.1, since the two steps come after 100 and 101 tokens.
    """
    samples = [decode[context] for context in sorted(decode)]
    contexts = [sample.row["context"] + (sample.row["new_tokens"] - 1) / 2 for sample in samples]
    at = prompt + np.arange(new_tokens - 1)

    def steps(times: Callable[[Timed], np.ndarray | float]) -> np.ndarray:
        """Sum over all steps: for each round, or a single number."""
        over_contexts = np.array([times(sample) for sample in samples])
        return np.apply_along_axis(lambda values: np.interp(at, contexts, values).sum(), 0, over_contexts)

    load = {"what": GENERATION, "context": prompt, "new_tokens": new_tokens}
    return Timed(
        row=samples[-1].row | load,
        asked=prefill.asked,
        seconds=prefill.seconds + steps(lambda t: t.seconds),
        floor=prefill.floor + float(steps(lambda t: t.floor)),
        dense_seconds=prefill.dense_seconds + steps(lambda t: t.dense_seconds),
        dense_floor=prefill.dense_floor + float(steps(lambda t: t.dense_floor)),
    )
