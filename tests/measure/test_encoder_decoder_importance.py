"""Importance of encoder-decoders against an independent reference: float64, no hooks of the package.

Of a layer the reference knows its raw input x and where its output projections are. A pre-norm sub-layer's term is what the
layer's output lacks once the projection, and those after it, are zero. In a post-norm layer it is what the projection itself
gives, and the norms that come after it are applied here, by hand.
"""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from encoder_decoder_families import CASES, N_LAYERS, N_SOURCE, blocks_of, pairs, projections, tiny
from torch import nn

from llmdrop_utils import Importance, LLMDropError, dropped, measure_importance, select
from llmdrop_utils.measure.probe import Probe
from llmdrop_utils.models.encoder_decoder_layouts import ENCODER_DECODERS, Halves
from llmdrop_utils.models.families import find_anatomy, input_device, position_limit, stream_width
from llmdrop_utils.selection.ranking import drop_sequence

KINDS = ("attention", "mlp", "block", "cross_attention")
NORMS = {"attention": "self_attn_layer_norm", "cross_attention": "encoder_attn_layer_norm", "mlp": "final_layer_norm"}


def similarity(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> float:
    return torch.cosine_similarity(x, y, dim=-1)[mask].mean().item()


def states(model: nn.Module, given: dict, block: nn.Module, off: list[nn.Parameter] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer reads and gives, where these parameters are zero."""
    seen, kept = {}, [p.clone() for p in off]

    def keep(module, args, kwargs, output):
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["y"] = output[0] if isinstance(output, tuple) else output

    for p in off:
        p.zero_()
    handle = block.register_forward_hook(keep, with_kwargs=True)
    model(**given)
    handle.remove()
    for p, old in zip(off, kept, strict=True):
        p.copy_(old)
    return seen["x"], seen["y"]


def keep_term(terms: dict, kind: str, module, args, output) -> None:
    terms[kind] = output


def reference(name: str, model: nn.Module, given: dict) -> dict[str, np.ndarray]:
    """Similarity of every sub-layer, in the dtype of the model."""
    result = {kind: np.full(N_LAYERS, np.nan) for kind in KINDS}
    for i, block in enumerate(blocks_of(model)):
        mask = given["attention_mask"].bool() if i < N_SOURCE else given["labels"] != -100
        kinds = [kind for kind in ("attention", "cross_attention", "mlp") if kind != "cross_attention" or i >= N_SOURCE]
        x, y = states(model, given, block)
        result["block"][i] = similarity(x, y, mask)
        if CASES[name].norms:
            terms, handles = {}, []
            for kind in kinds:
                module = block.get_submodule(getattr(CASES[name], kind))
                handles.append(module.register_forward_hook(functools.partial(keep_term, terms, kind)))
            states(model, given, block)
            for handle in handles:
                handle.remove()
            stream = x
            for kind in kinds:
                after = stream + terms[kind].view(x.shape)
                result[kind][i] = similarity(stream, after, mask)
                stream = block.get_submodule(NORMS[kind])(after)
            torch.testing.assert_close(stream, y, msg="the reference itself")
        else:
            after = [p for kind in kinds for p in projections(name, block, kind)]
            stream = x
            for kind in kinds:
                after = after[len(projections(name, block, kind)) :]
                more = states(model, given, block, after)[1]
                result[kind][i] = similarity(stream, more, mask)
                stream = more
    return result


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_float64_reference(name):
    model, given = tiny(name), pairs()
    found = measure_importance(model, given, batch_size=2)
    expected = reference(name, copy.deepcopy(model).double(), given)
    assert tuple(found.per_sample) == KINDS
    for kind in KINDS:
        assert np.nanmax(expected[kind]) - np.nanmin(expected[kind]) > 1e-3, "a reference that is the same tests nothing"
        np.testing.assert_allclose(found.similarity[kind], expected[kind], rtol=0, atol=1e-6, err_msg=kind)
    exact = measure_importance(copy.deepcopy(model).double(), given)
    for kind in KINDS:  # each token's importance is rounded to float32
        np.testing.assert_allclose(exact.similarity[kind], expected[kind], rtol=0, atol=1e-7, err_msg=kind)


# ---- what counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_and_batches(name):
    model, given, done = tiny(name), pairs(5), []
    found = measure_importance(model, given, batch_size=2, on_batch=done.append)
    assert done == [32, 32, 16]  # 9 + 7 tokens a pair
    assert found.weights.tolist() == [[9, 9, 9, 7, 7], [9, 9, 9, 5, 5], *[[6, 6, 6, 7, 7]] * 3]
    assert repr(found).endswith("5 layers, 5 samples, 69 tokens)")
    alone = [
        measure_importance(model, {"input_ids": s[m.bool()][None], "labels": t[t != -100][None]})
        for s, m, t in zip(given["input_ids"], given["attention_mask"], given["labels"], strict=True)
    ]
    for kind in KINDS:
        rows = np.concatenate([one.per_sample[kind] for one in alone])
        np.testing.assert_allclose(found.per_sample[kind], rows, atol=2e-6)
        expected = [np.average(column, weights=w) for column, w in zip(rows.T, found.weights.T, strict=True)]
        np.testing.assert_allclose(found.importance[kind], expected, atol=2e-6)
    counted = [9 + 9 + 6 * 3] * 3 + [7 + 5 + 7 * 3] * 2
    assert found.histogram["block"].sum(1).tolist() == counted
    assert found.histogram["cross_attention"].sum(1).tolist() == [0, 0, 0, *counted[3:]]
    assert np.isnan(found.quantiles("cross_attention", [0.5])[:3]).all()
    assert np.isfinite(found.quantiles("cross_attention", [0.5])[3:]).all()


def test_stored_and_read_back():
    found = measure_importance(tiny("t5"), pairs())
    again = Importance.from_json(found.to_json())
    assert (again.fingerprint, again.gone, repr(again)) == (found.fingerprint, found.gone, repr(found))
    assert found.to_json()["per_sample"]["cross_attention"][0][:3] == [None] * 3
    first = found.first(2)
    np.testing.assert_array_equal(first.importance["mlp"], np.average(
        found.per_sample["mlp"][:2], axis=0, weights=found.weights[:2]))  # fmt: skip


def test_other_dtypes():
    """T5 keeps a part of its MLPs in float32 beside float16."""
    model, given = tiny("t5"), pairs()
    exact = measure_importance(model, given).importance
    model.half()
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    for each in (model, tiny("t5").bfloat16(), tiny("bart").bfloat16()):
        found = measure_importance(each, given).importance
        if each.config.model_type == "t5":
            np.testing.assert_allclose(found["attention"], exact["attention"], rtol=0.1)


def test_out_of_memory_in_the_decoder(capsys):
    model, given = tiny("bart"), pairs()
    expected = measure_importance(model, given, batch_size=1)

    def too_large(module, args):
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError

    model.model.decoder.layers[1].fc1.register_forward_pre_hook(too_large)
    found = measure_importance(model, given, batch_size=3)
    assert "batch of 1" in capsys.readouterr().err
    for kind in KINDS:
        np.testing.assert_array_equal(found.per_sample[kind], expected.per_sample[kind])
    model.model.decoder.layers[1].fc1.register_forward_pre_hook(lambda *_: too_large(None, [[1, 2]]))
    with pytest.raises(LLMDropError, match="Out of GPU memory with a single pair of 9 and 7 tokens"):
        measure_importance(model, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "reads sources and predicts targets. Give what prepare_pairs.tokenizer, sources, targets. returns"),
        ({"labels": torch.ones(2, 7, dtype=torch.long)}, "found 3 sources and 2 targets"),
        ({"labels": torch.full((3, 7), 97)}, "Token ids run from 97 to 97, but this model knows 0 to 96"),
        ({"labels": torch.full((3, 7), -100)}, "Each target must begin with a token that counts"),
        ({"labels": torch.tensor([[5, -100, 5]] * 3)}, "Each target .* be padded at its end alone"),
        ({"attention_mask": torch.tensor([[0] + [1] * 8] * 3)}, "Each source must begin with a token that counts"),
        ({"attention_mask": torch.ones(3, 4)}, r"must have the shape of the tokens \(3, 9\)"),
        ({"input_ids": torch.ones(3, 65, dtype=torch.long), "attention_mask": None}, "65 tokens are too long .* 64 positions"),
    ],
)
def test_bad_input(change, message):
    given = {name: value for name, value in (pairs() | change).items() if value is not None}
    with pytest.raises(LLMDropError, match=message):
        measure_importance(tiny("bart"), given)


def test_more_bad_input():
    with pytest.raises(LLMDropError, match="reads sources and predicts targets"):
        measure_importance(tiny("bart"), pairs()["input_ids"])
    with pytest.raises(LLMDropError, match="Give the attention mask of an encoder-decoder with its source"):
        measure_importance(tiny("bart"), pairs(), attention_mask=pairs()["attention_mask"])
    model = tiny("t5")
    model.config.decoder_start_token_id = None
    with pytest.raises(LLMDropError, match="t5 model does not say with which token a target begins"):
        measure_importance(model, pairs())


# ---- what is selected -----------------------------------------------------------------------------------------------------


def test_selection():
    model = tiny("t5")
    scores = measure_importance(model, pairs())
    assert scores.gone == {("cross_attention", layer) for layer in range(3)}
    least = 3 + int(np.argmin(scores.importance["cross_attention"][3:]))
    assert select(scores, "cross_attention", 1).cross_attention == (least,)
    with pytest.raises(LLMDropError, match="Cannot drop 3 cross_attention layers: this model has 2 to drop"):
        select(scores, "cross_attention", 3)
    blocks = select(scores, "block", 5)
    assert set(blocks.attention) == set(blocks.mlp) == set(range(5))
    assert set(blocks.cross_attention) == {3, 4}
    assert blocks.n_drop == 12
    joint = drop_sequence(scores, "joint")
    values = [scores.importance[kind][layer] for kind, layer in joint]
    assert len(joint) == 12
    assert values == sorted(values)
    with dropped(model, select(scores, "joint", 12)):
        left = measure_importance(model, pairs())
    assert all(drop_sequence(left, kind) == [] for kind in KINDS)


# ---- anatomy --------------------------------------------------------------------------------------------------------------


def test_every_family_has_a_tiny_model():
    assert {case.model_type for case in CASES.values()} | {"umt5"} == set(ENCODER_DECODERS)


@pytest.mark.parametrize("name", CASES)
def test_what_a_configuration_says(name):
    model = tiny(name)
    anatomy = find_anatomy(model)
    assert (len(anatomy), anatomy.n_source, stream_width(model.config)) == (5, 3, 32)
    assert (anatomy.encoder, anatomy.decoder) == (model.get_encoder(), model.get_decoder())
    assert anatomy.having("cross_attention") == [3, 4]
    assert input_device(model) == torch.device("cpu")
    assert position_limit(model.config) == (None if "t5" in name else 64)


@pytest.mark.parametrize(
    ("name", "half", "fields", "message"),
    [
        ("t5", "decoder", {"cross_attention": "layer.1.layer_norm"}, r"Layer 3 .*stream \+ .* differs from"),
        ("t5", "encoder", {"attention": "layer.0.layer_norm"}, r"Layer 0 .*stream \+ attention"),
        ("t5", "decoder", {"cross_input": "layer.2.layer_norm"}, r"Layer 3 .*stream \+ attention differs from what the cross-"),
        (
            "bart",
            "decoder",
            {"cross_attention": "fc2"},
            r"stream \+ cross-attention differs from what the norm after the cross",
        ),
        (
            "bart",
            "decoder",
            {"mlp_input": "encoder_attn"},
            "the norm after the cross-attention differs from what the MLP reads",
        ),
        ("pegasus", "decoder", {"mlp_input": "encoder_attn"}, r"stream \+ cross-attention differs from what the MLP reads"),
    ],
)
def test_wrong_entries_are_noticed(name, half, fields, message, monkeypatch):
    model, known = tiny(name), ENCODER_DECODERS[name]
    wrong = dataclasses.replace(known, **{half: dataclasses.replace(getattr(known, half), **fields)})
    assert isinstance(wrong, Halves)
    monkeypatch.setitem(ENCODER_DECODERS, name, wrong)
    with pytest.raises(LLMDropError, match=f"{message}.*ENCODER_DECODERS .llmdrop_utils/models/encoder_decoder_layouts.py. is"):
        measure_importance(model, pairs())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0
    assert Probe(find_anatomy(tiny("mbart")), "cosine").kinds == KINDS
