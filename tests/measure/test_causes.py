"""Causes of redundancy against an independent reference: what transformers itself returns, in float64, and sums by hand."""

import copy
import math

import families
import numpy as np
import pytest
import torch

from llmdrop_utils import DropPlan, LLMDropError, drop, measure_causes, measure_importance
from llmdrop_utils.measure import causes as module
from llmdrop_utils.measure.causes import (
    DISTANCE,
    ENTROPY,
    OF_TEXT,
    OUTPUT,
    RANK,
    SINK,
    SLIDING,
    STREAM,
    WEIGHTS,
    Causes,
    effective_rank,
    final_rank,
)

TOKENS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))


def rank_by_svd(vectors):
    values = torch.linalg.svdvals(torch.nn.functional.normalize(vectors.double(), dim=-1))
    shares = values / values.sum()
    return math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 1e-12))


TWO_OF_THREE = (2**0.5 / (1 + 2**0.5), 1 / (1 + 2**0.5))  # singular values 1.41 and 1, as shares


@pytest.mark.parametrize(
    ("vectors", "rank"),
    [
        (torch.eye(4), 4),
        (torch.eye(4) * torch.tensor([[1.0], [100.0], [0.01], [7.0]]), 4),  # length does not matter
        (torch.ones(5, 3), 1),
        (torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), math.exp(-sum(p * math.log(p) for p in TWO_OF_THREE))),
    ],
)
def test_effective_rank(vectors, rank):
    assert effective_rank(vectors) == pytest.approx(rank, rel=1e-6)
    assert effective_rank(vectors.T) == pytest.approx(rank_by_svd(vectors.T), rel=1e-6)  # more columns than rows


def test_attention_weights_by_hand():
    """Two heads, three queries: the first query sees itself alone and does not count."""
    uniform = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    sharp = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    found = module._of_weights(torch.stack([uniform, sharp]))
    assert found[SINK] == pytest.approx((1 / 2 + 1 / 3 + 0 + 1) / 4)
    assert found[ENTROPY] == pytest.approx((math.log(2) + math.log(3) + 0 + 0) / 4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "olmo2", "gpt2", "gpt-neox", "granite", "opt"])
def test_against_what_transformers_returns(name):
    model = families.tiny(name)
    found = measure_causes(model, TOKENS)
    reference = copy.deepcopy(model).double()
    reference.set_attn_implementation("eager")
    case = families.CASES[name]
    with torch.inference_mode():
        outputs = reference(TOKENS, output_hidden_states=True, output_attentions=True, use_cache=False)
    layers = next(
        child for child in reference.get_decoder().children() if isinstance(child, torch.nn.ModuleList) and len(child) == 3
    )
    for layer in range(3):
        x, weights = outputs.hidden_states[layer], outputs.attentions[layer][:, :, 1:]
        expected = {
            SINK: weights[..., 0].mean((1, 2)),
            ENTROPY: -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean((1, 2)),
            RANK: torch.tensor([rank_by_svd(sample) for sample in x]),
            STREAM: (x.square().mean(-1)).log10().mean(1),
        }
        for cause, values in expected.items():
            np.testing.assert_allclose(
                found.per_sample[cause][:, layer], values, rtol=2e-4, atol=1e-5, err_msg=f"{cause} {layer}"
            )
        term = attention_term(reference, layers[layer], case, x)
        np.testing.assert_allclose(found.per_sample[OUTPUT][:, layer], (term.norm(dim=-1) / x.norm(dim=-1)).mean(1), rtol=2e-4)


def attention_term(model, block, case, x):
    """What attention adds to the stream, whatever norms and scales stand around it: what the block adds with a silent MLP."""
    silenced = [p for n, p in block.named_parameters() if case.mlp in n]
    kept = [p.detach().clone() for p in silenced]
    seen = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    for p in silenced:
        p.data.zero_()
    with torch.inference_mode():
        model(TOKENS, use_cache=False)
    handle.remove()
    for p, old in zip(silenced, kept, strict=True):
        p.data.copy_(old)
    (y,) = seen
    return (y[0] if isinstance(y, tuple) else y) - x


def test_a_family_that_does_not_tell_its_attention_weights():
    found = measure_causes(families.tiny("falcon-rw"), TOKENS)
    assert np.isnan(found.per_sample[SINK]).all()
    assert np.isnan(found.per_sample[ENTROPY]).all()
    assert np.isfinite(found.per_sample[OUTPUT]).all()


