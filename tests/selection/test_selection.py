"""Drop plans against slow and plain ways to find them."""

import copy
import functools
import itertools
from unittest import mock

import accelerate
import families
import numpy as np
import pytest
import torch
from torch import nn

from llmdrop_utils import LLMDropError, measure_importance
from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.dropping.units import skipping
from llmdrop_utils.measure.importance import Importance, drop_order
from llmdrop_utils.measure.metrics import KINDS
from llmdrop_utils.selection.methods import (
    select_at_random,
    select_consecutive_blocks,
    select_iteratively,
    select_last,
)
from llmdrop_utils.selection.ranking import SELECTIONS, drop_sequence, select

TOKENS = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(4))
N_LAYERS = 6


def scores_of(attention: list[float], mlp: list[float], block: list[float]) -> Importance:
    values = zip(KINDS, (attention, mlp, block), strict=True)
    return Importance({kind: np.array([row]) for kind, row in values}, np.array([1]), {}, "sha256:model")


SCORES = scores_of([0.2, 0.1, 0.3, 0.1], [0.25, 0.1, 0.05, 0.4], [0.3, 0.3, 0.2, 0.5])


@functools.cache
def model_of(name: str, seed: int = 0) -> nn.Module:
    """Large embeddings: no sub-layer stands out, so that ranks depend on what else is dropped."""
    torch.manual_seed(seed)
    model = families.tiny(name, num_hidden_layers=N_LAYERS)
    model.get_input_embeddings().weight.data *= 30
    return model


def silenced(name: str, gone: set[tuple[str, int]], seed: int = 0) -> nn.Module:
    """A copy in which the output projections of these sub-layers are zero."""
    model = copy.deepcopy(model_of(name, seed))
    families.silence(name, model, *([layer for k, layer in gone if k == kind] for kind in ("attention", "mlp")))
    return model


def states(model: nn.Module) -> list[torch.Tensor]:
    """The residual stream before each layer and after the last, in float64."""
    model = copy.deepcopy(model).double()
    decoder = model.get_decoder()
    for final_norm in ("norm", "final_layer_norm", "ln_f"):
        if isinstance(getattr(decoder, final_norm, None), nn.Module):
            setattr(decoder, final_norm, nn.Identity())  # or the last hidden state would come after it
    with torch.no_grad():
        return list(model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states)


# ---- ranked once ------------------------------------------------------------------------------------------------------


def test_one_shot_by_hand():
    """Ties go to the lower layer, in the joint ranking to attention."""
    assert select(SCORES, "attention", 4) == DropPlan((1, 3, 0, 2), (), 4, "sha256:model", SCORES.fingerprint)
    assert select(SCORES, "mlp", 3).mlp == (2, 1, 0)
    assert select(SCORES, "block", 3) == DropPlan((2, 0, 1), (2, 0, 1), 4, "sha256:model", SCORES.fingerprint)
    assert drop_sequence(SCORES, "joint") == [
        ("mlp", 2),
        ("attention", 1),
        ("attention", 3),
        ("mlp", 1),
        ("attention", 0),
        ("mlp", 0),
        ("attention", 2),
        ("mlp", 3),
    ]
    joint = select(SCORES, "joint", 5)
    assert (joint.attention, joint.mlp) == ((1, 3, 0), (2, 1))


@pytest.mark.parametrize("kind", SELECTIONS)
def test_what_is_dropped_is_not_selected_again(kind):
    model = model_of("llama")
    gone = DropPlan((0, 3), (3, 5))
    left = {"attention": {1, 2, 4, 5}, "mlp": {0, 1, 2, 4}, "block": {0, 1, 2, 4, 5}}
    there = {("joint", k, layer) for k in ("attention", "mlp") for layer in left[k]} | {
        (k, k, i) for k in KINDS for i in left[k]
    }
    expected = {(k, layer) for selection, k, layer in there if selection == kind}
    with skipping(model, gone):
        scores = measure_importance(model, TOKENS)
        iterative = select_iteratively(model, TOKENS, kind, 3)
        with pytest.raises(LLMDropError, match=f"this model has {len(expected)} to drop"):
            select_iteratively(model, TOKENS, kind, len(expected) + 1)
    assert len(drop_sequence(scores, kind)) == len(expected)
    assert set(drop_sequence(scores, kind)) == set(drop_sequence(scores.first(1), kind)) == expected
    if kind != "joint":
        assert set(scores.order(kind)) == left[kind]
        assert len({*iterative.attention, *iterative.mlp} & left[kind]) == 3
    with pytest.raises(LLMDropError, match=f"this model has {len(expected)} to drop"):
        select(scores, kind, len(expected) + 1)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_one_shot_plans_are_nested(kind):
    scores = measure_importance(model_of("llama"), TOKENS)
    n = 2 * N_LAYERS if kind == "joint" else N_LAYERS
    plans = [select(scores, kind, k) for k in range(n + 1)]
    assert [plan.n_drop for plan in plans] == [k * (2 if kind == "block" else 1) for k in range(n + 1)]
    for fewer, more in itertools.pairwise(plans):
        assert more.attention[: len(fewer.attention)] == fewer.attention
        assert more.mlp[: len(fewer.mlp)] == fewer.mlp
    if kind in KINDS:
        assert (plans[-1].attention or plans[-1].mlp) == scores.order(kind)
    else:
        assert plans[-1].attention == scores.order("attention")
        assert plans[-1].mlp == scores.order("mlp")


