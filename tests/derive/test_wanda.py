"""The weights that Wanda prunes are those of a straightforward evaluation, in every family whose layers are linear maps."""

import copy
import math

import accelerate
import families
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmdrop_utils import DropPlan, LinearMap, LLMDropError, drop, dropped, find_anatomy
from llmdrop_utils.derive import wanda
from llmdrop_utils.derive.wanda import prune_by_wanda, sparsity_for, wanda_mask

TOKENS = torch.randint(3, 97, (5, 12), generator=torch.Generator().manual_seed(3))
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "granite-moe", "deepseek-v2", "deepseek-v3", "gpt-oss"]
DENSE = [name for name in families.CASES if name not in MIXTURES]
WITHOUT_EXPERTS = {"deepseek-v3": {"first_k_dense_replace": 3}}  # the same attention, and an MLP as in Llama


def maps_of(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def rows_of(module: nn.Module) -> torch.Tensor:
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(tensor, "qdata", tensor).clone() for name, tensor in model.state_dict().items()}  # torchao's integers


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def assert_same(before: dict[str, torch.Tensor], model: nn.Module) -> None:
    after = bits(model)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@torch.no_grad()
def prune_by_hand(model: nn.Module, sparsity: float) -> None:
    """Layer by layer: what the whole, partly pruned model lets each map read, and the smallest scores of each row."""
    for layer in find_anatomy(model).layers:
        maps, read = maps_of(layer.block), {}
        handles = [
            module.register_forward_hook(
                lambda module, args, output, read=read, name=name: read.update({name: args[0].clone()})
            )
            for name, module in maps.items()
        ]
        model(input_ids=TOKENS)
        for handle in handles:
            handle.remove()
        for name, module in maps.items():
            weight, x = rows_of(module), read[name].reshape(-1, rows_of(module).shape[1]).double()
            norms = [math.sqrt(math.fsum(v * v for v in column)) for column in x.T.tolist()]
            for i, row in enumerate(weight.tolist()):
                order = sorted(range(len(row)), key=lambda j: (abs(row[j]) * norms[j], j))
                for j in order[: math.floor(sparsity * len(row))]:
                    weight[i, j] = 0.0


# ---- what is pruned -------------------------------------------------------------------------------------------------------


def test_a_mask_computed_by_hand():
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.5, 4.0, -1.0]])
    norms = torch.tensor([1.0, 4.0, 2.0])  # scores: 3, 4, 4 and 0.5, 16, 2
    yes, no = True, False
    for sparsity, kept in (
        (0.3, [[yes, yes, yes], [yes, yes, yes]]),  # 0.9 of a weight
        (0.4, [[no, yes, yes], [no, yes, yes]]),
        (0.7, [[no, no, yes], [no, yes, no]]),  # of the two scores of 4, that of the lower index
    ):
        assert wanda_mask(weight, norms, sparsity).tolist() == kept


@pytest.mark.parametrize("name", [*DENSE, *WITHOUT_EXPERTS])
def test_all_masks_equal_a_straightforward_evaluation(name, monkeypatch):
    monkeypatch.setattr(wanda, "ROWS", 7)  # inputs and weights are taken in several parts
    model = families.tiny(name, **WITHOUT_EXPERTS.get(name, {})).double()
    expected = copy.deepcopy(model)
    prune_by_hand(expected, 0.6)
    prune_by_wanda(model.train(), TOKENS, 0.6, batch_size=2)  # without dropout; the last batch is smaller
    assert_same(bits(expected), model)
    blocks = [layer.block for layer in find_anatomy(model).layers]
    zeros = {
        int((row == 0).sum()) / len(row) for block in blocks for module in maps_of(block).values() for row in rows_of(module)
    }
    assert all(0.5 < share <= 0.6 for share in zeros)


def test_bfloat16_has_the_exact_number_of_zeros_and_keeps_the_bits_of_the_rest():
    model = families.tiny("qwen2").bfloat16().train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, done = bits(model), []
    found = prune_by_wanda(model, TOKENS, 0.3, on_batch=done.append)
    modules = [module for layer in model.model.layers for module in maps_of(layer).values()]
    for module in modules:
        assert set((module.weight == 0).sum(1).tolist()) == {math.floor(0.3 * module.in_features)}  # 9 of 32, 14 of 48
    kept = {name: torch.where(after == 0, after, before[name]) for name, after in model.state_dict().items()}
    assert_same(kept, model)
    assert [name for name in before if not torch.equal(before[name], kept[name]) and "_proj.weight" not in name] == []
    zeros = 3 * (9 * (32 + 16 + 16 + 32 + 48 + 48) + 14 * 32)
    assert found == {"weights": 3 * 7680, "zeros": zeros, "sparsity": zeros / (3 * 7680)}
    assert (sum(done), model.training, hooks_of(model)) == (3 * TOKENS.numel(), True, 0)
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == [
        "model.layers.0.mlp.up_proj.weight"
    ]


