"""What a plan keeps is trained to predict what the dense model predicts; nothing else changes, whatever happens meanwhile."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import accelerate
import families
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from derive.changing import Stop, assert_as_it_was, changed, drawn, equal, fresh, pristine, seed_all, state, stop_at
from torch import nn

from llmdrop_utils import DropPlan, LinearMap, LLMDropError, dropped, find_anatomy, load_model, locate_model, score_text, tune
from llmdrop_utils.base.errors import DiskFull
from llmdrop_utils.derive import distillation, healing, training_loop
from llmdrop_utils.derive.healing import Healing, describe_healing, heal, trained_parameters
from llmdrop_utils.derive.model import save_derived
from llmdrop_utils.derive.muon import Muon
from llmdrop_utils.models import training
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.load import load_located

TOKENS = torch.randint(3, 97, (16, 13), generator=torch.Generator().manual_seed(0))
PLAN = DropPlan((1,), (2,), maps={("attention", 1): LinearMap(torch.eye(32) / 10)})
SHORT = Healing(0.003, batch_size=4, seed=1)  # one pass: 4 steps
SETTINGS = dataclasses.replace(SHORT, tokens=3 * TOKENS.numel())  # 12 steps, saved after 2, 4, ...
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
KEPT = {f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 2) for name in ATTENTION}
KEPT |= {f"model.layers.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in MLP}
KEPT |= {f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1, 2)}  # that of layer 1 belongs to the map
KEPT |= {f"model.layers.{layer}.post_attention_layernorm.weight" for layer in (0, 1)}


@torch.no_grad()
def divergence(dense, model, plan, tokens=TOKENS):
    """KL(dense || model under the plan) in float64, at the positions that `score_text` looks at."""
    first = dense(tokens[:, :-1]).logits.double().log_softmax(-1)
    with dropped(model, plan):
        second = model(tokens[:, :-1]).logits.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


class Watch:
    """Sees steps and losses."""

    def __init__(self):
        self.steps, self.losses = [], []

    def __call__(self, step, loss):
        self.steps.append(step)
        self.losses.append(loss)


# ---- what healing does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, DropPlan((1,), (2,)), DropPlan((0, 1, 2))])
def test_the_dense_model_is_approached(plan, tmp_path):
    base, model = fresh(), fresh()
    before = score_text(base, TOKENS, [DropPlan(), plan]).kl[1].mean()
    watch = Watch()
    losses = heal(model, TOKENS, plan, tmp_path / "work", Healing(0.02, 16, tokens=30 * TOKENS.numel()), on_step=watch)
    assert losses[0] == pytest.approx(before, abs=1e-4), "the first batch is all samples"
    assert (watch.steps, watch.losses) == ([*range(1, 31)], losses)
    after = divergence(base, model, plan)
    assert after < losses[-1] < losses[15] < before / 2
    assert divergence(base, base, plan) == pytest.approx(before, abs=1e-5), "the reference agrees with score_text"
    assert score_text(model, TOKENS).nll.mean() != pytest.approx(score_text(base, TOKENS).nll.mean()), "dense, it is another"


def test_without_a_plan_there_is_nothing_to_learn(tmp_path):
    assert max(heal(fresh(), TOKENS, DropPlan(), tmp_path / "work", Healing(1e-9))) < 1e-6


def test_the_training_by_hand(tmp_path):
    """Every step in float64: the samples of each pass, loss, clipped gradient, Muon, warm-up and cosine."""
    base, model, steps = fresh().double(), fresh().double(), 40
    settings = Healing(0.01, batch_size=6, tokens=(6 * steps - 2) * 13, seed=3)  # the last batch is short
    found = heal(model, TOKENS, PLAN, tmp_path / "work", settings)
    assert len(found) == steps
    passes = [np.random.default_rng((3, number)).permutation(16) for number in range(15)]
    batches = TOKENS[np.concatenate(passes)[: 6 * steps - 2]].split(6)
    healed = copy.deepcopy(base)
    weights = [p for name, p in healed.named_parameters() if name in KEPT]
    means = [torch.zeros_like(w) for w in weights]
    for step, batch in enumerate(batches):
        with torch.no_grad():
            p = base(batch).logits[:, :-1].softmax(-1)
        with dropped(healed, PLAN):
            log_q = healed(batch).logits[:, :-1].log_softmax(-1)
            loss = (p * (p.log() - log_q)).sum(-1).mean()
            assert found[step] == pytest.approx(float(loss), rel=1e-5)
            gradients = torch.autograd.grad(loss, weights)
        clip = min(1.0, 1 / float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        rate = 0.01 * (step / 2 if step < 2 else (1 + np.cos(np.pi * (step - 2) / (steps - 2))) / 2)
        for weight, gradient, mean in zip(weights, gradients, means, strict=True):
            mean += 0.1 * (clip * gradient - mean)
            wanted = (0.9 * mean + 0.1 * clip * gradient).reshape(-1, weight.shape[-1])
            weight.data -= rate * 0.2 * max(wanted.shape) ** 0.5 * turned(wanted).view_as(weight)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, healed.get_parameter(name), rtol=1e-6, atol=1e-7)


def turned(matrix):
    """The quintic of Muon on each singular value; a vector has one, which is 1."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5 if len(matrix) > 1 else 0):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


