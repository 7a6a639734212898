"""Dropped models against an independent reference: the dense model with its output projections set to zero."""

import contextlib
import copy
import pickle
import time

import accelerate
import families
import numpy as np
import pytest
import torch
from dropping.reference import (
    MASK,
    PLANS,
    TOKENS,
    close,
    dense,
    every_family,
    every_plan,
    expected_logits,
    padded,
    pristine,
    silenced,
    snapshot,
    step_by_step,
)
from transformers import DynamicCache

from llmdrop_utils import LLMDropError, measure_importance
from llmdrop_utils.dropping import units
from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.dropping.units import drop, dropped, skipping
from llmdrop_utils.models import layouts
from llmdrop_utils.models.families import find_anatomy

ONLY_EAGER = {"gpt-j", "gpt-oss", "gemma2"}  # transformers gives these no choice, or not in every version


@every_plan
@every_family
def test_equals_silenced_projections(name, plan):
    expected = expected_logits(name, plan)
    assert float((expected - expected_logits(name))[MASK.bool()].abs().max()) > 1e-3, "the plan must matter"
    with dropped(dense(name), plan) as model:
        close(padded(model), expected)
        close(model(TOKENS).logits, silenced(name, plan)(TOKENS).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_family
def test_both_attention_implementations(name, implementation):
    if implementation == "sdpa" and name in ONLY_EAGER:
        pytest.skip("not offered by transformers")
    plan = PLANS["joint"]
    model = families.tiny(name, attn_implementation=implementation)
    reference = copy.deepcopy(model)
    families.silence(name, reference, plan.attention, plan.mlp)
    with dropped(model, plan):
        close(padded(model), padded(reference))
        close(step_by_step(model)[0], padded(reference))


@every_plan
@every_family
def test_exactly_the_unit_is_dropped(name, plan):
    """What goes is what has no effect once the projections are silent: nothing in there has a gradient."""
    model = copy.deepcopy(pristine(name))
    projections = families.silence(name, model, plan.attention, plan.mlp)
    with torch.enable_grad():
        model(TOKENS).logits.square().sum().backward()
    layers = [layer.block for layer in find_anatomy(model).layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    dead = {n for n, p in model.named_parameters() if id(p) in inside and (p.grad is None or not p.grad.any())} | projections
    before = {n: p.numel() for n, p in dense(name).named_parameters()}
    with dropped(dense(name), plan):
        after = {n: p.numel() for n, p in dense(name).named_parameters()}
        assert set(before) - set(after) == dead
        assert sum(before.values()) - sum(after.values()) == sum(before[n] for n in dead)
        assert not any(n in dead for n in dense(name).state_dict())


@every_family
def test_nothing_that_is_dropped_runs(name):
    model, plan, calls = dense(name), PLANS["joint"], []
    count = lambda module, args: calls.append(id(module))  # noqa: E731
    before = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for module in before.values():
            stack.callback(module.register_forward_pre_hook(count).remove)
        stack.enter_context(dropped(model, plan))
        gone = set(map(id, before.values())) - set(map(id, model.modules()))
        step_by_step(model)
        assert gone
        assert calls
        assert not gone & set(calls)


@every_plan
@every_family
def test_leaving_restores_everything(name, plan):
    model = dense(name)
    before = snapshot(model)
    for context in (dropped, skipping):
        with context(model, plan) as inside:
            assert inside is model
            changed = snapshot(model)
        assert snapshot(model) == before
        assert changed[0] != before[0]
        assert changed[3] != before[3]
    with pytest.raises(ZeroDivisionError), dropped(model, plan):
        raise ZeroDivisionError
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["llama", "phi", "gpt-neox", "falcon-40b", "gemma2", "opt", "gpt-oss"])
def test_nesting(name):
    """Also a layer that is dropped twice, and a norm that two sub-layers share and that goes with the second."""
    model = dense(name)
    before = snapshot(model)
    union = DropPlan((0, 1), (0, 1))
    with dropped(model, union):
        wanted = [n for n, _ in model.named_parameters()]
    with dropped(model, DropPlan((0,), (1,))):
        middle = snapshot(model)
        with contextlib.suppress(ZeroDivisionError), skipping(model, DropPlan((1, 0), (0,))):
            assert [n for n, _ in model.named_parameters()] == wanted
            close(padded(model), expected_logits(name, union))
            close(step_by_step(model)[0], expected_logits(name, union))
            raise ZeroDivisionError
        assert snapshot(model) == middle
        close(step_by_step(model)[0], expected_logits(name, DropPlan((0,), (1,))))
    assert snapshot(model) == before


@pytest.mark.parametrize("n_norms", [1, 2])
def test_falcon_with_one_norm_or_two(n_norms):
    """Falcon-11B shares a norm in the layers of the new architecture; Falcon-40B has two."""
    model = families.tiny("falcon-40b", num_ln_in_parallel_attn=n_norms)
    norms = lambda: sum("ln" in n or "layernorm" in n for n, _ in model.h[0].named_parameters())  # noqa: E731
    model.h = model.transformer.h
    assert norms() == 2 * n_norms  # weight and bias
    with skipping(model, DropPlan(attention=(0,))):
        assert norms() == 2
        with skipping(model, DropPlan(mlp=(0,))):
            assert norms() == 0


@every_family
def test_bfloat16(name):
    plan = PLANS["joint"]
    model, reference = copy.deepcopy(pristine(name)).bfloat16(), copy.deepcopy(silenced(name, plan)).bfloat16()
    expected = padded(reference)
    with dropped(model, plan):
        found = padded(model)
        assert found.dtype == torch.bfloat16
        close(found, expected, 0.02)
        step_by_step(model)


@every_family
def test_dropping_for_good(name):
    model, plan = copy.deepcopy(pristine(name)), PLANS["joint"]
    assert drop(model, plan) is model
    with dropped(dense(name), plan):
        expected = step_by_step(dense(name), DynamicCache())[0]
        names = [n for n, _ in dense(name).named_parameters()]
    assert [n for n, _ in model.named_parameters()] == names
    for again in (model, copy.deepcopy(model)):
        torch.testing.assert_close(step_by_step(again, DynamicCache())[0], expected, rtol=0, atol=0)


def test_a_dropped_model_can_be_pickled():
    model = drop(copy.deepcopy(pristine("llama")), PLANS["joint"])
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(step_by_step(again)[0], step_by_step(model)[0])


@every_plan
@every_family
def test_importance_of_what_is_dropped_is_zero(name, plan):
    expected = measure_importance(silenced(name, plan), TOKENS, attention_mask=MASK).importance
    with dropped(dense(name), plan) as model:
        found = measure_importance(model, TOKENS, attention_mask=MASK).importance
    blocks = () if families.CASES[name].norms else set(plan.attention) & set(plan.mlp)  # norms on the stream stay
    for kind, gone in (("attention", plan.attention), ("mlp", plan.mlp), ("block", blocks)):
        assert all(found[kind][index] == 0.0 for index in gone)
        assert (found[kind] > 0).sum() == 3 - len(gone)
        np.testing.assert_allclose(found[kind], expected[kind], atol=1e-6)


def test_no_attention_and_no_mlp_leaves_the_embeddings():
    everything = DropPlan((0, 1, 2), (0, 1, 2))
    model = dense("llama")
    with dropped(model, everything):
        found = model(TOKENS).logits
        assert len(list(model.model.layers.parameters())) == 0
    close(found, model.lm_head(model.model.norm(model.model.embed_tokens(TOKENS))))


def test_skipping_is_cheap():
    model = families.tiny("llama", num_hidden_layers=32)
    plan = DropPlan(tuple(range(16)))
    best = []
    for _ in range(20):
        start = time.perf_counter()
        with skipping(model, plan):
            pass
        best.append(time.perf_counter() - start)
    assert min(best) < 5e-3  # about one millisecond; the rest is for slow machines


def test_weights_that_leave_come_back(monkeypatch):
    """As if the CPU were a GPU; the test below is on a real one."""
    moves, model = [], dense("llama")
    monkeypatch.setattr(units, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(units, "_move", lambda tensor, device: moves.append((id(tensor), device)))
    before = dict(model.named_parameters())
    with contextlib.suppress(ZeroDivisionError), dropped(model, PLANS["joint"]):
        gone = [id(p) for name, p in before.items() if name not in dict(model.named_parameters())]
        assert sorted(moves) == sorted((one, torch.device("cpu")) for one in gone)
        moves.clear()
        raise ZeroDivisionError
    assert sorted(moves) == sorted((one, torch.device("cpu")) for one in gone)
    moves.clear()
    with skipping(model, PLANS["joint"]):
        pass
    assert not moves


def test_offloaded_to_disk(tmp_path):
    plan = PLANS["joint"]
    model = accelerate.disk_offload(copy.deepcopy(pristine("llama")), tmp_path, execution_device=torch.device("cpu"))
    whole = padded(model)
    with dropped(model, plan):
        close(padded(model), expected_logits("llama", plan))
        close(step_by_step(model)[0], expected_logits("llama", plan))
    assert torch.equal(padded(model), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt-oss"])
def test_weights_leave_the_gpu(name):
    model, plan = families.tiny(name, hidden_size=256, intermediate_size=4096).cuda(), PLANS["joint"]
    before = [(n, p.device, p.clone()) for n, p in model.named_parameters()]
    names, reference = dict(model.named_parameters()), copy.deepcopy(model)
    families.silence(name, reference, plan.attention, plan.mlp)
    expected = reference(TOKENS.cuda()).logits
    del reference
    allocated = torch.cuda.memory_allocated()
    with contextlib.suppress(ZeroDivisionError), dropped(model, plan):
        gone = [p for n, p in names.items() if n not in dict(model.named_parameters())]
        assert {p.device.type for p in gone} == {"cpu"}
        assert allocated - torch.cuda.memory_allocated() >= sum(p.nbytes for p in gone)
        torch.testing.assert_close(model(TOKENS.cuda()).logits, expected, rtol=1e-3, atol=1e-3)
        raise ZeroDivisionError
    for (n, device, value), (again, p) in zip(before, model.named_parameters(), strict=True):
        assert (n, device) == (again, p.device)
        assert p is names[n]
        assert torch.equal(p, value)


def test_a_module_that_is_missing(monkeypatch):
    monkeypatch.setitem(layouts.FAMILIES, "llama", layouts.Family(mlp_unit=("mlp", "norm_of_another_family")))
    before = snapshot(dense("llama"))
    with pytest.raises(LLMDropError, match="llama model is not built as FAMILIES.*norm_of_another_family"):
        drop(dense("llama"), PLANS["joint"])
    assert snapshot(dense("llama")) == before


def test_an_unknown_family():
    model = families.tiny("llama")
    model.config.model_type = "novel"
    with pytest.raises(LLMDropError, match="'novel' is unknown"):
        drop(model, DropPlan((0,)))
