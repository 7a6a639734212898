"""Encoder-decoders are loaded strictly, others are refused with a reason; a walk through all that transformers knows."""

import encoder_decoder_families as families
import encoder_families
import pytest
import torch
from families import tiny as tiny_decoder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from llmdrop_utils import (
    DropPlan,
    FastLM,
    LLMDropError,
    Load,
    export_gguf,
    heal,
    load_encoder,
    load_encoder_decoder,
    load_model,
    measure_causes,
    measure_importance,
    measure_speed,
    perplexity,
    prepare_pairs,
    repair,
    save_dropped,
    score_targets,
    select_at_random,
    select_by,
    select_iteratively,
)
from llmdrop_utils.dropping.windows import windowed
from llmdrop_utils.models.config import kind_of
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.encoder_decoder_layouts import ENCODER_DECODERS
from llmdrop_utils.models.families import find_anatomy, halves_of
from llmdrop_utils.models.kinds import kind_of_model
from llmdrop_utils.models.refused import REFUSED_ENCODER_DECODERS
from llmdrop_utils.selection.methods import Context


def saved(folder, model) -> str:
    """A folder with a model and its tokenizer."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", families.CASES)
def test_what_is_loaded_is_what_was_saved(name, tmp_path, cache):
    original, given = families.tiny(name, vocab_size=257), families.pairs()
    model, tokenizer = load_encoder_decoder(saved(tmp_path / "m", original), torch.float32, "cpu")
    assert not model.training
    assert model.llmdrop_identity.startswith("sha256:")
    with torch.no_grad():
        assert torch.equal(model(**given).logits, original(**given).logits)
    longest = prepare_pairs(tokenizer, ["a" * 500], ["b" * 500])["input_ids"].shape[1]
    assert longest == (500 if "t5" in name else 64)
    assert kind_of_model(str(tmp_path / "m")) == "encoder-decoder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "decoder.layers.1.fc2.bias" not in k}, "lacks 1 of the weights"),
        (lambda w: w | {"model.decoder.layers.9.fc2.bias": torch.ones(32)}, "holds 1 weights .* no place for"),
        (lambda w: w | {"model.decoder.layers.1.fc2.bias": torch.ones(31)}, "have another shape than its config.json"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path, cache):
    name, path = saved(tmp_path / "m", families.tiny("bart")), tmp_path / "m" / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    with pytest.raises(LLMDropError, match=message):
        load_encoder_decoder(name)


def test_other_kinds(tmp_path, cache):
    t5 = saved(tmp_path / "t5", families.tiny("t5"))
    with pytest.raises(
        LLMDropError, match=r"is an encoder-decoder \(t5\), no causal .* load_encoder_decoder loads it, and notebook 12"
    ):
        load_model(t5)
    with pytest.raises(LLMDropError, match=r"is an encoder-decoder \(t5\), no encoder. load_encoder_decoder loads it"):
        load_encoder(t5)
    with pytest.raises(LLMDropError, match=r"is a causal language model \(llama\), no encoder-decoder. load_model loads it"):
        load_encoder_decoder(saved(tmp_path / "llama", tiny_decoder("llama")))
    with pytest.raises(LLMDropError, match=r"is an encoder \(bert\), no encoder-decoder. load_encoder loads it"):
        load_encoder_decoder(saved(tmp_path / "bert", encoder_families.tiny("bert")))
    with pytest.raises(LLMDropError, match="smollm2-135m is a causal language model, no encoder-decoder"):
        load_encoder_decoder("smollm2-135m")
    families.tiny("t5").save_pretrained(tmp_path / "bare")
    with pytest.raises(LLMDropError, match="bare has no tokenizer"):
        load_encoder_decoder(str(tmp_path / "bare"))


def test_families_that_are_refused(tmp_path, cache):
    """Before weights are loaded."""
    small = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    whisper = AutoModelForSpeechSeq2Seq.from_config(AutoConfig.for_model("whisper", **small, vocab_size=97, pad_token_id=0))
    with pytest.raises(LLMDropError, match=r"is an encoder-decoder \(whisper\) that does not read text and write text"):
        load_encoder_decoder(saved(tmp_path / "whisper", whisper))
    with pytest.raises(LLMDropError, match="This whisper model cannot be taken apart: it reads sound"):
        find_anatomy(whisper)
    led = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("led", **small, vocab_size=97, max_encoder_position_embeddings=32)
    )
    with pytest.raises(LLMDropError, match="This led model cannot be taken apart: nobody has stated"):
        load_encoder_decoder(saved(tmp_path / "led", led))
    with pytest.raises(LLMDropError, match="family 'new' is unknown. Add it to ENCODER_DECODERS .* Known: bart, blenderbot,"):
        halves_of(AutoConfig.for_model("t5").__class__(model_type="new"))


# ---- what is for causal language models alone -------------------------------------------------------------------------------

TOKENS = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(2))


def _window(model):
    with windowed(model, [0], 4):
        pass


@pytest.mark.parametrize(
    "work",
    [
        lambda model: perplexity(model, TOKENS),
        lambda model: FastLM(model, byte_tokenizer()),
        lambda model: measure_causes(model, TOKENS),
        lambda model: measure_speed(model, Load("prefill", 4), [DropPlan()]),
        lambda model: repair(model, TOKENS, DropPlan((1,))),
        lambda model: heal(model, TOKENS, DropPlan((1,)), "nowhere"),
        lambda model: save_dropped(model, None, DropPlan((1,)), "nowhere"),
        lambda model: select_by("random", Context(model, TOKENS), "attention", 1),
        lambda model: select_by("Taylor", Context(model, TOKENS), "attention", 1),
        lambda model: select_by("weight norm", Context(model, TOKENS), "attention", 1),
        lambda model: select_by("without residual", Context(model, TOKENS), "attention", 1),
        _window,
    ],
    ids=["perplexity", "tasks", "causes", "speed", "repair", "heal", "save", "random", "Taylor", "norm", "alone", "window"],
)
def test_what_takes_a_causal_language_model(work):
    with pytest.raises(
        LLMDropError, match="This t5 model is an encoder-decoder, which predicts a target from a source. measure_"
    ):
        work(families.tiny("t5"))


def test_what_llama_cpp_cannot_run():
    with pytest.raises(LLMDropError, match="This t5 model cannot be exported for llama.cpp without layers"):
        export_gguf(families.tiny("t5"), byte_tokenizer(), DropPlan((1,)), "nowhere.gguf")


def test_iterative_selection():
    for kind in ("attention", "cross_attention", "block"):
        plan = select_iteratively(families.tiny("t5"), families.pairs(), kind, 2)
        assert plan.n_drop == {"attention": 2, "cross_attention": 2, "block": len(plan.cross_attention) + 4}[kind]
    assert len(select_at_random(5, "attention", 2, seed=0).attention) == 2


# ---- all of them ------------------------------------------------------------------------------------------------------------

SETTINGS = {case.model_type: case.settings for case in families.CASES.values()}


def outcome(name: str) -> str:
    """ "supported", "refused" or "unknown", told by a model on the device "meta"; "other": it reads more than text."""
    try:
        config = AutoConfig.for_model(name, **SETTINGS.get(name, {}))
    except Exception:  # of transformers: it lacks a package, or cannot be made without its parts
        return "refused" if name in REFUSED_ENCODER_DECODERS else "no configuration"
    if kind_of(config) != "encoder-decoder":
        return "other"
    try:
        halves_of(config)
        with torch.device("meta"):
            find_anatomy(AutoModelForSeq2SeqLM.from_config(config))
    except LLMDropError as error:
        return "refused" if "cannot be taken apart: " in str(error) else "unknown"
    return "supported"


def test_every_encoder_decoder_is_supported_or_refused():
    found = {name: outcome(name) for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    supported = {name for name, result in found.items() if result == "supported"}
    assert supported | {"umt5"} == set(ENCODER_DECODERS)  # older transformers compute UMT5 wrongly, which is refused
    assert "unknown" not in found.values(), found
    assert not set(ENCODER_DECODERS) & set(REFUSED_ENCODER_DECODERS)


def test_a_decoder_that_sees_what_is_to_come():
    model = families.tiny("bart")
    model.model.decoder.layers[1].self_attn.is_causal = False
    with pytest.raises(LLMDropError, match="bart model cannot be taken apart: its decoder sees tokens .* Install a later one"):
        find_anatomy(model)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_model_without_its_head(name):
    model = AutoModel.from_config(AutoConfig.for_model(name, **SETTINGS[name])).eval()
    assert len(find_anatomy(model)) == 5
    assert len(measure_importance(model, families.pairs()).importance["cross_attention"]) == 5
    with pytest.raises(LLMDropError, match=f"This {name} model has no LM head"):
        score_targets(model, families.pairs())
