"""A model's decoder, read layer by layer: the residual stream of all samples, and what each layer is given beside it."""

import contextlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..base.errors import LLMDropError
from ..measure.guard import measuring, not_finite_error
from ..models.families import Anatomy, find_anatomy, input_device, stream_of, tensor_of

Call = tuple[tuple, dict]  # what a layer is given beside the stream: masks and positions


def read_streams(
    model: nn.Module, tokens: torch.Tensor, batch_size: int, watched: Iterable[nn.Module] = (), to_the_end: bool = True
) -> tuple[list[torch.Tensor], dict[int, list[Call]], set[nn.Module]]:
    """What the first layer reads in each batch (B, T, d), B -> what each layer is given beside it, and which of the watched
    modules a forward pass calls.

    Samples are equally long, so batches of one size share masks and positions. A whole forward pass is made of each batch, so
    that numbers that are not finite are an error here; unless `to_the_end`, only of the first batch of each size. On a GPU that
    runs out of memory batches are halved, with a message.
    """
    anatomy, watched = find_anatomy(model), list(watched)
    streams: list[torch.Tensor] = []
    calls: dict[int, list[Call]] = {}
    start = 0
    reached: set[nn.Module] = set()
    with measuring(model):
        while start < len(tokens):
            batch = tokens[start : start + batch_size]
            try:
                known = None if to_the_end else calls.get(len(batch))
                stream, calls[len(batch)], states = _first_pass(anatomy, batch.to(input_device(model)), watched, reached, known)
            except torch.OutOfMemoryError as error:
                if batch_size == 1:
                    raise LLMDropError(
                        f"Out of GPU memory with a single sample of {tokens.shape[1]} tokens. Use shorter samples."
                    ) from error
                batch_size //= 2
                torch.cuda.empty_cache()
                print(f"out of GPU memory: going on with a batch of {batch_size}", file=sys.stderr)
                continue
            finite = states.isfinite().flatten(1).all(1)
            if not bool(finite.all()):
                raise not_finite_error(model, batch[int((~finite).nonzero()[0])])
            streams.append(stream)
            start += len(batch)
    return streams, calls, reached


def advance(block: nn.Module, stream: torch.Tensor, call: Call) -> torch.Tensor:
    """What a layer makes of the stream (B, T, d)."""
    args, kwargs = call
    return tensor_of(block(stream, *args, **kwargs))


class _Seen(Exception):
    """All that was asked for has been seen: the rest of the layer need not be computed."""


def tap(block: nn.Module, stream: torch.Tensor, call: Call, taps: Mapping[Any, tuple[nn.Module, str]]) -> dict:
    """What modules of a layer read ("input") or give ("output") while it reads the stream (B, T, d), by the keys of `taps`:
    (B, T, n) each; or what they read and return as it is ("read", "returned"). The layer is left as soon as all is seen.
    """
    seen: dict[Any, Any] = {}

    def keep(key, what, side: str) -> None:
        # Some families put all tokens in one row each.
        seen[key] = what if side in ("read", "returned") else tensor_of(what).reshape(*stream.shape[:2], -1)
        if len(seen) == len(taps):
            raise _Seen

    def before(key, side: str):
        return lambda module, args, kwargs: keep(key, stream_of(args, kwargs), side)

    def after(key, side: str):
        return lambda module, args, output: keep(key, output, side)

    handles = []
    try:
        for key, (module, side) in taps.items():
            if side in ("input", "read"):
                handles.append(module.register_forward_pre_hook(before(key, side), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after(key, side)))
        with contextlib.suppress(_Seen):
            advance(block, stream, call)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first_pass(
    anatomy: Anatomy, batch: torch.Tensor, watched: list[nn.Module], reached: set[nn.Module], known: list[Call] | None
) -> tuple[torch.Tensor, list[Call], torch.Tensor]:
    """The stream that the first layer reads, what each layer is given beside it, and the last hidden states; if it is known
    what layers are given, the first layer is not even begun, and its stream stands for the last."""
    streams: list[torch.Tensor] = []
    calls: list[Call] = []

    def record(module, args, kwargs):
        stream, *others = args or (kwargs["hidden_states"],)
        if not calls:
            streams.append(stream)
            if known is not None:
                raise _Seen
        calls.append((tuple(others), {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    def reach(module, args):
        reached.add(module)

    handles = [layer.block.register_forward_pre_hook(record, with_kwargs=True) for layer in anatomy.layers]
    handles += [module.register_forward_pre_hook(reach) for module in watched]
    try:
        states = anatomy.decoder(input_ids=batch, use_cache=False).last_hidden_state
    except _Seen:
        return streams[0], known or [], streams[0]
    finally:
        for handle in handles:
            handle.remove()
    return streams[0], calls, states
