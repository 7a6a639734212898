"""What plans and requests share is computed once, linear maps included."""

import contextlib
import copy
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from measure.reference import DENSE, REQUESTS, distributions, model_of
from torch import nn

from llmdrop_utils.dropping.maps import LinearMap
from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.dropping.units import drop, dropped
from llmdrop_utils.measure import packing
from llmdrop_utils.measure.passes import Step, schedule
from llmdrop_utils.measure.scoring import score
from llmdrop_utils.models.families import find_anatomy


def some_map(seed: int) -> LinearMap:
    generator = torch.Generator().manual_seed(seed)
    return LinearMap(0.5 * torch.randn(32, 32, generator=generator), torch.randn(32, generator=generator))


A, B = some_map(1), some_map(2)
FIRST = DropPlan((1,), maps={("attention", 1): A})
MAPPED = (
    FIRST,
    DENSE,
    DropPlan((1,), (2,), maps={("attention", 1): some_map(1)}),  # as the first up to layer 2
    DropPlan((1,), maps={("attention", 1): B}),
    DropPlan((1,)),
    DropPlan((1,), (1,), maps={("attention", 1): A, ("mlp", 1): B}),
    DropPlan((1,), maps=(("attention", 1, some_map(1)),), n_layers=3),  # the first again
    DropPlan((0, 1, 2), maps={("attention", 0): A, ("attention", 1): B}),  # nothing to cache
)


@pytest.fixture(autouse=True)
def short_prefix(monkeypatch):
    """So that short requests have a beginning that is kept apart."""
    monkeypatch.setattr(packing, "PREFIX", 6)


# ---- plans --------------------------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    plans = [DropPlan((3,)), DropPlan((2,)), DropPlan((2, 3)), DropPlan((3,))]
    assert schedule(plans, 4) == [
        Step(plans[0], 0, None, frozenset({2, 4})),
        Step(plans[1], 2, 0, frozenset({3})),
        Step(plans[2], 3, 1, frozenset()),
        Step(plans[3], 4, 0, frozenset()),
    ]


def test_schedule_looks_at_maps():
    """Layers are the same only with the same map in each place: A, another A, B and nothing."""
    steps = schedule(MAPPED, 3)
    assert [step.start for step in steps] == [0, 1, 2, 1, 1, 1, 3, 0]
    assert [step.source for step in steps] == [None, 0, 0, 0, 0, 0, 0, None]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon-7b", "olmo2", "gpt-oss"])
def test_maps_equal_models_that_have_them_for_good(name):
    model = model_of(name)
    found = score(model, REQUESTS, MAPPED, kl=True)
    assert np.ptp(found.logprob[[0, 2, 3, 4, 5, 7]], axis=0).min() > 1e-2, "maps must matter"
    first = distributions(drop(copy.deepcopy(model), FIRST), REQUESTS)
    for i, plan in enumerate(MAPPED):
        rows = distributions(drop(copy.deepcopy(model), plan), REQUESTS)
        for k, (p, q, (_, continuation)) in enumerate(zip(first, rows, REQUESTS, strict=True)):
            logprob = q.gather(1, torch.tensor(continuation)[:, None]).sum()
            np.testing.assert_allclose(found.logprob[i, k], float(logprob), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found.kl[i, k], float((p.exp() * (p - q)).sum()), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.logprob[0], found.logprob[6])


def test_scoring_inside_a_model_with_maps():
    model, more = model_of("llama"), DropPlan((2,), (0,), maps={("mlp", 0): B})
    union = DropPlan((1, 2), (0,), maps={("attention", 1): A, ("mlp", 0): B})
    expected = score(model, REQUESTS, (FIRST, union), kl=True)
    with dropped(model, FIRST):
        found = score(model, REQUESTS, (DENSE, more), kl=True)
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
    np.testing.assert_allclose(found.kl, expected.kl, atol=1e-5)


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
    np.testing.assert_array_equal(tokens(*MAPPED) - alone, each * [1, 5, 6])  # and 1 for each layer of `alone`


# ---- requests -----------------------------------------------------------------------------------------------------------


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
