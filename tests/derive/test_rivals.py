"""Published rivals of our repair equal straightforward evaluations of their formulas, on activations recorded independently."""

import copy

import accelerate
import families
import numpy as np
import pytest
import scipy.linalg
import torch
from derive import changing
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmdrop_utils import DropPlan, LinearMap, LLMDropError, drop, dropped, find_anatomy
from llmdrop_utils.derive import folds, nbl, rivals
from llmdrop_utils.derive.folds import fold_scaling, fold_transform, rescale, rotation
from llmdrop_utils.derive.nbl import canonical_correlation_bound, fit_maps
from llmdrop_utils.measure.text import score_text

TOKENS = torch.randint(3, 97, (7, 20), generator=torch.Generator().manual_seed(3))
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "granite-moe", "deepseek-v2", "deepseek-v3", "gpt-oss"]
NORMS_AFTER = ["gemma2", "gemma3", "olmo2", "olmo3"]
PARALLEL = [name for name, case in families.CASES.items() if case.parallel]
POST_NORM = [name for name, case in families.CASES.items() if case.norms]
SCALED = [name for name in families.CASES if name not in (*MIXTURES, *NORMS_AFTER, *POST_NORM)]
FOLDED = [name for name in SCALED if name not in PARALLEL]


def fresh(name="llama", dtype=torch.float64):
    return changing.fresh(name, dtype)


def blocks_of(model):
    return [layer.block for layer in find_anatomy(model).layers]


def bits(model):
    return {name: getattr(tensor, "qdata", tensor).clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ---- the reference: hooks on whole forward passes, and output projections set to zero ------------------------------------


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def record(model, tokens, module):
    """What a module reads and gives in a forward pass of the whole model: float64 (B, T, d) each."""
    seen = {}

    def before(module, args, kwargs):
        seen["input"] = (args[0] if args else kwargs["hidden_states"]).clone().double()

    def after(module, args, output):
        seen["output"] = first_of(output).clone().double()

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return seen["input"], seen["output"]


def streams(name, model, index, tokens=TOKENS):
    """The stream before a layer, after its attention, and after its MLP: float64 (B, T, d) each."""
    without_mlp = copy.deepcopy(model)
    families.silence(name, without_mlp, [], [index])
    before, end = record(model, tokens, blocks_of(model)[index])
    return before, record(without_mlp, tokens, blocks_of(without_mlp)[index])[1], end


def flat(tensor):
    return tensor.flatten(0, 1).numpy()


def unit_of(name, model, index, kind="attention"):
    return blocks_of(model)[index].get_submodule(families.CASES[name].modules[kind])


def projection_of(name, model, index, kind="mlp"):
    found = [
        module
        for module_name, module in blocks_of(model)[index].named_modules()
        if getattr(families.CASES[name], kind) in f"{module_name}.weight" and isinstance(module, nn.Linear | Conv1D)
    ]
    return found[0]


def rows_of(module):
    weight = module.weight.detach().double().numpy()
    return weight.T if isinstance(module, Conv1D) else weight


# ---- NBL ----------------------------------------------------------------------------------------------------------------


def least_squares(x, y):
    """W and b of the least squares, with intercept; inputs that vary by rounding errors alone explain nothing."""
    weight = np.linalg.lstsq(x - x.mean(0), y, rcond=1e-5)[0].T
    return weight, y.mean(0) - weight @ x.mean(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "olmo2", "qwen3"])
def test_maps_equal_least_squares_with_intercept(name, dtype):
    """In bfloat16, activations are rounded, but nothing of what is made of them."""
    model = fresh(name, dtype)
    batch_size = 3 if dtype == torch.float64 else 7  # bfloat16 kernels may depend on it
    plan = fit_maps(model, TOKENS, DropPlan((2, 0), n_layers=3, scores="abc"), batch_size=batch_size, ridge=0)
    assert (plan.attention, plan.n_layers, plan.scores, [entry[1] for entry in plan.maps]) == ((2, 0), 3, "abc", [0, 2])
    for index in (0, 2):
        x, y = (flat(each) for each in record(model, TOKENS, unit_of(name, model, index)))
        weight, bias = least_squares(x, y)
        linear = plan.map_of("attention", index)
        np.testing.assert_allclose(linear.weight, weight, rtol=1e-4, atol=1e-5 * abs(weight).max())
        np.testing.assert_allclose(linear.bias, bias, rtol=1e-4, atol=1e-5 * abs(weight).max())


