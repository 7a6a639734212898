"""A derived model locates, loads, measures and drops like any other, and takes the plans of its base."""

import dataclasses
import json

import accelerate
import encoder_decoder_families
import encoder_families
import families
import pytest
import torch

from llmdrop_utils import DropPlan, LLMDropError, drop, dropped, load_model, locate_model, measure_importance, select
from llmdrop_utils.derive.model import layers_restored, save_derived
from llmdrop_utils.dropping.plan import check_plan
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.load import load_located
from llmdrop_utils.models.locate import locate_folder

TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2))
RECIPE = {"method": "add", "how much": 0.5, "layers": (1, 2)}


@pytest.fixture
def base(tmp_path, cache):
    """A located base, and its model and tokenizer as loaded."""
    families.tiny("llama").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    located = locate_model(str(tmp_path / "base"))
    return located, *load_located(located, torch.float32, "cpu")


@pytest.fixture
def derived(base, tmp_path):
    located, model, tokenizer = base
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] += 0.5
    return save_derived(model, tokenizer, tmp_path / "Derived", located, RECIPE)


def test_one_changed_weight(base, derived, tmp_path):
    located, changed, _ = base
    assert derived == locate_model(str(tmp_path / "Derived"))
    assert (derived.name, derived.bases, located.bases) == (f"derived-{derived.identity[7:15]}", (located.identity,), ())
    assert derived.identity != located.identity
    model, tokenizer = load_model(str(tmp_path / "Derived"), torch.float32, "cpu")
    assert (model.llmdrop_identity, model.llmdrop_bases) == (derived.identity, (located.identity,))
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, changed(TOKENS).logits)
    assert {path.name for path in derived.folder.iterdir()} - {path.name for path in located.folder.iterdir()} == {
        "derived.json"
    }
    about = json.loads((derived.folder / "derived.json").read_text())
    assert (about["base"], about["bases"]) == (located.identity, [])
    assert about["recipe"] == {"method": "add", "how much": 0.5, "layers": [1, 2]}


def test_it_is_measured_and_takes_the_plans_of_its_base(base, derived):
    located, _, _ = base
    whole, _ = load_located(located, torch.float32, "cpu")
    model, _ = load_located(derived, torch.float32, "cpu")
    plan, own = (select(measure_importance(one, TOKENS), "attention", 1) for one in (whole, model))
    assert (plan.model, own.model) == (located.identity, derived.identity)
    for one in (plan, own):
        with dropped(model, one):
            assert not hasattr(model.model.layers[one.attention[0]].self_attn, "q_proj")
    with pytest.raises(LLMDropError, match=f"made for the model {derived.identity}, but this one is {located.identity}"):
        check_plan(whole, own)  # a base knows nothing of what is derived from it
    with pytest.raises(LLMDropError, match=f"made for the model sha256:other, but this one is {derived.identity}"):
        check_plan(model, dataclasses.replace(plan, model="sha256:other"))


def test_derived_from_what_is_derived(base, derived, tmp_path):
    model, tokenizer = load_located(derived, torch.float32, "cpu")
    model.model.norm.weight.data *= 2
    second = save_derived(model, tokenizer, tmp_path / "second", derived, {"method": "double"})
    assert second.bases == (derived.identity, base[0].identity)
    again, _ = load_located(second, torch.float32, "cpu")
    for identity in (second.identity, *second.bases):
        check_plan(again, DropPlan((1,), model=identity))
    with pytest.raises(LLMDropError, match="made for the model sha256:other"):
        check_plan(again, DropPlan((1,), model="sha256:other"))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about | {"recipe": {"method": "subtract"}},
        lambda about: about | {"base": "sha256:other"},
        lambda about: about | {"hash": "0" * 64},
        None,
    ],
)
def test_what_does_not_belong_together(derived, change):
    path = derived.folder / "derived.json"
    if change is None:
        families.tiny("llama").save_pretrained(derived.folder)
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(LLMDropError, match=r"derived is not the model that its derived.json describes: its hash is "):
        locate_folder("derived", derived.folder)
    path.unlink()
    assert locate_folder("derived", derived.folder).bases == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": "llmdrop derived model 1", "base": "sha256',
        b"\xff\xfe\x00",
        b"[]",
        b'{"format": "another", "base": "sha256:1", "recipe": {}, "hash": "0"}',
        b'{"format": "llmdrop derived model 1", "recipe": {}, "hash": "0"}',
        b'{"format": "llmdrop derived model 1", "base": 5, "recipe": {}, "hash": "0"}',
        b'{"format": "llmdrop derived model 1", "base": "sha256:1", "bases": 5, "recipe": {}, "hash": "0"}',
        b'{"format": "llmdrop derived model 1", "base": "sha256:1", "recipe": "none", "hash": "0"}',
    ],
)
def test_damaged_file(derived, content):
    (derived.folder / "derived.json").write_bytes(content)
    with pytest.raises(LLMDropError, match=r"derived.json of derived-\w{8} is damaged \(.*Derive the model again, or delete"):
        locate_model(str(derived.folder))


def test_what_cannot_be_saved(base, derived, tmp_path):
    located, model, tokenizer = base
    save = lambda **how: save_derived(  # noqa: E731
        **{"model": model, "tokenizer": tokenizer, "folder": tmp_path / "new", "base": located, "recipe": RECIPE} | how
    )
    with pytest.raises(LLMDropError, match="Derived exists already. Give a derived model a folder of its own"):
        save(folder=tmp_path / "Derived")
    with pytest.raises(LLMDropError, match="A recipe must be plain JSON"):
        save(recipe={"weights": TOKENS})
    with pytest.raises(LLMDropError, match=f"loaded from {located.identity}, but the base is {derived.identity}"):
        save(base=derived)
    with dropped(model, DropPlan(mlp=(2,))), pytest.raises(LLMDropError, match="The MLP of layer 2 is dropped"):
        save()
    with pytest.raises(LLMDropError, match="The attention of layer 1 is dropped, so its weights could not be stored"):
        save(model=drop(model, DropPlan((1,), (2,))))
    with pytest.raises(LLMDropError, match="This bert model is an encoder, which predicts no next token"):
        save(model=encoder_families.tiny("bert"))
    with pytest.raises(LLMDropError, match="This t5 model is an encoder-decoder"):
        save(model=encoder_decoder_families.tiny("t5"))
    assert [path.name for path in tmp_path.iterdir() if "new" in path.name and path.suffix != ".lock"] == []


def test_layers_that_are_offloaded_cannot_be_restored(tmp_path):
    model = accelerate.disk_offload(families.tiny("llama"), tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(LLMDropError, match="Weights of this model are offloaded"), layers_restored(model):
        raise AssertionError("it began to change the model")
