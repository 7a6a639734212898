"""Kept weights are refitted in closed form: the solution, what changes and what never does, and the search that sees it."""

import collections
import contextlib
import copy
import json
import re

import accelerate
import families
import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from derive.changing import changed, equal, fresh, pristine
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmdrop_utils import DropPlan, LinearMap, LLMDropError, dropped
from llmdrop_utils.derive import moments as moments_module
from llmdrop_utils.derive import offloading, search, sites
from llmdrop_utils.derive import repair as repair_module
from llmdrop_utils.derive.moments import Moments, solve
from llmdrop_utils.derive.offloading import hooks_of
from llmdrop_utils.derive.refitting import Repairing, held_out_of
from llmdrop_utils.derive.repair import Repair, describe_repair, repair
from llmdrop_utils.derive.search import AFTER, BEFORE, HELD_OUT, ONE_JUDGES, RIDGES, select_with_repair
from llmdrop_utils.models.families import family_of, find_anatomy

TOKENS = torch.randint(3, 97, (40, 24), generator=torch.Generator().manual_seed(0))
PLAN, DENSE = DropPlan(attention=(1,)), DropPlan()
EXACT = Repair(ridges=(1e-9,), held_out=40)


@torch.no_grad()
def log_probabilities(model, plan=DENSE, tokens=TOKENS):
    with dropped(model, plan):
        return model(tokens).logits.double().log_softmax(-1)


def divergence(dense, model, plan, tokens=TOKENS):
    first, other = log_probabilities(dense, tokens=tokens), log_probabilities(model, plan, tokens)
    return float((first.exp() * (first - other)).sum(-1).mean())


# ---- the solution -------------------------------------------------------------------------------------------------------


def draw(n, n_in, n_out, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, n_in)) @ generator.normal(size=(n_in, n_in))
    return x, x @ generator.normal(size=(n_in, n_out)) + generator.normal(size=(n, n_out))


def moments_of(x, e, pieces=1, held_out=None):
    moments = Moments()
    for part, explained in zip(np.array_split(x, pieces), np.array_split(e, pieces), strict=True):
        moments.add(torch.tensor(part), torch.tensor(explained))
    moments.add(*(torch.tensor(each) for each in held_out or (x, e)), held_out=True)
    return moments


def test_equals_least_squares_in_float64():
    x, e = draw(300, 12, 5)
    expected = np.linalg.lstsq(x, e, rcond=None)[0]
    np.testing.assert_allclose(moments_of(x, e).fit([0.0]).matrix.numpy(), expected, rtol=1e-8)


def test_equals_least_squares_with_rows_added_for_the_ridge():
    """A ridge is a least-squares problem with sqrt(ridge * scale) times the unit matrix under X, and zeros under E."""
    x, e = draw(300, 12, 5)
    scale = (x.T @ x).diagonal().mean()
    added = np.vstack([x, np.sqrt(0.3 * scale) * np.eye(12)]), np.vstack([e, np.zeros((12, 5))])
    found = solve(torch.tensor(x.T @ x), torch.tensor(x.T @ e), 0.3)
    np.testing.assert_allclose(found.numpy(), np.linalg.lstsq(*added, rcond=None)[0], rtol=1e-8)


def test_streaming_equals_the_whole():
    x, e = draw(301, 7, 3)
    one, many = moments_of(x, e).fit([0.1]), moments_of(x, e, pieces=13).fit([0.1])
    np.testing.assert_allclose(many.matrix.numpy(), one.matrix.numpy(), rtol=1e-12)


