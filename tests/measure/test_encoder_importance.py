"""Importance of encoders against an independent reference: float64, no hooks of the package.

Of a layer the reference knows its raw input x and where its output projections are. A pre-norm sub-layer's term is what the
layer's output lacks once the projection is zero. In a post-norm layer it is what the projection itself gives, and the norms
that come after it are applied here, by hand.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from encoder_families import CASES, inputs, tiny
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMaskedLM

from llmdrop_utils import (
    DropPlan,
    FastLM,
    LLMDropError,
    Load,
    greedy,
    kv_bytes,
    measure_causes,
    measure_importance,
    measure_speed,
    perplexity,
    repair,
    run_tasks,
    select_by,
    select_iteratively,
)
from llmdrop_utils.measure.metrics import KINDS
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.encoder_layouts import ENCODERS
from llmdrop_utils.models.families import family_of, find_anatomy, input_device, position_limit, stream_width
from llmdrop_utils.selection.methods import Context

LAYERS = {"distilbert": "transformer.layer", "dinov3": "model.layer"}
LAYERS |= dict.fromkeys(["modernbert", "nomic_bert", "gte", "jina_embeddings_v3", "eurobert", "ultrabert"], "layers")
LAYERS |= dict.fromkeys(["vit", "deit", "vit_msn", "ijepa"], "layers")
LAYERS |= dict.fromkeys(["clip", "siglip", "chinese-clip"], "encoder.layers")
LIKE_BERT = ("bert", "electra", "ernie", "rembert", "deberta", "deberta-v2")
LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert", "data2vec-text")
LIKE_NOMIC = ("nomic_bert", "gte", "jina_embeddings_v3")
OTHERS = ("distilbert", "modernbert", "eurobert", "ultrabert", "megatron-bert")
NORMS = {  # post-norm: after attention, after the MLP
    **dict.fromkeys([*LIKE_BERT, *LIKE_ROBERTA], ("attention.output.LayerNorm", "output.LayerNorm")),
    **dict.fromkeys(LIKE_NOMIC, ("post_attention_layernorm", "post_mlp_layernorm")),
    "mpnet": ("attention.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
}
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5]),
    "left": torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 5 + [1] * 4]),
}
TEXT = [name for name, case in CASES.items() if not case.is_vision]


def similarity(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> float:
    cosine = torch.cosine_similarity(x, y, dim=-1)
    return (cosine if mask is None else cosine[mask.bool()]).mean().item()


def reference(name: str, model: nn.Module, blocks, projections: tuple[str, str], read, mask=None) -> dict[str, np.ndarray]:
    """Similarity of every sub-layer in float64. read: passes the input through a model."""
    result = {kind: np.zeros(len(blocks)) for kind in KINDS}
    for i, block in enumerate(blocks):
        seen: dict[str, torch.Tensor] = {}

        def keep(what, seen=seen):
            def hook(module, args, kwargs, output):
                first = args[0] if args else kwargs["hidden_states"]
                seen[what] = first, output[0] if isinstance(output, tuple) else output

            return hook

        def output_without(projection, block=block, keep=keep, seen=seen):
            kept = [(p, p.detach().clone()) for n, p in block.named_parameters() if n.startswith(f"{projection}.")]
            assert kept
            for p, _ in kept:
                p.zero_()
            handle = block.register_forward_hook(keep("off"), with_kwargs=True)
            read(model)
            handle.remove()
            for p, old in kept:
                p.copy_(old)
            return seen["off"][1]

        handles = [block.register_forward_hook(keep("block"), with_kwargs=True)]
        handles += [block.get_submodule(p).register_forward_hook(keep(p), with_kwargs=True) for p in projections]
        read(model)
        for handle in handles:
            handle.remove()
        x, y = seen["block"]
        result["block"][i] = similarity(x, y, mask)
        if name in NORMS:
            norm = block.get_submodule(NORMS[name][0])
            attention, mlp = (seen[p][1].view(x.shape) for p in projections)
            h = norm(x + attention)
            last = block.get_submodule(NORMS[name][1])
            torch.testing.assert_close(last(h + mlp), y, msg="the reference itself")
            result["attention"][i] = similarity(x, x + attention, mask)
            result["mlp"][i] = similarity(h, h + mlp, mask)
        else:
            h = output_without(projections[1])
            result["attention"][i] = similarity(x, h, mask)
            result["mlp"][i] = similarity(h, y, mask)
    return result


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_float64_reference(name, padding):
    case, model, given, mask = CASES[name], tiny(name), inputs(name), MASKS[padding]
    if case.is_vision and mask is not None:
        pytest.skip("images have no padding")
    if mask is not None:
        given = given.where(mask.bool(), case.settings.get("pad_token_id", 0))
    found = measure_importance(model, given, batch_size=2, attention_mask=mask)
    exact = copy.deepcopy(model).double()
    blocks = exact.get_submodule(LAYERS.get(name, "encoder.layer"))
    more = {} if mask is None else {"attention_mask": mask}
    if mask is not None and name in (*LIKE_BERT, *LIKE_NOMIC, *OTHERS):  # the others count positions themselves
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    given = given.double() if case.is_vision else given
    expected = reference(name, exact, blocks, (case.attention, case.mlp), lambda m: m(given, **more), mask)
    for kind in KINDS:
        assert np.ptp(expected[kind]) > 1e-4, "a reference that is the same everywhere tests nothing"
        np.testing.assert_allclose(found.similarity[kind], expected[kind], rtol=0, atol=1e-6, err_msg=kind)


# ---- padding, batches, what counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
def test_padding_equals_no_padding(name):
    model, tokens = tiny(name), inputs(name)
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    padded = tokens.where(mask.bool(), CASES[name].settings.get("pad_token_id", 0))
    found = measure_importance(model, {"input_ids": padded, "attention_mask": mask})
    alone = measure_importance(model, tokens[:, :6])
    assert found.weights.tolist() == [6, 6, 6]
    for kind in KINDS:
        np.testing.assert_allclose(found.importance[kind], alone.importance[kind], atol=2e-6)


@pytest.mark.parametrize("name", ["bert", "vit", "siglip"])
def test_tokens_and_batches(name):
    model, given, done = tiny(name), inputs(name, n=5), []
    found = measure_importance(model, given, batch_size=2, on_batch=done.append)
    n_tokens = {"bert": 9, "vit": 10, "siglip": 9}[name]  # patches, and the class token that ViT adds
    assert found.weights.tolist() == [n_tokens] * 5
    assert done == [2 * n_tokens, 2 * n_tokens, n_tokens]
    whole = measure_importance(model, {"pixel_values": given} if CASES[name].is_vision else given, batch_size=5)
    for kind in KINDS:
        assert whole.histogram[kind].sum() == 3 * 5 * n_tokens
        np.testing.assert_allclose(found.per_sample[kind], whole.per_sample[kind], atol=1e-6)


def test_images_of_another_size():
    """DINOv2 interpolates its positions; the others know one size."""
    images = torch.randn(1, 3, 16, 40)
    assert measure_importance(tiny("dinov2"), images).weights.tolist() == [2 * 5 + 1]
    with pytest.raises(LLMDropError, match="Images of 16 x 40 pixels cannot be read by this model, which knows 24 x 24"):
        measure_importance(tiny("vit"), images)


def test_pixels_in_the_dtype_of_the_model():
    model, given = tiny("siglip"), inputs("siglip")
    exact = measure_importance(model, given).importance["attention"]
    np.testing.assert_allclose(measure_importance(model.bfloat16(), given).importance["attention"], exact, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "given", "mask", "message"),
    [
        ("vit", torch.ones(2, 9, dtype=torch.long), None, r"Expected pixels of images, float .n_samples, 3, height, width."),
        ("vit", torch.randn(3, 24, 24), None, r"found torch.float32 \(3, 24, 24\). One image alone is pixels.None."),
        ("vit", torch.full((1, 3, 24, 24), torch.nan), None, "Some pixels are not finite"),
        ("vit", [[1.0], [1.0, 2.0]], None, "Expected pixels .* found"),
        ("vit", torch.randn(2, 3, 24, 24), torch.ones(2, 10), "Images have no padding: leave the attention mask away"),
        ("bert", torch.randn(2, 3, 24, 24), None, r"Expected token ids \(n_samples, seq_len\)"),
        ("bert", torch.ones(1, 65, dtype=torch.long), None, "65 tokens are too long for this model, which knows 64 positions"),
        ("mpnet", torch.ones(1, 63, dtype=torch.long), None, "63 tokens are too long for this model, which knows 62 positions"),
    ],
)
def test_bad_input(name, given, mask, message):
    with pytest.raises(LLMDropError, match=message):
        measure_importance(tiny(name), given, attention_mask=mask)


def test_the_longest_text_that_can_be_read():
    for name, longest in (("bert", 64), ("roberta", 62), ("mpnet", 62)):
        tokens = torch.randint(3, 97, (1, longest))
        assert position_limit(tiny(name).config) == longest
        assert measure_importance(tiny(name), tokens).weights.tolist() == [longest]


@pytest.mark.parametrize(
    "work",
    [
        lambda model, given: repair(model, given, DropPlan((1,))),
        lambda model, given: perplexity(model, given),
        lambda model, given: measure_causes(model, given),
        lambda model, given: measure_speed(model, Load("decode", context=8, new_tokens=2)),
        lambda model, given: measure_speed(model, Load("prefill", context=8)),
        lambda model, given: greedy(model, given, 2),
        lambda model, given: FastLM(model, byte_tokenizer()),
        lambda model, given: run_tasks(model, byte_tokenizer(), ["openbookqa"], limit=2, num_fewshot=0),
        lambda model, given: select_by("Taylor", Context(model, given, batch_size=2, seed=0), "attention", 1),
        lambda model, given: select_by("greedy KL", Context(model, given, batch_size=2, seed=0), "attention", 1),
        lambda model, given: select_by("output change", Context(model, given, batch_size=2, seed=0), "attention", 1),
    ],
    ids=["repair", "perplexity", "causes", "decode", "prefill", "greedy", "FastLM", "tasks", "Taylor", "KL", "output change"],
)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_takes_a_causal_language_model(name, work):
    with pytest.raises(LLMDropError, match=f"This {name} model is an encoder, which predicts no next token. measure_import"):
        work(tiny(name), inputs(name))


def test_encoders_have_no_cache():
    with pytest.raises(LLMDropError, match="bert models are encoders, which keep no keys and values"):
        kv_bytes(tiny("bert").config, DropPlan(), 1, 8, 4)


def test_iterative_selection():
    plan = select_iteratively(tiny("bert"), inputs("bert"), "attention", 2)
    assert len(set(plan.attention)) == 2


# ---- anatomy ------------------------------------------------------------------------------------------------------------


def test_every_family_has_a_tiny_model():
    assert {case.model_type for case in CASES.values()} == {*ENCODERS} & {*CONFIG_MAPPING}


@pytest.mark.parametrize("name", CASES)
def test_what_a_configuration_says(name):
    model = tiny(name)
    anatomy = find_anatomy(model)
    assert (len(anatomy), stream_width(model.config)) == (3, 32)
    assert anatomy.decoder is model
    assert input_device(model) == torch.device("cpu")


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_the_encoder_of_a_model_with_a_head(name):
    whole = AutoModelForMaskedLM.from_config(AutoConfig.for_model(CASES[name].model_type, **CASES[name].settings))
    assert find_anatomy(whole).decoder is whole.base_model


def changed(name: str, monkeypatch, **fields) -> nn.Module:
    """A model of a family whose entry is wrong."""
    model = tiny(name)
    monkeypatch.setitem(ENCODERS, CASES[name].model_type, dataclasses.replace(family_of(model.config), **fields))
    return model


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert", {"attention": "attention.output"}, r"stream \+ attention differs from what the norm after attention reads"),
        ("bert", {"mlp": "output"}, r"stream \+ MLP differs from what the norm after the MLP reads"),
        ("bert", {"mlp_input": "attention.self"}, "the norm after attention differs from what the MLP reads"),
        ("bert", {"stream_norms": None}, "does not add up"),
        ("distilbert", {"stream_norms": ("sa_layer_norm", "sa_layer_norm")}, "does not add up"),
        ("dinov2", {"attention": "attention"}, r"stream \+ attention .* differs"),
        ("vit", {"mlp_input": "layernorm_before"}, r"stream \+ attention differs from what the MLP reads"),
    ],
)
def test_wrong_entries_are_noticed(name, fields, message, monkeypatch):
    model = changed(name, monkeypatch, **fields)
    with pytest.raises(LLMDropError, match=f"{message}.*ENCODERS .llmdrop_utils/models/encoder_layouts.py. is wrong"):
        measure_importance(model, inputs(name))
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_a_layer_that_changes_what_its_norm_gives():
    model = tiny("bert")
    model.encoder.layer[1].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(LLMDropError, match="Layer 1 .*the norm after the MLP differs from the layer's output"):
        measure_importance(model, inputs("bert"))


def test_out_of_memory_within_a_layer(capsys):
    """What the first batch had seen of its first layer is forgotten."""
    model, given = tiny("bert"), inputs("bert")
    expected = measure_importance(model, given, batch_size=1)

    def too_large(module, args):
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError

    model.encoder.layer[0].intermediate.register_forward_pre_hook(too_large)
    found = measure_importance(model, given, batch_size=2)
    assert "batch of 1" in capsys.readouterr().err
    for kind in KINDS:
        np.testing.assert_array_equal(found.per_sample[kind], expected.per_sample[kind])


def test_what_cancels_is_rounded():
    """A stream and a term that are large and cancel leave the rounding of large numbers, as in all-mpnet-base-v2."""
    model = tiny("bert")
    with torch.no_grad():
        model.encoder.layer[1].attention.output.LayerNorm.bias[4] = -1e3
        model.encoder.layer[1].output.dense.bias[4] = 1e3
    measure_importance(model, inputs("bert"))


def test_a_module_that_is_not_there(monkeypatch):
    with pytest.raises(LLMDropError, match="bert model is not built as ENCODERS .*models/encoder_layouts.py. says"):
        find_anatomy(changed("bert", monkeypatch, mlp="output.renamed"))


def test_a_decoder_of_an_encoder_family():
    with pytest.raises(LLMDropError, match="This bert model cannot be taken apart: it is a decoder of a family"):
        find_anatomy(tiny("bert", is_decoder=True))
