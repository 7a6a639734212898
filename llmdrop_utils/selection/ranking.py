"""Importance scores -> drop plans, ranked once on the dense model (paper, Sec. 3 and 7)."""

import numpy as np

from ..base.checks import as_whole
from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan
from ..measure.importance import Importance, drop_order
from ..measure.metrics import KINDS

SELECTIONS = (*KINDS, "joint")

CROSS = "cross_attention"  # of encoder-decoders alone


def drop_sequence(scores: Importance, kind: str) -> list[tuple[str, int]]:
    """All sub-layers (or blocks) of a kind as ("attention" | "mlp" | "block" | "cross_attention", layer), most droppable first,
    without those that the measured model lacked.

    Joint: attention, MLP and what cross-attention there is in one ranking, without rescaling (paper, Sec. 7). Ties go to the
    lower layer, and in the joint ranking to attention.
    """
    if not isinstance(scores, Importance):
        raise LLMDropError(f"Expected what `measure_importance` returns, found {type(scores).__name__}.")
    check_kind(kind, kinds_of(scores))
    known = [each for each in ("attention", "mlp", CROSS) if each in scores.per_sample]
    kinds = known if kind == "joint" else [kind]
    importance = np.concatenate([scores.importance[k] for k in kinds])
    names = [(k, layer) for k in kinds for layer in range(scores.importance[k].size)]
    return [names[i] for i in drop_order(importance) if names[i] not in scores.gone]


def kinds_of(scores: Importance) -> tuple[str, ...]:
    """What can be selected by these scores: attention, MLP, block, joint, and of an encoder-decoder cross-attention."""
    return (*SELECTIONS, CROSS) if CROSS in scores.per_sample else SELECTIONS


def select(scores: Importance, kind: str, n_drop: int) -> DropPlan:
    """The n most droppable of a kind (`kinds_of`), ranked once on the dense model.

    The plan of n is the beginning of the plan of n + 1. A block counts as one, though it is all sub-layers of its layer.
    Raises LLMDropError if there are fewer than n.
    """
    sequence = drop_sequence(scores, kind)
    return plan_of(sequence[: check_count(n_drop, len(sequence), kind)], scores)


def plan_of(chosen: list[tuple[str, int]], scores: Importance) -> DropPlan:
    """The plan that drops ("attention" | "mlp" | "block" | "cross_attention", layer) in this order."""
    crossing = np.flatnonzero(~np.isnan(scores.importance[CROSS])) if CROSS in scores.per_sample else ()
    return DropPlan(
        attention=tuple(layer for kind, layer in chosen if kind in ("attention", "block")),
        mlp=tuple(layer for kind, layer in chosen if kind in ("mlp", "block")),
        n_layers=scores.importance["block"].size,
        model=scores.model,
        scores=scores.fingerprint,
        cross_attention=tuple(layer for kind, layer in chosen if kind in (CROSS, "block") and layer in crossing),
    )


def check_count(n_drop: int, available: int, kind: str) -> int:
    """The number of layers to drop. Raises LLMDropError unless it is a whole number, 0 to `available`."""
    number = as_whole(n_drop)
    if number is None:
        raise LLMDropError(f"The number of {kind} layers to drop must be a whole number, but is {n_drop!r}.")
    if not 0 <= number <= available:
        raise LLMDropError(f"Cannot drop {number} {kind} layers: this model has {available} to drop.")
    return number


def check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise LLMDropError(f"Unknown kind {kind!r}. The kinds are: {', '.join(kinds)}.")