def test_sums_of_bfloat16_are_those_of_float64():
    x = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[:, :2] *= 300  # a few channels are far larger than all others
    moments, before = Moments(), torch.backends.mkldnn.matmul.fp32_precision
    moments.add(x, x[:, :3].float())
    torch.testing.assert_close(moments.fitted.xx, x.double().T @ x.double(), rtol=1e-5, atol=1e-2)
    assert torch.linalg.eigvalsh(moments.fitted.xx).min() > 0
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_sums_of_many_pieces_are_those_of_float64(monkeypatch):
    """Of float32, in pieces that end elsewhere than what is summed before it goes over into float64; read meanwhile, too."""
    monkeypatch.setattr(moments_module, "ROWS", 100)
    monkeypatch.setattr(moments_module, "COLUMNS", 4)
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    e = x[:, :2] + 3
    moments = Moments()
    for number, rows in enumerate(torch.arange(1000).split(37)):
        moments.add(x[rows], e[rows])
        if number % 5 == 0:
            assert moments.fitted.xx.shape == (6, 6)
    torch.testing.assert_close(moments.fitted.xx, x.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    assert torch.equal(moments.fitted.xx, moments.fitted.xx.T)
    torch.testing.assert_close(moments.fitted.xe, x.double().T @ e.double(), rtol=1e-5, atol=1e-3)
    assert moments.fitted.ee == pytest.approx(float(e.double().square().sum()), rel=1e-6)
    assert moments.fitted.n == 1000


def test_held_out_text_tells_the_ridge_and_what_is_explained():
    # Few more tokens than inputs are fitted on: without a ridge noise is fitted.
    all_x, all_e = draw(4030, 20, 4)
    x, e, held_out = all_x[:30], all_e[:30], (all_x[30:], all_e[30:])
    ridges = (1e-6, 1e-3, 1e-2, 1.0)
    fit = moments_of(x, e, held_out=held_out).fit(ridges)
    solutions = [solve(torch.tensor(x.T @ x), torch.tensor(x.T @ e), ridge).numpy() for ridge in ridges]
    errors = [np.square(held_out[1] - held_out[0] @ solution).sum() for solution in solutions]
    assert fit.ridge == ridges[int(np.argmin(errors))]
    assert fit.explained == pytest.approx(1 - min(errors) / np.square(held_out[1]).sum(), rel=1e-9)


def test_what_explains_nothing_is_refused():
    x, e = draw(100, 6, 2)
    fit = moments_of(x, e, held_out=(x, -e)).fit([0.01, 1.0])
    assert fit.matrix is None
    assert fit.explained == 0


@pytest.mark.parametrize(
    ("x", "e", "ridge", "message"),
    [
        (np.ones((5, 6)), np.ones((5, 2)), 0.1, r"6 inputs take as many tokens at least, but only 5"),
        (np.ones((50, 6)), np.ones((50, 2)), 0.0, r"singular at a ridge of 0"),
        (np.full((50, 6), np.nan), np.ones((50, 2)), 0.1, r"not finite"),
    ],
)
def test_statistics_that_allow_no_solution(x, e, ridge, message):
    with pytest.raises(LLMDropError, match=message):
        moments_of(x, e).fit([ridge])


def test_inputs_that_are_always_zero_explain_nothing():
    assert moments_of(np.zeros((50, 6)), np.ones((50, 2))).fit([0.1]).matrix is None


# ---- a model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, DropPlan((2,), (1,)), DropPlan((1,), (1,))], ids=["attention", "joint", "block"])
@pytest.mark.parametrize("name", families.CASES)
def test_every_family_comes_closer_to_the_dense_model(name, plan):
    model, dense = fresh(name), pristine(name)
    before = divergence(dense, model, plan)
    found = repair(model, TOKENS, plan, batch_size=16)
    assert divergence(dense, model, plan) < before
    assert all(fit.explained <= 1 for fit in found)
    kept = {"self_attn", "attn", "attention", "self_attention", "mlp", "fc1", "fc2"}
    for parameter in changed(model, dense):
        layer, unit = re.search(r"\.(\d+)\.(\w+)\.", parameter).groups()
        assert unit in kept
        of_mlp = unit in ("mlp", "fc1", "fc2")
        assert int(layer) not in (plan.mlp if of_mlp else plan.attention), "what is dropped keeps its weights"
        assert parameter.endswith("weight")


@pytest.mark.parametrize("name", [*families.CASES, *families.MORE])
def test_the_output_projection_of_every_family_is_refitted(name):
    """But those of experts, which are not dense."""
    case, anatomy = (families.CASES | families.MORE)[name], find_anatomy(pristine(name))
    for layer in anatomy.layers:
        for kind, pattern in (("attention", case.attention), ("mlp", case.mlp)):
            maps = [path for path, part in layer.block.named_modules() if isinstance(part, nn.Linear | Conv1D)]
            at = sites.sites_of(layer.block, family_of(anatomy.decoder.config), kind)
            wanted = {
                path for path in maps if re.search(pattern, path) and "expert" not in path and "shared_mlp.down" not in path
            }
            if at is not None and wanted:
                assert at.output in wanted


@pytest.mark.parametrize("plan", [DropPlan((1, 2)), DropPlan((2,)), DropPlan((1,), (1,)), DropPlan((2,), (0, 1))])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom", "falcon-7b", "phi", "opt"])
def test_what_is_kept_in_mind_is_what_would_be_computed(name, plan, monkeypatch):
    """Outputs of a layer that are computed once, of each of several batches: in float64 the weights are those without that."""
    models = [fresh(name, torch.float64) for _ in range(2)]
    repair(models[0], TOKENS, plan, Repair(sweeps=2), batch_size=3)
    monkeypatch.setattr(Repairing, "_at", lambda self, batch: contextlib.nullcontext())
    repair(models[1], TOKENS, plan, Repair(sweeps=2), batch_size=3)
    for parameter, weight in models[0].named_parameters():
        torch.testing.assert_close(weight, models[1].get_parameter(parameter), rtol=1e-9, atol=1e-10)


def test_an_output_is_computed_once(monkeypatch):
    """Of each batch, by the dense model; by the dropped one before and after its fit. One more tells what is read together."""
    calls, found = collections.Counter(), {}
    forward, refit = nn.Linear.forward, Repairing.refit

    def counted(self, index, *streams):
        calls.clear()
        refit(self, index, *streams)
        for model, blocks in (("dense", self.reference), ("dropped", self.blocks)):
            for layer in (index, index + 1) if index + 1 in self.plan.attention else (index,):
                parts = blocks[layer].self_attn.o_proj, blocks[layer].mlp.down_proj
                found[index, model, layer] = [calls[part] for part in parts]
        return []

    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.update([self]) or forward(self, x))
    monkeypatch.setattr(Repairing, "refit", counted)
    repair(fresh(), TOKENS, PLAN, batch_size=5)  # 8 batches
    assert found == {
        (0, "dense", 0): [9, 8], (0, "dense", 1): [8, 0], (0, "dropped", 0): [16, 16], (0, "dropped", 1): [0, 0],
        (1, "dense", 1): [1, 8], (1, "dropped", 1): [0, 16],
        (2, "dense", 2): [9, 8], (2, "dropped", 2): [16, 16],
    }  # fmt: skip