def test_steps_are_those_of_the_muon_of_torch():
    """To the bit, for matrices in bfloat16: wide, tall, and with gradients of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 24), (24, 8), (16, 16))]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    stock = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    pair = Muon(ours, lr=0.01, dtype=torch.bfloat16), stock
    for step in range(5):
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = 10.0**-step * torch.randn(weight.shape, generator=generator)
            other.grad = weight.grad.clone()
        for optimizer in pair:
            optimizer.step()
        assert all(torch.equal(weight, other) for weight, other in zip(ours, theirs, strict=True))


def test_a_step_of_muon_moves_all_directions_alike():
    weight = nn.Parameter(torch.zeros(6, 40))
    weight.grad = torch.diag(torch.logspace(-1, 0, 6)) @ torch.linalg.qr(torch.randn(40, 6))[0].T
    Muon([weight], lr=0.1).step()
    moved = torch.linalg.svdvals(weight.detach()) / (0.1 * 0.2 * 40**0.5)
    assert 0.5 < moved.min() < moved.max() < 1.5


def test_gradients_of_the_divergence():
    logits = torch.randn(37, 5, 11, dtype=torch.float64).transpose(0, 1)  # 185 rows: several pieces, the last one short
    logits.requires_grad_()
    target = torch.randn(5, 37, 11, dtype=torch.float64)
    logits.data[..., 3] = target[..., 3] = -torch.inf  # ruled out by both
    target[0, 0, 5] = -torch.inf  # and by one
    p, log_q = target.softmax(-1), logits.log_softmax(-1)
    rows = nn.functional.kl_div(log_q, p, reduction="none").masked_fill(p == 0, 0)
    (expected,) = torch.autograd.grad(3 * rows.sum(-1).mean(), logits)
    value = healing.Divergence.apply(logits, target)
    assert float(value) == pytest.approx(float(rows.sum(-1).mean()), rel=1e-12)
    (found,) = torch.autograd.grad(3 * value, logits)
    torch.testing.assert_close(found, expected.nan_to_num(0.0), rtol=1e-9, atol=1e-15)
    assert healing.Divergence.apply(logits, target.masked_fill(target == target.max(), torch.nan)).isnan()


COUNTED = {"llama": 18, "gpt2": 12, "gemma3": 26, "mixtral": 12, "falcon-7b": 11, "falcon-40b": 12}


@pytest.mark.parametrize("name", families.CASES)
def test_every_family(name, tmp_path):
    """All matrices and norms of kept attention and MLPs change, but not routers and experts that are one tensor; no more."""
    plan = DropPlan((1,), (2,))
    base, model = fresh(name), fresh(name)
    before = score_text(base, TOKENS, [DropPlan(), plan]).kl[1].mean()
    losses = heal(model, TOKENS, plan, tmp_path / "work", Healing(0.003, 16, tokens=5 * TOKENS.numel()))
    assert losses[0] == pytest.approx(before, abs=1e-4)
    with dropped(base, plan):
        inside = {key: p for key, p in base.named_parameters() if re.search(r"\.[012]\.", key)}
    is_norm = re.compile(r"(norm|ln_\w+|ln)\.weight$")
    kept = {key for key, p in inside.items() if p.ndim == 2 or (p.ndim == 1 and is_norm.search(key))}
    kept = {key for key in kept if not {"experts", "gate", "router", "shared_expert_gate"} & {*key.split(".")}}
    assert changed(model, base) == kept
    assert len(kept) == COUNTED.get(name, len(kept))
    assert divergence(base, model, plan) < losses[0]


def test_weights_that_no_gradient_reaches_stay(tmp_path):
    """The indexer of sparse attention chooses tokens without recording gradients."""
    model, base = (fresh("deepseek_v32") for _ in range(2))
    heal(model, TOKENS, DropPlan((1,), (2,)), tmp_path / "work", SHORT)
    names = {name for name, _ in base.named_parameters() if "indexer" in name}
    assert names
    assert not names & changed(model, base)
    assert len(changed(model, base)) > 10


def test_what_changes(tmp_path):
    """By name; also which parameters are trained is told by `trained_parameters`, so that it can be narrowed there."""
    base, model = fresh(), fresh()
    fingerprint, before = PLAN.maps[0][2].fingerprint, state(model)
    heal(model, TOKENS, PLAN, tmp_path / "work", SHORT)
    assert changed(model, base) == KEPT
    assert [linear.fingerprint for _, _, linear in PLAN.maps] == [fingerprint]
    rest, parameters = state(model)
    assert rest == before[0]
    assert [kind for _, *kind in parameters.values()] == [kind for _, *kind in before[1].values()]
    with dropped(model, PLAN):
        found = trained_parameters(find_anatomy(model))
    assert {f"model.layers.{name}" for name in found} == KEPT
    assert all(model.get_parameter(f"model.layers.{name}") is weight for name, weight in found.items())


def test_a_narrower_choice(tmp_path, monkeypatch):
    choose = healing.trained_parameters
    narrow = lambda anatomy: {n: w for n, w in choose(anatomy).items() if "mlp" in n}  # noqa: E731
    monkeypatch.setattr(healing, "trained_parameters", narrow)
    model = fresh()
    heal(model, TOKENS, PLAN, tmp_path / "work", SHORT)
    assert changed(model, pristine("llama")) == {name for name in KEPT if "mlp" in name}


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("gpt2", "bfloat16"), ("mixtral", "bfloat16"),
                                             ("llama", "float16"), ("mixtral", "float16")])  # fmt: skip
def test_narrow_dtypes_are_rounded_once(name, dtype, tmp_path, monkeypatch):
    """Trained in float32, and computed in what is measured later; float16 in float32, where its gradients are no zeros."""
    base, model = fresh(name).to(getattr(torch, dtype)), fresh(name).to(getattr(torch, dtype))
    plan, seen = DropPlan((1,), (2,)), []
    forward = healing._Distillation.forward
    monkeypatch.setattr(healing._Distillation, "forward", lambda self, **kw: seen.append(self) or forward(self, **kw))
    before = divergence(base, base, plan)
    losses = heal(model, TOKENS, plan, tmp_path / "work", Healing(0.01, 16, tokens=8 * TOKENS.numel()))
    assert losses[0] == pytest.approx(before, abs=1e-5 if dtype == "bfloat16" else 1e-3)
    assert divergence(base, model, plan) < losses[-1] < before
    with dropped(model, plan):
        weights = trained_parameters(find_anatomy(model)).values()
    for weight, wide in zip(weights, seen[-1].weights, strict=True):
        assert wide.dtype == torch.float32
        assert (wide.to(weight.dtype).float() != wide).any(), "it was trained in float32"
        assert torch.equal(weight, wide.to(weight.dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_how_a_model_comes_does_not_matter(tmp_path):
    """Neither its mode, and so the dropout in its configuration, nor whether the caller records gradients."""
    assert pristine("gpt2").config.resid_pdrop == 0.1
    plan = DropPlan((1,), (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        losses = heal(fresh("gpt2").train(), TOKENS, plan, tmp_path / "train", SHORT)
        with torch.no_grad():
            assert losses == heal(fresh("gpt2"), TOKENS, plan, tmp_path / "eval", SHORT)


def test_same_seed_same_weights(tmp_path, network, capfd):
    """Whatever the caller's random numbers, which go on afterwards; nothing is printed, or asked of the network."""
    models, losses = [fresh() for _ in range(3)], []
    for number, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        seed_all(number)
        expected = drawn()
        seed_all(number)
        losses.append(heal(model, TOKENS, PLAN, tmp_path / f"{number}", dataclasses.replace(SHORT, seed=seed)))
        assert drawn() == expected
    assert losses[0] == losses[1] != losses[2]
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])
    assert (network.requests, capfd.readouterr()) == ([], ("", ""))