def test_sparsity_zero_leaves_every_bit():
    model = families.tiny("llama")
    before = bits(model)
    assert prune_by_wanda(model, TOKENS, 0) == {"weights": 3 * 7680, "zeros": 0, "sparsity": 0.0}
    assert_same(before, model)


def test_weights_of_inputs_that_are_always_zero_go_first():
    model = families.tiny("llama")
    layer = model.model.layers[1]
    layer.input_layernorm.weight.data[[4, 9, 20]] = 0.0
    layer.self_attn.v_proj.weight.data[:, [4, 9, 20]] = 1e3
    prune_by_wanda(model, TOKENS, 3 / 32)
    assert (layer.self_attn.v_proj.weight == 0).nonzero().tolist() == [[row, j] for row in range(16) for j in (4, 9, 20)]


def test_what_is_dropped_is_left_out_and_a_map_in_its_place_stays():
    model = families.tiny("llama")
    linear = LinearMap(torch.eye(32))
    with dropped(model, DropPlan((1,), (0,), maps={("mlp", 0): linear})):
        found = prune_by_wanda(model, TOKENS, 0.5)
        assert torch.equal(model.model.layers[0].mlp.weight, torch.eye(32))
    assert (found["weights"], found["sparsity"]) == (3 * 7680 - 3072 - 4608, 0.5)
    layers = model.model.layers
    assert all(
        (module.weight != 0).all() for module in (*maps_of(layers[1].self_attn).values(), *maps_of(layers[0].mlp).values())
    )
    with (
        dropped(model, DropPlan((0, 1, 2), (0, 1, 2))),
        pytest.raises(LLMDropError, match="are dropped, so there is nothing to"),
    ):
        prune_by_wanda(model, TOKENS, 0.5)


# ---- as many as a plan removes --------------------------------------------------------------------------------------------


def test_the_sparsity_that_equals_a_plan_by_hand():
    model = families.tiny("llama")
    # A layer: attention 32 x 32 + 2 (16 x 32) + 32 x 32 = 3072, MLP 3 (32 x 48) = 4608.
    assert sparsity_for(model, DropPlan((0, 2), (1,))) == (2 * 3072 + 4608) / (3 * 7680)
    assert (sparsity_for(model, DropPlan()), sparsity_for(model, DropPlan((0, 1, 2), (0, 1, 2)))) == (0.0, 1.0)
    # Attention 32 x 96 + 32 x 32 = 4096, MLP 2 (32 x 128) = 8192.
    assert sparsity_for(families.tiny("gpt2"), DropPlan((1,))) == 4096 / (3 * 12288)


@pytest.mark.parametrize("name", DENSE)
def test_pruning_leaves_as_many_weights_as_dropping(name):
    plan, model = DropPlan((0,), (0, 1)), families.tiny(name)
    sparsity = sparsity_for(model, plan)
    lacks = copy.deepcopy(model)
    drop(lacks, plan)
    left, whole = (sum(weight.numel() for weight in one.parameters() if weight.ndim > 1) for one in (lacks, model))
    found = prune_by_wanda(model, TOKENS, sparsity)
    assert sparsity * found["weights"] == pytest.approx(whole - left, rel=1e-12)
    rows = sum(len(rows_of(module)) for layer in find_anatomy(model).layers for module in maps_of(layer.block).values())
    assert 0 <= whole - left - found["zeros"] < rows  # less than one weight in each row is rounded away


# ---- what cannot be pruned ------------------------------------------------------------------------------------------------


def refused(model: nn.Module, match: str, tokens=TOKENS, sparsity=0.5, **how) -> None:
    """One clear error before any layer is read to be pruned, and a model that is as it was, hooks included."""
    done: list[int] = []
    before = {} if any(p.is_meta for p in model.parameters()) else bits(model)
    with pytest.raises(LLMDropError, match=match):
        prune_by_wanda(model, tokens, sparsity, on_batch=done.append, **how)
    assert done == []
    if before:
        assert_same(before, model)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan"), False, True, "0.5", None])