def test_a_layer_that_keeps_nothing_is_not_read(monkeypatch):
    monkeypatch.setattr(sites, "tap", lambda *given: pytest.fail("it was read"))
    nothing = {"attention": None, "mlp": None}
    assert sites.read_together(fresh().model.layers[1], nothing, torch.zeros(1, 2, 3), ((), {})) == nothing


def test_attention_weights_are_not_kept(monkeypatch):
    """They grow with the square of the length: under eager attention they would fill the memory."""
    model, kept = fresh(), []
    model.set_attn_implementation("eager")
    at = Repairing._at
    monkeypatch.setattr(Repairing, "_at", lambda self, batch: kept.extend(self.given.values()) or at(self, batch))
    repair(model, TOKENS, DropPlan((2,)), batch_size=8)
    returned = [given.of(batch) for given in kept for batch in range(len(given))]
    assert any(isinstance(each, tuple) for each in returned)
    assert all(part is None or part.ndim == 3 for each in returned for part in (each if isinstance(each, tuple) else (each,)))


def test_an_update_equals_one_made_by_hand():
    """The output of the MLP before a dropped attention: what the stream lacks is that attention's term, as in float64."""
    model, dense = fresh(dtype=torch.float64), fresh(dtype=torch.float64)
    repair(model, TOKENS, PLAN, Repair(ridges=(0.05,), held_out=40), layers=[0])
    seen = {}
    layers = dense.model.layers
    handles = [
        layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0])),
        layers[1].self_attn.register_forward_hook(lambda module, args, output: seen.update(e=output[0])),
    ]
    with torch.no_grad():
        dense(TOKENS)
    for handle in handles:
        handle.remove()
    x, e = (seen[name].flatten(0, 1).numpy() for name in ("x", "e"))
    scale = np.sqrt(0.05 * (x.T @ x).diagonal().mean())
    added = np.vstack([x, scale * np.eye(x.shape[1])]), np.vstack([e, np.zeros((x.shape[1], e.shape[1]))])
    expected = layers[0].mlp.down_proj.weight.detach().numpy() + np.linalg.lstsq(*added, rcond=None)[0].T
    np.testing.assert_allclose(model.model.layers[0].mlp.down_proj.weight.detach().numpy(), expected, rtol=1e-6, atol=1e-9)
    assert changed(model, dense) == {"model.layers.0.mlp.down_proj.weight"}


def test_what_can_be_explained_exactly_is_recovered_exactly():
    """A model that differs from the reference in one output projection, and lacks nothing."""
    down = "model.layers.1.mlp.down_proj"
    for name, broken in (("llama", down), ("granite", down), ("gpt2", "transformer.h.1.attn.c_proj")):
        dense, model = fresh(name, torch.float64), fresh(name, torch.float64)
        with torch.no_grad():
            model.get_submodule(broken).weight.add_(torch.randn_like(model.get_submodule(broken).weight))
        assert divergence(dense, model, DropPlan()) > 1e-3
        repair(model, TOKENS, DropPlan(), EXACT, reference=dense)
        assert divergence(dense, model, DropPlan()) < 1e-10


@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_an_output_that_passes_a_norm_is_recovered_but_for_one_direction(name):
    """What a small change of the projection did is taken back, but for the direction that a norm takes away itself."""
    dense, model = fresh(name, torch.float64), fresh(name, torch.float64)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.add_(1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double())
    before = divergence(dense, model, DropPlan())
    repair(model, TOKENS, DropPlan(), EXACT, reference=dense)
    assert divergence(dense, model, DropPlan()) < 0.01 * before


def test_an_infinite_ridge_changes_nothing():
    model, dense = fresh(dtype=torch.float64), fresh(dtype=torch.float64)
    repair(model, TOKENS, PLAN, Repair(ridges=(1e12,)))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dense.get_parameter(name), rtol=0, atol=1e-9)