@pytest.mark.parametrize("name", families.CASES)
def test_maps_of_every_family_give_what_least_squares_gives(name):
    """Behind a LayerNorm, inputs are no full-rank system, so that only what the map gives is determined."""
    model = fresh(name, torch.float32)
    x, y = (flat(each) for each in record(model, TOKENS, unit_of(name, model, 1)))
    weight, bias = least_squares(x, y)
    linear = fit_maps(model, TOKENS, DropPlan((1,))).map_of("attention", 1)
    given = x @ linear.weight.double().numpy().T + linear.bias.double().numpy()
    np.testing.assert_allclose(given, x @ weight.T + bias, atol=2e-3 * abs(y).max())


def test_inputs_that_vary_little_around_a_large_mean():
    """Float32 holds seven digits: sums of squares of 1e3 would leave nothing of a variance of 1e-4."""
    sums, generator = nbl._Covariance(), torch.Generator().manual_seed(0)
    x = 1e3 + 1e-2 * torch.randn(500, 3, generator=generator)
    y = torch.randn(500, 3, generator=generator)
    for part in (slice(0, 200), slice(200, 500)):
        sums.add(x[part], y[part])
    rows = np.hstack([x.double(), y.double()])
    mean, covariance = sums.result()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6)


LINEAR = ["llama", "gemma2", "olmo2", "granite", "gpt2", "phi", "falcon-7b", "falcon-40b", "cohere", "opt", "gpt-j", "mixtral"]


