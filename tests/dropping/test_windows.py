"""Attention with a window equals that of models which have one, and nothing is left behind."""

import encoder_families
import families
import numpy as np
import pytest
import torch
from models.test_walk import NAMES
from transformers import AutoConfig, AutoModelForCausalLM

from llmdrop_utils import DropPlan, LLMDropError, dropped, find_anatomy
from llmdrop_utils.dropping.windows import windowed
from llmdrop_utils.measure import packing
from llmdrop_utils.measure.decoding import greedy
from llmdrop_utils.measure.scoring import score
from llmdrop_utils.models.cache_shape import is_full_attention

TOKENS = torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(0))


def pair(attention="sdpa"):
    """A Qwen3, and one of the same weights whose layers 0 and 2 have a window of 4."""
    plain = families.tiny("qwen3")
    plain.set_attn_implementation(attention)
    config = AutoConfig.for_model("qwen3", **families.SMALL, **families.SLIDING, use_sliding_window=True)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    other = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    other.load_state_dict(plain.state_dict())
    return plain, other


@torch.no_grad()
def logits(model, tokens=TOKENS, **given):
    return model(tokens, **given).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_a_model_that_has_windows(attention):
    plain, other = pair(attention)
    before = logits(plain)
    with windowed(plain, (0, 2), 4):
        torch.testing.assert_close(logits(plain), logits(other), rtol=1e-4, atol=1e-5)
        padded = torch.ones_like(TOKENS)
        padded[1, -5:] = 0
        found, expected = (logits(model, attention_mask=padded) for model in (plain, other))
        torch.testing.assert_close(found[padded.bool()], expected[padded.bool()], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(greedy(plain, TOKENS, 10), greedy(other, TOKENS, 10))
    assert torch.equal(logits(plain), before)
    assert float((before - logits(other)).abs().max()) > 0.01


@pytest.mark.parametrize("prefix", [6, 128])
def test_texts_that_share_a_beginning(monkeypatch, prefix):
    """Choices of one question, and many questions after the same examples, are scored as one by one."""
    monkeypatch.setattr(packing, "PREFIX", prefix)  # kept apart from this length on
    plain, _ = pair()
    start = TOKENS[0].tolist() * 3
    requests = [([*start, 5, 6, 7], [8, 9]), ([*start, 5, 6, 7], [10]), ([*start, 11], [12, 13]), (start[:9], [3])]
    with windowed(plain, (0, 2), 4):
        together = score(plain, requests).logprob[0]
        alone = [score(plain, [request]).logprob[0, 0] for request in requests]
        by_hand = []
        for context, continuation in requests:
            given = torch.tensor([context + continuation])
            said = logits(plain, given)[0].log_softmax(-1)[len(context) - 1 : -1]
            by_hand.append(float(said.gather(1, given[0, len(context) :, None]).sum()))
    np.testing.assert_allclose(together, by_hand, rtol=1e-4)
    np.testing.assert_allclose(alone, by_hand, rtol=1e-4)
    assert np.abs(score(plain, requests).logprob[0] - together).max() > 1e-3


def test_beside_what_is_dropped():
    plain, other = pair()
    plan = DropPlan((2,), (1,))
    with windowed(plain, (0,), 4), dropped(plain, plan), dropped(other, plan):
        torch.testing.assert_close(logits(plain), logits(other), rtol=1e-4, atol=1e-5)
        assert torch.equal(greedy(plain, TOKENS, 8), greedy(other, TOKENS, 8))


def test_the_shorter_of_two_windows_counts():
    plain, other = pair()
    before, continued = logits(other), greedy(other, TOKENS, 10)
    with windowed(other, (0, 2), 5):
        torch.testing.assert_close(logits(other), before)
        assert torch.equal(greedy(other, TOKENS, 10), continued)
    with windowed(other, (0, 2), 3), windowed(plain, (0, 2), 3):
        torch.testing.assert_close(logits(other), logits(plain), rtol=1e-4, atol=1e-5)
        assert torch.equal(greedy(other, TOKENS, 10), greedy(plain, TOKENS, 10))


def test_static_caches():
    model = families.tiny("llama")
    with pytest.raises(LLMDropError, match="takes a dynamic cache"), windowed(model, (1,), 4):
        model.generate(TOKENS, max_new_tokens=4, cache_implementation="static", do_sample=False)


def test_requests_that_no_model_can_serve():
    model = families.tiny("llama")
    with pytest.raises(LLMDropError, match="There is no layer 3: this model has 3 layers"), windowed(model, (3,), 4):
        pass
    with pytest.raises(LLMDropError, match="The window must be 1 or more, but is 0"), windowed(model, (1,), 0):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_and_layers_that_have_no_window():
    with pytest.raises(LLMDropError, match="This bert model is an encoder"), windowed(encoder_families.tiny("bert"), (0,), 4):
        pass
    hybrid = families.tiny("jamba")
    (mixer, *_) = sorted({0, 1, 2} - {*find_anatomy(hybrid).with_attention})
    with pytest.raises(LLMDropError, match="another mixer of tokens"), windowed(hybrid, (mixer,), 4):
        pass


@pytest.mark.parametrize("name", [name for name in (*families.CASES, *NAMES) if name not in ("ctrl", "mpt")])
def test_every_family_takes_a_window(name):
    """One as long as the text changes nothing; a shorter one changes what comes after it, and nothing before; with a cache the
    tokens of a continuation are those of the whole text."""
    model = families.tiny(name)
    layers = find_anatomy(model).with_attention
    expected = logits(model)
    with windowed(model, layers, 14):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with windowed(model, layers, 4):
        found = logits(model)
        new = greedy(model, TOKENS, 5)
        whole = logits(model, torch.cat([TOKENS, new], 1))
    if name != "bamba":  # transformers counts its positions from zero again at each step
        assert torch.equal(whole[:, 13:-1].argmax(-1), new)
    torch.testing.assert_close(found[:, :4], expected[:, :4], rtol=1e-4, atol=1e-4)
    if is_full_attention(model.config):
        assert float((found - expected)[:, 6:].abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["ctrl", "mpt"])
def test_attention_that_takes_another_mask(name):
    with pytest.raises(LLMDropError, match="takes no mask as most do"), windowed(families.tiny(name), (1,), 4):
        pass
