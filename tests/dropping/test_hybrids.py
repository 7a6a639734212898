"""Models that have attention in some layers, and another mixer of tokens in the others: what is possible, and what is refused.

That dropping and decoding equal the dense model with silenced projections is in tests/models/test_walk.py.
"""

import families
import numpy as np
import pytest
import torch

from llmdrop_utils import (
    DropPlan,
    LLMDropError,
    Load,
    drop,
    dropped,
    fit_maps,
    load_dropped,
    measure_causes,
    measure_importance,
    measure_speed,
    save_dropped,
    select,
    tune,
)
from llmdrop_utils.dropping.units import available
from llmdrop_utils.measure.alone import measure_without_residual
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.families import find_anatomy
from llmdrop_utils.models.locate import locate_model
from llmdrop_utils.selection.criteria import obstacle_to
from llmdrop_utils.selection.methods import Context, select_by, select_consecutive_blocks
from llmdrop_utils.studies.run import identity_of

TOKENS = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(4))
HYBRIDS = {"jamba": [0, 2], "lfm2": [1, 2], "kimi_linear": [1, 2]}  # a mixer of its own name, or of attention's
every_hybrid = pytest.mark.parametrize(("name", "layers"), HYBRIDS.items(), ids=HYBRIDS)


@every_hybrid
def test_layers_with_attention_are_told_apart(name, layers):
    anatomy = find_anatomy(families.tiny(name))
    (other,) = {0, 1, 2} - set(layers)
    assert anatomy.with_attention == layers
    assert [available(anatomy, kind) for kind in ("attention", "mlp", "block")] == [layers, [0, 1, 2], layers]
    assert anatomy.other_mixers == f"in place of attention, layers [{other}] have another mixer of tokens"


@every_hybrid
def test_a_plan_that_names_another_mixer(name, layers):
    model = families.tiny(name)
    (other,) = {0, 1, 2} - set(layers)
    with pytest.raises(LLMDropError, match=rf"layer {other}, but that layer of this {name}.* have attention: \[{layers[0]}, "):
        drop(model, DropPlan((layers[0], other)))
    drop(model, DropPlan((layers[0],), (other,)))
    assert find_anatomy(model).with_attention == layers, "what is dropped is built with attention as ever"


@every_hybrid
def test_no_method_chooses_another_mixer(name, layers):
    model = families.tiny(name)
    scores = measure_importance(model, TOKENS)
    assert all(np.isfinite(values).all() for values in scores.importance.values())
    assert set(select(scores, "joint", 5).attention) == set(layers)
    assert set(select(scores, "block", 2).attention) == set(layers)
    for method in ("one-shot", "iterative", "random", "reverse order", "Taylor", "output change"):
        for kind in ("attention", "block"):
            plan = select_by(method, Context(model, TOKENS), kind, 2)
            assert set(plan.attention) == set(layers), (method, kind)


@every_hybrid
def test_what_asks_for_attention_in_every_layer(name, layers, tmp_path):
    model = families.tiny(name)
    for refused in (
        lambda: measure_causes(model, TOKENS),
        lambda: measure_without_residual(model, TOKENS),
        lambda: fit_maps(model, TOKENS, DropPlan((layers[0],))),
        lambda: select_by("weight norm", Context(model, TOKENS), "attention", 1),
    ):
        with pytest.raises(LLMDropError, match=r"in place of attention, layers \[\d\] have another mixer of tokens"):
            refused()
    for criterion in ("Gate-Norm", "without residual"):
        assert "another mixer" in obstacle_to(criterion, model)
    with pytest.raises(LLMDropError, match="blocks in a row cannot be dropped"):
        select_consecutive_blocks(model, TOKENS, 1)
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(LLMDropError, match=rf"m-\w+ is a hybrid \({name}\)"):
        identity_of(locate_model(str(tmp_path / "m")), profile=None)


@every_hybrid
def test_saved_timed_and_tuned(name, layers, tmp_path):
    model, plan = families.tiny(name), DropPlan((layers[0],), (1,))
    save_dropped(model, None, plan, tmp_path / "dropped")
    again, _ = load_dropped(tmp_path / "dropped", torch.float32, "cpu")
    with torch.no_grad(), dropped(model, plan):
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
    whole, faster = measure_speed(model, Load("decode", 8, 2), [DropPlan(), plan])
    assert faster.kv_bytes * 2 == whole.kv_bytes
    mixers = {n: p.clone() for n, p in model.named_parameters() if ".mamba." in n or ".conv." in n}
    tune(model, TOKENS, plan, tmp_path / "tuned")
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in mixers.items())


def test_a_layer_of_an_unknown_kind():
    model = families.tiny("qwen3_next")
    model.config.layer_types = [*model.config.layer_types[:2], "hybrid"]
    with pytest.raises(LLMDropError, match="Layer 2 of this qwen3_next model is of the kind 'hybrid', which is unknown. Known"):
        measure_importance(model, TOKENS)


def test_all_attention_dropped():
    model = families.tiny("jamba")
    with dropped(model, DropPlan((0, 2))):
        assert model(TOKENS).logits.isfinite().all()
        with pytest.raises(LLMDropError, match="attention of all 2 layers is dropped"):
            model.generate(TOKENS, max_new_tokens=2, pad_token_id=0)
