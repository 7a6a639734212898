"""What the weights of a sub-layer tell without a forward pass. NaN where a family's weights are not named as in Llama."""

import torch
from torch import nn

from ..models.families import family_of


@torch.no_grad()
def value_output_norm(block: nn.Module, config) -> float:
    """Frobenius norm of the sum over heads of output x value maps: what one token that attends to itself makes of itself.

    Read from `o_proj` and `v_proj`, with the gain of the norm before. NaN also where a norm of its own scales the output.
    """
    unit = family_of(config).attention_unit
    value, output = _linear(block, config, "v_proj"), _linear(block, config, "o_proj")
    if value is None or output is None or unit[1:] != ("input_layernorm",):
        return float("nan")
    maps, out = value.weight.double() * _gain(block, config, value), output.weight.double()
    size = block.get_submodule(unit[0]).head_dim
    return float((out @ _for_each_head(maps, size, out.shape[1] // size).flatten(0, 1)).norm())


@torch.no_grad()
def query_key_norm(block: nn.Module, config) -> float:
    """Frobenius norm of all heads' query-key maps together: how far attention can depend on what tokens are.

    The idea of Gate-Norm (Saikumar and Varghese 2025, arXiv:2512.20636), which ranks attention by the coupling of queries and
    keys. Each head's map is W_q^T W_k, with the gain of the norm before it and without biases and rotary positions; of a key
    that heads share, each has its own. NaN also where queries and keys are normalised.
    """
    query, key = _linear(block, config, "q_proj"), _linear(block, config, "k_proj")
    if query is None or key is None or not has_plain_queries(block, config):
        return float("nan")
    attention = block.get_submodule(family_of(config).attention_unit[0])
    gain, size = _gain(block, config, query), attention.head_dim
    queries = (query.weight.double() * gain).view(-1, size, query.in_features)
    keys = _for_each_head(key.weight.double() * gain, size, len(queries))
    # |Q^T K|^2 = <Q Q^T, K K^T>, of matrices that are as small as a head.
    squares = ((queries @ queries.transpose(1, 2)) * (keys @ keys.transpose(1, 2))).sum()
    return float(squares.clamp(min=0).sqrt())


def has_plain_queries(block: nn.Module, config) -> bool:
    """Are queries and keys linear in what attention reads, each by a matrix of its own, and not normalised or clipped?"""
    attention = block.get_submodule(family_of(config).attention_unit[0])
    linear = all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("q_proj", "k_proj"))
    normed = any("norm" in name for name, _ in attention.named_children()) or getattr(config, "clip_qkv", None) is not None
    return linear and hasattr(attention, "head_dim") and not normed


@torch.no_grad()
def weight_norm(block: nn.Module, config, kind: str) -> float:
    """Frobenius norm of all weights of "attention", "mlp" or "block", norms left out."""
    family = family_of(config)
    units = {"attention": family.attention_unit[:1], "mlp": family.mlp_unit[: 1 if family.mlp_is_one_module else 2]}
    names = units.get(kind) or units["attention"] + units["mlp"]
    weights = [weight for name in names for weight in block.get_submodule(name).parameters() if weight.ndim > 1]
    if any(weight.device.type == "meta" for weight in weights):  # offloaded
        return float("nan")
    return float(sum(weight.detach().double().square().sum().cpu() for weight in weights)) ** 0.5


def _linear(block: nn.Module, config, name: str) -> nn.Linear | None:
    """A projection of the attention; None if there is none of this name, or if it is offloaded."""
    found = getattr(block.get_submodule(family_of(config).attention_unit[0]), name, None)
    return found if isinstance(found, nn.Linear) and found.weight.device.type != "meta" else None


def _gain(block: nn.Module, config, projection: nn.Linear) -> torch.Tensor:
    """By what the norm before attention multiplies each channel: float64 (1, d); ones if there is none."""
    family = family_of(config)
    before = [name for name in family.attention_unit[1:] if name != family.attention][:1]  # the term itself may end in a norm
    if not before:
        return torch.ones(1, projection.in_features, dtype=torch.float64, device=projection.weight.device)
    norm = block.get_submodule(before[0])
    signs = 1.0 - 2.0 * (
        torch.arange(projection.in_features) % 2
    )  # of mean zero and mean square one: a norm leaves it as it is
    signs = signs.to(projection.weight.device, projection.weight.dtype)[None]
    return (norm(signs) - norm(-signs)).double() / (2 * signs)  # without a bias, if it has one


def _for_each_head(maps: torch.Tensor, size: int, heads: int) -> torch.Tensor:
    """Rows of shared heads (kv heads x size, d), once for each head of the queries: (heads, size, d)."""
    shared = maps.view(-1, size, maps.shape[1])
    return shared.repeat_interleave(heads // len(shared), dim=0)
