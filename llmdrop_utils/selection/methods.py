"""Ways to choose what is dropped: ranked once, iteratively, in a row, and baselines. Each is registered under a name."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..dropping.plan import PLACES, DropPlan
from ..dropping.units import available, skipping
from ..measure.guard import measuring, not_finite_error, tokens_for
from ..measure.importance import Importance, measure_importance
from ..measure.metrics import KINDS
from ..models.families import find_anatomy, input_device, need_decoder, stream_of, tensor_of
from .ranking import CROSS, SELECTIONS, check_count, check_kind, drop_sequence, plan_of, select

# ---- methods by name ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What a method may choose by."""

    model: torch.nn.Module
    tokens: torch.LongTensor  # calibration text (n_samples, seq_len)
    batch_size: int = 4
    seed: int = 0
    scores: dict[str, Importance] = dataclasses.field(default_factory=dict)  # by metric; what is missing is measured

    def importance(self, metric: str = "cosine") -> Importance:
        """The scores by this metric, measured when first asked for."""
        if metric not in self.scores:
            self.scores[metric] = measure_importance(self.model, self.tokens, self.batch_size, metric=metric)
        return self.scores[metric]


Method = Callable[[Context, str, int], DropPlan]  # context, kind, n_drop

METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Register a function as the selection method of this name."""

    def register(function: Method) -> Method:
        if name in METHODS:
            raise ValueError(f"There are two selection methods called {name!r}.")
        METHODS[name] = function
        return function

    return register


def select_by(name: str, context: Context, kind: str, n_drop: int) -> DropPlan:
    """The plan that a registered method makes. Raises LLMDropError for an unknown method, and for a kind or a number of
    layers that it cannot choose."""
    if name not in METHODS:
        raise LLMDropError(f"Unknown selection method {name!r}. The methods are: {', '.join(METHODS)}.")
    return METHODS[name](context, kind, n_drop)


@method("one-shot")
def _one_shot(context: Context, kind: str, n_drop: int) -> DropPlan:
    return select(context.importance("cosine"), kind, n_drop)


@method("relative magnitude")
def _relative_magnitude(context: Context, kind: str, n_drop: int) -> DropPlan:
    return select(context.importance("relative magnitude"), kind, n_drop)


@method("iterative")
def _iterative(context: Context, kind: str, n_drop: int) -> DropPlan:
    return select_iteratively(context.model, context.tokens, kind, n_drop, context.batch_size)


@method("consecutive blocks")
def _consecutive_blocks(context: Context, kind: str, n_drop: int) -> DropPlan:
    check_kind(kind, ("block",))
    return select_consecutive_blocks(context.model, context.tokens, n_drop, context.batch_size)


@method("reverse order")
def _reverse_order(context: Context, kind: str, n_drop: int) -> DropPlan:
    return by_order(context, kind, n_drop, _last_first(len(find_anatomy(context.model))))


@method("random")
def _random(context: Context, kind: str, n_drop: int) -> DropPlan:
    return by_order(context, kind, n_drop, _shuffled(len(find_anatomy(context.model)), context.seed))


def by_order(context: Context, kind: str, n_drop: int, order: Iterable[int]) -> DropPlan:
    """The first n layers of an order, without what the model lacks already."""
    check_kind(kind, KINDS)
    anatomy = find_anatomy(context.model)
    if anatomy.encoder is not None:  # a block of its decoder has a third part
        need_decoder(anatomy)
    there = available(anatomy, kind)
    plan = _by_layer([layer for layer in order if layer in there], len(anatomy), kind, n_drop)
    return dataclasses.replace(plan, model=getattr(context.model, "llmdrop_identity", None))


# ---- the methods themselves ---------------------------------------------------------------------------------------------


def select_iteratively(
    model: torch.nn.Module,
    tokens: torch.LongTensor,
    kind: str,
    n_drop: int,
    batch_size: int = 4,
    on_step: Callable[[int], None] = lambda n_dropped: None,
) -> DropPlan:
    """Drop the most droppable, measure again on the model without it, and so on (paper, App. B).

    All other sub-layers keep running, those of the same layer too; the official code skips the whole layer. The
    first pass is that of `select` on the same tokens.
    """
    anatomy = find_anatomy(model)
    n_layers = len(anatomy)
    check_kind(kind, SELECTIONS if anatomy.encoder is None else (*SELECTIONS, CROSS))
    n_drop = check_count(n_drop, sum(len(anatomy.having(each)) for each in PLACES) if kind == "joint" else n_layers, kind)
    chosen: list[tuple[str, int]] = []
    first = plan = None
    while len(chosen) < n_drop:
        with skipping(model, plan or DropPlan()):
            scores = measure_importance(model, tokens, batch_size)
        first = first or scores
        sequence = drop_sequence(scores, kind)
        check_count(n_drop, len(chosen) + len(sequence), kind)  # some may have been dropped before
        chosen.append(sequence[0])
        plan = plan_of(chosen, first)
        on_step(len(chosen))
    return plan or DropPlan(n_layers=n_layers)


def select_consecutive_blocks(model: torch.nn.Module, tokens: torch.LongTensor, n_drop: int, batch_size: int = 4) -> DropPlan:
    """The n blocks in a row whose input and output are most similar: mean cosine over tokens, as for a single block.

    Keeps the inputs of n blocks of one batch at a time. The official code scores n + 1 blocks and drops n.
    """
    anatomy = find_anatomy(model)
    n_drop = check_count(n_drop, len(anatomy), "block")
    if len(anatomy.with_attention) < len(anatomy):
        raise LLMDropError(
            f"Some layers of this {anatomy.family} model have another mixer of tokens in place of attention, so that blocks "
            f"in a row cannot be dropped. The layers that have attention: {anatomy.with_attention}."
        )
    tokens, batch_size = tokens_for(model, tokens), whole(batch_size, "The batch size")
    if n_drop == 0:
        return DropPlan(n_layers=len(anatomy))
    inputs: dict[int, torch.Tensor] = {}
    sums = torch.zeros(len(anatomy) - n_drop + 1, dtype=torch.float64)

    def keep(index, module, args, kwargs):
        inputs[index] = stream_of(args, kwargs)

    def compare(index, module, args, output):
        output = tensor_of(output)
        first = index - n_drop + 1
        if first >= 0:
            x = inputs.pop(first).to(output.device)
            sums[first] += torch.cosine_similarity(x.double(), output.double(), dim=-1).sum().cpu()

    handles = []
    device = input_device(model)
    try:
        for index, layer in enumerate(anatomy.layers):
            before, after = functools.partial(keep, index), functools.partial(compare, index)
            handles.append(layer.block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.block.register_forward_hook(after))
        with measuring(model):
            for start in range(0, len(tokens), batch_size):
                anatomy.decoder(input_ids=tokens[start : start + batch_size].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not bool(sums.isfinite().all()):
        raise not_finite_error(model, tokens[0])
    first = int(sums.argmax())
    layers = tuple(range(first, first + n_drop))
    return DropPlan(layers, layers, len(anatomy), getattr(model, "llmdrop_identity", None))


def select_last(n_layers: int, kind: str, n_drop: int) -> DropPlan:
    """Baseline: the last n layers, the very last first (paper, Table 7, "reverse order")."""
    n_layers = whole(n_layers, "The number of layers")
    return _by_layer(_last_first(n_layers), n_layers, kind, n_drop)


def select_at_random(n_layers: int, kind: str, n_drop: int, seed: int) -> DropPlan:
    """Baseline: n layers drawn without replacement; the plan of n is the beginning of the plan of n + 1."""
    n_layers = whole(n_layers, "The number of layers")
    return _by_layer(_shuffled(n_layers, seed), n_layers, kind, n_drop)


def _last_first(n_layers: int) -> list[int]:
    return list(range(n_layers - 1, -1, -1))


def _shuffled(n_layers: int, seed: int) -> list[int]:
    return np.random.default_rng(whole(seed, "The seed", at_least=0)).permutation(n_layers).tolist()


def _by_layer(order: list[int], n_layers: int, kind: str, n_drop: int) -> DropPlan:
    check_kind(kind, KINDS)
    n_drop = check_count(n_drop, len(order), kind)
    return dataclasses.replace(as_plan(kind, order[:n_drop]), n_layers=n_layers)


def as_plan(kind: str, layers: Iterable[int]) -> DropPlan:
    """The plan that drops this kind in these layers; a block is both of its parts."""
    layers = tuple(layers)
    return DropPlan(layers if kind != "mlp" else (), layers if kind != "attention" else ())
