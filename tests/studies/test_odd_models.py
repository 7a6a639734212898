"""Whole notebooks, cell by cell, on models that are shallow, know few positions, or have a tokenizer without special tokens.

With the settings of the profile `cpu`, but for how much is read.
"""

import json

import families
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from multimodal import gemma3, multimodal
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llmdrop_utils import load_profile
from llmdrop_utils.base import files
from llmdrop_utils.base.errors import NotApplicable
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.studies import page as page_module

pytestmark = pytest.mark.slow

LESS = {
    "calibration": {"corpora": ["random-words", "random-digits"], "n_samples": 4, "seq_len": 64, "sample_counts": [1, 2]},
    "text": {"n_samples": 2, "seq_len": 32},
    "tasks": {"names": ["openbookqa", "winogrande"], "limit": 3},
    "iterative": {"n_samples": 2},
    "speed": {"repeats": 2, "prompt": 64, "new_tokens": 64, "contexts": [16, 64, 128], "steps": 2},
    "ablations": {
        "n_samples": 2,
        "stepwise_samples": 1,
        "seeds": 2,
        "n_drop": [2, 4],
        "text_samples": 2,
        "task_n": [2],
        "task_limit": 3,
        "samples": [1],
        "lengths": [16],
        "blocks": [1],
        "prompt": 8,
        "new_tokens": 4,
    },
    "what_breaks": {
        "n_drop": [2, 4],
        "text_samples": 2,
        "task_limit": 3,
        "answers_limit": 1,
        "answers_n": [1],  # none of those that the other abilities are asked under
        "answer_tokens": 4,
        "prompts": 2,
        "prompt": 8,
        "new_tokens": 4,
        "contexts": [64],
        "probes": 2,
    },
    "changes": {
        "n_drop": [2],
        "n_samples": 2,
        "tuned": {"attention": [2]},
        "tuning_samples": 2,
        "text_samples": 2,
        "task_limit": 3,
        "context": 16,
        "steps": 2,
        "repeats": 2,
    },
    "keep_more": {
        "n_drop": [2],
        "ways": ["Prune&Comp", "repair", "healing"],
        "chosen": {"search with repair": ["repair"]},
        "n_samples": 2,
        "search_samples": 2,
        "candidates": 2,
        "healing_samples": 2,
        "healing_tokens": 128,
        "healing_batch": 2,
        "text_samples": 2,
        "task_limit": 3,
        "context": 48,
        "probes": 2,
        "prompts": 2,
        "prompt": 8,
        "new_tokens": 4,
    },
    "take_away": {"kinds": ["F16"], "n_drop": [2], "steps": 2, "new_tokens": 4},
    "stages": {"seeds": 1, "corpus": "random-words", "n_samples": 2, "text_samples": 2, "seq_len": 32},
}
NOTEBOOKS = {path.stem: path for path in sorted(files.NOTEBOOKS.glob("*.ipynb"))}
OF_DECODERS = [name for name in NOTEBOOKS if name != "12_other_transformers"]


@pytest.fixture
def open_notebook(tmp_path, monkeypatch):
    """Run the code cells of a notebook on a folder with a model; returns its page."""
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(page_module, "load_profile", lambda name, model: load_profile("cpu", model).replacing(**LESS))
    said = []
    monkeypatch.setattr(page_module, "display", lambda what: said.append(getattr(what, "data", "")))

    def run(name, folder):
        cells = [cell.source for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells if cell.cell_type == "code"]
        space = {"PROFILE": "cpu", "MODEL": str(folder)}
        for code in cells[1:]:  # the first holds the parameters
            exec(compile(code, name, "exec"), space)
            plt.close("all")
        space["page"].said = said
        return space["page"]

    return run


