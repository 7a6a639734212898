"""Drop plans: what they hold, which models they fit, and their files."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from dropping.reference import MAPPED, PLANS, A, B, dense, pristine, snapshot, some_map

from llmdrop_utils import LLMDropError
from llmdrop_utils.dropping.maps import LinearMap
from llmdrop_utils.dropping.plan import DropPlan, PlanKey, check_plan
from llmdrop_utils.dropping.units import drop, dropped, skipping


def test_plan_is_what_it_was_given():
    plan = DropPlan([3, 1], np.array([2]), n_layers=np.int64(4), model="hub:a/b@c", scores="f")
    assert plan == DropPlan((3, 1), (2,), 4, "hub:a/b@c", "f")
    assert [type(index) for index in (*plan.attention, *plan.mlp, plan.n_layers)] == [int] * 4
    assert plan.n_drop == 3
    assert DropPlan().n_drop == 0
    assert len({plan, DropPlan((3, 1), (2,), 4, "hub:a/b@c", "f")}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": [40], "n_layers": 32}, r"attention drop list holds layer 40, but this model has 32 layers \(0-31\)"),
        ({"mlp": [2, 3], "n_layers": 3}, r"MLP drop list holds layer 3, but this model has 3 layers \(0-2\)"),
        ({"attention": [1, 2, 1]}, "attention drop list holds layer 1 more than once"),
        ({"mlp": [0, -1]}, "MLP drop list holds layer -1, but layers are counted from 0"),
        ({"mlp": [True]}, r"MLP drop list must hold whole numbers.*\[True\]"),
        ({"mlp": np.array([True])}, "MLP drop list must hold whole numbers"),
        ({"attention": [1.0]}, "attention drop list must hold whole numbers"),
        ({"attention": "12"}, "attention drop list must hold whole numbers"),
        ({"attention": 3}, "attention drop list must hold whole numbers.*3"),
        ({"attention": None}, "attention drop list must hold whole numbers.*None"),
        ({"n_layers": 0}, "n_layers must be a whole number above 0, but is 0"),
        ({"n_layers": "3"}, "n_layers must be a whole number above 0, but is '3'"),
        ({"model": 5}, "model must be text, but is 5"),
        ({"scores": ["a"]}, r"scores must be text, but is \['a'\]"),
    ],
)
def test_impossible_plans(settings, message):
    with pytest.raises(LLMDropError, match=message):
        DropPlan(**settings)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (DropPlan((3,)), r"attention drop list holds layer 3, but this model has 3 layers \(0-2\)"),
        (DropPlan((), (40,)), r"MLP drop list holds layer 40, but this model has 3 layers \(0-2\)"),
        (DropPlan((0,), n_layers=4), "made for a model with 4 layers, but this one has 3"),
        (DropPlan((0,), model="hub:a/b@1"), "made for the model hub:a/b@1, but this one is sha256:2"),
    ],
)
def test_plans_for_another_model(plan, message):
    model = copy.deepcopy(pristine("llama"))
    model.llmdrop_identity = "sha256:2"
    before = snapshot(model)
    for use in (check_plan, drop, lambda *given: dropped(*given).__enter__(), lambda *given: skipping(*given).__enter__()):
        with pytest.raises(LLMDropError, match=message):
            use(model, plan)
    assert snapshot(model) == before


def test_plans_that_fit():
    model = copy.deepcopy(pristine("llama"))
    assert len(check_plan(model, DropPlan((0,), (2,), n_layers=3, model="hub:a/b@1"))) == 3  # this one has no identity
    model.llmdrop_identity = "hub:a/b@1"
    check_plan(model, DropPlan((0,), model="hub:a/b@1"))
    check_plan(model, DropPlan((0,)))


def test_save_and_load(tmp_path):
    for plan in (DropPlan(), DropPlan((3, 1), (2,), 4, "hub:a/b@c", "f"), PLANS["joint"]):
        path = plan.save(tmp_path / "folder" / "plan.json")
        assert DropPlan.load(path) == plan
        assert DropPlan.load(str(path)) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


GOOD = {"format": "llmdrop drop plan 1", "attention": [1]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": "llmdrop drop plan 1", "attention": [1',
        b"\xff\xfe\x00",
        b"[]",
        b"[" * 100_000,
        b'{"attention": [1]}',
        json.dumps(GOOD | {"format": "another"}).encode(),
        json.dumps(GOOD | {"attentoin": [2]}).encode(),
        json.dumps(GOOD | {"attention": [1, 1]}).encode(),
        json.dumps(GOOD | {"mlp": {"a": 1}}).encode(),
        json.dumps(GOOD | {"n_layers": 1}).encode(),
    ],
)
def test_damaged_file(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(LLMDropError, match=r"plan.json is no drop plan that can be read \(.*Make and save the plan again"):
        DropPlan.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(LLMDropError, match=r"There is no drop plan at .*none.json"):
        DropPlan.load(tmp_path / "none.json")
    with pytest.raises(LLMDropError, match="no drop plan that can be read"):
        DropPlan.load(tmp_path)


# ---- maps ----------------------------------------------------------------------------------------------------------------


def test_equal_maps_are_equal():
    weight = torch.randn(4, 4)
    one, same = LinearMap(weight), LinearMap(weight.double())
    assert one == same
    assert hash(one) == hash(same)
    others = [LinearMap(weight, torch.full((4,), bias)) for bias in (0.0, 1.0)] + [
        LinearMap(weight + 1e-6),
        LinearMap(weight.T),
    ]
    assert len({one, same, *others}) == 5
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    assert LinearMap(weight.bfloat16()).weight.dtype == torch.float32
    with torch.inference_mode():
        made = LinearMap(torch.zeros(4, 4))
        assert not made.weight.is_inference(), "it could never be trained"
        assert not made.tensors(torch.device("cpu"), torch.bfloat16)[0].is_inference()
    weight.zero_()
    assert one == same
    assert one.weight.abs().max() > 0, "a map keeps what it was given"


def test_plans_with_maps_are_values():
    plan = DropPlan((3, 1), maps={("attention", 3): A, ("attention", 1): B})
    assert plan == DropPlan((3, 1), maps=(("attention", 1, some_map(2, bias=False)), ("attention", 3, some_map(1))))
    assert len({plan, DropPlan((3, 1)), DropPlan((3, 1), maps={("attention", 3): A}), copy.deepcopy(plan)}) == 3
    assert plan.map_of("attention", 3) is A
    assert plan.map_of("mlp", 3) is None
    assert [plan.state_of(layer) for layer in (1, 2)] == [(B.fingerprint, "kept"), ("kept", "kept")]
    assert DropPlan((1,), (2,)).state_of(2) == ("kept", "dropped")


def test_keys():
    """Keys of stored records without maps must never change."""
    plain = DropPlan((3, 1), (2,), 4, "hub:a/b@c", "f")
    assert plain.key == PlanKey((1, 3), (2,)) == DropPlan((1, 3), (2,)).key
    assert json.dumps(plain.key.to_json()) == '{"attention": [1, 3], "mlp": [2]}'
    mapped = DropPlan((3, 1), (2,), maps={("mlp", 2): A, ("attention", 3): B})
    assert mapped.key == PlanKey((1, 3), (2,), (("attention", 3, B.fingerprint), ("mlp", 2, A.fingerprint)))
    assert mapped.key.to_json() == {
        "attention": [1, 3],
        "mlp": [2],
        "maps": [["attention", 3, B.fingerprint], ["mlp", 2, A.fingerprint]],
    }
    for key in (plain.key, mapped.key, DropPlan().key):
        assert PlanKey.from_json(json.loads(json.dumps(key.to_json()))) == key
    assert len({plain.key, mapped.key, DropPlan((1, 3), (2,)).key}) == 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(2, 3),), r"must be a square matrix \(d, d\), but its shape is \(2, 3\)"),
        ((torch.zeros(4),), r"its shape is \(4,\)"),
        ((torch.eye(3), torch.zeros(2)), r"bias of a linear map \(3, 3\) must have the shape \(3,\), but its shape is \(2,\)"),
        ((np.eye(3),), "weight of a linear map must be a torch tensor, but is a ndarray"),
        ((torch.eye(3), 0.0), "bias of a linear map must be a torch tensor, but is a float"),
        ((torch.eye(3, dtype=torch.long),), "weight of a linear map must hold numbers that are finite in float32"),
        ((torch.eye(3), torch.tensor([0.0, torch.nan, 0.0])), "bias of a linear map must hold numbers"),
        ((torch.full((3, 3), 1e300, dtype=torch.float64),), "weight of a linear map must hold numbers"),
    ],
)
def test_what_is_no_map(tensors, message):
    with pytest.raises(LLMDropError, match=message):
        LinearMap(*tensors)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({("attention", 2): A}, r"a map for the attention of layer 2, but its attention drop list is \[1\]"),
        ({("mlp", 1): A}, r"a map for the MLP of layer 1, but its MLP drop list is \[0\]"),
        ({("block", 1): A}, "in the place of 'attention' or 'mlp', not of 'block'"),
        ({("attention", True): A}, "must hold whole numbers"),
        ({("attention", 1): A.weight}, r"maps must be \{\(kind, layer\): LinearMap\}"),
        ({1: A}, r"maps must be \{\(kind, layer\): LinearMap\}"),
        (A, r"maps must be \{\(kind, layer\): LinearMap\}"),
        ((("attention", 1, A), ("attention", 1, B)), "two maps for one place"),
    ],
)
def test_impossible_maps_of_plans(maps, message):
    with pytest.raises(LLMDropError, match=message):
        DropPlan((1,), (0,), maps=maps)


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        (
            "llama",
            DropPlan((1,), maps={("attention", 1): LinearMap(torch.eye(48))}),
            "map for the attention of layer 1 is 48 numbers wide, but this model's residual stream is 32 wide",
        ),
        ("gpt2", DropPlan(mlp=(1,), maps={("mlp", 1): LinearMap(torch.eye(64))}), "MLP of layer 1 is 64 numbers wide"),
        (
            "opt",
            MAPPED["block"],
            r"family opt have no module of its own for the MLP, so no map can stand .*\(layer 1\)",
        ),
    ],
)
def test_maps_that_do_not_fit(name, plan, message):
    before = snapshot(dense(name))
    for use in (check_plan, drop, lambda *given: skipping(*given).__enter__()):
        with pytest.raises(LLMDropError, match=message):
            use(dense(name), plan)
    assert snapshot(dense(name)) == before


# ---- files of plans with maps --------------------------------------------------------------------------------------------


def test_plans_without_maps_are_written_as_ever(tmp_path):
    path = DropPlan((3, 1), (2,), 4, "hub:a/b@c", "f").save(tmp_path / "plan.json")
    text = '{\n "format": "llmdrop drop plan 1",\n "attention": [\n  3,\n  1\n ],\n "mlp": [\n  2\n ],\n "n_layers": 4,\n'
    assert path.read_text() == text + ' "model": "hub:a/b@c",\n "scores": "f"\n}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("file_name", ["plan.json", "plan", "plan.v1"])
def test_round_trip(tmp_path, file_name):
    for plan in MAPPED.values():
        path = plan.save(tmp_path / "folder" / file_name)
        assert DropPlan.load(path) == plan
        assert DropPlan.load(path).maps[0][2].weight.equal(plan.maps[0][2].weight)
    weights = "plan.safetensors" if file_name == "plan.json" else f"{file_name}.safetensors"
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([file_name, weights])


def test_files_that_do_not_belong_together(tmp_path):
    path, weights = MAPPED["joint"].save(tmp_path / "plan.json"), tmp_path / "plan.safetensors"
    kept = weights.read_bytes()
    MAPPED["mlp"].save(tmp_path / "other.json")
    for content, message in (
        (None, "its maps are missing: there is no plan.safetensors beside it"),
        (b"damaged", "its maps in plan.safetensors cannot be read"),
        ((tmp_path / "other.safetensors").read_bytes(), "does not hold the map that it names for the attention of layer 1"),
        (kept.replace(kept[-4:], b"\0\0\0\0"), "does not hold the map that it names for the (attention|mlp) of layer [12]"),
    ):
        weights.unlink() if content is None else weights.write_bytes(content)
        with pytest.raises(LLMDropError, match=rf"plan.json is no drop plan that can be read \(.*{message}"):
            DropPlan.load(path)
    weights.write_bytes(kept)
    assert DropPlan.load(path) == MAPPED["joint"]
    for maps in ([["attention", 1]], 5, [["attention", 1, 7]]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"maps": maps}))
        with pytest.raises(LLMDropError, match="no drop plan that can be read"):
            DropPlan.load(path)
