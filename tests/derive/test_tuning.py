"""Adapters are trained under a drop plan and merged into what it keeps; nothing else changes, whatever happens meanwhile."""

import dataclasses
import re
import sys
import warnings

import families
import numpy as np
import pytest
import torch
from derive.changing import Stop, assert_as_it_was, changed, drawn, equal, fresh, pristine, seed_all, state, stop_at
from torch import nn

from llmdrop_utils import DropPlan, LinearMap, LLMDropError, NotAvailable, dropped, load_model, locate_model, score_text
from llmdrop_utils.derive.model import save_derived
from llmdrop_utils.derive.tuning import Tuning, describe_tuning, tune
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.load import load_located

PERIODIC = torch.stack([(torch.arange(16) + shift) % 5 * 3 + 4 for shift in range(16)])  # easy to learn
PLAN = DropPlan((1,), (2,), maps={("attention", 1): LinearMap(torch.eye(32) / 10)})
SETTINGS = Tuning(rank=4, alpha=8, learning_rate=0.01, epochs=3, batch_size=4, seed=1)  # 12 steps
SHORT = dataclasses.replace(SETTINGS, epochs=1)  # 4 steps
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
KEPT = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 2) for name in ATTENTION]
KEPT += [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in MLP]


class Watch:
    """Sees the model at each step: steps, losses, and at the last one the adapters and what the adapted model predicts."""

    def __init__(self, model, last):
        self.model, self.last, self.steps, self.losses = model, last, [], []

    def __call__(self, step, loss):
        self.steps.append(step)
        self.losses.append(loss)
        if step == self.last:
            with torch.no_grad():
                self.logits = self.model(PERIODIC[:4, :12]).logits
            layers = {name: module for name, module in self.model.named_modules() if hasattr(module, "lora_A")}
            parts = lambda layer: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)  # noqa: E731
            self.adapters = {name: [part.detach().clone() for part in parts(layer)] for name, layer in layers.items()}


def loss_of(model, plan):
    return float(score_text(model, PERIODIC, [plan]).nll.mean())


@pytest.mark.parametrize("plan", [PLAN, DropPlan(), DropPlan((0, 1, 2))])
def test_a_periodic_text_is_learned(plan, tmp_path):
    model = fresh()
    dense, before = loss_of(model, DropPlan()), loss_of(model, plan)
    losses = tune(model, PERIODIC, plan, tmp_path / "work", Tuning(4, 8, 0.01, epochs=30, batch_size=16))
    assert len(losses) == 30
    assert losses[0] == pytest.approx(before, rel=1e-5), "the first step still has the base, and its batch is all samples"
    after = loss_of(model, plan)
    assert after < losses[-1] + 0.05 < before / 2
    if plan.n_drop:
        assert loss_of(model, DropPlan()) != pytest.approx(dense), "what is kept has changed for every other plan, too"


def test_what_is_kept_becomes_w_plus_ba(tmp_path):
    base, model = fresh(), fresh()
    watch, fingerprint = Watch(model, last=12), PLAN.maps[0][2].fingerprint
    losses = tune(model, PERIODIC, PLAN, tmp_path / "work", SETTINGS, watch)
    assert losses == watch.losses
    assert watch.steps == list(range(1, 13))
    assert list(watch.adapters) == sorted(KEPT, key=list(dict(base.named_modules())).index)
    for name, (a, b) in watch.adapters.items():
        assert (a.shape[0], b.shape[1]) == (4, 4)
        expected = base.get_submodule(name).weight.double() + (8 / 4) * b.double() @ a.double()
        torch.testing.assert_close(model.get_submodule(name).weight.double(), expected, rtol=0, atol=1e-6)
    assert changed(model, base) == {f"{name}.weight" for name in KEPT}, "also of layers that are dropped"
    assert [linear.fingerprint for _, _, linear in PLAN.maps] == [fingerprint]
    with dropped(model, PLAN), torch.no_grad():
        torch.testing.assert_close(model(PERIODIC[:4, :12]).logits, watch.logits, rtol=1e-5, atol=1e-5)


def another():
    """A model of the same shape that predicts something else."""
    model = fresh().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2)
    return model