@pytest.mark.parametrize(
    ("kind", "n_drop", "message"),
    [
        ("attention", 5, "Cannot drop 5 attention layers: this model has 4 to drop"),
        ("joint", 9, "Cannot drop 9 joint layers: this model has 8 to drop"),
        ("mlp", -1, "Cannot drop -1 mlp layers"),
        ("heads", 1, "Unknown kind 'heads'. The kinds are: attention, mlp, block, joint."),
    ],
)
def test_bad_selections_are_named(kind, n_drop, message):
    with pytest.raises(LLMDropError, match=message):
        select(SCORES, kind, n_drop)


# ---- measured again after each drop -----------------------------------------------------------------------------------


def slowly(name: str, kind: str, n_drop: int, seed: int = 0, with_whole_layer: bool = False) -> list[tuple[str, int]]:
    """Zero what is dropped and measure again. `with_whole_layer`: as the official code does, the layer goes with it."""
    kinds = ("attention", "mlp") if kind == "joint" else (kind,)
    parts = lambda k: ("attention", "mlp") if k == "block" or with_whole_layer else (k,)  # noqa: E731
    chosen, gone = [], set()
    while len(chosen) < n_drop:
        importance = measure_importance(silenced(name, gone, seed), TOKENS).importance
        left = [(importance[k][layer], k, layer) for k in kinds for layer in range(N_LAYERS) if (k, layer) not in chosen]
        _, k, layer = min(left)
        chosen.append((k, layer))
        gone |= {(part, layer) for part in parts(k)}
    return chosen


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt-neox"])
def test_iterative_equals_zeroed_projections(name, kind):
    expected = slowly(name, kind, N_LAYERS)
    steps = []
    plan = select_iteratively(model_of(name), TOKENS, kind, N_LAYERS, batch_size=2, on_step=steps.append)
    assert plan.attention == tuple(layer for k, layer in expected if k in ("attention", "block"))
    assert plan.mlp == tuple(layer for k, layer in expected if k in ("mlp", "block"))
    assert steps == [1, 2, 3, 4, 5, 6]


def test_iterative_is_neither_one_shot_nor_skips_whole_layers():
    seeds = range(3)
    found = [select_iteratively(model_of("llama", seed), TOKENS, "attention", N_LAYERS).attention for seed in seeds]
    assert found != [measure_importance(model_of("llama", seed), TOKENS).order("attention") for seed in seeds]
    slow = [[slowly("llama", "attention", N_LAYERS, seed, whole) for seed in seeds] for whole in (False, True)]
    by_sub_layer, by_layer = ([tuple(layer for _, layer in chosen) for chosen in way] for way in slow)
    assert found == by_sub_layer != by_layer


def test_iterative_plans_are_nested_and_say_where_they_come_from():
    model = copy.deepcopy(model_of("llama"))
    model.llmdrop_identity = "sha256:this"
    three, two, none = (select_iteratively(model, TOKENS, "attention", n, batch_size=2) for n in (3, 2, 0))
    assert three.attention[:2] == two.attention
    assert (none.attention, none.mlp, none.n_layers) == ((), (), N_LAYERS)
    assert (three.model, three.n_layers) == ("sha256:this", N_LAYERS)
    assert three.scores == measure_importance(model, TOKENS, batch_size=2).fingerprint
    assert two.attention[0] == select(measure_importance(model, TOKENS), "attention", 1).attention[0]


@pytest.mark.parametrize(
    ("kind", "n_drop", "message"),
    [
        ("attention", 7, "Cannot drop 7 attention layers: this model has 6 to drop"),
        ("joint", 13, "Cannot drop 13 joint layers: this model has 12 to drop"),
        ("heads", 1, "Unknown kind 'heads'"),
        ("heads", 0, "Unknown kind 'heads'"),
    ],
)
def test_bad_iterative_selections_are_named_before_any_forward(kind, n_drop, message):
    with (
        mock.patch.object(model_of("llama").model, "forward", side_effect=AssertionError),
        pytest.raises(LLMDropError, match=message),
    ):
        select_iteratively(model_of("llama"), TOKENS, kind, n_drop)


