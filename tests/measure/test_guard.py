"""No measurement changes the model, and none believes numbers that are not finite."""

import copy
import json

import families
import numpy as np
import pytest
import torch
from torch import nn

from llmdrop_utils import (
    DropPlan,
    LLMDropError,
    Load,
    dropped,
    greedy,
    load_model,
    measure_importance,
    measure_speed,
    perplexity,
    run_tasks,
    score_text,
    select_consecutive_blocks,
    select_iteratively,
)
from llmdrop_utils.measure.guard import measuring
from llmdrop_utils.measure.metrics import METRICS
from llmdrop_utils.measure.scoring import score
from llmdrop_utils.measure.tasks import FastLM, score_task
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.sources.task_data import load_task

TOKENS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))
PLANS = [DropPlan(), DropPlan((1,), (0,))]


def instances(name, limit):
    (task,) = load_task(name, 0)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    for instance in task.instances:
        if task.OUTPUT_TYPE == "generate_until":
            instance.args[1]["max_gen_toks"] = 4
    return task.instances


# Each returns something that can be compared.
MEASUREMENTS = {
    "importance": lambda model: measure_importance(model, TOKENS).fingerprint,
    "score": lambda model: score(model, [([3, 4], [5, 6])], PLANS).logprob.tolist(),
    "score_text": lambda model: score_text(model, TOKENS, PLANS).nll.tolist(),
    "perplexity": lambda model: perplexity(model, TOKENS),
    "run_tasks": lambda model: run_tasks(model, byte_tokenizer(), "winogrande", limit=4, num_fewshot=0),
    "score_task": lambda model: score_task(model, byte_tokenizer(), load_task("piqa", 0), PLANS, 3).metrics["acc"].tolist(),
    "generate": lambda model: FastLM(model, byte_tokenizer()).generate_until(instances("gsm8k", 1), disable_tqdm=True),
    "loglikelihood": lambda model: FastLM(model, byte_tokenizer(), PLANS).loglikelihood(instances("piqa", 2)),
    "speed": lambda model: [speed.kv_bytes for speed in measure_speed(model, Load("decode", 8, 2), PLANS, repeats=1)],
    "greedy": lambda model: greedy(model, TOKENS, 3).tolist(),
    "iterative": lambda model: select_iteratively(model, TOKENS, "attention", 2).attention,
    "consecutive": lambda model: select_consecutive_blocks(model, TOKENS, 1).attention,
}


def gpt2_with_dropout():
    return families.tiny("gpt2", vocab_size=257, n_positions=2048, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)


