"""Attention that sees the last tokens alone: what stands between keeping a layer's attention and dropping it.

Such a layer's key-value cache never holds more than the window. Here the window is in the mask: what is computed is what such a
model computes, and the cache still holds everything.
"""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..models.families import family_of, find_anatomy, stream_of


@contextlib.contextmanager
def windowed(model: nn.Module, layers: Collection[int], window: int) -> Iterator[nn.Module]:
    """Inside, the attention of these layers sees `window` tokens, the one that asks included; the model is yielded.

    Where a layer has a window of its own, the shorter one counts. For whole texts, texts that continue a dynamic cache, and
    texts side by side that continue a shared prefix; not for padding on the left. Raises LLMDropError for layers that the model
    has not and, in the forward pass, for attention that is given no mask by name, and for static caches.
    """
    anatomy, window = find_anatomy(model), whole(window, "The window")
    for layer in layers:
        if layer not in range(len(anatomy)):
            raise LLMDropError(f"There is no layer {layer}: this model has {len(anatomy)} layers (0-{len(anatomy) - 1}).")
    name, positions = family_of(anatomy.decoder.config).attention_unit[0], _Positions(anatomy.decoder)
    handles = [positions.handle]
    try:
        for layer in layers:
            module = anatomy.layers[layer].block.get_submodule(name)
            handles.append(module.register_forward_pre_hook(_limit(layer, window, positions), with_kwargs=True))
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Positions:
    """The positions of the tokens that a decoder reads: (B or 1, T)."""

    def __init__(self, decoder: nn.Module):
        self.handle = decoder.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs) -> None:
        self.now = kwargs.get("position_ids")
        if self.now is None:
            given = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids", *args[:1])
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            self.now = torch.arange(past, past + given.shape[1], device=given.device)[None]


def _limit(layer: int, window: int, positions: _Positions):
    def hook(module, args, kwargs):
        if "attention_mask" not in kwargs:
            raise LLMDropError(f"{type(module).__name__} is given no attention mask by name, so it cannot be given a window.")
        mask, cache, stream = kwargs["attention_mask"], kwargs.get("past_key_values"), stream_of(args, kwargs)
        asking = positions.now.to(stream.device)
        before = _cached(cache, layer).to(stream.device).expand(len(asking), -1)
        distance = asking[:, :, None] - torch.cat([before, asking], 1)[:, None]  # (B or 1, T, past + T)
        hidden = (distance >= window)[:, None]
        if mask is None:  # ordinary causal attention
            mask = torch.zeros(hidden.shape, dtype=stream.dtype, device=stream.device)
            hidden = hidden | (distance < 0)[:, None]
        mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    return hook


def _cached(cache: Cache | None, layer: int) -> torch.Tensor:
    """The positions of the tokens that a layer's cache holds now, of which the last ones are kept if it slides."""
    held = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
    if isinstance(held, StaticLayer):
        raise LLMDropError("A window takes a dynamic cache: a static one holds room for tokens that are still to come.")
    if held is None or not held.is_initialized:
        return torch.arange(0)
    past = held.get_seq_length()
    return torch.arange(past - held.keys.shape[-2], past)
