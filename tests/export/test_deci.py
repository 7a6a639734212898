"""Folders for vLLM and MLX-LM: what a reader of their schema predicts is what the model with zeroed terms does."""

import copy
import importlib.util
import json
import pickle

import pytest
import torch
from gguf_files import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmdrop_utils import DropPlan, LinearMap, LLMDropError, dropped, load_model
from llmdrop_utils.export import deci
from llmdrop_utils.export.deci import export_deci, mlx_logits, settings_of
from llmdrop_utils.export.deci_reader import DeciReader

WIDE = {"intermediate_size": 256}  # readers round the width of an MLP up to a multiple of 256
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
PLANS = {
    "attention": DropPlan(attention=(1,)),
    "the last attention and MLP": DropPlan(attention=(2,), mlp=(2,)),
    "MLPs": DropPlan(mlp=(0, 1)),
    "a block": DropPlan(attention=(1,), mlp=(1,)),
}


@pytest.fixture(autouse=True)
def without_mlx(monkeypatch):
    """The reader of the schema alone; the tests of MLX-LM ask for it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mlx_lm" else find(name, *a))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_kind_of_layer(tmp_path, family, plan):
    """The biases of Qwen2 included, which has none at the output projection."""
    model, tokenizer = tiny(family, **WIDE)
    parity = export_deci(model, tokenizer, plan, tmp_path / "out", "vllm")
    assert parity.log_probability < 0.0005
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids == tokenizer("abc").input_ids


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"rope_parameters": LLAMA3}, {"attention_bias": True}, {"num_key_value_heads": 1},
     {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, {"intermediate_size": 512}],
    ids=str,
)  # fmt: skip
def test_every_shape(tmp_path, changes):
    model, tokenizer = tiny(**WIDE | changes)
    assert export_deci(model, tokenizer, DropPlan(attention=(1,)), tmp_path / "out", "vllm").log_probability < 0.0005


def test_weights_of_what_is_dropped_are_not_there(tmp_path):
    model, tokenizer = tiny(**WIDE)
    export_deci(model, tokenizer, DropPlan(attention=(1,), mlp=(2,)), tmp_path / "out", "vllm")
    names = load_file(tmp_path / "out/model.safetensors").keys()
    gone = ("layers.1.self_attn", "layers.1.input_layernorm", "layers.2.mlp", "layers.2.post_attention_layernorm")
    assert names == {name for name in model.state_dict() if not any(part in name for part in gone)}


def test_settings_by_hand():
    """Mistral-7B: 4,096 wide, an MLP of 14,336, 32 heads for 8 of keys."""
    config = AutoConfig.for_model("mistral", num_hidden_layers=3, sliding_window=None)
    settings = settings_of(config, DropPlan(attention=(1,), mlp=(2,)))
    full = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 4}
    ffn = {"no_op": False, "ffn_mult": 5.25}  # 2 x 5.25 x 4,096 / 3 = 14,336
    assert settings["block_configs"] == [
        {"attention": full, "ffn": ffn},
        {"attention": {"no_op": True, "replace_with_linear": False}, "ffn": ffn},
        {"attention": full, "ffn": {"no_op": True}},
    ]
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"]


def test_parts_are_attributes(tmp_path):
    """And copied, pickled and written as JSON, which servers do."""
    model, tokenizer = tiny(**WIDE)
    export_deci(model, tokenizer, DropPlan(attention=(1,)), tmp_path / "out", "vllm")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for one in (config, copy.deepcopy(config)):
        assert one.block_configs[1].attention.no_op
        assert one.block_configs[0].attention.n_heads_in_group == 2
        assert not hasattr(one.block_configs[1].attention, "n_heads_in_group")
        assert json.loads(one.to_json_string())["block_configs"][1]["attention"]["no_op"]
    assert pickle.loads(pickle.dumps(dict(config.block_configs[0]))) == config.block_configs[0]


def test_transformers_alone_refuses(tmp_path):
    model, tokenizer = tiny(**WIDE)
    export_deci(model, tokenizer, DropPlan(attention=(1,)), tmp_path / "out", "vllm")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    with pytest.raises(LLMDropError, match="comes with code of its own, which is not run"):
        load_model(str(tmp_path / "out"))


# ---- MLX-LM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [*PLANS.values(), DropPlan(attention=(0, 2)), DropPlan((1,), maps={("attention", 1): LinearMap(torch.eye(32) / 2)})],
    ids=[*PLANS, "attention of layer 0", "a linear map"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_in_mlx_lm(tmp_path, family, plan):
    """Where it is installed; its schema alone is read everywhere."""
    model, tokenizer = tiny(family, **WIDE)
    assert export_deci(model, tokenizer, plan, tmp_path / "out", "mlx").log_probability < 0.0005
    pytest.importorskip("mlx_lm", reason="MLX-LM is not installed")
    prompt = tokenizer("the cat sat on")["input_ids"]
    (found,) = mlx_logits(tmp_path / "out", [prompt])
    with dropped(model, plan), torch.no_grad():
        torch.testing.assert_close(found, model(torch.tensor([prompt])).logits[0, -1], rtol=1e-3, atol=1e-3)


# ---- what the gate catches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s | {"rope_theta": 500.0}, "does not predict what the model with these layers set to zero does"),
        (lambda s: s | {"rms_norm_eps": 1.0}, "does not predict"),
        (lambda s: s | {"block_configs": s["block_configs"][::-1]}, r"lacks model\.layers"),
        (lambda s: s | {"block_configs": s["block_configs"][:2]}, "weights that its config.json has no place for"),
        (lambda s: s | {"block_configs": [b | {"ffn": {"no_op": False, "ffn_mult": 20}} for b in s["block_configs"]]}, "256 w"),
    ],
)  # fmt: skip
def test_wrong_settings_are_caught(tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr(deci, "settings_of", lambda *a: damage(settings_of(*a)))
    model, tokenizer = tiny(**WIDE)
    with pytest.raises(LLMDropError, match=message):
        export_deci(model, tokenizer, DropPlan(attention=(2,)), tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.building*"))


def test_a_missing_weight_is_named(tmp_path):
    model, tokenizer = tiny(**WIDE)
    export_deci(model, tokenizer, DropPlan(attention=(2,)), tmp_path / "out", "vllm")
    path = tmp_path / "out/model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(tensors, path)
    with pytest.raises(LLMDropError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        DeciReader(tmp_path / "out").logits([[1, 2, 3]])


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "plan", "server", "message"),
    [
        ("gemma", {}, DropPlan(attention=(1,)), "vllm", "Llama-shaped models only"),
        ("mistral", {"sliding_window": 64}, DropPlan(attention=(1,)), "vllm", "a sliding window of 64 tokens"),
        ("llama", {"intermediate_size": 300}, DropPlan(attention=(1,)), "vllm", "300, is no multiple of 256"),
        ("llama", {"head_dim": 16}, DropPlan(attention=(1,)), "mlx", "not as wide as the stream"),
        ("llama", {"hidden_act": "gelu"}, DropPlan(attention=(1,)), "mlx", "uses gelu, not silu"),
        ("llama", {"mlp_bias": True}, DropPlan(attention=(1,)), "mlx", "its MLP has biases"),
        ("llama", {}, DropPlan(attention=(0, 1, 2)), "mlx", "no attention is left"),
        ("llama", {}, DropPlan(attention=(0,)), "vllm", "it needs the attention of layer 0"),
        ("llama", {}, DropPlan(attention=(1,), maps={("attention", 1): LinearMap(torch.eye(32))}), "vllm", "no linear maps"),
        ("llama", {}, DropPlan(attention=(0,), maps={("attention", 0): LinearMap(torch.eye(32))}), "mlx", "before the first"),
        ("llama", {}, DropPlan(mlp=(1,), maps={("mlp", 1): LinearMap(torch.eye(32))}), "mlx", "MLP of layer 1 was not tried"),
        (
            "llama",
            {},
            DropPlan(attention=(1,), maps={("attention", 1): LinearMap(torch.eye(32), torch.ones(32))}),
            "mlx",
            "has a bias, and the model's attention has none",
        ),
        ("llama", {}, DropPlan(), "tgi", "There is no server 'tgi'. There are: vllm, mlx"),
    ],
)
def test_what_servers_cannot_hold(tmp_path, family, changes, plan, server, message):
    model, tokenizer = tiny(family, **WIDE | changes)
    with pytest.raises(LLMDropError, match=message):
        export_deci(model, tokenizer, plan, tmp_path / "out", server)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_stays(tmp_path):
    model, tokenizer = tiny(**WIDE)
    (tmp_path / "out").mkdir()
    with pytest.raises(LLMDropError, match="exists already"):
        export_deci(model, tokenizer, DropPlan(), tmp_path / "out", "vllm")
    assert list((tmp_path / "out").iterdir()) == []
