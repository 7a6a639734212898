"""LoRA adapters around the linear maps that a model keeps, made by peft, and what the maps become with them.

An adapter adds the product of two thin matrices to a linear map (Hu et al. 2021, arXiv:2106.09685, eq. 3):

    W' = W + (alpha / rank) B A,  A (rank, inputs) random and B (outputs, rank) zero at first

Every linear map of the attention and the MLPs that the plan keeps gets one. Embeddings, norms, biases and LM head stay as they
are, and so do the maps that stand in dropped places. In a mixture of experts, routers stay too, and experts whose weights are
one tensor for all of them: attention and shared experts are what is trained there.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.errors import LLMDropError, NotAvailable
from ..models.families import Anatomy, family_of

ROUTERS = {"gate", "router", "shared_expert_gate"}  # what families call the maps that choose or weigh experts
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of weights that are not quantised


def library() -> Any:
    """peft, which takes seconds to import: only when something is tuned. Raises NotAvailable if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise NotAvailable(f"peft cannot be used ({error}). Install it beside this package: pip install peft.") from error


@contextlib.contextmanager
def adapted(peft: Any, anatomy: Anatomy, rank: int, alpha: float) -> Iterator[dict[str, Any]]:
    """Inside, each kept map is peft's layer around it, which is yielded by the map's name; afterwards all is as it was.

    peft: as `library` gives it. anatomy: of the model as it is, inside of `dropped` too. A and B are float32, or float64 if the
    map is. Raises LLMDropError if no map is kept, if one is quantised, and for a model that has adapters already.
    """
    maps = _kept_maps(anatomy)
    if not maps:
        raise LLMDropError(
            "Nothing is left to tune: no attention is kept, and no MLP but of experts whose weights are one tensor. Use a plan "
            "that drops less."
        )
    for name, module in maps.items():
        if "base_layer" in name.split("."):
            raise LLMDropError("The model has adapters of peft already. Merge them first, with merge_and_unload().")
        if type(module.weight) is not nn.Parameter or module.weight.dtype not in DTYPES:
            raise LLMDropError(
                f"The weight of {name} is quantised ({module.weight.dtype}), so nothing can be merged into it. Tune the model "
                "before it is quantised."
            )
    # The blocks alone: peft would take the whole model for one of an older transformers, and move targets among its experts.
    blocks = nn.ModuleList(layer.block for layer in anatomy.layers)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(maps),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in maps.values()),  # stored as (inputs, outputs)
    )
    try:
        peft.inject_adapter_in_model(config, blocks)
        layers = {name: blocks.get_submodule(name) for name in maps}
        for layer, module in zip(layers.values(), maps.values(), strict=True):
            wide = torch.promote_types(module.weight.dtype, torch.float32)
            layer.lora_A.to(wide)
            layer.lora_B.to(wide)
        yield layers
    finally:
        for name, module in maps.items():
            parent, _, child = name.rpartition(".")
            setattr(blocks.get_submodule(parent), child, module)


@torch.no_grad()
def merge(layers: dict[str, Any]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The weight of each adapted map, and what it becomes: of its shape, rounded to its dtype once. Changes nothing yet.

    Raises LLMDropError if a number is not finite in that dtype.
    """
    pairs = []
    for name, layer in layers.items():
        weight, change = layer.get_base_layer().weight, layer.get_delta_weight("default")
        merged = (weight.to(change.dtype) + change).to(weight.dtype)
        if not bool(merged.isfinite().all()):
            raise LLMDropError(f"The tuned weight of {name} is not finite in {weight.dtype}. Use a lower learning rate.")
        pairs.append((weight, merged))
    return pairs


def _kept_maps(anatomy: Anatomy) -> dict[str, nn.Module]:
    """The linear maps of all attention and MLPs that are there, by layer and name: "3.self_attn.q_proj"."""
    family = family_of(anatomy.decoder.config)
    units = (family.attention_unit[0], *family.mlp_unit[: 1 if family.mlp_is_one_module else 2])
    return {
        ".".join(filter(None, (str(index), unit, name))): module
        for index, layer in enumerate(anatomy.layers)
        for unit in units
        if unit != family.attention_unit[0] or layer.has_attention  # another mixer stays as it is
        for name, module in layer.block.get_submodule(unit).named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not ROUTERS & {*name.split(".")}
    }
