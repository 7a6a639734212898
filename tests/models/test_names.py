"""What a user writes for a model, and what it is called: two different models are never called the same."""

import os
import shutil
import unicodedata

import families
import pytest
import torch
from gguf_files import make_llama, split_gguf, write_gguf
from safetensors.torch import load_file, save_file

from llmdrop_utils import LLMDropError, load_model, load_profile, locate_model, locate_series
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.names import label, local_path, plain_name
from llmdrop_utils.models.outlook import outlook
from llmdrop_utils.sources import sizes


def save(folder, seed):
    torch.manual_seed(seed)
    families.tiny("llama", vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def run_of(name):
    return load_profile("cpu", name).run


def test_folders_of_one_name(tmp_path, cache):
    """Each has its run, which is named after it and after its content."""
    names = [save(tmp_path / parent / "final", seed) for seed, parent in enumerate("ab")]
    located = [locate_model(name) for name in names]
    assert [run_of(name) for name in names] == [f"cpu-final-{model.identity[7:15]}" for model in located]
    assert [model.name for model in located] == [run_of(name).removeprefix("cpu-") for name in names]
    assert [outlook(name, sizes.Hub()).name for name in names] == [model.name for model in located]
    assert len({run_of(name) for name in names}) == 2
    shutil.copytree(names[0], tmp_path / "c" / "final")
    assert run_of(str(tmp_path / "c" / "final")) == run_of(names[0]), "the same model in another place"


def test_a_folder_whose_weights_change(tmp_path, cache):
    name = save(tmp_path / "final", 0)
    before = run_of(name)
    file = tmp_path / "final" / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(32)}, file, {"format": "pt"})
    assert run_of(name) != before
    assert run_of(name) == run_of(f"{name}/")


@pytest.mark.parametrize("names", [("Modell", "modell"), ("модель", "модели"), ("模型", "モデル"), ("a b", "a-b"), ("é", "e")])
def test_names_in_other_letters(tmp_path, cache, names):
    folders = [save(tmp_path / name, seed) for seed, name in enumerate(names)]
    runs = [run_of(folder) for folder in folders]
    assert len({run.lower() for run in runs}) == 2
    for name, run in zip(names, runs, strict=True):
        assert run.startswith(f"cpu-{name.lower().replace(' ', '-')}-"), "it stays readable"
        assert (tmp_path / "results" / run).name == run


def test_letters_that_a_file_system_takes_apart(tmp_path, cache):
    whole, apart = (save(tmp_path / unicodedata.normalize(form, "modèle"), 0) for form in ("NFC", "NFD"))
    assert run_of(whole) == run_of(apart)


def test_gguf_files_of_one_name(tmp_path, cache):
    for seed, parent in enumerate("ab"):
        (tmp_path / parent).mkdir()
        torch.manual_seed(seed)
        write_gguf(tmp_path / parent / "final.gguf", *make_llama())
    names = [str(tmp_path / parent / "final.gguf") for parent in "ab"]
    assert len({run_of(name) for name in names}) == 2
    for name in names:
        plan = outlook(name, sizes.Hub())
        assert plan.identity is None, "not converted yet: what another file of this name became says nothing"
        located = locate_model(name)
        assert located.name == plan.name == run_of(name).removeprefix("cpu-")
        assert outlook(name, sizes.Hub()).identity == located.identity
    shards = split_gguf(tmp_path / "a" / "final.gguf", tmp_path, "final", (10, 20))
    assert run_of(str(shards[0])) == run_of(str(shards[1])) != run_of(names[1])