def save(folder, tokenizer=None, **changes):
    torch.manual_seed(0)
    families.tiny(**{"name": "llama", "vocab_size": 257, "max_position_embeddings": 2048} | changes).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_shallow_models(open_notebook, tmp_path, n_layers):
    """Fewer layers than the profile drops: what cannot be computed is left out."""
    folder = save(tmp_path / "shallow", num_hidden_layers=n_layers)
    for name in OF_DECODERS:
        if name == "05_speedup":  # under `cpu` 4 layers or more are dropped, of more than there are
            with pytest.raises(NotApplicable, match=rf"times more dropped layers than there are: .* has {n_layers}\."):
                open_notebook(name, folder)
        elif name[:2] in ("04", "08", "09", "10") and n_layers <= 2:
            with pytest.raises(NotApplicable, match=rf"has {n_layers} layers, and the profile drops 2 or more\."):
                open_notebook(name, folder)
        else:
            page = open_notebook(name, folder)
            if name[:2] == "08":
                answers = page.tables["abilities"].query("ability == 'mathematics'")
                assert list(zip(answers["kind"], answers["n"], strict=True)) == [("dense", 0), ("attention", 1)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # computed and learned positions
def test_models_that_know_few_positions(open_notebook, tmp_path, monkeypatch, family):
    monkeypatch.setitem(LESS, "calibration", LESS["calibration"] | {"seq_len": 160})
    monkeypatch.setitem(LESS, "speed", LESS["speed"] | {"prompt": 96, "contexts": [16, 96, 160]})
    few = {"max_position_embeddings": 128}
    if family == "gpt2":
        few |= {"n_positions": 128, "bos_token_id": 1, "eos_token_id": 2, "n_layer": 6}
    folder = save(tmp_path / "short", name=family, num_hidden_layers=6, **few)
    for name in OF_DECODERS:
        if name[:2] == "09" and family == "gpt2":
            with pytest.raises(NotApplicable, match="This gpt2 model cannot be exported for llama.cpp without layers"):
                open_notebook(name, folder)
            continue
        page = open_notebook(name, folder)
        told = {row.what: row.reason for row in page.tables["not_run"].itertuples()}
        if name[:2] in ("01", "02", "03", "04", "08"):
            (reason,) = [reason for what, reason in told.items() if what.endswith("samples of 160 tokens")]
            assert reason == "The model knows 128 positions, so that its samples are no longer than that."
        if name[:2] == "05":
            assert any(what.endswith("loads of more than 128 tokens") for what in told) == (family == "gpt2")
    entries = json.loads((page_module.files.local(page.profile.run).tables / "01_similarity" / "provenance.json").read_text())
    assert {(entry["positions"], entry["tokens"][1]) for entry in entries} == {(128, 128)}


def test_a_tokenizer_without_special_tokens(open_notebook, tmp_path):
    rules = json.loads(byte_tokenizer().backend_tokenizer.to_str()) | {"added_tokens": []}
    folder = save(tmp_path / "bare", PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules))))
    page = open_notebook("02_drop_curves", folder)
    assert set(page.tables["tasks"]["task"]) == {"openbookqa", "winogrande"}


@pytest.mark.parametrize(
    ("kind", "text"), [("llava", "llama"), ("qwen2_vl", "qwen2"), ("smolvlm", "llama"), ("gemma3", "gemma3_text")]
)
def test_the_text_part_of_a_multimodal_model(open_notebook, tmp_path, kind, text):
    """It is measured as a decoder, and the page says so."""
    shape = {"vocab_size": 300, "max_position_embeddings": 512}
    (gemma3(**shape) if kind == "gemma3" else multimodal(kind, **shape)).save_pretrained(tmp_path / "both")
    byte_tokenizer().save_pretrained(tmp_path / "both")
    page = open_notebook("01_similarity", tmp_path / "both")
    assert set(page.tables["importance"]["layer"]) == {0, 1, 2}
    (said,) = [said for said in page.said if "is multimodal" in str(said)]
    assert f"({kind}). What is measured is its text part, on text alone: a {text} decoder." in said
    with pytest.raises(NotApplicable, match=rf"^The text part of both-\w+ \({kind}\) is a decoder, and this notebook is about"):
        open_notebook("12_other_transformers", tmp_path / "both")