@pytest.mark.parametrize("name", LINEAR)
def test_attention_that_is_linear_is_recovered(name):
    """A single token attends to itself alone, so that attention is its values' map followed by the output's."""
    model, tokens = fresh(name, torch.float32), torch.arange(3, 97)[:, None]
    plan = fit_maps(model, tokens, DropPlan((0, 1, 2)), batch_size=40)
    with torch.no_grad():
        dense = model(input_ids=tokens).logits
        with dropped(model, plan):
            mapped = model(input_ids=tokens).logits
        with dropped(model, DropPlan((0, 1, 2))):
            plain = model(input_ids=tokens).logits
    spread = float(dense.std())
    assert float((mapped - dense).abs().max()) < 0.02 * spread < 0.2 * float((plain - dense).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_model_is_nearer_to_the_dense_one_than_a_plain_one(dtype):
    model, plan = fresh(dtype=dtype), DropPlan((0, 2))
    before = bits(model)
    plans = (DropPlan(), plan, fit_maps(model, TOKENS, plan))
    _, plain, mapped = score_text(model, TOKENS, plans).kl.mean(1)
    assert mapped < 0.7 * plain
    assert (changed(model, before), model.training, hooks_of(model)) == (set(), False, 0)


def test_maps_that_a_plan_has_stay():
    given = {("attention", 2): LinearMap(torch.eye(32)), ("mlp", 0): LinearMap(torch.eye(32))}
    plan = fit_maps(fresh(), TOKENS, DropPlan((2, 1), (0,), maps=given))
    assert [(kind, index) for kind, index, _ in plan.maps] == [("attention", 1), ("attention", 2), ("mlp", 0)]
    assert (plan.map_of("attention", 2), plan.map_of("mlp", 0)) == tuple(given.values())
    nothing = DropPlan((), (1,))
    assert fit_maps(fresh(), TOKENS, nothing) == nothing


def correlations(x, y):
    """Of the two column spaces, centred, from their orthonormal bases: no covariance is formed."""
    bases = []
    for part in (x - x.mean(0), y - y.mean(0)):
        left, values, _ = np.linalg.svd(part / np.where(part.std(0) > 0, part.std(0), 1), full_matrices=False)
        bases.append(left[:, values > 1e-7 * values[0]])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def bound(x, y):
    rho = correlations(flat(x), flat(y))
    return x.shape[-1] - len(rho) + (1 - rho**2).sum()


@pytest.mark.parametrize(
    "name", ["llama", "granite", "gemma2", "olmo2", "gpt2", "opt", "phi", "falcon-7b", "falcon-rw", "cohere"]
)
def test_the_bound_equals_a_direct_evaluation(name):
    model = fresh(name)
    found = {kind: canonical_correlation_bound(model, TOKENS, kind, batch_size=3) for kind in ("attention", "mlp")}
    for index in range(3):
        before, between, end = streams(name, model, index)
        read, written = (before, before + end - between) if name in PARALLEL else (between, end)
        assert found["attention"][index] == pytest.approx(bound(before, between), rel=1e-6)
        assert found["mlp"][index] == pytest.approx(bound(read, written), rel=1e-6)
    assert found["attention"].dtype == np.float64
    assert found["attention"].min() > 0.1
    assert (model.training, hooks_of(model)) == (False, 0)


def test_directions_that_do_not_vary_count_as_lost():
    model = fresh()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 0.25
        model.model.layers[0].self_attn.o_proj.weight[5] = 0
    before, between, _ = streams("llama", model, 0)
    rho = correlations(flat(before), flat(between))
    assert len(rho) == 31
    assert canonical_correlation_bound(model, TOKENS)[0] == pytest.approx(1 + (1 - rho**2).sum(), rel=1e-6)


def test_attention_that_adds_nothing_has_a_bound_of_zero():
    model = fresh()
    families.silence("llama", model, [1], [])
    assert canonical_correlation_bound(model, TOKENS)[1] == pytest.approx(0, abs=1e-9)


def test_the_bound_in_float32_with_a_channel_that_is_far_larger():
    model = fresh()
    model.model.embed_tokens.weight.data[:, 3] *= 1e3
    exact = canonical_correlation_bound(model, TOKENS)
    np.testing.assert_allclose(canonical_correlation_bound(model.float(), TOKENS), exact, rtol=1e-3)


# ---- ReplaceMe ----------------------------------------------------------------------------------------------------------


def check_folded(name, model, mlp, folded, added, target):
    """The MLP's projection was multiplied by the transform that takes `added` to `target` (B, T, d)."""
    transform = np.linalg.lstsq(flat(added), flat(target), rcond=None)[0]
    old, new = (projection_of(name, each, mlp) for each in (model, folded))
    expected = transform.T @ rows_of(old)
    np.testing.assert_allclose(rows_of(new), expected, atol=1e-6 * abs(expected).max())
    if old.bias is not None:
        bias = transform.T @ old.bias.detach().numpy()
        np.testing.assert_allclose(new.bias.detach(), bias, atol=1e-6 * abs(expected).max())


def names_of(name, model, *mlps):
    modules = {projection_of(name, model, mlp) for mlp in mlps}
    return {
        f"{module_name}.{part}"
        for module_name, module in model.named_modules()
        if module in modules
        for part, weight in module.named_parameters()
    }


@pytest.mark.parametrize("name", FOLDED)
def test_a_fold_equals_least_squares(name):
    model = fresh(name)
    folded, states = copy.deepcopy(model).train(), [streams(name, model, index) for index in range(3)]
    fold_transform(folded, TOKENS, DropPlan((2, 1)), batch_size=3, ridge=0)
    for mlp in (0, 1):
        _, between, end = states[mlp]  # Y, and Y + M
        check_folded(name, model, mlp, folded, end - between, states[mlp + 1][1] - between)  # L - Y
    assert changed(folded, bits(model)) == names_of(name, model, 0, 1)
    assert (folded.training, hooks_of(folded)) == (True, 0)


def test_the_folded_stream_is_the_nearest_to_the_dense_one():
    model = fresh()
    folded, target = copy.deepcopy(model), streams("llama", model, 1)[1]
    _, between, end = streams("llama", model, 0)
    fold_transform(folded, TOKENS, DropPlan((1,)), ridge=0)
    lacks = [float((record(each, TOKENS, blocks_of(each)[0])[1] - target).square().sum()) for each in (model, folded)]
    residual = np.linalg.lstsq(flat(end - between), flat(target - between), rcond=None)[1].sum()
    assert lacks[1] == pytest.approx(residual, rel=1e-6)
    assert lacks[1] < 0.95 * lacks[0]


def test_one_mlp_makes_up_for_a_run_without_mlps():
    name, model = "llama", fresh()
    first, second, third = (streams(name, model, index) for index in range(3))
    added = first[2] - first[1]
    for plan, target in (
        (DropPlan((1, 2), (1,)), third[1] - first[1]),  # up to the attention of layer 2
        (DropPlan((1,), (1,)), second[2] - first[1]),  # the whole block of layer 1
        (DropPlan((2,), (1,)), added + second[2] - second[1] + third[1] - third[0]),  # the attention of layer 1 stays
    ):
        folded = copy.deepcopy(model)
        fold_transform(folded, TOKENS, plan, ridge=0)
        check_folded(name, model, 0, folded, added, target)
        assert changed(folded, bits(model)) == names_of(name, model, 0)


@pytest.mark.parametrize("plan", [DropPlan(), DropPlan((0,)), DropPlan((0, 1), (0,)), DropPlan((), (1,))])
def test_nothing_is_folded_where_no_kept_mlp_precedes_dropped_attention(plan):
    model = fresh()
    before = bits(model)
    fold_transform(model, TOKENS, plan)
    assert changed(model, before) == set()


def test_a_fold_rounds_once(monkeypatch):
    model, transforms, solve = fresh(dtype=torch.bfloat16), [], folds.solve
    before = copy.deepcopy(model)
    monkeypatch.setattr(folds, "solve", lambda *args: transforms.append(solve(*args)) or transforms[-1])
    fold_transform(model, TOKENS, DropPlan((1,)))
    expected = transforms[0].T @ before.model.layers[0].mlp.down_proj.weight.double()
    assert transforms[0].dtype == torch.float64
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected.bfloat16())