def test_without_a_forward_pass():
    model = families.tiny("gemma3")
    found = measure_causes(model, TOKENS).of_layer
    assert found[DISTANCE].tolist() == [2, 1, 0]
    assert found[SLIDING].tolist() == [1, 0, 1]
    assert np.isnan(found[WEIGHTS]).all()  # a norm after attention sets the size of its output


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "starcoder2"])
def test_value_output_weights_are_what_a_token_passes_on(name):
    """The map from a token's normed stream to attention's output, if it attends to itself alone, by a sample of one token."""
    model = families.tiny(name).double()
    for n, p in model.named_parameters():  # the map has no bias
        if "v_proj.bias" in n or "o_proj.bias" in n:
            p.data.zero_()
    found = measure_causes(model, TOKENS).of_layer[WEIGHTS]
    layer = model.get_decoder().layers[1]
    gain = layer.input_layernorm.weight.detach()  # a bias of the norm is no part of the map
    width = len(gain)
    position = model.get_decoder().rotary_emb(
        torch.zeros(1, 1, width, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long)
    )
    with torch.inference_mode():
        units = gain * torch.eye(width, dtype=torch.float64)
        columns = [
            layer.self_attn(unit[None, None], position_embeddings=position, attention_mask=None)[0].flatten() for unit in units
        ]
    assert found[1] == pytest.approx(float(torch.stack(columns).norm()), rel=1e-5)  # but for the norm's epsilon


def test_the_model_is_left_as_it_was():
    model = families.tiny("llama").train()
    before = model.config._attn_implementation
    importance = measure_importance(model, TOKENS).importance["attention"]
    seen = []
    measure_causes(model, TOKENS, on_sample=seen.append)
    assert seen == [9, 9]
    assert model.config._attn_implementation == before
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    np.testing.assert_array_equal(measure_importance(model, TOKENS).importance["attention"], importance)
    with pytest.raises(LLMDropError, match="this model knows 0 to 96"):
        measure_causes(model, TOKENS + 97)
    assert model.config._attn_implementation == before


def test_bfloat16_is_near_float32():
    model = families.tiny("llama")
    exact, rough = measure_causes(model, TOKENS), measure_causes(model.bfloat16(), TOKENS)
    for name in OF_TEXT:
        np.testing.assert_allclose(rough.per_sample[name], exact.per_sample[name], rtol=0.05, atol=0.02, err_msg=name)


def test_a_token_whose_embedding_is_zero_does_not_count():
    """A padding token may have one: nothing is divided by its length, and no logarithm of it is taken."""
    model = families.tiny("llama")
    with_zero = torch.cat([TOKENS[:1], torch.zeros(1, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0.0
    found, without = measure_causes(model, with_zero), measure_causes(model, TOKENS[:1])
    assert all(np.isfinite(rows).all() for rows in found.per_sample.values())
    assert found.per_sample[STREAM][0, 0] == pytest.approx(without.per_sample[STREAM][0, 0])


def test_json_keeps_what_is_unknown():
    found = Causes({SINK: np.array([[0.5, float("nan")]])}, {WEIGHTS: np.array([float("nan"), 2.0])})
    again = Causes.from_json(found.to_json())
    np.testing.assert_array_equal(again.per_sample[SINK], found.per_sample[SINK])
    np.testing.assert_array_equal(again.of_layer[WEIGHTS], found.of_layer[WEIGHTS])
    assert found.to_json()["of_layer"][WEIGHTS] == [None, 2.0]


def test_final_rank_of_a_dropped_model():
    """The same as the rank of hidden states of a model whose projections are zero."""
    model = families.tiny("llama")
    plans = [DropPlan(), DropPlan(attention=[0, 2]), DropPlan(mlp=[1])]
    found = final_rank(model, TOKENS, plans)
    assert found.shape == (3, 2)
    for plan, ranks in zip(plans, found, strict=True):
        twin = copy.deepcopy(model)
        for layer in plan.attention:
            twin.get_decoder().layers[layer].self_attn.o_proj.weight.data.zero_()
        for layer in plan.mlp:
            twin.get_decoder().layers[layer].mlp.down_proj.weight.data.zero_()
        with torch.inference_mode():
            states = twin.get_decoder()(TOKENS, use_cache=False).last_hidden_state
        np.testing.assert_allclose(ranks, [rank_by_svd(sample) for sample in states], rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[:, :1], "at least 2 tokens"),
        (TOKENS + 97, "this model knows 0 to 96"),
        (torch.zeros(1, 70, dtype=torch.long), "too long"),
        ("text", "token"),
    ],
)
def test_bad_tokens(tokens, message):
    model = families.tiny("llama")
    for measure in (lambda: measure_causes(model, tokens), lambda: final_rank(model, tokens, [DropPlan()])):
        with pytest.raises(LLMDropError, match=message):
            measure()


def test_a_model_without_attention_somewhere():
    model = drop(families.tiny("llama"), DropPlan(attention=[1]))
    with pytest.raises(LLMDropError, match="give the dense model"):
        measure_causes(model, TOKENS)
    with pytest.raises(LLMDropError, match="layer 7"):
        final_rank(families.tiny("llama"), TOKENS, [DropPlan(attention=[7])])
