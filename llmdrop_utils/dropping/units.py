"""A model that really lacks sub-layers: no forward, no parameters and no key-value cache of what was dropped.

Norm and sub-layer are one unit (paper, section 3). Their modules are replaced by stand-ins without parameters that add
zero to the residual stream; `families.FAMILIES` says which modules these are. Layers keep their indices.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn

from ..models.families import Anatomy, family_of, not_as_stated
from .caches import watch_caches
from .plan import DropPlan, check_plan


@contextlib.contextmanager
def skipping(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """Inside, the sub-layers of the plan are gone from the model, which is yielded; afterwards all is as it was.

    Takes about a millisecond and moves no weights: for many plans in a row. May be nested. Mode, dtype and device of what
    is gone do not follow the model meanwhile. Raises LLMDropError for a plan that does not fit (see `check_plan`).
    """
    with _without(model, plan):
        yield model


@contextlib.contextmanager
def dropped(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """`skipping`, and what is gone leaves the GPU meanwhile. Weights that accelerate offloads stay where they are."""
    with _without(model, plan) as modules, _on_cpu(modules):
        yield model


def drop(model: nn.Module, plan: DropPlan) -> nn.Module:
    """Drop the sub-layers of the plan for good, in place, which frees their memory; returns the model.

    To keep the result, save the plan. `save_pretrained` would write weights that lack what the config still promises, which
    transformers fills with random numbers (`load_model` refuses to).
    """
    anatomy = check_plan(model, plan)
    swaps, gone = _stand_ins(anatomy, plan)
    for block, name, _, stand_in in swaps:
        setattr(block, name, stand_in)
    watch_caches(anatomy, gone)
    return model


@contextlib.contextmanager
def _without(model: nn.Module, plan: DropPlan) -> Iterator[list[nn.Module]]:
    """Swap the plan's modules for stand-ins; yields the modules."""
    anatomy = check_plan(model, plan)
    swaps, gone = _stand_ins(anatomy, plan)
    handles = []
    try:
        for block, name, _, stand_in in swaps:
            setattr(block, name, stand_in)
        handles += watch_caches(anatomy, gone)
        yield [module for _, _, module, _ in swaps]
    finally:
        for handle in handles:
            handle.remove()
        for block, name, module, _ in swaps:
            setattr(block, name, module)


@contextlib.contextmanager
def _on_cpu(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, what these modules hold on a GPU is in the CPU's memory. The parameters remain the same objects."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    homes = [(tensor, tensor.device) for tensor in tensors if _on_gpu(tensor)]
    try:
        for tensor, _ in homes:
            _move(tensor, torch.device("cpu"))
        yield
    finally:
        for tensor, device in homes:
            _move(tensor, device)


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda  # what accelerate offloads is on the device "meta" between forwards


@torch.inference_mode(False)  # what is made in inference mode could never be trained again
def _move(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)


def left(anatomy: Anatomy, kind: str) -> list[int]:
    """Indices of the layers that have their "attention", or their "mlp", now."""
    family = family_of(anatomy.decoder.config)
    name = {"attention": family.attention_unit, "mlp": family.mlp_unit}[kind][0]
    blocks = enumerate(layer.block for layer in anatomy.layers)
    return [index for index, block in blocks if not isinstance(block.get_submodule(name), Dropped)]


class Dropped(nn.Module):
    """Stands for a sub-layer: gives zero, in the structure that the layer expects."""

    def __init__(self, in_pair: bool, full: bool):
        super().__init__()
        self.in_pair = in_pair  # attention: output and weights; some MLPs: output and router scores
        self.full = full  # a layer that adds in place needs the full shape; for the others a single zero is cheaper

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        zero = torch.zeros_like(hidden_states) if self.full else hidden_states.new_zeros(())
        return (zero, None) if self.in_pair else zero

    def extra_repr(self) -> str:
        return "adds nothing"


def _stand_ins(anatomy: Anatomy, plan: DropPlan) -> tuple[list[tuple[nn.Module, str, nn.Module, nn.Module]], frozenset[int]]:
    """What to swap (layer, name, module, stand-in), and the indices of all layers that then lack attention.

    Changes nothing yet. A plan may meet a model that lacks sub-layers already: only what is still there is swapped.
    """
    family = family_of(anatomy.decoder.config)
    swaps, lacks_attention = [], set()
    for index, layer in enumerate(anatomy.layers):
        child = functools.partial(_child, anatomy, layer.block)
        units = []
        for unit, planned, in_pair, full in (
            (family.attention_unit, index in plan.attention, True, False),
            (family.mlp_unit, index in plan.mlp, family.mlp_returns_router, family.mlp_is_added_to),
        ):
            is_gone = isinstance(child(unit[0]), Dropped)
            units.append((unit, is_gone or planned))
            if planned and not is_gone:
                swaps.append((layer.block, unit[0], child(unit[0]), Dropped(in_pair, full)))
        kept = {name for unit, goes in units if not goes for name in unit}
        passed = {name: None for unit, goes in units if goes for name in unit[1:] if name not in kept}  # a set, in order
        swaps += [
            (layer.block, name, child(name), nn.Identity()) for name in passed if not isinstance(child(name), nn.Identity)
        ]
        if units[0][1]:
            lacks_attention.add(index)
    return swaps, frozenset(lacks_attention)


def _child(anatomy: Anatomy, block: nn.Module, name: str) -> nn.Module:
    try:
        return block.get_submodule(name)
    except AttributeError as error:
        raise not_as_stated(anatomy.family, error) from error