def test_a_sparsity_that_is_no_share(sparsity):
    message = f"The sparsity must be a share of the weights, from 0 to below 1, but is {sparsity!r}"
    refused(families.tiny("llama"), message, sparsity=sparsity)
    with pytest.raises(LLMDropError, match=message):
        wanda_mask(torch.ones(2, 3), torch.ones(3), sparsity)


def test_tokens_and_batches_that_cannot_be_read():
    model = families.tiny("llama")
    refused(model, "this model knows 0 to 96", tokens=TOKENS + 90)
    refused(model, "Samples of 65 tokens are too long", tokens=torch.ones(1, 65, dtype=torch.long))
    refused(model, "The batch size must be 1 or more, but is 0", batch_size=0)
    with pytest.raises(LLMDropError, match=r"the shapes are \(2, 3\) and \(2,\)"):
        wanda_mask(torch.ones(2, 3), torch.ones(2), 0.5)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts(name):
    model = families.tiny(name)
    family = families.CASES[name].model_type
    message = rf"This {family} model cannot be pruned by Wanda: in layer ., the weight .* is in no linear module"
    refused(model, message)
    with pytest.raises(LLMDropError, match=message):
        sparsity_for(model, DropPlan((1,)))


def test_weights_that_two_modules_share():
    model = families.tiny("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    refused(model, "layers.0.mlp.up_proj.weight and model.layers.2.mlp.up_proj.weight are the same tensor")
    model = families.tiny("llama")
    model.model.layers[1].self_attn.k_proj.weight.data = model.model.layers[1].self_attn.v_proj.weight.data  # two parameters
    refused(model, "self_attn.k_proj.weight and model.layers.1.self_attn.v_proj.weight are the same tensor")


def test_weights_that_are_not_in_memory(tmp_path):
    model = accelerate.disk_offload(families.tiny("llama"), tmp_path, execution_device=torch.device("cpu"))
    refused(model, r"The weight of self_attn.q_proj of layer 0 is not in memory \(offloaded\)")


def test_quantised_weights():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = families.tiny("llama")
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("layers.1.mlp.down_proj"))
    refused(model, "The weight of mlp.down_proj of layer 1 is quantised")
    model = families.tiny("llama")
    model.model.layers[2].self_attn.o_proj.weight.data = torch.ones(32, 32).to(torch.float8_e4m3fn)
    refused(model, r"The weight of self_attn.o_proj of layer 2 is quantised \(Parameter, torch.float8_e4m3fn\)")


def test_an_adapter():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(families.tiny("llama"), LoraConfig(target_modules=["v_proj"]))
    refused(model, "self_attn.v_proj of layer 0 has an adapter. Merge it")
    prune_by_wanda(model.merge_and_unload(), TOKENS, 0.5)


def test_a_map_that_no_forward_pass_calls():
    model = families.tiny("llama")
    model.model.layers[1].mlp.spare = nn.Linear(32, 32)
    refused(model, "The linear map mlp.spare of layer 1 is not called in a forward pass")


def test_a_plan_with_maps_has_no_sparsity():
    plan = DropPlan((1,), maps={("attention", 1): LinearMap(torch.eye(32))})
    with pytest.raises(LLMDropError, match="Give a plan without maps"):
        sparsity_for(families.tiny("llama"), plan)
    with pytest.raises(LLMDropError, match="holds layer 3, but this model has 3 layers"):
        sparsity_for(families.tiny("llama"), DropPlan((3,)))


def test_numbers_that_are_not_finite():
    model = families.tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    refused(model, "The MLP of layer 1 gives values that are not finite in torch.float32")


def test_numbers_that_become_infinite_when_layers_are_pruned():
    """Two halves of one map cancel each other, until one of them is pruned."""
    model = families.tiny("llama").half()
    mlp = model.model.layers[0].mlp
    for module in (mlp.gate_proj, mlp.up_proj):
        module.weight.data[:] = module.weight.data[0]
    mlp.up_proj.weight.data *= 20
    mlp.down_proj.weight.data[:, :24], mlp.down_proj.weight.data[:, 24:] = 6e4, -59968.0
    with pytest.raises(
        LLMDropError, match="of layer 1 is not finite in torch.float16 now that the layers before it are pruned"
    ):
        prune_by_wanda(model, TOKENS, 0.5)
    assert (mlp.down_proj.weight == 0).sum() == 24 * 32
    assert (model.model.layers[1].mlp.down_proj.weight != 0).all()