def test_it_is_stored_and_measured_like_any_other(tmp_path, cache):
    fresh().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    located = locate_model(str(tmp_path / "base"))
    model, tokenizer = load_located(located, torch.float32, "cpu")
    plan = DropPlan((1,), (2,), n_layers=3, model=located.identity)
    losses = heal(model, TOKENS, plan, tmp_path / "work", SETTINGS)
    recipe = describe_healing(model, TOKENS, plan, SETTINGS)
    assert recipe | {"tokens": None} == {
        "method": "healing", "version": 3, "plan": {"attention": [1], "mlp": [2]}, "tokens": None, "dtype": "float32",
        "learning_rate": 0.003, "batch_size": 4, "budget": {"tokens": 624}, "seed": 1,
    }  # fmt: skip
    assert describe_healing(model, TOKENS, plan, SHORT)["budget"] == {"tokens": 208}
    assert describe_healing(model, TOKENS, plan, Healing(minutes=2))["budget"] == {"minutes": 2.0}
    derived = save_derived(model, tokenizer, tmp_path / "Healed", located, recipe)
    again, _ = load_model(str(derived.folder), torch.float32, "cpu")
    assert equal(again, model)
    assert divergence(fresh(), again, plan) < losses[0]


# ---- the budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "n_steps"), [(1, 1), (4 * 13, 1), (4 * 13 + 1, 2), (208, 4), (209, 5), (2 * 208, 8)])
def test_tokens(budget, n_steps, tmp_path):
    assert len(heal(fresh(), TOKENS, PLAN, tmp_path / "work", dataclasses.replace(SHORT, tokens=budget))) == n_steps


