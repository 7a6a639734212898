"""Models whose rotary embeddings follow the length of a batch, against lm-eval with one sequence at a time."""

import copy

import families
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from llmdrop_utils import DropPlan, dropped, measure_importance
from llmdrop_utils.measure.guard import measuring
from llmdrop_utils.measure.rotary import rotary_following, short_below
from llmdrop_utils.measure.tasks import FastLM
from llmdrop_utils.models.convert import byte_tokenizer

PLANS = (DropPlan(), DropPlan((1,), (2,)))
TEXTS = ["It was a bright cold", " day in April, and the clocks were striking thirteen; Winston Smith, his chin"]
ORIGINAL = 64


def phi3():
    half = 4  # of a head
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": [4.0] * half, "rope_theta": 10000.0}
    positions = {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": 512}
    rope = scaling | {"original_max_position_embeddings": ORIGINAL}
    return families.tiny("phi3", vocab_size=257, rope_parameters=rope, **positions)


def dynamic_ntk():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return families.tiny("llama", vocab_size=257, max_position_embeddings=ORIGINAL, rope_parameters=rope)


def requests(*lengths):
    """Contexts of so many bytes with two choices each, shortest first; two share their beginning."""
    text = (TEXTS[0] + TEXTS[1]) * 2
    pairs = [(text[:n], choice) for n in lengths for choice in (" nuzzled", " eat")]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("make", [phi3, dynamic_ntk])
@pytest.mark.parametrize("lengths", [(20, 80), (20, 56, 63, 64, 65, 80, 150), (10, 30), (90, 80)])
def test_each_sequence_is_read_as_if_alone(make, lengths):
    model, tokenizer, asked = make(), byte_tokenizer(), requests(*lengths)
    fast = FastLM(model, tokenizer, PLANS)
    fast._max_length = 200  # beyond what the dynamic one was trained on
    fast.loglikelihood(asked, disable_tqdm=True)
    for i, plan in enumerate(PLANS):
        with dropped(model, plan):
            expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=200).loglikelihood(asked, True)
        np.testing.assert_allclose([x for x, _ in fast.scores.answers(i)], [x for x, _ in expected], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("make", [phi3, dynamic_ntk])
def test_lengths_matter_to_these_models(make):
    """Otherwise the tests here would show nothing: in one padded batch the short context is read otherwise."""
    model, tokenizer, asked = make(), byte_tokenizer(), requests(20, 80)
    alone, together = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=n, max_length=200).loglikelihood(asked, True) for n in (1, 8)
    )
    assert abs(alone[0][0] - together[0][0]) > 0.05


@pytest.mark.parametrize("make", [phi3, dynamic_ntk])
def test_generation_is_that_of_single_prompts(make):
    model, tokenizer = make(), byte_tokenizer()
    text = TEXTS[0] + TEXTS[1]
    asked = [Instance("generate_until", {}, (text[:n], {"until": [], "max_gen_toks": 8}), n) for n in (20, 80)]
    found = FastLM(model, tokenizer)
    found._max_length = 200
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=200)
    assert found.generate_until(asked, True) == expected.generate_until(asked, True)


def test_importance_of_padded_samples():
    """A sample of 20 tokens beside one of 80."""
    model, tokens = phi3(), torch.randint(3, 97, (2, 80), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[0, 20:] = 0
    both, alone = measure_importance(model, tokens, 2, mask), measure_importance(model, tokens[:1, :20])
    for kind in both.per_sample:
        np.testing.assert_allclose(both.per_sample[kind][0], alone.per_sample[kind][0], rtol=1e-4)


@pytest.mark.parametrize("make", [phi3, dynamic_ntk])
def test_what_was_read_before_does_not_matter_and_nothing_is_left_changed(make):
    model = make()
    new = copy.deepcopy(model)
    (rotary,) = rotary_following(model)
    tokens = torch.arange(3, 93)[None]
    model(tokens)  # leaves long frequencies behind
    left = rotary.inv_freq.clone()
    with measuring(model):
        middle = model(tokens[:, :ORIGINAL]).logits
    assert torch.equal(rotary.inv_freq, left)
    assert not rotary.inv_freq.is_inference()
    torch.testing.assert_close(middle, new(tokens[:, :ORIGINAL]).logits)
    model.train()(tokens).logits.sum().backward()


def test_ordinary_models_share():
    assert short_below(families.tiny("llama")) is None
    assert (short_below(phi3()), short_below(dynamic_ntk())) == (ORIGINAL, ORIGINAL)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert short_below(families.tiny("llama", rope_parameters=rope)) is None


def test_rotary_embeddings_by_layer_type():
    """Gemma 3 has one for each type of layer."""
    full = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    assert short_below(families.tiny("gemma3", rope_parameters=rope)) == 64
