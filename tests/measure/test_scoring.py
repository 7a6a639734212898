"""Scores against plain forwards: each request alone, dropped sub-layers by output projections set to zero."""

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Sequence
from unittest import mock

import accelerate
import families
import numpy as np
import pytest
import torch
from torch import nn

from llmdrop_utils import DropPlan, LLMDropError, dropped
from llmdrop_utils.measure import packing, scoring
from llmdrop_utils.measure.packing import Request
from llmdrop_utils.measure.scoring import Scores, score
from llmdrop_utils.models.families import find_anatomy

DENSE = DropPlan()
# Of three layers: none, the last, the first, all attention, all of a layer; one twice, and others that begin like one before.
PLANS = (
    DropPlan(attention=(2,)),
    DENSE,
    DropPlan(attention=(2,), mlp=(2,)),
    DropPlan((1, 2), (0,)),
    DropPlan(attention=(0, 1, 2)),
    DropPlan(attention=(2,)),
    DropPlan((1,), (0,)),
    DropPlan(n_layers=3),
    DropPlan(mlp=(0, 1, 2)),
)
SLIDING = {"mistral", "gemma2", "gemma3", "olmo3", "cohere2", "gpt-oss"}  # over 4 tokens
ALIBI = {"falcon-rw"}

every_family = pytest.mark.parametrize("name", families.CASES)


def some(n: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = some(8, 1)
QUESTION = some(9, 2)
REQUESTS: list[Request] = [
    *((PREFIX + some(5, seed), some(4, 10 + seed)) for seed in range(3, 7)),
    (PREFIX + some(5, 3), [*some(4, 13), 5]),
    (PREFIX[:7], [PREFIX[7], 9]),  # scores a token that others only read
    *((QUESTION, some(3, seed)) for seed in range(20, 23)),
    (QUESTION, some(3, 20)),
    (QUESTION[:4], [QUESTION[4]]),
    ([7], [8]),
    (some(1, 30), some(12, 31)),
]


@pytest.fixture(autouse=True)
def short_prefix(monkeypatch):
    """So that short requests have a beginning that is kept apart."""
    monkeypatch.setattr(packing, "PREFIX", 6)


@functools.cache
def model_of(name: str, window: int | None = None) -> nn.Module:
    return families.tiny(name, **({} if window is None else {"sliding_window": window}))


@torch.no_grad()
def silenced(name: str, model: nn.Module, plan: DropPlan) -> nn.Module:
    """A copy whose output projections are zero where the plan drops."""
    model, case = copy.deepcopy(model), families.CASES[name]
    for indices, projection in ((plan.attention, case.attention), (plan.mlp, case.mlp)):
        for index in indices:
            found = [p for n, p in find_anatomy(model).layers[index].block.named_parameters() if projection in n]
            assert found
            for parameter in found:
                parameter.zero_()
    return model


@torch.no_grad()
def distributions(model: nn.Module, requests: list[Request]) -> list[torch.Tensor]:
    """For each request, the log-probabilities (n, vocabulary) where its n tokens are predicted."""
    found = []
    for context, continuation in requests:
        logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0].double()
        found.append(logits.log_softmax(-1)[len(context) - 1 : -1])
    return found


def plain(name: str, model: nn.Module, plans: Sequence[DropPlan], requests: list[Request]) -> Scores:
    known = {
        gone: distributions(silenced(name, model, DropPlan(*gone)), requests) for gone in {(p.attention, p.mlp) for p in plans}
    }
    by_plan = [known[plan.attention, plan.mlp] for plan in plans]
    targets = [torch.tensor(continuation) for _, continuation in requests]

    def each(number) -> np.ndarray:
        return np.array([[float(number(*x)) for x in zip(by_plan[0], found, targets, strict=True)] for found in by_plan])

    return Scores(
        logprob=each(lambda first, q, target: q.gather(1, target[:, None]).sum()),
        hits=each(lambda first, q, target: (q.argmax(-1) == target).sum()),
        kl=each(lambda first, q, target: (first.exp() * (first - q)).sum()),
        length=np.array([len(target) for target in targets]),
    )


def compare(found: Scores, expected: Scores) -> None:
    np.testing.assert_allclose(found.logprob, expected.logprob, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.hits, expected.hits)
    np.testing.assert_array_equal(found.length, expected.length)


@contextlib.contextmanager
def watching():
    """What `score` packs: whether sequences share rows, and whether a prefix is kept apart."""
    seen = []

    def pack(requests, *args, share):
        groups = packing.pack(requests, *args, share=share)
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


@contextlib.contextmanager
def counting(model: nn.Module):
    """Layer -> number of tokens that it really computes."""
    counts = Counter()
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(find_anatomy(model).layers):

            def forward(x, *args, forward=layer.block.forward, index=index, **kwargs):
                counts[index] += x.shape[:-1].numel()
                return forward(x, *args, **kwargs)

            stack.enter_context(mock.patch.object(layer.block, "forward", forward))
        yield counts


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_nothing_is_computed_twice_for_plans(name):
    """Layers below the first difference run once; equal plans cost nothing."""
    model = model_of(name)

    def tokens(*plans: DropPlan) -> np.ndarray:
        with counting(model) as counts:
            score(model, REQUESTS, plans)
        return np.array([counts[layer] for layer in range(3)])

    alone = tokens(DENSE)
    each = tokens(DENSE, DropPlan(mlp=(0,))) - alone  # of all requests once, without what a run tries out first
    assert len(set(each)) == 1
    assert each[0] > 0
    steps = (tokens(DENSE, DropPlan((layer,))) - alone for layer in range(3))
    np.testing.assert_array_equal(list(steps), each * np.triu(np.ones((3, 3), dtype=int)))
    many = (DropPlan((2,)), DENSE, DropPlan((2,), (2,)), DropPlan((2,)), DropPlan((1, 2)), DropPlan((1,)), DropPlan(mlp=(0,)))
    np.testing.assert_array_equal(tokens(*many) - alone, each * [1, 2, 5])


def test_what_requests_share_is_computed_once(monkeypatch):
    monkeypatch.setattr(packing, "TOKEN", 10**6)
    monkeypatch.setattr(packing, "ALIGN", 1)
    model = model_of("llama")
    with counting(model) as counts:
        score(model, [([7], [8])])
    tried_out = counts[0] - 1
    with counting(model) as counts:
        score(model, REQUESTS)
    inputs = [(context + continuation)[:-1] for context, continuation in REQUESTS]
    different = {tuple(tokens[:end]) for tokens in inputs for end in range(1, len(tokens) + 1)}
    assert counts[0] - tried_out == len(different)


def snapshot(model: nn.Module) -> tuple:
    return (
        [(n, id(m), m.training, "forward" in vars(m)) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(p), p.data_ptr(), p.numpy(force=True).tobytes()) for n, p in model.named_parameters(remove_duplicate=False)],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


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
