"""Which linear maps of a layer can be refitted, and what they read and write."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.errors import LLMDropError
from ..dropping.units import StandIn
from ..models.layouts import Family
from .adapters import DTYPES, ROUTERS
from .moments import NotFiniteError
from .offloading import hooks_of
from .streams import Call, tap

OUTPUTS = {  # what families call them
    "o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc_out", "fc2", "dense_4h_to_h", "w2", "Wo", "output_linear",
    "linear_out",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sites:
    """The linear maps of one sub-layer, by their names in the layer."""

    unit: str  # the module that the sub-layer is
    readers: tuple[str, ...]  # they read what it reads: the normed stream
    output: str | None  # it makes what the sub-layer adds to the stream; None: experts, or a name that is not known
    norm: str | None  # that the output passes before it is added


def sites_of(block: nn.Module, family: Family, kind: str) -> Sites | None:
    """The maps of the "attention" or "mlp" of a layer as it is; None where it is dropped or replaced.

    Another mixer of tokens, which a hybrid has instead of attention, is refitted alike if it is in attention's place by name;
    otherwise it is None.
    """
    unit = {"attention": family.attention_unit, "mlp": family.mlp_unit}[kind]
    term = {"attention": family.attention, "mlp": family.mlp}[kind]
    if kind == "attention" and family.mixer and getattr(block, unit[0], None) is None:
        return None
    module = block.get_submodule(unit[0])
    if isinstance(module, StandIn):
        return None
    if isinstance(module, nn.Linear | Conv1D):  # the MLP has no module of its own: its two maps are children of the layer
        return Sites(unit[0], (unit[0],), term, None)
    children = _linear_maps(module)
    if kind == "attention" and not children:  # GPT-Neo's has a module inside that does it, and Moshi's maps are such modules
        children = {
            f"{inner}.{name}": each for inner, part in module.named_children() for name, each in _linear_maps(part).items()
        }
    output = next((name for name in children if OUTPUTS & {*name.split(".")}), None)
    if isinstance(module, nn.Sequential):  # CTRL's MLP, whose maps have no names
        output = [*children][-1]
    return Sites(
        unit[0],
        tuple(f"{unit[0]}.{name}" for name in children if name != output and name not in ROUTERS),
        None if output is None else f"{unit[0]}.{output}",
        None if term.startswith(unit[0]) else term,  # (a map inside of the module may make it)
    )


def _linear_maps(module: nn.Module) -> dict[str, nn.Module]:
    """Those that are its children, by name."""
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)}


@torch.inference_mode()
def read_together(
    block: nn.Module, sites: Mapping[str, Sites | None], stream: torch.Tensor, call: Call
) -> dict[str, Sites | None]:
    """The sites without those readers that read something else than their sub-layer does, as one forward pass shows."""
    names = {name for at in sites.values() if at is not None for name in (at.unit, *at.readers)}
    seen = tap(block, stream, call, {name: (block.get_submodule(name), "read") for name in names}) if names else {}

    def of(at: Sites) -> Sites:
        readers = (name for name in at.readers if name in seen and seen[name] is seen[at.unit])
        return dataclasses.replace(at, readers=tuple(readers))

    return {kind: at and of(at) for kind, at in sites.items()}


def check_changeable(block: nn.Module, index: int, may_be_offloaded: bool = False) -> None:
    """Raise LLMDropError if a linear map of a layer is quantised, offloaded, or wrapped by an adapter.

    may_be_offloaded: by accelerate, so that `resident` brings it.
    """
    brought = {part for module, _ in hooks_of(block) for part in module.modules()} if may_be_offloaded else ()
    for name, module in block.named_modules():
        if hasattr(module, "base_layer"):  # as peft wraps a linear map
            raise LLMDropError(f"{name} of layer {index} has an adapter. Merge it into the weights first.")
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight
        if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
            raise LLMDropError(
                f"The weight of {name} of layer {index} is quantised ({weight.dtype}), so it cannot be refitted. Repair the "
                "model before it is quantised."
            )
        if weight.is_meta and module not in brought:
            raise LLMDropError(
                f"The weight of {name} of layer {index} is not in memory (offloaded), so it cannot be changed. Load the whole "
                "model on one device, or on several that hold it."
            )


def rows_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map as a view (n_out, n_in): GPT-2 stores its transpose."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


@torch.no_grad()
def change(module: nn.Module, update: torch.Tensor) -> None:
    """Add (n_out, n_in) to the weight of a linear map, in place; the sum is rounded to its dtype once.

    Raises NotFiniteError for a sum that is too large for it, and leaves the weight as it is.
    """
    rows = rows_of(module)
    changed = (rows.to(update.dtype) + update.to(rows.device)).to(rows.dtype)
    if not bool(changed.isfinite().all()):
        raise NotFiniteError(f"A refitted weight is too large for {rows.dtype}. Load the model in bfloat16 or float32.")
    rows.copy_(changed)
