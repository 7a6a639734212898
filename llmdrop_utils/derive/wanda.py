"""Unstructured pruning after Wanda (Sun et al. 2023, arXiv:2306.11695, section 3): single weights become zero.

    score of W[i, j] = |W[i, j]| * ||X_j||

X_j is the j-th input of a linear map, of all tokens. In each row of W, that is for each output, the weights of the smallest
scores become zero. The paper compares this with dropped attention at an equal number of parameters (Table 9).
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.checks import as_number, whole
from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan, check_plan
from ..dropping.units import StandIn
from ..measure.guard import measuring, tokens_for
from ..models.families import Anatomy, family_of, find_anatomy
from .sites import rows_of
from .streams import advance, read_streams

ROWS = 256  # rows of inputs or weights that are held in float64 at a time
PLAIN = (torch.Tensor, nn.Parameter)  # types of weights whose single numbers can be changed; quantised ones have their own

Maps = dict[str, nn.Module]  # of one layer: name in the layer -> linear map


def prune_by_wanda(
    model: nn.Module,
    tokens: torch.LongTensor,
    sparsity: float,
    batch_size: int = 4,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
) -> dict[str, float]:
    """Set to zero, in place, the weights of all linear maps in the decoder layers that have the smallest scores.

    Layers are pruned in order, as in the authors' code: the inputs of a layer come from the pruned layers before it, and are
    those that its maps have while none of them is pruned yet. Biases, norms, embeddings and the LM head stay as they are,
    and so does a map that stands in the place of what is dropped.

    Parameters
    ----------
    model: of any dtype, on any device or several. Its weights must be in memory, and none of the linear maps quantised.
    tokens: LongTensor (n_samples, seq_len), to measure the inputs on. The stream of all of them is held in the model's dtype,
        where the model is: 2 GiB for 128 samples of 2048 tokens, 4096 wide, in bfloat16.
    sparsity: from 0 to below 1. In each row of n_in weights, floor(sparsity * n_in) become zero.
    batch_size: samples per forward pass. On a GPU that runs out of memory it is halved, with a message.
    on_batch: called with the number of tokens of each batch that a layer has read: n_layers * tokens.numel() in all.

    Returns {"weights": how many the linear maps have, "zeros": how many of these are zero now, "sparsity": their share}.

    Raises LLMDropError for wrong input, for a mixture of experts, and if the model produces infinities; the model is then as it
    was. What stops it later than that leaves some layers pruned: load the model again.
    """
    anatomy = find_anatomy(model)
    tokens, batch_size = tokens_for(model, tokens), whole(batch_size, "The batch size")
    _check_sparsity(sparsity)
    maps = _linear_maps(anatomy)
    _check_in_memory(model, maps)
    every = [module for layer_maps in maps for module in layer_maps.values()]
    streams, calls, reached = read_streams(model, tokens, batch_size, every)  # what cannot be computed is an error here
    _check_reached(maps, reached)
    for index, layer in enumerate(anatomy.layers):
        with measuring(model), _squares_of_inputs(maps[index].values()) as squares:
            for stream in streams:
                advance(layer.block, stream, calls[len(stream)][index])
                on_batch(len(stream) * tokens.shape[1])
        for name, module in maps[index].items():
            if not bool(squares[module].isfinite().all()):
                raise LLMDropError(
                    f"The input of {name} of layer {index} is not finite in {stream.dtype} now that the layers before it are "
                    "pruned. They stay so: load the model again, in bfloat16 or float32, or prune less."
                )
        for module in maps[index].values():
            _prune(module, squares[module].sqrt(), sparsity)
        if index < len(anatomy) - 1:
            with measuring(model):
                for batch, stream in enumerate(streams):  # one by one, so that no more than one is held twice
                    streams[batch] = advance(layer.block, stream, calls[len(stream)][index])
    weights = [module.weight for layer_maps in maps for module in layer_maps.values()]
    n_weights, n_zeros = (sum(counts) for counts in zip(*((w.numel(), int((w == 0).sum())) for w in weights), strict=True))
    return {"weights": n_weights, "zeros": n_zeros, "sparsity": n_zeros / n_weights}


@torch.no_grad()
def wanda_mask(weight: torch.Tensor, norms: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Which weights are kept: bool (n_out, n_in), False for the floor(sparsity * n_in) smallest scores of each row.

    weight: (n_out, n_in); norms: (n_in,), the Euclidean norm of each input over all tokens. Scores are formed in the wider of
    the two dtypes. Of equal scores, that of the lower index goes first.
    """
    _check_sparsity(sparsity)
    if weight.ndim != 2 or norms.shape != weight.shape[1:]:
        raise LLMDropError(
            "Scores take a weight (n_out, n_in) and a norm for each input (n_in,), but the shapes are "
            f"{tuple(weight.shape)} and {tuple(norms.shape)}."
        )
    order = (weight.abs() * norms).sort(dim=1, stable=True).indices
    kept = torch.ones_like(weight, dtype=torch.bool)
    return kept.scatter_(1, order[:, : math.floor(sparsity * weight.shape[1])], False)


