"""Criteria: one number for each layer, the lowest is dropped first. Each registered one is a selection method of its name."""

from collections.abc import Callable

import numpy as np
from torch import nn

from ..base.errors import LLMDropError, NotApplicable
from ..dropping.plan import DropPlan
from ..dropping.units import available
from ..measure.alone import measure_without_residual
from ..measure.importance import drop_order
from ..measure.metrics import KINDS
from ..measure.taylor import measure_taylor
from ..measure.text import score_text
from ..measure.weights import has_plain_queries, query_key_norm, weight_norm
from ..models.families import Anatomy, family_of, find_anatomy
from .methods import Context, as_plan, by_order, method
from .ranking import check_count, check_kind

Criterion = Callable[[Context, str], np.ndarray]  # context, kind -> float64 (n_layers,)

CRITERIA: dict[str, Criterion] = {}


Obstacle = Callable[[Anatomy], str | None]  # why a criterion cannot be had of a model, told by its structure alone
OBSTACLES: dict[str, Obstacle] = {}


def criterion(
    name: str, kinds: tuple[str, ...] = KINDS, obstacle: Obstacle = lambda anatomy: None
) -> Callable[[Criterion], Criterion]:
    """Register a function as the criterion of this name, for these kinds, and as the method that drops by it."""
    OBSTACLES[name] = obstacle

    def register(function: Criterion) -> Criterion:
        def scores(context: Context, kind: str) -> np.ndarray:
            check_kind(kind, kinds)
            if reason := obstacle_to(name, context.model):
                raise LLMDropError(reason)
            found = function(context, kind)
            if not np.isfinite(found).all():
                raise NotApplicable(f"The criterion {name!r} reads weights, and some are offloaded: choose another.")
            return found

        @method(name)
        def drop_by_it(context: Context, kind: str, n_drop: int) -> DropPlan:
            return by_order(context, kind, n_drop, drop_order(scores(context, kind)))

        CRITERIA[name] = scores
        return function

    return register


@criterion("angular distance")
def _angular(context: Context, kind: str) -> np.ndarray:
    return context.importance("angular distance").importance[kind]


def _other_mixers(anatomy: Anatomy) -> str | None:
    return anatomy.other_mixers


def _not_alone(anatomy: Anatomy) -> str | None:
    if anatomy.other_mixers:
        return anatomy.other_mixers
    if family_of(anatomy.decoder.config).adds_stream:
        return "attention or MLP returns its term and the stream together"
    return None if family_of(anatomy.decoder.config).mlp_is_one_module else "their MLP is no module of its own"


@criterion("without residual", ("attention", "mlp"), _not_alone)
def _without_residual(context: Context, kind: str) -> np.ndarray:
    return measure_without_residual(context.model, context.tokens, context.batch_size)[kind]


@criterion("Taylor")
def _taylor(context: Context, kind: str) -> np.ndarray:
    return measure_taylor(context.model, context.tokens, context.batch_size)[kind]


@criterion("output change")
def _output_change(context: Context, kind: str) -> np.ndarray:
    """KL of the model without this layer alone from the model as it is, in nats per token."""
    scores = np.zeros(len(find_anatomy(context.model)))
    layers = available(find_anatomy(context.model), kind)
    alone = [as_plan(kind, (layer,)) for layer in layers]
    scores[layers] = score_text(context.model, context.tokens, [DropPlan(), *alone]).kl[1:].mean(1)
    return scores


@criterion("weight norm", obstacle=_other_mixers)
def _weight_norm(context: Context, kind: str) -> np.ndarray:
    anatomy = find_anatomy(context.model)
    return np.array([weight_norm(layer.block, anatomy.decoder.config, kind) for layer in anatomy.layers])


def _no_plain_queries(anatomy: Anatomy) -> str | None:
    if anatomy.other_mixers:
        return anatomy.other_mixers
    plain = all(has_plain_queries(layer.block, anatomy.decoder.config) for layer in anatomy.layers)
    return None if plain else "queries and keys are normalised, or their weights are not named as in Llama"


@criterion("Gate-Norm", ("attention",), _no_plain_queries)
def _gate_norm(context: Context, kind: str) -> np.ndarray:
    anatomy = find_anatomy(context.model)
    return np.array([query_key_norm(layer.block, anatomy.decoder.config) for layer in anatomy.layers])


def obstacle_to(name: str, model: nn.Module) -> str | None:
    """Why a method cannot rank the layers of a model (which may be without memory, on "meta"); None if it can."""
    anatomy = find_anatomy(model)
    reason = OBSTACLES.get(name, lambda anatomy: None)(anatomy)
    return reason and f"The criterion {name!r} cannot be had of {anatomy.family} models: {reason}."


# ---- step by step -------------------------------------------------------------------------------------------------------


@method("greedy KL")
def select_greedily(context: Context, kind: str, n_drop: int) -> DropPlan:
    """Drop the layer without which the next-token distribution moves least from the dense model's, then the next, and so on.

    Looks at every layer that is left at every step: about n x (n_layers - n / 2) / 2 forward passes, since plans share the
    layers below the first one where they differ.
    """
    check_kind(kind, KINDS)
    candidates = available(find_anatomy(context.model), kind)
    check_count(n_drop, len(candidates), kind)
    chosen: list[int] = []
    while len(chosen) < n_drop:
        tried = [as_plan(kind, (*chosen, layer)) for layer in candidates]
        divergence = score_text(context.model, context.tokens, [DropPlan(), *tried]).kl[1:].mean(1)
        chosen.append(candidates.pop(int(divergence.argmin())))
    return by_order(context, kind, n_drop, chosen)
