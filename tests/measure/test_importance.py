"""Importance against an independent reference: float64, no hooks, sub-layers turned off by zeroing their projections."""

import copy
import dataclasses
import itertools
import json
from unittest import mock

import accelerate
import families
import numpy as np
import pytest
import torch
from torch import nn

from llmdrop_utils import DropPlan, LLMDropError, dropped, measure_importance
from llmdrop_utils.measure.importance import Importance, drop_order
from llmdrop_utils.measure.metrics import KINDS, METRICS, metric
from llmdrop_utils.models import layouts
from llmdrop_utils.models.families import family_of, find_anatomy, input_device, learned_positions, position_limit, stream_width

TOKENS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(2))
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 4 + [0] * 7]),
    "left": torch.tensor([[1] * 11, [0] * 4 + [1] * 7, [0] * 7 + [1] * 4]),
}


def reference(name: str, model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None) -> dict[str, np.ndarray]:
    """Similarity of every sub-layer in float64, from the hidden states that transformers returns."""
    case = families.CASES[name]
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"  # the fused one has no float64
    decoder = model.get_decoder()
    for final_norm in ("norm", "final_layer_norm", "final_layernorm", "ln_f"):
        if isinstance(getattr(decoder, final_norm, None), nn.Module):
            setattr(decoder, final_norm, nn.Identity())  # or the last hidden state would come after it
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)  # counted from the first real token
    reads: dict[str, torch.Tensor] = {}  # what the norms on the stream of a post-norm layer read

    def keep(name: str):
        return lambda module, args: reads.__setitem__(name, args[0].view(*tokens.shape, -1))

    layers = next(child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == 3)

    def states(layer: int | None = None, off: str = "") -> tuple[torch.Tensor, ...]:
        silenced = [] if layer is None else [p for n, p in layers[layer].named_parameters() if off in n]
        assert layer is None or silenced
        kept = [p.detach().clone() for p in silenced]
        for p in silenced:
            p.data.zero_()
        with mock.patch("torch.nn.functional.softmax", lambda x, dim, dtype=None: torch.softmax(x, dim)):  # not in float32
            output = model(
                tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False
            ).hidden_states
        for p, old in zip(silenced, kept, strict=True):
            p.data.copy_(old)
        return output

    def similarity(x: torch.Tensor, y: torch.Tensor) -> float:
        cosine = torch.cosine_similarity(x, y, dim=-1)
        return (cosine if mask is None else cosine[mask.bool()]).mean().item()

    dense = states()
    result = {kind: np.zeros(3) for kind in KINDS}
    for i in range(3):
        x, y = dense[i], dense[i + 1]
        if case.norms:  # the term is what is added before the norm
            handles = [layers[i].get_submodule(norm).register_forward_pre_hook(keep(norm)) for norm in case.norms]
            states()
            for handle in handles:
                handle.remove()
            after_attention, after_mlp = (reads[norm] for norm in case.norms)
            h = layers[i].get_submodule(case.norms[0])(after_attention)
            result["block"][i] = similarity(x, y)
            result["attention"][i], result["mlp"][i] = similarity(x, after_attention), similarity(h, after_mlp)
            continue
        after_attention = states(i, case.mlp)[i + 1]
        result["block"][i] = similarity(x, y)
        result["attention"][i] = similarity(x, after_attention)
        if case.parallel:
            result["mlp"][i] = similarity(x, states(i, case.attention)[i + 1])
        else:
            result["mlp"][i] = similarity(after_attention, y)
    return result


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", families.CASES)
@torch.no_grad()
def test_equals_float64_reference(name, padding):
    model, mask = families.tiny(name), MASKS[padding]
    expected = reference(name, model, TOKENS, mask)
    found = measure_importance(model, TOKENS, batch_size=3, attention_mask=mask).similarity
    for kind in KINDS:
        assert np.ptp(expected[kind]) > 1e-4, "a reference that is the same everywhere tests nothing"
        np.testing.assert_allclose(found[kind], expected[kind], rtol=0, atol=1e-6, err_msg=kind)


@pytest.mark.parametrize("name", families.CASES)
def test_what_a_configuration_says(name):
    model = families.tiny(name)
    assert stream_width(model.config) == model.get_input_embeddings().weight.shape[1] == 32
    assert position_limit(model.config) == 64
    assert learned_positions(model.config) == (64 if name in ("gpt2", "opt", "opt-350m") else None)
    assert input_device(model) == torch.device("cpu")
    assert input_device(model.to("meta")) == torch.device("cpu")  # offloaded: accelerate moves inputs


