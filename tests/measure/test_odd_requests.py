"""Requests and tokenizers that lm-eval stumbles over: nothing to score, nothing before it, no special tokens."""

import json

import families
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llmdrop_utils import DropPlan, load_task, perplexity, score_task
from llmdrop_utils.measure.tasks import FastLM
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.sources.texts import fingerprint_tokenizer, pack

PLANS = (DropPlan(), DropPlan((1,), (2,)))
PAIRS = [("The sky is", " blue"), ("The sky is", ""), ("", " green"), ("The sea is", " deep")]


def bare_tokenizer():
    """The byte tokenizer, without any special token."""
    rules = json.loads(byte_tokenizer().backend_tokenizer.to_str()) | {"added_tokens": []}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return families.tiny("llama", vocab_size=257, max_position_embeddings=2048)


def requests(kind, arguments):
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def stock(model, pairs):
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    return np.array(lm.loglikelihood(requests("loglikelihood", pairs), True))


# ---- nothing to score ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [("The sky is", ""), ("", ""), ("", "<|end|>")])
def test_an_empty_continuation_is_certain_and_aborts_no_other(model, empty):
    """lm-eval itself refuses all of them."""
    pairs = [*PAIRS[:1], empty, *PAIRS[2:]]
    fast = FastLM(model, byte_tokenizer(), PLANS)
    found = fast.loglikelihood(requests("loglikelihood", pairs))
    assert found[1] == (0.0, True)
    assert [fast.scores.answers(i)[1] for i in (0, 1)] == [(0.0, True)] * 2
    np.testing.assert_allclose(np.array(found)[[0, 2, 3]], stock(model, [pairs[0], *pairs[2:]]), rtol=1e-5)
    with pytest.raises((AssertionError, IndexError)):
        stock(model, pairs)


def test_all_are_empty(model):
    assert FastLM(model, byte_tokenizer()).loglikelihood(requests("loglikelihood", [("a", ""), ("b", "")])) == [(0.0, True)] * 2


def test_a_blank_context(model):
    """lm-eval takes a context's last spaces to the continuation; then nothing comes before it but the end of a text."""
    found = FastLM(model, byte_tokenizer()).loglikelihood(requests("loglikelihood", [(" ", "sky"), ("", " sky")]))
    assert found[0] == found[1]
    np.testing.assert_allclose(found[1], stock(model, [("", " sky")])[0], rtol=1e-5)


# ---- no special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["winogrande", "piqa"])
def test_choices_without_special_tokens(model, name):
    """The ids are the same with and without them, and so are the answers."""
    members = load_task(name, 0)
    with_them, without = (
        score_task(model, tokenizer, members, PLANS, limit=5) for tokenizer in (byte_tokenizer(), bare_tokenizer())
    )
    np.testing.assert_array_equal(with_them.metrics["acc"], without.metrics["acc"])


def test_nothing_is_said_of_a_first_token_without_a_token_to_begin_with(model):
    fast = FastLM(model, bare_tokenizer(), PLANS)
    found = fast.loglikelihood(requests("loglikelihood", [("", "sky"), ("s", "ky"), ("", "s"), ("", "")]))
    assert found[0] == found[1] != (0.0, True)
    assert found[2:] == [(0.0, True)] * 2


def test_rolling_without_special_tokens(model):
    text = "The clocks were striking thirteen."
    (found,) = FastLM(model, bare_tokenizer()).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), True)
    tokens = torch.tensor([bare_tokenizer()(text)["input_ids"]])
    assert found == pytest.approx(-np.log(perplexity(model, tokens)) * (tokens.numel() - 1), rel=1e-5)


def test_generation_without_special_tokens(model):
    """Of prompts of different lengths; the tokenizer stays as it was."""
    arguments = [(text, {"until": ["\n\n"], "max_gen_toks": 8}) for text in ("The sky", "It was a bright cold day in April")]
    tokenizer = bare_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    found = FastLM(model, tokenizer).generate_until(requests("generate_until", arguments), True)
    expected = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    assert found == expected.generate_until(requests("generate_until", arguments), True)
    assert all(len(text) > 0 for text in found)
    assert fingerprint_tokenizer(tokenizer) == before
    assert len(tokenizer) == 256
    assert tokenizer.pad_token is None


def test_text_without_special_tokens():
    assert pack(["abc", "de"], bare_tokenizer(), 5).tolist() == [[64, 65, 66, 67, 68]]
