"""Times are of what they say: the loop that is timed decodes as `generate` does, and every step sees the ones before."""

import math

import families
import pytest
import torch

from llmdrop_utils import (
    DropPlan,
    LLMDropError,
    Load,
    NotAvailable,
    dropped,
    greedy,
    kv_bytes,
    measure_speed,
)
from llmdrop_utils.measure import decoding, speed
from llmdrop_utils.measure.speed import device_limits, largest_batch

PLANS = [DropPlan(), DropPlan(attention=(0,)), DropPlan(mlp=(1,)), DropPlan(attention=(1, 2), mlp=(2,))]


def generated(model, tokens, new_tokens):
    more = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    return model.generate(tokens, **more)[:, tokens.shape[1] :]


@pytest.mark.parametrize("name", families.CASES)
@pytest.mark.parametrize("plan", PLANS)
def test_eager_loop_equals_generate(name, plan):
    model, tokens = families.tiny(name), torch.randint(3, 97, (2, 9))
    with torch.inference_mode(), dropped(model, plan):
        assert torch.equal(greedy(model, tokens, 8), generated(model, tokens, 8))


@pytest.mark.parametrize(("name", "plan"), [("llama", PLANS[0]), ("llama", PLANS[3]), ("qwen3", PLANS[1])])
def test_compiled_loop_equals_generate(name, plan):
    model, tokens = families.tiny(name), torch.randint(3, 97, (2, 9))
    with torch.inference_mode(), dropped(model, plan):
        assert torch.equal(greedy(model, tokens, 8, "compiled"), generated(model, tokens, 8))


def test_real_model_decodes_as_generate_does(real_model):
    model, tokenizer = real_model
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    for plan in (DropPlan(), DropPlan(attention=(25, 26, 7))):
        with torch.inference_mode(), dropped(model, plan):
            assert torch.equal(greedy(model, tokens, 6), generated(model, tokens, 6))


@pytest.mark.parametrize("what", ["prefill", "decode", "generation"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "deepseek-v3", "falcon-7b"])
def test_what_a_timing_says(name, what):
    model = families.tiny(name)
    load = Load(what, 20, 0 if what == "prefill" else 6, batch_size=2)
    found = measure_speed(model, load, [DropPlan(), DropPlan(attention=(0, 2))], repeats=3)
    length = {"prefill": 20, "decode": 20, "generation": 25}[what]  # a generation's last token is never read
    for timing, plan in zip(found, [DropPlan(), DropPlan(attention=(0, 2))], strict=True):
        assert len(timing.seconds) == 3
        assert min(timing.seconds) > 0
        assert 0 < timing.floor_seconds < timing.median
        assert timing.batch_size == 2
        if name != "deepseek-v3":  # depends on the version of transformers: see test_cost.py
            assert timing.kv_bytes == kv_bytes(model.config, plan, 2, length, 4)
    assert found[1].floor_seconds < found[0].floor_seconds


def test_a_context_costs_what_a_read_one_does():
    """A cache that is filled without reading has the tensors of one that was read."""
    for name in ("llama", "gemma3"):
        model = families.tiny(name)
        with torch.inference_mode():
            filled = speed._filled_cache(model, Load("decode", 21, 3))
            read = decoding.new_cache(model, "eager", 0)
            speed.next_token(model, torch.ones(1, 21, dtype=torch.long), read)
        assert filled.get_seq_length() == read.get_seq_length() == 21
        for a, b in zip(filled.layers, read.layers, strict=True):
            assert a.keys.shape == b.keys.shape
            assert a.values.shape == b.values.shape


def test_a_loop_without_its_cache_is_refused(monkeypatch):
    """What the official speed script does: every step begins with an empty context."""
    model = families.tiny("llama")
    honest = speed.next_token
    forgetful = lambda model, tokens, cache: honest(model, tokens, decoding.new_cache(model, "eager", 0))  # noqa: E731
    for load in (Load("prefill", 8), Load("generation", 8, 4)):
        monkeypatch.setattr(speed, "next_token", forgetful)
        with pytest.raises(RuntimeError, match="these times would mean nothing"):
            measure_speed(model, load)


def test_plans_take_turns(monkeypatch):
    model, order = families.tiny("llama"), []
    enter = speed.skipping
    monkeypatch.setattr(speed, "skipping", lambda model, plan: order.append(plan.attention) or enter(model, plan))
    measure_speed(model, Load("decode", 4, 2), [DropPlan(), DropPlan(attention=(1,))], repeats=3)
    assert order == [(), (1,)] * 3