def test_statistics_that_are_singular_without_a_ridge():
    model = fresh()
    model.model.layers[0].mlp.down_proj.weight.data[7] = 0
    before = bits(model)
    with pytest.raises(LLMDropError, match="singular at a ridge of 0"):
        fold_transform(model, TOKENS, DropPlan((2, 1)), ridge=0)
    assert changed(model, before) == set()
    fold_transform(model, TOKENS, DropPlan((2, 1)))
    assert changed(model, before) == names_of("llama", model, 0, 1)


# ---- LinearPatch --------------------------------------------------------------------------------------------------------


def test_a_rotation_is_orthogonal_and_spreads_each_channel():
    for n in (1, 2, 8, 12, 576, 7):
        turn = rotation(n)
        torch.testing.assert_close(turn @ turn.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    half = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    torch.testing.assert_close(rotation(4), half)
    assert float(rotation(12).abs().max()) < 0.5


@pytest.mark.parametrize("name", FOLDED)
def test_a_scaling_aligns_the_magnitudes_of_rotated_channels(name):
    model = fresh(name)
    folded, states = copy.deepcopy(model).train(), [streams(name, model, index) for index in range(3)]
    fold_scaling(folded, TOKENS, DropPlan((2, 1)), batch_size=3)
    for mlp in (0, 1):
        _, between, end = states[mlp]
        turn = scipy.linalg.hadamard(32) / np.sqrt(32)
        before, now = (np.abs(part.numpy() @ turn).mean(1) for part in (end - between, states[mlp + 1][1] - between))
        scale = turn @ np.diag((now / before).mean(0)) @ turn.T
        old, new = (projection_of(name, each, mlp) for each in (model, folded))
        expected = scale @ rows_of(old)
        np.testing.assert_allclose(rows_of(new), expected, atol=1e-6 * abs(expected).max())
    assert changed(folded, bits(model)) == names_of(name, model, 0, 1)
    assert (folded.training, hooks_of(folded)) == (True, 0)


def test_nothing_is_scaled_if_what_is_dropped_adds_nothing():
    model = fresh()
    families.silence("llama", model, [1], [])
    before = copy.deepcopy(model)
    fold_scaling(model, TOKENS, DropPlan((1,)))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before.get_parameter(name))


