"""Models by name, directory, GGUF file and hub id; and everything that is not a model."""

import dataclasses
import json
import shutil
from unittest import mock

import families
import pytest
import sentencepiece
import torch
from gguf_files import make_llama, write_gguf
from safetensors.torch import load_file, save_file

from llmdrop_utils import DropPlan, LLMDropError, drop, load_model, locate_available
from llmdrop_utils.models import convert, load
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.load import load_located, load_tokenizer, model_of_shape
from llmdrop_utils.models.locate import locate_model


@pytest.fixture
def folder(tmp_path):
    """A directory with a tiny Qwen3 and a tokenizer."""
    families.tiny("qwen3").save_pretrained(tmp_path / "My Qwen3")
    byte_tokenizer().save_pretrained(tmp_path / "My Qwen3")
    return tmp_path / "My Qwen3"


def change(folder):
    """Alter one weight."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def llama():
    return make_llama()


def test_named_model_is_made_once(cache):
    first = locate_model("tiny-llama")
    assert first.identity == locate_model("tiny-llama").identity
    assert first.identity.startswith("sha256:")
    model, tokenizer = load_located(first)
    assert not model.training
    assert tokenizer.decode(tokenizer("h\u00e9, x")["input_ids"]) == "h\u00e9, x"


def test_directory(folder, cache):
    located = locate_model(str(folder))
    assert located.name == f"my-qwen3-{located.identity[7:15]}", "the path itself must not get into results"
    model, _ = load_located(located)
    assert model.config.model_type == "qwen3"
    before = located.identity
    weights = families.tiny("qwen3")
    weights.model.norm.weight.data += 1
    weights.save_pretrained(folder)
    assert locate_model(str(folder)).identity != before, "other weights are another model"


def test_gguf_gives_the_same_logits(tmp_path, cache, llama):
    model, tokenizer = llama
    write_gguf(tmp_path / "Tiny.gguf", model, tokenizer)
    again, its_tokenizer = load_model(str(tmp_path / "Tiny.gguf"), dtype=torch.float32, device="cpu")
    tokens = torch.randint(0, 257, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert its_tokenizer("abcab")["input_ids"] == tokenizer("abcab")["input_ids"]
    folder = locate_model(str(tmp_path / "Tiny.gguf")).folder
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert (locate_model(str(tmp_path / "Tiny.gguf")).folder / "config.json").stat().st_mtime_ns == stamp, "converted once"


def test_hub_model(folder, network):
    commit = "a1" * 20
    network.repositories["org/tiny-qwen3"] = {
        commit: {p.name: p.read_bytes() for p in folder.iterdir()} | {"pytorch_model.bin": b"pickle", "modeling.py": b"1/0"}
    }
    for name in ("org/tiny-qwen3", f"org/tiny-qwen3@{commit}"):
        located = locate_model(name)
        assert located.identity == f"hub:org/tiny-qwen3@{commit}"
        assert not {"pytorch_model.bin", "modeling.py"} & {p.name for p in located.folder.iterdir()}
    model, _ = load_model("org/tiny-qwen3")
    assert model.config.model_type == "qwen3"


def test_tokenizer_with_code_of_its_own(folder, cache, tmp_path):
    """As MAP-Neo's: the class is Python code in the repository. It is not run; the class named in sources.yaml reads it."""
    for file in folder.iterdir():
        file.unlink()
    families.tiny("llama").save_pretrained(folder)
    text = "the quick brown fox jumps over the lazy dog, 1 2 3 4 5 6 7 8 9 0\n  again and again\n"
    (tmp_path / "text").write_text(text * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)  # fmt: skip
    code = {"tokenizer_class": "NEOTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_neo.NEOTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    (folder / "tokenization_neo.py").write_text("raise SystemExit('executed!')")
    located = locate_model(str(folder))
    with pytest.raises(LLMDropError, match=r"tokenizer of my-qwen3-\w{8} could not be loaded"):
        load_tokenizer(located)
    tokenizer = load_tokenizer(dataclasses.replace(located, tokenizer="LlamaTokenizer"))
    truth = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    for sentence in ("the lazy  dog", "quick é 42\n  x"):
        assert tokenizer(sentence, add_special_tokens=False)["input_ids"] == truth.encode(sentence)


def test_some_of_several_models(network, cache):
    located, reasons = locate_available(["org/none", "tiny-llama"])
    assert [m.name for m in located] == ["tiny-llama"]
    assert "The hub has no model 'org/none'" in reasons["org/none"]
    with pytest.raises(LLMDropError, match="None of these models is available:\nThe hub has no model 'org/none'"):
        locate_available(["org/none", "org/nothing"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", r"Unknown model 'smollm2-135'. Did you mean 'smollm2-135m'\?"),
        ("", "Expected a model: a name of data/sources.yaml, .* found ''"),
        ("./nowhere", r"There is no folder or .gguf file ./nowhere: .* holds no 'nowhere'.* Give a directory with config.json"),
        ("small-llama", r"small-llama is a series of checkpoints: notebook 07 follows it \(NOTEBOOKS=07\)"),
        ("nowhere.gguf", "There is no file nowhere.gguf"),
        ("nowhere.GGUF", "There is no file nowhere.GGUF"),
        ("random:llama-9", "There is no shape 'llama-9'. There are: llama-2-7b, llama-2-13b"),
    ],
)
def test_unknown_models(name, message):
    with pytest.raises(LLMDropError, match=message):
        locate_model(name)


def test_a_shape_with_random_weights(cache):
    located = locate_model("random:tiny-llama")
    assert located.is_random
    assert located.identity.startswith("random:")
    assert located == locate_model("random:tiny-llama")
    model, tokenizer = load_located(located)
    again, _ = load_located(located)
    assert tokenizer is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.llmdrop_identity == located.identity
    with pytest.raises(LLMDropError, match="random:tiny-llama has no tokenizer: random weights are for notebooks 05 and 06"):
        load_tokenizer(located)


def test_shapes_are_those_of_the_paper_s_models(cache):
    """Numbers of parameters as published, on the device without memory."""
    published = {"llama-2-7b": 6.74e9, "llama-2-13b": 13.02e9, "llama-2-70b": 68.98e9, "mistral-7b-v0.1": 7.24e9,
                 "llama-3-8b": 8.03e9, "llama-3-70b": 70.55e9}  # fmt: skip
    for name, expected in published.items():
        model = model_of_shape(locate_model(f"random:{name}"), torch.bfloat16, "meta")
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=2e-3)