@pytest.mark.parametrize("taught_by", ["text", "itself", "another"])
def test_the_training_by_hand(taught_by, tmp_path):
    """Every step in float64, from the same A: loss, clipped gradient, AdamW, warm-up of one step in twenty and cosine."""
    base, model, steps = fresh().double(), fresh().double(), 20
    teacher = {"text": None, "itself": model, "another": another()}[taught_by]
    with torch.no_grad():
        target = (another() if taught_by == "another" else fresh().double())(PERIODIC).logits.log_softmax(-1)
    watch = Watch(model, last=1)  # A does not change in the first step, as the rate is zero
    settings = Tuning(4, 8, 0.01, epochs=steps, batch_size=16)
    found = tune(model, PERIODIC, PLAN, tmp_path / "work", settings, watch, teacher=teacher)
    pairs = {name: (a.requires_grad_(), torch.zeros_like(b, requires_grad=True)) for name, (a, b) in watch.adapters.items()}
    flat = [part for pair in pairs.values() for part in pair]
    first, second = ([torch.zeros_like(part) for part in flat] for _ in range(2))
    for step in range(steps):
        weights = {f"{name}.weight": base.get_submodule(name).weight + 2 * b @ a for name, (a, b) in pairs.items()}
        with dropped(base, PLAN):
            logp = torch.func.functional_call(base, weights, (PERIODIC,)).logits.log_softmax(-1)
        if taught_by == "text":
            loss = -logp[:, :-1].gather(-1, PERIODIC[:, 1:, None]).mean()
        else:
            loss = (target.exp() * (target - logp))[:, :-1].sum(-1).mean()
        assert found[step] == pytest.approx(float(loss), rel=1e-5)
        gradients = torch.autograd.grad(loss, flat)
        clip = min(1.0, 1 / float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        rate = 0.01 * (0.0 if step == 0 else (1 + np.cos(np.pi * (step - 1) / (steps - 1))) / 2)
        for part, gradient, m, v in zip(flat, gradients, first, second, strict=True):
            m += 0.1 * (clip * gradient - m)
            v += 0.001 * ((clip * gradient) ** 2 - v)
            size = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            part.data -= rate * m / (1 - 0.9 ** (step + 1)) / size
    for name, (a, b) in pairs.items():
        expected = base.get_submodule(name).weight + 2 * b @ a
        torch.testing.assert_close(model.get_submodule(name).weight, expected, rtol=1e-7, atol=1e-8)


def test_how_a_model_comes_does_not_matter(tmp_path):
    """Neither its mode, and so the dropout in its configuration, nor whether the caller records gradients."""
    assert pristine("gpt2").config.resid_pdrop == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        losses = tune(fresh("gpt2").train(), PERIODIC, PLAN, tmp_path / "train", SHORT)
        with torch.no_grad():
            assert losses == tune(fresh("gpt2"), PERIODIC, PLAN, tmp_path / "eval", SHORT)
        taught = [fresh("gpt2").train(), fresh("gpt2")]  # nor does that of its teacher
        found = [tune(fresh("gpt2"), PERIODIC, PLAN, tmp_path / f"{i}", SHORT, teacher=each) for i, each in enumerate(taught)]
        assert found[0] == found[1]


def test_same_seed_same_weights(tmp_path, network, capfd):
    """Whatever the caller's random numbers, which go on afterwards; nothing is printed, or asked of the network."""
    models, losses = [fresh() for _ in range(3)], []
    for number, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        seed_all(number)
        expected = drawn()
        seed_all(number)
        losses.append(tune(model, PERIODIC, PLAN, tmp_path / f"{number}", dataclasses.replace(SHORT, seed=seed)))
        assert drawn() == expected
    assert losses[0] == losses[1] != losses[2]
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])
    assert (network.requests, capfd.readouterr()) == ([], ("", ""))


