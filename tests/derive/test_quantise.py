"""Quantised weights against rounding in float64, and quantised models against plain models with the same numbers."""

import copy
import sys

import encoder_decoder_families
import encoder_families
import families
import pytest
import torch
from dropping.reference import some_map
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llmdrop_utils import DropPlan, LLMDropError, drop, dropped, measure_importance, select
from llmdrop_utils.base.errors import NotAvailable
from llmdrop_utils.derive.model import save_derived
from llmdrop_utils.derive.quantise import quantise, quantised_bytes, round_weights
from llmdrop_utils.dropping import units
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.families import find_anatomy
from llmdrop_utils.models.load import load_located
from llmdrop_utils.models.locate import locate_folder

TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2))
PLAN = DropPlan((1, 0), (2,))
EXPERTS = {"mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "granite-moe", "deepseek-v2", "deepseek-v3", "gpt-oss"}
REFUSED = EXPERTS | {"gpt2"}

both = pytest.mark.parametrize("bits", [8, 4])


def tiny(name: str = "llama", **changes) -> nn.Module:
    """Always the same weights, in rows of 32 numbers or a multiple."""
    torch.manual_seed(0)
    return families.tiny(name, **{"intermediate_size": 64, "ffn_dim": 64} | changes)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of the layers, by name; in the families that are not refused, all of them are nn.Linear."""
    blocks = enumerate(layer.block for layer in find_anatomy(model).layers)
    return {f"{i}.{n}": m for i, block in blocks for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def nearest(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded in float64, with scales that are stored in the weight's dtype; and where no tie made it a matter of choice."""
    groups = weight.double().view(len(weight), -1, 32 if bits == 4 else weight.shape[1])
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    stored = scale.to(weight.dtype).double().clamp(min=1e-30)
    zero = -(2 ** (bits - 1)) - (low / scale).round()
    integers = ((groups / stored).round() + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    is_tie = lambda steps: ((steps - steps.floor()) - 0.5).abs() < 1e-4  # noqa: E731
    sure = ~(is_tie(low / scale) | is_tie(groups / stored))
    return (stored * (integers - zero)).view_as(weight).to(weight.dtype), sure.view_as(weight)


# ---- the numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "given", "rounded", "integers", "zeros", "scales"),
    [
        # Two groups. From -1.5 to 6: 15 steps of 0.5. From 0 (which a group always reaches) to 30: 15 steps of 2.
        (4, [-1.5, 6, 0.6, -0.24, 5.8], [-1.5, 6, 0.5, 0, 6], [-8, 7, -4, -5, 7], [-5, -8], [0.5, 2]),
        # One group, since a row has one scale. From -1 to 254: 255 steps of 1.
        (8, [-1, 254, 0.6, -0.4, 253.3], [-1, 254, 1, 0, 253], [-128, 127, -126, -127, 126], [-127], [1]),
    ],
)
def test_rows_computed_by_hand(bits, given, rounded, integers, zeros, scales):
    model = tiny()
    row = torch.tensor([*given, *[0] * 27, 30, 6.8, *[0] * 30], dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data[3] = row
    plain = round_weights(copy.deepcopy(model), bits).model.layers[1].mlp.down_proj.weight[3]
    stored = quantise(model, bits).model.layers[1].mlp.down_proj.weight
    second = [30, 6] if bits == 4 else [30, 7]
    assert plain.tolist() == [*rounded, *[0] * 27, *second, *[0] * 30]
    assert torch.equal(stored.dequantize()[3], plain)
    assert stored.qdata[3, :5].tolist() == integers
    assert (stored.zero_point[3].tolist(), stored.scale[3].tolist()) == (zeros, scales)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_linear_map_is_rounded_to_nearest_and_nothing_else(bits, dtype):
    model = tiny("qwen2", tie_word_embeddings=False).to(dtype)
    model.model.layers[0].mlp.up_proj.weight.data[2] = 0  # a group without a scale
    before = copy.deepcopy(model.state_dict())
    changed = {f"model.layers.{name}.weight" for name in linears(model)}
    zeros = quantise(copy.deepcopy(model), bits).model.layers[0].mlp.up_proj.weight
    assert torch.equal(zeros.qdata[2], zeros.zero_point[2].repeat_interleave(32 // zeros.zero_point.shape[1]))
    after = round_weights(model, bits).state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    for name in changed:
        expected, sure = nearest(before[name], bits)
        assert after[name].dtype == dtype
        assert sure.float().mean() > 0.9
        torch.testing.assert_close(after[name][sure], expected[sure], rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("name", sorted(set(families.CASES) - REFUSED))
def test_quantised_and_rounded_models_are_equal(name, bits):
    model = tiny(name)
    quantised, rounded = quantise(copy.deepcopy(model), bits), round_weights(copy.deepcopy(model), bits)
    close(logits(quantised), logits(rounded))
    found, plain = linears(quantised), linears(rounded)
    assert found.keys() == plain.keys()
    for key, linear in found.items():
        assert type(linear.weight).__name__ == "IntxUnpackedToInt8Tensor"
        assert torch.equal(linear.weight.dequantize(), plain[key].weight)
    assert type(quantised.get_input_embeddings().weight) is type(quantised.get_output_embeddings().weight) is nn.Parameter


@pytest.mark.parametrize("name", sorted(encoder_families.CASES))
def test_encoders(name):
    model, given = encoder_families.tiny(name), encoder_families.inputs(name)
    quantised, rounded = quantise(copy.deepcopy(model), 8), round_weights(copy.deepcopy(model), 8)
    assert changed(model, rounded) == weights_of_layers(model)
    close(encoder_families.read(quantised, given), encoder_families.read(rounded, given))
    assert not torch.equal(encoder_families.read(rounded, given), encoder_families.read(model, given))


@pytest.mark.parametrize("name", sorted(encoder_decoder_families.CASES))
def test_encoder_decoders(name):
    model = encoder_decoder_families.tiny(name)
    given = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, 5:]}
    quantised, rounded = quantise(copy.deepcopy(model), 8), round_weights(copy.deepcopy(model), 8)
    assert changed(model, rounded) == weights_of_layers(model)
    with torch.no_grad():
        close(quantised(**given).logits, rounded(**given).logits)
        assert not torch.equal(rounded(**given).logits, model(**given).logits)
    plain = sum(parameter.nbytes for parameter in model.parameters())
    saved = sum(3 * linear.weight.numel() - 5 * len(linear.weight) for linear in linears(model).values())
    assert quantised_bytes(model, 8) == plain - saved  # of 4 bytes 1; a scale and a zero point for each row


@pytest.mark.parametrize("name", ["t5", "umt5", "m2m_100"])
def test_encoder_decoders_are_stored_and_loaded_by_transformers(name, tmp_path):
    model = quantise(encoder_decoder_families.tiny(name), 8)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    given = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, 5:]}
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """Names of the weights that are not the same."""
    there = after.state_dict()
    return {name for name, weight in before.state_dict().items() if not torch.equal(weight, there[name])}


def weights_of_layers(model: nn.Module) -> set[str]:
    """Names of the weights of all linear maps in the layers."""
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(linear)]}.weight" for linear in linears(model).values()}


