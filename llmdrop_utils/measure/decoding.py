"""Greedy decoding step by step, on two back ends.

"eager" is a dynamic cache and one kernel after the other, as most users run it; "compiled" is a static cache, torch.compile
and on a GPU a CUDA graph.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from ..base.checks import whole
from ..base.errors import LLMDropError, NotAvailable
from ..models.families import find_anatomy, need_decoder
from .guard import finite_generation, measuring, tokens_for

BACKENDS = ("eager", "compiled")


def greedy(model: nn.Module, tokens: torch.LongTensor, new_tokens: int, backend: str = "eager") -> torch.LongTensor:
    """The most probable continuation, as `generate(do_sample=False)` finds it: (B, T) -> (B, new_tokens). The timed loop."""
    tokens, new_tokens = tokens_for(model, tokens).to(device_of(model)), whole(new_tokens, "The number of new tokens")
    if backend not in BACKENDS:
        raise LLMDropError(f"Unknown back end {backend!r}. There are: {', '.join(BACKENDS)}.")
    cache = new_cache(model, backend, tokens.shape[1] + new_tokens)
    with measuring(model):
        with finite_generation(model):
            token = next_token(model, tokens, cache)
        out = [token]
        with finite_generation(model) if backend == "eager" else contextlib.nullcontext():  # a graph has no room for a check
            step = stepper(model, token, cache, backend) if new_tokens > 1 else None
            while step and len(out) < new_tokens:
                token = step(token)
                out.append(token.clone())
        check_length(cache, tokens.shape[1] + new_tokens - 1)
        return torch.cat(out, dim=1)


# ---- steps and caches ---------------------------------------------------------------------------------------------------


def next_token(model, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read tokens (B, T) into the cache; the most probable next one (B, 1)."""
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


def stepper(model, token: torch.Tensor, cache: Cache, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that takes one token (B, 1) further. The compiled one is warm: its first call costs what any other does."""
    if backend == "eager":
        return lambda token: next_token(model, token, cache)
    if any(layer.is_sliding is True for layer in cache.layers):
        raise NotAvailable("The compiled back end has no sliding windows: their cache counts in Python, unseen by a graph.")
    rewind = rewinder(cache, _length(cache))
    torch._dynamo.reset()  # compiled code of other plans would count against the limit of versions of one function
    compiled = torch.compile(next_token, fullgraph=True, dynamic=False)
    held = token.clone()  # a graph reads and writes the same memory every time
    try:
        for _ in range(3):
            compiled(model, token, cache)
            rewind()
        if token.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                held.copy_(compiled(model, held, cache))
            graph.replay()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # dynamo's own errors are RuntimeErrors too
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise NotAvailable(
            f"torch.compile cannot compile this model on this machine: {type(error).__name__}: {first_line}"
        ) from error
    if not token.is_cuda:
        return lambda token: compiled(model, token, cache)
    rewind()

    def replay(token: torch.Tensor) -> torch.Tensor:
        if token is not held:
            held.copy_(token)
        graph.replay()
        return held

    return replay


def new_cache(model, backend: str, room: int) -> Cache:
    return DynamicCache(config=model.config) if backend == "eager" else StaticCache(config=model.config, max_cache_len=room)


def rewinder(cache: Cache, length: int) -> Callable[[], None]:
    """A function that takes a cache back to `length` tokens. (A window that was full stays full.)"""
    layers = holding_layers(cache)

    def rewind() -> None:
        for layer in layers:
            if isinstance(layer, DynamicLayer) and layer.keys.shape[-2] > length:
                layer.keys, layer.values = (x[:, :, :length].contiguous() for x in (layer.keys, layer.values))
            if isinstance(keys := getattr(layer, "indexer_keys", None), torch.Tensor):  # of sparse attention: (B, T, d)
                layer.indexer_keys = keys[:, :length].contiguous()
            if isinstance(count := getattr(layer, "cumulative_length", None), torch.Tensor):
                count.fill_(length)
            elif count is not None:
                layer.cumulative_length = length

    return rewind


def holding_layers(cache: Cache) -> list:
    """The layers that hold keys and values. (Other mixers of hybrids hold states, whose content changes no time.)"""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def _length(cache: Cache) -> int:
    return int(cache.get_seq_length())


def check_length(cache: Cache, expected: int) -> None:
    """Refuse times of steps that did not see each other (the official speed script passes no cache from step to step)."""
    if _length(cache) != expected:
        raise RuntimeError(f"The cache holds {_length(cache)} tokens instead of {expected}: these times would mean nothing.")


def random_tokens(model, batch_size: int, length: int) -> torch.LongTensor:
    need_decoder(anatomy := find_anatomy(model))
    generator = torch.Generator().manual_seed(0)
    vocabulary = anatomy.decoder.config.vocab_size
    return torch.randint(vocabulary, (batch_size, length), generator=generator).to(device_of(model))


def device_of(model) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "meta" for device in devices) or len({device.type for device in devices}) > 1:
        raise LLMDropError("Weights of this model are offloaded: its speed would be that of moving them. Use a larger GPU.")
    if len(devices) > 1:
        raise NotAvailable(
            "This model is spread over several GPUs, and only one is timed. Use CUDA_VISIBLE_DEVICES, or a larger GPU."
        )
    return devices.pop()
