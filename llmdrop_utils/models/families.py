"""Where attention, MLP and residual stream sit, per model family, and what a family's cache holds.

A decoder layer adds two terms to the residual stream x: attention and MLP. In most families

    x = x + attention(norm(x));  x = x + mlp(norm(x))

as in Llama, and a `Family` states only what differs from it. `importance.measure_importance` checks it on every use: x
plus the two terms must give the layer's output, and the MLP must read what it is said to read (where a module tells).
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from ..base.errors import LLMDropError

# ---- families -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of modules, relative to the decoder (`layers`) or to one of its layers (the rest)."""

    layers: str = "layers"
    attention: str = "self_attn"  # its output is the term that is added to the stream
    mlp: str = "mlp"  # likewise
    mlp_input: str | None = "post_attention_layernorm"  # it reads the stream for the MLP; None: MLP reads what attention reads
    scale: str | None = None  # attribute of the layer: both terms are multiplied by it before they are added
    # What is removed when a sub-layer is dropped: the module whose output leads to the term, then those that are not needed
    # without it (children of the layer). A module in both units is read by both, so it is removed only with both.
    attention_unit: tuple[str, ...] = ("self_attn", "input_layernorm")
    mlp_unit: tuple[str, ...] = ("mlp", "post_attention_layernorm")
    mlp_is_one_module: bool = True  # False: the first module of `mlp_unit` is a part of the MLP, so no map can replace it
    mlp_returns_router: bool = False  # the MLP returns a pair: its output and router scores
    mlp_is_added_to: bool = False  # the layer adds into the MLP's output in place, so it needs its full shape
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
    if not config.do_layer_norm_before:  # OPT-350m
        return Family(unsupported="its norms act on the residual stream itself, so a sub-layer adds no term of its own")
    return Family(
        mlp="fc2",
        mlp_input="final_layer_norm",
        attention_unit=("self_attn", "self_attn_layer_norm"),
        mlp_unit=("fc1", "fc2", "final_layer_norm"),  # zero from fc1 stays zero on its way through the activation
        mlp_is_one_module=False,
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


# ---- finding the anatomy of a model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer: the block, and the modules at which its two terms can be seen."""

    block: nn.Module
    attention: nn.Module
    mlp: nn.Module
    mlp_input: nn.Module | None
    scale: float


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A causal language model, taken apart."""

    family: str  # config.model_type
    decoder: nn.Module  # embeddings, layers, final norm; no LM head
    layers: tuple[Layer, ...]

    def __len__(self) -> int:
        return len(self.layers)


def family_of(config) -> Family:
    """The family of a configuration. Raises LLMDropError for an unknown one, saying what to add and where."""
    config = config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if callable(family):
        family = family(config)
    if family is None:
        raise LLMDropError(
            f"The model family {config.model_type!r} is unknown. Add it to FAMILIES in llmdrop_utils/models/families.py: the "
            "list of layers, the modules whose outputs are added to the residual stream as attention and as MLP, the module "
            "that reads the stream for the MLP, and the modules to remove when attention or MLP is dropped. If it is "
            "built like Llama, its name alone is enough. "
            f"Then add it to tests/families.py. Known: {', '.join(sorted(FAMILIES))}."
        )
    if family.unsupported:
        raise LLMDropError(f"This {config.model_type} model cannot be taken apart: {family.unsupported}.")
    return family


def find_anatomy(model: nn.Module) -> Anatomy:
    """Take a transformers model apart. Raises LLMDropError for a family that is unknown or not built as stated."""
    if not isinstance(model, nn.Module):
        raise LLMDropError(f"Expected a model, found {type(model).__name__}. `load_model` returns a model and its tokenizer.")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    config = decoder.config
    family = family_of(config)
    try:
        blocks = decoder.get_submodule(family.layers)
        layers = tuple(_take_apart(block, family) for block in blocks)
    except AttributeError as error:
        raise not_as_stated(config.model_type, error) from error
    return Anatomy(config.model_type, decoder, layers)


def not_as_stated(model_type: str, error: AttributeError) -> LLMDropError:
    """The error to raise when a model lacks a module that `FAMILIES` names."""
    return LLMDropError(
        f"A {model_type} model is not built as FAMILIES in llmdrop_utils/models/families.py says ({error}). "
        "transformers may have renamed a module: correct the entry."
    )


def _take_apart(block: nn.Module, family: Family) -> Layer:
    return Layer(
        block=block,
        attention=block.get_submodule(family.attention),
        mlp=block.get_submodule(family.mlp),
        mlp_input=None if family.mlp_input is None else block.get_submodule(family.mlp_input),
        scale=1.0 if family.scale is None else float(getattr(block, family.scale)),
    )


# ---- residual stream, device, positions -------------------------------------------------------------------------------


def stream_of(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states among a module's inputs: the first one, or the keyword that transformers gives it."""
    return args[0] if args else kwargs["hidden_states"]


def tensor_of(output) -> torch.Tensor:
    """The hidden states that a module returns. Some return a tuple; `output[0]` of a tensor would be the first sample."""
    return output[0] if isinstance(output, tuple) else output


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model takes its input."""
    device = model.get_input_embeddings().weight.device
    return device if device.type != "meta" else torch.device("cpu")  # offloaded: accelerate moves inputs itself


def stream_width(config) -> int:
    """How many numbers the residual stream holds per token."""
    return _first(config.get_text_config(), "hidden_size", "n_embd")


def position_limit(config) -> int | None:
    """How many positions a model knows, as its configuration says; None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)  # transformers maps GPT-2's n_positions to it


def learned_positions(config) -> int | None:
    """How many positions a model has learned vectors for; None if it computes positions, as most do."""
    return position_limit(config) if config.get_text_config().model_type in ("gpt2", "opt") else None


# ---- what the cache holds ---------------------------------------------------------------------------------------------


def is_full_attention(config) -> bool:
    """Does every layer keep every token? Then the cache shrinks by exactly the share of attention that is dropped."""
    return all(window is None for _, window in cache_geometry(config.get_text_config()))


def cache_geometry(config) -> list[tuple[int, int | None]]:
    """For each layer, how many numbers a token leaves in the cache, and how many tokens attention can see (None: all)."""
    n_layers = _first(config, "num_hidden_layers", "n_layer")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * n_layers
    if rank := getattr(config, "kv_lora_rank", None):
        per_token = rank + config.qk_rope_head_dim
    else:
        per_token = 2 * _kv_heads(config) * head_size(config)
    return [(per_token, window if kind == "sliding_attention" else None) for kind in kinds]


def numbers_multiplied(config) -> int:
    """How many numbers a token multiplies for each token it sees: its queries with keys, its scores with values."""
    heads = _first(config, "num_attention_heads", "n_head")
    if getattr(config, "kv_lora_rank", None):
        return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return heads * 2 * head_size(config)


def _kv_heads(config) -> int:
    if config.model_type == "falcon":  # transformers repeats the shared heads of Falcon-40B before it caches them
        return 1 if config.multi_query and not config.new_decoder_architecture else config.num_attention_heads
    if config.model_type in ("gpt_neox", "opt"):  # none are shared, whatever else a configuration says
        return config.num_attention_heads
    return _first(config, "num_key_value_heads", "num_attention_heads", "n_head")


def head_size(config) -> int:
    """Width of one head of attention."""
    size = getattr(config, "head_dim", None)
    return size or stream_width(config) // _first(config, "num_attention_heads", "n_head")


def _first(config, *names: str) -> int:
    """The first of these settings that a configuration has."""
    return next(value for name in names if (value := getattr(config, name, None)) is not None)
