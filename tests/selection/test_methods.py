"""Selection methods by name: each gives what its public function gives."""

import copy
import dataclasses
import functools
from unittest import mock

import families
import pytest
import torch
from torch import nn

from llmdrop_utils import LLMDropError, measure_importance
from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.dropping.units import skipping
from llmdrop_utils.measure.metrics import KINDS
from llmdrop_utils.selection import methods
from llmdrop_utils.selection.methods import (
    METHODS,
    Context,
    select_at_random,
    select_by,
    select_consecutive_blocks,
    select_iteratively,
    select_last,
)
from llmdrop_utils.selection.ranking import select

TOKENS = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(4))
N_LAYERS = 6


@functools.cache
def the_model() -> nn.Module:
    return families.tiny("llama", num_hidden_layers=N_LAYERS)


@functools.cache
def scores():
    return measure_importance(the_model(), TOKENS)


def test_each_method_by_name():
    model = copy.deepcopy(the_model())
    model.llmdrop_identity = "sha256:this"
    context = Context(model, TOKENS, batch_size=2, seed=3)
    cosine, magnitude = (measure_importance(model, TOKENS, 2, metric=metric) for metric in ("cosine", "relative magnitude"))
    of_model = functools.partial(dataclasses.replace, model="sha256:this")
    for kind in (*KINDS, "joint"):
        assert select_by("one-shot", context, kind, 3) == select(cosine, kind, 3)
        assert select_by("relative magnitude", context, kind, 3) == select(magnitude, kind, 3)
        assert select_by("iterative", context, kind, 3) == select_iteratively(model, TOKENS, kind, 3, 2)
        if kind != "joint":
            assert select_by("reverse order", context, kind, 3) == of_model(select_last(N_LAYERS, kind, 3))
            assert select_by("random", context, kind, 3) == of_model(select_at_random(N_LAYERS, kind, 3, seed=3))
    assert select_by("consecutive blocks", context, "block", 3) == select_consecutive_blocks(model, TOKENS, 3, 2)
    assert {"one-shot", "Taylor", "Gate-Norm", "greedy KL"} < set(METHODS), "all are registered, whichever file is imported"


def test_scores_are_measured_once_and_only_when_needed():
    context, expected = Context(the_model(), TOKENS, scores={"cosine": scores()}), select(scores(), "attention", 2)
    with mock.patch.object(methods, "measure_importance", side_effect=measure_importance) as measured:
        assert select_by("one-shot", context, "attention", 2) == expected
        select_by("reverse order", context, "attention", 2)
        assert measured.call_count == 0
        for _ in range(2):
            select_by("relative magnitude", context, "mlp", 2)
    assert measured.call_count == 1


def test_baselines_pass_over_what_is_dropped():
    with skipping(the_model(), DropPlan((5, 2), (5,))) as model:
        context = Context(model, TOKENS)
        assert select_by("reverse order", context, "attention", 2).attention == (4, 3)
        assert select_by("reverse order", context, "block", 2).mlp == (4, 3)
        assert set(select_by("random", context, "attention", 4).attention) == {0, 1, 3, 4}
        with pytest.raises(LLMDropError, match="Cannot drop 5 attention layers: this model has 4 to drop"):
            select_by("random", context, "attention", 5)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("best", "mlp", "Unknown selection method 'best'. The methods are: one-shot, relative magnitude, iterative, "),
        ("consecutive blocks", "attention", "Unknown kind 'attention'. The kinds are: block."),
        ("reverse order", "joint", "Unknown kind 'joint'. The kinds are: attention, mlp, block."),
        ("random", "heads", "Unknown kind 'heads'"),
        ("one-shot", "heads", "Unknown kind 'heads'"),
    ],
)
def test_bad_names_of_methods_and_kinds(name, kind, message):
    with pytest.raises(LLMDropError, match=message):
        select_by(name, Context(the_model(), TOKENS, scores={"cosine": scores()}), kind, 1)


def test_a_method_is_one_registered_function(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", METHODS.copy())

    @methods.method("first")
    def first(context, kind, n_drop):
        return DropPlan(attention=tuple(range(n_drop)))

    assert select_by("first", Context(the_model(), TOKENS), "attention", 2).attention == (0, 1)
    with pytest.raises(ValueError, match="two selection methods called 'reverse order'"):
        methods.method("reverse order")(first)