def contents(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- training mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_training_mode_does_not_matter(name):
    """With the default dropout of GPT-2: the values of eval mode, twice, and each module's own mode is back."""
    model = gpt2_with_dropout()
    expected = MEASUREMENTS[name](model)
    assert not any(module.training for module in model.modules())
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    assert [MEASUREMENTS[name](model) for _ in range(2)] == [expected, expected]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_put_back_after_an_error():
    model, seen = gpt2_with_dropout().train(), []
    model.transformer.h[1].register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        perplexity(model, TOKENS)
    assert seen == [(False, False)]
    assert all(module.training for module in model.modules())


# ---- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_no_measurement_changes_a_weight(name, tmp_path):
    """A head with weights of its own, under a configuration that says that it is tied."""
    model = families.tiny("llama", vocab_size=257, max_position_embeddings=2048, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded, _ = load_model(str(tmp_path), torch.float32, "cpu")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    before, value = contents(loaded), perplexity(loaded, TOKENS)
    MEASUREMENTS[name](loaded)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    after = contents(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert perplexity(loaded, TOKENS) == value
    loaded.tie_weights()  # its own method is there again
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def untie(model):
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())


def add(model):
    model.model.layers[0].mlp.up_proj.weight.add_(1)


def set_data(model):
    model.model.norm.weight.data = torch.ones(32)


def put_buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2


def add_parameter(model):
    model.model.extra = nn.Parameter(torch.ones(2))


def remove(model):
    del model.lm_head.weight


@pytest.mark.parametrize("change", [tie, untie, add, set_data, put_buffer, add_parameter, remove])
def test_a_changed_weight_is_an_error(change):
    model = families.tiny("llama")
    with pytest.raises(LLMDropError, match=r"The weight [\w.]+ was changed while the model was measured"), measuring(model):
        change(model)


def test_what_was_dropped_before_stays_dropped():
    model = families.tiny("llama")
    with dropped(model, PLANS[1]), measuring(model):
        inside = perplexity(model, TOKENS)
    assert inside == score_text(model, TOKENS, PLANS).perplexity[1] != perplexity(model, TOKENS)


# ---- numbers that are not finite ----------------------------------------------------------------------------------------


def overflowing():
    """Layer 1 adds more than float16 can hold."""
    model = families.tiny("llama", vocab_size=257, max_position_embeddings=2048)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = (weight.data * 3e5).clamp(-6e4, 6e4)
    return model.half(), "MLP of layer 1|block of layer 1"


def one_nan():
    model = families.tiny("llama", vocab_size=257, max_position_embeddings=2048)
    model.model.layers[2].self_attn.v_proj.weight.data[0, 0] = float("nan")
    return model, "attention of layer 2"


def nan_in_the_head():
    model = families.tiny("llama", vocab_size=257, max_position_embeddings=2048)
    model.lm_head.weight.data[9, 3] = float("nan")
    return model, "LM head"


def infinite_bias():
    """Logits of +inf for one token: a distribution of nothing."""
    model = families.tiny("phi", vocab_size=257, max_position_embeddings=2048)
    model.lm_head.bias.data[9] = float("inf")
    return model, "LM head"


def damaged_embedding():
    model = families.tiny("llama", vocab_size=257, max_position_embeddings=2048)
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    return model, "embedding"


@pytest.mark.parametrize("name", sorted(MEASUREMENTS.keys() - {"speed"}))
@pytest.mark.parametrize("damage", [overflowing, one_nan, nan_in_the_head, infinite_bias, damaged_embedding])
def test_numbers_that_are_not_finite_are_refused(name, damage):
    model, where = damage()
    reads_no_head = name in ("importance", "iterative", "consecutive")
    if reads_no_head and where == "LM head":
        MEASUREMENTS[name](model)
        return
    places = "attention|block|MLP" if name in ("importance", "iterative") else where  # a stream is NaN from its first layer on
    with pytest.raises(LLMDropError, match=rf"(?i)The ({places})(.*) gives values that are not finite in torch.float"):
        MEASUREMENTS[name](model)


def test_the_plan_is_named():
    """The dense model is sound; without attention 0 it is not."""
    model = families.tiny("llama")
    plans = [DropPlan(), DropPlan((0,))]
    model.model.layers[1].register_forward_hook(
        lambda module, args, output: output if model.model.layers[0].self_attn.__class__.__name__ != "Dropped" else output / 0
    )
    with pytest.raises(LLMDropError, match=r"block of layer 1 gives .* under the plan that drops attention \[0\] and MLP \[\]"):
        score_text(model, TOKENS, plans)


@pytest.fixture
def masked():
    """A model that rules out token 9, as some do with unused places of their vocabulary."""
    model = families.tiny("phi")
    model.lm_head.bias.data[9] = -float("inf")
    return model


def test_tokens_that_are_ruled_out(masked):
    """They have probability zero, and spoil neither the others nor the divergence."""
    sound = copy.deepcopy(masked)
    sound.lm_head.bias.data[9] = -1e4
    requests = [([3, 4], [5, 6]), ([3, 4], [9, 6])]
    found, expected = (score(model, requests, PLANS, kl=True) for model in (masked, sound))
    np.testing.assert_allclose(found.logprob[:, 0], expected.logprob[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-5)
    assert np.isneginf(found.logprob[:, 1]).all()


def test_text_that_is_ruled_out(masked):
    text = torch.tensor([[3, 4, 5], [3, 9, 5]])
    with pytest.raises(
        LLMDropError, match=r"log-probability of sample 1 under plan 0 is infinite: the model rules out a token"
    ):
        perplexity(masked, text)
    assert np.isfinite(perplexity(masked, text[:1]))


def test_relative_magnitude_of_nan():
    nan, zero, one = torch.tensor(float("nan")), torch.tensor(0.0), torch.tensor(1.0)
    assert METRICS["relative magnitude"](one, nan, nan).isnan()
    assert METRICS["relative magnitude"](zero, zero, zero) == 1
