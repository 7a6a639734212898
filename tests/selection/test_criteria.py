"""Criteria beside independent values: finite differences, formulas in float64, and models that lack a layer."""

import copy
import functools

import families
import numpy as np
import pytest
import torch
from torch import nn

from llmdrop_utils import DropPlan, LLMDropError, measure_importance, score_text, select_by
from llmdrop_utils.dropping.units import skipping
from llmdrop_utils.measure.alone import measure_without_residual
from llmdrop_utils.measure.importance import drop_order
from llmdrop_utils.measure.metrics import METRICS
from llmdrop_utils.measure.taylor import measure_taylor
from llmdrop_utils.measure.weights import query_key_norm, value_output_norm, weight_norm
from llmdrop_utils.models.families import family_of, find_anatomy
from llmdrop_utils.selection.criteria import CRITERIA
from llmdrop_utils.selection.methods import Context

TOKENS = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(4))


@functools.cache
def model_of(name: str = "llama", **changes) -> nn.Module:
    return families.tiny(name, **changes).double()


def output_projections(model, kind: str, index: int) -> list[torch.Tensor]:
    """Weights and biases that end a sub-layer of a GPT-2: to scale them is to scale its term."""
    block = find_anatomy(model).layers[index].block
    ends = {"attention": [block.attn.c_proj], "mlp": [block.mlp.c_proj]}.get(kind, [block.attn.c_proj, block.mlp.c_proj])
    return [parameter for end in ends for parameter in (end.weight, end.bias)]


def loss_of(model, sample) -> float:
    logits = model(input_ids=sample[None]).logits[0, :-1]
    return float(nn.functional.cross_entropy(logits, sample[1:]))


# ---- Taylor -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
def test_taylor_is_the_slope_of_the_loss(kind):
    """Central differences of the loss over the scale of output projections, sample by sample; all of it in float64."""
    model, step = model_of("gpt2"), 1e-4
    found = measure_taylor(model, TOKENS, batch_size=2)[kind]
    for index in range(3):
        slopes = []
        for sample in TOKENS:
            losses = []
            for scale in (1 + step, 1 - step):
                changed = copy.deepcopy(model)
                with torch.no_grad():
                    for weight in output_projections(changed, kind, index):
                        weight *= scale
                    losses.append(loss_of(changed, sample))
            slopes.append(abs(losses[0] - losses[1]) / (2 * step))
        assert found[index] == pytest.approx(np.mean(slopes), rel=1e-6)


def test_taylor_leaves_the_model_as_it_was():
    model = copy.deepcopy(model_of()).train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = measure_taylor(model, TOKENS)["attention"]
    assert model.training
    assert not frozen.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert np.array_equal(first, measure_taylor(model, TOKENS)["attention"])


@pytest.mark.parametrize("name", ["granite", "phi", "qwen2", "starcoder2", "opt"])
def test_taylor_of_other_families(name):
    """The slope of the loss over the scale of a layer's output projection, which knows nothing of hooks; norms are float32."""
    model, step, index = families.tiny(name), 0.02, 1
    ending, slopes = families.CASES[name].attention, []
    for sample in TOKENS:
        losses = []
        for scale in (1 + step, 1 - step):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                for parameter_name, parameter in find_anatomy(changed).layers[index].block.named_parameters():
                    if ending in parameter_name:
                        parameter *= scale
                losses.append(loss_of(changed, sample))
        slopes.append(abs(losses[0] - losses[1]) / (2 * step))
    assert measure_taylor(model, TOKENS)["attention"][index] == pytest.approx(np.mean(slopes), rel=0.02)


@pytest.mark.parametrize("name", ["gemma2", "falcon-7b", "deepseek-v2", "gpt-oss", "mixtral"])
def test_taylor_of_families_whose_norms_come_after_or_whose_experts_change(name):
    found = measure_taylor(families.tiny(name), TOKENS)
    assert all(np.isfinite(values).all() and (values > 0).any() for values in found.values())


def test_taylor_wants_something_to_predict():
    with pytest.raises(LLMDropError, match="at least 2 tokens"):
        measure_taylor(model_of(), TOKENS[:, :1])


# ---- formulas -----------------------------------------------------------------------------------------------------------


def test_angles_by_hand():
    """45 degrees, a right angle, straight back, nothing added; a thousandth of a degree keeps its digits."""
    products = torch.tensor([[1, 0, 1], [1, -1, 2], [1, -2, 4], [1, 0, 0], [1, 0, 1e-10]], dtype=torch.float64).T
    assert METRICS["angular distance"](*products).tolist() == pytest.approx([0.25, 0.5, 1.0, 0.0, 1e-5 / np.pi], abs=1e-12)


def test_without_residual_compares_what_the_modules_see():
    model = model_of()
    seen = {}
    block = find_anatomy(model).layers[1].block

    def keep(kind):
        def hook(module, args, kwargs, output) -> None:
            seen[kind] = args[0] if args else kwargs["hidden_states"], output

        return hook

    for kind, module in (("attention", block.self_attn), ("mlp", block.mlp)):
        module.register_forward_hook(keep(kind), with_kwargs=True)
    found = measure_without_residual(model, TOKENS, batch_size=3)
    for kind, (x, y) in seen.items():
        y = y[0] if isinstance(y, tuple) else y
        expected = 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        assert found[kind][1] == pytest.approx(float(expected.mean()), rel=1e-9)
    find_anatomy(model).layers[1].block.self_attn._forward_hooks.clear()
    find_anatomy(model).layers[1].block.mlp._forward_hooks.clear()
    with pytest.raises(LLMDropError, match="The MLP of opt models is no module of its own"):
        measure_without_residual(model_of("opt"), TOKENS)