def test_fewer_samples_than_a_batch_holds(tmp_path):
    assert len(heal(fresh(), TOKENS[:3], PLAN, tmp_path / "a", Healing())) == 1
    assert len(heal(fresh(), TOKENS[:3], PLAN, tmp_path / "b", Healing(batch_size=4, tokens=30 * 13))) == 8


def test_every_pass_reads_all_samples_in_another_order():
    reader = healing._Reader(TOKENS, Healing(batch_size=5, seed=4))
    rows = torch.cat([reader(part.tolist())["input_ids"] for part in torch.arange(48).split(5)])
    where = [int((TOKENS[:, :-1] == row).all(1).nonzero()) for row in rows]
    passes = where[:16], where[16:32], where[32:]
    assert all(sorted(order) == [*range(16)] for order in passes)
    assert len({tuple(order) for order in (range(16), *passes)}) == 4


@pytest.fixture
def clock(monkeypatch):
    """A clock that jumps: what the first step takes does not count, later ones take 3, 5 and then 100 seconds."""
    now, jumps = [0.0], iter([0, 77, 0, 3, 0, 5, *[0, 100] * 100])

    def perf_counter():
        now[0] += next(jumps)
        return now[0]

    monkeypatch.setattr(healing, "time", types.SimpleNamespace(perf_counter=perf_counter))


def test_minutes(tmp_path, clock):
    """34 s, of steps that take 4 s: 8 steps. That number stays, whatever the clock says when a killed run resumes."""
    settings, folder, base = dataclasses.replace(SHORT, minutes=34 / 60), tmp_path / "work", fresh()
    whole = fresh()
    losses = heal(whole, TOKENS, PLAN, tmp_path / "whole", dataclasses.replace(SHORT, tokens=8 * 4 * 13))
    model = fresh()
    before = state(model)
    with pytest.raises(Stop):
        heal(model, TOKENS, PLAN, folder, settings, on_step=stop_at(5))
    assert_as_it_was(model, before)
    note = json.loads((folder / "healing.json").read_text())
    assert note["steps"] == 8
    assert note["recipe"] == describe_healing(base, TOKENS, PLAN, settings)
    watch = Watch()
    assert heal(model, TOKENS, PLAN, folder, settings, on_step=watch) == losses, "what was timed left no trace"
    assert watch.steps == [5, 6, 7, 8]
    assert equal(model, whole)
    # Another budget is another healing: steps are timed again, at 100 s each now.
    assert len(heal(fresh(), TOKENS, PLAN, folder, dataclasses.replace(SHORT, minutes=5))) == 3


def test_a_run_killed_while_steps_are_timed(tmp_path, monkeypatch, clock):
    def killed(*_):
        raise Stop

    model = fresh()
    before, settings = state(model), dataclasses.replace(SHORT, minutes=0.4)
    with monkeypatch.context() as patch:
        patch.setattr(healing, "_steps_in", killed)
        with pytest.raises(Stop):
            heal(model, TOKENS, PLAN, tmp_path / "work", settings)
    assert_as_it_was(model, before)
    assert len(heal(model, TOKENS, PLAN, tmp_path / "work", settings)) == 6


