"""Rotary embeddings that follow the length of what they read: one long sequence in a batch changes what all others get.

transformers has two: "longrope" (Phi-3) takes other frequencies beyond the length that the model was first trained on, and
"dynamic" (NTK) slows them down with each longer sequence, and keeps them so for the next ones.
"""

import torch
from torch import nn


def rotary_following(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model that depend on the longest sequence of a batch."""
    return [module for module in model.modules() if _types(module)]


def short_below(model: nn.Module) -> int | None:
    """Sequences of fewer tokens than this do not change each other's rotary embeddings; None: whatever their length."""
    lengths = []
    for module in rotary_following(model):
        parameters = module.config.rope_parameters
        for layer_type, rope_type in _types(module).items():
            own = parameters if layer_type is None else parameters[layer_type]
            dynamic = "dynamic" in rope_type
            lengths.append(module.original_max_seq_len if dynamic else own["original_max_position_embeddings"])
    return min(lengths, default=None)


def _types(module: nn.Module) -> dict[str | None, str]:
    """Layer type (None: one for all) -> type of rotary embedding, of those that follow the length."""
    given = getattr(module, "rope_type", None)
    types = given if isinstance(given, dict) else {None: given}
    return {layer_type: str(name) for layer_type, name in types.items() if name == "longrope" or "dynamic" in str(name)}


class RotaryState:
    """What a rotary embedding holds now: its frequencies, and the longest sequence that it has read."""

    def __init__(self, module: nn.Module):
        self.module, self.attributes = module, dict(vars(module))
        self.buffers = {name: (tensor, tensor.clone()) for name, tensor in module.named_buffers(recurse=False)}

    def restore(self) -> None:
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for name, (tensor, content) in self.buffers.items():
            with torch.inference_mode():
                tensor.copy_(content)
            self.module._buffers[name] = tensor
