"""Where attention, MLP and residual stream sit, per model family: one line each.

A layer adds two terms to the residual stream x: attention and MLP. In most families

    x = x + attention(norm(x));  x = x + mlp(norm(x))

as in Llama, and a `Family` states only what differs from it. `importance.measure_importance` checks it on every use: x
plus the two terms must give the layer's output, and the MLP must read what it is said to read (where a module tells).

In a post-norm family (BERT, OPT-350m) norms act on the stream itself:

    h = norm(x + attention(x));  output = norm(h + mlp(h))

What a sub-layer contributes is the term that is added, before the norm that acts on the stream: its importance is
1 - cosine(x, x + attention(x)). These norms belong to the stream, and stay when the sub-layer is dropped: without attention
h = norm(x). For a block, X and Y are the layer's raw input and output, as everywhere.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of modules, relative to the decoder or encoder (`layers`) or to one of its layers (the rest)."""

    layers: str = "layers"
    attention: str = "self_attn"  # its output is the term that is added to the stream
    mlp: str = "mlp"  # likewise. Within the first module of `mlp_unit`: that module adds the stream, its second input, itself
    mlp_input: str | None = "post_attention_layernorm"  # it reads the stream for the MLP; None: MLP reads what attention reads
    mixer: str | None = None  # hybrids: what layers without attention add in its place (Mamba, a convolution); never dropped
    scale: str | None = None  # attribute of the layer: both terms are multiplied by it before they are added
    # What is removed when a sub-layer is dropped: the module whose output leads to the term, then those that are not needed
    # without it (children of the layer). A module in both units is read by both, so it is removed only with both.
    attention_unit: tuple[str, ...] = ("self_attn", "input_layernorm")
    mlp_unit: tuple[str, ...] = ("mlp", "post_attention_layernorm")
    stream_norms: tuple[str, ...] | None = None  # post-norm: they act on the stream itself, after attention and after the MLP
    attention_is_one_module: bool = True  # False: the first module of the unit is a part of attention, so no map can replace it
    mlp_is_one_module: bool = True  # likewise
    attention_returns: int = 2  # how many values: its output first, then its weights and what else there is
    mlp_returns_router: bool = False  # an MLP that has a router returns a pair: its output and router scores
    mlp_is_added_to: bool = False  # the layer adds into the MLP's output in place or reshapes it, so it needs its full shape
    takes: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids", "use_cache")  # what its forward reads, input first
    interpolates: bool = False  # vision: positions are interpolated, so that images of any size can be read
    # Decoders of encoder-decoders (`encoder_decoder_layouts`): between attention and MLP their layers read the encoder.
    cross_attention: str | None = None
    cross_input: str | None = None  # it reads the stream for the cross-attention
    cross_unit: tuple[str, ...] = ()
    position_bias: str | None = None  # inside attention: makes positions that later layers read as well, so it stays (T5)
    unsupported: str | None = None  # why this configuration of the family cannot be taken apart

    @property
    def units(self) -> dict[str, tuple[str, ...]]:
        """Kind -> its unit, in the order of the layer."""
        cross = {"cross_attention": self.cross_unit} if self.cross_unit else {}
        return {"attention": self.attention_unit, **cross, "mlp": self.mlp_unit}

    def term(self, kind: str) -> str:
        """The module whose output is the term of this kind."""
        return {"attention": self.attention, "cross_attention": self.cross_attention or "", "mlp": self.mlp}[kind]

    @property
    def adds_stream(self) -> bool:
        """Does a module of attention or MLP return the stream and its term, so that the term is seen only inside of it?"""
        units = (self.attention, self.attention_unit[0]), (self.mlp, self.mlp_unit[0])
        return any(term.startswith(f"{unit}.") for term, unit in units)


LLAMA = Family()

# Attention and MLP read the same stream and are added together: x + attention(norm(x)) + mlp(norm(x)).
PARALLEL = Family(mlp_input=None, mlp_unit=("mlp", "input_layernorm"))

# The norm comes after the sub-layer: x + norm(attention(x)).
POST_NORM = Family(
    attention="post_attention_layernorm",
    mlp="post_feedforward_layernorm",
    mlp_input="mlp",
    attention_unit=("self_attn", "post_attention_layernorm"),
    mlp_unit=("mlp", "post_feedforward_layernorm"),
)