def test_one_step_at_least(tmp_path):
    assert len(heal(fresh(), TOKENS, PLAN, tmp_path / "work", Healing(minutes=1e-9))) == 1


# ---- a teacher of its own -----------------------------------------------------------------------------------------------


def test_a_teacher(tmp_path):
    """A repaired model learns from the dense one, which is left as it is, in whatever mode it was."""
    teacher, model = fresh().train(), fresh()
    for name, weight in model.named_parameters():
        if "mlp" in name:
            weight.data *= 1.2
    before, start = state(teacher), divergence(fresh(), model, PLAN)
    losses = heal(model, TOKENS, PLAN, tmp_path / "work", Healing(0.01, 16, tokens=20 * TOKENS.numel()), teacher)
    assert_as_it_was(teacher, before)
    assert losses[0] == pytest.approx(start, abs=1e-4)
    assert divergence(teacher.eval(), model, PLAN) < losses[-1] < start / 2


def test_a_model_that_is_its_own_teacher(tmp_path):
    models = fresh(), fresh()
    losses = heal(models[0], TOKENS, PLAN, tmp_path / "a", SHORT)
    assert heal(models[1], TOKENS, PLAN, tmp_path / "b", SHORT, models[1]) == losses
    assert equal(*models)


def test_the_own_teacher_takes_no_memory(tmp_path, monkeypatch):
    """It has the model's very weights, those of dropped sub-layers too, which so must stay where they are."""
    seen, make = [], healing._Distillation.__init__

    def init(self, model, teacher, weights):
        seen.append((teacher, dict(teacher.named_parameters())))
        make(self, model, teacher, weights)

    monkeypatch.setattr(healing._Distillation, "__init__", init)
    monkeypatch.setattr(distillation, "dropped", lambda *_: pytest.fail("it would move weights away from the GPU"))
    model = fresh()
    own = dict(model.named_parameters())
    heal(model, TOKENS, PLAN, tmp_path / "work", SHORT)
    ((teacher, weights),) = seen
    assert teacher is not model
    assert weights.keys() == own.keys()
    assert all(weights[name] is own[name] for name in own)


# ---- all or nothing -----------------------------------------------------------------------------------------------------


def test_a_stopped_healing_goes_on(tmp_path):
    whole, folder = fresh(), tmp_path / "work"
    losses = heal(whole, TOKENS, PLAN, tmp_path / "whole", SETTINGS)
    model = fresh().train()
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    for last in (3, 7):  # the second is in another pass
        with pytest.raises(Stop):
            heal(model, TOKENS, PLAN, folder, SETTINGS, on_step=stop_at(last))
        assert_as_it_was(model, before)
    half = folder / "checkpoint-9"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 1.')
    watch = Watch()
    assert heal(model, TOKENS, PLAN, folder, SETTINGS, on_step=watch) == losses
    assert watch.steps == [7, 8, 9, 10, 11, 12], "step 7 was not stored yet when it was stopped"
    assert equal(model, whole)
    # Stopped after the last step, before the model was stored: nothing is trained again.
    again = fresh()
    assert heal(again, TOKENS, PLAN, folder, SETTINGS, on_step=watch) == losses
    assert len(watch.steps) == 6
    assert equal(again, whole)


def in_two_processes(folder, *given):
    """What the processes print, and (losses, weights, steps made) of each that came to its end."""
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tests / "derive" / "heal_together.py"), str(folder), *given]
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr, [torch.load(path) for path in sorted(folder.glob("[01].pt"))]


def test_processes_share_each_step(tmp_path):
    """They end where one process does. Stopped and started again, they go on; processes with different models are refused."""
    model = fresh()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    losses = heal(model, TOKENS, PLAN, tmp_path / "alone", SETTINGS)
    stopped, ended = in_two_processes(tmp_path, "7")
    assert "stopped after step 7" in stopped
    assert not ended
    written, ends = in_two_processes(tmp_path)
    assert len(ends) == 2, written
    for found, weights, steps in ends:
        assert steps == [*range(7, 13)]  # the last checkpoint was of step 6
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        assert all(torch.equal(weight, ends[0][1][name]) for name, weight in weights.items())
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
    assert "Processes were given different models, text or settings" in in_two_processes(tmp_path, "different")[0]


