"""Encoders: files of a model -> the bare encoder, and what makes its input from text or images.

An encoder gives a vector for each token of a text, or for each patch of an image. How a sentence encoder makes one vector of
them is published beside its weights (`Pooling`).
"""

import dataclasses
import json
import re
from pathlib import Path

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel

from ..base.errors import LLMDropError
from .config import ENCODERS, full_config, read_config
from .convert import UNREADABLE, first_line
from .encoder_layouts import IMAGES
from .families import family_of, position_limit
from .load import check_weights, load_tokenizer, read_weights, ready
from .locate import IMAGE_SETTINGS, LocatedModel, locate_model

# Weights beside an encoder's own: poolers, heads for masked tokens and classes, and the other half of a pair of encoders.
POOLER = re.compile(r"^pooler\.")
REMAINDERS = re.compile(
    r"(^|\.)(pooler|lm_head|cls|classifier|vocab_(transform|layer_norm|projector)|position_ids|mask_token)(\.|$)"
    r"|^(generator_predictions|generator_lm_head|discriminator_predictions|lm_predictions)\."  # ELECTRA, DeBERTa
    r"|(^|\.)((cls|distillation)_classifier|contact_head)\."  # DeiT, ESM
    r"|^(head|decoder|text_model|text_projection|visual_projection|logit_scale|logit_bias)(\.|$)"
)


def load_encoder(name: str, dtype: torch.dtype | None = None, device: str | None = None):
    """Load an encoder of text or of images for inference.

    Parameters
    ----------
    name: whatever `locate_model` takes. Of a pair of encoders (CLIP, SigLIP) the vision encoder is taken.
    dtype: None takes `default_dtype()`.
    device: None takes the GPU, or the CPU where there is none.

    Returns (model in eval mode, reader): the model gives `last_hidden_state` (n, tokens, width); the reader is a tokenizer, or
    for images `ImageSettings`. `model.llmdrop_pooling` is the published `Pooling`, None if there is none. The pooler of
    BERT and the like is not kept. Raises what `locate_model` raises.
    """
    return load_located_encoder(locate_model(name, ENCODERS), dtype, device)


def load_located_encoder(located: LocatedModel, dtype: torch.dtype | None = None, device: str | None = None):
    """`load_encoder` for files that are on this machine already."""
    try:
        config = read_config(located.name, located.folder, ENCODERS)
        reader = load_reader(located, config)  # what is wrong with the small files costs nothing to find
        return load_encoder_weights(located, config, dtype, device), reader
    except torch.OutOfMemoryError as error:
        raise LLMDropError(f"{located.name} does not fit into the GPU's memory. Use device='cpu'.") from error
    except UNREADABLE as error:
        raise LLMDropError(f"{located.name} could not be loaded: {first_line(error)}") from error


def load_reader(located: LocatedModel, config):
    """What makes the input of an encoder of this configuration: a tokenizer, or `ImageSettings`. Raises LLMDropError for a
    family that cannot be taken apart, and for files that are missing or damaged."""
    if family_of(config).takes == IMAGES:
        return read_image_settings(located)
    reader = load_tokenizer(located)
    known = (longest_text(located), position_limit(config))
    reader.model_max_length = min([reader.model_max_length, *(each for each in known if each)])
    return reader


def attention_of(config) -> str:
    """How attention is computed in an encoder, or encoder-decoder, of this configuration: "sdpa" or "eager"."""
    return "sdpa" if MODEL_MAPPING[type(config)]._supports_sdpa else "eager"


def load_encoder_weights(located: LocatedModel, config, dtype: torch.dtype | None, device: str | None) -> nn.Module:
    """The encoder of this configuration, with the weights of a folder and its published pooling; dtype and device as in
    `load_encoder`."""
    pooling = read_pooling(located)
    is_part = config.model_type != full_config(located.name, located.folder).model_type
    model, found = read_weights(AutoModel, located, config, dtype, attention_of(config))
    for kind, harmless in (("missing_keys", POOLER), ("unexpected_keys", REMAINDERS)):
        found[kind] = {key for key in found[kind] if not harmless.search(key)}
    check_weights(located.name, located.folder, model, found, is_part)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # some checkpoints lack it, and transformers then fills it with random numbers
    model.llmdrop_pooling = pooling
    return ready(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), located)