def test_the_model_itself_as_reference_is_the_model_as_it_was():
    one, other = fresh(), fresh()
    repair(one, TOKENS, PLAN)
    repair(other, TOKENS, PLAN, reference=other)
    assert not changed(one, other)


@pytest.mark.parametrize("other", ["attention in eager mode", "train mode", "rotary embedding", "token embeddings"])
def test_a_reference_is_read_by_its_own_rules(other):
    """What it makes of the text is matched: with its own embeddings, masks and positions, and without dropout."""
    name, settings = {
        "attention in eager mode": ("llama", {"attn_implementation": "eager"}),
        "train mode": ("gpt2", {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}),
        "rotary embedding": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}),
        "token embeddings": ("llama", {}),
    }[other]
    model, reference = fresh(name), families.tiny(name, **settings).train(other == "train mode")
    reference.load_state_dict(model.state_dict())
    if other == "token embeddings":
        reference.model.embed_tokens.weight.data += 0.3 * torch.randn(97, 32, generator=torch.Generator().manual_seed(2))
    before = copy.deepcopy(reference)
    dropped_model = divergence(before.eval(), model, PLAN)
    found = repair(model, TOKENS, PLAN, reference=reference)
    assert reference.training == (other == "train mode")
    assert not changed(reference, before)
    after = divergence(before.eval(), model, PLAN)
    assert after < 0.8 * dropped_model
    if other in ("attention in eager mode", "train mode"):  # the same function
        alike = fresh(name)
        assert [fit.site for fit in repair(alike, TOKENS, PLAN, reference=before)] == [fit.site for fit in found]
        assert after == pytest.approx(divergence(before, alike, PLAN), rel=1e-3)
    if other == "attention in eager mode":
        assert after == pytest.approx(divergence(pristine("llama"), repaired_alone(), PLAN), rel=1e-3)


def repaired_alone():
    model = fresh()
    repair(model, TOKENS, PLAN, reference=fresh())
    return model


def test_layers_before_the_first_dropped_one_stay():
    model, dense = fresh(), pristine("llama")
    repair(model, TOKENS, DropPlan(attention=(2,)))
    assert {name.split(".")[2] for name in changed(model, dense)} == {"1", "2"}


def test_a_second_sweep_begins_with_the_weights_of_the_first():
    one, two, by_hand = fresh(), fresh(), fresh()
    repair(one, TOKENS, PLAN)
    repair(two, TOKENS, PLAN, Repair(sweeps=2))
    repair(by_hand, TOKENS, PLAN)
    repair(by_hand, TOKENS, PLAN, reference=pristine("llama"), layers=[0, 1, 2])
    assert changed(two, one)
    for name, parameter in two.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name))


def test_beside_maps_in_dropped_places():
    plan = DropPlan((1,), maps={("attention", 1): LinearMap(torch.eye(32) / 10)})
    model, dense = fresh(), pristine("llama")
    before = divergence(dense, model, plan)
    repair(model, TOKENS, plan)
    assert divergence(dense, model, plan) < before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_model_as_it_was(error):
    model, dense = fresh().train(), pristine("llama")

    def stop(index):
        if index == 1:
            raise error

    with pytest.raises(error):
        repair(model, TOKENS, PLAN, on_layer=stop)
    assert not changed(model, dense)
    assert all(module.training for module in model.modules())
    assert repair(model, TOKENS, PLAN)


