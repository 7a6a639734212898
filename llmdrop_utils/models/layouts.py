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
    mlp: str = "mlp"  # likewise
    mlp_input: str | None = "post_attention_layernorm"  # it reads the stream for the MLP; None: MLP reads what attention reads
    scale: str | None = None  # attribute of the layer: both terms are multiplied by it before they are added
    # What is removed when a sub-layer is dropped: the module whose output leads to the term, then those that are not needed
    # without it (children of the layer). A module in both units is read by both, so it is removed only with both.
    attention_unit: tuple[str, ...] = ("self_attn", "input_layernorm")
    mlp_unit: tuple[str, ...] = ("mlp", "post_attention_layernorm")
    stream_norms: tuple[str, str] | None = None  # post-norm: they act on the stream itself, after attention and after the MLP
    attention_is_one_module: bool = True  # False: the first module of the unit is a part of attention, so no map can replace it
    mlp_is_one_module: bool = True  # likewise
    attention_returns: int = 2  # how many values: its output first, then its weights
    mlp_returns_router: bool = False  # the MLP returns a pair: its output and router scores
    mlp_is_added_to: bool = False  # the layer adds into the MLP's output in place, so it needs its full shape
    takes: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids", "use_cache")  # what its forward reads, input first
    interpolates: bool = False  # vision: positions are interpolated, so that images of any size can be read
    unsupported: str | None = None  # why this configuration of the family cannot be taken apart


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
    parts = Family(mlp="fc2", mlp_unit=("fc1", "fc2"), mlp_is_one_module=False)  # zero from fc1 stays zero in the activation
    if not config.do_layer_norm_before:  # OPT-350m
        norms = "self_attn_layer_norm", "final_layer_norm"
        return dataclasses.replace(parts, mlp_input="fc1", attention_unit=("self_attn",), stream_norms=norms)
    return dataclasses.replace(
        parts,
        mlp_input="final_layer_norm",
        attention_unit=("self_attn", "self_attn_layer_norm"),
        mlp_unit=("fc1", "fc2", "final_layer_norm"),
    )


def _stablelm(config) -> Family:
    return PARALLEL if config.use_parallel_residual else LLAMA


FAMILIES: dict[str, Family | Callable[[object], Family]] = {
    **dict.fromkeys(["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi3"], LLAMA),
    **dict.fromkeys(["olmo", "olmoe", "smollm3", "deepseek_v2", "deepseek_v3", "starcoder2"], LLAMA),
    "granite": Family(scale="residual_multiplier"),
    "granitemoe": Family(
        mlp="block_sparse_moe", scale="residual_multiplier", mlp_unit=("block_sparse_moe", "post_attention_layernorm")
    ),
    "gpt_oss": Family(mlp_returns_router=True),
    **dict.fromkeys(["gemma2", "gemma3_text"], SANDWICH),
    **dict.fromkeys(["olmo2", "olmo3"], POST_NORM),
    **dict.fromkeys(["cohere", "cohere2", "phi"], PARALLEL),
    "gpt2": GPT2,
    "gptj": dataclasses.replace(GPT2, mlp_input=None, mlp_unit=("mlp", "ln_1")),
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "opt": _opt,
    "stablelm": _stablelm,
}
