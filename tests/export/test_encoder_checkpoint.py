"""Dropped encoders on disk: what is loaded is what was saved, to the bit, and nothing loads it as something else."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from encoder_families import CASES, inputs, read, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from llmdrop_utils import DropPlan, LLMDropError, dropped, embed, load_dropped, load_encoder, measure_importance, save_dropped
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.encoders import ImageSettings, Pooling

PLAN = DropPlan((2, 0), (1,))
SETTINGS = ImageSettings(24, 24, 30, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 3)


def reader_of(name):
    return SETTINGS if CASES[name].is_vision else byte_tokenizer()


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
    model, given = tiny(name), inputs(name)
    folder = save_dropped(model, reader_of(name), PLAN, tmp_path / "m")
    again, reader = load_dropped(folder, torch.float32, "cpu")
    with dropped(model, PLAN):
        expected, kept = read(model, given), dict(model.named_parameters())
    assert torch.equal(read(again, given), expected)
    assert {key: p.shape for key, p in again.named_parameters()} == {key: p.shape for key, p in kept.items()}
    on_disk = load_file(folder / "model.llmdrop.safetensors")  # under the names of published checkpoints
    assert sum(weight.numel() for weight in on_disk.values()) == sum(weight.numel() for weight in kept.values())
    assert (again.training, again.llmdrop_plan.key) == (False, PLAN.key)
    assert reader == SETTINGS if CASES[name].is_vision else reader("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    assert measure_importance(again, given).gone == {("attention", 0), ("attention", 2), ("mlp", 1)}


def test_its_embeddings(tmp_path):
    """A sentence encoder keeps how it pools."""
    model, texts = tiny("bert", vocab_size=257), ["a cat", "rates rose"]
    for pooling in (Pooling("cls", normalise=False), Pooling("mean", normalise=True)):
        model.llmdrop_pooling = pooling
        save_dropped(model, byte_tokenizer(), PLAN, tmp_path / pooling.mode)
        again, reader = load_dropped(tmp_path / pooling.mode, torch.float32, "cpu")
        assert again.llmdrop_pooling == pooling
        with dropped(model, PLAN):
            expected = embed(model, byte_tokenizer(), texts)
        np.testing.assert_array_equal(embed(again, reader, texts), expected)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_poolers_and_heads_are_left_out(name, tmp_path):
    config = AutoConfig.for_model(CASES[name].model_type, **CASES[name].settings)
    wholes = [AutoModel.from_config(config), *([AutoModelForMaskedLM.from_config(config)] if name == "bert" else [])]
    assert wholes[0].pooler is not None
    for i, whole in enumerate(wholes):
        save_dropped(whole.eval(), None, PLAN, tmp_path / str(i))
        again, reader = load_dropped(tmp_path / str(i), torch.float32, "cpu")
        with dropped(whole, PLAN):
            assert torch.equal(read(again, inputs(name)), read(whole.base_model, inputs(name)))
        assert (again.pooler, reader) == (None, None)
    assert wholes[0].pooler is not None


def test_a_weight_that_is_missing(tmp_path):
    save_dropped(tiny("bert"), None, PLAN, tmp_path / "m")
    path = tmp_path / "m" / "model.llmdrop.safetensors"
    save_file({key: w for key, w in load_file(path).items() if "layer.1.attention.self.query" not in key}, path)
    with pytest.raises(LLMDropError, match="lacks 2 of the weights .*encoder.layer.1.attention.self.query"):
        load_dropped(tmp_path / "m")
    with pytest.raises(
        LLMDropError, match="is a dropped model, and what is asked for is a dense one. Load it with load_dropped"
    ):
        load_encoder(str(tmp_path / "m"))


LOAD = """
import sys
from transformers import AutoModel, BertModel
for kind in (AutoModel, BertModel):
    try:
        kind.from_pretrained(sys.argv[1])
        print("loaded")
    except (OSError, ValueError) as error:
        print(error)
"""


def test_transformers_alone_refuses(tmp_path):
    save_dropped(tiny("bert"), None, PLAN, tmp_path / "m")

    def run(code):
        command = [sys.executable, "-c", code, str(tmp_path / "m")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    said = run(LOAD)
    assert "loaded" not in said
    assert "has model type `llmdrop_utils` but Transformers does not recognize this architecture" in said
    assert "Error no file named model.safetensors" in said
    with_it = run("import llmdrop_utils" + LOAD.replace(", BertModel):", ",):"))
    assert with_it.strip() == "loaded"