def test_batch_size_changes_nothing(tiny_model):
    tokens = torch.randint(0, 257, (5, 20))
    whole, single = (measure_importance(tiny_model[0], tokens, batch_size=b) for b in (5, 2))
    for kind in KINDS:
        assert whole.per_sample[kind].shape == (5, 6)
        np.testing.assert_allclose(whole.per_sample[kind], single.per_sample[kind], atol=1e-6)
        assert whole.histogram[kind].sum() == 6 * 5 * 20


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "falcon-rw"])  # every way to count positions
def test_padding_equals_no_padding(name, side):
    model = families.tiny(name)
    real = slice(7, None) if side == "left" else slice(None, 9)
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[:, real] = 1
    tokens = torch.randint(3, 97, (2, 16))
    padded = measure_importance(model, tokens, attention_mask=mask)
    alone = measure_importance(model, tokens[:, real])
    assert padded.weights.tolist() == [9, 9]
    for kind in KINDS:
        np.testing.assert_allclose(padded.importance[kind], alone.importance[kind], atol=2e-6)


def test_bfloat16_is_reduced_in_float32():
    """A true cosine of 0.9998 must not become 1.0, nor ties, because the model runs in bfloat16."""
    model = families.tiny("llama").bfloat16()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.02
    found = measure_importance(model, TOKENS).importance["attention"]
    exact = measure_importance(copy.deepcopy(model).double(), TOKENS).importance["attention"]
    assert (exact < 5e-3).all()
    assert len(set(found)) == 3
    np.testing.assert_allclose(found, exact, rtol=0.1)


def test_tiny_differences_keep_their_digits():
    """Importance far below float32's resolution of a cosine is still right."""
    model = families.tiny("llama").double()
    model.model.layers[1].self_attn.o_proj.weight.data *= 1e-4
    exact = measure_importance(model, TOKENS).importance["attention"][1]
    assert exact < 1e-7
    np.testing.assert_allclose(measure_importance(model.float(), TOKENS).importance["attention"][1], exact, rtol=1e-3)


def test_offloaded_to_disk(tmp_path, tiny_model):
    tokens = torch.randint(0, 257, (3, 12))
    expected = measure_importance(tiny_model[0], tokens)
    offloaded = accelerate.disk_offload(copy.deepcopy(tiny_model[0]), tmp_path, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in offloaded.parameters())
    found = measure_importance(offloaded, tokens)
    for kind in KINDS:
        np.testing.assert_allclose(found.importance[kind], expected.importance[kind], atol=1e-6)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_model_is_left_as_it_was(tiny_model):
    model = copy.deepcopy(tiny_model[0]).train()
    model.model.layers[1].eval()  # frozen while the rest trains
    modes = [module.training for module in model.modules()]
    measure_importance(model, TOKENS)
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes
    model.model.layers[3].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measure_importance(model, TOKENS)
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes


def test_out_of_memory_halves_the_batch(tiny_model, capsys):
    model = copy.deepcopy(tiny_model[0])
    tokens = torch.randint(0, 257, (7, 10))
    expected = measure_importance(model, tokens)
    layer, forward = model.model.layers[4], model.model.layers[4].forward

    def small_memory(x, *args, **kwargs):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *args, **kwargs)

    layer.forward = small_memory
    found = measure_importance(model, tokens, batch_size=7)
    assert "batch of 3" in capsys.readouterr().err
    for kind in KINDS:
        np.testing.assert_allclose(found.per_sample[kind], expected.per_sample[kind], atol=1e-6)
        assert (found.histogram[kind].sum(1) == 70).all()


def test_wrong_anatomy_is_noticed(monkeypatch):
    """An entry that points at the wrong module must not give wrong numbers silently."""
    monkeypatch.setitem(layouts.FAMILIES, "olmo2", layouts.Family(attention="self_attn", mlp_input="mlp"))
    model = families.tiny("olmo2")
    with pytest.raises(LLMDropError, match="does not add up"):
        measure_importance(model, TOKENS)
    assert hooks(model) == 0


def test_mlp_that_reads_something_else_is_noticed(monkeypatch):
    monkeypatch.setitem(layouts.FAMILIES, "gpt_neox", layouts.Family(attention="attention"))  # but it is parallel
    with pytest.raises(LLMDropError, match="stream \\+ attention differs from what the MLP reads"):
        measure_importance(families.tiny("gpt-neox"), TOKENS)


def test_scaled_residual_needs_its_scale(monkeypatch):
    monkeypatch.setitem(layouts.FAMILIES, "granite", layouts.LLAMA)
    with pytest.raises(LLMDropError, match="does not add up"):
        measure_importance(families.tiny("granite"), TOKENS)


def test_unknown_family_says_what_to_add():
    model = families.tiny("llama")
    model.config.model_type = "novel"
    with pytest.raises(LLMDropError, match=r"'novel' is unknown. Add it to FAMILIES in llmdrop_utils/models/layouts.py"):
        find_anatomy(model)


