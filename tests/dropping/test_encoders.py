"""Encoders without layers equal the dense encoder whose output projections are set to zero."""

import copy
import functools

import pytest
import torch
from dropping.reference import A
from encoder_families import CASES, inputs, read, silence, tiny
from torch import nn

from llmdrop_utils import DropPlan, LLMDropError, drop, dropped, measure_importance
from llmdrop_utils.dropping.units import skipping
from llmdrop_utils.models.families import family_of, find_anatomy

PLANS = {
    "attention": DropPlan(attention=(0, 2)),
    "mlp": DropPlan(mlp=(1, 0)),
    "block": DropPlan((1,), (1,)),
    "joint": DropPlan((1, 0), (2,)),
    "all": DropPlan((0, 1, 2), (0, 1, 2)),
}
every_family = pytest.mark.parametrize("name", CASES)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])


@functools.cache
def dense(name: str) -> nn.Module:
    return tiny(name)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [layer.block for layer in find_anatomy(model).layers]


@functools.cache
def silenced(name: str, plan: DropPlan) -> nn.Module:
    model = copy.deepcopy(dense(name))
    silence(name, blocks_of(model), plan.attention, plan.mlp)
    return model


def snapshot(name: str, model: nn.Module) -> tuple:
    states = read(model, inputs(name))  # first: transformers installs hooks of its own at the first forward
    return (
        [(n, id(module), module.training) for n, module in model.named_modules(remove_duplicate=False)],
        [(n, id(p), p.data_ptr()) for n, p in model.named_parameters(remove_duplicate=False)],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        states.numpy().tobytes(),
    )


@every_plan
@every_family
def test_equals_silenced_projections(name, plan):
    model, given = dense(name), inputs(name)
    before = snapshot(name, model)
    expected = read(silenced(name, plan), given)
    assert float((expected - read(model, given)).abs().max()) > 1e-2, "the plan must matter"
    for context in (dropped, skipping):
        with context(model, plan):
            torch.testing.assert_close(read(model, given), expected, rtol=1e-5, atol=1e-5)
            if not CASES[name].is_vision:
                states = (read(each, given, attention_mask=MASK)[MASK.bool()] for each in (model, silenced(name, plan)))
                torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
        assert snapshot(name, model) == before
    for_good = drop(copy.deepcopy(model), plan)
    torch.testing.assert_close(read(for_good, given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_a_dropped_model_cannot_read_changes_nothing(name):
    model, before = dense(name), snapshot(name, dense(name))
    other = inputs("vit" if name == "bert" else "bert")
    with pytest.raises((ValueError, AttributeError)), dropped(model, PLANS["joint"]):  # as transformers says it
        read(model, other)
    with pytest.raises(LLMDropError, match="Expected"), dropped(model, PLANS["joint"]):
        measure_importance(model, other)
    assert snapshot(name, model) == before


@every_plan
@every_family
def test_exactly_the_unit_is_dropped(name, plan):
    """What goes is what has no effect once the projections are silent: nothing in there has a gradient."""
    model = copy.deepcopy(dense(name))
    silence(name, blocks_of(model), plan.attention, plan.mlp)
    with torch.enable_grad():
        key = "pixel_values" if CASES[name].is_vision else "input_ids"
        model(**{key: inputs(name)}).last_hidden_state.square().sum().backward()
    inside = {id(p) for block in blocks_of(model) for p in block.parameters()}
    dead = {n for n, p in model.named_parameters() if id(p) in inside and (p.grad is None or not p.grad.any())}
    names = {id(p): n for n, p in model.named_parameters()}
    for projection, layers in ((CASES[name].attention, plan.attention), (CASES[name].mlp, plan.mlp)):
        for block in (blocks_of(model)[index] for index in layers):
            dead |= {names[id(p)] for n, p in block.named_parameters() if n.startswith(f"{projection}.")}
    before = {n for n, _ in dense(name).named_parameters()}
    with dropped(dense(name), plan):
        assert before - {n for n, _ in dense(name).named_parameters()} == dead


@every_family
def test_norms_on_the_stream_stay(name):
    """Without any sub-layer a post-norm encoder still normalises its stream twice a layer."""
    norms = family_of(dense(name).config).stream_norms
    with dropped(dense(name), PLANS["all"]) as model:
        left = {n for block in blocks_of(model) for n, _ in block.named_parameters()}
    assert left == {f"{norm}.{part}" for norm in norms or () for part in ("weight", "bias")}


@every_family
def test_importance_of_what_is_dropped(name):
    plan = PLANS["joint"]
    expected = measure_importance(silenced(name, plan), inputs(name)).importance
    with dropped(dense(name), plan) as model:
        found = measure_importance(model, inputs(name))
    for kind in ("attention", "mlp"):
        assert all(found.importance[kind][index] == 0.0 for index in getattr(plan, kind))
    for kind, values in found.importance.items():
        assert abs(values - expected[kind]).max() < 1e-6
    assert found.gone == {("attention", 0), ("attention", 1), ("mlp", 2)}


def test_maps():
    """They take the place of one module, where attention or MLP is one."""
    x = torch.randn(1, 9, 32)
    with dropped(dense("mpnet"), DropPlan((1,), maps={("attention", 1): A})) as model:
        attention = blocks_of(model)[1].get_submodule("attention")
        expected = attention.LayerNorm(x + x @ A.weight.T + A.bias)
        torch.testing.assert_close(attention(x)[0], expected)
    with pytest.raises(LLMDropError, match="bert have no module of its own for the attention, so no map .* .layer 1..$"):
        drop(tiny("bert"), DropPlan((1,), maps={("attention", 1): A}))
    with pytest.raises(LLMDropError, match="mpnet have no module of its own for the MLP, .* with maps for attention only"):
        drop(tiny("mpnet"), DropPlan(mlp=(1,), maps={("mlp", 1): A}))
