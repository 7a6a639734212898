"""Attention that sees the last tokens alone: what stands between keeping a layer's attention and dropping it.

Such a layer's key-value cache never holds more than the window. Here the window is in the mask: what is computed is what such a
model computes, and the cache still holds everything.
"""

import contextlib
import inspect
from collections.abc import Collection, Iterator

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..models.families import Anatomy, family_of, find_anatomy, need_decoder, stream_of
from .units import left


@contextlib.contextmanager
def windowed(model: nn.Module, layers: Collection[int], window: int) -> Iterator[nn.Module]:
    """Inside, the attention of these layers sees `window` tokens, the one that asks included; the model is yielded.

    Where a layer has a window of its own, the shorter one counts. For whole texts, texts that continue a dynamic cache, and
    texts side by side that continue a shared prefix; not for padding on the left. Raises LLMDropError for encoders, for layers
    that the model has not or that have no attention, for attention that takes no mask as most do and, in the forward pass, for
    static caches.
    """
    anatomy, window = find_anatomy(model), whole(window, "The window")
    need_decoder(anatomy)
    for layer in layers:
        if layer not in range(len(anatomy)):
            raise LLMDropError(f"There is no layer {layer}: this model has {len(anatomy)} layers (0-{len(anatomy) - 1}).")
        if layer not in anatomy.with_attention:
            raise LLMDropError(f"Layer {layer} of this {anatomy.family} model has another mixer of tokens than attention.")
    if reason := obstacle_to_windows(anatomy):
        raise LLMDropError(reason)
    name, reading = family_of(anatomy.decoder.config).attention_unit[0], _Reading(anatomy.decoder)
    handles = [reading.handle]
    try:
        for layer in layers:
            module = anatomy.layers[layer].block.get_submodule(name)
            handles.append(module.register_forward_pre_hook(_limit(layer, window, reading), with_kwargs=True))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def obstacle_to_windows(anatomy: Anatomy) -> str | None:
    """Why the attention of a model cannot be given a window; None if it can."""
    name = family_of(anatomy.decoder.config).attention_unit[0]
    units = (anatomy.layers[layer].block.get_submodule(name) for layer in left(anatomy, "attention"))
    if anatomy.family in OTHERWISE or any("attention_mask" not in inspect.signature(unit.forward).parameters for unit in units):
        return f"Attention of {anatomy.family} models takes no mask as most do, so it cannot be given a window."
    return None


OTHERWISE = ("ctrl", "mpt")  # another argument holds the mask of CTRL, and MPT's says what is hidden, not what is seen


class _Reading:
    """What a decoder reads now: the positions of its tokens, (B or 1, T), and its cache."""

    def __init__(self, decoder: nn.Module):
        self.handle = decoder.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs) -> None:
        self.now, self.cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        if self.now is None:
            given = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids", *args[:1])
            past = 0 if self.cache is None else self.cache.get_seq_length()
            self.now = torch.arange(past, past + given.shape[1], device=given.device)[None]


def _limit(layer: int, window: int, reading: _Reading):
    def hook(module, args, kwargs):
        mask, stream = kwargs.get("attention_mask"), stream_of(args, kwargs)
        asking = reading.now.to(stream.device)
        before = _cached(reading.cache, layer).to(stream.device).expand(len(asking), -1)
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