# Norms on both sides: x + norm(attention(norm(x))).
SANDWICH = Family(
    attention="post_attention_layernorm",
    mlp="post_feedforward_layernorm",
    mlp_input="pre_feedforward_layernorm",
    attention_unit=("self_attn", "input_layernorm", "post_attention_layernorm"),
    mlp_unit=("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

GPT2 = Family(layers="h", attention="attn", mlp_input="ln_2", attention_unit=("attn", "ln_1"), mlp_unit=("mlp", "ln_2"))
GPTJ = dataclasses.replace(GPT2, mlp_input=None, mlp_unit=("mlp", "ln_1"))

# The layer has no module for the whole MLP. Zero from fc1 stays zero on its way through the activation.
OPT = Family(
    mlp="fc2",
    mlp_input="final_layer_norm",
    attention_unit=("self_attn", "self_attn_layer_norm"),
    mlp_unit=("fc1", "fc2", "final_layer_norm"),
    mlp_is_one_module=False,
)

GRANITE = Family(scale="residual_multiplier")
GRANITE_MOE = dataclasses.replace(GRANITE, mlp="block_sparse_moe", mlp_unit=("block_sparse_moe", "post_attention_layernorm"))

GLM4 = Family(
    attention="post_self_attn_layernorm",
    mlp="post_mlp_layernorm",
    attention_unit=("self_attn", "input_layernorm", "post_self_attn_layernorm"),
    mlp_unit=("mlp", "post_attention_layernorm", "post_mlp_layernorm"),
)


HYBRID_LLAMA = Family(mixer="linear_attn")
MAMBA = Family(mlp="feed_forward", mlp_input="pre_ff_layernorm", mixer="mamba", mlp_unit=("feed_forward", "pre_ff_layernorm"))
LFM2 = Family(
    mlp="feed_forward",
    mlp_input="ffn_norm",
    mixer="conv",
    attention_unit=("self_attn", "operator_norm"),
    mlp_unit=("feed_forward", "ffn_norm"),
)


def _bloom(config) -> Family:
    if config.apply_residual_connection_post_layernorm:
        return Family(unsupported="what it adds to the residual stream is added to the normed stream")
    return Family(
        layers="h",
        attention="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        attention_unit=("self_attention", "input_layernorm"),
    )


def _gpt_neox(config) -> Family:
    return Family(  # even the parallel variant has a norm for each sub-layer
        attention="attention",
        mlp_input=None if config.use_parallel_residual else "post_attention_layernorm",
        attention_unit=("attention", "input_layernorm"),
    )


def _falcon(config) -> Family:
    parallel = config.new_decoder_architecture or config.parallel_attn
    n_norms = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    if not parallel:
        norms = "input_layernorm", "post_attention_layernorm"
    else:
        norms = ("ln_attn", "ln_mlp") if n_norms == 2 else ("input_layernorm", "input_layernorm")
    return Family(
        layers="h",
        attention="self_attention",
        mlp_input=None if parallel else "post_attention_layernorm",
        attention_unit=("self_attention", norms[0]),
        mlp_unit=("mlp", norms[1]),
        mlp_is_added_to=parallel,
    )


def _opt(config) -> Family:
    if not config.do_layer_norm_before:  # OPT-350m
        return dataclasses.replace(
            OPT,
            mlp_input="fc1",
            attention_unit=("self_attn",),
            mlp_unit=("fc1", "fc2"),
            stream_norms=("self_attn_layer_norm", "final_layer_norm"),
        )
    return OPT


def _granite_moe_shared(config) -> Family:
    if config.shared_intermediate_size:
        return Family(unsupported="its layers add two MLPs, experts and one that all tokens share, outside of any module")
    return GRANITE_MOE


def _stablelm(config) -> Family:
    return PARALLEL if config.use_parallel_residual else LLAMA


def _granite_hybrid(config) -> Family:
    if config.num_local_experts:
        return Family(unsupported="its layers add two MLPs, experts and one that all tokens share, outside of any module")
    unit = ("shared_mlp", "post_attention_layernorm")
    return dataclasses.replace(GRANITE, mlp="shared_mlp", mlp_unit=unit, mixer="mamba")


FAMILIES: dict[str, Family | Callable[[object], Family]] = {
    **dict.fromkeys(["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi3"], LLAMA),
    **dict.fromkeys(["olmo", "olmoe", "smollm3", "deepseek_v2", "deepseek_v3", "starcoder2", "nemotron"], LLAMA),
    **dict.fromkeys(["arcee", "aria_text", "axk1", "bitnet", "cwm", "deepseek_v32", "diffllama", "dots1"], LLAMA),
    **dict.fromkeys(["emu3_text_model", "ernie4_5", "ernie4_5_moe", "exaone_moe", "flint", "glm", "glm4_moe"], LLAMA),
    **dict.fromkeys(["glm4_moe_lite", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "internlm3"], LLAMA),
    **dict.fromkeys(["iquestcoder", "jais2", "laguna", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text"], LLAMA),
    **dict.fromkeys(["ministral", "ministral3", "moshi", "nanochat", "persimmon", "phi4_multimodal", "phimoe"], LLAMA),
    **dict.fromkeys(["seed_oss", "solar_open", "youtu", "axk2", "dots3_note_text"], LLAMA),
    **dict.fromkeys(["granite", "granite_swa"], GRANITE),
    "granitemoe": GRANITE_MOE,
    **dict.fromkeys(["granitemoeshared", "granitemoe_swa"], _granite_moe_shared),
    "minicpm3": Family(scale="residual_scale"),
    "gpt_oss": Family(mlp_returns_router=True),
    "llama4_text": Family(
        mlp="feed_forward",
        mlp_unit=("feed_forward", "post_attention_layernorm"),
        mlp_returns_router=True,
        mlp_is_added_to=True,
    ),
    "jetmoe": Family(attention="self_attention", attention_unit=("self_attention", "input_layernorm"), attention_returns=3),
    "apertus": Family(
        mlp_input="feedforward_layernorm",
        attention_unit=("self_attn", "attention_layernorm"),
        mlp_unit=("mlp", "feedforward_layernorm"),
    ),
    "vaultgemma": Family(mlp_input="pre_feedforward_layernorm", mlp_unit=("mlp", "pre_feedforward_layernorm")),
    "modernbert-decoder": Family(
        attention="attn", mlp_input="mlp_norm", attention_unit=("attn", "attn_norm"), mlp_unit=("mlp", "mlp_norm")
    ),
    **dict.fromkeys(["gemma2", "gemma3_text"], SANDWICH),
    **dict.fromkeys(["glm4", "kolibri1"], GLM4),
    "afmoe": Family(
        attention="post_attention_layernorm",
        mlp="post_mlp_layernorm",
        mlp_input="pre_mlp_layernorm",
        attention_unit=("self_attn", "input_layernorm", "post_attention_layernorm"),
        mlp_unit=("mlp", "pre_mlp_layernorm", "post_mlp_layernorm"),
    ),
    "hyperclovax": Family(
        attention="post_norm1",
        mlp="post_norm2",
        scale="residual_multiplier",
        attention_unit=("self_attn", "input_layernorm", "post_norm1"),
        mlp_unit=("mlp", "post_attention_layernorm", "post_norm2"),
    ),
    **dict.fromkeys(["olmo2", "olmo3", "exaone4", "flex_olmo"], POST_NORM),
    **dict.fromkeys(["cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "phi"], PARALLEL),
    **dict.fromkeys(["gpt2", "gpt_bigcode", "gpt_neo"], GPT2),
    **dict.fromkeys(["gptj", "codegen"], GPTJ),
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "bloom": _bloom,
    "mpt": Family(
        layers="blocks",
        attention="attn",
        mlp="ffn.down_proj",
        mlp_input="norm_2",
        attention_unit=("attn", "norm_1"),
        mlp_unit=("ffn", "norm_2"),
    ),
    "ctrl": Family(
        layers="h",
        attention="multi_head_attention",
        mlp="ffn",
        mlp_input="layernorm2",
        attention_unit=("multi_head_attention", "layernorm1"),
        mlp_unit=("ffn", "layernorm2"),
    ),
    "dbrx": Family(
        layers="blocks",
        attention="norm_attn_norm.attn",
        mlp="ffn",
        mlp_input="norm_attn_norm.norm_2",
        attention_unit=("norm_attn_norm.attn", "norm_attn_norm.norm_1"),
        mlp_unit=("ffn", "norm_attn_norm.norm_2"),
    ),
    # Hybrids: some layers have another mixer of tokens in place of attention.
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"], HYBRID_LLAMA),
    **dict.fromkeys(["kimi_linear", "bailing_hybrid"], Family(mixer="self_attn")),
    **dict.fromkeys(["jamba", "bamba"], MAMBA),
    **dict.fromkeys(["lfm2", "lfm2_moe"], LFM2),
    "lfm3": dataclasses.replace(
        LFM2,
        attention="post_operator_norm",
        mlp="post_ffn_norm",
        mixer="post_operator_norm",
        attention_unit=("self_attn", "operator_norm", "post_operator_norm"),
        mlp_unit=("feed_forward", "ffn_norm", "post_ffn_norm"),
    ),
    "granitemoehybrid": _granite_hybrid,
    "recurrent_gemma": Family(
        attention="temporal_block",
        mlp="mlp_block",
        mlp_input="channel_pre_norm",
        mixer="temporal_block",
        attention_unit=("temporal_block", "temporal_pre_norm"),
        mlp_unit=("mlp_block", "channel_pre_norm"),
    ),
    "opt": _opt,
    **dict.fromkeys(["biogpt", "xglm"], OPT),
    "stablelm": _stablelm,
}