def test_a_norm_on_the_stream_must_be_named(monkeypatch):
    """Otherwise nothing would tell that the sums of a post-norm layer do not add up."""
    model = families.tiny("opt-350m")
    monkeypatch.setitem(layouts.FAMILIES, "opt", dataclasses.replace(family_of(model.config), stream_norms=None))
    with pytest.raises(LLMDropError, match="does not add up"):
        measure_importance(model, TOKENS)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.zeros(2, 3), None, r"Expected token ids \(n_samples, seq_len\)"),
        (torch.zeros(3, dtype=torch.long), None, r"Expected token ids"),
        (torch.full((1, 4), 300), None, "run from 300 to 300, but this model knows 0 to 256"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4), "must have the shape of the tokens"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]), "at least one token"),
    ],
)
def test_bad_input(tiny_model, tokens, mask, message):
    with pytest.raises(LLMDropError, match=message):
        measure_importance(tiny_model[0], tokens, attention_mask=mask)


def test_more_tokens_than_positions():
    with pytest.raises(LLMDropError, match="Samples of 65 tokens are too long for this model, which knows 64 positions"):
        measure_importance(families.tiny("gpt2"), torch.ones(1, 65, dtype=torch.long))


def test_batch_of_none(tiny_model):
    with pytest.raises(LLMDropError, match="batch size must be 1 or more, but is 0"):
        measure_importance(tiny_model[0], TOKENS, batch_size=0)


def test_infinities_are_named(tiny_model):
    model = copy.deepcopy(tiny_model[0])
    model.model.layers[2].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(LLMDropError, match="mlp of layer 2 gives values that are not finite in torch.float32"):
        measure_importance(model, TOKENS)


def test_ties_go_by_lower_index():
    assert drop_order(np.array([0.2, 0.1, 0.1, 0.3, 0.1])) == (1, 2, 4, 0, 3)


def test_records_keep_what_was_dropped(tiny_model):
    """Those of earlier runs do not say, and were all of whole models."""
    with dropped(tiny_model[0], DropPlan((1, 4), (4,))) as model:
        scores = measure_importance(model, TOKENS)
    assert scores.gone == {("attention", 1), ("attention", 4), ("mlp", 4), ("block", 4)}
    record = json.loads(json.dumps(scores.to_json()))
    again = Importance.from_json(record, "sha256:model")
    assert (again.gone, again.model) == (scores.gone, "sha256:model")
    assert again.order("attention") == scores.order("attention")
    del record["gone"]
    assert Importance.from_json(record).gone == frozenset()
    assert measure_importance(tiny_model[0], TOKENS).to_json()["gone"] == []


def test_a_metric_is_one_registered_function(tiny_model):
    squared_length = metric("squared length")(lambda xx, xa, aa: xx + 2 * xa + aa)
    try:
        found = measure_importance(tiny_model[0], TOKENS, metric="squared length").importance["block"]
    finally:
        del METRICS["squared length"]
    with torch.no_grad():
        states = tiny_model[0].model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    np.testing.assert_allclose(found[:-1], [x.square().sum(-1).mean().item() for x in states[1:-1]], rtol=1e-5)
    with pytest.raises(ValueError, match="two metrics called 'cosine'"):
        metric("cosine")(squared_length)


def test_quantiles_and_round_trip(tiny_model):
    scores = measure_importance(tiny_model[0], torch.randint(0, 257, (4, 32)))
    again = Importance.from_json(scores.to_json())
    for kind in KINDS:
        np.testing.assert_array_equal(again.importance[kind], scores.importance[kind])
        low, median, high = scores.quantiles(kind, [0.05, 0.5, 0.95]).T
        assert (low < median).all()
        assert (median < high).all()
        assert (low < scores.importance[kind]).all()
        assert (scores.importance[kind] < 1.2 * high).all()


@pytest.mark.real
def test_real_model(real_model):
    """SmolLM2-135M: layers 25 and 26 have the most redundant attention, and attention is more redundant than MLP."""
    from llmdrop_utils import load_tokens

    model, tokenizer = real_model
    tokens = load_tokens("web", tokenizer, n_samples=4, seq_len=256)
    scores = measure_importance(model, tokens)
    assert set(scores.order("attention")[:2]) == {25, 26}
    assert np.median(scores.importance["attention"]) < 0.6 * np.median(scores.importance["mlp"])
    with torch.no_grad():
        states = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    by_hand = [1 - torch.cosine_similarity(x.double(), y.double(), -1).mean() for x, y in itertools.pairwise(states[:-1])]
    np.testing.assert_allclose(scores.importance["block"][:-1], np.array(by_hand), atol=1e-6)