# ---- blocks in a row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "olmo2", "falcon-7b", "gpt-neox"])  # a tensor or a tuple; parallel, added in place
def test_consecutive_blocks_equal_brute_force(name):
    model = model_of(name)
    stream = states(model)
    starts = set()
    for n in range(1, N_LAYERS + 1):
        similarity = [torch.cosine_similarity(stream[i], stream[i + n], dim=-1).mean().item() for i in range(N_LAYERS - n + 1)]
        first = int(np.argmax(similarity))
        starts.add(first)
        for batch_size in (1, 2, 8):
            plan = select_consecutive_blocks(model, TOKENS, n, batch_size)
            assert plan.attention == plan.mlp == tuple(range(first, first + n))
    assert len(starts) > 1
    assert plan.n_layers == N_LAYERS


def test_one_consecutive_block_is_the_most_droppable():
    model = model_of("llama")
    (first,) = select(measure_importance(model, TOKENS), "block", 1).attention
    assert select_consecutive_blocks(model, TOKENS, 1).attention == (first,)
    assert select_consecutive_blocks(model, TOKENS, 0).n_drop == 0
    with pytest.raises(LLMDropError, match="Cannot drop 7 block layers"):
        select_consecutive_blocks(model, TOKENS, 7)


def test_consecutive_blocks_of_an_offloaded_model(tmp_path):
    expected = select_consecutive_blocks(model_of("llama"), TOKENS, 2)
    offloaded = accelerate.disk_offload(copy.deepcopy(model_of("llama")), tmp_path, execution_device=torch.device("cpu"))
    assert select_consecutive_blocks(offloaded, TOKENS, 2) == expected


def test_consecutive_blocks_leave_the_model_as_it_was():
    model = copy.deepcopy(model_of("llama"))
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    select_consecutive_blocks(model, TOKENS, 2)
    assert hooks() == 0
    model.model.layers[4].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        select_consecutive_blocks(model, TOKENS, 2)
    assert hooks() == 0


# ---- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_last_layers_go_first(kind):
    layers = (11, 10, 9)
    expected = DropPlan(layers if kind != "mlp" else (), layers if kind != "attention" else (), 12)
    assert select_last(12, kind, 3) == expected
    assert select_last(12, kind, 0) == DropPlan(n_layers=12)


@pytest.mark.parametrize("kind", KINDS)
def test_random_plans_are_reproducible_and_nested(kind):
    layers = lambda n, seed=0: select_at_random(12, kind, n, seed).attention or select_at_random(12, kind, n, seed).mlp  # noqa: E731
    assert [layers(n) for n in range(13)] == [layers(12)[:n] for n in range(13)]
    assert sorted(layers(12)) == list(range(12))
    assert len({layers(12, seed) for seed in range(5)}) == 5
    first = [layers(1, seed)[0] for seed in range(600)]
    assert set(first) == set(range(12))
    assert max(np.bincount(first)) < 90  # 50 each are expected


@pytest.mark.parametrize("baseline", [select_last, functools.partial(select_at_random, seed=0)])
def test_bad_baselines_are_named(baseline):
    with pytest.raises(LLMDropError, match="Cannot drop 13 mlp layers: this model has 12 to drop"):
        baseline(12, "mlp", 13)
    with pytest.raises(LLMDropError, match="Unknown kind 'joint'. The kinds are: attention, mlp, block."):
        baseline(12, "joint", 1)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "granite"])  # in turn, in parallel, scaled
def test_relative_magnitude_by_brute_force(name):
    """|Y - X| / |Y| of every sub-layer, which is what the others leave when they are silenced."""
    found = measure_importance(model_of(name), TOKENS, metric="relative magnitude").importance
    ratio = lambda x, y: ((y - x).norm(dim=-1) / y.norm(dim=-1)).mean().item()  # noqa: E731
    dense = states(model_of(name))
    for i in range(N_LAYERS):
        x, y = dense[i], dense[i + 1]
        after_attention = states(silenced(name, {("mlp", i)}))[i + 1]
        mlp = (x, states(silenced(name, {("attention", i)}))[i + 1]) if families.CASES[name].parallel else (after_attention, y)
        for kind, pair in (("block", (x, y)), ("attention", (x, after_attention)), ("mlp", mlp)):
            assert found[kind][i] == pytest.approx(ratio(*pair), rel=1e-4), (kind, i)


def test_metrics_rank_differently_and_what_is_dropped_has_none():
    model = model_of("llama")
    with skipping(model, DropPlan((2,), (4,))):
        found = {metric: measure_importance(model, TOKENS, metric=metric) for metric in ("cosine", "relative magnitude")}
    for scores in found.values():
        assert scores.importance["attention"][2] == scores.importance["mlp"][4] == 0
        assert scores.order("attention") == tuple(i for i in drop_order(scores.importance["attention"]) if i != 2)
    assert found["cosine"].importance["mlp"][0] != pytest.approx(found["relative magnitude"].importance["mlp"][0], rel=0.1)
    with pytest.raises(LLMDropError, match="Unknown metric 'angle'. The metrics are: cosine, relative magnitude."):
        measure_importance(model, TOKENS, metric="angle")
