"""Samples that a model writes: where they begin, that they follow its distributions, and that a seed makes them again."""

import pytest
import torch
from derive.changing import drawn, fresh, seed_all

from llmdrop_utils import DropPlan, LLMDropError, dropped
from llmdrop_utils.derive.own_text import write_samples

BEGINNINGS = torch.randint(3, 97, (5, 4), generator=torch.Generator().manual_seed(0))


def test_tokens_are_drawn_as_often_as_the_model_says():
    model, n = fresh(), 20_000
    model.generation_config.top_k = 2  # what a checkpoint recommends for chats is not what the model says
    samples = write_samples(model, BEGINNINGS[:1].expand(n, 4), 5, batch_size=n)
    with torch.no_grad():
        expected = model(BEGINNINGS[:1]).logits[0, -1].softmax(-1)
    counts = samples[:, 4].bincount(minlength=97)
    error = (expected * (1 - expected) / n).sqrt()
    assert (expected > 0.01).sum() > 5
    assert ((counts / n - expected).abs() < 4.5 * error + 1e-4).all()


def test_samples_go_on_from_their_beginnings_past_ends_of_text():
    model = fresh()
    model.generation_config.eos_token_id = list(range(97))  # whatever is drawn
    samples = write_samples(model.train(), BEGINNINGS, 12, batch_size=2)
    assert samples.shape == (5, 12)
    assert torch.equal(samples[:, :4], BEGINNINGS)
    assert model.training


def test_a_seed_makes_the_same_samples_whatever_was_drawn_before():
    model, found = fresh(), []
    for number, seed in enumerate((1, 1, 2)):
        seed_all(number)
        expected = drawn()
        seed_all(number)
        found.append(write_samples(model, BEGINNINGS, 12, seed=seed))
        assert drawn() == expected
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", DropPlan((0, 1), (1,))),
        ("gpt2", DropPlan((0, 1, 2))),  # without attention there is no cache, and positions come from its length
        ("lfm2", DropPlan((2,))),  # other mixers hold a state
        ("recurrent_gemma", DropPlan()),  # its cache is its own
    ],
)
def test_under_a_plan_the_dropped_model_writes(name, plan):
    model = fresh(name)
    model.get_output_embeddings().weight = torch.nn.Parameter(1e6 * model.get_output_embeddings().weight.data)
    model.config.tie_word_embeddings = False  # one token takes all
    with dropped(model, plan):
        samples = write_samples(model, BEGINNINGS, 9)
        with torch.no_grad():
            logits = model(samples[:, :-1]).logits[:, 3:]
        assert torch.equal(logits.gather(-1, samples[:, 4:, None])[..., 0], logits.amax(-1))


def test_numbers_that_are_not_finite():
    model = fresh()
    model.lm_head.weight.data[5] = torch.inf
    with pytest.raises(LLMDropError, match="not finite"):
        write_samples(model, BEGINNINGS, 9)


@pytest.mark.parametrize(
    ("beginnings", "seq_len", "message"),
    [
        (BEGINNINGS, 4, "Samples of 4 tokens cannot go on from beginnings of 4"),
        (BEGINNINGS, 10**6, "positions"),
        (BEGINNINGS, 10**15, "positions"),
        (BEGINNINGS, 10**30, "The length of a sample must be 9223372036854775807 or less"),
        (BEGINNINGS.float(), 9, "token ids"),
    ],
)
def test_bad_input(beginnings, seq_len, message):
    with pytest.raises(LLMDropError, match=message):
        write_samples(fresh(), beginnings, seq_len)
