"""Weights that are not those of config.json, config.json files that describe no model, and what is no causal model."""

import json

import families
import pytest
import torch
from multimodal import CLIP, MULTIMODAL, SIGLIP, gemma3, multimodal, whole
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from llmdrop_utils import (
    DropPlan,
    LLMDropError,
    dropped,
    load_dropped,
    load_encoder,
    load_model,
    locate_model,
    locate_series,
    measure_importance,
    save_dropped,
    select,
)
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.families import find_anatomy
from llmdrop_utils.models.kinds import kind_of_model
from llmdrop_utils.models.load import model_of_shape
from llmdrop_utils.models.outlook import outlook
from llmdrop_utils.sources import sizes

ROTARY = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def saved(folder, model, **settings):
    """A model's folder, with its tokenizer and some settings of config.json altered."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def with_weights(folder, change):
    """Alter the weights that are stored: name -> tensor."""
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})


# ---- weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "qwen2",
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"holds 9 weights .*k_proj.bias.*called llama",
        ),
        ("llama", {"num_hidden_layers": 2}, r"holds 9 weights .* no place for, such as model.layers.2"),
        ("llama", {"num_hidden_layers": 4}, r"lacks 9 of the weights that its config.json promises, such as model.layers.3"),
        (
            "llama",
            {"intermediate_size": 64},
            r"9 weights .* another shape .*down_proj.weight is \(32, 48\), expected \(32, 64\)",
        ),
        ("llama", {"vocab_size": 98}, r"2 weights .* another shape"),
    ],
)
def test_not_the_weights_of_the_config(tmp_path, cache, family, settings, message):
    name = saved(tmp_path / "m", families.tiny(family), **settings)
    with pytest.raises(LLMDropError, match=message):
        load_model(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {f"base_model.model.{k}": v for k, v in w.items()}, r"have other names .* lacks 30, .* has no place for 30"),
        (lambda w: {k.replace("layers.1", "blocks.1"): v for k, v in w.items()}, r"other names .* lacks 9, .* no place for 9"),
        (lambda w: w | {"layers.1.mlp.down_proj.weight": 2 * w["model.layers.1.mlp.down_proj.weight"]},
         r"holds some weights twice, such as layers.1.mlp.down_proj.weight and model.layers.1"),
        (lambda w: w | {"model.layers.1.mlp.gate.weight": torch.ones(4, 32)}, r"no place for, such as model.layers.1.mlp.gate"),
    ],
)  # fmt: skip
def test_names_of_weights(tmp_path, cache, change, message):
    name = saved(tmp_path / "m", families.tiny("llama"))
    with_weights(tmp_path / "m", change)
    with pytest.raises(LLMDropError, match=message):
        load_model(name)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", lambda w: w | ROTARY),
        ("llama", lambda w: {k.removeprefix("model."): v for k, v in w.items()}),  # a prefix that transformers adds by itself
        ("gpt2", lambda w: w | {"transformer.h.0.attn.bias": torch.ones(1), "transformer.h.0.attn.masked_bias": torch.ones(1)}),
        ("gpt-neox", lambda w: w | {f"gpt_neox.layers.0.attention.{name}": torch.ones(1) for name in ("bias", "masked_bias")}),
    ],
)
def test_harmless_remainders(tmp_path, cache, family, change):
    model = families.tiny(family)
    name = saved(tmp_path / "m", model)
    with_weights(tmp_path / "m", change)
    again, _ = load_model(name, torch.float32, "cpu")
    tokens = torch.randint(0, 97, (1, 8))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_tied_head_that_is_stored_too(tmp_path, cache):
    name = saved(tmp_path / "m", families.tiny("llama", tie_word_embeddings=True))
    with_weights(tmp_path / "m", lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    assert load_model(name)[0] is not None


# ---- config.json --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"]}, r"num_hidden_layers` \(3\) must be equal to the number of `layer_types` \(1\)"),
        ({"num_hidden_layers": "4"}, r"Field 'num_hidden_layers' expected int, got str"),
        ({"hidden_size": None}, r"Field 'hidden_size' expected int, got NoneType"),
        ({"dtype": "float99"}, r"float99"),
        ({"model_type": ["llama"]}, r"it has no text under 'model_type'"),
        ({"model_type": "nonsense"}, r"nonsense"),
        ("[]", r"it holds list"),
        ("null", r"it holds NoneType"),
        ("3", r"it holds int"),
        ("", r"config.json of .* cannot be read: JSONDecodeError"),
        ("{", r"config.json of .* cannot be read: JSONDecodeError"),
        ("\x00\xff", r"config.json of .* cannot be read"),
        ("{}", r"it has no text under 'model_type'"),
    ],
)
def test_configs_that_describe_no_model(tmp_path, cache, change, message):
    """One clear error wherever a config is read: to locate, load or plan a model, or to follow its training."""
    name = saved(tmp_path / "m", families.tiny("qwen3"))
    config = tmp_path / "m" / "config.json"
    config.write_text(change if isinstance(change, str) else json.dumps(json.loads(config.read_text()) | change))
    for read in (locate_model, load_model, lambda name: outlook(name, sizes.Hub()), locate_series):
        with pytest.raises(LLMDropError, match=message) as caught:
            read(name)
        assert "\n" not in str(caught.value)


def test_a_family_that_comes_as_code(tmp_path, cache):
    """It is not run."""
    code = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "modeling_new.NewForCausalLM"}
    name = saved(tmp_path / "m", families.tiny("llama"), model_type="new", auto_map=code)
    for file in ("configuration_new.py", "modeling_new.py"):
        (tmp_path / "m" / file).write_text("raise SystemExit")
    for read in (locate_model, load_model, load_encoder, lambda name: outlook(name, sizes.Hub())):
        with pytest.raises(LLMDropError, match=r"m.* \(new\) comes with code of its own, which is not run, and this version"):
            read(name)


@pytest.mark.parametrize("change", [{"layer_types": ["full_attention"]}, {"num_hidden_layers": "4"}, None])
def test_configs_on_the_hub_that_describe_no_model(tmp_path, network, cache, change):
    saved(tmp_path / "m", families.tiny("qwen3"))
    content = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    content["config.json"] = json.dumps(json.loads(content["config.json"]) | change).encode() if change else b"[]"
    network.repositories["org/odd"] = {"c" * 40: content}
    for read in (lambda name: outlook(name, sizes.Hub()), locate_model):
        with pytest.raises(LLMDropError, match=r"(configuration|config.json) of org/odd"):
            read("org/odd")


@pytest.mark.parametrize("settings", [{"num_attention_heads": 0}, {"hidden_act": "nonsense"}])
def test_configs_that_no_model_can_be_built_from(tmp_path, cache, settings):
    located = locate_model(saved(tmp_path / "m", families.tiny("qwen3"), **settings))
    with pytest.raises(LLMDropError, match=r"No model can be built as the config.json of m-\w{8} says: "):
        model_of_shape(located, torch.float32, "meta")
    with pytest.raises(LLMDropError, match=r"No model can be built as the config.json of m says: "):
        outlook(str(tmp_path / "m"), sizes.Hub())


@pytest.mark.parametrize("content", ["[]", "{", '{"tokens_per_step": "many"}'])
def test_a_run_json_that_says_nothing(tmp_path, cache, content):
    for step in (1, 2):
        saved(tmp_path / "run" / f"step-{step}", families.tiny("llama"))
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(LLMDropError, match="The run.json in .* cannot be used"):
        locate_series(str(tmp_path / "run"))


# ---- what is no causal language model -----------------------------------------------------------------------------------


def bert(kind):
    config = AutoConfig.for_model("bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    return kind.from_config(config)


def t5():
    return AutoModel.from_config(AutoConfig.for_model("t5", d_model=32, num_layers=1, num_heads=4, d_ff=32, d_kv=8))


LLAMA = lambda: families.tiny("llama")  # noqa: E731


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LLAMA().model, "has no LM head: it lacks lm_head.weight.*AutoModel saves the bare decoder"),
        (lambda: AutoModelForSequenceClassification.from_config(LLAMA().config), "is a sequence classifier or reward model"),
        (lambda: bert(AutoModel), "is an encoder .bert., no causal language model"),
        (lambda: bert(AutoModelForMaskedLM), "is an encoder .bert., no causal language model"),
        (t5, "is an encoder-decoder .t5."),
    ],
)
def test_other_kinds_of_models(tmp_path, cache, make, message):
    name = saved(tmp_path / "m", make())
    with pytest.raises(LLMDropError, match=message) as caught:
        load_model(name)
    assert "drop plan" not in str(caught.value)


def test_a_head_of_another_kind(tmp_path, cache):
    """Also where config.json does not name it."""
    name = saved(tmp_path / "m", AutoModelForSequenceClassification.from_config(LLAMA().config), architectures=None)
    with pytest.raises(LLMDropError, match=r"has no LM head; it has another head instead \(score.weight\)"):
        load_model(name)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter(tmp_path, network, cache, with_config):
    folder = tmp_path / "adapter"
    folder.mkdir()
    if with_config:
        saved(folder, LLAMA())
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    network.repositories["org/adapter"] = {"c" * 40: {path.name: path.read_bytes() for path in folder.iterdir()}}
    for name in (str(folder), "org/adapter"):
        for read in (locate_model, lambda name: outlook(name, sizes.Hub())):
            with pytest.raises(LLMDropError, match="is an adapter .LoRA, PEFT., no whole model. Merge it into its base"):
                read(name)
    with pytest.raises(LLMDropError, match="from_pretrained.'org/base'.*merge_and_unload"):
        locate_model(str(folder))


def test_a_folder_without_tokenizer(tmp_path, cache):
    LLAMA().save_pretrained(tmp_path / "m")
    for read in (locate_model, load_model, lambda name: outlook(name, sizes.Hub()), locate_series):
        with pytest.raises(LLMDropError, match="m has no tokenizer in .*: there is no tokenizer.json and no vocabulary"):
            read(str(tmp_path / "m"))


# ---- multimodal models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_part_is_taken(tmp_path, cache, kind):
    """On text alone it predicts what the whole model predicts."""
    model, text = multimodal(kind), MULTIMODAL[kind][0]
    name = saved(tmp_path / "m", model)
    part, _ = load_model(name, torch.float32, "cpu")
    assert part.config.model_type == text
    tokens = torch.randint(20, 97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(part(tokens).logits, model(input_ids=tokens).logits)
    n = sum(weight.numel() for weight in part.parameters())
    assert outlook(name, sizes.Hub()).shape.parameters == n < sum(weight.numel() for weight in model.parameters())
    plan = DropPlan((find_anatomy(part).with_attention[0],), (1,))
    save_dropped(part, None, plan, tmp_path / "dropped")  # under the names of a text model
    with dropped(part, plan), torch.no_grad():
        assert torch.equal(load_dropped(tmp_path / "dropped", torch.float32, "cpu")[0](tokens).logits, part(tokens).logits)
    with_weights(
        tmp_path / "m", lambda w: {k: v for k, v in w.items() if "layers.1.self_attn.q_proj.weight" not in k or "vision" in k}
    )
    with pytest.raises(LLMDropError, match=r"lacks 1 of the weights .* model.layers.1.self_attn.q_proj"):
        load_model(name)


def test_a_text_part_of_a_refused_family(tmp_path, cache):
    """It is told apart, and refused before it is planned or measured."""
    text = families.SMALL | {"model_type": "falcon_h1", "vocab_size": 257}
    name = saved(tmp_path / "m", whole("llava", text, CLIP))
    assert kind_of_model(name) == "decoder"
    with pytest.raises(LLMDropError, match="This falcon_h1 model cannot be taken apart: a third term is added"):
        outlook(name, sizes.Hub())
    model, _ = load_model(name, torch.float32, "cpu")
    with pytest.raises(LLMDropError, match="This falcon_h1 model cannot be taken apart: a third term is added"):
        measure_importance(model, torch.randint(3, 97, (2, 9)))


def test_a_text_part_that_is_no_model(tmp_path, cache):
    """Aya Vision scales no logits, as the Cohere 2 does that its text part says it is."""
    name = saved(tmp_path / "m", whole("aya_vision", families.SMALL | {"model_type": "cohere2"}, SIGLIP))
    with pytest.raises(
        LLMDropError, match=r"is multimodal \(aya_vision\), and its text part .* cannot be taken by itself. Give"
    ):
        load_model(name)


def test_a_whole_model_whose_text_can_be_read(tmp_path, cache):
    """transformers' causal language model of Gemma 3 has the vision tower, which text passes by."""
    both, tokens = gemma3(), torch.randint(20, 97, (2, 9))
    model, _ = load_model(saved(tmp_path / "m", both), torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, both(input_ids=tokens).logits)
    with dropped(model, select(measure_importance(model, tokens), "attention", 1)):
        assert model(input_ids=tokens).logits.isfinite().all()
