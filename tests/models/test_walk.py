"""A walk through all causal language models that transformers knows: each is supported, refused with a reason, or unknown.

The supported ones that are not among `families.CASES` are measured, dropped, decoded and scored here, once each.
"""

import contextlib
import copy
import functools
import re
import types

import families
import numpy as np
import pytest
import torch
import transformers
from documents import ROOT
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmdrop_utils import DropPlan, LLMDropError, cache_bytes, dropped, kv_bytes, measure_importance, select
from llmdrop_utils.derive.repair import repair
from llmdrop_utils.measure.floors import parts_of_pass
from llmdrop_utils.measure.metrics import KINDS
from llmdrop_utils.measure.scoring import score
from llmdrop_utils.models.encoder_layouts import ENCODERS
from llmdrop_utils.models.families import family_of, find_anatomy, learned_positions, stream_width
from llmdrop_utils.models.layouts import FAMILIES
from llmdrop_utils.models.outlook import Shape
from llmdrop_utils.models.refused import REFUSED

# ---- all of them ----------------------------------------------------------------------------------------------------------

SETTINGS = {case.model_type: case.settings for case in (families.CASES | families.MORE).values()}
DOCUMENT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
SETTINGS["reformer"] = {"is_decoder": True}
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}  # of configurations that no model can be built of as they are


def kind_of(name: str) -> str:
    """ "supported", "refused" or "unknown", told by a model on the device "meta" of the family's own size."""
    model, config = None, types.SimpleNamespace(model_type=name)
    config.get_text_config = lambda: config
    with contextlib.suppress(Exception):  # of transformers: it lacks a package, or its own defaults contradict each other
        config = AutoConfig.for_model(name, **SETTINGS.get(name, {}))
        config = getattr(config, PARTS.get(name, ""), config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    if name in ENCODERS:
        return "refused"  # by `load_model`, as no causal language model
    try:
        family_of(config) if model is None else find_anatomy(model)
    except LLMDropError as error:
        return "refused" if "cannot be taken apart: " in str(error) else "unknown"
    return "supported"


def test_every_model_is_supported_refused_or_unknown():
    """And as many are supported as the documents say, less the names that this version of transformers does not have."""
    found = {name: kind_of(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    supported, known = (int(n) for n in re.search(r"(\d+) of the (\d+) causal language models", DOCUMENT).groups())
    n = sum(kind == "supported" for kind in found.values())
    assert n >= supported - max(0, known - len(found)), found
    if Version(transformers.__version__).release[:2] == (5, 23):
        assert (n, len(found)) == (supported, known)
        assert "unknown" not in found.values()


def test_tables_agree():
    """No family is both supported and refused; each supported one has a tiny model."""
    assert not {*FAMILIES, *ENCODERS} & set(REFUSED)
    assert set(FAMILIES).isdisjoint(ENCODERS)
    assert {case.model_type for case in (families.CASES | families.MORE).values()} == set(FAMILIES) - {"emu3_text_model"}
    assert not set(families.CASES) & set(families.MORE)


# ---- those that are not in the full matrix ----------------------------------------------------------------------------------

TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2))  # longer than the windows, which are 4
MASK = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)
LATENT = {"axk2", "deepseek_v32"}  # older transformers cache their expanded keys and values
# Older transformers lack some families, and do not say which layers of RecurrentGemma have attention.
OLD = {"recurrent_gemma"} if "layer_types" not in CONFIG_MAPPING["recurrent_gemma"].attribute_map else set()
NAMES = [name for name in families.MORE if name in CONFIG_MAPPING and name not in OLD]
every_family = pytest.mark.parametrize("name", NAMES)


@functools.cache
def dense(name: str) -> nn.Module:
    return families.tiny(name)


def plan_for(name: str) -> DropPlan:
    """An attention of those that there are, and another layer's MLP."""
    first, *_ = find_anatomy(dense(name)).with_attention
    return DropPlan((first,), (1 - first % 2,))


def silenced(name: str, plan: DropPlan) -> nn.Module:
    model = copy.deepcopy(dense(name))
    families.silence(name, model, plan.attention, plan.mlp)
    return model


def padded(model: nn.Module) -> torch.Tensor:
    return model(TOKENS, attention_mask=MASK, position_ids=POSITIONS, use_cache=False).logits