def test_errors_of_8_and_4_bits():
    model, error, norms = tiny(hidden_size=128, intermediate_size=256), {}, {}
    for bits in (8, 4):
        rounded = round_weights(copy.deepcopy(model), bits)
        error[bits] = float((logits(rounded) - logits(model)).norm() / logits(model).norm())
        pairs = [(a.weight, b.weight) for a, b in zip(linears(model).values(), linears(rounded).values(), strict=True)]
        norms[bits] = sum(float((a - b).square().sum()) for a, b in pairs)
    assert 0 < 8 * error[8] < error[4]
    assert 8**2 * norms[8] < norms[4] < 17**2 * norms[8]  # 17 times the step, which grows with the length of rows


@pytest.mark.parametrize(("bits", "smaller"), [(4, 0.85), (8, 0.93)])
def test_zero_points_make_errors_smaller(bits, smaller):
    """Than torchao's symmetric rounding, which has none: the numbers in the docstring of `_nearest`."""
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    model = tiny(hidden_size=512, num_hidden_layers=1)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    block = (1, 32 if bits == 4 else 512)
    without = IntxUnpackedToInt8Tensor.from_hp(weight, block, getattr(torch, f"int{bits}"), mapping_type=MappingType.SYMMETRIC)
    found = round_weights(model, bits).model.layers[0].self_attn.q_proj.weight
    assert float((found - weight).norm() / (without.dequantize() - weight).norm()) == pytest.approx(smaller, abs=0.01)


