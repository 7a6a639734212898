"""Linear maps in dropped places, against the dense model with the forward of its modules replaced by hand, in float64."""

import contextlib
import copy
import functools
import pickle
import time
from unittest import mock

import accelerate
import families
import pytest
import torch
from dropping.reference import (
    MAPPED,
    MASK,
    TOKENS,
    WIDTH,
    A,
    B,
    close,
    dense,
    every_family,
    padded,
    pristine,
    snapshot,
    some_map,
    step_by_step,
)
from torch import nn
from transformers import DynamicCache

from llmdrop_utils import LLMDropError, measure_importance
from llmdrop_utils.dropping.caches import NoCache
from llmdrop_utils.dropping.maps import LinearMap
from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.dropping.units import drop, dropped, left, skipping
from llmdrop_utils.models.families import find_anatomy

WITHOUT_MLP_MODULE = {"opt", "opt-350m"}


def fits(name: str, plan: DropPlan) -> bool:
    return name not in WITHOUT_MLP_MODULE or not any(kind == "mlp" for kind, _, _ in plan.maps)


def modules_of(model: nn.Module, name: str, kind: str) -> list[nn.Module]:
    """The modules that compute attention or MLP, of all layers."""
    return [layer.block.get_submodule(families.CASES[name].modules[kind]) for layer in find_anatomy(model).layers]


@functools.cache
def in_float64(name: str) -> nn.Module:
    model = copy.deepcopy(pristine(name)).double()
    model.config._experts_implementation = "eager"  # the fused one has no float64
    return model


def by_hand(name: str, plan: DropPlan) -> nn.Module:
    """Float64: mapped modules get another forward, what is plainly dropped gets output projections of zero."""
    model = copy.deepcopy(in_float64(name))
    mapped = {(kind, layer) for kind, layer, _ in plan.maps}
    plain = ([layer for layer in getattr(plan, kind) if (kind, layer) not in mapped] for kind in ("attention", "mlp"))
    families.silence(name, model, *plain)
    for kind, layer, linear in plan.maps:
        weight = linear.weight.double()
        bias = 0.0 if linear.bias is None else linear.bias.double()
        in_pair = kind == "attention" or name == "gpt-oss"

        def forward(*args, weight=weight, bias=bias, in_pair=in_pair, **kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            y = torch.einsum("oi,...i->...o", weight, x) + bias
            return (y, None) if in_pair else y

        modules_of(model, name, kind)[layer].forward = forward
    return model


@pytest.fixture
def softmax_in_float64():
    """Some families compute it in float32, where the lowest float64 of a mask is minus infinity."""
    with mock.patch("torch.nn.functional.softmax", lambda x, dim, dtype=None: torch.softmax(x, dim)):
        yield


@pytest.mark.parametrize("plan", MAPPED.values(), ids=MAPPED)
@every_family
def test_equals_forwards_replaced_by_hand(name, plan, softmax_in_float64):
    if not fits(name, plan):
        pytest.skip("no module to replace")
    model, reference = copy.deepcopy(in_float64(name)), by_hand(name, plan)
    expected = padded(reference)
    before = snapshot(model)
    plain = DropPlan(plan.attention, plan.mlp)
    with skipping(model, plain):
        assert float((padded(model) - expected)[MASK.bool()].abs().max()) > 1e-3, "the maps must matter"
    with dropped(model, plan):
        torch.testing.assert_close(padded(model)[MASK.bool()], expected[MASK.bool()], rtol=1e-9, atol=1e-9)
        if plan is MAPPED["all attention"]:
            assert model(TOKENS).past_key_values is None
        else:
            logits, cache = step_by_step(model, DynamicCache())
            close(logits, expected, 1e-5)  # some families compute rotations in float32
            assert [isinstance(layer, NoCache) for layer in cache.layers] == [i in plan.attention for i in range(3)]
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "falcon-7b", "granite", "gpt-oss"])
def test_a_map_of_zero_is_plain_dropping(name):
    zero = LinearMap(torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH))
    plan = DropPlan((0, 2), (1,), maps={("attention", 0): zero, ("attention", 2): zero, ("mlp", 1): zero})
    with dropped(dense(name), DropPlan((0, 2), (1,))) as model:
        expected = padded(model)
    with dropped(dense(name), plan) as model:
        close(padded(model), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "falcon-7b", "gpt-oss", "gpt2"])
def test_for_good(name, dtype):
    """The maps are parameters of the model, in its dtype; training changes them, and not the plan."""
    model, plan = copy.deepcopy(pristine(name)).to(dtype), MAPPED["joint"]
    with dropped(model, plan):
        expected, names = padded(model), [n for n, _ in model.named_parameters()]
    assert drop(model, plan) is model
    assert [n for n, _ in model.named_parameters()] == names
    again = pickle.loads(pickle.dumps(model))
    for one in (model, copy.deepcopy(model), again):
        assert torch.equal(padded(one), expected)
    maps = modules_of(model, name, "attention")[1], modules_of(model, name, "mlp")[2]
    assert [one.weight.dtype for one in maps] == [dtype] * 2
    assert maps[0].bias is None
    assert maps[1].bias.dtype == dtype
    before = plan.key
    with torch.enable_grad():
        model(TOKENS).logits.square().sum().backward()
        for one in maps:
            assert one.weight.grad.abs().max() > 0
            one.weight.data.sub_(one.weight.grad)
    assert LinearMap(B.weight).fingerprint == plan.map_of("attention", 1).fingerprint
    assert plan.key == before
    assert not torch.equal(padded(model), expected)
    with torch.inference_mode():
        drop(model, DropPlan((2,), maps={("attention", 2): A}))
    assert not modules_of(model, name, "attention")[2].weight.is_inference(), "it could never be trained"


