"""Images from files: whatever their mode, eight bits of red, green and blue, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import Dataset

from .. import _checks
from .datasets import DataError, Listing

# What turns an image upright, by its EXIF orientation. `ImageOps.exif_transpose` also writes the
# EXIF data anew, and fails where these are broken.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Images(Dataset[tuple[Any, int, int]]):
    """The images of a listing, each with its label and its place in the listing.

    It can be pickled if ``transform`` can, so any kind of worker of a ``DataLoader`` can have it.

    Args:
        root: the folder in which the listing's paths begin.
        listing: of a part of a data set.
        transform: is given the image as ``PIL.Image`` of mode RGB; None: that is what is returned.
        at_least: see `load_image`.

    Attributes:
        seed: numbers, such as those of a run and of its epoch, that together with its place give
            what the transform draws of PyTorch's random numbers for an image, whoever reads it and
            after which other ones; None, as it is at first: they are drawn as they come.
    """

    def __init__(
        self,
        root: str | Path,
        listing: Listing,
        transform: Callable[[Image.Image], Any] | None = None,
        *,
        at_least: int | None = None,
    ) -> None:
        if at_least is not None:
            _checks.integer("at_least", at_least, ">= 1", lambda x: x >= 1)
        self.root = Path(root)
        self.listing = listing
        self.transform = transform
        self.at_least = at_least
        self.seed: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        """The transformed image, its label and ``index``.

        Raises:
            DataError: the image cannot be read.
        """
        image = load_image(self.root / self.listing.paths[index], self.at_least)
        if self.transform is not None:
            with seeded(self.seed and (*self.seed, index)):
                image = self.transform(image)
        return image, int(self.listing.labels[index]), index


@contextmanager
def seeded(numbers: tuple[int, ...] | None) -> Iterator[None]:
    """PyTorch's random numbers on the CPU begin anew, seeded by these, and are then as before.

    None changes nothing.
    """
    if numbers is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64).item()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed a GPU as well
        yield


def load_image(path: str | Path, at_least: int | None = None) -> Image.Image:
    """The image in a file, of mode RGB, upright.

    What is upright is told by its EXIF data: to a network, a photograph that lies on its side is
    another one. (Code that opens and converts, as is usual, lets it lie.)

    Args:
        path: of the file.
        at_least: a JPEG is decoded at half, a quarter or an eighth of its size, as long as neither
            side falls below so many pixels; None: at its size. A photograph of 1600 x 1200 that is
            then resized to 256 takes 4 ms instead of 18. It is not quite what a resize alone makes
            of it: one or two grey levels off on average if this is twice what the resize asks for,
            up to five if it is the same. A random crop magnifies what it cuts out: it needs more.

    Raises:
        DataError: the file is missing, is cut off, or holds no image that can be read.
    """
    try:
        with Image.open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            rgb = to_rgb(image)
    except UnidentifiedImageError:
        raise DataError(f"{path} must be an image, got something else") from None
    except Exception as error:  # decoders of broken files raise what they happen to stumble over
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {why}") from error
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue of an image of any mode.

    Grey becomes three equal channels; what is transparent, by an alpha channel or in a palette, is
    laid on white, for what lies under it is arbitrary; of 16 bits the upper 8 stay; CMYK is
    converted by Pillow's plain formula, and colour profiles are not applied. Colours of a palette
    are looked up.

    >>> to_rgb(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0))
    (127, 127, 127)

    Raises:
        ValueError: the pixels are integers of 32 bits or real numbers, and none of them is white.
    """
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"which of the numbers in its pixels (mode {image.mode}) is white?")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
