"""Encoder-decoders: files of a model -> the model and its tokenizer."""

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from ..base.errors import LLMDropError
from .config import ENCODER_DECODERS, full_config, kind_of, read_config
from .convert import UNREADABLE, first_line
from .encoders import attention_of, load_located_encoder
from .families import halves_of, position_limit
from .load import check_weights, load_tokenizer, read_weights, ready
from .locate import LocatedModel, locate_model


def load_encoder_decoder(name: str, dtype: torch.dtype | None = None, device: str | None = None):
    """Load an encoder-decoder that reads text and writes text (T5, BART) for inference.

    Parameters
    ----------
    name: whatever `locate_model` takes.
    dtype: None takes `default_dtype()`.
    device: None takes the GPU, or the CPU where there is none.

    Returns (model in eval mode, tokenizer, which cuts texts at what the model knows). Raises what `locate_model` raises, and
    LLMDropError for a family that cannot be taken apart.
    """
    return load_located_encoder_decoder(locate_model(name, ENCODER_DECODERS), dtype, device)


def load_located_encoder_decoder(located: LocatedModel, dtype: torch.dtype | None = None, device: str | None = None):
    """`load_encoder_decoder` for files that are on this machine already."""
    try:
        config = read_config(located.name, located.folder, ENCODER_DECODERS)
        halves_of(config)
        tokenizer = load_tokenizer(located)
        tokenizer.model_max_length = min(tokenizer.model_max_length, position_limit(config) or tokenizer.model_max_length)
        return _load_weights(located, config, dtype, device), tokenizer
    except torch.OutOfMemoryError as error:
        raise LLMDropError(f"{located.name} does not fit into the GPU's memory. Use device='cpu'.") from error
    except UNREADABLE as error:
        raise LLMDropError(f"{located.name} could not be loaded: {first_line(error)}") from error


def load_located_other(located: LocatedModel, dtype: torch.dtype | None = None, device: str | None = None):
    """An encoder or an encoder-decoder, whichever it is, and what makes its input."""
    is_pair = kind_of(full_config(located.name, located.folder)) in ENCODER_DECODERS
    return (load_located_encoder_decoder if is_pair else load_located_encoder)(located, dtype, device)


def _load_weights(located: LocatedModel, config, dtype: torch.dtype | None, device: str | None) -> nn.Module:
    model, found = read_weights(AutoModelForSeq2SeqLM, located, config, dtype, attention_of(config))
    check_weights(located.name, located.folder, model, found)
    return ready(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), located)
