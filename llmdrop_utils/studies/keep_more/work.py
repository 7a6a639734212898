"""Notebook 10, what is measured: models made from the dense one, read by the items of other notebooks; and orders of layers."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import nn

from ...base import files
from ...base.provenance import code_provenance
from ...derive.folds import fold_scaling, fold_transform, rescale
from ...derive.healing import VERSION as HEALING_VERSION
from ...derive.healing import Healing, heal
from ...derive.model import layers_restored
from ...derive.nbl import canonical_correlation_bound, fit_maps
from ...derive.repair import VERSION as REPAIR_VERSION
from ...derive.repair import repair
from ...derive.rivals import VERSION as RIVALS_VERSION
from ...derive.search import VERSION as SEARCH_VERSION
from ...derive.search import select_with_repair
from ...derive.sites import sites_of
from ...dropping.plan import DropPlan
from ...dropping.windows import obstacle_to_windows, windowed
from ...measure.importance import drop_order
from ...measure.text import VERSION as TEXT_VERSION
from ...models.families import family_of, find_anatomy, stream_width
from ...selection.methods import Context, select_at_random, select_by
from ...sources.texts import fingerprint
from ..what_breaks.work import ConfidenceWork, ProbeWork
from ..work import TextWork, Work
from .ranking import RankingWork

VERSION = 1  # raise when a change to the measurement changes what is measured
SEARCH, BOUND = "search with repair", "NBL's bound"
WIDTH = 128  # of a window, in tokens
PLAIN, MAPS, FOLD, SCALED, RESCALED = "plain", "linear maps (NBL)", "ReplaceMe", "LinearPatch", "Prune&Comp"
WINDOW = f"window of {WIDTH} tokens"  # in the layers that are otherwise dropped
REPAIR, REPAIR_MAPS, HEALING, REPAIR_HEALING = "repair", "repair, linear maps", "healing", "repair, healing"
Part = TextWork | ConfidenceWork | ProbeWork | RankingWork


class Making(NamedTuple):
    """What a way to make a model reads."""

    model: nn.Module  # the dense model, which is changed in place
    plan: DropPlan
    tokens: torch.LongTensor  # for fits
    text: torch.LongTensor  # for healing
    checkpoints: str  # where healing stores its own
    healing: Healing
    measuring: contextlib.ExitStack  # left once the model is measured


Make = Callable[[Making], DropPlan]  # changes the model, and returns the plan that it is measured under


def _plain(given: Making) -> DropPlan:
    return given.plan


def _window(given: Making) -> DropPlan:
    given.measuring.enter_context(windowed(given.model, given.plan.attention, WIDTH))
    return dataclasses.replace(given.plan, attention=())


def _maps(given: Making) -> DropPlan:
    return fit_maps(given.model, given.tokens, given.plan)


def _fold(given: Making) -> DropPlan:
    fold_transform(given.model, given.tokens, given.plan)
    return given.plan


def _scaled(given: Making) -> DropPlan:
    fold_scaling(given.model, given.tokens, given.plan)
    return given.plan


def _rescaled(given: Making) -> DropPlan:
    rescale(given.model, given.tokens, given.plan)
    return given.plan


def _repair(given: Making) -> DropPlan:
    repair(given.model, given.tokens, given.plan)
    return given.plan


def _repair_maps(given: Making) -> DropPlan:
    plan = fit_maps(given.model, given.tokens, given.plan)
    repair(given.model, given.tokens, plan)
    return plan


def _healing(given: Making) -> DropPlan:
    heal(given.model, given.text, given.plan, given.checkpoints, given.healing)
    return given.plan


def _repair_healing(given: Making) -> DropPlan:
    dense = copy.deepcopy(given.model)
    repair(given.model, given.tokens, given.plan)
    heal(given.model, given.text, given.plan, given.checkpoints, given.healing, teacher=dense)
    return given.plan


class Way(NamedTuple):
    """A way to make a model: what makes it, versions that are part of a result's key, and how often it passes the tokens."""

    make: Make
    versions: dict[str, int]
    passes: int


