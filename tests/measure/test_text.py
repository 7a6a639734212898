"""Quality on text against what transformers says about the same model."""

import math

import families
import numpy as np
import pytest
import torch

from llmdrop_utils import LLMDropError, dropped, perplexity, score_text
from llmdrop_utils.dropping.plan import DropPlan

DENSE = DropPlan()
PLANS = (DENSE, DropPlan(attention=(1,), mlp=(2,)))


def text(tokenizer, n_samples: int, seq_len: int) -> torch.Tensor:
    words = "Many layers of a transformer can be dropped, attention more than MLP, and little is lost. " * 20
    return torch.tensor(tokenizer.encode(words))[: n_samples * seq_len].view(n_samples, seq_len)


@pytest.mark.real
@torch.no_grad()
def test_perplexity_is_that_of_transformers(real_model):
    model, tokenizer = real_model
    tokens = torch.cat([text(tokenizer, 2, 40), torch.randint(0, 49000, (1, 40))])
    for plan in (DENSE, DropPlan((26, 25), (3,))):
        with dropped(model, plan):
            assert perplexity(model, tokens) == pytest.approx(math.exp(model(tokens, labels=tokens).loss), rel=1e-4)


@torch.no_grad()
def test_text_scores_by_hand():
    model = families.tiny("llama", vocab_size=257)
    tokens = torch.randint(0, 257, (3, 25))
    scores = score_text(model, tokens, PLANS)
    assert scores.nll.shape == scores.hits.shape == scores.kl.shape == (2, 3)
    assert scores.perplexity.shape == (2,)
    first = None
    for i, plan in enumerate(PLANS):
        with dropped(model, plan):
            logs = model(tokens).logits[:, :-1].double().log_softmax(-1)
        first = logs if first is None else first
        np.testing.assert_allclose(scores.nll[i], -logs.gather(2, tokens[:, 1:, None])[..., 0].mean(1), atol=1e-5)
        np.testing.assert_allclose(scores.hits[i], (logs.argmax(-1) == tokens[:, 1:]).double().mean(1))
        np.testing.assert_allclose(scores.kl[i], (first.exp() * (first - logs)).sum(-1).mean(1), atol=1e-5)
    assert (scores.kl[0] == 0).all()
    assert (scores.kl[1] > 0.01).all()
    np.testing.assert_allclose(scores.perplexity, np.exp(scores.nll.mean(1)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"Expected token ids \(n_samples, seq_len >= 2\), found torch.int64 \(3,\)"),
        (torch.zeros(3, 1, dtype=torch.long), r"found torch.int64 \(3, 1\)"),
        (torch.zeros(0, 4, dtype=torch.long), r"found torch.int64 \(0, 4\)"),
        (torch.zeros(3, 4), r"found torch.float32 \(3, 4\)"),
        (torch.full((1, 3), 257), "token ids outside 0 to 256"),
        (torch.zeros(1, 258, dtype=torch.long), "Samples of 258 tokens are too long for this model, which knows 256 positions"),
    ],
)
def test_bad_text_is_named(tiny_model, tokens, message):
    with pytest.raises(LLMDropError, match=message):
        score_text(tiny_model[0], tokens)


def test_text_of_one_token_more_than_positions(tiny_model):
    """The last is predicted but not read."""
    assert np.isfinite(score_text(tiny_model[0], torch.zeros(1, 257, dtype=torch.long)).nll).all()