def step_by_step(model: nn.Module) -> tuple[torch.Tensor, DynamicCache]:
    logits, cache = [], DynamicCache(config=model.config)
    for start, end in ((0, 8), *((i, i + 1) for i in range(8, 12))):
        given = {"attention_mask": MASK[:, :end], "position_ids": POSITIONS[:, start:end], "past_key_values": cache}
        logits.append(model(TOKENS[:, start:end], use_cache=True, **given).logits)
    return torch.cat(logits, 1), cache


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    found, expected = found[MASK.bool()], expected[MASK.bool()]
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@every_family
@torch.no_grad()
def test_importance_equals_float64(name, monkeypatch):
    """Terms told apart by output projections that are zero, from what the layers give."""
    case, default = families.MORE[name], torch.get_default_dtype()
    found = measure_importance(dense(name), TOKENS)
    monkeypatch.setattr("torch.nn.functional.softmax", lambda x, dim, **_: torch.softmax(x, dim))  # not in float32
    model = copy.deepcopy(dense(name)).double()
    model.config._experts_implementation = "eager"  # the fused one has no float64
    anatomy = find_anatomy(model)

    def states(layer: int | None = None, off: str = "") -> list[torch.Tensor]:
        seen = []
        weights = [] if layer is None else [p for n, p in anatomy.layers[layer].block.named_parameters() if re.search(off, n)]
        kept = [p.clone() for p in weights]
        assert layer is None or kept
        for p in weights:
            p.zero_()
        keep = lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        handles = [one.block.register_forward_pre_hook(keep, with_kwargs=True) for one in anatomy.layers]
        last = lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
        handles.append(anatomy.layers[-1].block.register_forward_hook(last))
        torch.set_default_dtype(torch.float64)
        try:
            anatomy.decoder(TOKENS, use_cache=False)
        finally:
            torch.set_default_dtype(default)
        for handle in handles:
            handle.remove()
        for p, old in zip(weights, kept, strict=True):
            p.copy_(old)
        return [state.clone() for state in seen]

    def similarity(x: torch.Tensor, y: torch.Tensor) -> float:
        return torch.cosine_similarity(x, y, dim=-1).mean().item()

    whole = states()
    expected = {kind: np.zeros(3) for kind in KINDS}
    for i in range(3):
        x, y, between = whole[i], whole[i + 1], states(i, case.mlp)[i + 1]
        mlp = (x, states(i, case.attention)[i + 1]) if case.parallel else (between, y)
        for kind, pair in (("attention", (x, between)), ("mlp", mlp), ("block", (x, y))):
            expected[kind][i] = similarity(*pair)
    for kind in KINDS:
        assert np.ptp(expected[kind]) > 1e-4, "a reference that is the same everywhere tests nothing"
        np.testing.assert_allclose(found.similarity[kind], expected[kind], rtol=0, atol=2e-6, err_msg=kind)
    others = {layer for layer in range(3) if not anatomy.layers[layer].has_attention}
    assert found.gone == {(kind, layer) for kind in ("attention", "block") for layer in others}


@every_family
@torch.inference_mode()
def test_dropping_equals_silenced_projections(name):
    """The full forward, cached greedy decoding, and log-probabilities that share a prefix; and what the cache holds."""
    model, plan = dense(name), plan_for(name)
    twin, whole = silenced(name, plan), padded(model)
    expected = padded(twin)
    assert float((expected - whole)[MASK.bool()].abs().max()) > 1e-3, "the plan must matter"
    requests = [([5, 6, 7, 8, 9, 10], [11, 12]), ([5, 6, 7, 8, 9, 10], [13]), ([5, 6, 7], [8])]
    scores = score(twin, requests, [DropPlan()]).logprob
    np.testing.assert_allclose(score(model, requests, [DropPlan(), plan]).logprob[1], scores[0], atol=1e-4)
    how = {"attention_mask": MASK[:, :7], "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with dropped(model, plan):
        close(padded(model), expected)
        logits, cache = step_by_step(model)
        close(logits, expected)
        if name != "recurrent_gemma":  # its output has no cache to go on with
            assert model.generate(TOKENS[:, :7], **how).tolist() == twin.generate(TOKENS[:, :7], **how).tolist()
    if name not in LATENT or Version(transformers.__version__) >= Version("5.20"):
        assert cache_bytes(cache) == kv_bytes(model.config, plan, 2, 12, 4) < kv_bytes(model.config, DropPlan(), 2, 12, 4)
        assert cache_bytes(step_by_step(model)[1]) == kv_bytes(model.config, DropPlan(), 2, 12, 4)
    assert torch.equal(padded(model), whole)


@every_family
def test_what_else_asks_of_a_family(name):
    """Widths and sizes that forecasts are made of, what can be chosen, and repair."""
    model, plan = copy.deepcopy(dense(name)), plan_for(name)
    assert stream_width(model.config) == model.get_input_embeddings().weight.shape[1] == 32
    assert Shape.of_config(model.config).parameters == sum(weight.numel() for weight in model.parameters())
    assert learned_positions(model.config) in (None, 64)
    whole = sum(part.bytes for part in parts_of_pass(model, 1, 1, 7))
    with dropped(model, plan):
        assert sum(part.bytes for part in parts_of_pass(model, 1, 1, 7)) < whole
    scores, layers = measure_importance(model, TOKENS), find_anatomy(model).with_attention
    assert set(select(scores, "attention", len(layers)).attention) == set(layers)
    with pytest.raises(LLMDropError, match=f"Cannot drop {len(layers) + 1} attention layers"):
        select(scores, "attention", len(layers) + 1)
    text = torch.randint(3, 97, (24, 32), generator=torch.Generator().manual_seed(3))
    repair(model, text, plan)
    with torch.no_grad(), dropped(model, plan):
        assert bool(model(TOKENS).logits.isfinite().all())