_RIVALS, _REPAIRED, _HEALED = {"rivals": RIVALS_VERSION}, {"repair": REPAIR_VERSION}, {"healing": HEALING_VERSION}
WAYS = {
    PLAIN: Way(_plain, {}, 0),
    WINDOW: Way(_window, {}, 0),
    MAPS: Way(_maps, _RIVALS, 1),
    FOLD: Way(_fold, _RIVALS, 1),
    SCALED: Way(_scaled, _RIVALS, 1),
    RESCALED: Way(_rescaled, _RIVALS, 1),
    REPAIR: Way(_repair, _REPAIRED, 4),
    REPAIR_MAPS: Way(_repair_maps, _RIVALS | _REPAIRED, 5),
    HEALING: Way(_healing, _HEALED, 0),
    REPAIR_HEALING: Way(_repair_healing, _REPAIRED | _HEALED, 4),
}


def obstacles(shape: nn.Module) -> dict[str, str]:
    """Which ways and orders a model's structure does not allow, and why. shape: the model without memory."""
    anatomy = find_anatomy(shape)
    family, config = family_of(anatomy.decoder.config), anatomy.decoder.config
    sites = [sites_of(layer.block, family, kind) for layer in anatomy.layers for kind in ("attention", "mlp")]
    found: dict[str, str] = {}
    if family.mlp_input is None:
        found |= dict.fromkeys((FOLD, SCALED), f"Attention and MLP of {anatomy.family} models read the same stream.")
    if getattr(config, "_remove_final_layer_norm", False):
        found[RESCALED] = "The model has no final norm, so the scale of its stream matters."
    if any(at and at.norm for at in sites):
        found |= dict.fromkeys(
            (FOLD, SCALED, RESCALED), f"What {anatomy.family} models add to the stream passes a norm before."
        )
    if reason := obstacle_to_windows(anatomy):
        found[WINDOW] = reason
    if family.adds_stream:
        why = f"Attention or MLP of {anatomy.family} models returns its term and the stream together."
        found |= dict.fromkeys((MAPS, FOLD, SCALED, RESCALED, REPAIR_MAPS, BOUND), why)
    if family.stream_norms:
        found |= dict.fromkeys((FOLD, SCALED, RESCALED, BOUND), f"Norms act on the stream itself in {anatomy.family} models.")
    if any(at and at.output is None for at in sites):
        found |= dict.fromkeys((FOLD, SCALED, RESCALED), "Its experts have no output projection of their own.")
    return found


@dataclasses.dataclass(frozen=True)
class MadeWork(Work):
    """What other items measure once a model is made; each value says what making it took, too."""

    way: str
    plan: DropPlan
    tokens: torch.LongTensor
    text: torch.LongTensor
    healing: Healing
    items: tuple[Part, ...]  # each under the plan alone

    @property
    def keys(self) -> list[dict]:
        code = code_provenance()
        machine = {name: code[name] for name in ("processor", "gpus", "cpu_threads")}  # seconds are among what is stored
        how: dict = {"way": self.way, "plan": self.plan.key.to_json(), "machine": machine}
        if self.way not in (PLAIN, WINDOW):
            how |= {"tokens": fingerprint(self.tokens), "versions": WAYS[self.way].versions}
        if self.way in (HEALING, REPAIR_HEALING):
            how |= {"text": fingerprint(self.text), "healing": dataclasses.asdict(self.healing)}
        return [self._key("made model", VERSION, **how, of=key) for item in self.items for key in item.keys]

    def only(self, missing: list[int]) -> Self:
        """The same for some of the items: what is stored of a model stays as it is when it is asked for more."""
        return dataclasses.replace(self, items=tuple(self.items[i] for i in missing))

    @property
    def tokens_to_pass(self) -> int:
        return self._read + sum(item.tokens_to_pass for item in self.items)

    @property
    def _read(self) -> int:
        """Tokens that making the model takes, as forward passes: a step of healing is one, a teacher's, and a backward pass."""
        healed = 4 * (self.healing.tokens or 0) if self.way in (HEALING, REPAIR_HEALING) else 0
        return WAYS[self.way].passes * self.tokens.numel() + healed

    @property
    def tokens_read(self) -> int:
        """Tokens of text that making the model reads; those of healing again and again, if it has few."""
        fitted = 0 if self.way in (PLAIN, WINDOW, HEALING) else self.tokens.numel()
        return fitted + ((self.healing.tokens or 0) if self.way in (HEALING, REPAIR_HEALING) else 0)

    @property
    def about(self) -> dict:
        return {"made by": self.way, "read": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}

    def measure(self, model, tokenizer, update) -> list[dict]:
        checkpoints = files.CACHE / "healing" / hashlib.sha256(json.dumps(self.keys).encode()).hexdigest()[:16]
        with layers_restored(model), contextlib.ExitStack() as measuring:
            started = time.perf_counter()
            plan = WAYS[self.way].make(
                Making(model, self.plan, self.tokens, self.text, str(checkpoints), self.healing, measuring)
            )
            seconds = time.perf_counter() - started
            update(self._read)
            more = len(plan.maps) * stream_width(model.config) * (stream_width(model.config) + 1)
            values = []
            for item in self.items:
                values += dataclasses.replace(item, plans=(plan,)).measure(model, tokenizer, update)
        shutil.rmtree(checkpoints, ignore_errors=True)  # a killed run resumes from them
        return [value | {"seconds": seconds, "parameters": more} for value in values]


