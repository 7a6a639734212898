"""A tiny random model of every family, and what an independent reference needs to know about it.

The reference finds a sub-layer's term by setting its output projection to zero, so it knows nothing of hooks or norms.
"""

import dataclasses
from collections.abc import Iterable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmdrop_utils.models.families import find_anatomy

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FALCON = {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 97, "initializer_range": 0.2}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


# Where the modules are that compute attention and MLP, if not in "self_attn" and "mlp". OPT has no module for its MLP.
MODULES = {
    "gpt2": ("attn", "mlp"),
    "gptj": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "falcon": ("self_attention", "mlp"),
    "granitemoe": ("self_attn", "block_sparse_moe"),
    "opt": ("self_attn", None),
}


@dataclasses.dataclass(frozen=True)
class Case:
    model_type: str
    settings: dict
    attention: str = "o_proj"  # parameters whose names hold this make attention's output; zero turns it off
    mlp: str = "down_proj"
    parallel: bool = False
    norms: tuple[str, str] | None = None  # post-norm: they act on the stream, after attention and after the MLP

    @property
    def modules(self) -> dict[str, str | None]:
        return dict(zip(("attention", "mlp"), MODULES.get(self.model_type, ("self_attn", "mlp")), strict=True))


CASES = {
    "llama": Case("llama", SMALL),
    "mistral": Case("mistral", {**SMALL, "sliding_window": 4}),
    "mixtral": Case("mixtral", SMALL | MOE),
    "qwen2": Case("qwen2", SMALL),
    "qwen2-moe": Case("qwen2_moe", SMALL | MOE | {"shared_expert_intermediate_size": 16}),
    "qwen3": Case("qwen3", SMALL),
    "qwen3-moe": Case("qwen3_moe", SMALL | MOE),
    "gemma": Case("gemma", SMALL),
    "gemma2": Case("gemma2", SMALL | SLIDING | {"query_pre_attn_scalar": 8}),
    "gemma3": Case("gemma3_text", SMALL | SLIDING | {"query_pre_attn_scalar": 8}),
    "phi": Case("phi", SMALL, "self_attn.dense", "fc2", parallel=True),
    "phi3": Case("phi3", SMALL),
    "olmo": Case("olmo", SMALL),
    "olmo2": Case("olmo2", SMALL),
    "olmo3": Case("olmo3", SMALL | SLIDING),
    "olmoe": Case("olmoe", SMALL | MOE),
    "smollm3": Case("smollm3", SMALL | {"no_rope_layers": [1, 0, 1]}),
    "granite": Case("granite", SMALL | {"residual_multiplier": 0.3, "embedding_multiplier": 4.0}),
    "granite-moe": Case("granitemoe", SMALL | MOE | {"residual_multiplier": 0.3}),
    "gpt-neox": Case("gpt_neox", SMALL, "attention.dense", "dense_4h_to_h", parallel=True),
    "gpt-neox-sequential": Case("gpt_neox", SMALL | {"use_parallel_residual": False}, "attention.dense", "dense_4h_to_h"),
    "gpt-j": Case("gptj", GPT | {"rotary_dim": 4}, "out_proj", "fc_out", parallel=True),
    "gpt2": Case("gpt2", GPT, "attn.c_proj", "mlp.c_proj"),
    "opt": Case("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}, "out_proj", "fc2"),
    "opt-350m": Case(
        "opt",
        SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "do_layer_norm_before": False},
        "out_proj",
        "fc2",
        norms=("self_attn_layer_norm", "final_layer_norm"),
    ),
    "falcon-7b": Case("falcon", FALCON | {"new_decoder_architecture": False}, "attention.dense", "dense_4h_to_h", True),
    "falcon-40b": Case(
        "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "attention.dense", "dense_4h_to_h", True
    ),
    "falcon-rw": Case(
        "falcon",
        FALCON | {"new_decoder_architecture": False, "parallel_attn": False, "alibi": True, "multi_query": False},
        "attention.dense",
        "dense_4h_to_h",
    ),
    "cohere": Case("cohere", SMALL, parallel=True),
    "cohere2": Case("cohere2", SMALL | SLIDING, parallel=True),
    "deepseek-v2": Case("deepseek_v2", SMALL | DEEPSEEK | {"n_group": 1}),
    "deepseek-v3": Case("deepseek_v3", SMALL | DEEPSEEK | {"n_group": 2}),
    "stablelm": Case("stablelm", SMALL),
    "stablelm-parallel": Case("stablelm", SMALL | {"use_parallel_residual": True}, parallel=True),
    "starcoder2": Case("starcoder2", SMALL, mlp="mlp.c_proj"),
    "gpt-oss": Case("gpt_oss", SMALL | SLIDING | MOE),
}


def tiny(name: str, **changes) -> torch.nn.Module:
    """A random model of the family in float32, with norm gains and biases that are not all the same."""
    case = CASES[name]
    config = AutoConfig.for_model(case.model_type, **case.settings | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def silence(name: str, model: torch.nn.Module, attention: Iterable[int], mlp: Iterable[int]) -> set[str]:
    """Set the output projections of these layers to zero, in place; returns the names of these parameters."""
    case, names = CASES[name], {id(parameter): n for n, parameter in model.named_parameters()}
    silenced = set()
    for indices, projection in ((attention, case.attention), (mlp, case.mlp)):
        for index in indices:
            found = [p for n, p in find_anatomy(model).layers[index].block.named_parameters() if projection in n]
            assert found
            for parameter in found:
                parameter.zero_()
                silenced.add(names[id(parameter)])
    return silenced
