"""Named sets of labelled images that come with packages: handwritten digits, and photographs cut into crops."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..base.checks import whole
from ..base.errors import LLMDropError
from .catalogue import catalogue
from .fetch import fetch_package_files


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels: pixels uint8 (height, width, 3), of sizes that differ."""

    pixels: list[np.ndarray]
    labels: np.ndarray  # (n_images,) of text
    groups: np.ndarray  # int (n_images,): images of one group (crops of one photograph) are no independent samples

    def __len__(self) -> int:
        return len(self.pixels)


def load_images(name: str, n: int, skip: int = 0) -> Images:
    """n images of a set in data/sources.yaml; the first `skip` are left out.

    They are taken in turns from all labels and given in the order of their groups. Raises LLMDropError if the set is unknown or
    too small, and NotAvailable if it cannot be fetched.
    """
    n, skip = whole(n, "The number of images"), whole(skip, "The number of images to skip", at_least=0)
    every = _all_images(name)
    if len(every) < skip + n:
        raise LLMDropError(f"The images {name!r} are {len(every):,}, but {skip + n:,} were asked for. Ask for fewer.")
    chosen = np.arange(skip, skip + n)
    chosen = chosen[np.argsort(every.groups[chosen], kind="stable")]
    return Images([every.pixels[i] for i in chosen], every.labels[chosen], every.groups[chosen])


@functools.cache
def _all_images(name: str) -> Images:
    source = catalogue()["images"].get(name)
    if source is None:
        raise LLMDropError(f"Unknown images {name!r}. data/sources.yaml has: {', '.join(catalogue()['images'])}.")
    return _digits() if "digits" in source else _crops(_photographs(source), source["cells"])


def _digits() -> Images:
    """The digits of scikit-learn: 8 x 8 pixels, 16 shades; each is a sample of its own."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    shades = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Images(
        [np.repeat(image[:, :, None], 3, axis=2) for image in shades], digits.target.astype(str), np.arange(len(shades))
    )


def _photographs(source: dict) -> dict[str, np.ndarray]:
    """Name -> pixels, of pictures in packages and of those that come with scikit-learn."""
    from sklearn.datasets import load_sample_image

    files = fetch_package_files(source["packages"])
    pictures = {file.stem: np.asarray(Image.open(file).convert("RGB")) for file in files}
    return pictures | {name.split(".")[0]: load_sample_image(name) for name in source["of_scikit_learn"]}


def _crops(pictures: dict[str, np.ndarray], cells: int) -> Images:
    """The square in the middle of each picture, cut into cells x cells squares that do not overlap.

    The order of the cells is random, another for each picture: first one cell of each picture, then a second of each.
    """
    order = {name: np.random.default_rng(i).permutation(cells**2) for i, name in enumerate(pictures)}
    pixels, labels, groups = [], [], []
    for turn in range(cells**2):
        for group, (name, picture) in enumerate(pictures.items()):
            side = min(picture.shape[:2]) // cells
            line, column = divmod(int(order[name][turn]), cells)
            top, left = (
                (length - cells * side) // 2 + side * at for length, at in zip(picture.shape, (line, column), strict=False)
            )
            pixels.append(picture[top : top + side, left : left + side])
            labels.append(name)
            groups.append(group)
    return Images(pixels, np.array(labels), np.array(groups))


def fingerprint_images(images: Sequence[np.ndarray]) -> str:
    """sha256 of images and their sizes, in hex: what the key of a result records about its input."""
    content = hashlib.sha256()
    for pixels in images:
        content.update(str(pixels.shape).encode() + np.ascontiguousarray(pixels, dtype=np.uint8).tobytes())
    return content.hexdigest()