@pytest.mark.parametrize(
    ("load", "passes"),
    [
        (Load("prefill", 20), [16, 20]),  # a short warm-up, and what is timed
        (Load("decode", 20, 3), [16, 1, 1, 1, 1]),  # 16 tokens that fill the cache, one step, the three that are timed
        (Load("generation", 20, 4), [16, 1, 20, 1, 1, 1]),  # the prefill gives the first of four new tokens
    ],
)
def test_every_round_times_each_plan_once(load, passes):
    """Nothing is run at length only to be thrown away."""
    model, lengths = families.tiny("llama"), []
    look = lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1])  # noqa: E731
    model.register_forward_pre_hook(look, with_kwargs=True)
    found = measure_speed(model, load, [DropPlan(), DropPlan(attention=(1,))], repeats=3)
    assert lengths == passes * 6, "two plans in three rounds"
    assert [len(timing.seconds) for timing in found] == [3, 3]


def test_a_decode_time_is_that_of_one_step(monkeypatch):
    """Three steps between two looks at the clock that are 6 s apart: 2 s each."""
    ticks = iter(range(0, 1000, 6))
    monkeypatch.setattr(speed, "device_limits", lambda device, dtype: speed.Limits(1e9, 1e12))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    model = families.tiny("llama")
    seconds = {load.what: measure_speed(model, load, repeats=2)[0].seconds for load in LOADS}
    assert seconds == {"prefill": (6.0, 6.0), "decode": (2.0, 2.0), "generation": (6.0, 6.0)}


LOADS = [Load("prefill", 8), Load("decode", 8, 3), Load("generation", 8, 3)]


def test_spread_is_the_middle_half_over_the_median():
    timing = speed.Speed((5.0, 1.0, 4.0, 2.0, 3.0), 1.0, 8, None, 1)
    assert (timing.median, timing.spread) == (3.0, pytest.approx((4 - 2) / 3))
    timing = speed.Speed((1.0, 2.0, 4.0, 13.0), 1.0, 8, None, 1)
    assert (timing.median, timing.spread) == (3.0, pytest.approx((6.25 - 1.75) / 3))  # the mean is 5
    assert math.isnan(speed.Speed((1.0,), 1.0, 8, None, 1).spread), "one repeat says nothing"


def test_out_of_memory_halves_the_batch(monkeypatch, capsys):
    model = families.tiny("llama")
    forward = speed.next_token

    def scarce(model, tokens, cache):
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("no memory")
        return forward(model, tokens, cache)

    monkeypatch.setattr(speed, "next_token", scarce)
    found = measure_speed(model, Load("decode", 8, 2, batch_size=12), [DropPlan(), DropPlan(mlp=(0,))], repeats=2)
    assert [timing.batch_size for timing in found] == [3, 3]
    assert capsys.readouterr().err.splitlines() == [
        "out of memory: going on with a batch of 6",
        "out of memory: going on with a batch of 3",
    ]
    monkeypatch.setattr(speed, "next_token", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(LLMDropError, match="Out of memory with a single sequence of 10 tokens"):
        measure_speed(model, Load("decode", 8, 2))


def test_other_errors_are_not_mistaken_for_memory(monkeypatch):
    monkeypatch.setattr(speed, "next_token", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure_speed(families.tiny("llama"), Load("decode", 8, 2, batch_size=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("sleep", 8), "Unknown load 'sleep'"),
        (("decode", 8, 0), "Nothing to time"),
        (("prefill", 0), "Nothing to time"),
        (("decode", 8, 2, 0), "Nothing to time"),
        (("decode", 8, 2, 1, "quantum"), "Unknown back end 'quantum'"),
        (("decode", 8, 2, 1, "compiled", 9), "room for 9 tokens cannot hold 10"),
    ],
)
def test_impossible_loads(settings, message):
    with pytest.raises(LLMDropError, match=message):
        Load(*settings)


def test_loads_that_a_model_cannot_take():
    with pytest.raises(LLMDropError, match="70 tokens are more than the 64 positions that the model knows"):
        measure_speed(families.tiny("gpt2"), Load("decode", 66, 4))
    with pytest.raises(NotAvailable, match="takes a GPU"):
        largest_batch(families.tiny("llama"), 64)
    with pytest.raises(LLMDropError, match="holds layer 7"):
        measure_speed(families.tiny("llama"), Load("decode", 8, 2), [DropPlan(attention=(7,))])
    with pytest.raises(NotAvailable, match="has no sliding windows"):
        measure_speed(families.tiny("gemma3"), Load("decode", 8, 2, backend="compiled"))


def test_the_limit_is_one():
    """Large products come close to it, and nothing beats it by more than noise."""
    limits = device_limits(torch.device("cpu"), torch.float32)
    assert limits.bandwidth > 1e8
    assert limits.rate > 1e9
    a = torch.randn(1500, 1500)
    taken = speed._best(lambda: a @ a, a.device)
    assert 2 * 1500**3 / taken < 1.5 * limits.rate


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_and_batches_on_a_gpu():
    model = families.tiny("llama").cuda()
    tokens = torch.randint(3, 97, (2, 9), device="cuda")
    with torch.inference_mode():
        assert torch.equal(greedy(model, tokens, 8, "compiled"), greedy(model, tokens, 8))
    assert largest_batch(model, 64) > 1
