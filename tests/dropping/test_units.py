"""Dropped models against an independent reference: the dense model with its output projections set to zero.

The reference computes every sub-layer and knows nothing of stand-ins, norms, hooks or caches.
"""

import contextlib
import copy
import functools
import json
import pickle
import time

import accelerate
import families
import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from llmdrop_utils import LLMDropError, measure_importance
from llmdrop_utils.drop import units
from llmdrop_utils.drop.plan import DropPlan, check_plan
from llmdrop_utils.drop.units import drop, dropped, skipping
from llmdrop_utils.models import families as anatomy
from llmdrop_utils.models.families import find_anatomy

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
CACHES = {
    "made by the model": lambda model: None,
    "growing": lambda model: DynamicCache(),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}
# Dense, it fails as well: transformers adds a bias of the tokens' length to a mask of the cache's length.
NO_STATIC_CACHE = {"falcon-rw"}
ONLY_EAGER = {"gpt-j", "gpt-oss", "gemma2"}  # transformers gives these no choice, or not in every version

every_family = pytest.mark.parametrize("name", families.CASES)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@functools.cache
def pristine(name: str) -> nn.Module:
    """Nothing is ever dropped from it."""
    return families.tiny(name)


@functools.cache
def dense(name: str) -> nn.Module:
    return copy.deepcopy(pristine(name))


def silence(name: str, model: nn.Module, plan: DropPlan) -> set[str]:
    """Set the output projections of the plan's sub-layers to zero, in place; returns the names of these parameters."""
    case, names = families.CASES[name], {id(parameter): n for n, parameter in model.named_parameters()}
    silenced = set()
    for indices, projection in ((plan.attention, case.attention), (plan.mlp, case.mlp)):
        for index in indices:
            found = [p for n, p in find_anatomy(model).layers[index].block.named_parameters() if projection in n]
            assert found
            for parameter in found:
                parameter.zero_()
                silenced.add(names[id(parameter)])
    return silenced


@functools.cache
def silenced(name: str, plan: DropPlan) -> nn.Module:
    model = copy.deepcopy(pristine(name))
    silence(name, model, plan)
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


@every_plan
@every_family
def test_equals_silenced_projections(name, plan):
    expected = expected_logits(name, plan)
    assert float((expected - expected_logits(name))[MASK.bool()].abs().max()) > 1e-3, "the plan must matter"
    with dropped(dense(name), plan) as model:
        close(padded(model), expected)
        close(model(TOKENS).logits, silenced(name, plan)(TOKENS).logits)


def n_bytes(cache) -> list[int]:
    """What each layer of a cache holds."""
    return [sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None) for layer in cache.layers]


@functools.cache
def bytes_of_the_whole(name: str, kind: str) -> list[int]:
    return n_bytes(step_by_step(pristine(name), CACHES[kind](pristine(name)))[1])


