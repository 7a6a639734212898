"""Scores against plain forwards: each request alone, dropped sub-layers by output projections set to zero."""

import contextlib
import copy
from unittest import mock

import accelerate
import families
import numpy as np
import pytest
import torch
from measure.reference import (
    DENSE,
    PLANS,
    QUESTION,
    REQUESTS,
    compare,
    model_of,
    plain,
    snapshot,
    some,
)

from llmdrop_utils import DropPlan, LLMDropError, dropped
from llmdrop_utils.measure import packing, scoring
from llmdrop_utils.measure.scoring import score

SLIDING = {"mistral", "gemma2", "gemma3", "olmo3", "cohere2", "gpt-oss"}  # over 4 tokens
ALIBI = {"falcon-rw"}

every_family = pytest.mark.parametrize("name", families.CASES)


@pytest.fixture(autouse=True)
def short_prefix(monkeypatch):
    """So that short requests have a beginning that is kept apart."""
    monkeypatch.setattr(packing, "PREFIX", 6)


@contextlib.contextmanager
def watching():
    """What `score` packs: whether sequences share rows, and whether a prefix is kept apart."""
    seen = []

    def pack(requests, *args, share, **more):
        groups = packing.pack(requests, *args, share=share, **more)
        if requests == REQUESTS:
            seen.append((share, any(group.prefix for group in groups)))
        return groups

    with mock.patch.object(scoring, "pack", pack):
        yield seen


@every_family
def test_equals_each_request_alone(name):
    model = model_of(name)
    expected = plain(name, model, PLANS, REQUESTS)
    assert np.ptp(expected.logprob, axis=0).min() > 1e-2, "plans must matter"
    with watching() as seen:
        compare(score(model, REQUESTS, PLANS, kl=True), expected)
    shares = name not in SLIDING | ALIBI
    assert seen == [(shares, shares)]


@pytest.mark.parametrize("name", sorted(SLIDING))
def test_windows_that_hold_the_text_share_rows(name):
    model = model_of(name, window=17)
    with watching() as seen:
        compare(score(model, REQUESTS, PLANS[:4], kl=True), plain(name, model, PLANS[:4], REQUESTS))
    assert seen == [(True, True)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inside_dropped(name, plan):
    """Scoring what is dropped already, and more of it."""
    model, more = model_of(name), DropPlan((1,), (2,))
    both = DropPlan(tuple({*plan.attention, 1}), tuple({*plan.mlp, 2}))
    expected = plain(name, model, (plan, both), REQUESTS)
    with dropped(model, plan):
        compare(score(model, REQUESTS, (DENSE, more), kl=True), expected)


def test_order_of_plans_changes_nothing():
    model = model_of("llama")
    whole = score(model, REQUESTS, PLANS)
    assert np.isnan(whole.kl).all()
    for order in (range(8, -1, -1), (4, 0, 2, 8, 6, 1, 3, 7, 5), (3, 6)):
        part = score(model, REQUESTS, [PLANS[i] for i in order])
        np.testing.assert_allclose(part.logprob, whole.logprob[list(order)], atol=1e-5)


def test_equal_plans_are_equal_to_the_last_bit():
    found = score(model_of("llama"), REQUESTS, (DENSE, PLANS[3], DropPlan(n_layers=3), PLANS[3]), kl=True)
    assert (found.kl[[0, 2]] == 0).all()
    assert (found.kl[1] > 1e-3).all()
    for a, b in ((0, 2), (1, 3)):
        np.testing.assert_array_equal(found.logprob[a], found.logprob[b])


def test_answers_say_what_greedy_decoding_says():
    model = model_of("llama")
    context = torch.tensor([QUESTION])
    with torch.no_grad():
        greedy = model.generate(context, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 9:].tolist()
    wrong = [*greedy[:3], (greedy[3] + 1) % 97]
    found = score(model, [(QUESTION, greedy), (QUESTION, wrong), (QUESTION, greedy[:1])])
    assert [says_same for _, says_same in found.answers(0)] == [True, False, True]
    assert found.hits.tolist() == [[4, 3, 1]]
    assert found.answers(0)[0][0] == found.logprob[0, 0]


def test_model_is_left_as_it_was():
    model = families.tiny("gpt2")
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))  # transformers installs hooks of its own at the first forward
    before = snapshot(model)
    score(model, REQUESTS, PLANS, kl=True)
    assert snapshot(model) == before
    layer = model.transformer.h[2].mlp
    for at in range(1, 12, 2):  # in what is tried out, in the prefix, in a first and in a later plan
        calls = iter(range(at))
        with mock.patch.object(layer, "forward", lambda x, calls=calls: x if next(calls, None) is not None else 1 / 0):
            inside = snapshot(model)
            with pytest.raises(ZeroDivisionError):
                score(model, REQUESTS, PLANS)
            assert snapshot(model) == inside
    with pytest.raises(KeyboardInterrupt):
        score(model, REQUESTS, PLANS, on_batch=mock.Mock(side_effect=KeyboardInterrupt))
    assert snapshot(model) == before