def test_processes_that_cannot_share_a_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(LLMDropError, match="A batch of 4 samples cannot be shared equally by 3 processes"):
        heal(fresh(), TOKENS, PLAN, tmp_path / "healing", SHORT)
    with pytest.raises(LLMDropError, match="Tuning runs in one process, but `accelerate launch` started 3"):
        tune(fresh(), TOKENS, DropPlan((1,)), tmp_path / "tuning")


def test_a_process_whose_model_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "own_device", lambda: torch.device("cuda", 1))
    with pytest.raises(
        LLMDropError, match="This process computes on cuda:1, but its model is on cpu. Load it with device='cuda:1'"
    ):
        heal(fresh(), TOKENS, PLAN, tmp_path, SHORT)


@pytest.mark.parametrize("other", ["tokens", "plan", "settings", "kept", "dropped", "teacher", "student"])
def test_another_healing_starts_over(other, tmp_path):
    models, teacher = (fresh(), fresh()), fresh()
    given = {"tokens": TOKENS, "plan": PLAN, "settings": SHORT, "teacher": teacher if other in ("teacher", "student") else None}
    with pytest.raises(Stop):
        heal(fresh(), folder=tmp_path / "work", on_step=stop_at(3), **given)
    given |= {"tokens": {"tokens": TOKENS + 1 - 1 * (TOKENS == 96)}, "plan": {"plan": DropPlan((1,), (2,))},
              "settings": {"settings": Healing(0.003, 4, seed=2)}}.get(other, {})  # fmt: skip
    if other == "teacher":
        teacher.model.norm.weight.data[0] += 1
    for model in models:
        if other in ("kept", "student"):
            model.model.norm.weight.data[0] += 1
        if other == "dropped":  # it still determines what the teacher says
            model.model.layers[2].mlp.up_proj.weight.data[0] += 1
    watch = Watch()
    losses = heal(models[0], folder=tmp_path / "work", on_step=watch, **given)
    assert watch.steps == [1, 2, 3, 4]
    assert losses == heal(models[1], folder=tmp_path / "fresh", **given)
    assert equal(*models)


def quantised(model):
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)


def adapted(model):
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