def test_folders_that_are_no_models(folder, cache):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LLMDropError, match="pickled weights .* can run code when loaded"):
        locate_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(LLMDropError, match="has no config.json"):
        locate_model(str(folder))


def test_damaged_files(folder, cache, tmp_path):
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(LLMDropError, match=r"my-qwen3-\w{8} could not be loaded: "):
        load_model(str(folder))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(LLMDropError, match=r"bad-\w{8} is not a GGUF file that transformers can read"):
        locate_model(str(tmp_path / "bad.gguf"))
    assert not list((cache / "models").glob("bad*")), "a failed conversion leaves nothing behind"


def test_missing_weights_are_not_made_up(folder, cache, tmp_path):
    """transformers fills them with random numbers: what was saved without some sub-layers would load as a whole model."""
    model, tokenizer = load_model(str(folder), torch.float32)
    drop(model, DropPlan((1,), (0,))).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(
        LLMDropError, match=r"saved-\w{8} lacks [0-9]+ of the weights that its config.json promises, such as model.layers.0"
    ):
        load_model(str(tmp_path / "saved"))


def test_full_disk_while_converting(tmp_path, cache, llama, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", *llama)

    monkeypatch.setattr(convert, "write_weights", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(LLMDropError, match="The disk is full"):
        locate_model(str(tmp_path / "tiny.gguf"))
    assert not [path for path in (cache / "models").iterdir() if path.suffix != ".lock"]


def test_leftovers_of_a_killed_conversion_go(tmp_path, cache, llama):
    write_gguf(tmp_path / "tiny.gguf", *llama)
    folder = locate_model(str(tmp_path / "tiny.gguf")).folder
    folder.rename(left := folder.with_name(f".{folder.name}.buildingxyz"))
    locate_model(str(tmp_path / "tiny.gguf"))
    assert folder.exists()
    assert not left.exists()


def test_two_models_of_one_name(folder, tmp_path, cache):
    """Tables tell them apart; what is one model twice is an error."""
    (tmp_path / "b").mkdir()
    other = shutil.copytree(folder, tmp_path / "b" / folder.name)
    with pytest.raises(LLMDropError, match=r"The model 'my-qwen3-\w{8}' is given twice in one run"):
        locate_available([str(folder), str(other)])
    change(other)
    located, _ = locate_available([str(folder), str(other)])
    assert [model.name for model in located] == [f"my-qwen3-{model.identity[7:15]}" for model in located]
    assert located[0].name != located[1].name


def test_families_without_sdpa_load_too(tmp_path, cache):
    families.tiny("gemma2").save_pretrained(tmp_path / "gemma2")
    byte_tokenizer().save_pretrained(tmp_path / "gemma2")
    model, _ = load_model(str(tmp_path / "gemma2"))
    assert model.config._attn_implementation == ("sdpa" if type(model)._supports_sdpa else "eager")  # by the version


@pytest.mark.real
def test_real_model_speaks(real_model):
    model, tokenizer = real_model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("large", [1 << 23, 0])
def test_products_of_bfloat16_in_float32(monkeypatch, bias, large):
    """Large weights are converted in pieces; the last one is narrower. No bit differs from converting them at once."""
    monkeypatch.setattr(load._Float32Products, "LARGE", large)
    monkeypatch.setattr(load._Float32Products, "PIECE", 1)
    layer = torch.nn.Linear(24, 1300, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    exact = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None).bfloat16()
    calls = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: calls.append(len(given[1])) or real(*given))
    layer.__class__ = load._Float32Products
    assert torch.equal(layer(x), exact)
    assert calls == ([1300] if large else [512, 512, 276])
