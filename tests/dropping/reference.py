"""What the tests of dropping share: an independent reference, and a padded batch that is read at once or step by step.

The reference is the dense model with its output projections set to zero. It computes every sub-layer and knows nothing of
stand-ins, norms, hooks or caches.
"""

import copy
import functools

import families
import pytest
import torch
from torch import nn

from llmdrop_utils.dropping.maps import LinearMap
from llmdrop_utils.dropping.plan import DropPlan

# Three layers; where windows slide, in layers 0 and 2. "attention" leaves only full attention there, "block" only sliding.
PLANS = {
    "attention": DropPlan(attention=(0, 2)),
    "mlp": DropPlan(mlp=(1, 0)),
    "block": DropPlan((1,), (1,)),
    "joint": DropPlan((1, 0), (2,)),
}
TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2))  # longer than the windows, which are 4
MASK = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)
PREFILL = 8

every_family = pytest.mark.parametrize("name", families.CASES)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@functools.cache
def pristine(name: str) -> nn.Module:
    """Nothing is ever dropped from it."""
    return families.tiny(name)


@functools.cache
def dense(name: str) -> nn.Module:
    return copy.deepcopy(pristine(name))


@functools.cache
def silenced(name: str, plan: DropPlan) -> nn.Module:
    model = copy.deepcopy(pristine(name))
    families.silence(name, model, plan.attention, plan.mlp)
    return model


def padded(model: nn.Module) -> torch.Tensor:
    """Logits (B, T, vocabulary) of the batch with padding on the left."""
    return model(TOKENS, attention_mask=MASK, position_ids=POSITIONS, use_cache=False).logits


def step_by_step(model: nn.Module, cache=None) -> tuple[torch.Tensor, object]:
    """Logits of the same batch through a cache, a few tokens at once and then one by one; and the cache."""
    logits, start = [], 0
    for end in range(PREFILL, TOKENS.shape[1] + 1):
        output = model(
            TOKENS[:, start:end],
            attention_mask=MASK[:, :end],
            position_ids=POSITIONS[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = output.past_key_values, end
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


@functools.cache
def expected_logits(name: str, plan: DropPlan = DropPlan()) -> torch.Tensor:  # noqa: B008 (it cannot change)
    return padded(silenced(name, plan))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal where tokens count, to a share of the largest logit."""
    found, expected = found[MASK.bool()].float(), expected[MASK.bool()].float()
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def snapshot(model: nn.Module) -> tuple:
    """Everything that must be as it was: names, order and identity of modules and parameters, hooks, and logits."""
    logits = model(TOKENS, use_cache=False).logits  # first: transformers installs hooks of its own at the first forward
    return (
        [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        logits.numpy().tobytes(),
    )


# ---- plans with maps ----------------------------------------------------------------------------------------------------

WIDTH = 32


def some_map(seed: int, bias: bool = True, width: int = WIDTH) -> LinearMap:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.5 * torch.randn(width, width, generator=generator)
    return LinearMap(weight, torch.randn(width, generator=generator) if bias else None)


A, B, C = some_map(1), some_map(2, bias=False), some_map(3)
MAPPED = {
    "attention": DropPlan((0, 2), maps={("attention", 0): A}),
    "mlp": DropPlan(mlp=(1, 0), maps={("mlp", 1): A, ("mlp", 0): B}),
    "block": DropPlan((1,), (1,), maps={("mlp", 1): B, ("attention", 1): C}),
    "joint": DropPlan((1, 0), (2, 1), maps={("attention", 1): B, ("mlp", 2): C}),
    "one of two": DropPlan((1,), (1,), maps={("mlp", 1): A}),  # the norm that parallel sub-layers share stays for the map
    "all attention": DropPlan((0, 1, 2), maps={("attention", i): m for i, m in enumerate((A, B, C))}),
}
