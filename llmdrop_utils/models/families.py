"""A model taken apart: its decoder or encoder, its layers, and the modules at which attention and MLP can be seen.

`layouts.FAMILIES` and `encoder_layouts.ENCODERS` say where they are in each family.
"""

import dataclasses

import torch
from torch import nn

from ..base.errors import LLMDropError
from .encoder_layouts import ENCODERS
from .layouts import FAMILIES, Family

# ---- finding the anatomy of a model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: the block, and the modules at which its two terms can be seen."""

    block: nn.Module
    attention: nn.Module
    mlp: nn.Module
    mlp_input: nn.Module | None
    scale: float
    stream_norms: tuple[nn.Module, nn.Module] | None = None  # post-norm: they act on the stream, after attention and after MLP


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A causal language model or an encoder, taken apart."""

    family: str  # config.model_type
    decoder: nn.Module  # or the encoder: embeddings, layers, final norm; no head
    layers: tuple[Layer, ...]

    def __len__(self) -> int:
        return len(self.layers)


def family_of(config) -> Family:
    """The family of a configuration. Raises LLMDropError for an unknown one, saying what to add and where."""
    config = config.get_text_config()
    family = (FAMILIES | ENCODERS).get(config.model_type)
    if callable(family):
        family = family(config)
    if family is None:
        raise LLMDropError(
            f"The model family {config.model_type!r} is unknown. Add it to FAMILIES in llmdrop_utils/models/layouts.py: the "
            "list of layers, the modules whose outputs are added to the residual stream as attention and as MLP, the module "
            "that reads the stream for the MLP, and the modules to remove when attention or MLP is dropped. If it is "
            "built like Llama, its name alone is enough. "
            f"Then add it to tests/families.py. Known: {', '.join(sorted(FAMILIES | ENCODERS))}."
        )
    if family.unsupported:
        raise LLMDropError(f"This {config.model_type} model cannot be taken apart: {family.unsupported}.")
    return family


def find_anatomy(model: nn.Module) -> Anatomy:
    """Take a transformers model apart. Raises LLMDropError for a family that is unknown or not built as stated."""
    if not isinstance(model, nn.Module):
        raise LLMDropError(f"Expected a model, found {type(model).__name__}. `load_model` returns a model and its tokenizer.")
    is_decoder = hasattr(model, "get_decoder") and model.config.model_type not in ENCODERS
    decoder = model.get_decoder() if is_decoder else model.base_model
    config = decoder.config
    family = family_of(config)
    try:
        blocks = decoder.get_submodule(family.layers)
        layers = tuple(_take_apart(block, family) for block in blocks)
    except AttributeError as error:
        raise not_as_stated(config.model_type, error) from error
    return Anatomy(config.model_type, decoder, layers)


def need_decoder(anatomy: Anatomy) -> None:
    """Raise LLMDropError for an encoder, where next tokens are predicted."""
    if anatomy.family in ENCODERS:
        raise LLMDropError(
            f"This {anatomy.family} model is an encoder, which predicts no next token. measure_importance, select and dropped "
            "take it; for all else give a causal language model."
        )


def not_as_stated(model_type: str, error: AttributeError) -> LLMDropError:
    """The error to raise when a model lacks a module that its family names."""
    return LLMDropError(
        f"A {model_type} model is not built as {table_of(model_type)} says ({error}). "
        "transformers may have renamed a module: correct the entry."
    )


def table_of(model_type: str) -> str:
    """Where the entry of a family is, for messages."""
    table, file = ("ENCODERS", "encoder_layouts") if model_type in ENCODERS else ("FAMILIES", "layouts")
    return f"{table} (llmdrop_utils/models/{file}.py)"


def _take_apart(block: nn.Module, family: Family) -> Layer:
    norms = family.stream_norms
    return Layer(
        block=block,
        attention=block.get_submodule(family.attention),
        mlp=block.get_submodule(family.mlp),
        mlp_input=None if family.mlp_input is None else block.get_submodule(family.mlp_input),
        scale=1.0 if family.scale is None else float(getattr(block, family.scale)),
        stream_norms=None if norms is None else (block.get_submodule(norms[0]), block.get_submodule(norms[1])),
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
    device = next(model.get_input_embeddings().parameters()).device
    return device if device.type != "meta" else torch.device("cpu")  # offloaded: accelerate moves inputs itself


def stream_width(config) -> int:
    """How many numbers the residual stream holds per token."""
    return _first(config.get_text_config(), "hidden_size", "n_embd")


def position_limit(config) -> int | None:
    """How many positions a model knows, as its configuration says; None if it does not say."""
    config = config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)  # transformers maps GPT-2's n_positions to it
    return known - config.pad_token_id - 1 if config.model_type in COUNTED_FROM_PADDING else known


COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "mpnet")  # the first position is the one after that of padding


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
