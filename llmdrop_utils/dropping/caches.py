"""Key-value caches of a model that lacks attention layers: nothing is cached for what was dropped."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import cache_utils

from ..base.errors import LLMDropError
from ..models.families import Anatomy

_Base: Any = getattr(cache_utils, "DummyLayer", object)  # transformers 5.17 has none; later ones look for it


class NoCache(_Base):
    """Stands for the cache of an attention that was dropped; a cache takes its length from the others."""

    # Masks are made for the first layer that is True (sliding) or False (full); this is neither.
    is_sliding: str | bool = "neither"
    is_compileable = is_croppable = is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, index: int):
        self.index = index

    def __repr__(self) -> str:
        return "NoCache"

    def update(self, *args, **kwargs):
        raise LLMDropError(
            f"This cache was used while the attention of layer {self.index} was dropped, so it holds nothing for it. "
            "Start with a new cache."
        )

    def get_max_length(self) -> int:
        return -1

    def _nothing(self, *args, **kwargs) -> None:
        pass

    offload = prefetch = reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _nothing


class NoCacheOfPair(NoCache):
    """The same in an encoder-decoder: the cross-attention of the layer, which stays, may ask it how long the cache is (T5)."""

    def __init__(self, index: int, layers: list):
        super().__init__(index)
        self.layers = layers  # of the cache

    def get_seq_length(self) -> int:
        return self._counted().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._counted().get_mask_sizes(query_length)

    def _counted(self):
        return next(layer for layer in self.layers if not isinstance(layer, NoCache))


cache_utils.CacheLayerMixin.register(NoCacheOfPair)  # otherwise it is not asked


@dataclasses.dataclass(frozen=True)
class Lacking:
    """Layers of a decoder, counted from its first, for which nothing is cached."""

    attention: frozenset[int]
    cross_attention: frozenset[int]  # of an encoder-decoder
    n_layers: int
    is_left: bool  # is any attention?


def watch_caches(anatomy: Anatomy, dropped: Mapping[str, frozenset[int]]) -> list:
    """Hooks by which every cache that the decoder takes or makes holds nothing for the attention that is dropped.

    dropped: kind -> layers of the whole model. An encoder has no cache.
    """
    first = anatomy.n_source
    attention, cross = (
        frozenset(layer - first for layer in dropped[kind] if layer >= first) for kind in ("attention", "cross_attention")
    )
    if not attention and not cross:
        return []
    built = sum(layer >= first for layer in anatomy.with_attention)
    lacking = Lacking(attention, cross, len(anatomy) - first, len(attention) < built)
    return [
        anatomy.decoder.register_forward_pre_hook(functools.partial(_fit_given, lacking), with_kwargs=True),
        anatomy.decoder.register_forward_hook(functools.partial(_fit_returned, lacking)),
    ]


def _fit_given(lacking: Lacking, decoder: nn.Module, args: tuple, kwargs: dict):
    cache = _find_cache((*args, *kwargs.values()))
    if lacking.is_left:
        _fit(cache, lacking)
        return None
    if cache is not None:  # no layer would know how many tokens the cache has seen
        raise LLMDropError(
            f"The attention of all {len(lacking.attention)} layers is dropped, so nothing is left to cache. Pass "
            "use_cache=False (to generate() as well) and no past_key_values."
        )
    return args, {**kwargs, "use_cache": False}


def _fit_returned(lacking: Lacking, decoder: nn.Module, args: tuple, output) -> None:
    _fit(_find_cache(output.values() if isinstance(output, dict) else output), lacking)


def _find_cache(values: Iterable) -> cache_utils.Cache | None:
    return next((value for value in values if isinstance(value, cache_utils.Cache)), None)


def _fit(cache: cache_utils.Cache | None, lacking: Lacking) -> None:
    """Put `NoCache` in the place of each dropped attention."""
    if isinstance(cache, cache_utils.EncoderDecoderCache):
        layers = cache.self_attention_cache.layers
        _fit_one(cache.self_attention_cache, lacking.attention, lacking.n_layers, lambda index: NoCacheOfPair(index, layers))
        _fit_one(cache.cross_attention_cache, lacking.cross_attention, lacking.n_layers)
    elif cache is not None:
        _fit_one(cache, lacking.attention, lacking.n_layers)


def _fit_one(cache: cache_utils.Cache, dropped: frozenset[int], n_layers: int, none: Callable = NoCache) -> None:
    if not dropped:
        return
    if cache.layer_class_to_replicate is not None:  # it grows as layers come by, and dropped ones do not
        cache.layers += [cache.layer_class_to_replicate() for _ in range(len(cache.layers), n_layers)]
    for index in dropped:
        if not isinstance(cache.layers[index], NoCache):
            cache.layers[index] = none(index)
    first = cache.layers[0]
    if isinstance(first, NoCache) and any(
        not isinstance(layer, NoCache | cache_utils.CacheLayerMixin) for layer in cache.layers
    ):
        # A hybrid. Older transformers ask the first layer that is False for the length, and a mixer knows none; in place of
        # layer 0 they ask the first attention that is left.
        first.is_sliding = False
