"""Encoder-decoders without layers equal the dense model whose output projections are set to zero, in float64 too."""

import copy
import functools

import pytest
import torch
from dropping.reference import A
from encoder_decoder_families import CASES, N_SOURCE, blocks_of, pairs, projections, silence, tiny
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from llmdrop_utils import DropPlan, LLMDropError, drop, dropped, measure_importance
from llmdrop_utils.dropping import units
from llmdrop_utils.dropping.caches import NoCache
from llmdrop_utils.dropping.plan import PLACES
from llmdrop_utils.dropping.units import skipping
from llmdrop_utils.models.families import find_anatomy

PLANS = {
    "first self-attention": DropPlan(attention=(0, 3)),
    "last self-attention": DropPlan(attention=(2, 4)),
    "first cross-attention": DropPlan(cross_attention=(3,)),
    "all cross-attention": DropPlan(cross_attention=(4, 3)),
    "mlp": DropPlan(mlp=(0, 3, 2)),
    "first blocks": DropPlan((0, 3), (0, 3), cross_attention=(3,)),
    "last blocks": DropPlan((2, 4), (2, 4), cross_attention=(4,)),
    "joint": DropPlan((0, 1), (4, 2), cross_attention=(4,)),
}
ALL = DropPlan(range(5), range(5), cross_attention=(3, 4))
every_family = pytest.mark.parametrize("name", CASES)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
each_layout = pytest.mark.parametrize("name", [name for name in ("t5", "umt5", "bart", "pegasus") if name in CASES])


@functools.cache
def pristine(name: str) -> nn.Module:
    """Nothing is ever dropped from it."""
    return tiny(name)


@functools.cache
def dense(name: str) -> nn.Module:
    return copy.deepcopy(pristine(name))


@functools.cache
def silenced(name: str, plan: DropPlan) -> nn.Module:
    model = copy.deepcopy(pristine(name))
    silence(name, model, {kind: getattr(plan, kind) for kind in PLACES})
    return model


def read(model: nn.Module) -> torch.Tensor:
    """Logits, by teacher forcing."""
    return model(**pairs(), use_cache=False).logits


def snapshot(model: nn.Module) -> tuple:
    logits = read(model)  # first: transformers installs hooks of its own at the first forward
    return (
        [(n, id(module), module.training) for n, module in model.named_modules(remove_duplicate=False)],
        [(n, id(p), p.data_ptr()) for n, p in model.named_parameters(remove_duplicate=False)],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        logits.numpy().tobytes(),
    )


@every_plan
@every_family
def test_equals_silenced_projections(name, plan):
    model, before = dense(name), snapshot(dense(name))
    expected = read(silenced(name, plan))
    assert float((expected - read(model)).abs().max()) > 1e-2, "the plan must matter"
    for context in (dropped, skipping):
        with context(model, plan):
            torch.testing.assert_close(read(model), expected, rtol=1e-5, atol=1e-5)
        assert snapshot(model) == before
    for_good = drop(copy.deepcopy(model), plan)
    torch.testing.assert_close(read(for_good), expected, rtol=1e-5, atol=1e-5)


@every_plan
@each_layout
def test_equals_silenced_projections_in_float64(name, plan):
    model, twin = (copy.deepcopy(each).double() for each in (dense(name), silenced(name, plan)))
    with dropped(model, plan):
        torch.testing.assert_close(read(model), read(twin), rtol=1e-12, atol=1e-12)


def generate(model: nn.Module, **how) -> list[list[int]]:
    given = pairs()
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, "eos_token_id": None} | how
    return model.generate(given["input_ids"], attention_mask=given["attention_mask"], **how).tolist()


@every_plan
@each_layout
def test_generation(name, plan):
    """With a cache and without, and with beams, which reorder the cache."""
    twin = silenced(name, plan)
    with dropped(dense(name), plan) as model:
        expected = generate(twin)
        assert generate(model) == generate(model, use_cache=False) == expected
        assert generate(model, cache_implementation="static") == expected
        assert generate(model, num_beams=3) == generate(twin, num_beams=3)


@every_family
def test_generation_in_every_family(name):
    with dropped(dense(name), PLANS["joint"]) as model:
        assert generate(model) == generate(model, use_cache=False) == generate(silenced(name, PLANS["joint"]))


