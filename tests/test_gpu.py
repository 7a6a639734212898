"""What a GPU measures is what the CPU measures, of every kind of measurement. Skipped where there is no GPU."""

import copy

import accelerate
import encoder_decoder_families
import families
import numpy as np
import pytest
import torch

from llmdrop_utils import (
    DropPlan,
    Load,
    dropped,
    greedy,
    measure_causes,
    measure_importance,
    measure_speed,
    prune_by_wanda,
    repair,
    score_targets,
    score_text,
    select_by,
    tune,
)
from llmdrop_utils.derive.tuning import Tuning
from llmdrop_utils.measure.taylor import measure_taylor
from llmdrop_utils.models.families import find_anatomy
from llmdrop_utils.selection.methods import METHODS, Context

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOKENS = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(0))
PLANS = (DropPlan(), DropPlan(attention=(1,)), DropPlan(mlp=(0,)), DropPlan((2,), (2,)))


@pytest.fixture
def pair():
    """The same model on the CPU and on the GPU."""
    model = families.tiny("llama", num_hidden_layers=4)
    return model, copy.deepcopy(model).cuda()


def both(pair, measure):
    return [measure(model) for model in pair]


def test_importance(pair):
    cpu, gpu = both(pair, lambda model: measure_importance(model, TOKENS))
    for kind, values in cpu.importance.items():
        np.testing.assert_allclose(gpu.importance[kind], values, rtol=1e-4, atol=1e-6)


def test_text_under_plans(pair):
    cpu, gpu = both(pair, lambda model: score_text(model, TOKENS, PLANS))
    np.testing.assert_allclose(gpu.nll, cpu.nll, rtol=1e-4)
    np.testing.assert_allclose(gpu.kl, cpu.kl, rtol=1e-3, atol=1e-6)


def test_causes_and_gradients(pair):
    cpu, gpu = both(pair, lambda model: measure_causes(model, TOKENS))
    for name, values in cpu.per_sample.items():
        np.testing.assert_allclose(gpu.per_sample[name], values, rtol=1e-3, atol=1e-5)
    cpu, gpu = both(pair, lambda model: measure_taylor(model, TOKENS))
    for kind, values in cpu.items():
        np.testing.assert_allclose(gpu[kind], values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_selection_method(pair, name):
    kind = "block" if name == "consecutive blocks" else "attention"
    cpu, gpu = both(pair, lambda model: select_by(name, Context(model, TOKENS), kind, 2))
    assert (gpu.attention, gpu.mlp) == (cpu.attention, cpu.mlp)


def test_pruning(pair):
    both(pair, lambda model: prune_by_wanda(model, TOKENS, 0.5))
    for cpu, gpu in zip(*(model.parameters() for model in pair), strict=True):
        assert torch.equal(gpu.cpu() == 0, cpu == 0)


def test_repair(pair):
    """In its memory, and offloaded to that of the CPU."""
    offloaded = accelerate.cpu_offload(copy.deepcopy(pair[0]), execution_device=torch.device("cuda", 0))
    tokens = torch.randint(3, 97, (40, 24), generator=torch.Generator().manual_seed(1))
    on_cpu, on_gpu, moved = (repair(model, tokens, PLANS[1]) for model in (*pair, offloaded))
    for found in (on_gpu, moved):
        assert [(each.layer, each.site, each.ridge) for each in found] == [(e.layer, e.site, e.ridge) for e in on_cpu]
    assert all(weight.is_meta for weight in offloaded.parameters())
    nll = [score_text(model, TOKENS, [PLANS[1]]).nll for model in (*pair, offloaded)]
    np.testing.assert_allclose(nll[1], nll[0], rtol=1e-3)
    np.testing.assert_allclose(nll[2], nll[1], rtol=1e-3)


def test_tuning(pair, tmp_path):
    settings = Tuning(rank=2, learning_rate=0.01, epochs=2, batch_size=2)
    cpu, gpu = (tune(model, TOKENS, PLANS[1], tmp_path / str(i), settings) for i, model in enumerate(pair))
    np.testing.assert_allclose(gpu[0], cpu[0], rtol=1e-4)
    assert gpu[-1] < gpu[0]
    assert all(parameter.is_cuda for parameter in pair[1].parameters())


@pytest.mark.parametrize("plan", PLANS[1:])
def test_decoding_on_both_back_ends(pair, plan):
    with dropped(pair[0], plan), dropped(pair[1], plan):
        expected, eager = both(pair, lambda model: greedy(model, TOKENS[:2], 12))
        assert torch.equal(eager.cpu(), expected)
        assert torch.equal(greedy(pair[1], TOKENS[:2], 12, "compiled"), eager)


@pytest.mark.parametrize("load", [Load("prefill", 64), Load("decode", 40, 4)])
def test_peak_memory_is_without_what_is_dropped(load):
    model = families.tiny("llama", hidden_size=256, intermediate_size=1 << 16).cuda()
    gone = sum(p.nbytes for p in find_anatomy(model).layers[1].mlp.parameters())
    dense, less = measure_speed(model, load, [DropPlan(), DropPlan(mlp=(1,))], repeats=2)
    assert abs(dense.peak_bytes - less.peak_bytes - gone) < 0.05 * gone
    assert less.kv_bytes == dense.kv_bytes


def test_a_batch_that_is_too_large_is_halved(capsys):
    """Keys and values take 0.25 GB a sequence, in 4 GB."""
    model = families.tiny("llama", num_attention_heads=32, num_key_value_heads=32, head_dim=64, max_position_embeddings=1 << 16)
    torch.cuda.set_per_process_memory_fraction(4e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        (found,) = measure_speed(model.cuda(), Load("decode", 5000, 2, batch_size=64), repeats=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= found.batch_size < 64
    assert "out of memory: going on with a batch of" in capsys.readouterr().err


def test_encoder_decoders():
    """Importance, what targets cost, and generation without attention that makes positions for others."""
    for name in ("t5", "bart"):
        model, given = encoder_decoder_families.tiny(name), encoder_decoder_families.pairs()
        there, plan = copy.deepcopy(model).cuda(), DropPlan((0, 3), cross_attention=(4,))
        ours, theirs = (measure_importance(each, given).importance for each in (model, there))
        for kind, values in ours.items():
            np.testing.assert_allclose(theirs[kind], values, atol=1e-4)
        with dropped(model, plan), dropped(there, plan):
            costs = [score_targets(each, given).nll for each in (model, there)]
            np.testing.assert_allclose(*costs, rtol=1e-3)
            source = given["input_ids"].cuda()
            cached, plain = (
                there.generate(source, max_new_tokens=8, use_cache=use, eos_token_id=None) for use in (True, False)
            )
            assert torch.equal(cached, plain)
        assert {p.device.type for p in there.parameters()} == {"cuda"}
