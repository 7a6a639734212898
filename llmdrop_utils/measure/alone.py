"""Similarity of a sub-layer's own input and output, without the residual connection (paper, Table 6)."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..models.families import family_of, find_anatomy, input_device, stream_of, tensor_of
from .guard import measuring, not_finite_error, tokens_for

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used


def measure_without_residual(
    model: torch.nn.Module,
    tokens: torch.LongTensor,
    batch_size: int = 4,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
) -> dict[str, np.ndarray]:
    """1 - cosine of what attention and MLP modules read and what they return (paper, Table 6, "w/o res").

    In most families a norm comes before, and its output is what they read.

    Returns kind ("attention", "mlp") -> float64 (n_layers,), mean over all tokens, in one pass without LM head. Raises
    LLMDropError for a family whose MLP is no module of its own, and for numbers that are not finite.
    """
    anatomy = find_anatomy(model)
    family = family_of(anatomy.decoder.config)
    if not family.mlp_is_one_module:
        raise LLMDropError(
            f"The MLP of {anatomy.family} models is no module of its own, so it has no input and output to compare."
        )
    if family.adds_stream:
        raise LLMDropError(
            f"Attention or MLP of {anatomy.family} models returns its term and the stream together, so there is no output "
            "of its own to compare."
        )
    if anatomy.other_mixers:
        raise LLMDropError(f"Attention of this {anatomy.family} model cannot be compared with itself: {anatomy.other_mixers}.")
    tokens, batch_size = tokens_for(model, tokens), whole(batch_size, "The batch size")
    sums = {kind: np.zeros(len(anatomy)) for kind in ("attention", "mlp")}

    def compare(kind: str, index: int, module, args, kwargs, output) -> None:
        x, y = stream_of(args, kwargs), tensor_of(output)
        if y.ndim:  # what was dropped returns a single zero
            similarity = torch.cosine_similarity(x.double(), y.to(x.device).double().view_as(x), dim=-1)
            sums[kind][index] += float((1 - similarity).sum())

    handles = []
    try:
        for index, layer in enumerate(anatomy.layers):
            for kind, name in (("attention", family.attention_unit[0]), ("mlp", family.mlp_unit[0])):
                hook = functools.partial(compare, kind, index)
                handles.append(layer.block.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        with measuring(model):
            for start in range(0, len(tokens), batch_size):
                batch = tokens[start : start + batch_size]
                anatomy.decoder(input_ids=batch.to(input_device(model)), use_cache=False)
                on_batch(batch.numel())
    finally:
        for handle in handles:
            handle.remove()
    found = {kind: values / tokens.numel() for kind, values in sums.items()}
    if not all(np.isfinite(values).all() for values in found.values()):
        raise not_finite_error(model, tokens[0])
    return found
