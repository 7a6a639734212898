"""Dropped models on disk: what is loaded is what was saved, to the bit, and nothing loads it as something else."""

import json
import subprocess
import sys

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdrop_utils import (
    DropPlan,
    LinearMap,
    LLMDropError,
    dropped,
    load_dropped,
    load_model,
    load_tokens,
    measure_importance,
    official_config,
    plan_from_config,
    save_dropped,
    select,
)
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.families import find_anatomy

TOKENS = torch.arange(20)[None] % 90


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def plan_with_map(model):
    width = model.get_input_embeddings().weight.shape[1]
    torch.manual_seed(3)
    linear = LinearMap(torch.randn(width, width) / width, torch.randn(width))
    return DropPlan(attention=(2, 0), mlp=(1,), maps={("attention", 0): linear})


def tensors_in(folder):
    """Shapes by name of all weights in a folder."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes


@pytest.fixture
def model():
    return families.tiny("llama")


@pytest.fixture
def saved(model, tmp_path):
    return save_dropped(model, byte_tokenizer(), DropPlan(attention=(2, 0), mlp=(1,)), tmp_path / "out")


@pytest.mark.parametrize("name", families.CASES)
def test_round_trip(name, tmp_path):
    """Bit-identical in every family, layer 0 and a linear map included, in many shards."""
    model = families.tiny(name)
    plan = plan_with_map(model)
    save_dropped(model, None, plan, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model.llmdrop-*.safetensors"))) > 1
    with dropped(model, plan):
        expected = logits(model)
    attention = model.config._attn_implementation
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=attention)), expected)
    loaded, tokenizer = load_dropped(tmp_path / "out", dtype=torch.float32)
    assert tokenizer is None
    assert torch.equal(logits(loaded), expected)
    assert loaded.llmdrop_plan.key == plan.key
    assert loaded.llmdrop_plan.attention == plan.attention, "in drop order"
    assert not loaded.training


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_by_exactly_what_is_dropped(tmp_path, tied, dtype):
    model = families.tiny("llama", tie_word_embeddings=tied).to(dtype)
    plan = DropPlan(attention=(2, 0), mlp=(1,))
    model.save_pretrained(tmp_path / "dense")
    save_dropped(model, None, plan, tmp_path / "out")
    dense, kept = tensors_in(tmp_path / "dense"), tensors_in(tmp_path / "out")
    units = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
    gone = tuple(f"model.layers.{i}.{unit}." for kind in units for i in getattr(plan, kind) for unit in units[kind])
    assert kept == {name: shape for name, shape in dense.items() if not name.startswith(gone)}
    d, ffn, kv = 32, 48, 2 * 8
    n_dropped = 2 * (2 * d * d + 2 * d * kv + d) + 3 * d * ffn + d  # q, o; k, v; norm - gate, up, down; norm
    sizes = [
        sum(t.numel() for f in (tmp_path / name).glob("*.safetensors") for t in load_file(f).values())
        for name in ("dense", "out")
    ]
    assert sizes[0] - sizes[1] == n_dropped
    assert torch.equal(
        logits(load_dropped(tmp_path / "out", dtype=dtype)[0]),
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)),
    )


def test_what_config_says(saved):
    settings = json.loads((saved / "config.json").read_text())
    assert (settings["drop_attn_list"], settings["drop_mlp_list"]) == ([2, 0], [1])
    assert settings["per_layer_config"] == {"0": {"skip": ["attention"]}, "1": {"skip": ["mlp"]}, "2": {"skip": ["attention"]}}
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 10000
    assert plan_from_config(settings) == DropPlan(attention=(2, 0), mlp=(1,), n_layers=3)


def test_both_forms_of_rotary_settings(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    save_dropped(families.tiny("llama", rope_parameters=rope), None, DropPlan(mlp=(0,)), tmp_path / "scaled")
    settings = json.loads((tmp_path / "scaled/config.json").read_text())
    assert settings["rope_theta"] == 500000
    assert settings["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert load_dropped(tmp_path / "scaled")[0].config.rope_parameters == rope
    save_dropped(families.tiny("gemma3"), None, DropPlan(mlp=(0,)), tmp_path / "gemma")
    settings = json.loads((tmp_path / "gemma/config.json").read_text())
    rope = settings["rope_parameters"]
    assert settings["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert settings["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]


def test_tokenizer_and_chat_template(model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    save_dropped(model, tokenizer, DropPlan(mlp=(0,)), tmp_path / "out")
    chat = [{"role": "user", "content": "hi"}]
    for loaded in (AutoTokenizer.from_pretrained(tmp_path / "out"), load_dropped(tmp_path / "out")[1]):
        assert loaded.apply_chat_template(chat, tokenize=False) == "<hi>"
        assert loaded("abc").input_ids == tokenizer("abc").input_ids


def test_saved_again(saved, tmp_path):
    """A loaded model is saved by transformers' own method as it was."""
    loaded, _ = load_dropped(saved, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    assert tensors_in(tmp_path / "again") == tensors_in(saved)
    assert torch.equal(logits(load_dropped(tmp_path / "again", dtype=torch.float32)[0]), logits(loaded))
    assert plan_from_config(json.loads((tmp_path / "again/config.json").read_text())).attention == (2, 0)


def test_saved_over_itself_and_not_pushed(saved):
    loaded, _ = load_dropped(saved, dtype=torch.float32)
    expected = logits(loaded)
    with torch.no_grad():
        loaded.model.norm.weight += 1
    changed = logits(loaded)
    loaded.save_pretrained(saved)  # as a trainer does
    assert torch.equal(logits(load_dropped(saved, dtype=torch.float32)[0]), changed)
    assert not torch.equal(changed, expected)
    with pytest.raises(LLMDropError, match="not while it is saved"):
        loaded.save_pretrained(saved, push_to_hub=True)


def test_more_is_dropped_later(saved, model):
    """Plans of the base fit what is loaded: what they drop as well is dropped on top."""
    loaded, _ = load_dropped(saved, dtype=torch.float32)
    more = DropPlan(attention=(0, 1, 2), mlp=(1,))
    with dropped(loaded, more), dropped(model, more):
        assert torch.equal(logits(loaded), logits(model))


def test_generation_keeps_no_cache_of_what_is_dropped(saved, model):
    loaded, _ = load_dropped(saved, dtype=torch.float32)
    with dropped(model, DropPlan(attention=(2, 0), mlp=(1,))):
        expected = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
    out = loaded.generate(TOKENS, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert [layer.keys is not None for layer in out.past_key_values.layers] == [False, True, False]


# ---- without this package -----------------------------------------------------------------------------------------------

WITHOUT = """
import sys, transformers
assert "llmdrop_utils" not in sys.modules
for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
    try:
        kind.from_pretrained(sys.argv[1])
        print("loaded")
    except Exception as error:
        print(type(error).__name__, error)
"""
AFTER = """
import sys
import {first}, {second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()))
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def test_transformers_alone_refuses(saved):
    """In a fresh interpreter: by the model type, which names this package, and by the names of files."""
    said = run(WITHOUT, saved)
    assert "loaded" not in said
    assert "has model type `llmdrop_utils` but Transformers does not recognize this architecture" in said
    assert "Error no file named model.safetensors" in said


@pytest.mark.parametrize(("first", "second"), [("transformers", "llmdrop_utils"), ("llmdrop_utils", "transformers")])
def test_whichever_is_imported_first(saved, first, second):
    n_kept = sum(p.numel() for p in load_dropped(saved)[0].parameters())
    assert run(AFTER.format(first=first, second=second), saved).strip() == str(n_kept)


def test_importing_the_package_imports_nothing():
    assert run("import sys, llmdrop_utils; print([n for n in ('torch', 'transformers') if n in sys.modules])").strip() == "[]"


# ---- the paper's own code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [([2, 0], [1]), ([True, False, True], [False, True, False]), ([2, 0], None), (None, [1, 2]), ([], [1])],
)
def test_checkpoints_of_the_papers_code(model, tmp_path, attention, mlp):
    """They hold all weights, and lists of indices, of booleans or null."""
    model.save_pretrained(tmp_path / "out")
    byte_tokenizer().save_pretrained(tmp_path / "out")
    path = tmp_path / "out/config.json"
    auto_map = {"AutoModelForCausalLM": "modeling_dropped_llama.LlamaForCausalLM"}
    settings = json.loads(path.read_text()) | {"drop_attn_list": attention, "drop_mlp_list": mlp, "auto_map": auto_map}
    path.write_text(json.dumps(settings))
    plan = plan_from_config(settings)
    loaded, tokenizer = load_dropped(tmp_path / "out", dtype=torch.float32)
    with dropped(model, plan):
        assert torch.equal(logits(loaded), logits(model))
    assert plan.n_drop == sum(len([x for x in (given or []) if x is not False]) for given in (attention, mlp))
    assert tokenizer is not None
    with pytest.raises(LLMDropError, match="is a dropped model, and what is asked for is a dense one"):
        load_model(str(tmp_path / "out"))
    # And back: their lists, their classes, and the same plan.
    written = official_config(model.config.to_dict(), loaded.llmdrop_plan)
    assert (written["drop_attn_list"], written["drop_mlp_list"]) == (list(plan.attention), list(plan.mlp))
    assert written["auto_map"]["AutoConfig"] == "configuration_dropped_llama.LlamaConfig"
    assert plan_from_config(written).key == plan.key


def test_what_the_papers_code_cannot_say(model):
    settings = model.config.to_dict()
    with pytest.raises(LLMDropError, match="drops layers of llama, mistral, gemma2, and not of qwen2"):
        official_config(settings | {"model_type": "qwen2"}, DropPlan(mlp=(1,)))
    with pytest.raises(LLMDropError, match="no linear maps"):
        official_config(settings, plan_with_map(model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([True, False], "holds 2 entries, some of them booleans. Expected is one boolean for each of the 3 layers"),
        ([True, 1, 2], "some of them booleans"),
        ([3], "holds layer 3, but this model has 3 layers"),
        ([1, 1], "holds layer 1 more than once"),
        ("all", "must be a list or null, but is 'all'"),
        ([0.5], "must hold whole numbers"),
    ],
)
def test_lists_that_no_plan_can_have(model, tmp_path, given, message):
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"drop_attn_list": given}))
    with pytest.raises(LLMDropError, match=message):
        load_dropped(tmp_path / "out")


# ---- what is wrong ------------------------------------------------------------------------------------------------------


def test_folders_that_exist_are_left_alone(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    with pytest.raises(LLMDropError, match="exists already"):
        save_dropped(model, None, DropPlan(mlp=(0,)), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_plans_that_do_not_fit(model, saved, tmp_path):
    loaded, _ = load_dropped(saved)
    cases = [
        (model, DropPlan(attention=(7,)), "holds layer 7, but this model has 3 layers"),
        (loaded, DropPlan(attention=(0,), mlp=(1,)), "lacks the attention of layer 2, which the plan does not drop"),
        (model, DropPlan(mlp=(0,), n_layers=30), "was made for a model with 30 layers"),
    ]
    for which, plan, message in cases:
        with pytest.raises(LLMDropError, match=message):
            save_dropped(which, None, plan, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_damaged_checkpoints(saved, tmp_path):
    weights, config = saved / "model.llmdrop.safetensors", saved / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    tensors = load(whole)  # not from the file, which is changed below

    def refused(message):
        for way in (load_dropped, AutoModelForCausalLM.from_pretrained):
            with pytest.raises((LLMDropError, OSError), match=message):
                way(saved)

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LLMDropError, match="could not be loaded"):
        load_dropped(saved)
    weights.unlink()
    refused("no file named model.llmdrop.safetensors")
    few = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name}
    save_file(few, weights, {"format": "pt"})
    refused("lacks 1 of the weights that its config.json promises, such as model.layers.1.self_attn.q_proj.weight")
    save_file(tensors | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}, weights, {"format": "pt"})
    refused("holds 1 weights that a llama model of its config.json has no place for")
    save_file(tensors | {"model.norm.weight": torch.zeros(31)}, weights, {"format": "pt"})
    refused("have another shape than its config.json promises: model.norm.weight")
    weights.write_bytes(whole)
    config.write_text(json.dumps(settings | {"llmdrop": settings["llmdrop"] | {"format": "llmdrop dropped model 9"}}))
    refused("damaged, or of another version: expected is the format 'llmdrop dropped model 1'")
    config.write_text("{")
    with pytest.raises(LLMDropError, match=r"config\.json of out cannot be read"):
        load_dropped(saved)
    config.write_text(json.dumps(settings))
    load_dropped(saved)


def test_what_is_no_dropped_model(model, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(LLMDropError, match="dense is no dropped model: its config.json says nothing of dropped layers"):
        load_dropped(tmp_path / "dense")
    with pytest.raises(LLMDropError, match="Expected the folder or the hub id of a dropped model, found '/no/where'"):
        load_dropped("/no/where")


def test_dense_loading_of_a_dropped_model(saved):
    with pytest.raises(LLMDropError, match="out is a dropped model, and what is asked for is a dense one"):
        load_model(str(saved))


def test_anatomy_of_what_is_loaded(saved):
    assert len(find_anatomy(load_dropped(saved)[0])) == 3


# ---- the real model -------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
def test_smollm2(tmp_path):
    """Attention, MLP, joint and layer 0: bit-identical, smaller by exactly what is dropped, in two shards."""
    model, tokenizer = load_model("smollm2-135m", torch.float32)
    scores = measure_importance(model, load_tokens("web", tokenizer, n_samples=2, seq_len=256))
    tokens = load_tokens("web", tokenizer, n_samples=4, seq_len=64)[2:]
    d, kv, ffn = 576, 192, 1536
    size = {"attention": 2 * d * d + 2 * d * kv + d, "mlp": 3 * d * ffn + d}
    dense = sum(parameter.numel() for parameter in model.parameters())
    plans = [select(scores, "attention", 8), select(scores, "mlp", 2), select(scores, "joint", 12), DropPlan(attention=(0, 29))]
    for i, plan in enumerate(plans):
        folder = save_dropped(model, tokenizer, plan, tmp_path / str(i), max_shard_size="300MB")
        assert len(list(folder.glob("*.safetensors"))) == 2
        n_stored = sum(torch.Size(shape).numel() for shape in tensors_in(folder).values())
        assert dense - n_stored == len(plan.attention) * size["attention"] + len(plan.mlp) * size["mlp"]
        loaded, _ = load_dropped(folder, torch.float32)
        with torch.no_grad(), dropped(model, plan):
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_lists_by_hand():
    settings = {"num_hidden_layers": 3, "drop_attn_list": [True, False, True], "drop_mlp_list": [False, True, False]}
    assert plan_from_config(settings) == DropPlan(attention=(0, 2), mlp=(1,), n_layers=3)
    assert plan_from_config(settings | {"drop_attn_list": [2, 0], "drop_mlp_list": None}) == DropPlan((2, 0), (), 3)