# ---- with dropping ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt-neox", "falcon-40b", "opt"])
def test_quantised_then_dropped_or_dropped_then_quantised(name, bits):
    model = tiny(name)
    reference = round_weights(copy.deepcopy(model), bits)
    families.silence(name, reference, PLAN.attention, PLAN.mlp)
    expected, whole = logits(reference), logits(round_weights(copy.deepcopy(model), bits))
    first = quantise(copy.deepcopy(model), bits)
    with dropped(first, PLAN):
        close(logits(first), expected)
    close(logits(first), whole)
    close(logits(drop(first, PLAN)), expected)
    last = quantise(drop(copy.deepcopy(model), PLAN), bits)
    assert torch.equal(logits(last), logits(first))


@both
def test_generation_with_a_cache(bits):
    model = tiny()
    reference = round_weights(copy.deepcopy(model), bits)
    families.silence("llama", reference, PLAN.attention, PLAN.mlp)
    ask = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = reference.generate(TOKENS, use_cache=False, **ask)
    with dropped(quantise(model, bits), PLAN) as quantised:
        found = quantised.generate(TOKENS, use_cache=True, return_dict_in_generate=True, **ask)
    assert found.sequences.tolist() == expected.tolist()
    assert [layer.keys is None for layer in found.past_key_values.layers] == [True, True, False]


@both
def test_maps_stay_as_they_are(bits):
    plan = DropPlan((1,), (2,), maps={("attention", 1): some_map(1), ("mlp", 2): some_map(2, bias=False)})
    model, rounded = tiny(), round_weights(tiny(), bits)
    with dropped(rounded, plan):
        expected = logits(rounded)
    with dropped(quantise(copy.deepcopy(model), bits), plan) as first:
        close(logits(first), expected)
    last = quantise(drop(model, plan), bits)
    assert torch.equal(last.model.layers[1].self_attn.weight, some_map(1).weight)
    close(logits(last), expected)


def test_importance_of_a_quantised_model():
    quantised, rounded = (measure_importance(change(tiny(), 4), TOKENS) for change in (quantise, round_weights))
    assert quantised.fingerprint == rounded.fingerprint


