"""Layers whose weights accelerate keeps in CPU memory or on disk, and brings to where they compute for each forward pass."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import cast

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import nn


def hooks_of(block: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """The modules of a layer whose weights are offloaded now, each with the hook that does it."""
    found = []
    for module in block.modules():
        outer = getattr(module, "_hf_hook", None)
        hooks = (hook for hook in getattr(outer, "hooks", (outer,)) if isinstance(hook, AlignDevicesHook))
        found += [(module, hook) for hook in hooks if hook.offload]
    return found


@contextlib.contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """Inside, all weights of a layer are where it computes, and may be changed. Afterwards those that are offloaded are where
    they were; those that were changed are in CPU memory, as no file is written to: it may be the model's own.
    """
    hooks = hooks_of(block)
    try:
        with _ordinary_tensors():
            for module, hook in hooks:
                hook.pre_forward(module)
                for _, weight in module.named_parameters(recurse=hook.place_submodules):
                    weight.data = weight.data.clone()  # what was brought may be a file that is mapped into memory
                hook.offload = False  # a forward pass neither brings nor takes them
        yield
    finally:
        with _ordinary_tensors():
            for module, hook in ((module, hook) for module, hook in hooks if not hook.offload):
                for name, weight in module.named_parameters(recurse=hook.place_submodules):
                    here = weight.detach().to("cpu", copy=True)
                    if not torch.equal(here, hook.weights_map[name].to("cpu")):
                        _store(hook.weights_map, name, here)
                hook.offload = True
                hook.post_forward(module, None)


def copied(block: nn.Module) -> nn.Module:
    """A copy of a layer that is resident, and stays so."""
    memo: dict[int, object] = {}
    for module in block.modules():  # what hooks know is of the whole model
        outer = getattr(module, "_hf_hook", None)
        for hook in getattr(outer, "hooks", (outer,)):
            for shared in (getattr(hook, "weights_map", None), getattr(hook, "tied_params_map", None)):
                memo[id(shared)] = shared
    return copy.deepcopy(block, memo)


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Inside, tensors are made that later passes can read in any mode, whatever mode is on outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _store(weights: Mapping[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    if isinstance(weights, PrefixedDataset):
        _store(weights.dataset, weights.prefix + name, value)
    else:
        in_memory = weights.state_dict if isinstance(weights, OffloadedWeightsLoader) else weights
        cast(MutableMapping[str, torch.Tensor], in_memory)[name] = value