def test_skipping_leaves_nothing_to_train():
    """In `skipping` a map shares its memory with the plan: an optimiser must not find it."""
    model = copy.deepcopy(pristine("llama")).bfloat16()
    with torch.inference_mode(), skipping(model, MAPPED["joint"]):
        padded(model)
    with torch.enable_grad(), skipping(model, MAPPED["joint"]):
        assert not modules_of(model, "llama", "attention")[1].weight.requires_grad
        model(TOKENS).logits.sum().backward()  # as an inference tensor, the map could not take part
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "falcon-7b", "phi", "gemma2"])
def test_what_is_left_are_norms_and_maps(name):
    model, plan = dense(name), MAPPED["one of two"]
    whole = dict(model.named_parameters())
    with dropped(model, plan):
        now = dict(model.named_parameters())
    block = find_anatomy(model).layers[1].block
    (prefix,) = (n for n, module in model.named_modules() if module is block)
    new = {n.removeprefix(f"{prefix}.") for n in now if n.startswith(f"{prefix}.")}
    mlp = families.CASES[name].modules["mlp"]
    norms = {
        "llama": {"post_attention_layernorm.weight"},
        "falcon-7b": {"input_layernorm.weight", "input_layernorm.bias"},
        "phi": {"input_layernorm.weight", "input_layernorm.bias"},
        "gemma2": {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"},
    }[name]
    assert new == {f"{mlp}.weight", f"{mlp}.bias"} | norms
    assert set(now) - set(whole) <= {f"{prefix}.{mlp}.weight", f"{prefix}.{mlp}.bias"}


def test_a_mapped_place_counts_as_dropped():
    plan = MAPPED["joint"]
    with dropped(dense("llama"), plan) as model:
        assert left(find_anatomy(model), "attention") == [2]
        assert left(find_anatomy(model), "mlp") == [0]
        scores = measure_importance(model, TOKENS)
    assert scores.gone == {("attention", 0), ("attention", 1), ("mlp", 1), ("mlp", 2), ("block", 1)}
    assert scores.order("attention") == (2,)
    assert scores.importance["attention"][0] == scores.importance["mlp"][1] == 0
    assert scores.importance["attention"][1] > 0, "a map adds something"


def test_nesting():
    model, inner = dense("llama"), MAPPED["joint"]
    before = snapshot(model)
    expected = by_hand("llama", DropPlan((0, 1), (0, 1, 2), maps=inner.maps))
    with skipping(model, DropPlan(mlp=(0,))), skipping(model, inner), skipping(model, DropPlan((1,), (2,))):
        close(padded(model), padded(expected))  # plain dropping of a mapped place leaves the map
        with skipping(model, inner):
            close(padded(model), padded(expected))
        for other in (DropPlan((0,), maps={("attention", 0): A}), DropPlan((1,), maps={("attention", 1): A})):
            held = snapshot(model)
            with pytest.raises(LLMDropError, match="a map for the attention of layer [01], which is dropped already"):
                skipping(model, other).__enter__()
            assert snapshot(model) == held
    assert snapshot(model) == before


def test_bfloat16_and_offloading(tmp_path):
    plan = MAPPED["joint"]
    expected = padded(by_hand("llama", plan))
    with dropped(copy.deepcopy(pristine("llama")).bfloat16(), plan) as model:
        found = padded(model)
        assert found.dtype == torch.bfloat16
        close(found, expected, 0.05)
    model = accelerate.disk_offload(copy.deepcopy(pristine("llama")), tmp_path, execution_device=torch.device("cpu"))
    whole = padded(model)
    with dropped(model, plan):
        close(padded(model), expected)
        close(step_by_step(model)[0], expected)
    assert torch.equal(padded(model), whole)


def test_maps_are_applied_cheaply():
    width, n_layers = 512, 16
    model = families.tiny("llama", num_hidden_layers=n_layers, hidden_size=width).bfloat16()
    maps = {("attention", layer): some_map(layer, width=width) for layer in range(n_layers)}
    plan = DropPlan(tuple(range(n_layers)), maps=maps)
    best = []
    for _ in range(20):
        start = time.perf_counter()
        with skipping(model, plan):
            pass
        best.append(time.perf_counter() - start)
    assert min(best) < 5e-3  # about one millisecond; the rest is for slow machines
    once, again = (maps["attention", 3].tensors(torch.device("cpu"), torch.bfloat16)[0] for _ in range(2))
    assert once is again, "maps are converted to the model's dtype once"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_maps_on_a_gpu():
    model, plan = copy.deepcopy(pristine("llama")).cuda(), MAPPED["joint"]
    expected = padded(by_hand("llama", plan))
    with contextlib.suppress(ZeroDivisionError), dropped(model, plan):
        assert modules_of(model, "llama", "attention")[1].weight.is_cuda
        found = model(TOKENS.cuda(), attention_mask=MASK.cuda(), use_cache=False).logits
        close(found.cpu(), expected, 1e-3)
        raise ZeroDivisionError
    assert drop(model, plan).model.layers[1].self_attn.weight.is_cuda