def test_an_mlp_that_adds_nothing_in_some_direction():
    model = fresh()
    model.model.layers[0].mlp.down_proj.weight.data[:] = 0
    refused(fold_scaling, model, "The MLP of layer 0 adds nothing in some direction")


# ---- Prune&Comp ---------------------------------------------------------------------------------------------------------


def without_epsilon(model):
    """A norm's output depends on its input's scale by its epsilon alone."""
    for module in model.modules():
        for attribute in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 1e-30)
    return model


def alphas_of(name, model, plan):
    """(kind, layer) -> alpha, by loops over tokens."""
    alphas = {}
    for index in {*plan.attention, *plan.mlp}:
        states = [each.numpy() for each in streams(name, model, index)]
        for kind, x, y in zip(("attention", "mlp"), states[:2], states[1:], strict=True):
            ratios = [np.sqrt((v**2).sum() / (u**2).sum()) for u, v in zip(flat_rows(x), flat_rows(y), strict=True)]
            alphas[kind, index] = np.mean(ratios)
    return alphas


def flat_rows(x):
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
def logits_with_the_stream_multiplied(model, plan, alphas):
    """Hooks multiply all that is written before a cut: at the layer's input for attention, at its output for an MLP."""

    def before(alpha):
        def hook(module, args, kwargs):
            if args:
                return (alpha * args[0], *args[1:]), kwargs
            return args, kwargs | {"hidden_states": alpha * kwargs["hidden_states"]}

        return hook

    def after(alpha):
        return lambda module, args, output: (alpha * output[0], *output[1:]) if isinstance(output, tuple) else alpha * output

    blocks, handles = blocks_of(model), []
    for index in plan.attention:
        handles.append(blocks[index].register_forward_pre_hook(before(alphas["attention", index]), with_kwargs=True))
    for index in plan.mlp:
        handles.append(blocks[index].register_forward_hook(after(alphas["mlp", index])))
    with dropped(model, plan):
        logits = model(input_ids=TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits


@torch.no_grad()
def logits_of(model, plan):
    with dropped(model, plan):
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", SCALED)
def test_a_rescaled_model_is_that_whose_stream_is_multiplied_before_each_cut(name):
    for plan in (DropPlan((1,)), DropPlan((2, 0)), DropPlan((0, 1), (1,))):
        model = without_epsilon(fresh(name))
        expected = logits_with_the_stream_multiplied(model, plan, alphas_of(name, model, plan))
        plain = logits_of(model, plan)
        rescale(model, TOKENS, plan, batch_size=3)
        allowed = 1e-2 if name == "olmo" else 1e-4  # most norms are in float32; OLMo's epsilon is no attribute
        torch.testing.assert_close(logits_of(model, plan), expected, rtol=allowed, atol=allowed)
        assert float((plain - expected).abs().max()) > 0.05


def test_what_is_written_after_a_cut_is_divided_and_nothing_else():
    model = fresh("gpt2", torch.bfloat16).train()  # with biases, and an embedding that the LM head shares
    dense = copy.deepcopy(model).eval()
    rescale(model, TOKENS, DropPlan((1,)))
    alpha = alphas_of("gpt2", dense.double(), DropPlan((1,)))["attention", 1]
    after = [(1, "mlp"), (2, "attention"), (2, "mlp")]
    expected = {f"transformer.h.{i}.{'attn' if kind == 'attention' else 'mlp'}.c_proj" for i, kind in after}
    assert changed(model, bits(dense.bfloat16())) == {f"{name}.{part}" for name in expected for part in ("weight", "bias")}
    for name in expected:
        old, new = (each.get_submodule(name) for each in (dense, model))
        torch.testing.assert_close(new.weight.double(), old.weight.double() / alpha, rtol=2**-8, atol=0)
        torch.testing.assert_close(new.bias.double(), old.bias.double() / alpha, rtol=2**-8, atol=0)
    assert (model.training, hooks_of(model)) == (True, 0)


def test_tokens_whose_stream_is_zero_do_not_count():
    model, plan, padded = fresh(), DropPlan((0,)), TOKENS.clone()
    model.model.embed_tokens.weight.data[0] = 0
    expected = copy.deepcopy(model)
    padded[:, -3:] = 0  # nothing before it sees a later token
    rescale(model, padded, plan)
    rescale(expected, TOKENS[:, :-3], plan)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(name))


