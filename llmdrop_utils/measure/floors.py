"""What a forward pass must hold, move and compute, counted from a model's shape.

Key-value bytes follow the paper's Table 4: 2 x layers x key-value heads x head size x tokens x bytes per number. The floor of
a pass is an estimate, not a bound. It follows from bytes and operations of its parts, one part after the other, and from what
the device was measured to move and multiply (`speed.Limits`). A pass can be faster: parts can overlap, and what a processor's
caches hold need not be moved. Usually it is slower: launching operations and copying the cache are not counted.
"""

import dataclasses

from torch import nn
from transformers.cache_utils import Cache

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan
from ..dropping.units import left
from ..models.cache_shape import cache_geometry, numbers_multiplied
from ..models.encoder_layouts import ENCODERS
from ..models.families import find_anatomy


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a forward pass."""

    bytes: float  # read and written at least: weights once, keys and values of the context; activations are not counted
    operations: float  # multiplications and additions


def kv_bytes(config, plan: DropPlan, batch_size: int, length: int, bytes_per_number: int) -> int:
    """Bytes of keys and values of `length` tokens in a dynamic cache: the formula behind the paper's Table 4.

    Full attention keeps every token, a sliding window of w the last w - 1 (what the next token still sees beside itself),
    latent attention (DeepSeek) one compressed vector and one rotary key per token. Layers in `plan.attention` hold nothing.
    """
    batch_size, length = whole(batch_size, "The batch size"), whole(length, "The number of tokens", at_least=0)
    bytes_per_number = whole(bytes_per_number, "The number of bytes")
    config = config.get_text_config()
    if config.model_type in ENCODERS:
        raise LLMDropError(f"{config.model_type} models are encoders, which keep no keys and values.")
    numbers = sum(
        per_token * (length if window is None else min(length, window - 1))
        for layer, (per_token, window) in enumerate(cache_geometry(config))
        if layer not in plan.attention
    )
    return numbers * batch_size * bytes_per_number


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values in a live cache (and of the keys of sparse attention's index), counted from its tensors."""
    names = "keys", "values", "indexer_keys"  # mixers of hybrids have none of them, but states that do not grow
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def parts_of_pass(model: nn.Module, batch_size: int, n_new: int, context: int) -> list[Part]:
    """The parts of a pass over `n_new` tokens a sequence, `context` more being in the cache; logits of the last token only.

    Weights are those that the decoder and the LM head have now: inside `dropped`, what is dropped costs nothing, and a vision
    tower does not read text. Of experts, as many are read as tokens can choose at most.
    """
    anatomy = find_anatomy(model)
    config, tokens = anatomy.decoder.config, batch_size * n_new
    head = model.get_output_embeddings()
    parts = []
    for module in dict.fromkeys([*anatomy.decoder.modules(), *([] if head is None else [head])]):
        for weight in module.parameters(recurse=False):
            if weight.ndim < 2 or isinstance(module, nn.Embedding):
                continue
            rows = batch_size if module is head else tokens
            read, used = weight.numel(), weight.numel()
            if weight.ndim == 3 and (chosen := getattr(config, "num_experts_per_tok", None)):  # experts
                read = read * min(1, rows * chosen / len(weight))
                used = used * chosen / len(weight)
            parts.append(Part(read * weight.element_size(), 2.0 * rows * used))
    width = next(p for p in anatomy.decoder.parameters() if p.is_floating_point()).element_size()
    kept = cache_geometry(config)
    for layer in left(anatomy, "attention"):
        (per_token, window), multiplied = kept[layer], numbers_multiplied(config.per_layer_config[layer])
        seen = context + n_new if window is None else min(context + n_new, window)
        each = context + (n_new + 1) / 2 if window is None else min(context + (n_new + 1) / 2, window)
        parts.append(Part(batch_size * seen * per_token * width, 2.0 * tokens * each * multiplied))
    return parts


def floor_seconds(parts: list[Part], bandwidth: float, rate: float) -> float:
    """Estimate of a pass's time in seconds, its parts one after the other.

    A part takes as long as its bytes at `bandwidth` (bytes/s) or its operations at `rate` (1/s), whichever is longer.
    """
    return sum(max(part.bytes / bandwidth, part.operations / rate) for part in parts)