def test_a_folder_beside_a_name_of_the_catalogue(tmp_path, cache, monkeypatch):
    """The name means the catalogue's model; ./name means the folder."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "tiny-llama", 0)
    assert load_profile("cpu", "tiny-llama").models == ["tiny-llama"]
    assert run_of("tiny-llama") == "cpu-tiny-llama"
    assert run_of("./tiny-llama") == f"cpu-tiny-llama-{locate_model('./tiny-llama').identity[7:15]}"
    assert locate_model("./tiny-llama").identity != locate_model("tiny-llama").identity


def test_names_on_the_hub():
    """Of two organisations, of two revisions; what could be read in two ways is written in two."""
    names = ["a/model", "b/model", "a/model@v1", "a/model@V1", "a/model@v2", f"a/model@{'1' * 40}", f"a/model@{'2' * 40}",
             "a/x-y", "a-x/y", "a.x/y", "a/model@x/y", "a/model@x-y", "a-model", "smollm2-135m"]  # fmt: skip
    assert len({run_of(name) for name in names}) == len(names)
    assert run_of("Qwen/Qwen3-8B") == "cpu-qwen--qwen3-8b"
    assert all(os.sep not in run_of(name) for name in names)


def test_runs_that_are_committed_keep_their_names():
    assert load_profile("cpu").run == "cpu"
    assert run_of("medium-llama") == "cpu-medium-llama"


def test_directories_of_checkpoints(tmp_path, cache):
    """Two series of one name; the same models in both would be the same series."""
    for seed, parent in enumerate("ab"):
        for step in (1, 2):
            save(tmp_path / parent / "run" / f"checkpoint-{step}", 10 * seed + step)
    names = [str(tmp_path / parent / "run") for parent in "ab"]
    found = [locate_series(name)[0][0] for name in names]
    assert [f"cpu-{series.name}" for series in found] == [run_of(name) for name in names]
    assert len({stage.model.name for series in found for stage in series.stages}) == 4
    before = run_of(names[0])
    save(tmp_path / "a" / "run" / "checkpoint-2", 99)
    assert run_of(names[0]) != before


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("org/model/", "org/model"),
        (" org/model ", "org/model"),
        ("https://huggingface.co/org/model", "org/model"),
        ("https://huggingface.co/org/model/", "org/model"),
        ("huggingface.co/org/model?library=transformers", "org/model"),
        ("https://hf.co/org/model/tree/main", "org/model"),
        ("https://huggingface.co/org/model/tree/v2", "org/model@v2"),
        ("https://huggingface.co/org/model/tree/refs%2Fpr%2F1", "org/model@refs/pr/1"),
        (f"https://huggingface.co/org/model/commit/{'a' * 40}", f"org/model@{'a' * 40}"),
        ("./folder/", "./folder"),
        ("smollm2-135m", "smollm2-135m"),
    ],
)
def test_ways_to_write_a_name(written, meant):
    assert plain_name(written) == meant
    assert label(written) == label(meant)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://huggingface.co/org/model/blob/main/model.gguf", "Give the hub id org/model, or org/model@<revision>"),
        ("https://huggingface.co/org/model/tree/main/checkpoint-5", "Give the hub id org/model"),
        ("https://huggingface.co/datasets/org/data", "is no page of a model on the hub. Give a hub id"),
        ("https://example.org/org/model", "is no page of a model on the hub"),
        ("https://huggingface.co/org", "is no page of a model on the hub"),
    ],
)
def test_addresses_of_something_else(address, message):
    for use in (locate_model, locate_series, lambda name: outlook(name, sizes.Hub()), run_of):
        with pytest.raises(LLMDropError, match=message):
            use(address)


@pytest.mark.parametrize("name", ["", " ", None, 7, "https://[x/org/model"])
def test_what_is_no_name(name):
    for use in (load_model, locate_model, locate_series):
        with pytest.raises(LLMDropError, match=r"Expected a model: a name of data/sources.yaml, a hub id|is no address"):
            use(name)


def test_paths_are_names(tmp_path, cache):
    save(tmp_path / "m", 0)
    assert plain_name(tmp_path / "m") == str(tmp_path / "m")
    assert locate_model(tmp_path / "m").identity == locate_model(str(tmp_path / "m")).identity


@pytest.mark.parametrize("name", ["~nosuchuser/model", "x" * 300, "a\0b"])
def test_paths_that_no_system_has(name):
    assert local_path(name) is None
    with pytest.raises(LLMDropError, match=r"There is no folder or .gguf file|Unknown model"):
        locate_model(name)


def test_a_page_of_the_hub_is_its_model(tmp_path, network, cache):
    save(tmp_path / "m", 0)
    network.repositories["org/model"] = {"c" * 40: {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}}
    for name in ("org/model/", f"{network.address}/org/model", f"{network.address}/org/model/tree/main"):
        assert locate_model(name).identity == f"hub:org/model@{'c' * 40}"
        assert locate_model(name).name == "org/model"


@pytest.mark.parametrize("away", [False, True])
def test_mistyped_paths(tmp_path, network, cache, monkeypatch, away):
    """They end in what is there instead, also where the hub cannot be reached."""
    network.down = away
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "model", 0)
    save(tmp_path / "models" / "foo", 1)
    hints = {"./modle": "'model'", "~/modle": "'model'", "models/fooo": "'foo'"}
    others = ["models/foo/bar", "/nowhere/x", "../nowhere.gguf", "models\\foo"]
    for name, hint in (hints | dict.fromkeys(others)).items():
        for use in (locate_model, locate_series, lambda name: outlook(name, sizes.Hub())):
            with pytest.raises(LLMDropError, match=r"There is no (folder|file)") as caught:
                use(name)
            assert hint is None or f"Did you mean {hint}, in the same folder?" in str(caught.value)
            assert not str(caught.value).startswith("The hub")
    assert not [path for _, path, _ in network.requests if "fooo" not in path]
    with pytest.raises(LLMDropError, match="is a file, but no .gguf file. Give the directory"):
        locate_model("./model/config.json")
