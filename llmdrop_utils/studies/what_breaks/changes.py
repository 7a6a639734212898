"""Notebook 08, weights that are changed: rounded to fewer bits, pruned one by one, or tuned after dropping.

A change is made on the loaded model, measured under all plans that go with it, and taken back.
"""

import copy
import dataclasses
import hashlib
import json
import shutil
from typing import Annotated

import torch
from torch import nn

from ...base import files
from ...base.errors import LLMDropError
from ...base.provenance import code_provenance
from ...base.settings import Counts, Positive, PositiveNumber, Settings
from ...derive.model import layers_restored
from ...derive.quantise import GROUPS, quantise, round_weights
from ...derive.tuning import VERSION as TUNING_VERSION
from ...derive.tuning import Tuning, tune
from ...derive.wanda import prune_by_wanda, sparsity_for
from ...dropping.plan import DropPlan
from ...measure.speed import Load, measure_speed
from ...sources.texts import fingerprint
from ..profile import CountsByKind, known, section
from ..work import DENSE, ImportanceWork, TaskWork, TextWork, Work

VERSION = 1  # raise when a change to the measurement changes what is measured
NONE, WANDA, LORA = "none", "Wanda", "LoRA"  # what tables call changes; the others are "8 bits" and "4 bits"


@section("changes")
class Changes(Settings):
    """What is changed beside dropping: bits, single weights, and a short tuning."""

    n_drop: Counts  # attention layers dropped beside
    bits: Annotated[Counts, known("bit width", GROUPS)]  # of weights rounded to nearest
    n_samples: Positive  # of the first corpus that pruning reads
    tuned: CountsByKind  # what is dropped before tuning; the dense model is tuned too
    tuning_samples: Positive  # samples of the calibration corpus that tuning reads,
    tuning_epochs: Positive  # so often,
    tuning_batch: Positive  # so many in a step,
    tuning_rate: PositiveNumber  # at this learning rate, the highest
    text_samples: Positive  # of held-out text
    task_limit: Positive | None  # documents of each task; null: all
    context: Positive  # tokens in the cache when decoding is timed
    steps: Positive  # decode steps timed together
    repeats: Positive


def bits_name(bits: int) -> str:
    return f"{bits} bits"


@dataclasses.dataclass(frozen=True)
class ChangedWork(Work):
    """What other items measure, once the weights are changed."""

    change: str  # WANDA, LORA or a number of bits
    plan: DropPlan  # that tuning is done under, or whose number of weights is pruned
    tokens: torch.LongTensor  # that a change reads
    settings: Tuning
    items: tuple[TextWork | TaskWork, ...] | tuple[ImportanceWork]

    @property
    def keys(self) -> list[dict]:
        how: dict = {"change": self.change, "tokens": fingerprint(self.tokens), "plan": self.plan.key.to_json()}
        if self.change == LORA:
            how |= {"tuning": TUNING_VERSION, "settings": dataclasses.asdict(self.settings)}
        return [self._key("changed weights", VERSION, **how, of=key) for item in self.items for key in item.keys]

    @property
    def tokens_to_pass(self) -> int:
        return self._read + sum(item.tokens_to_pass for item in self.items)

    @property
    def _read(self) -> int:
        """Tokens that the change itself takes; a backward pass counts as two."""
        return {WANDA: 2, LORA: 3 * self.settings.epochs}.get(self.change, 0) * self.tokens.numel()

    @property
    def about(self) -> dict:
        return {"change": self.change, "read": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}

    def measure(self, model, tokenizer, update) -> list[dict]:
        checkpoints = files.CACHE / "tuning" / hashlib.sha256(json.dumps(self.keys).encode()).hexdigest()[:16]
        with layers_restored(model):
            if self.change == WANDA:
                prune_by_wanda(model, self.tokens, sparsity_for(model, self.plan))
            elif self.change == LORA:
                tune(model, self.tokens, self.plan, checkpoints, self.settings)
            else:
                round_weights(model, int(self.change.split()[0]))
            update(self._read)
            values = [value for item in self.items for value in item.measure(model, tokenizer, update)]
        shutil.rmtree(checkpoints, ignore_errors=True)  # a killed run resumes from them
        return values


@dataclasses.dataclass(frozen=True)
class ChangedSpeedWork(Work):
    """Decoding with weights changed, and dropped: each version beside the dense model, in turns; two models in memory.

    versions: change and plan; of a pruned version, the plan whose number of weights is pruned.
    """

    versions: tuple[tuple[str, DropPlan], ...]
    context: int
    steps: int
    repeats: int
    tokens: torch.LongTensor

    @property
    def keys(self) -> list[dict]:
        code = code_provenance()
        load = {"context": self.context, "steps": self.steps, "repeats": self.repeats}
        machine = {name: code[name] for name in ("processor", "gpus", "cpu_threads")}
        versions = [[change, plan.key.to_json()] for change, plan in self.versions]
        return [self._key("changed speed", VERSION, versions=versions, load=load, machine=machine)]

    @property
    def tokens_to_pass(self) -> int:
        return len(self.versions) * self.repeats * (self.context + self.steps)

    @property
    def about(self) -> dict:
        return {"timed": "decoding", "context": self.context, "steps": self.steps}

    def measure(self, model, tokenizer, update) -> list[dict]:
        seconds: dict[int, list[float]] = {}
        dense: dict[int, list[float]] = {}
        for group in self._together():
            each = self._changed(model, *self.versions[group[0]])
            turns = {i: self.versions[i][1] if self.versions[i][0] != WANDA else DENSE for i in group}
            for _ in range(self.repeats):
                (first,) = measure_speed(model, self._load, [DENSE], repeats=1)
                for i, plan in turns.items():
                    (taken,) = measure_speed(each, self._load, [plan], repeats=1)
                    seconds.setdefault(i, []).extend(taken.seconds)
                    dense.setdefault(i, []).extend(first.seconds)
                    update(self.context + self.steps)
            del each
        order = range(len(self.versions))
        return [{"seconds": [seconds[i] for i in order], "dense": [dense[i] for i in order]}]

    @property
    def _load(self) -> Load:
        return Load("decode", self.context, self.steps)

    def _together(self) -> list[list[int]]:
        """Positions of the versions whose weights are the same."""
        groups: dict[tuple, list[int]] = {}
        for i, (change, plan) in enumerate(self.versions):
            groups.setdefault((change, plan.key if change == WANDA else None), []).append(i)
        return list(groups.values())

    def _changed(self, model: nn.Module, change: str, plan: DropPlan) -> nn.Module:
        """A changed copy; the model itself if nothing is changed."""
        if change == NONE:
            return model
        try:
            other = copy.deepcopy(model)
        except torch.OutOfMemoryError as error:
            raise LLMDropError(
                "Out of GPU memory with a second copy of the model, whose weights were to be changed."
            ) from error
        if change == WANDA:
            prune_by_wanda(other, self.tokens, sparsity_for(other, plan))
        else:
            quantise(other, int(change.split()[0]))
        return other
