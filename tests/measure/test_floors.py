"""Bytes and operations counted from a shape, against live caches and arithmetic by hand."""

import families
import pytest
import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache

from llmdrop_utils import DropPlan, Load, cache_bytes, dropped, kv_bytes, measure_speed
from llmdrop_utils.dropping.maps import LinearMap
from llmdrop_utils.measure.floors import Part, floor_seconds, parts_of_pass
from llmdrop_utils.models.cache_shape import is_full_attention

BATCH, LENGTH = 3, 11
LATENT = {"deepseek-v2", "deepseek-v3"}  # older transformers cache the expanded keys and values


def live_bytes(model, plan):
    with torch.inference_mode(), dropped(model, plan):
        cache = DynamicCache(config=model.config)
        for start in (0, LENGTH - 1):  # a prompt, then one more token
            tokens = torch.ones(BATCH, LENGTH - 1 if start == 0 else 1, dtype=torch.long)
            model(tokens, past_key_values=cache, use_cache=True)
    return cache_bytes(cache)


@pytest.mark.parametrize("name", families.CASES)
@pytest.mark.parametrize("plan", [DropPlan(), DropPlan(attention=(0,)), DropPlan(attention=(2, 1)), DropPlan(mlp=(1,))])
def test_formula_equals_live_cache(name, plan):
    if name in LATENT and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("this version of transformers caches expanded keys and values")
    model = families.tiny(name)
    counted = live_bytes(model, plan)
    assert counted == kv_bytes(model.config, plan, BATCH, LENGTH, 4)
    if is_full_attention(model.config):
        n_layers = 3
        assert counted * n_layers == kv_bytes(model.config, DropPlan(), BATCH, LENGTH, 4) * (n_layers - len(plan.attention))


def test_windows_keep_what_the_next_token_sees():
    model = families.tiny("gemma3")  # sliding, full, sliding; window 4
    assert not is_full_attention(model.config)
    full, window = 2 * 2 * 8 * LENGTH, 2 * 2 * 8 * 3
    assert kv_bytes(model.config, DropPlan(), 1, LENGTH, 1) == full + 2 * window
    assert kv_bytes(model.config, DropPlan(attention=(1,)), 1, LENGTH, 1) == 2 * window
    assert kv_bytes(model.config, DropPlan(), 1, 2, 1) == 3 * 2 * 2 * 8 * 2, "a window that is not full yet"


def test_parts_by_hand():
    """Llama, hidden 32, MLP 48, 4 heads and 2 key-value heads of 8, 3 layers, vocabulary 97."""
    model = families.tiny("llama")
    attention, mlp, head = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 32 * 97
    batch, new, context = 2, 1, 10
    parts = parts_of_pass(model, batch, new, context)
    cache = 3 * batch * (context + new) * 2 * 2 * 8
    assert sum(p.bytes for p in parts) == 4 * (3 * (attention + mlp) + head + cache)
    multiplied = 3 * batch * (context + 1) * 2 * 4 * 8  # queries with keys, scores with values
    assert sum(p.operations for p in parts) == 2 * (batch * (3 * (attention + mlp) + head) + multiplied)
    with dropped(model, DropPlan(attention=(0, 1), mlp=(2,))):
        parts = parts_of_pass(model, batch, new, context)
    assert sum(p.bytes for p in parts) == 4 * (attention + 2 * mlp + head + cache / 3)
    linear = LinearMap(torch.eye(32), torch.zeros(32))
    with dropped(model, DropPlan(attention=(0, 1), mlp=(2,), maps={("attention", 1): linear})):
        parts = parts_of_pass(model, batch, new, context)
    assert sum(p.bytes for p in parts) == 4 * (attention + 32 * 32 + 2 * mlp + head + cache / 3), "a map has weights, no cache"


def test_prefill_counts_each_token_with_those_before_it():
    model = families.tiny("llama")
    alone = sum(p.operations for p in parts_of_pass(model, 1, 1, 0))
    together = sum(p.operations for p in parts_of_pass(model, 1, 8, 0))
    head = 2 * 32 * 97  # of the last token alone
    triangle = 2 * 3 * (8 * 9 // 2) * 2 * 4 * 8
    weights = alone - head - 2 * 3 * 1 * 2 * 4 * 8
    assert together == 8 * weights + head + triangle


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "gpt2", "deepseek-v3", "gpt-j"])
def test_other_families_can_be_counted(name):
    model = families.tiny(name)
    few, many = (sum(p.bytes for p in parts_of_pass(model, n, 1, 5)) for n in (1, 64))
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert 0 < few < weights * 1.1
    assert few < many


def test_floor_adds_parts_one_after_the_other():
    """8 bytes at 2 bytes/s take longer than 6 operations at 3/s; of 2 bytes and 30 operations, the operations do."""
    assert floor_seconds([Part(8, 6), Part(2, 30)], bandwidth=2, rate=3) == 4 + 10


def test_floor_takes_the_slower_of_both():
    model = families.tiny("llama")
    parts = parts_of_pass(model, 1, 1, 4)
    assert floor_seconds(parts, 1e9, 1e30) == pytest.approx(sum(p.bytes for p in parts) / 1e9)
    assert floor_seconds(parts, 1e30, 1e9) == pytest.approx(sum(p.operations for p in parts) / 1e9)


@pytest.mark.parametrize("inside", [False, True])
def test_weights_of_three_dimensions_need_not_be_experts(inside):
    """A vision tower reads no text, so it counts for nothing; a convolution in the decoder is read whole."""
    model = families.tiny("llama")
    before = [sum(part.bytes for part in parts_of_pass(model, 1, 1, 10)), len(parts_of_pass(model, 1, 1, 10))]
    (model.model.layers[0] if inside else model).tower = torch.nn.Conv1d(32, 8, 5, bias=False)
    parts = parts_of_pass(model, 1, 1, 10)
    more = 4 * 32 * 8 * 5 if inside else 0
    assert [sum(part.bytes for part in parts) - more, len(parts) - inside] == before
    assert measure_speed(model, Load("prefill", 4), repeats=1)[0].floor_seconds > 0