def at_the_limit(model):
    """Only a weight in the middle of the model has no room for a change, whatever its sign."""
    mlp = model.half().model.layers[1].mlp
    mlp.gate_proj.weight.data[5] *= 0.1
    mlp.down_proj.weight.data[::2, 5] = torch.finfo(torch.float16).max
    mlp.down_proj.weight.data[1::2, 5] = torch.finfo(torch.float16).min


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": TOKENS[:, :1]}, "A loss takes samples of at least 2 tokens"),
        ({"tokens": TOKENS[:0]}, r"Expected token ids \(n_samples, seq_len\), found"),
        ({"tokens": TOKENS + 90}, "but this model knows 0 to 96"),
        ({"tokens": torch.zeros(1, 65, dtype=torch.long)}, "which knows 64 positions"),
        ({"plan": DropPlan((3,))}, "holds layer 3, but this model has 3 layers"),
        ({"plan": "attention"}, "Expected a drop plan"),
        ({"plan": DropPlan((0, 1, 2), (0, 1, 2))}, "Nothing is left to heal: the plan drops all attention and MLPs"),
        ({"settings": {"tokens": 8}}, "Expected settings, found"),
        ({"change": quantised}, "The weight of 0.mlp.up_proj is quantised .torch.int8., so it cannot be trained"),
        ({"change": adapted}, "The model has adapters of peft"),
        ({"change": lambda model: model.lm_head.to("meta")}, "A model is healed on one device.* are on cpu, meta"),
        ({"teacher": "a name"}, "Expected a model, found str"),
        (
            {"teacher": families.tiny("llama", vocab_size=99)},
            "The teacher knows 99 tokens, but this model 97: no distributions",
        ),
        ({"teacher": families.tiny("llama", max_position_embeddings=8)}, "which knows 8 positions"),
        ({"change": lambda model: model.lm_head.weight.data.fill_(torch.inf)}, "The loss of step 1 is not finite"),
        ({"settings": Healing(1e30)}, "The loss of step 2 is not finite"),
        (
            {"change": at_the_limit, "settings": Healing(20_000, 16)},
            "healed 1.mlp.down_proj.weight is not finite in torch.float16",
        ),
    ],
)
def test_bad_input(given, message, tmp_path):
    model = fresh()
    if "change" in given:
        given["change"](model)
    before = state(model) if model.lm_head.weight.device.type == "cpu" else None
    given = {"tokens": TOKENS, "plan": PLAN, "settings": SHORT} | {k: v for k, v in given.items() if k != "change"}
    with pytest.raises(LLMDropError, match=message):
        heal(model, folder=tmp_path / "work", **given)
    if before:
        assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 8, "minutes": 2}, "The budget is 8 tokens and 2 minutes. Give one of them"),
        ({"tokens": 0}, "The number of tokens must be 1 or more, but is 0"),
        ({"tokens": 1e6}, "The number of tokens must be a whole number"),
        ({"minutes": 0}, "The number of minutes must be a number above 0, but is 0"),
        ({"minutes": "2"}, "The number of minutes must be a number above 0, but is '2'"),
        ({"batch_size": 0}, "The batch size must be 1 or more"),
        ({"learning_rate": float("nan")}, "The learning rate must be a number above 0, but is nan"),
        ({"learning_rate": 10**400}, "The learning rate must be a number above 0"),
        ({"minutes": np.True_}, "The number of minutes must be a number above 0"),
        ({"minutes": torch.tensor(True)}, "The number of minutes must be a number above 0"),
        ({"minutes": torch.ones(2)}, "The number of minutes must be a number above 0"),
        ({"minutes": b"2"}, "The number of minutes must be a number above 0"),
        ({"tokens": 10**24}, "The number of tokens must be 9223372036854775807 or less"),
        ({"batch_size": 10**20}, "The batch size must be 9223372036854775807 or less"),
        ({"seed": 1 << 32}, "The seed must be below 2..32"),
        ({"seed": 0.5}, "The seed must be a whole number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(LLMDropError, match=message):
        Healing(**settings)


@pytest.mark.parametrize("text_is_made", ["before", "inside"])
def test_where_nothing_records_gradients(text_is_made, tmp_path):
    one, other = fresh(), fresh()
    with torch.inference_mode():
        losses = heal(one, TOKENS.clone() if text_is_made == "inside" else TOKENS, PLAN, tmp_path / "work", SHORT)
    assert losses == heal(other, TOKENS, PLAN, tmp_path / "other", SHORT)
    assert equal(one, other)


def test_a_model_that_is_dropped_already_teaches_nothing(tmp_path):
    model = fresh()
    with dropped(model, PLAN), pytest.raises(LLMDropError, match="attention of layer 1 is dropped already"):
        heal(model, TOKENS, DropPlan((1,)), tmp_path / "work", SHORT)


def test_the_precision_of_a_launcher_is_not_followed(tmp_path, monkeypatch):
    one, other = fresh(), fresh()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    losses = heal(one, TOKENS, PLAN, tmp_path / "work", SHORT)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert losses == heal(other, TOKENS, PLAN, tmp_path / "other", SHORT)
    assert equal(one, other)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "work").write_text("mine")
    with pytest.raises(LLMDropError, match="work is a file"):
        heal(fresh(), TOKENS, PLAN, tmp_path / "work", SHORT)
    assert (tmp_path / "work").read_text() == "mine"


def test_a_full_disk(tmp_path, monkeypatch):
    """The model stays as it is, and the checkpoints that are whole too, so that the same call goes on from them."""
    model, whole, watch = fresh(), fresh(), Watch()
    before, save = state(model), training.Trainer._save_checkpoint

    def full(trainer, *arguments, **more):
        if trainer.state.global_step > 4:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        return save(trainer, *arguments, **more)

    monkeypatch.setattr(training.Trainer, "_save_checkpoint", full)
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        heal(model, TOKENS, PLAN, tmp_path / "work", SETTINGS)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(DiskFull, match="The disk is full: could not write"):
        heal(model, TOKENS, PLAN, tmp_path / "work", SETTINGS)
    assert_as_it_was(model, before)
    monkeypatch.undo()
    losses = heal(model, TOKENS, PLAN, tmp_path / "work", SETTINGS, on_step=watch)
    assert watch.steps == [*range(5, 13)]
    assert losses == heal(whole, TOKENS, PLAN, tmp_path / "fresh", SETTINGS)
    assert equal(model, whole)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "tuning.json").write_text("{}")
    with pytest.raises(LLMDropError, match="holds files that are not of a healing. Give the checkpoints a folder of their own"):
        heal(fresh(), TOKENS, PLAN, tmp_path, SETTINGS)
    assert (tmp_path / "checkpoint-5").is_dir()


