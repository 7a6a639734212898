"""How well targets are predicted: against a direct float64 computation, and against transformers' own loss."""

import copy

import numpy as np
import pytest
import torch
from encoder_decoder_families import CASES, pairs, silence, tiny
from families import tiny as tiny_decoder

from llmdrop_utils import DropPlan, LLMDropError, dropped, prepare_pairs, score_targets
from llmdrop_utils.measure.targets import pairs_for
from llmdrop_utils.models.convert import byte_tokenizer


@torch.no_grad()
def by_hand(model, given) -> list[float]:
    """One pair after the other, without padding: what each target token costs after those before it, in a pass of its own."""
    model, values = copy.deepcopy(model).double(), []
    for source, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"], strict=True):
        target, costs = labels[labels != -100], []
        start = pairs_for(model, {"input_ids": source[None], "labels": target[None]}).target[0, 0]
        for i, token in enumerate(target):
            read = torch.cat([start[None], target[:i]])[None]
            logits = model(input_ids=source[mask.bool()][None], decoder_input_ids=read).logits[0, -1]
            costs.append(-float(logits.log_softmax(-1)[token]))
        values.append(float(np.mean(costs)))
    return values


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name):
    model, given = tiny(name), pairs()
    found = score_targets(model, given, batch_size=2)
    np.testing.assert_allclose(found.nll, by_hand(model, given), rtol=1e-5)
    assert found.tokens.tolist() == [7, 5, 7]
    assert found.perplexity == pytest.approx(np.exp(np.dot(found.nll, [7, 5, 7]) / 19))
    with torch.no_grad():
        assert np.log(found.perplexity) == pytest.approx(float(model(**given).loss), rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_of_a_dropped_model(name):
    model, given, twin = tiny(name), pairs(), tiny(name)
    plan = {"attention": (0, 3), "cross_attention": (4,), "mlp": ()}
    silence(name, twin, plan)
    dense = score_targets(model, given)
    with dropped(model, DropPlan(**plan)):
        found = score_targets(model, given)
    np.testing.assert_allclose(found.nll, by_hand(twin, given), rtol=1e-5)
    assert abs(found.nll - dense.nll).max() > 1e-2
    assert not model.training


def test_pairs_of_texts():
    """Bytes: padding is -100 in labels, whatever it is in the tokenizer, whose padding side is of no account."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    given = prepare_pairs(tokenizer, ["abc", "a"], ["xy", "z"])
    assert given["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert given["input_ids"][0].tolist() == tokenizer("abc")["input_ids"]
    assert given["labels"].tolist() == [tokenizer("xy")["input_ids"], [*tokenizer("z")["input_ids"], -100]]
    model = tiny("t5", vocab_size=257, pad_token_id=256)
    assert pairs_for(model, given).target.tolist() == [[1, given["labels"][0, 0]], [1, given["labels"][1, 0]]]
    with pytest.raises(LLMDropError, match="Each source needs a target: found 1 sources and 2 targets"):
        prepare_pairs(tokenizer, ["a"], ["b", "c"])


def test_a_language_at_the_end_of_the_labels_begins_the_target():
    given = {"input_ids": torch.tensor([[5, 6]] * 2), "labels": torch.tensor([[7, 8, 2, 90], [7, 2, 91, -100]])}
    assert pairs_for(tiny("mbart"), given).target.tolist() == [[90, 7, 8, 2], [91, 7, 2, 91]]
    assert pairs_for(tiny("m2m_100"), given).target.tolist() == [[1, 7, 8, 2], [1, 7, 2, 91]]


def test_what_cannot_be_scored():
    with pytest.raises(LLMDropError, match="This llama model is no encoder-decoder: it predicts no target from a source"):
        score_targets(tiny_decoder("llama"), pairs())
    model = tiny("t5")
    with torch.no_grad():
        model.shared.weight[5] = torch.inf
    with pytest.raises(LLMDropError, match="Some target tokens have no finite probability in torch.float32"):
        score_targets(model, pairs() | {"labels": torch.full((3, 2), 5)})
