"""A stored value is found only where everything that determines it is the same.

Every field of a work item, and of what an item is made of, changes the addresses of its values, or is listed below with the
reason why it does not. A new field fails here until it is listed or in the key.
"""

import dataclasses
import importlib.metadata
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from llmdrop_utils import DropPlan
from llmdrop_utils.base.store import Store
from llmdrop_utils.derive.healing import Healing
from llmdrop_utils.derive.tuning import Tuning
from llmdrop_utils.dropping.maps import LinearMap
from llmdrop_utils.measure.speed import Load
from llmdrop_utils.models.locate import LocatedModel
from llmdrop_utils.studies import work as work_module
from llmdrop_utils.studies.ablations import work as ablations_module
from llmdrop_utils.studies.keep_more import ranking as ranking_module
from llmdrop_utils.studies.keep_more import work as kept_module
from llmdrop_utils.studies.other_transformers import work as encoders_module
from llmdrop_utils.studies.other_transformers.work import DataSet
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.sizes_and_causes import work as causes_module
from llmdrop_utils.studies.speedup import loads
from llmdrop_utils.studies.take_away import work as served_module
from llmdrop_utils.studies.what_breaks import changes as changes_module
from llmdrop_utils.studies.what_breaks import work as asked_module
from llmdrop_utils.studies.work import Work

TOKENS = torch.arange(12).view(3, 4)
MAP, OTHER_MAP = LinearMap(torch.eye(2)), LinearMap(2 * torch.eye(2))
MODEL = LocatedModel("hand", Path("here"), "sha256:hand")
PLAN = DropPlan(attention=(3, 1), mlp=(2,), n_layers=6, model="sha256:hand", scores="s", maps={("attention", 3): MAP})
OTHER_PLAN = DropPlan(attention=(3,))
TEXT = work_module.TextWork(MODEL, torch.float32, "sdpa", "web", TOKENS, (PLAN,))
LOAD = Load("decode", 64, 4, 3, "eager", 100)
IMAGES = (np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8))
DATA = DataSet("digits", IMAGES, np.array(["a", "b"]), np.array([0, 1]))

# Fields that may change without another address, by the class that has them, and why.
IN_FINGERPRINT = "its content is in the fingerprint of the task"
ROUNDING = "it moves values by rounding only"
TOLD_BY_TOKENS = "what was read is in the tokens"
EXEMPT = {
    ("LocatedModel", "name"): "the same weights under another name",
    ("LocatedModel", "folder"): "the same weights elsewhere",
    ("LocatedModel", "published_lists"): "what others found for the model",
    ("LocatedModel", "on_hub"): "where the same weights come from",
    ("LocatedModel", "pickled"): "how the same weights are stored",
    ("LocatedModel", "bases"): "where the weights, which have an identity, come from",
    ("DropPlan", "n_layers"): "what the plan was made for",
    ("DropPlan", "model"): "what the plan was made for",
    ("DropPlan", "scores"): "how the plan came about",
    ("ImportanceWork", "batch_size"): ROUNDING,
    ("ImportanceWork", "corpus"): TOLD_BY_TOKENS,
    ("TextWork", "corpus"): TOLD_BY_TOKENS,
    ("CausesWork", "corpus"): TOLD_BY_TOKENS,
    ("RankWork", "corpus"): TOLD_BY_TOKENS,
    ("IterativeWork", "batch_size"): ROUNDING,
    ("TaskWork", "task"): IN_FINGERPRINT,
    ("TaskWork", "members"): IN_FINGERPRINT,
    ("TaskWork", "num_fewshot"): IN_FINGERPRINT,
    ("TaskWork", "limit"): IN_FINGERPRINT,
    ("ContinuationWork", "corpus"): TOLD_BY_TOKENS,
    ("ConfidenceWork", "task"): IN_FINGERPRINT,
    ("ConfidenceWork", "members"): IN_FINGERPRINT,
    ("ConfidenceWork", "num_fewshot"): IN_FINGERPRINT,
    ("ConfidenceWork", "limit"): IN_FINGERPRINT,
    ("GenerationWork", "corpus"): TOLD_BY_TOKENS,
    ("ProbeWork", "probe"): "what is asked is in the requests",
    ("ChangedSpeedWork", "tokens"): "which weights are zero does not matter to times",
    ("RankingWork", "batch_size"): ROUNDING,
    ("EncoderImportanceWork", "batch_size"): ROUNDING,
    ("EmbeddingWork", "batch_size"): ROUNDING,
    ("TargetWork", "batch_size"): ROUNDING,
    ("DataSet", "name"): "the same samples under another name",
    ("DataSet", "groups"): "intervals are made later, from values of each sample",
    ("SpeedWork", "longest"): "it says how large a batch fills the GPU, and matters only there (below)",
}
# Fields of which both is right: what they decide is in the key by itself (tokens, identity), and may be there a second time.
EITHER = {("LocatedModel", "tokenizer"), ("LocatedModel", "seed")}