@every_plan
@every_family
def test_cached_decoding_equals_full_forward(name, plan):
    """And the cache holds nothing for what is gone, and as much as ever for what is left."""
    expected = expected_logits(name, plan)
    kinds = CACHES if plan is PLANS["joint"] else ["growing", "static"] if plan.attention else ["dynamic"]
    for kind in kinds:
        if kind == "static" and name in NO_STATIC_CACHE:
            with pytest.raises(RuntimeError, match="must match the size"):
                step_by_step(pristine(name), CACHES[kind](pristine(name)))
            continue
        with dropped(dense(name), plan) as model:
            logits, cache = step_by_step(model, CACHES[kind](model))
        close(logits, expected)
        assert int(cache.get_seq_length()) == TOKENS.shape[1]
        whole = bytes_of_the_whole(name, kind)
        assert min(whole) > 0
        assert n_bytes(cache) == [0 if index in plan.attention else size for index, size in enumerate(whole)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_family
def test_both_attention_implementations(name, implementation):
    if implementation == "sdpa" and name in ONLY_EAGER:
        pytest.skip("not offered by transformers")
    plan = PLANS["joint"]
    model = families.tiny(name, attn_implementation=implementation)
    reference = copy.deepcopy(model)
    silence(name, reference, plan)
    with dropped(model, plan):
        close(padded(model), padded(reference))
        close(step_by_step(model)[0], padded(reference))


@every_plan
@every_family
def test_exactly_the_unit_is_gone(name, plan):
    """What goes is what has no effect once the projections are silent: nothing in there has a gradient."""
    model = copy.deepcopy(pristine(name))
    projections = silence(name, model, plan)
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
def test_nothing_that_is_gone_runs(name):
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


def generate(model: nn.Module, **how) -> list[list[int]]:
    torch.manual_seed(3)
    how = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None} | how
    return model.generate(TOKENS[:, :7], attention_mask=MASK[:, :7], **how).tolist()


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", GENERATION.values(), ids=GENERATION)
@every_family
def test_generation(name, how):
    """A batch with padding on the left."""
    plan = PLANS["joint"]
    expected = generate(silenced(name, plan), **how)
    with dropped(dense(name), plan) as model:
        assert generate(model, **how) == expected


@every_plan
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2", "gpt-j"])
def test_generation_with_every_cache(name, plan):
    expected = generate(silenced(name, plan))
    with dropped(dense(name), plan) as model:
        assert generate(model) == expected
        assert generate(model, cache_implementation="static") == expected
        assert generate(model, past_key_values=DynamicCache()) == expected
        assert generate(model, use_cache=False) == expected