def test_an_interruption_of_a_model_that_was_made_in_inference_mode():
    with torch.inference_mode():
        model = families.tiny("llama")
        before = copy.deepcopy(model)
    assert model.lm_head.weight.is_inference()

    def stop(index):
        if index == 1:
            assert changed(model, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(model, TOKENS, PLAN, on_layer=stop)
    assert not changed(model, before)


def test_weights_that_are_too_large_for_their_dtype():
    """In the last layer, which no further one reads: a tiny input would have to make what a usual one does."""
    reference = fresh()
    with torch.no_grad():
        reference.model.layers[2].mlp.up_proj.weight *= 0.002
        reference.model.layers[2].mlp.down_proj.weight *= 30_000
    model = copy.deepcopy(reference.half())
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight *= 0.002
    before = copy.deepcopy(model)
    with pytest.raises(LLMDropError, match=r"A refitted weight is too large for torch\.float16\. Load the model in bfloat16"):
        repair(model, TOKENS, DENSE, reference=reference)
    assert not changed(model, before)


def test_precision_that_is_set_for_all_of_torch_goes_on_to_be():
    setting = torch.backends.mkldnn.matmul
    try:
        torch.backends.fp32_precision = "bf16"
        repair(fresh(dtype=torch.bfloat16), TOKENS, PLAN)
        assert setting.fp32_precision == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert setting.fp32_precision == "ieee"
        setting.fp32_precision = "tf32" if setting.fp32_precision == "bf16" else "bf16"
        own = setting.fp32_precision
        repair(fresh(dtype=torch.bfloat16), TOKENS, PLAN)
        assert setting.fp32_precision == own
    finally:
        torch.backends.fp32_precision = setting.fp32_precision = "none"


def test_the_recipe_is_plain_json():
    recipe = describe_repair(fresh(), TOKENS, PLAN, Repair(ridges=(np.float32(0.5), 1)))
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["ridges"] == [0.5, 1.0]


def test_a_search_in_a_model_that_is_dropped_already():
    model = fresh()
    with dropped(model, PLAN), pytest.raises(LLMDropError, match="attention of layer 1 is dropped already"):
        select_with_repair(model, TOKENS, "attention", 1)


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def in_memory(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def in_its_own_files(model, folder):
    """As transformers loads what is too large: from the model's files, but for one layer."""
    model.save_pretrained(folder)
    places = dict.fromkeys(("model.layers.0", "model.layers.1", "model.rotary_emb", "model.embed_tokens"), "disk")
    places |= dict.fromkeys(("model.layers.2", "model.norm", "lm_head"), "cpu")
    return type(model).from_pretrained(folder, device_map=places, offload_folder=folder / "offload", dtype=model.dtype).eval()


def weights_of(model):
    """All of them, wherever they are."""
    found = {}
    for name, weight in model.named_parameters():
        module, _, own = name.rpartition(".")
        found[name] = model.get_submodule(module)._hf_hook.weights_map[own].clone() if weight.is_meta else weight
    return found


def same(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weight, others[name]) for name, weight in weights.items())


@pytest.mark.parametrize("plan", [PLAN, DropPlan((1, 2), (2,))])
@pytest.mark.parametrize("offload", [on_disk, in_memory, in_its_own_files])
def test_an_offloaded_model(offload, plan, tmp_path):
    """Its weights become those of the model in memory, to the bit, and are then where they were; files stay as they are."""
    settings, here, there = Repair(sweeps=2), fresh(), offload(fresh(), tmp_path)
    elsewhere = {name for name, weight in there.named_parameters() if weight.is_meta}
    stored = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert repair(there, TOKENS, plan, settings) == repair(here, TOKENS, plan, settings)
    assert same(weights_of(there), weights_of(here))
    assert elsewhere == {name for name, weight in there.named_parameters() if weight.is_meta} != set()
    assert stored == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    torch.testing.assert_close(log_probabilities(there, plan), log_probabilities(here, plan))
    if offload is in_its_own_files:
        there.save_pretrained(tmp_path / "repaired")
        assert equal(type(here).from_pretrained(tmp_path / "repaired", dtype=here.dtype), here)


@pytest.mark.parametrize("offload", [on_disk, in_memory, in_its_own_files])
def test_an_interruption_leaves_an_offloaded_model_as_it_was(offload, tmp_path):
    model = offload(fresh(), tmp_path)
    elsewhere = {name for name, weight in model.named_parameters() if weight.is_meta}

    def stop(index):
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(model, TOKENS, PLAN, on_layer=stop)
    assert same(weights_of(model), weights_of(fresh()))
    assert elsewhere == {name for name, weight in model.named_parameters() if weight.is_meta}
    torch.testing.assert_close(log_probabilities(model), log_probabilities(fresh()))
    if offload is on_disk:  # nothing is left in memory
        assert not any(hook.weights_map.dataset.state_dict for _, hook in hooks_of(model))


def test_an_interruption_while_a_layer_is_stored(tmp_path, monkeypatch):
    """The second of two: the first one is what ended the repair."""
    model, store, interrupted = on_disk(fresh(), tmp_path), offloading._store, []

    def stop(index):
        if index == 1:
            monkeypatch.setattr(offloading, "_store", interrupt)
            raise KeyboardInterrupt

    def interrupt(*args):
        if not interrupted:
            interrupted.append(args)
            raise KeyboardInterrupt
        store(*args)

    with pytest.raises(KeyboardInterrupt):
        repair(model, TOKENS, PLAN, on_layer=stop)
    assert interrupted
    assert same(weights_of(model), weights_of(fresh()))
    assert all(weight.is_meta for weight in model.parameters())
    torch.testing.assert_close(log_probabilities(model), log_probabilities(fresh()))


def test_another_model_of_the_same_weights_in_memory_stays(tmp_path):
    weights = fresh().state_dict()
    model, other = (accelerate.cpu_offload(fresh(), torch.device("cpu"), state_dict={**weights}) for _ in range(2))
    repair(model, TOKENS, PLAN)
    assert same(weights_of(other), weights_of(fresh()))
    assert not same(weights_of(model), weights_of(fresh()))


def test_memory_that_runs_out_leaves_an_offloaded_model_as_it_was(tmp_path, monkeypatch):
    """No layer can be brought any more."""
    model = on_disk(fresh(), tmp_path)

    def bring(self, module, *args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    def stop(index):
        if index == 1:
            monkeypatch.setattr(AlignDevicesHook, "pre_forward", bring)
            raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(LLMDropError, match="Out of GPU memory with 40 samples of 24 tokens"):
        repair(model, TOKENS, PLAN, on_layer=stop)
    assert same(weights_of(model), weights_of(fresh()))


def test_a_reference_that_is_offloaded(tmp_path):
    reference = on_disk(fresh(), tmp_path)
    assert repair(fresh(), TOKENS, PLAN, reference=reference) == repair(fresh(), TOKENS, PLAN, reference=fresh())
    assert all(weight.is_meta for weight in reference.parameters())
    assert same(weights_of(reference), weights_of(fresh()))


@pytest.mark.parametrize(("plan", "ahead"), [(DropPlan((2, 3, 4)), 1), (DropPlan((2, 3, 4), (2, 3)), 3)])
def test_an_offloaded_model_computes_one_layer_at_a_time(plan, ahead, tmp_path, monkeypatch):
    """Beside it there are copies of those that its target is read from, up to the next sub-layer that is kept."""
    model, present, made = on_disk(families.tiny("llama", num_hidden_layers=6), tmp_path), [], []
    layers, copied = model.model.layers, repair_module.copied
    monkeypatch.setattr(repair_module, "copied", lambda block: made.append([*layers].index(block)) or copied(block))

    def look(index):
        present.append([i for i, layer in enumerate(layers) if not any(weight.is_meta for weight in layer.parameters())])
        if index == 1:
            assert made == [*range(1, 2 + ahead)]

    repair(model, TOKENS, plan, on_layer=look)
    assert present == [[i] for i in range(1, 6)]


def quantised():
    model = fresh()
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    return model


def offloaded():
    model = fresh()
    model.model.layers[2].to("meta")
    return model


@pytest.mark.parametrize(
    ("model", "tokens", "plan", "message"),
    [
        (fresh, TOKENS[:1], PLAN, "2 samples at least"),
        (fresh, TOKENS[:2, :8], PLAN, "inputs take as many tokens at least, but only"),
        (fresh, TOKENS, DropPlan((0, 1, 2), (0, 1, 2)), "Nothing is kept"),
        (fresh, TOKENS, DropPlan((7,)), "has 3 layers"),
        (quantised, TOKENS, PLAN, "quantised"),
        (offloaded, TOKENS, PLAN, "not in memory"),
    ],
)
def test_what_cannot_be_repaired(model, tokens, plan, message):
    model = model()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.is_meta}
    with pytest.raises(LLMDropError, match=message):
        repair(model, tokens, plan)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


def test_a_sample_that_a_model_cannot_read():
    """Only the last batch holds the token; the error says where the numbers begin, as that of a measurement does."""
    model, dense = fresh(), pristine("llama")
    model.model.embed_tokens.weight.data[96] = torch.inf
    tokens = TOKENS.clamp(max=95)
    tokens[-1, 3] = 96
    with pytest.raises(LLMDropError, match="The embedding gives values that are not finite in torch.float32"):
        repair(model, tokens, PLAN)
    assert changed(model, dense) == {"model.embed_tokens.weight"}


def test_a_last_layer_that_gives_what_is_not_finite():
    """What experts of one tensor give at the end enters no statistics, and the token is in the third batch alone."""
    model = fresh("qwen3-moe")
    model.model.embed_tokens.weight.data[96] = 1e3 * torch.eye(model.config.hidden_size)[0]
    dense, tokens = copy.deepcopy(model), TOKENS.clamp(max=95)
    tokens[(~held_out_of(len(tokens), 8, 0)).nonzero()[8], 3] = 96

    def overflow(module, args, output):
        normed = args[0] / args[0].norm(dim=-1, keepdim=True)
        return output.masked_fill(normed[..., :1] > 0.99, torch.inf)

    model.model.layers[-1].mlp.register_forward_hook(overflow)
    with pytest.raises(LLMDropError, match="layer 2"):
        repair(model, tokens, PLAN)
    assert not changed(model, dense)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [7]}, "no layer 7 to refit: this model has 3"),
        ({"layers": [-1]}, "index of a layer to refit must be 0 or more"),
        ({"layers": [2.0]}, "index of a layer to refit must be a whole number"),
        ({"layers": ["a"]}, "index of a layer to refit must be a whole number"),
        ({"layers": 2}, "must be a list of their indices, but is 2"),
        ({"layers": "2"}, "must be a list of their indices, but is '2'"),
        ({"reference": "a name"}, "Expected a model, found str"),
        ({"batch_size": 2.5}, "batch size must be a whole number"),
    ],
)
def test_what_is_no_argument(given, message):
    with pytest.raises(LLMDropError, match=message):
        repair(fresh(), TOKENS, PLAN, **given)


