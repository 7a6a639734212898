"""What the formats that know Llama-shaped models alone have in common: which models they can hold."""

from typing import NoReturn

import torch
from torch import nn

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan, check_plan
from ..dropping.units import left

FAMILIES = ("llama", "mistral", "qwen2")


def check_llama_shaped(model: nn.Module, plan: DropPlan, program: str):
    """The model's configuration. Raises LLMDropError unless it is dense, in float32, and built like Llama.

    program: what the export is for.
    """
    anatomy = check_plan(model, plan)
    config = anatomy.decoder.config
    if model.dtype != torch.float32:
        raise LLMDropError(f"Exports are compared with the model in float32, but it is in {model.dtype}: load it in float32.")
    if any(len(left(anatomy, kept)) < len(anatomy) for kept in ("attention", "mlp")):
        raise LLMDropError("The model lacks sub-layers already. Export the dense model, and give the whole plan.")
    if config.model_type not in FAMILIES:
        refuse(config, program, f"it can leave layers out of Llama-shaped models only ({', '.join(FAMILIES)})")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(config, program, "only a part of each head is rotated")
    if config.hidden_act != "silu":
        refuse(config, program, f"its MLP uses {config.hidden_act}, not silu")
    if getattr(config, "mlp_bias", False):
        refuse(config, program, "its MLP has biases")
    if len(plan.attention) == len(anatomy):
        refuse(config, program, "no attention is left, so there is nothing to cache")
    return config


def refuse(config, program: str, reason: str) -> NoReturn:
    """Raise the error for a model that a program cannot run without layers."""
    raise LLMDropError(f"This {config.model_type} model cannot be exported for {program} without layers: {reason}.")