def sparsity_for(model: nn.Module, plan: DropPlan) -> float:
    """The sparsity at which pruning removes as many weights of linear maps as the plan does (paper, Table 9).

    That is the share of the weights of all linear maps in the decoder layers that are in the sub-layers of the plan. Pruning
    rounds down in each row, so it removes slightly fewer. Raises LLMDropError for a plan that does not fit the model or has
    maps, and for a mixture of experts.
    """
    anatomy = check_plan(model, plan)
    if plan.maps:
        raise LLMDropError("The drop plan puts linear maps, so new weights, in dropped places. Give a plan without maps.")
    maps, family = _linear_maps(anatomy), family_of(anatomy.decoder.config)
    removed = sum(
        module.weight.numel()
        for indices, unit in ((plan.attention, family.attention_unit), (plan.mlp, family.mlp_unit))
        for index in indices
        for name, module in maps[index].items()
        if name.split(".")[0] in unit
    )
    return removed / sum(module.weight.numel() for layer_maps in maps for module in layer_maps.values())


# ---- what can be pruned ---------------------------------------------------------------------------------------------------


def _check_sparsity(sparsity: object) -> None:
    if not 0 <= as_number(sparsity) < 1:
        raise LLMDropError(f"The sparsity must be a share of the weights, from 0 to below 1, but is {sparsity!r}.")


def _linear_maps(anatomy: Anatomy) -> list[Maps]:
    """The linear maps of each layer. Raises LLMDropError if weights of a layer are in no such map."""
    found: list[Maps] = []
    for index, layer in enumerate(anatomy.layers):
        found.append({})
        for name, module in layer.block.named_modules():
            if hasattr(module, "base_layer"):  # as peft wraps a linear map
                raise LLMDropError(f"{name} of layer {index} has an adapter. Merge it into the weights before pruning.")
            if isinstance(module, nn.Linear | Conv1D):
                _check_plain(module.weight, f"{name} of layer {index}")
                found[-1][name] = module
            elif not isinstance(module, StandIn):
                for key, weight in module.named_parameters(recurse=False):
                    if weight.ndim > 1:
                        raise LLMDropError(
                            f"This {anatomy.family} model cannot be pruned by Wanda: in layer {index}, the weight {name}.{key} "
                            f"{tuple(weight.shape)} is in no linear module, as in a mixture of experts. "
                            "Take a model whose layers are dense."
                        )
    if not any(found):
        raise LLMDropError("All attention and MLP layers of this model are dropped, so there is nothing to prune.")
    return found


def _check_plain(weight: torch.Tensor, name: str) -> None:
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if weight.dtype not in known or type(weight) not in PLAIN:
        raise LLMDropError(
            f"The weight of {name} is quantised ({type(weight).__name__}, {weight.dtype}), so it has no single weights to "
            "prune. Load the model in bfloat16 or float32."
        )


def _check_in_memory(model: nn.Module, maps: list[Maps]) -> None:
    """Each weight must be in memory, and no other weight there too."""
    places: dict[tuple, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if type(weight) in PLAIN:
            places.setdefault((weight.device, weight.data_ptr()), []).append(name)
    for index, layer_maps in enumerate(maps):
        for name, module in layer_maps.items():
            weight = module.weight
            if weight.device.type == "meta":
                raise LLMDropError(
                    f"The weight of {name} of layer {index} is not in memory (offloaded), so it cannot be changed. "
                    "Load the whole model on one device, or on several that hold it."
                )
            names = places[weight.device, weight.data_ptr()]
            if len(names) > 1:
                raise LLMDropError(
                    f"The weights {names[0]} and {names[1]} are the same tensor, so pruning one would change the other. "
                    "Give each module a weight of its own."
                )


# ---- layer by layer -------------------------------------------------------------------------------------------------------


def _check_reached(maps: list[Maps], reached: set[nn.Module]) -> None:
    for index, layer_maps in enumerate(maps):
        if unseen := [name for name, module in layer_maps.items() if module not in reached]:
            raise LLMDropError(
                f"The linear map {unseen[0]} of layer {index} is not called in a forward pass, so its input is not known. "
                "Remove it, or take another model."
            )


@contextlib.contextmanager
def _squares_of_inputs(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Inside, forward passes add up the squares of what each map reads, over all tokens: map -> float64 (n_in,)."""
    squares: dict[nn.Module, torch.Tensor] = {}

    def add(module, args):
        wide = torch.float32 if args[0].device.type == "mps" else torch.float64  # the GPU of a Mac has no float64
        for part in args[0].flatten(0, -2).split(ROWS):
            squares[module] = part.to(wide).square().sum(0) + squares.get(module, 0.0)

    handles = [module.register_forward_pre_hook(add) for module in modules]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _prune(module: nn.Module, norms: torch.Tensor, sparsity: float) -> None:
    for part in rows_of(module).split(ROWS):
        part.masked_fill_(~wanda_mask(part, norms, sparsity), 0)