def test_a_stopped_tuning_goes_on(tmp_path):
    whole, folder = fresh(), tmp_path / "work"
    losses = tune(whole, PERIODIC, PLAN, tmp_path / "whole", SETTINGS)
    model = fresh().train()
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    for last in (3, 7):  # the second is in another epoch
        with pytest.raises(Stop):
            tune(model, PERIODIC, PLAN, folder, SETTINGS, stop_at(last))
        assert_as_it_was(model, before)
    half = folder / "checkpoint-9"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 1.')
    watch = Watch(model, last=12)
    assert tune(model, PERIODIC, PLAN, folder, SETTINGS, watch) == losses
    assert watch.steps == [7, 8, 9, 10, 11, 12], "step 7 was not stored yet when it was stopped"
    assert equal(model, whole)
    # Stopped after the last step, before the model was stored: nothing is trained again.
    again = fresh()
    assert tune(again, PERIODIC, PLAN, folder, SETTINGS, watch) == losses
    assert len(watch.steps) == 6
    assert equal(again, whole)


@pytest.mark.parametrize("other", ["tokens", "plan", "settings", "weights", "teacher", "no teacher"])
def test_another_tuning_starts_over(other, tmp_path):
    teachers = {"teacher": (None, pristine("llama")), "no teacher": (pristine("llama"), None)}.get(other, (None, None))
    with pytest.raises(Stop):
        tune(fresh(), PERIODIC, PLAN, tmp_path / "work", SHORT, stop_at(3), teachers[0])
    tokens = PERIODIC + 1 if other == "tokens" else PERIODIC
    plan = DropPlan((1,), (2,)) if other == "plan" else PLAN
    settings = Tuning(4, 4, 0.01, 1, 4, 1) if other == "settings" else SHORT
    models = fresh(), fresh()
    if other == "weights":
        for model in models:
            model.model.norm.weight.data[0] += 1
    watch = Watch(models[0], last=4)
    losses = tune(models[0], tokens, plan, tmp_path / "work", settings, watch, teachers[1])
    assert watch.steps == [1, 2, 3, 4]
    assert losses == tune(models[1], tokens, plan, tmp_path / "fresh", settings, teacher=teachers[1])
    assert equal(*models)


def test_bfloat16_is_rounded_once(tmp_path):
    base, model = fresh().bfloat16(), fresh().bfloat16()
    watch = Watch(model, last=12)
    tune(model, PERIODIC, PLAN, tmp_path / "work", SETTINGS, watch)
    for name, (a, b) in watch.adapters.items():
        assert a.dtype == b.dtype == torch.float32
        assert (a.bfloat16().float() != a).any(), "it was trained in float32"
        expected = base.get_submodule(name).weight.float() + b @ a * 2
        assert torch.equal(model.get_submodule(name).weight, expected.bfloat16())
    assert changed(model, base) == {f"{name}.weight" for name in KEPT}


@pytest.mark.parametrize("name", families.CASES)
def test_every_family(name, tmp_path):
    """All matrices of kept attention and MLPs change, but not routers and experts that are one tensor; and nothing else."""
    plan = DropPlan((1,), (2,))
    base, model = fresh(name), fresh(name)
    watch = Watch(model, last=2)
    assert all(np.isfinite(tune(model, PERIODIC[:, :12], plan, tmp_path / "work", Tuning(4, batch_size=8), watch)))
    with dropped(base, plan):
        matrices = {key for key, parameter in base.named_parameters() if parameter.ndim == 2 and re.search(r"\.[012]\.", key)}
    kept = {key for key in matrices if not {"experts", "gate", "router", "shared_expert_gate"} & {*key.split(".")}}
    assert kept
    assert changed(model, base) == kept
    with dropped(model, plan), torch.no_grad():
        torch.testing.assert_close(model(PERIODIC[:4, :12]).logits, watch.logits, rtol=1e-5, atol=1e-4)


def test_it_is_stored_and_measured_like_any_other(tmp_path, cache):
    fresh().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    located = locate_model(str(tmp_path / "base"))
    model, tokenizer = load_located(located, torch.float32, "cpu")
    plan = DropPlan((1,), (2,), n_layers=3, model=located.identity)
    losses = tune(model, PERIODIC, plan, tmp_path / "work", SETTINGS)
    recipe = describe_tuning(model, PERIODIC, plan, SETTINGS)
    assert recipe | {"tokens": None} == {
        "method": "LoRA", "version": 1, "plan": {"attention": [1], "mlp": [2]}, "tokens": None, "dtype": "float32",
        "rank": 4, "alpha": 8.0, "learning_rate": 0.01, "epochs": 3, "batch_size": 4, "seed": 1,
    }  # fmt: skip
    derived = save_derived(model, tokenizer, tmp_path / "Tuned", located, recipe)
    again, _ = load_model(str(derived.folder), torch.float32, "cpu")
    assert equal(again, model)
    assert loss_of(again, plan) < losses[0]


