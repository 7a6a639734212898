"""What encoders read, and one vector of it."""

import encoder_families
import families
import numpy as np
import pytest
import torch

from llmdrop_utils import LLMDropError
from llmdrop_utils.measure.encoding import embed, pooling_of, prepare
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.encoders import ImageSettings, Pooling

SETTINGS = ImageSettings(height=24, width=24, shortest_edge=None, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0), resample=2)


def flat(height, width, *shades):
    """An image of one colour."""
    return np.full((height, width, 3), shades, dtype=np.uint8)


def test_images_are_scaled_and_normalised():
    """255 is 1: (1 - 0.5) / 0.5 = 1; 0 is (0 - 0.25) / 0.25 = -1; 51 is 0.2."""
    pixels = prepare(SETTINGS, [flat(6, 8, 255, 0, 51), flat(40, 30, 0, 255, 0)])["pixel_values"]
    assert pixels.shape == (2, 3, 24, 24)
    assert torch.allclose(pixels[0].flatten(1).mean(1), torch.tensor([1, -1, 0.2]))
    assert torch.allclose(pixels[1].flatten(1).mean(1), torch.tensor([-1.0, 3, 0]))


def test_the_shorter_side_is_fitted_and_the_middle_kept():
    """20 x 60 with a bright middle third: at 4 x 12 the middle 4 x 4 are those 20 columns."""
    settings = ImageSettings(4, 4, shortest_edge=4, mean=(0.0,) * 3, std=(1.0,) * 3, resample=0)
    image = np.zeros((20, 60, 3), dtype=np.uint8)
    image[:, 20:40] = 255
    assert torch.equal(prepare(settings, [image])["pixel_values"], torch.ones(1, 3, 4, 4))


def test_texts_are_padded():
    given = prepare(byte_tokenizer(), ["ab", "abcd"])
    assert given["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("reader", "samples", "message"),
    [
        (SETTINGS, ["a cat"], r"This model reads a list of images, uint8 \(height, width, 3\), but was given some str\."),
        (byte_tokenizer(), [flat(2, 2, 0, 0, 0)], r"This model reads a list of texts, but was given some ndarray\."),
        (byte_tokenizer(), ["a", flat(2, 2, 0, 0, 0)], r"This model reads a list of texts, but was given some ndarray\."),
        (byte_tokenizer(), "a cat", "but was given one text"),
        (SETTINGS, "a cat", "but was given one text"),
        (SETTINGS, [], "but was given nothing"),
        (SETTINGS, [np.zeros((3, 24, 24))], r"Expected images as uint8 \(height, width, 3\), found \(3, 24, 24\)\."),
        (SETTINGS, [flat(2, 2, 0, 0, 0)[:, :, 0]], r"found \(2, 2\)\."),
    ],
)
def test_what_a_model_does_not_read(reader, samples, message):
    with pytest.raises(LLMDropError, match=message):
        prepare(reader, samples)


def test_images_in_one_array():
    images = np.stack([flat(9, 9, 1, 2, 3), flat(9, 9, 200, 0, 0)])
    assert torch.equal(prepare(SETTINGS, images)["pixel_values"], prepare(SETTINGS, list(images))["pixel_values"])


@pytest.mark.parametrize(
    ("model", "reader", "samples", "message"),
    [
        (lambda: encoder_families.tiny("vit"), byte_tokenizer(), ["a"], r"A \w+ makes no input for a vit model"),
        (lambda: encoder_families.tiny("bert"), SETTINGS, [flat(9, 9, 1, 2, 3)], "A ImageSettings makes no input for a bert"),
        (lambda: encoder_families.tiny("bert"), byte_tokenizer(), "a cat", "but was given one text"),
        (lambda: families.tiny("llama"), byte_tokenizer(), ["a"], "This llama model is no encoder. load_encoder loads one"),
    ],
)
def test_what_cannot_be_embedded(model, reader, samples, message):
    with pytest.raises(LLMDropError, match=message):
        embed(model(), reader, samples)


def test_padding_does_not_count():
    """A text alone and beside a longer one; the mean over its own tokens."""
    model, texts = encoder_families.tiny("bert", vocab_size=257).double(), ["ab", "abcdef"]
    tokenizer = byte_tokenizer()
    together, alone = embed(model, tokenizer, texts), embed(model, tokenizer, texts, batch_size=1)
    assert together == pytest.approx(alone, abs=1e-6)
    states = model(**tokenizer(["ab"], return_tensors="pt")).last_hidden_state[0]
    assert together[0] == pytest.approx(states.mean(0).detach().numpy(), abs=1e-6)


def test_images_have_their_class_token():
    model, images, done = encoder_families.tiny("dinov2"), [flat(9, 9, 1, 2, 3), flat(9, 9, 200, 0, 0)], []
    states = encoder_families.read(model, prepare(SETTINGS, images)["pixel_values"])
    assert embed(model, SETTINGS, images, batch_size=1, on_batch=done.append) == pytest.approx(states[:, 0].numpy(), abs=1e-5)
    assert done == [1, 1]


def test_pooling():
    assert pooling_of(encoder_families.tiny("vit")).mode == "cls"
    assert pooling_of(encoder_families.tiny("clip")).mode == "cls"
    assert pooling_of(encoder_families.tiny("siglip")).mode == "mean"  # it has no class token
    model = encoder_families.tiny("bert")
    assert pooling_of(model).mode == "mean"
    model.llmdrop_pooling = Pooling("cls", normalise=True)
    assert pooling_of(model).mode == "cls"
