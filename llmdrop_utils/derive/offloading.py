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
    return [(module, hook) for module, hook in _all_hooks_of(block) if hook.offload]


def _all_hooks_of(block: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    found = []
    for module in block.modules():
        outer = getattr(module, "_hf_hook", None)
        found += [(module, hook) for hook in getattr(outer, "hooks", (outer,)) if isinstance(hook, AlignDevicesHook)]
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
                    weight.data = weight.data.clone()  # on a CPU it is what is kept, perhaps for other models, too
                hook.offload = False  # a forward pass neither brings nor takes them
        yield
    finally:
        with _ordinary_tensors():
            for module, hook in hooks:
                if not hook.offload:
                    for name, weight in module.named_parameters(recurse=hook.place_submodules):
                        _store(hook.weights_map, name, weight)
                    _leave(module, hook)


def copied(block: nn.Module) -> nn.Module:
    """A copy of a layer that is resident, and stays so."""
    shared = (each for _, hook in _all_hooks_of(block) for each in (hook.weights_map, hook.tied_params_map))
    return copy.deepcopy(block, {id(each): each for each in shared})  # what hooks know is of the whole model


@torch.no_grad()
def put_back(block: nn.Module, original: nn.Module) -> None:
    """Give a layer the weights of its copy. Those that are offloaded are not brought: memory may have run out."""
    names = {module: name for name, module in block.named_modules()}
    with _ordinary_tensors():
        for module, hook in _all_hooks_of(block):
            if hook.weights_map is not None:
                for name, weight in original.get_submodule(names[module]).named_parameters(recurse=hook.place_submodules):
                    _store(hook.weights_map, name, weight)
                if not hook.offload:
                    _leave(module, hook)
        for name, weight in block.named_parameters():
            if not weight.is_meta:
                with torch.inference_mode() if weight.is_inference() else contextlib.nullcontext():
                    weight.copy_(original.get_parameter(name))


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Inside, tensors are made that later passes can read in any mode, whatever mode is on outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _leave(module: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _store(weights: Mapping[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    """Keep a weight in CPU memory, unless the same is there or in a file already."""
    if isinstance(weights, PrefixedDataset):
        return _store(weights.dataset, weights.prefix + name, value)
    in_memory = weights
    if isinstance(weights, OffloadedWeightsLoader):
        in_memory = weights.state_dict
        if name in weights.index:
            in_memory.pop(name, None)
    if name not in weights or not torch.equal(weights[name].to("cpu", value.dtype), value.to("cpu")):
        cast(MutableMapping[str, torch.Tensor], in_memory)[name] = value.detach().to("cpu", copy=True)
