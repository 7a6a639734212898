"""Sets of labelled images: digits, and crops of pictures."""

import numpy as np
import pytest

from llmdrop_utils import LLMDropError
from llmdrop_utils.sources import images as module
from llmdrop_utils.sources.images import Images, _crops, fingerprint_images, load_images


def picture(height, width, value):
    """Each pixel tells where it is: line, column, picture."""
    lines, columns = np.mgrid[:height, :width]
    return np.stack([lines, columns, np.full_like(lines, value)], 2).astype(np.uint8)


def test_crops_are_cells_of_the_square_in_the_middle():
    """A picture of 5 x 8 has a middle of 4 x 4 from line 0 and column 2: cells of 2 x 2, each once, in turns."""
    crops = _crops({"wide": picture(5, 8, 1), "small": picture(4, 4, 2)}, cells=2)
    assert list(crops.labels) == ["wide", "small"] * 4
    assert list(crops.groups) == [0, 1] * 4
    assert {crop.shape for crop in crops.pixels} == {(2, 2, 3)}
    wide, small = ([tuple(crop[0, 0]) for crop in crops.pixels[i::2]] for i in (0, 1))
    assert sorted(wide) == [(0, 2, 1), (0, 4, 1), (2, 2, 1), (2, 4, 1)]
    assert sorted(small) == [(0, 0, 2), (0, 2, 2), (2, 0, 2), (2, 2, 2)]
    assert [(line, column - 2) for line, column, _ in wide] != [(line, column) for line, column, _ in small]


def test_images_come_in_the_order_of_their_groups(monkeypatch):
    crops = _crops({"a": picture(4, 4, 1), "b": picture(4, 4, 2)}, cells=2)
    monkeypatch.setattr(module, "_all_images", lambda name: crops)
    first, rest = load_images("hand", 4), load_images("hand", 4, skip=4)
    assert list(first.labels) == list(rest.labels) == ["a", "a", "b", "b"]
    corners = [tuple(crop[0, 0]) for part in (first, rest) for crop in part.pixels]
    assert len(set(corners)) == 8  # what is skipped is in no other part
    with pytest.raises(LLMDropError, match="The images 'hand' are 8, but 9 were asked for"):
        load_images("hand", 5, skip=4)


def test_digits():
    digits = load_images("digits", 30)
    assert list(digits.labels[:12]) == list("012345678901")
    assert digits.pixels[0].shape == (8, 8, 3)
    assert digits.pixels[0].dtype == np.uint8
    assert max(image.max() for image in digits.pixels) == 255
    assert list(digits.groups) == list(range(30))


def test_unknown_images():
    with pytest.raises(LLMDropError, match="Unknown images 'cats'. data/sources.yaml has: photographs, digits"):
        load_images("cats", 1)


def test_fingerprint_of_images():
    one = Images([picture(2, 3, 1), picture(2, 3, 2)], np.array(["a", "b"]), np.arange(2)).pixels
    others = [one[::-1], one[:1], [picture(3, 2, 1), picture(2, 3, 2)], [picture(2, 3, 1), picture(2, 3, 3)]]
    assert len({fingerprint_images(each) for each in [one, *others]}) == 5