# ---- what makes the input ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How an image becomes `pixel_values` float (3, height, width): resized, cropped, scaled to 0-1, then (x - mean) / std."""

    height: int
    width: int
    shortest_edge: int | None  # resized until its shorter side has this many pixels, then cropped; None: stretched to fit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int  # filter of PIL: 2 bilinear, 3 bicubic

    def save_pretrained(self, folder: Path) -> None:
        """Write what `read_image_settings` reads."""
        final, edge = {"height": self.height, "width": self.width}, self.shortest_edge
        cropped = {"size": final} if edge is None else {"size": {"shortest_edge": edge}, "crop_size": final}
        more = {"do_center_crop": edge is not None, "image_mean": self.mean, "image_std": self.std, "resample": self.resample}
        (folder / IMAGE_SETTINGS).write_text(json.dumps(cropped | more, indent=1) + "\n", encoding="utf-8")


def read_image_settings(located: LocatedModel) -> ImageSettings:
    """What preprocessor_config.json says. Raises LLMDropError if it cannot be read."""
    try:
        value = json.loads((located.folder / IMAGE_SETTINGS).read_text(encoding="utf-8"))
        is_cropped = value.get("do_center_crop")
        size = {"shortest_edge": int(value["size"])} if is_cropped and isinstance(value["size"], int) else _sides(value["size"])
        final = _sides(value["crop_size"]) if is_cropped else size
        height, width = int(final["height"]), int(final["width"])
        normal = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3} | (value if value.get("do_normalize", True) else {})
        mean, std = (tuple(float(number) for number in normal[key]) for key in ("image_mean", "image_std"))
        return ImageSettings(height, width, size.get("shortest_edge"), mean, std, int(value.get("resample", 2)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LLMDropError(
            f"The {IMAGE_SETTINGS} of {located.name} cannot be read: {first_line(error)}. Download it again."
        ) from error


def _sides(size: dict | int) -> dict:
    """The size of an image; older files give one number. (Where images are cropped, that of their shorter side.)"""
    return size if isinstance(size, dict) else {"height": int(size), "width": int(size)}


def longest_text(located: LocatedModel) -> int | None:
    """How many tokens a sentence encoder reads, as published; None if nothing is."""
    path = located.folder / "sentence_bert_config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("max_seq_length") if path.exists() else None


# ---- one vector of many --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a sentence encoder makes one vector of a text: of its first token ("cls") or the mean of all ("mean")."""

    mode: str
    normalise: bool  # to length 1

    def __call__(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states (n, tokens, width) and mask (n, tokens), nonzero where a token counts -> (n, width)."""
        if self.mode == "cls":
            pooled = states[:, 0]
        else:
            counts = mask.bool().unsqueeze(-1)
            pooled = states.where(counts, 0).sum(1) / counts.sum(1)
        return nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled

    def save_pretrained(self, folder: Path) -> None:
        """Write what `read_pooling` reads, as sentence-transformers does."""
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalise else [])]
        modules = [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules, indent=1) + "\n", encoding="utf-8")
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": self.mode}) + "\n", encoding="utf-8")


def read_pooling(located: LocatedModel) -> Pooling | None:
    """The published pooling of a sentence encoder, from modules.json; None if there is none.

    Raises LLMDropError for one of another kind, and for files that are missing or damaged.
    """
    modules = located.folder / "modules.json"
    if not modules.exists():
        return None
    try:
        listed = json.loads(modules.read_text(encoding="utf-8"))
        kinds = [module["type"].rsplit(".", 1)[-1] for module in listed]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise LLMDropError(
                f"{located.name} makes its vectors by {', '.join(kinds)}. Only Transformer, Pooling and Normalize are known."
            )
        settings = json.loads((located.folder / listed[1]["path"] / "config.json").read_text(encoding="utf-8"))
        modes = _modes(settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise LLMDropError(
            f"How {located.name} makes one vector of a text cannot be read ({first_line(error)}). Download it again, with its "
            "modules.json and the folders that it names."
        ) from error
    if modes not in (["mean"], ["cls"]):
        raise LLMDropError(f"{located.name} pools its tokens by {' and '.join(modes) or 'nothing'}. Only mean or cls is known.")
    return Pooling(modes[0], "Normalize" in kinds)


def _modes(settings: dict) -> list[str]:
    """Which poolings a 1_Pooling/config.json asks for; it has a switch for each, or one name."""
    if isinstance(name := settings.get("pooling_mode"), str):
        return [name]
    known = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    return [known.get(key, key) for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