def test_norms_of_weights_by_their_formulas():
    """Query-key and output-value maps head by head, with the gain of the norm before them."""
    model = copy.deepcopy(model_of())
    config, block = model.config, find_anatomy(model).layers[2].block
    with torch.no_grad():
        block.input_layernorm.weight.uniform_(0.5, 2)
    attention, gain = block.self_attn, block.input_layernorm.weight.detach()
    q, k, v = (getattr(attention, f"{name}_proj").weight.detach() * gain for name in "qkv")
    o, squares, whole = attention.o_proj.weight.detach(), 0.0, 0.0
    for head in range(4):
        own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        squares += float((q[own].T @ k[shared]).square().sum())
        whole = whole + o[:, own] @ v[shared]
    assert query_key_norm(block, config) == pytest.approx(squares**0.5)
    assert value_output_norm(block, config) == pytest.approx(float(whole.norm()))
    of_attention = sum(float(p.detach().square().sum()) for p in attention.parameters())
    of_mlp = sum(float(p.detach().square().sum()) for p in block.mlp.parameters())
    assert weight_norm(block, config, "attention") == pytest.approx(of_attention**0.5)
    assert weight_norm(block, config, "block") == pytest.approx((of_attention + of_mlp) ** 0.5)


# ---- as methods -----------------------------------------------------------------------------------------------------------


def test_each_criterion_drops_its_lowest_first():
    model = model_of()
    context = Context(model, TOKENS, batch_size=2)
    for name, scores in CRITERIA.items():
        order = drop_order(scores(context, "attention"))
        assert select_by(name, context, "attention", 2).attention == order[:2], name
    assert {"angular distance", "without residual", "Taylor", "output change", "weight norm", "Gate-Norm"} == set(CRITERIA)
    angles = measure_importance(model, TOKENS, metric="angular distance").importance["mlp"]
    assert CRITERIA["angular distance"](context, "mlp") == pytest.approx(angles)


def test_output_change_is_the_divergence_without_a_layer():
    model = model_of()
    found = CRITERIA["output change"](Context(model, TOKENS), "block")
    for layer in range(3):
        plan = DropPlan((layer,), (layer,))
        assert found[layer] == pytest.approx(score_text(model, TOKENS, [DropPlan(), plan]).kl[1].mean())


def test_greedy_looks_at_all_that_is_left_at_every_step():
    model = families.tiny("llama", num_hidden_layers=5).double()
    context = Context(model, TOKENS)
    chosen: list[int] = []
    for _ in range(3):
        left = [layer for layer in range(5) if layer not in chosen]
        kl = [float(score_text(model, TOKENS, [DropPlan(), DropPlan((*chosen, layer))]).kl[1].mean()) for layer in left]
        chosen.append(left[int(np.argmin(kl))])
        assert select_by("greedy KL", context, "attention", len(chosen)).attention == tuple(chosen)
    with pytest.raises(LLMDropError, match="Cannot drop 6 attention layers"):
        select_by("greedy KL", context, "attention", 6)


def test_criteria_pass_over_what_is_dropped():
    with skipping(families.tiny("llama", num_hidden_layers=5).double(), DropPlan((1,), (1, 3))) as model:
        context = Context(model, TOKENS)
        for name in ("Taylor", "output change", "without residual", "greedy KL"):
            assert 1 not in select_by(name, context, "attention", 4).attention, name


@pytest.mark.parametrize(
    ("name", "family", "kind", "message"),
    [
        ("Gate-Norm", "llama", "mlp", "Unknown kind 'mlp'. The kinds are: attention."),
        ("without residual", "llama", "block", "Unknown kind 'block'. The kinds are: attention, mlp."),
        ("Gate-Norm", "gpt2", "attention", "The criterion 'Gate-Norm' cannot be had of gpt2 models: queries and keys are"),
        ("Gate-Norm", "qwen3", "attention", "cannot be had of qwen3 models: queries and keys are normalised"),
        ("without residual", "opt", "mlp", "cannot be had of opt models: their MLP is no module of its own"),
        ("Taylor", "llama", "joint", "Unknown kind 'joint'"),
    ],
)
def test_what_a_criterion_cannot_do(name, family, kind, message):
    with pytest.raises(LLMDropError, match=message):
        select_by(name, Context(model_of(family), TOKENS), kind, 1)


def test_the_norm_before_counts_whatever_it_is_called():
    """OPT calls it `self_attn_layer_norm`; a gain of two doubles queries and keys."""
    model = copy.deepcopy(model_of("opt"))
    block = find_anatomy(model).layers[0].block
    plain = query_key_norm(block, model.config)
    with torch.no_grad():
        block.self_attn_layer_norm.weight *= 2
    assert query_key_norm(block, model.config) == pytest.approx(4 * plain)


@pytest.mark.parametrize(
    ("name", "changes"), [("qwen3", {}), ("stablelm", {"qk_layernorm": True}), ("olmo", {"clip_qkv": 8.0})]
)
def test_queries_that_are_normalised_or_clipped_have_no_map(name, changes):
    model = model_of(name, **changes)
    assert np.isnan(query_key_norm(find_anatomy(model).layers[0].block, model.config))
    assert family_of(model.config)
