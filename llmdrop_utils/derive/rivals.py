"""What published training-free ways to make up for dropped attention share; they are compared with our repair on the same text.

- NBL (arXiv:2505.21077): a linear map in each dropped place, and its choice of layers. nbl.py.
- ReplaceMe (arXiv:2505.02819): a linear transform, folded into the MLP before what is dropped. folds.py.
- LinearPatch (arXiv:2505.24680): magnitudes of channels, after a Hadamard transform. folds.py.
- Prune&Comp (arXiv:2507.18212): the magnitude that the stream lacks after a cut. folds.py.

Each is written anew from its formulas, with statistics of the dense model. The papers' full texts could not be read here, only
their abstracts, accounts of them, and the authors' code (LIONS-EPFL/NBL, mts-ai/ReplaceMe, chenxinrui-tsinghua/LinearPatch and
chenxinrui-tsinghua/PruneAndComp).
"""

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from ..base.checks import as_number, whole
from ..base.errors import LLMDropError
from ..dropping.plan import NAMES, DropPlan, check_plan
from ..measure.guard import tokens_for
from ..models.families import Anatomy, family_of, stream_width
from .model import check_whole
from .moments import wide
from .sites import check_changeable, rows_of, sites_of
from .streams import advance, read_streams, tap

VERSION = 1  # raise when a change alters the weights or maps that come out
RIDGE = 1e-5  # the authors use none; products in float32 leave errors of this size where inputs do not vary
Place = tuple[str, int]  # kind, layer


def checked(
    model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, batch_size: int, ridge: float | None = None
) -> tuple[Anatomy, torch.LongTensor, int]:
    """All that can be told before anything is computed. With a ridge, a regression is made, which takes enough tokens."""
    anatomy, tokens, batch_size = check_plan(model, plan), tokens_for(model, tokens), whole(batch_size, "The batch size")
    width = stream_width(anatomy.decoder.config)
    if family_of(anatomy.decoder.config).adds_stream:
        why = "attention or MLP returns its term and the stream together"
        raise LLMDropError(f"Published repairs do not fit this {anatomy.family} model: {why}.")
    if anatomy.other_mixers:
        raise LLMDropError(f"Published repairs do not fit this {anatomy.family} model: {anatomy.other_mixers}.")
    check_whole(anatomy)
    if ridge is not None and not 0 <= as_number(ridge) < math.inf:
        raise LLMDropError(f"The ridge must be a number from 0 up, such as {RIDGE:g}, but is {ridge!r}.")
    if ridge is not None and tokens.numel() <= width:
        raise LLMDropError(f"Statistics of {width} inputs take more tokens than that: {tokens.numel()} are too few.")
    return anatomy, tokens, batch_size


def need_plain_stream(anatomy: Anatomy) -> None:
    """Raise LLMDropError for a post-norm model: what is added there passes a norm together with the stream."""
    if family_of(anatomy.decoder.config).stream_norms:
        raise LLMDropError(f"Norms act on the stream itself in this {anatomy.family} model. Use `repair` or `fit_maps`.")


def projection(anatomy: Anatomy, place: Place, plan: DropPlan) -> nn.Module:
    """The output projection whose weight and bias are to change. Raises LLMDropError if they do not make the whole term."""
    kind, index = place
    block, name = anatomy.layers[index].block, f"{NAMES[kind]} of layer {index} of this {anatomy.family} model"
    if plan.maps:
        raise LLMDropError("The drop plan has linear maps in dropped places, which this method has not. Give a plan without.")
    check_changeable(block, index)
    sites = sites_of(block, family_of(anatomy.decoder.config), kind)
    if sites is None or sites.output is None:
        raise LLMDropError(f"The {name} has experts, or no known output projection. Use a dense model, such as a Llama.")
    if sites.norm is not None:
        raise LLMDropError(f"The output of the {name} passes a norm before it is added. Use `repair` or `fit_maps`.")
    return block.get_submodule(sites.output)


def terms(
    model: nn.Module, anatomy: Anatomy, tokens: torch.Tensor, batch_size: int, places: Collection[Place]
) -> Iterator[tuple[Place, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each batch, and each place in order: the place, the stream that its layer reads, the same with the attention's term
    if the place is an MLP, and the place's own term; as in `dense_pass`."""
    layers = anatomy.layers
    taps = {index: {"attention": (layers[index].attention, "output")} for _, index in sorted(places)}
    taps |= {index: taps[index] | {"mlp": (layers[index].mlp, "output")} for kind, index in places if kind == "mlp"}
    for index, stream, seen in dense_pass(model, anatomy, tokens, batch_size, taps):
        x = stream
        for kind in sorted(seen):  # attention, then MLP
            term = layers[index].scale * seen[kind].to(x.device)
            if (kind, index) in places:
                yield (kind, index), stream, x, term
            x = x + term


def dense_pass(
    model: nn.Module, anatomy: Anatomy, tokens: torch.Tensor, batch_size: int, taps: dict[int, dict[str, tuple[nn.Module, str]]]
) -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
    """For each batch and tapped layer: its index, the stream (B, T, d) that it reads, what is tapped; in float32 at least."""
    streams, calls, _ = read_streams(model, tokens, batch_size) if taps else ([], {}, None)
    for stream in streams:
        for index in range(max(taps) + 1):
            block, call = anatomy.layers[index].block, calls[len(stream)][index]
            if index in taps:  # left and run again: Falcon's layers go on to add into what the MLP returned
                seen = tap(block, stream, call, taps[index])
                yield index, wide(stream), {key: wide(tensor) for key, tensor in seen.items()}
            stream = advance(block, stream, call)


@torch.no_grad()
def multiply(factors: Mapping[nn.Module, torch.Tensor | float]) -> None:
    """Multiply what linear maps give (weights and biases) by a matrix (n_out, n_out) in float64, or a number. All or none."""
    changed = []
    for module, factor in factors.items():
        for weight in [rows_of(module)] + ([] if module.bias is None else [module.bias]):
            new = factor @ weight.to(factor) if isinstance(factor, torch.Tensor) else factor * weight.double()
            changed.append((weight, new.to(weight.dtype)))
            if not bool(changed[-1][1].isfinite().all()):
                raise LLMDropError(f"New weights are not finite in {weight.dtype}. Load the model in bfloat16 or float32.")
    for weight, new in changed:
        weight.copy_(new)