def test_magnitudes_of_a_model_in_bfloat16_are_not_rounded(monkeypatch):
    model, factors = fresh(dtype=torch.bfloat16), {}
    monkeypatch.setattr(folds, "multiply", factors.update)
    rescale(model, TOKENS, DropPlan((1,)), batch_size=7)
    x, a = record(model, TOKENS, blocks_of(model)[1])[0], record(model, TOKENS, unit_of("llama", model, 1))[1]
    alpha = float(((x + a).norm(dim=-1) / x.norm(dim=-1)).mean())
    assert list(factors.values()) == pytest.approx(3 * [1 / alpha], rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("plan", [DropPlan(), DropPlan((), (2,)), DropPlan((2,), (2,))])
def test_nothing_is_scaled_where_nothing_is_written_after_a_cut(name, plan):
    model = fresh(name, torch.float32)
    before = bits(model)
    rescale(model, TOKENS, plan)
    assert changed(model, before) == set()


def test_a_stream_that_is_zero():
    model = fresh()
    model.model.embed_tokens.weight.data[:] = 0
    with pytest.raises(LLMDropError, match="At layer 0 the stream is zero before or after what is dropped"):
        rescale(model, TOKENS, DropPlan((0,)))


# ---- what is refused ----------------------------------------------------------------------------------------------------

PLAN = DropPlan((1,))
CHANGE = [fold_transform, fold_scaling, rescale]
FOLDS = [fold_transform, fold_scaling]
PLANNED = [fit_maps, *CHANGE]


def refused(work, model, match, plan=PLAN, tokens=TOKENS, **how):
    """One clear error, and a model that is as it was, hooks and mode included."""
    before, mode = {} if any(p.is_meta for p in model.parameters()) else bits(model), model.training
    hooks = hooks_of(model)
    with pytest.raises(LLMDropError, match=match):
        work(model, tokens, **({} if work is canonical_correlation_bound else {"plan": plan}), **how)
    assert (model.training, hooks_of(model)) == (mode, hooks)
    if before:
        assert changed(model, before) == set()


@pytest.fixture
def nothing_read(monkeypatch):
    """Errors come before any text is read."""

    def read(*args):
        raise AssertionError("text was read")

    monkeypatch.setattr(rivals, "read_streams", read)


@pytest.mark.parametrize("work", [*PLANNED, canonical_correlation_bound])
def test_input_that_cannot_be_used(work, nothing_read):
    refused(work, fresh(), "this model knows 0 to 96", tokens=TOKENS + 90)
    refused(work, fresh(), "The batch size must be 1 or more, but is 0", batch_size=0)
    short = drop(fresh(), DropPlan((), (2,)))
    refused(work, short, "is dropped already, so this is not the dense model. Give the whole model")
    if work in PLANNED:
        refused(work, fresh(), "holds layer 3, but this model has 3 layers", plan=DropPlan((3,)))
    if work not in (fold_scaling, rescale):
        refused(work, fresh(), "Statistics of 32 inputs take more tokens than that: 32 are too few", tokens=TOKENS[:2, :16])


@pytest.mark.parametrize("work", [fit_maps, fold_transform])
@pytest.mark.parametrize("ridge", [-0.1, float("nan"), float("inf"), True, "0.1"])
def test_ridges_that_are_none(work, ridge, nothing_read):
    refused(work, fresh(), f"The ridge must be a number from 0 up, such as 1e-05, but is {ridge!r}", ridge=ridge)


def test_kinds_and_magnitudes_that_are_none(nothing_read):
    refused(canonical_correlation_bound, fresh(), "must be 'attention' or 'mlp', but is 'block'", kind="block")


@pytest.mark.parametrize("work", CHANGE)
def test_plans_with_maps(work, nothing_read):
    plan = DropPlan((1,), maps={("attention", 1): LinearMap(torch.eye(32))})
    refused(work, fresh(), "has linear maps in dropped places", plan=plan)


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("work", FOLDS)
def test_parallel_families_are_not_folded(work, name, nothing_read):
    refused(work, fresh(name), "attention and MLP read the same stream")


@pytest.mark.parametrize("name", NORMS_AFTER)
@pytest.mark.parametrize("work", CHANGE)
def test_terms_that_pass_a_norm(work, name, nothing_read):
    refused(work, fresh(name), "The output of the MLP of layer . of this .* passes a norm before it is added")


@pytest.mark.parametrize("name", POST_NORM)
@pytest.mark.parametrize("work", CHANGE)
def test_norms_on_the_stream(work, name, nothing_read):
    refused(work, fresh(name), "Norms act on the stream itself in this opt model. Use `repair` or `fit_maps`")


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("work", CHANGE)
def test_experts(work, name, nothing_read):
    plan = DropPlan((2,), (2,)) if work in FOLDS else DropPlan((1,))  # both would change the MLP of layer 1
    refused(work, fresh(name, torch.float32), "The MLP of layer 1 of this .* model has experts", plan=plan)


def test_a_dense_mlp_before_experts_is_folded():
    model = fresh("deepseek-v3", torch.float32)  # the first layer alone is dense
    before = bits(model)
    fold_transform(model, TOKENS, DropPlan((1,)))
    assert changed(model, before) == {"model.layers.0.mlp.down_proj.weight"}


def test_a_model_without_a_final_norm(nothing_read):
    model = families.tiny("opt", _remove_final_layer_norm=True)
    refused(rescale, model, "This model has no final norm")


@pytest.mark.parametrize("work", CHANGE)
def test_weights_that_cannot_be_changed(work, tmp_path, nothing_read):
    from peft import LoraConfig, get_peft_model
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plan = DropPlan((1, 2))  # both methods change the MLP of layer 1
    model = fresh(dtype=torch.float32)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("layers.1.mlp.down_proj"))
    refused(work, model, "The weight of mlp.down_proj of layer 1 is quantised", plan=plan)
    model = get_peft_model(fresh(dtype=torch.float32), LoraConfig(target_modules=["down_proj"]))
    refused(work, model, "mlp.down_proj of layer . has an adapter", plan=plan)
    model = accelerate.disk_offload(fresh(dtype=torch.float32), tmp_path, execution_device=torch.device("cpu"))
    refused(work, model, r"of layer . is not in memory \(offloaded\)", plan=plan)