@pytest.mark.parametrize("text", ["", "[1]", '{"recipe": 1', "\xff"])
def test_a_damaged_note(text, tmp_path):
    (tmp_path / "healing.json").write_bytes(text.encode("latin-1"))
    assert len(heal(fresh(), TOKENS, PLAN, tmp_path, SHORT)) == 4


@pytest.mark.parametrize("other", ["checkpoint-old", "checkpoint-3.zip", "checkpoint-9"])
def test_what_is_no_checkpoint_stays(other, tmp_path):
    heal(fresh(), TOKENS, PLAN, tmp_path / "work", SHORT)
    strange = tmp_path / "work" / other
    if other == "checkpoint-old":
        strange.mkdir()
    else:
        strange.write_text("mine")
    for settings in (SHORT, dataclasses.replace(SHORT, seed=7)):  # gone on with, and deleted
        assert len(heal(fresh(), TOKENS, PLAN, tmp_path / "work", settings)) == 4
        assert strange.exists() or other == "checkpoint-old", "a folder of such a name the Trainer may delete"


def test_a_note_that_is_a_folder(tmp_path):
    (tmp_path / "healing.json").mkdir()
    model, before = fresh(), state(fresh())[1]
    with pytest.raises(LLMDropError, match="cannot be written: Is a directory"):
        heal(model, TOKENS, PLAN, tmp_path, SHORT)
    assert all(torch.equal(p, before[name][0]) for name, p in model.named_parameters())


@pytest.mark.parametrize("work", [heal, tune])
def test_weights_that_were_made_in_inference_mode(work, tmp_path):
    with torch.inference_mode():
        model = families.tiny("llama")
    with pytest.raises(LLMDropError, match="made in torch.inference_mode.. cannot be"):
        work(model, TOKENS, PLAN, tmp_path / "work")


@pytest.mark.parametrize("work", [heal, tune])
def test_a_teacher_that_is_offloaded(work, tmp_path):
    teacher = accelerate.cpu_offload(fresh(), torch.device("cpu"))
    with pytest.raises(LLMDropError, match="The teacher's weight model.embed_tokens.weight is offloaded or quantised"):
        work(fresh(), TOKENS, PLAN, tmp_path / "work", teacher=teacher)


def test_a_teacher_that_was_made_in_inference_mode(tmp_path):
    one, other = fresh(), fresh()
    with torch.inference_mode():
        teacher = copy.deepcopy(other)
        for parameter in teacher.parameters():
            parameter.data = parameter.data.clone()
    assert heal(one, TOKENS, PLAN, tmp_path / "work", SHORT, teacher) == heal(other, TOKENS, PLAN, tmp_path / "other", SHORT)
    assert equal(one, other)


@pytest.mark.parametrize("work", [heal, tune])
def test_the_accelerator_of_the_caller_is_as_before(work, tmp_path):
    states = AcceleratorState, GradientState, PartialState
    for each in states:
        each._reset_state()
    try:
        work(fresh(), TOKENS, PLAN, tmp_path / "one")
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        before = [dict(each._shared_state) for each in states]
        work(fresh(), TOKENS, PLAN, tmp_path / "other")
        assert accelerator.mixed_precision == "bf16"
        assert [dict(each._shared_state) for each in states] == before
    finally:
        for each in states:
            each._reset_state()


@pytest.mark.parametrize("when", ["copies", "timing", "step"])
def test_out_of_memory(when, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = fresh()
    before = state(model)
    target, name = {"copies": (healing._Distillation, "__init__"), "timing": (healing, "_steps_in"),
                    "step": (healing._Distillation, "forward")}[when]  # fmt: skip
    monkeypatch.setattr(target, name, full)
    settings = dataclasses.replace(SHORT, minutes=1) if when == "timing" else SHORT
    with pytest.raises(LLMDropError, match="Out of GPU memory with a batch of 4 samples of 13 tokens. Use a smaller batch"):
        heal(model, TOKENS, PLAN, tmp_path / "work", settings)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_folder_that_can_no_longer_be_written(is_writable, tmp_path, monkeypatch):
    """What the caller's own function may not do is no error of the folder."""

    def refused(step, loss):
        monkeypatch.setattr(training.os, "access", lambda *given: is_writable)
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError if is_writable else LLMDropError, match="Permission denied"):
        heal(fresh(), TOKENS, PLAN, tmp_path / "work", SHORT, on_step=refused)