VALUES = {  # of the fields of items; a new one of text or a whole number needs no entry
    "model": MODEL, "dtype": torch.float32, "tokens": TOKENS, "plans": (PLAN,), "load": LOAD, "fill": False, "members": (),
    "limit": 10, "contexts": (4, 8), "plan": PLAN, "change": "LoRA", "items": (TEXT,), "versions": (("none", PLAN),),
    "requests": (([1], [2]),), "settings": Tuning(), "way": "repair, healing", "text": TOKENS, "healing": Healing(),
    "by": "search with repair",
    "data": DATA, "texts": (TOKENS,), "order": (4, 5),
}  # fmt: skip
OTHERS = {  # one or more other values of a field; of others follow from type
    "dtype": [torch.bfloat16],
    "tokens": [TOKENS + 1, TOKENS.flip(0), TOKENS.view(4, 3), TOKENS[:2]],
    "text": [TOKENS + 1],
    "texts": [(TOKENS + 1,), (TOKENS, TOKENS)],
    "order": [(5, 4), (4,)],
    ("Healing", "tokens"): [64],
    "minutes": [1.0],
    "members": [(types.SimpleNamespace(OUTPUT_TYPE="loglikelihood"),)],
    "limit": [11, None],
    "folder": [Path("there")],
    "published_lists": ["other"],
    "tokenizer": ["Other"],
    "on_hub": [("org/name", "commit")],
    "bases": [("sha256:base",)],
    "inputs": [IMAGES[::-1], (*IMAGES, IMAGES[0])],
    "labels": [np.array(["a", "a"])],
    "groups": [np.array([0, 0])],
    "maps": [{}, {("attention", 3): OTHER_MAP}, {("attention", 1): MAP}, {("mlp", 2): MAP}],
    "versions": [(("none", OTHER_PLAN),), (("8 bits", PLAN),)],
    "backend": ["compiled"],
    "alpha": [8.0],
    "learning_rate": [2e-3],
    "what": ["generation"],
    "room": [120, None],
    "by": ["NBL's bound", "greedy KL", "random"],
    "way": ["healing", "repair", "plain"],
}
MACHINE = {"processor": "P", "gpus": ["G"], "cpu_threads": 2}
LIBRARIES = {"torch": "2.13", "transformers": "5.17"}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine and libraries that tests can change: returns them."""
    code = dict(MACHINE) | {"versions": dict(LIBRARIES)}
    for module in (loads, ablations_module, served_module, changes_module, kept_module):
        monkeypatch.setattr(module, "code_provenance", lambda: code)
    return code


def classes(base=Work):
    """All kinds of work items, wherever they are declared; the studies are imported with STUDIES.

    A class that says no keys of its own holds what others share, and is no kind of item.
    """
    assert STUDIES
    found = [cls for direct in base.__subclasses__() for cls in (direct, *classes(direct))]
    return [cls for cls in found if "keys" in vars(cls)]


def default(field):
    return VALUES.get(field.name, {str: "some", int: 7}.get(field.type))


def build(cls):
    return cls(**{field.name: default(field) for field in dataclasses.fields(cls)})


def others(holder, field):
    """Other values of a field of an item, or of what it is made of."""
    value = getattr(holder, field.name)
    if dataclasses.is_dataclass(value):
        return []  # varied field by field
    if isinstance(holder, DropPlan) and field.name == "attention":
        return [(3,), (3, 1, 0)]
    if (known := OTHERS.get((type(holder).__name__, field.name), OTHERS.get(field.name))) is not None:
        return known
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return []
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, str):
        return [value + "!"]
    if isinstance(value, tuple):
        return [(0, *value)]
    pytest.fail(f"{type(holder).__name__}.{field.name} is {value!r}: say in OTHERS which other values it may have.")


def variations(item):
    """(class, field, changed item) for every field of the item and of the dataclasses in it."""
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        for other in others(item, field):
            yield type(item).__name__, field.name, dataclasses.replace(item, **{field.name: other})
        in_tuple = isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
        part = value[0] if in_tuple else value
        if dataclasses.is_dataclass(part):
            for name, inner, changed in variations(part):
                whole = (changed,) if in_tuple else changed
                yield name, inner, dataclasses.replace(item, **{field.name: whole})


def addresses(item):
    store = Store(Path("records"))
    return {store.path(key) for key in item.keys}


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_field_changes_the_address_or_is_exempt(cls):
    item = build(cls)
    assert len(addresses(item)) == 1
    tried = set()
    for name, field, changed in variations(item):
        tried.add((name, field))
        same = addresses(changed) == addresses(item)
        if (name, field) not in EITHER:
            assert same == ((name, field) in EXEMPT), f"{name}.{field}: {EXEMPT.get((name, field), 'it is not in the key')}"
    own = {field.name for field in dataclasses.fields(cls)}
    made_of = {
        "model": "LocatedModel",
        "plans": "DropPlan",
        "plan": "DropPlan",
        "load": "Load",
        "items": "TextWork",
        "settings": "Tuning",
        "healing": "Healing",
        "data": "DataSet",
    }
    parts = {made_of.get(name) for name in own}
    assert tried == {(cls.__name__, name) for name in own - set(made_of)} | {
        (part.__name__, field.name)
        for part in (LocatedModel, DropPlan, Load, work_module.TextWork, Tuning, Healing, DataSet)
        for field in dataclasses.fields(part)
        if part.__name__ in parts and not (issubclass(part, Work) and field.name in made_of)
    }


def test_no_exemption_is_of_a_field_that_is_gone():
    holders = (*classes(), LocatedModel, DropPlan, Load, DataSet)
    known = {(cls.__name__, f.name) for cls in holders for f in dataclasses.fields(cls)}
    assert set(EXEMPT) | EITHER <= known


def test_the_order_in_a_plan_does_not_matter():
    """The dropped model is the same."""
    for cls in (cls for cls in classes() if "plans" in {field.name for field in dataclasses.fields(cls)}):
        item = build(cls)
        turned = dataclasses.replace(item, plans=(dataclasses.replace(PLAN, attention=(1, 3)),))
        assert addresses(turned) == addresses(item)
        several = dataclasses.replace(item, plans=(DropPlan(), PLAN))
        assert len(addresses(several)) == 2
        assert addresses(item) == addresses(several.only([1])) < addresses(several), "each value has its own address"


def test_kinds_of_values_are_apart():
    """Also of items that share all their fields."""
    found = [key["measurement"] for cls in classes() for key in build(cls).keys]
    assert len(set(found)) == len(found) == 22


@pytest.mark.parametrize(
    ("cls", "module", "constant"),
    [
        ("ImportanceWork", work_module, "IMPORTANCE_VERSION"),
        ("IterativeWork", work_module, "IMPORTANCE_VERSION"),
        ("TextWork", work_module, "TEXT_VERSION"),
        ("TaskWork", work_module, "TASKS_VERSION"),
        ("SpeedWork", loads, "VERSION"),
        ("CausesWork", causes_module, "VERSION"),
        ("RankWork", causes_module, "VERSION"),
        ("OrderWork", ablations_module, "VERSION"),
        ("ContinuationWork", ablations_module, "TEXT_VERSION"),
        ("ProbeWork", asked_module, "VERSION"),
        ("GenerationWork", asked_module, "VERSION"),
        ("ConfidenceWork", asked_module, "CONFIDENCE_VERSION"),
        ("ChangedWork", changes_module, "VERSION"),
        ("ChangedSpeedWork", changes_module, "VERSION"),
        ("MadeWork", kept_module, "VERSION"),
        ("RankingWork", ranking_module, "IMPORTANCE_VERSION"),
        ("RankingWork", ranking_module, "TEXT_VERSION"),
        ("ChoiceWork", kept_module, "VERSION"),
        ("EncoderImportanceWork", encoders_module, "IMPORTANCE_VERSION"),
        ("EmbeddingWork", encoders_module, "VERSION"),
        ("TargetWork", encoders_module, "TARGETS_VERSION"),
        ("CheckpointWork", served_module, "VERSION"),
        ("ServedWork", served_module, "VERSION"),
    ],
)
def test_a_raised_version_changes_the_address(monkeypatch, cls, module, constant):
    item = build(next(known for known in classes() if known.__name__ == cls))
    before = addresses(item)
    monkeypatch.setattr(module, constant, getattr(module, constant) + 1)
    assert addresses(item).isdisjoint(before)


ALL = {"ImportanceWork", "TextWork", "TaskWork", "IterativeWork", "SpeedWork", "CausesWork", "RankWork"}
ALL |= {"OrderWork", "ContinuationWork", "CheckpointWork", "ServedWork", "EncoderImportanceWork", "EmbeddingWork"}
ALL |= {"ProbeWork", "GenerationWork", "ConfidenceWork", "ChangedWork", "ChangedSpeedWork", "MadeWork", "ChoiceWork"}
ALL |= {"RankingWork", "TargetWork"}


@pytest.mark.parametrize(
    ("package", "old", "new", "changed"),
    [
        ("lm_eval", "0.4.9", "0.4.10", {"TaskWork", "ConfidenceWork"}),
        ("cyllama", "0.2.18", "0.2.19", {"ServedWork"}),
        ("transformers", "5.17.0", "6.0.0", ALL),
        ("transformers", "5.17.0", "5.18.0", set()),  # the same code, rounding apart; times have the exact version (below)
    ],
)
def test_values_depend_on_versions_that_change_them(monkeypatch, package, old, new, changed):
    version, found = importlib.metadata.version, []
    for number in (old, new):
        monkeypatch.setattr(importlib.metadata, "version", lambda p, n=number: n if p == package else version(p))
        found.append({cls.__name__: addresses(build(cls)) for cls in classes()})
    assert {name for name in found[0] if found[0][name] != found[1][name]} == changed


def test_random_weights_depend_on_the_kind_of_device(monkeypatch):
    """One seed draws other numbers there; weights that are read are the same."""
    drawn = dataclasses.replace(MODEL, identity="random:hand")
    found = []
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)  # noqa: B023 (called in this round)
        items = [dataclasses.replace(build(cls), model=model) for model in (MODEL, drawn) for cls in classes()]
        found.append([addresses(item) for item in items])
    n = len(classes())
    assert found[0][:n] == found[1][:n]
    assert all(a.isdisjoint(b) for a, b in zip(found[0][n:], found[1][n:], strict=True))


@pytest.mark.parametrize(
    "change", [{"processor": "Q"}, {"gpus": ["G", "G"]}, {"gpus": []}, {"cpu_threads": 3}], ids=lambda change: str(change)
)
def test_times_depend_on_the_machine_and_nothing_else_does(machine, change):
    before = {cls: addresses(build(cls)) for cls in classes()}
    machine |= change
    timed = {"SpeedWork", "OrderWork", "ChangedSpeedWork", "MadeWork", "ChoiceWork"} | (
        set() if "gpus" in change else {"ServedWork"}
    )  # llama.cpp runs on the CPU
    assert {cls.__name__ for cls in classes() if addresses(build(cls)) != before[cls]} == timed


@pytest.mark.parametrize("library", LIBRARIES)
def test_times_depend_on_libraries_and_nothing_else_does(machine, library):
    before = {cls: addresses(build(cls)) for cls in classes()}
    machine["versions"][library] += ".1"
    assert [cls.__name__ for cls in classes() if addresses(build(cls)) != before[cls]] == ["SpeedWork"]


def test_a_batch_that_fills_the_gpu_is_found_by_how_long_its_sequences_grow():
    """How many fit is not known before; how many were asked for does not matter then."""
    filled = dataclasses.replace(build(loads.SpeedWork), fill=True)
    longer = dataclasses.replace(filled, longest=filled.longest + 1)
    more = dataclasses.replace(filled, load=dataclasses.replace(LOAD, batch_size=9))
    assert addresses(longer) != addresses(filled) == addresses(more)