def test_a_conversation_goes_on_with_the_same_cache():
    plan = PLANS["attention"]
    reference, first = silenced("gemma2", plan), TOKENS[:1, :5]
    with dropped(dense("gemma2"), plan) as model:
        results = []
        for one in (reference, model):
            cache = DynamicCache(config=model.config)
            answer = one.generate(first, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
            longer = torch.cat([answer, TOKENS[:1, 5:9]], 1)
            results.append(one.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None))
        assert results[0].tolist() == results[1].tolist()


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
    """Also a layer that is gone twice, and a norm that two sub-layers share and that goes with the second."""
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
def test_importance_of_what_is_gone_is_zero(name, plan):
    expected = measure_importance(silenced(name, plan), TOKENS, attention_mask=MASK).importance
    with dropped(dense(name), plan) as model:
        found = measure_importance(model, TOKENS, attention_mask=MASK).importance
    for kind, gone in (("attention", plan.attention), ("mlp", plan.mlp), ("block", set(plan.attention) & set(plan.mlp))):
        assert all(found[kind][index] == 0.0 for index in gone)
        assert (found[kind] > 0).sum() == 3 - len(gone)
        np.testing.assert_allclose(found[kind], expected[kind], atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon-rw", "gpt-j"])
def test_no_attention_at_all(name):
    plan = DropPlan(attention=(2, 0, 1))
    model = dense(name)
    with dropped(model, plan):
        close(padded(model), expected_logits(name, plan))
        assert model(TOKENS).past_key_values is None
        with pytest.raises(LLMDropError, match="attention of all 3 layers is dropped.*Pass use_cache=False"):
            model(TOKENS, past_key_values=DynamicCache())
        with pytest.raises(LLMDropError, match="Pass use_cache=False"):
            generate(model)
        assert generate(model, use_cache=False) == generate(silenced(name, plan), use_cache=False)
    assert model(TOKENS, use_cache=True).past_key_values is not None
    with skipping(model, DropPlan((1,))), skipping(model, DropPlan((2, 0))):  # no plan drops all, but both do
        assert model(TOKENS, use_cache=True).past_key_values is None
        with pytest.raises(LLMDropError, match="attention of all 3 layers is dropped"):
            generate(model)


def test_no_attention_and_no_mlp_leaves_the_embeddings():
    everything = DropPlan((0, 1, 2), (0, 1, 2))
    model = dense("llama")
    with dropped(model, everything):
        found = model(TOKENS).logits
        assert len(list(model.model.layers.parameters())) == 0
    close(found, model.lm_head(model.model.norm(model.model.embed_tokens(TOKENS))))


def test_a_cache_of_a_dropped_model_is_refused_by_the_whole_one():
    model = dense("llama")
    with dropped(model, PLANS["block"]):
        cache = step_by_step(model)[1]
    with pytest.raises(LLMDropError, match="used while the attention of layer 1 was dropped.*Start with a new cache"):
        model(TOKENS[:, :1], past_key_values=cache)


def test_every_way_to_give_and_take_a_cache():
    model, plan = dense("gpt-j"), PLANS["attention"]
    with dropped(model, plan):
        cache = DynamicCache()
        model.transformer(TOKENS, cache)  # by position
        taken = model(TOKENS, use_cache=True, return_dict=False)[1]  # from a tuple
        for one in (cache, taken):
            assert one.get_seq_length() == TOKENS.shape[1]
            assert [type(layer).__name__ for layer in one.layers] == ["NoCache", "DynamicLayer", "NoCache"]
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        assert cache.layers[1].keys.shape[:3] == (2, 4, 10)
        cache.reset()
        assert [type(layer).__name__ for layer in cache.layers] == ["NoCache", "DynamicLayer", "NoCache"]


def test_a_cache_that_is_given_but_not_returned():
    plan, cache = PLANS["attention"], DynamicCache()
    with dropped(dense("mistral"), plan) as model:
        for tokens in TOKENS[:, :9], TOKENS[:, 9:]:
            output = model(tokens, past_key_values=cache, use_cache=False)
            assert output.past_key_values is None
        assert cache.get_seq_length() == TOKENS.shape[1]
        torch.testing.assert_close(output.logits, model(TOKENS).logits[:, 9:])


def test_a_cache_that_the_whole_model_began():
    """Its part for the attention that is gone is emptied before it could count: the length is that of the others."""
    cache = DynamicCache(config=pristine("llama").config)
    pristine("llama")(TOKENS[:, :8], past_key_values=cache)
    with dropped(dense("llama"), PLANS["attention"]) as model:
        for token in range(8, 12):
            model(TOKENS[:, token : token + 1], past_key_values=cache)
        assert cache.get_seq_length() == 12
    assert [size > 0 for size in n_bytes(cache)] == [False, True, False]


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
    silence(name, reference, plan)
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


def test_plan_is_what_it_was_given():
    plan = DropPlan([3, 1], np.array([2]), n_layers=np.int64(4), model="hub:a/b@c", scores="f")
    assert plan == DropPlan((3, 1), (2,), 4, "hub:a/b@c", "f")
    assert [type(index) for index in (*plan.attention, *plan.mlp, plan.n_layers)] == [int] * 4
    assert plan.n_drop == 3
    assert DropPlan().n_drop == 0
    assert len({plan, DropPlan((3, 1), (2,), 4, "hub:a/b@c", "f")}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": [40], "n_layers": 32}, r"attention drop list holds layer 40, but this model has 32 layers \(0-31\)"),
        ({"mlp": [2, 3], "n_layers": 3}, r"MLP drop list holds layer 3, but this model has 3 layers \(0-2\)"),
        ({"attention": [1, 2, 1]}, "attention drop list holds layer 1 more than once"),
        ({"mlp": [0, -1]}, "MLP drop list holds layer -1, but layers are counted from 0"),
        ({"mlp": [True]}, r"MLP drop list must hold whole numbers.*\[True\]"),
        ({"mlp": np.array([True])}, "MLP drop list must hold whole numbers"),
        ({"attention": [1.0]}, "attention drop list must hold whole numbers"),
        ({"attention": "12"}, "attention drop list must hold whole numbers"),
        ({"attention": 3}, "attention drop list must hold whole numbers.*3"),
        ({"attention": None}, "attention drop list must hold whole numbers.*None"),
        ({"n_layers": 0}, "n_layers must be a whole number above 0, but is 0"),
        ({"n_layers": "3"}, "n_layers must be a whole number above 0, but is '3'"),
        ({"model": 5}, "model must be text, but is 5"),
        ({"scores": ["a"]}, r"scores must be text, but is \['a'\]"),
    ],
)
def test_impossible_plans(settings, message):
    with pytest.raises(LLMDropError, match=message):
        DropPlan(**settings)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (DropPlan((3,)), r"attention drop list holds layer 3, but this model has 3 layers \(0-2\)"),
        (DropPlan((), (40,)), r"MLP drop list holds layer 40, but this model has 3 layers \(0-2\)"),
        (DropPlan((0,), n_layers=4), "made for a model with 4 layers, but this one has 3"),
        (DropPlan((0,), model="hub:a/b@1"), "made for the model hub:a/b@1, but this one is sha256:2"),
    ],
)
def test_plans_for_another_model(plan, message):
    model = copy.deepcopy(pristine("llama"))
    model.llmdrop_identity = "sha256:2"
    before = snapshot(model)
    for use in (check_plan, drop, lambda *given: dropped(*given).__enter__(), lambda *given: skipping(*given).__enter__()):
        with pytest.raises(LLMDropError, match=message):
            use(model, plan)
    assert snapshot(model) == before


