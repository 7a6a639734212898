"""Texts or images -> what an encoder reads -> one embedding of each."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..models.encoder_layouts import ENCODERS
from ..models.encoders import ImageSettings, Pooling
from ..models.families import family_of, find_anatomy
from .guard import evaluating

CLASS_TOKENS = ("cls_token", "class_embedding")  # names of what a vision transformer puts before the patches


def prepare(reader, samples: Sequence) -> dict[str, torch.Tensor]:
    """What an encoder reads: of texts `input_ids` and `attention_mask`, of images `pixel_values`.

    reader: from `load_encoder`, a tokenizer or `ImageSettings`. samples: texts, which are padded to the longest and cut at
    what the model knows; or images as uint8 (height, width, 3), which are scaled and normalised as published. Raises
    LLMDropError for texts given to a model of images, and for images given to one of text.
    """
    reads_images = isinstance(reader, ImageSettings)
    wrong = [sample for sample in samples if isinstance(sample, str) == reads_images]
    if isinstance(samples, str) or not len(samples) or wrong:
        wanted = "a list of images, uint8 (height, width, 3)" if reads_images else "a list of texts"
        given = "one text" if isinstance(samples, str) else f"some {type(wrong[0]).__name__}" if wrong else "nothing"
        raise LLMDropError(f"This model reads {wanted}, but was given {given}.")
    if reads_images:
        return {"pixel_values": torch.stack([_pixels(reader, sample) for sample in samples])}
    return dict(reader(list(samples), padding=True, truncation=True, return_tensors="pt"))


def _pixels(settings: ImageSettings, image: np.ndarray) -> torch.Tensor:
    """One image as float32 (3, height, width)."""
    if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise LLMDropError(
            f"Expected images as uint8 (height, width, 3), found {getattr(image, 'shape', type(image).__name__)}."
        )
    picture = Image.fromarray(image)
    if settings.shortest_edge is None:
        size = (settings.width, settings.height)
    else:
        scale = settings.shortest_edge / min(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling(settings.resample))
    left, top = (picture.width - settings.width) // 2, (picture.height - settings.height) // 2
    picture = picture.crop((left, top, left + settings.width, top + settings.height))
    shades = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    return (shades - torch.tensor(settings.mean).view(3, 1, 1)) / torch.tensor(settings.std).view(3, 1, 1)


def embed(
    model: nn.Module,
    reader,
    samples: Sequence,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda n_samples: None,
) -> np.ndarray:
    """One vector for each text or image, float64 (n_samples, width).

    model, reader: from `load_encoder`; the model may lack layers (`dropped`). Sentence encoders pool as published, other
    text encoders by the mean over tokens. Of images it is the class token's state, or without one the mean over patches.
    on_batch: called after each batch with the number of samples done. Raises what `prepare` raises, and LLMDropError for a
    model that is no encoder and for the reader of another one.
    """
    batch_size, embeddings = whole(batch_size, "The batch size"), []
    _check_reader(model, reader)
    if isinstance(samples, str):
        prepare(reader, samples)  # which says what is wrong: each letter would be a text
    with evaluating(model):
        for start in range(0, len(samples), batch_size):
            inputs = prepare(reader, samples[start : start + batch_size])
            given = {name: _for_model(tensor, model) for name, tensor in inputs.items()}
            states = model(**given).last_hidden_state.float()
            mask = given.get("attention_mask", torch.ones(states.shape[:2], device=states.device))
            embeddings.append(pooling_of(model)(states, mask).double().cpu().numpy())
            on_batch(len(embeddings[-1]))
    return np.concatenate(embeddings) if embeddings else np.zeros((0, 0))


def _check_reader(model: nn.Module, reader) -> None:
    anatomy = find_anatomy(model)
    if anatomy.family not in ENCODERS:
        raise LLMDropError(f"This {anatomy.family} model is no encoder. load_encoder loads one.")
    if (family_of(anatomy.decoder.config).takes[0] == "pixel_values") != isinstance(reader, ImageSettings):
        raise LLMDropError(
            f"A {type(reader).__name__} makes no input for a {anatomy.family} model. Give the reader that load_encoder "
            "returned with it."
        )


def _for_model(tensor: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """On its device; pixels in its dtype."""
    return tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)


def pooling_of(model: nn.Module) -> Pooling:
    """How states become one vector: as published, or the class token of images, or the mean."""
    published = getattr(model, "llmdrop_pooling", None)
    has_class_token = any(name.endswith(CLASS_TOKENS) for name, _ in model.named_parameters())
    return published or Pooling("cls" if has_class_token else "mean", normalise=False)
