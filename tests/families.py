"""A tiny random model of every family, and what an independent reference needs to know about it.

Every test of families runs on each of `CASES`, which have all layouts; those of `MORE` are walked through in
tests/models/test_walk.py, where each is measured, dropped, decoded and scored once.

The reference finds a sub-layer's term by setting its output projection to zero, so it knows nothing of hooks or norms.
"""

import dataclasses
import re
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
    attention: str = "o_proj"  # parameters whose names match this make attention's output; zero turns it off
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


# By model type. What differs in a layout, in caches or in experts is what these settings are about.
EXPERTS = MOE | {"n_routed_experts": 4, "moe_topk": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1}
SHARED = EXPERTS | {"n_shared_experts": 1, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 16}
LATENT = DEEPSEEK | {"n_group": 1}
INDEX = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}
ROPES = {
    kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    for kind in ("full_attention", "sliding_attention")
}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention", "full_attention"], "conv_L_cache": 2}
DELTA = HYBRID | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_d_conv": 2,
    "mamba_chunk_size": 4,
}
KIMI = {"num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 2, "kda_layers": [1], "full_attn_layers": [2, 3]}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}  # that reads images or sound, and is not used
SEEING = {"num_hidden_layers": 2, "image_size": 16, "crop_size": 16, "patch_size": 8}
HEARING = {"num_blocks": 1, "ext_pw_out_channel": 16, "nemo_conv_channels": 16, "depthwise_separable_out_channel": 16}

SLIDING_HEADS = {f"swa_{key}": value for key, value in (DEEPSEEK | {"num_attention_heads": 4, "head_dim": 12}).items()}
WINDOW = {"sliding_window": 4}  # for families that have one; which layers slide, they say themselves

MORE = {
    **{name: Case(name, SMALL) for name in ["arcee", "bitnet", "diffllama", "ernie4_5", "glm", "glm4", "helium", "jais2"]},
    **{name: Case(name, SMALL) for name in ["hunyuan_v1_dense", "internlm3", "iquestcoder", "nemotron", "seed_oss"]},
    **{name: Case(name, SMALL) for name in ["vaultgemma", "apertus"]},
    **{name: Case(name, SMALL | WINDOW) for name in ["cwm", "exaone4", "ministral", "ministral3"]},
    **{name: Case(name, SMALL | EXPERTS) for name in ["ernie4_5_moe", "flex_olmo", "hunyuan_v1_moe", "hy_v3", "laguna"]},
    **{name: Case(name, SMALL | EXPERTS) for name in ["minimax_m2", "solar_open"]},
    **{name: Case(name, SMALL | EXPERTS | WINDOW) for name in ["afmoe", "exaone_moe", "flint", "kolibri1", "mellum"]},
    **{name: Case(name, SMALL | EXPERTS | WINDOW) for name in ["mimo_v2_flash", "phimoe"]},
    **{name: Case(name, SMALL | LATENT) for name in ["axk1", "axk2", "glm4_moe_lite", "minicpm3", "youtu"]},
    "aria_text": Case(
        "aria_text", SMALL | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}, mlp="down_proj|experts.fc2"
    ),
    "cohere2_moe": Case("cohere2_moe", SMALL | EXPERTS | WINDOW, parallel=True),
    "cohere_compass_text": Case("cohere_compass_text", SMALL | WINDOW | {"rope_parameters": ROPES}, parallel=True),
    "deepseek_v32": Case("deepseek_v32", SMALL | LATENT | INDEX),
    "dots1": Case("dots1", SMALL | SHARED),
    "dots3_note_text": Case("dots3_note_text", SMALL | LATENT | INDEX | WINDOW | SLIDING_HEADS),
    "glm4_moe": Case("glm4_moe", SMALL | SHARED),
    "minimax_m3_vl_text": Case("minimax_m3_vl_text", SMALL | EXPERTS | {"shared_intermediate_size": 16, "index_head_dim": 8}),
    "moshi": Case("moshi", SMALL | {"ffn_dim": 48, "num_codebooks": 2}, mlp="fc2"),
    "nanochat": Case("nanochat", SMALL, mlp="fc2"),
    "persimmon": Case("persimmon", SMALL, "self_attn.dense", "dense_4h_to_h"),
    "phi4_multimodal": Case("phi4_multimodal", SMALL | {"vision_config": TOWER | SEEING, "audio_config": TOWER | HEARING}),
    "granite_swa": Case("granite_swa", SMALL | WINDOW | {"residual_multiplier": 0.3}),
    "granitemoeshared": Case("granitemoeshared", SMALL | MOE | {"residual_multiplier": 0.3, "shared_intermediate_size": 0}),
    "granitemoe_swa": Case("granitemoe_swa", SMALL | MOE | {"residual_multiplier": 0.3, "shared_intermediate_size": 0}),
    "hyperclovax": Case("hyperclovax", SMALL | {"residual_multiplier": 0.3, "use_post_norm": True}),
    "llama4_text": Case(
        "llama4_text",  # layers with experts and without, windows of 4
        SMALL
        | MOE
        | {
            "intermediate_size_mlp": 48,
            "moe_layers": [0, 2],
            "attention_chunk_size": 4,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
        },
    ),
    "jetmoe": Case("jetmoe", SMALL | MOE, "self_attention.experts.(bias|output_linear)", "mlp.(bias|output_linear)"),
    "modernbert-decoder": Case("modernbert-decoder", SMALL | {"local_attention": 8}, "attn.Wo", "mlp.Wo"),
    "gpt_bigcode": Case("gpt_bigcode", GPT, "attn.c_proj", "mlp.c_proj"),
    "gpt_neo": Case(
        "gpt_neo",
        SMALL
        | {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 4},
        "out_proj",
        "mlp.c_proj",
    ),
    "codegen": Case("codegen", GPT | {"rotary_dim": 4, "n_ctx": 64}, "out_proj", "fc_out", parallel=True),
    "bloom": Case("bloom", SMALL | {"n_layer": 3, "n_head": 4}, "self_attention.dense", "dense_4h_to_h"),
    "mpt": Case("mpt", SMALL | {"d_model": 32, "n_heads": 4, "n_layers": 3}, "out_proj", "down_proj"),
    "ctrl": Case("ctrl", GPT | {"dff": 48}, "multi_head_attention.dense", "ffn.2"),
    "dbrx": Case(
        "dbrx",
        SMALL
        | {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        },
        "attn.out_proj",
        "mlp.w2",
    ),
    "biogpt": Case("biogpt", SMALL, "out_proj", "fc2"),
    "xglm": Case(
        "xglm",
        SMALL | {"ffn_dim": 48, "attention_heads": 4, "num_layers": 3, "d_model": 32, "init_std": 0.2},
        "out_proj",
        "fc2",
    ),
    # Hybrids: layer 0 has another mixer of tokens in place of attention, whose output projection is named as well.
    "qwen3_next": Case("qwen3_next", SMALL | SHARED | DELTA, "o_proj|out_proj"),
    "qwen3_5_text": Case("qwen3_5_text", SMALL | DELTA, "o_proj|out_proj"),
    "qwen3_5_moe_text": Case("qwen3_5_moe_text", SMALL | SHARED | DELTA, "o_proj|out_proj"),
    "kimi_linear": Case("kimi_linear", SMALL | LATENT | HYBRID | {"linear_attn_config": KIMI}),
    "bailing_hybrid": Case("bailing_hybrid", SMALL | LATENT | HYBRID),
    "jamba": Case(
        "jamba",
        SMALL
        | MOE
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "o_proj|out_proj",
    ),
    "bamba": Case("bamba", SMALL | MAMBA | {"attn_layer_indices": [1, 2]}, "o_proj|out_proj"),
    "granitemoehybrid": Case(
        "granitemoehybrid",
        SMALL | MAMBA | HYBRID | {"num_local_experts": 0, "shared_intermediate_size": 48, "residual_multiplier": 0.3},
        "o_proj|out_proj",
        "shared_mlp.output_linear",
    ),
    "lfm2": Case("lfm2", SMALL | CONVOLUTION, "out_proj", "w2"),
    "lfm2_moe": Case("lfm2_moe", SMALL | EXPERTS | CONVOLUTION | {"num_dense_layers": 1}, "out_proj", "w2|down_proj"),
    "lfm3": Case("lfm3", SMALL | CONVOLUTION, "out_proj|o_proj", "w2"),
    "recurrent_gemma": Case(
        "recurrent_gemma",
        SMALL | {"block_types": ["recurrent", "attention", "attention"], "lru_width": 32, "attention_window_size": 4},
        "o_proj|linear_out",
    ),
}


def tiny(name: str, **changes) -> torch.nn.Module:
    """A random model of the family in float32, with norm gains and biases that are not all the same."""
    case = (CASES | MORE)[name]
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
    case, names = (CASES | MORE)[name], {id(parameter): n for n, parameter in model.named_parameters()}
    silenced = set()
    for indices, projection in ((attention, case.attention), (mlp, case.mlp)):
        for index in indices:
            found = [p for n, p in find_anatomy(model).layers[index].block.named_parameters() if re.search(projection, n)]
            assert found
            for parameter in found:
                parameter.zero_()
                silenced.add(names[id(parameter)])
    return silenced
