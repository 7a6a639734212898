"""Other ways to choose: iterative and consecutive forms, and baselines."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from ..drop.plan import DropPlan
from ..drop.units import skipping
from ..measure.importance import KINDS, measure_importance
from ..models.families import find_anatomy
from .ranking import SELECTIONS, check_count, check_kind, drop_sequence, plan_of


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
    n_layers = len(find_anatomy(model))
    check_kind(kind, SELECTIONS)
    check_count(n_drop, 2 * n_layers if kind == "joint" else n_layers, kind)
    chosen: list[tuple[str, int]] = []
    first = plan = None
    while len(chosen) < n_drop:
        with skipping(model, plan or DropPlan()):
            scores = measure_importance(model, tokens, batch_size)
        first = first or scores
        sequence = drop_sequence(scores, kind)
        check_count(n_drop, len(chosen) + len(sequence), kind)  # the model may have lacked some before
        chosen.append(sequence[0])
        plan = plan_of(chosen, first)
        on_step(len(chosen))
    return plan or DropPlan(n_layers=n_layers)


def select_consecutive_blocks(model: torch.nn.Module, tokens: torch.LongTensor, n_drop: int, batch_size: int = 4) -> DropPlan:
    """The n blocks in a row whose input and output are most similar: mean cosine over tokens, as for a single block.

    Keeps the inputs of n blocks of one batch at a time. The official code scores n + 1 blocks and drops n.
    """
    anatomy = find_anatomy(model)
    check_count(n_drop, len(anatomy), "block")
    if n_drop == 0:
        return DropPlan(n_layers=len(anatomy))
    inputs: dict[int, torch.Tensor] = {}
    sums = torch.zeros(len(anatomy) - n_drop + 1, dtype=torch.float64)

    def keep(index, module, args, kwargs):
        inputs[index] = args[0] if args else kwargs["hidden_states"]

    def compare(index, module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        first = index - n_drop + 1
        if first >= 0:
            x = inputs.pop(first).to(output.device)
            sums[first] += torch.cosine_similarity(x.double(), output.double(), dim=-1).sum().cpu()

    handles = []
    device = model.get_input_embeddings().weight.device
    device = device if device.type != "meta" else torch.device("cpu")  # offloaded: accelerate moves inputs itself
    try:
        for index, layer in enumerate(anatomy.layers):
            before, after = functools.partial(keep, index), functools.partial(compare, index)
            handles.append(layer.block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.block.register_forward_hook(after))
        with torch.inference_mode():
            for start in range(0, len(tokens), batch_size):
                anatomy.decoder(input_ids=tokens[start : start + batch_size].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    first = int(sums.argmax())
    layers = tuple(range(first, first + n_drop))
    return DropPlan(layers, layers, len(anatomy), getattr(model, "llmdrop_identity", None))


def select_last(n_layers: int, kind: str, n_drop: int) -> DropPlan:
    """Baseline: the last n layers, the very last first (paper, Table 7, "reverse order")."""
    return _by_layer(range(n_layers - 1, -1, -1), n_layers, kind, n_drop)


def select_at_random(n_layers: int, kind: str, n_drop: int, seed: int) -> DropPlan:
    """Baseline: n layers drawn without replacement; the plan of n is the beginning of the plan of n + 1."""
    return _by_layer(np.random.default_rng(seed).permutation(n_layers), n_layers, kind, n_drop)


def _by_layer(order, n_layers: int, kind: str, n_drop: int) -> DropPlan:
    check_kind(kind, KINDS)
    check_count(n_drop, n_layers, kind)
    layers = tuple(int(layer) for layer in order)[:n_drop]
    return DropPlan(layers if kind != "mlp" else (), layers if kind != "attention" else (), n_layers)