Step = Callable[[tuple[int, ...], tuple[float, ...]], None]  # takes the layers that are dropped so far, and the KL after each


@dataclasses.dataclass(frozen=True)
class ChoiceWork(Work):
    """The order in which attention layers go if they are not ranked by cosine."""

    by: str  # in ORDERS
    tokens: torch.LongTensor
    n_drop: int
    candidates: int  # layers that each step of the search looks at

    @property
    def keys(self) -> list[dict]:
        code = code_provenance()
        machine = {name: code[name] for name in ("processor", "gpus", "cpu_threads")}
        more = {"tokens": fingerprint(self.tokens), "n_drop": self.n_drop, "machine": machine} | ORDERS[self.by].versions
        if self.by == SEARCH:
            more["candidates"] = self.candidates
        return [self._key(self.by, VERSION, **more)]

    @property
    def tokens_to_pass(self) -> int:
        return ORDERS[self.by].passes(self.n_drop, self.candidates) * self.tokens.numel()

    @property
    def about(self) -> dict:
        return {"layers by": self.by, "tokens": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}

    def measure(self, model, tokenizer, update) -> list[dict]:
        found: list[float] = []

        def step(layers: tuple[int, ...], left: tuple[float, ...]) -> None:
            found[:] = left
            update(self.tokens_to_pass / self.n_drop)

        started = time.perf_counter()
        plan = ORDERS[self.by].choose(model, self, step)
        return [{"layers": list(plan.attention), "divergence": found, "seconds": time.perf_counter() - started}]


@dataclasses.dataclass(frozen=True)
class Order:
    """A way to choose layers: what chooses, which calls `step` for each layer if it looks at what is left; its versions, which
    are part of a result's key; and how often it passes the tokens, of n dropped and of so many candidates."""

    choose: Callable[[nn.Module, ChoiceWork, Step], DropPlan]
    versions: dict[str, int]
    passes: Callable[[int, int], int]


def _search(model: nn.Module, given: ChoiceWork, step: Step) -> DropPlan:
    return select_with_repair(model, given.tokens, "attention", given.n_drop, given.candidates, on_step=step)


def _bound(model: nn.Module, given: ChoiceWork, step: Step) -> DropPlan:
    order = drop_order(canonical_correlation_bound(model, given.tokens))
    return DropPlan(order[: given.n_drop])


def _greedy(model: nn.Module, given: ChoiceWork, step: Step) -> DropPlan:
    return select_by("greedy KL", Context(model, given.tokens), "attention", given.n_drop)


def _random(model: nn.Module, given: ChoiceWork, step: Step) -> DropPlan:
    return select_at_random(len(find_anatomy(model)), "attention", given.n_drop, seed=0)


ORDERS = {
    SEARCH: Order(_search, {"search": SEARCH_VERSION}, lambda n, candidates: 3 * n * candidates),
    BOUND: Order(_bound, {"rivals": RIVALS_VERSION}, lambda n, candidates: 2),
    "greedy KL": Order(_greedy, {"text": TEXT_VERSION}, lambda n, candidates: 10 * n),
    "random": Order(_random, {}, lambda n, candidates: 0),
}