def test_what_holds_the_numbers_leaves_the_gpu(monkeypatch):
    """As if the CPU were a GPU; the test below is on a real one."""
    moves, model = [], quantise(tiny("qwen2"), 8)
    monkeypatch.setattr(units, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(units, "_move", lambda tensor, device: moves.append(tensor))
    attention, norm = model.model.layers[1].self_attn, model.model.layers[1].input_layernorm
    kept = [getattr(m.weight, n) for m in attention.children() for n in ("qdata", "scale", "zero_point")]
    kept += [m.bias for m in attention.children() if m.bias is not None] + [norm.weight]
    with dropped(model, DropPlan((1,))):
        assert {id(tensor) for tensor in moves} == {id(tensor) for tensor in kept}
    assert len(moves) == 2 * len(kept) == 2 * (3 * 4 + 3 + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
def test_on_a_gpu(bits):
    model = tiny(hidden_size=256, intermediate_size=4096).cuda()
    expected = round_weights(copy.deepcopy(model), bits)
    quantise(model, bits)
    ask = lambda one: one(TOKENS.cuda()).logits  # noqa: E731
    close(ask(model), ask(expected), 1e-3)
    families.silence("llama", expected, PLAN.attention, PLAN.mlp)
    gone, allocated = model.model.layers[2].mlp.up_proj.weight, torch.cuda.memory_allocated()
    with dropped(model, PLAN):
        assert gone.qdata.device.type == "cpu"
        assert allocated - torch.cuda.memory_allocated() >= 3 * 256 * 4096
        close(ask(model), ask(expected), 1e-3)
    assert gone.qdata.is_cuda


# ---- stored -------------------------------------------------------------------------------------------------------------


def test_bytes_computed_by_hand():
    model = tiny()
    # Each layer has maps of 32 x 32, 16 x 32 (twice), 32 x 32, 64 x 32 (twice) and 32 x 64: 9216 numbers in 256 rows, and two
    # norms of 32. Embedding and LM head have 97 x 32 numbers each, and the last norm 32.
    others = 3 * 64 + 2 * 97 * 32 + 32
    assert quantised_bytes(model, 8) == 3 * (9216 + 256 * 5) + 4 * others
    assert quantised_bytes(model, 4) == 3 * (9216 // 2 + 288 * 5) + 4 * others
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert quantised_bytes(half, 8) == 3 * (9216 + 256 * 3) + 2 * others
    assert quantised_bytes(half, 4) == 3 * (9216 // 2 + 288 * 3) + 2 * others
    assert quantised_bytes(tiny(tie_word_embeddings=True), 4) == quantised_bytes(model, 4) - 4 * 97 * 32
    with dropped(model, DropPlan((1,), (0,))):  # attention: 3072 numbers; MLP: 6144; and a norm of each
        assert quantised_bytes(model, 4) == 3 * 9216 // 2 - 9216 // 2 + (3 - 1) * 288 * 5 + 4 * (others - 64)
    with dropped(model, DropPlan((1,), maps={("attention", 1): some_map(1)})):  # 32 x 32 and a bias; the norm stays
        assert quantised_bytes(model, 8) == 3 * (9216 + 256 * 5) - (3072 + 96 * 5) + 4 * (others + 32 * 32 + 32)


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_8_bits_torchao_holds_as_many_bytes(name, dtype):
    model = tiny(name).to(dtype)
    plain, counted, packed = sum(p.nbytes for p in model.parameters()), quantised_bytes(model, 8), quantised_bytes(model, 4)
    for bits in (8, 4):
        quantised = quantise(copy.deepcopy(model), bits)
        held = [part for p in quantised.parameters() for part in units._parts(p)]
        unpacked = 0 if bits == 8 else sum(linear.weight.numel() // 2 for linear in linears(model).values())
        assert sum(part.nbytes for part in held) == quantised_bytes(quantised, bits) + unpacked
    assert (quantised_bytes(quantised, 8), quantised_bytes(quantised, 4)) == (counted, packed)
    assert packed < counted < plain


@pytest.fixture
def base(tmp_path, cache):
    tiny().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return locate_folder("base", tmp_path / "base")


@pytest.mark.parametrize(
    ("change", "dtype"), [(round_weights, torch.float32), (round_weights, torch.bfloat16), (quantise, torch.float32)]
)
def test_saved_as_a_derived_model(base, tmp_path, change, dtype):
    model, tokenizer = load_located(base, dtype, "cpu")
    plan = select(measure_importance(model, TOKENS), "attention", 1)
    change(model, 4)
    derived = save_derived(model, tokenizer, tmp_path / "derived", base, {"method": change.__name__, "bits": 4})
    again, _ = load_located(derived, dtype, "cpu")
    assert torch.equal(logits(again), logits(model))
    with dropped(again, plan), dropped(model, plan):
        assert torch.equal(logits(again), logits(model))


@both
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "opt", "phi3"])
def test_transformers_stores_and_loads_it(name, bits, tmp_path):
    model = quantise(tiny(name), bits)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    if bits == 8:
        stored = load_file(tmp_path / "model.safetensors")
        assert sum(tensor.nbytes for tensor in stored.values()) == quantised_bytes(model, 8)


@both
def test_bfloat16_as_it_is_loaded(base, bits):
    """Where a processor lacks instructions for bfloat16, its linear maps are of a class of their own."""
    quantised, rounded = (change(load_located(base, torch.bfloat16, "cpu")[0], bits) for change in (quantise, round_weights))
    assert quantised.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    close(logits(quantised).float(), logits(rounded).float(), 0.03)
    assert logits(quantised).dtype == torch.bfloat16


def test_in_inference_mode():
    with torch.inference_mode():
        quantised, rounded = quantise(tiny(), 4), round_weights(tiny(), 4)
    assert not any(part.is_inference() for p in linears(quantised).values() for part in units._parts(p.weight))
    assert torch.equal(logits(quantised), logits(rounded))


# ---- what is refused ----------------------------------------------------------------------------------------------------


def refuse(model, bits, message: str, counted_too: bool = True, error: type[LLMDropError] = LLMDropError) -> None:
    """Each function raises the error, and the model is as it was."""
    state = lambda: [(n, type(m), id(p), p._version) for n, m in model.named_modules() for p in m.parameters(recurse=False)]  # noqa: E731
    before, config = state(), model.config.to_dict()
    for function in (quantise, round_weights, *([quantised_bytes] if counted_too else [])):
        with pytest.raises(error, match=message):
            function(model, bits)
    assert (state(), model.config.to_dict()) == (before, config)


@pytest.mark.parametrize("bits", [3, 16, 0, -8, 4.0, "8", None, True, torch.int4])
def test_other_bits(bits):
    refuse(tiny(), bits, f"Weights are quantised to 8 or to 4 bits, not to {bits!r}")


def test_bits_of_numpy_and_torch():
    assert quantised_bytes(tiny(), torch.tensor(4)) == quantised_bytes(tiny(), 4)
    assert torch.equal(logits(round_weights(tiny(), torch.tensor(4))), logits(round_weights(tiny(), 4)))


@both
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_families_with_other_matrices(name, bits):
    what = r"c_attn.weight of a Conv1D" if name == "gpt2" else r"(router|gate|experts)\.\w+ of a \w+(Router|Experts)"
    kind = families.CASES[name].model_type
    refuse(tiny(name), bits, rf"This {kind} model cannot be quantised as a whole: .* such as [\w.]+{what}")


def test_rows_that_groups_do_not_divide():
    model = families.tiny("llama")  # of 48
    refuse(model, 4, r"layers.0.mlp.down_proj.weight has rows of 48 numbers, which groups of 32 do not divide. Use 8 bits")
    close(logits(quantise(copy.deepcopy(model), 8)), logits(round_weights(model, 8)))


def test_models_that_are_not_plain():
    refuse(quantise(tiny(), 4), 8, "q_proj.weight is a IntxUnpackedToInt8Tensor: it is quantised already", counted_too=False)
    refuse(tiny().double(), 8, "q_proj.weight is torch.float64. Load the model in float32", counted_too=False)
    refuse(tiny().to("meta"), 8, "q_proj.weight is offloaded. Load the model so that it is in memory", counted_too=False)
    assert quantised_bytes(tiny().to("meta"), 8) == quantised_bytes(tiny(), 8)
    everything = DropPlan((0, 1, 2), (0, 1, 2))
    with dropped(tiny(), everything) as empty:
        refuse(empty, 8, "Nothing is left to quantise: all attention and MLP is dropped", counted_too=False)
        assert quantised_bytes(empty, 8) == sum(p.nbytes for p in empty.parameters())
    for function in (quantise, round_weights, quantised_bytes):
        with pytest.raises(LLMDropError, match="Expected a model, found str"):
            function("llama", 8)


def test_without_torchao(monkeypatch):
    model = tiny()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    refuse(model, 8, r"torchao is not installed .*: pip install 'torchao>=0.18'", counted_too=False, error=NotAvailable)
    assert quantised_bytes(model, 8) > 0  # does not need it