def quantised(model):
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)


def adapted(model):
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


def at_the_limit(model):
    """Only a weight in the middle of the model has no room for a change."""
    mlp = model.half().model.layers[1].mlp
    mlp.gate_proj.weight.data[5] = 0
    mlp.down_proj.weight.data[:, 5] = torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": PERIODIC[:, :1]}, "A loss takes samples of at least 2 tokens"),
        ({"tokens": PERIODIC[:0]}, r"Expected token ids \(n_samples, seq_len\), found"),
        ({"tokens": PERIODIC[0]}, "One sequence alone is tokens"),
        ({"tokens": PERIODIC + 90}, "but this model knows 0 to 96"),
        ({"tokens": torch.zeros(1, 65, dtype=torch.long)}, "which knows 64 positions"),
        ({"plan": DropPlan((3,))}, "holds layer 3, but this model has 3 layers"),
        ({"plan": "attention"}, "Expected a drop plan"),
        ({"plan": DropPlan((0, 1, 2), (0, 1, 2))}, "Nothing is left to tune"),
        ({"settings": {"rank": 8}}, "Expected settings, found"),
        ({"teacher": "a name"}, "Expected a model, found str"),
        (
            {"teacher": families.tiny("llama", vocab_size=99)},
            "The teacher knows 99 tokens, but this model 97: no distributions",
        ),
        ({"change": quantised}, "The weight of 0.mlp.up_proj is quantised"),
        ({"change": adapted}, "The model has adapters of peft already"),
        ({"change": lambda model: model.lm_head.to("meta")}, "are on cpu, meta"),
        ({"change": lambda model: model.lm_head.weight.data.fill_(torch.inf)}, "The loss of step 1 is not finite"),
        ({"settings": Tuning(learning_rate=1e30)}, "The loss of step 2 is not finite"),
        ({"change": at_the_limit, "settings": Tuning(4, 4, 1000, batch_size=16)}, "weight of 1.mlp.down_proj is not finite"),
    ],
)
def test_bad_input(given, message, tmp_path):
    model = fresh()
    if "change" in given:
        given["change"](model)
    before = state(model) if model.lm_head.weight.device.type == "cpu" else None
    given = {"tokens": PERIODIC, "plan": PLAN, "settings": SETTINGS} | {k: v for k, v in given.items() if k != "change"}
    with pytest.raises(LLMDropError, match=message):
        tune(model, folder=tmp_path / "work", **given)
    if before:
        assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "The rank must be 1 or more, but is 0"),
        ({"epochs": 1.5}, "The number of epochs must be a whole number, but is 1.5"),
        ({"batch_size": True}, "The batch size must be a whole number"),
        ({"seed": -1}, "The seed must be 0 or more"),
        ({"seed": 1 << 32}, "The seed must be below 2..32"),
        ({"alpha": 0}, "The alpha must be a number above 0, but is 0"),
        ({"learning_rate": "2e-4"}, "The learning rate must be a number above 0, but is '2e-4'"),
        ({"learning_rate": float("nan")}, "The learning rate must be a number above 0, but is nan"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(LLMDropError, match=message):
        Tuning(**settings)


def test_a_teacher_is_left_as_it_is(tmp_path):
    model, teacher = fresh(), fresh().train()
    before = state(teacher)
    tune(model, PERIODIC, PLAN, tmp_path / "work", SHORT, teacher=teacher)
    assert_as_it_was(teacher, before)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(LLMDropError, match="holds files that are not of a tuning. Give the checkpoints a folder of their own"):
        tune(fresh(), PERIODIC, PLAN, tmp_path, SETTINGS)
    assert (tmp_path / "checkpoint-5").is_dir()


def test_without_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(NotAvailable, match="peft cannot be used .* Install it beside this package: pip install peft"):
        tune(fresh(), PERIODIC, PLAN, tmp_path / "work", SETTINGS)