def test_a_model_that_is_dropped_already_shows_no_dense_model():
    model = fresh()
    with dropped(model, PLAN), pytest.raises(LLMDropError, match="attention of layer 1 is dropped already"):
        repair(model, TOKENS, PLAN)


def test_batches_that_were_halved_for_the_reference_alone(monkeypatch):
    model, reference, read = fresh(), fresh(), repair_module.read_apart

    def halved(of, tokens, batch_size, **more):
        return read(of, tokens, batch_size // 2 if of is reference else batch_size, **more)

    monkeypatch.setattr(repair_module, "read_apart", halved)
    with pytest.raises(LLMDropError, match="Out of GPU memory with 40 samples of 24 tokens in batches of 4"):
        repair(model, TOKENS, PLAN, reference=reference)
    assert not changed(model, pristine("llama"))


def test_a_reference_of_another_size():
    with pytest.raises(LLMDropError, match="not of the same family and sizes"):
        repair(fresh(), TOKENS, PLAN, reference=families.tiny("llama", num_hidden_layers=2))


@pytest.mark.parametrize(
    "settings",
    [
        *({"ridges": ridges} for ridges in ((), (-1,), (10**400,), (True,), (np.True_,), "1", (b"1",), None)),
        *({"held_out": 1}, {"sweeps": 0}, {"sweeps": 10**5000}, {"seed": -1}, {"seed": 2**70}),
    ],
)
def test_settings_that_are_none(settings):
    with pytest.raises(LLMDropError):
        Repair(**settings)


def test_the_recipe_says_what_determines_the_result():
    recipe = describe_repair(fresh(), TOKENS, PLAN, Repair())
    assert recipe["plan"] == {"attention": [1], "mlp": []}
    assert recipe != describe_repair(fresh(), TOKENS[:20], PLAN, Repair())
    assert recipe != describe_repair(fresh(), TOKENS, PLAN, Repair(sweeps=2))


# ---- the search ---------------------------------------------------------------------------------------------------------


def left_after(name, layer):
    """The search's first step by other means: drop a layer, repair around it with `repair`, and compare whole models."""
    model, dense, plan = fresh(name), pristine(name), DropPlan((layer,))
    judged = held_out_of(len(TOKENS), ONE_JUDGES, seed=0)
    window = [index for index in range(layer - BEFORE, layer + AFTER + 1) if 0 <= index < 3]
    repair(model, TOKENS[~judged], plan, Repair(ridges=RIDGES, held_out=HELD_OUT), reference=dense, layers=window)
    return divergence(dense, model, plan, TOKENS[judged])


@pytest.mark.parametrize("name", families.CASES)
def test_the_search_takes_what_a_repair_mends_best(name):
    """Of every family: some give their hidden states in a tuple."""
    model, steps = fresh(name), []
    plan = select_with_repair(model, TOKENS, "attention", 1, on_step=lambda *step: steps.append(step))
    costs = [left_after(name, layer) for layer in range(3)]
    assert steps == [(plan.attention, (pytest.approx(min(costs), rel=1e-3, abs=1e-6),))]
    assert costs[plan.attention[0]] == pytest.approx(min(costs), rel=1e-3, abs=1e-6)
    assert not changed(model, pristine(name))


def left_after_all(model, layers):
    """As `left_after`, of layers that are dropped one after the other."""
    repaired, judged = copy.deepcopy(model), held_out_of(len(TOKENS), ONE_JUDGES, seed=0)
    for n, layer in enumerate(layers, 1):
        window = [index for index in range(layer - BEFORE, layer + AFTER + 1) if 0 <= index < len(model.model.layers)]
        settings = Repair(ridges=RIDGES, held_out=HELD_OUT)
        repair(repaired, TOKENS[~judged], DropPlan(layers[:n]), settings, reference=model, layers=window)
    return divergence(model, repaired, DropPlan(layers), TOKENS[judged])


def searched(model, n_drop, candidates, beam, swaps):
    """The search by other means: what is left after each choice that it looks at, and the best last one."""
    left, paths = {}, {(): dict.fromkeys(range(len(model.model.layers)), 0.0)}  # costs of the layers that may go next
    for step in range(n_drop):
        found = {}
        for layers, costs in paths.items():
            for layer in sorted(costs, key=costs.get)[: candidates if step else None]:
                left[(*layers, layer)] = costs[layer] = left_after_all(model, (*layers, layer))
                found[(*layers, layer)] = costs
        sets, paths = [], {}
        for layers in sorted(found, key=left.get):
            if {*layers} not in sets and len(sets) < beam:
                sets.append({*layers})
                paths[layers] = {layer: cost for layer, cost in found[layers].items() if layer not in layers}
    best, costs = next(iter(paths.items()))
    for _ in range(swaps):
        for layer in best:
            others = tuple(each for each in best if each != layer)
            for n in range(best.index(layer) + 1, len(best)):  # dropped anew
                left[others[:n]] = left_after_all(model, others[:n])
            tried = {}
            for other in [*sorted(costs, key=costs.get)[:candidates], layer]:
                left[(*others, other)] = tried[other] = left_after_all(model, (*others, other))
            least = min(tried, key=tried.get)
            if least != layer and tried[least] < left[best]:
                best, costs = (*others, least), {each: cost for each, cost in (costs | tried).items() if each != least}
    return left, best


def drawn_model(seed, n_layers):
    torch.manual_seed(seed)
    model = copy.deepcopy(families.tiny("llama", num_hidden_layers=n_layers))
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data = 0.15 * torch.randn_like(weight)
    return model


@pytest.mark.parametrize(
    ("seed", "n_layers", "n_drop", "candidates", "beam", "swaps"),
    [
        (11, 5, 2, 5, 5, 0),
        (11, 5, 3, 3, 2, 0),
        (11, 5, 3, 2, 1, 0),
        (9, 7, 3, 4, 1, 2),
        (9, 7, 3, 2, 2, 1),
        (11, 4, 4, 1, 1, 1),
    ],
)
def test_what_the_search_looks_at(seed, n_layers, n_drop, candidates, beam, swaps, monkeypatch):
    model, steps, seen = drawn_model(seed, n_layers), [], {}
    left, best = searched(model, n_drop, candidates, beam, swaps)
    extend = search._Search.extend

    def watch(*given):
        for path in extend(*given):
            seen[path.layers] = path.left[-1]
            yield path

    monkeypatch.setattr(search._Search, "extend", watch)
    plan = select_with_repair(
        model, TOKENS, "attention", n_drop, candidates, beam=beam, swaps=swaps, on_step=lambda *step: steps.append(step)
    )
    assert seen == pytest.approx(left, rel=1e-4)
    assert plan.attention == best
    assert [len(layers) for layers, _ in steps[:n_drop]] == [*range(1, n_drop + 1)]
    assert all(len(layers) == n_drop for layers, _ in steps[n_drop:])
    assert steps[-1] == (best, tuple(seen[best[:n]] for n in range(1, n_drop + 1)))


def test_a_beam_finds_what_a_greedy_search_misses():
    model = drawn_model(11, 4)
    greedy, wide = (select_with_repair(model, TOKENS, "attention", 2, beam=beam).attention for beam in (1, 4))
    assert left_after_all(model, greedy) > 1.01 * left_after_all(model, wide)


def test_after_swaps_no_other_layer_in_the_place_of_one_leaves_less():
    model, steps = drawn_model(9, 7), []
    plan = select_with_repair(model, TOKENS, "attention", 3, candidates=7, swaps=9, on_step=lambda *step: steps.append(step))
    ends = [steps[n][0] for n in range(2, len(steps), 3)]  # of the steps, and of each round
    assert len({*ends}) == len(ends) - 1 > 1
    assert ends[-1] == ends[-2] == plan.attention
    least = left_after_all(model, plan.attention)
    assert least < 0.99 * left_after_all(model, steps[2][0])
    for layer in plan.attention:
        kept = tuple(each for each in plan.attention if each != layer)
        of_each = {each: left_after_all(model, (*kept, each)) for each in range(7) if each not in kept}
        assert min(of_each.values()) > 0.9999 * min(least, of_each[layer])


def test_tokens_that_a_model_rules_out():
    """A logit of -inf in both models adds nothing to the divergence."""
    model = fresh()
    mask = torch.zeros(97)
    mask[50] = -torch.inf
    model.lm_head.register_forward_hook(lambda module, args, output: output + mask)
    steps = []
    select_with_repair(model, TOKENS, "attention", 1, on_step=lambda layers, left: steps.append(left[0]))
    assert 0 < steps[0] < 10


def test_plans_of_the_search_are_nested():
    plans = [select_with_repair(fresh(), TOKENS, "attention", n) for n in (1, 2, 3)]
    assert [plan.attention for plan in plans] == [plans[2].attention[:n] for n in (1, 2, 3)]


@pytest.mark.parametrize("wrong", [-1, 2.5, "x", True])
@pytest.mark.parametrize(("setting", "name"), [("batch_size", "batch size"), ("beam", "beam"), ("swaps", "number of swaps")])
def test_settings_of_the_search_that_are_no_whole_numbers(setting, name, wrong):
    with pytest.raises(LLMDropError, match=f"The {name} must be"):
        select_with_repair(fresh(), TOKENS, "attention", 1, **{setting: wrong})


@pytest.mark.parametrize("setting", ["batch_size", "beam", "candidates"])
def test_a_search_over_nothing(setting):
    with pytest.raises(LLMDropError, match="must be"):
        select_with_repair(fresh(), TOKENS, "attention", 1, **{setting: 0})


def test_swaps_in_a_search_that_drops_nothing():
    assert select_with_repair(fresh(), TOKENS, "attention", 0, swaps=2).attention == ()


def test_the_search_of_too_few_samples():
    with pytest.raises(LLMDropError, match="4 samples at least"):
        select_with_repair(fresh(), TOKENS[:3], "attention", 1)