def test_maps_are_fitted_to_a_model_that_is_offloaded(tmp_path):
    plan = fit_maps(fresh(dtype=torch.float32), TOKENS, DropPlan((1,)))
    model = accelerate.disk_offload(fresh(dtype=torch.float32), tmp_path, execution_device=torch.device("cpu"))
    found = fit_maps(model, TOKENS, DropPlan((1,))).map_of("attention", 1)
    torch.testing.assert_close(found.weight, plan.map_of("attention", 1).weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("work", [*PLANNED, canonical_correlation_bound])
def test_numbers_that_are_not_finite(work):
    model = fresh(dtype=torch.float32).train()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    refused(work, model, "The MLP of layer 1 gives values that are not finite in torch.float32")


def test_an_error_while_text_is_read(monkeypatch):
    """The mode comes back, and nothing is changed."""

    def stop(*args):
        raise LLMDropError("stopped")

    monkeypatch.setattr(rivals, "advance", stop)
    for work in (*PLANNED, canonical_correlation_bound):
        refused(work, fresh().train(), "stopped")


def test_all_weights_are_changed_or_none():
    small, large = nn.Linear(2, 2).half(), nn.Linear(2, 2).half()
    large.weight.data[1, 1] = 6e4
    before = [bits(module) for module in (small, large)]
    with pytest.raises(LLMDropError, match="New weights are not finite in torch.float16"):
        rivals.multiply({small: 2.0, large: 2.0})
    assert [changed(module, old) for module, old in zip((small, large), before, strict=True)] == [set(), set()]