def test_plans_that_fit():
    model = copy.deepcopy(pristine("llama"))
    assert len(check_plan(model, DropPlan((0,), (2,), n_layers=3, model="hub:a/b@1"))) == 3  # this one has no identity
    model.llmdrop_identity = "hub:a/b@1"
    check_plan(model, DropPlan((0,), model="hub:a/b@1"))
    check_plan(model, DropPlan((0,)))


def test_a_module_that_is_missing(monkeypatch):
    monkeypatch.setitem(anatomy.FAMILIES, "llama", anatomy.Family(mlp_unit=("mlp", "norm_of_another_family")))
    before = snapshot(dense("llama"))
    with pytest.raises(LLMDropError, match="llama model is not built as FAMILIES.*norm_of_another_family"):
        drop(dense("llama"), PLANS["joint"])
    assert snapshot(dense("llama")) == before


def test_an_unknown_family():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(LLMDropError, match="'bloom' is unknown"):
        drop(model, DropPlan((0,)))


def test_save_and_load(tmp_path):
    for plan in (DropPlan(), DropPlan((3, 1), (2,), 4, "hub:a/b@c", "f"), PLANS["joint"]):
        path = plan.save(tmp_path / "folder" / "plan.json")
        assert DropPlan.load(path) == plan
        assert DropPlan.load(str(path)) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


GOOD = {"format": "llmdrop drop plan 1", "attention": [1]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": "llmdrop drop plan 1", "attention": [1',
        b"\xff\xfe\x00",
        b"[]",
        b"[" * 100_000,
        b'{"attention": [1]}',
        json.dumps(GOOD | {"format": "another"}).encode(),
        json.dumps(GOOD | {"attentoin": [2]}).encode(),
        json.dumps(GOOD | {"attention": [1, 1]}).encode(),
        json.dumps(GOOD | {"mlp": {"a": 1}}).encode(),
        json.dumps(GOOD | {"n_layers": 1}).encode(),
    ],
)
def test_damaged_file(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(LLMDropError, match=r"plan.json is no drop plan that can be read \(.*Make and save the plan again"):
        DropPlan.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(LLMDropError, match=r"There is no drop plan at .*none.json"):
        DropPlan.load(tmp_path / "none.json")
    with pytest.raises(LLMDropError, match="no drop plan that can be read"):
        DropPlan.load(tmp_path)