def test_out_of_memory_halves_the_batch(monkeypatch, capsys):
    monkeypatch.setattr(packing, "ROW", 16)
    model = model_of("llama")
    expected = score(model, REQUESTS, PLANS, kl=True)
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def small_memory(x):
        if len(x) > 2 and x.shape[1] > 8:  # not what is tried out
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    shares = []
    with mock.patch.object(mlp, "forward", small_memory):
        found = score(model, REQUESTS, PLANS, kl=True, on_batch=shares.append)
    assert "going on with a batch of" in capsys.readouterr().err
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
    np.testing.assert_allclose(found.kl, expected.kl, atol=1e-5)


@pytest.mark.parametrize(
    ("too_much", "message"),
    [
        (lambda rows, width: width > 16, "a single sequence of 42 tokens"),
        (lambda rows, width: (rows, width) == (1, 6), "a beginning of 6 tokens under 9 plans"),
    ],
    ids=["row", "prefix"],
)
def test_too_little_memory_is_named(monkeypatch, too_much, message):
    monkeypatch.setattr(packing, "ROW", 16)
    model = model_of("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def small_memory(x):
        if too_much(*x.shape[:2]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    with (
        mock.patch.object(mlp, "forward", small_memory),
        pytest.raises(LLMDropError, match=f"Out of GPU memory with {message}"),
    ):
        score(model, REQUESTS, PLANS)


def test_progress_adds_up():
    shares = []
    score(model_of("llama"), REQUESTS, PLANS, on_batch=shares.append)
    assert len(shares) > 2
    assert sum(shares) == pytest.approx(1)


def test_offloaded_to_disk(tmp_path):
    expected = score(model_of("llama"), REQUESTS, PLANS[:4], kl=True)
    offloaded = accelerate.disk_offload(copy.deepcopy(model_of("llama")), tmp_path, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in offloaded.parameters())
    compare(score(offloaded, REQUESTS, PLANS[:4], kl=True), expected)


def test_bfloat16_shares_and_sums_in_float32():
    model = copy.deepcopy(model_of("llama")).bfloat16()
    with watching() as seen:
        found = score(model, REQUESTS, PLANS[:4])
    assert seen == [(True, True)]
    expected = plain("llama", model, PLANS[:4], REQUESTS)
    np.testing.assert_allclose(found.logprob, expected.logprob, rtol=0.03, atol=0.3)


@pytest.mark.parametrize("max_length", [None, 20])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_long_requests_lose_their_beginning(name, max_length):
    """None: what the model knows, 64 positions."""
    model, length = model_of(name), max_length or 64
    requests = [(some(80, 1), some(3, 2)), (some(80, 1), some(3, 3)), (some(length - 2, 4), [5, 6]), (some(length, 4), [5])]
    cut = [((c + t)[-(length + 1) : -len(t)], t) for c, t in requests]
    assert max(len(c) + len(t) for c, t in cut) == length + 1
    expected = []
    with torch.no_grad():
        for context, continuation in cut:
            logits = model(torch.tensor([(context + continuation)[:-1]]), use_cache=False).logits[0].double()
            rows = logits.log_softmax(-1)[-len(continuation) :]
            expected.append(float(rows.gather(1, torch.tensor(continuation)[:, None]).sum()))
    np.testing.assert_allclose(score(model, requests, max_length=max_length).logprob[0], expected, atol=1e-4)


def test_no_requests():
    found = score(model_of("llama"), [], PLANS, kl=True)
    assert found.logprob.shape == found.hits.shape == found.kl.shape == (len(PLANS), 0)
    assert found.answers(0) == []


@pytest.mark.parametrize(
    ("requests", "plan", "message"),
    [
        ([([], [3])], DENSE, "empty context or continuation"),
        ([([1], [2]), ([3], [])], DENSE, "empty context or continuation"),
        ([([1], [97])], DENSE, "token ids outside 0 to 96: another model's tokenizer"),
        ([([1, -1], [2])], DENSE, "token ids outside 0 to 96"),
        ([([1], [2])], DropPlan(attention=(3,)), r"attention drop list holds layer 3, but this model has 3 layers \(0-2\)"),
        ([([1], [2])], DropPlan(mlp=(1,), n_layers=4), "made for a model with 4 layers, but this one has 3"),
        (
            [([1], [2])],
            DropPlan(mlp=(1,), model="sha256:other"),
            "made for the model sha256:other, but this one is sha256:this",
        ),
    ],
)
def test_bad_input_is_named_before_any_forward(requests, plan, message):
    model = families.tiny("llama")
    model.llmdrop_identity = "sha256:this"
    with mock.patch.object(model.model, "forward", side_effect=AssertionError), pytest.raises(LLMDropError, match=message):
        score(model, [([1], [2]), *requests], [DENSE, plan])