def step_by_step(model: nn.Module, cache: EncoderDecoderCache) -> torch.Tensor:
    """Logits of the targets through a cache, three tokens at once and then one by one."""
    given, logits = pairs(), []
    states = model.get_encoder()(given["input_ids"], attention_mask=given["attention_mask"])
    target = model.prepare_decoder_input_ids_from_labels(given["labels"])
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7)):
        more = {"attention_mask": given["attention_mask"], "past_key_values": cache, "use_cache": True}
        logits.append(model(encoder_outputs=states, decoder_input_ids=target[:, start:end], **more).logits)
    return torch.cat(logits, 1)


@every_plan
@each_layout
def test_the_cache_holds_nothing_for_what_is_dropped(name, plan):
    expected = step_by_step(silenced(name, plan), EncoderDecoderCache(DynamicCache(), DynamicCache()))
    torch.testing.assert_close(expected, read(silenced(name, plan)), rtol=1e-4, atol=1e-4)
    with dropped(dense(name), plan) as model:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        torch.testing.assert_close(step_by_step(model, cache), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 7
    for kind, of_kind in (("attention", cache.self_attention_cache), ("cross_attention", cache.cross_attention_cache)):
        lacking = {layer - N_SOURCE for layer in getattr(plan, kind) if layer >= N_SOURCE}
        assert [isinstance(layer, NoCache) for layer in of_kind.layers] == [layer in lacking for layer in range(2)]
        kept = [layer.keys.shape[2] for layer in of_kind.layers if not isinstance(layer, NoCache)]
        assert set(kept) <= {7 if kind == "attention" else 9}
    assert cache.self_attention_cache.get_mask_sizes(1, 0) == (8, 0)


def test_a_cache_of_a_dropped_model_is_refused_by_the_whole_one():
    for plan in (DropPlan(attention=(4,)), DropPlan(cross_attention=(3,))):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with dropped(dense("bart"), plan) as model:
            step_by_step(model, cache)
        with pytest.raises(LLMDropError, match="used while the attention of layer . was dropped"):
            generate(dense("bart"), past_key_values=cache)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_no_self_attention_in_the_decoder(name):
    plan = DropPlan(attention=(4, 3))
    with dropped(dense(name), plan) as model:
        with pytest.raises(LLMDropError, match="attention of all 2 layers is dropped.*Pass use_cache=False"):
            generate(model)
        assert generate(model, use_cache=False) == generate(silenced(name, plan), use_cache=False)
    with dropped(dense(name), DropPlan(attention=(0, 1, 2))) as model:  # an encoder has no cache
        assert generate(model) == generate(silenced(name, DropPlan(attention=(0, 1, 2))))


@every_plan
@each_layout
def test_exactly_the_unit_is_dropped(name, plan):
    """What goes is what has no effect once the projections are silent: nothing in there has a gradient."""
    model = copy.deepcopy(silenced(name, plan))
    with torch.enable_grad():
        output = model(**pairs())
        (output.logits.square().sum() + output.encoder_last_hidden_state.square().sum()).backward()
    inside = {id(p) for block in blocks_of(model) for p in block.parameters()}
    dead = {n for n, p in model.named_parameters() if id(p) in inside and (p.grad is None or not p.grad.any())}
    names = {id(p): n for n, p in model.named_parameters()}
    for kind in PLACES:
        dead |= {names[id(p)] for layer in getattr(plan, kind) for p in projections(name, blocks_of(model)[layer], kind)}
    before = {n for n, _ in dense(name).named_parameters()}
    with dropped(dense(name), plan):
        assert before - {n for n, _ in dense(name).named_parameters()} == dead


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_positions_that_one_attention_makes_for_all_stay(name):
    """T5: without the attention of layer 0 all later layers still know how far tokens are apart."""
    plan, bias = DropPlan(attention=(0, 3)), "relative_attention_bias.weight"
    given, model = pairs(), copy.deepcopy(dense(name))
    with dropped(model, plan):
        left = {n for n, _ in model.named_parameters() if "block.0.layer.0" in n}
        assert left == {f"{stack}.block.0.layer.0.SelfAttention.{bias}" for stack in ("encoder", "decoder")}
        before = model(**given).logits
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(2)
        assert float((model(**given).logits - before).abs().max()) > 1e-3
    for_good = drop(copy.deepcopy(dense(name)), plan)
    again = copy.deepcopy(for_good).double()
    assert float((again(**given).logits - before).abs().max()) < 1e-4


def test_positions_stay_on_the_gpu(monkeypatch):
    """What is dropped leaves it meanwhile, and comes back."""
    model, moves = copy.deepcopy(pristine("t5")), []
    monkeypatch.setattr(units, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(units, "_move", lambda tensor, device: moves.append(id(tensor)))
    names = {id(p): n.removeprefix("encoder.block.0.layer.0.") for n, p in model.named_parameters()}
    with dropped(model, DropPlan(attention=(0,))):
        gone = ["SelfAttention.q.weight", "SelfAttention.k.weight", "SelfAttention.v.weight", "SelfAttention.o.weight"]
        assert [names[tensor] for tensor in moves] == [*gone, "layer_norm.weight"]
    assert moves[5:] == moves[:5]


@every_family
def test_norms_on_the_stream_stay(name):
    """And nothing else, but for the positions of T5."""
    with dropped(dense(name), ALL) as model:
        left = [{n for n, _ in block.named_parameters()} for block in blocks_of(model)]
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    for index, found in enumerate(left):
        of_layer = [norm for norm in norms if norm != norms[1] or index >= N_SOURCE]
        expected = {f"{norm}.{part}" for norm in of_layer for part in ("weight", "bias")} if CASES[name].norms else set()
        if name in ("t5", "t5-v1.1", "mt5") and index in (0, N_SOURCE):
            expected = {"layer.0.SelfAttention.relative_attention_bias.weight"}
        assert found == expected


@every_family
def test_importance_of_what_is_dropped(name):
    plan = PLANS["joint"]
    expected = measure_importance(silenced(name, plan), pairs()).importance
    with dropped(dense(name), plan) as model:
        found = measure_importance(model, pairs())
    for kind in PLACES:
        assert all(found.importance[kind][index] == 0.0 for index in getattr(plan, kind))
    for kind, values in found.importance.items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(expected[kind]), rtol=0, atol=1e-6, equal_nan=True)
    gone = {(kind, layer) for kind in PLACES for layer in getattr(plan, kind)}
    assert found.gone == gone | {("cross_attention", layer) for layer in range(3)}


def test_maps():
    """They take the place of one module, where attention or MLP is one; T5's still hands on the positions."""
    x = torch.randn(1, 9, 32)
    plan = DropPlan((0, 3), maps={("attention", 0): A, ("attention", 3): A})
    with dropped(dense("t5"), plan) as model:
        part = model.encoder.block[0].layer[0]
        found, bias, _ = part(x)
        torch.testing.assert_close(found, x + part.layer_norm(x) @ A.weight.T + A.bias)
        assert bias.shape == (1, 4, 9, 9)
    with pytest.raises(LLMDropError, match="bart have no module of its own for the MLP, .* with maps for attention only"):
        drop(tiny("bart"), DropPlan(mlp=(4,), maps={("mlp", 4): A}))


def test_nested():
    """Another attention goes while the first, which makes the positions, is away."""
    plan = DropPlan((0, 1), cross_attention=(3,))
    with skipping(dense("t5"), DropPlan((0,))), skipping(dense("t5"), DropPlan((1, 0), cross_attention=(3,))) as model:
        torch.testing.assert_close(read(model), read(silenced("t5", plan)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (DropPlan(cross_attention=(1,)), r"holds layer 1, but that layer of this bart .* that have it .* decoder: \[3, 4\]"),
        (DropPlan(cross_attention=(5,)), r"The cross-attention drop list holds layer 5, but this model has 5 layers \(0-4\)"),
        (DropPlan(attention=(5,)), r"The attention drop list holds layer 5, but this model has 5 layers \(0-4\)"),
        (DropPlan((0,), n_layers=3), "made for a model with 3 layers, but this one has 5"),
    ],
)
def test_plans_that_do_not_fit(plan, message):
    with pytest.raises(LLMDropError, match=message):
        drop(tiny("bart"), plan)


def test_an_anatomy_that_is_not_there():
    model = tiny("bart")
    del model.model.decoder.layers[1].fc2
    with pytest.raises(LLMDropError, match="bart model is not built as ENCODER_DECODERS .*encoder_decoder_layouts.py. says"):
        find_anatomy(model)
