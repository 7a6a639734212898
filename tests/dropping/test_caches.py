"""Cached decoding and generation of dropped models equal a full forward; nothing is cached for a dropped attention."""

import functools

import pytest
import torch
from dropping.reference import (
    MASK,
    PLANS,
    TOKENS,
    close,
    dense,
    every_family,
    every_plan,
    expected_logits,
    padded,
    pristine,
    silenced,
    step_by_step,
)
from torch import nn
from transformers import DynamicCache, StaticCache

from llmdrop_utils import LLMDropError
from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.dropping.units import dropped, skipping

CACHES = {
    "made by the model": lambda model: None,
    "growing": lambda model: DynamicCache(),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}
# Dense, it fails as well: transformers adds a bias of the tokens' length to a mask of the cache's length.
NO_STATIC_CACHE = {"falcon-rw"}


def n_bytes(cache) -> list[int]:
    """What each layer of a cache holds."""
    return [sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None) for layer in cache.layers]


@functools.cache
def bytes_of_the_whole(name: str, kind: str) -> list[int]:
    return n_bytes(step_by_step(pristine(name), CACHES[kind](pristine(name)))[1])


@every_plan
@every_family
def test_cached_decoding_equals_full_forward(name, plan):
    """And the cache holds nothing for what is dropped, and as much as ever for what is left."""
    expected = expected_logits(name, plan)
    kinds = CACHES if plan is PLANS["joint"] else ["growing", "static"] if plan.attention else ["dynamic"]
    for kind in kinds:
        if kind == "static" and name in NO_STATIC_CACHE:
            with pytest.raises(RuntimeError, match="must match the size"):
                step_by_step(pristine(name), CACHES[kind](pristine(name)))
            continue
        with dropped(dense(name), plan) as model:
            logits, cache = step_by_step(model, CACHES[kind](model))
        close(logits, expected)
        assert int(cache.get_seq_length()) == TOKENS.shape[1]
        whole = bytes_of_the_whole(name, kind)
        assert min(whole) > 0
        assert n_bytes(cache) == [0 if index in plan.attention else size for index, size in enumerate(whole)]


def generate(model: nn.Module, **how) -> list[list[int]]:
    torch.manual_seed(3)
    how = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None} | how
    return model.generate(TOKENS[:, :7], attention_mask=MASK[:, :7], **how).tolist()


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", GENERATION.values(), ids=GENERATION)
@every_family
def test_generation(name, how):
    """A batch with padding on the left."""
    plan = PLANS["joint"]
    expected = generate(silenced(name, plan), **how)
    with dropped(dense(name), plan) as model:
        assert generate(model, **how) == expected


@every_plan
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2", "gpt-j"])
def test_generation_with_every_cache(name, plan):
    expected = generate(silenced(name, plan))
    with dropped(dense(name), plan) as model:
        assert generate(model) == expected
        assert generate(model, cache_implementation="static") == expected
        assert generate(model, past_key_values=DynamicCache()) == expected
        assert generate(model, use_cache=False) == expected


def test_a_conversation_goes_on_with_the_same_cache():
    plan = PLANS["attention"]
    reference, first = silenced("gemma2", plan), TOKENS[:1, :5]
    with dropped(dense("gemma2"), plan) as model:
        results = []
        for one in (reference, model):
            cache = DynamicCache(config=model.config)
            answer = one.generate(first, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
            longer = torch.cat([answer, TOKENS[:1, 5:9]], 1)
            results.append(one.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None))
        assert results[0].tolist() == results[1].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon-rw", "gpt-j"])
def test_no_attention_at_all(name):
    plan = DropPlan(attention=(2, 0, 1))
    model = dense(name)
    with dropped(model, plan):
        close(padded(model), expected_logits(name, plan))
        assert model(TOKENS).past_key_values is None
        with pytest.raises(LLMDropError, match="attention of all 3 layers is dropped.*Pass use_cache=False"):
            model(TOKENS, past_key_values=DynamicCache())
        with pytest.raises(LLMDropError, match="Pass use_cache=False"):
            generate(model)
        assert generate(model, use_cache=False) == generate(silenced(name, plan), use_cache=False)
    assert model(TOKENS, use_cache=True).past_key_values is not None
    with skipping(model, DropPlan((1,))), skipping(model, DropPlan((2, 0))):  # no plan drops all, but both do
        assert model(TOKENS, use_cache=True).past_key_values is None
        with pytest.raises(LLMDropError, match="attention of all 3 layers is dropped"):
            generate(model)


def test_a_cache_of_a_dropped_model_is_refused_by_the_whole_one():
    model = dense("llama")
    with dropped(model, PLANS["block"]):
        cache = step_by_step(model)[1]
    with pytest.raises(LLMDropError, match="used while the attention of layer 1 was dropped.*Start with a new cache"):
        model(TOKENS[:, :1], past_key_values=cache)


def test_every_way_to_give_and_take_a_cache():
    model, plan = dense("gpt-j"), PLANS["attention"]
    with dropped(model, plan):
        cache = DynamicCache()
        model.transformer(TOKENS, cache)  # by position
        taken = model(TOKENS, use_cache=True, return_dict=False)[1]  # from a tuple
        for one in (cache, taken):
            assert one.get_seq_length() == TOKENS.shape[1]
            assert [type(layer).__name__ for layer in one.layers] == ["NoCache", "DynamicLayer", "NoCache"]
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        assert cache.layers[1].keys.shape[:3] == (2, 4, 10)
        cache.reset()
        assert [type(layer).__name__ for layer in cache.layers] == ["NoCache", "DynamicLayer", "NoCache"]


def test_a_cache_that_is_given_but_not_returned():
    plan, cache = PLANS["attention"], DynamicCache()
    with dropped(dense("mistral"), plan) as model:
        for tokens in TOKENS[:, :9], TOKENS[:, 9:]:
            output = model(tokens, past_key_values=cache, use_cache=False)
            assert output.past_key_values is None
        assert cache.get_seq_length() == TOKENS.shape[1]
        torch.testing.assert_close(output.logits, model(TOKENS).logits[:, 9:])


def test_a_cache_that_the_whole_model_began():
    """Its part for the attention that is dropped is emptied before it could count: the length is that of the others."""
    cache = DynamicCache(config=pristine("llama").config)
    pristine("llama")(TOKENS[:, :8], past_key_values=cache)
    with dropped(dense("llama"), PLANS["attention"]) as model:
        for token in range(8, 12):
            model(TOKENS[:, token : token + 1], past_key_values=cache)
        assert cache.get_seq_length() == 12
    assert [size > 0 for size in n_bytes(cache)] == [False, True, False]
