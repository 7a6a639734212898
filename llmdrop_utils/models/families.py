"""A model taken apart: its decoder or encoder, its layers, and the modules at which attention and MLP can be seen.

`layouts.FAMILIES`, `encoder_layouts.ENCODERS` and `encoder_decoder_layouts.ENCODER_DECODERS` say where they are in each family.
"""

import dataclasses

import torch
from torch import nn

from ..base.errors import LLMDropError
from .encoder_decoder_layouts import ENCODER_DECODERS, Halves
from .encoder_layouts import ENCODERS
from .layouts import FAMILIES, Family
from .refused import REFUSED, REFUSED_ENCODER_DECODERS

# ---- finding the anatomy of a model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: the block, and the modules at which its terms can be seen."""

    family: Family  # what is stated about it
    block: nn.Module
    attention: nn.Module
    mlp: nn.Module
    mlp_input: nn.Module | None
    scale: float
    has_attention: bool = True  # False: `attention` is another mixer, which a hybrid model has in its place
    stream_norms: tuple[nn.Module, ...] | None = None  # post-norm: they act on the stream, one after each term
    cross_attention: nn.Module | None = None  # in the decoder of an encoder-decoder
    cross_input: nn.Module | None = None

    def has(self, kind: str) -> bool:
        """Is it built with an "attention", "cross_attention" or "mlp", dropped or not?"""
        return {"attention": self.has_attention, "cross_attention": self.cross_attention is not None, "mlp": True}[kind]


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A causal language model, an encoder or an encoder-decoder, taken apart."""

    family: str  # config.model_type
    decoder: nn.Module  # or the encoder: embeddings, layers, final norm; no head
    layers: tuple[Layer, ...]  # of an encoder-decoder those of its encoder, then those of its decoder
    encoder: nn.Module | None = None  # of an encoder-decoder

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def with_attention(self) -> list[int]:
        """Indices of the layers that are built with attention, dropped or not: all of them, but for hybrids."""
        return self.having("attention")

    def having(self, kind: str) -> list[int]:
        """Indices of the layers that are built with something of this kind, dropped or not."""
        return [index for index, layer in enumerate(self.layers) if layer.has(kind)]

    @property
    def n_source(self) -> int:
        """How many of the layers read a source: those of the encoder of an encoder-decoder."""
        return 0 if self.encoder is None else len(self) - len(self.having("cross_attention"))

    @property
    def other_mixers(self) -> str | None:
        """Why what asks for attention in every layer cannot be had of a hybrid model; None for all others."""
        others = sorted(set(range(len(self))) - set(self.with_attention))
        return f"in place of attention, layers {others} have another mixer of tokens" if others else None


def family_of(config) -> Family:
    """The family of a configuration. Raises LLMDropError for a refused one, saying why, and for an unknown one, saying what
    to add and where."""
    config = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise _no_decoder(config.model_type)
    family = (FAMILIES | ENCODERS).get(config.model_type)
    if callable(family):
        family = family(config)
    reason = REFUSED.get(config.model_type) if family is None else family.unsupported
    if reason:
        raise LLMDropError(f"This {config.model_type} model cannot be taken apart: {reason}.")
    if family is None:
        raise LLMDropError(
            f"The model family {config.model_type!r} is unknown. Add it to FAMILIES in llmdrop_utils/models/layouts.py: the "
            "list of layers, the modules whose outputs are added to the residual stream as attention and as MLP, the module "
            "that reads the stream for the MLP, and the modules to remove when attention or MLP is dropped. If it is "
            "built like Llama, its name alone is enough. "
            "An encoder belongs into ENCODERS in encoder_layouts.py beside it. "
            f"Then add it to tests/families.py. Known: {', '.join(sorted(FAMILIES | ENCODERS))}."
        )
    return family


def halves_of(config) -> Halves:
    """What is stated about the halves of an encoder-decoder. Raises LLMDropError for a family that is refused or unknown."""
    name = config.model_type
    if reason := REFUSED_ENCODER_DECODERS.get(name):
        raise LLMDropError(f"This {name} model cannot be taken apart: {reason}.")
    if name not in ENCODER_DECODERS:
        raise LLMDropError(
            f"The encoder-decoder family {name!r} is unknown. Add it to ENCODER_DECODERS in "
            "llmdrop_utils/models/encoder_decoder_layouts.py, and a tiny model to tests/encoder_decoder_families.py. Known: "
            f"{', '.join(sorted(ENCODER_DECODERS))}."
        )
    return ENCODER_DECODERS[name]


def find_anatomy(model: nn.Module) -> Anatomy:
    """Take a transformers model apart. Raises LLMDropError for a family that is unknown or not built as stated."""
    if not isinstance(model, nn.Module):
        raise LLMDropError(f"Expected a model, found {type(model).__name__}. `load_model` returns a model and its tokenizer.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _find_halves(model)
    decoder = _decoder_of(model)
    config = decoder.config
    family = family_of(config)
    try:
        blocks = decoder.get_submodule(family.layers)
        kinds = _layer_types(config) if family.mixer else None
        layers = tuple(
            _take_apart(block, family, kinds is None or kinds[index] not in MIXERS) for index, block in enumerate(blocks)
        )
    except AttributeError as error:
        raise not_as_stated(config.model_type, error) from error
    return Anatomy(config.model_type, decoder, layers)


def _find_halves(model: nn.Module) -> Anatomy:
    """An encoder-decoder taken apart."""
    name, halves = model.config.model_type, halves_of(model.config)
    try:
        encoder, decoder = model.get_encoder(), model.get_decoder()
        layers = tuple(
            _take_apart(block, family, has_attention=True)
            for stack, family in ((encoder, halves.encoder), (decoder, halves.decoder))
            for block in stack.get_submodule(family.layers)
        )
        readers = [
            layer.block.get_submodule(halves.decoder.attention_unit[0]) for layer in layers if layer.has("cross_attention")
        ]
    except AttributeError as error:
        raise not_as_stated(name, error) from error
    if not all(getattr(reader, "is_causal", True) for reader in readers):  # UMT5 in transformers 5.17
        raise LLMDropError(
            f"This {name} model cannot be taken apart: its decoder sees tokens that are still to come, an error of this "
            "version of transformers. Install a later one."
        )
    return Anatomy(name, decoder, layers, encoder)


def _decoder_of(model: nn.Module) -> nn.Module:
    """The decoder or encoder without its head."""
    is_decoder = hasattr(model, "get_decoder") and model.config.model_type not in ENCODERS
    is_bare = hasattr(model, "embeddings")  # DINOv3 calls its layers alone its base model
    decoder = model.get_decoder() if is_decoder else model if is_bare else model.base_model
    if hasattr(decoder, "lm_head") or not hasattr(decoder, "config"):  # Llama 4 gives all of it; ModernBERT's head is "decoder"
        decoder = model.model
    return decoder


def need_decoder(anatomy: Anatomy) -> None:
    """Raise LLMDropError for an encoder or an encoder-decoder, where next tokens of a text are predicted."""
    if anatomy.encoder is not None:
        raise _no_decoder(anatomy.family)
    if anatomy.family in ENCODERS:
        raise LLMDropError(
            f"This {anatomy.family} model is an encoder, which predicts no next token. measure_importance, select, dropped, "
            "save_dropped and quantise take it; for all else give a causal language model."
        )


def _no_decoder(model_type: str) -> LLMDropError:
    """The error to raise for an encoder-decoder where next tokens of a text are predicted."""
    return LLMDropError(
        f"This {model_type} model is an encoder-decoder, which predicts a target from a source. measure_importance, "
        "score_targets, select, dropped and quantise take it; for all else give a causal language model."
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
    if model_type in ENCODER_DECODERS:
        table, file = "ENCODER_DECODERS", "encoder_decoder_layouts"
    return f"{table} (llmdrop_utils/models/{file}.py)"


def _layer_types(config) -> list[str]:
    if kinds := getattr(config, "layer_types", None):
        for index, kind in enumerate(kinds):
            if kind not in MIXERS and not kind.endswith("attention"):
                raise LLMDropError(
                    f"Layer {index} of this {config.model_type} model is of the kind {kind!r}, which is unknown. Known are "
                    f"kinds of attention, and {' and '.join(MIXERS)} in its place."
                )
        return kinds
    raise LLMDropError(
        f"This transformers does not say which layers of {config.model_type} models have attention. Install a later one."
    )


MIXERS = ("linear_attention", "conv")  # layer types that have no attention, and no keys and values in the cache


def _take_apart(block: nn.Module, family: Family, has_attention: bool) -> Layer:
    norms, module = family.stream_norms, block.get_submodule
    return Layer(
        family=family,
        block=block,
        attention=block.get_submodule(family.attention if has_attention else family.mixer or ""),
        mlp=block.get_submodule(family.mlp),
        mlp_input=None if family.mlp_input is None else block.get_submodule(family.mlp_input),
        scale=1.0 if family.scale is None else float(getattr(block, family.scale)),
        has_attention=has_attention,
        stream_norms=None if norms is None else tuple(module(name) for name in norms),
        cross_attention=None if family.cross_attention is None else module(family.cross_attention),
        cross_input=None if family.cross_input is None else module(family.cross_input),
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
    return first_of(config.get_text_config(), "hidden_size", "n_embd")


def position_limit(config) -> int | None:
    """How many positions a model knows, as its configuration says; None if it does not say."""
    config = config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)  # transformers maps GPT-2's n_positions to it
    return known - config.pad_token_id - 1 if config.model_type in COUNTED_FROM_PADDING else known


COUNTED_FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "data2vec-text",
    "esm",
    "mpnet",
)  # the first position is the one after that of padding


LEARNED = {"gpt2", "opt", "gpt_bigcode", "gpt_neo", "biogpt", "ctrl"}  # (those of CTRL are a table of sines that ends)


def learned_positions(config) -> int | None:
    """How many positions a model has learned vectors for; None if it computes positions, as most do."""
    return position_limit(config) if config.get_text_config().model_type in LEARNED else None


def first_of(config, *names: str) -> int:
    """The first of these settings that a configuration has."""
    return next(value for name in names if (value := getattr(config, name, None)) is not None)
