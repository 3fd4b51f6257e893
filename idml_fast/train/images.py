"""Images from files: whatever their mode, eight bits of red, green and blue, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from .. import _checks
from .datasets import DataError, Listing

if TYPE_CHECKING:
    from torchvision.transforms import v2

# Along either side, pixels of a part that is resized for one of the result. With 2 that is 0.2 grey
# levels off on average, and 7 at most; with 1, in three quarters of the time, 0.7 and 11.
ENOUGH = 2
NO_SEED = -1
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

    It can be pickled if ``read`` can, so any kind of worker of a ``DataLoader`` can have it.

    Args:
        root: the folder in which the listing's paths begin.
        listing: of a part of a data set.
        read: makes an image, or what a network is given, of a path; None: `load_image`.

    `reseed` makes what is drawn at random for an image independent of who reads it, and after which
    other ones; at first it is drawn as it comes.
    """

    def __init__(
        self, root: str | Path, listing: Listing, read: Callable[[Path], Any] | None = None
    ) -> None:
        self.root = Path(root)
        self.listing = listing
        self.read = load_image if read is None else read
        # In shared memory: workers are told as well, also those that have begun.
        self.seed = torch.tensor([NO_SEED, NO_SEED]).share_memory_()

    def reseed(self, seed: int, epoch: int) -> None:
        """What ``read`` draws of PyTorch's random numbers for an image now follows from these two,
        and from its place in the listing."""
        self.seed[:] = torch.tensor([seed, epoch])

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        """The image as it is read, its label and ``index``.

        Raises:
            DataError: the image cannot be read.
        """
        seed, epoch = self.seed.tolist()
        with seeded(None if seed == NO_SEED else (seed, epoch, index)):
            image = self.read(self.root / self.listing.paths[index])
        return image, int(self.listing.labels[index]), index


def to_float(images: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]; what is real already is returned as it is."""
    return images if images.is_floating_point() else images.float() / 255


@contextmanager
def seeded(numbers: tuple[int, ...] | None) -> Iterator[None]:
    """PyTorch's random numbers on the CPU begin anew, seeded by these, and are then as before; None
    changes nothing."""
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
    if at_least is not None:
        _checks.integer("at_least", at_least, ">= 1", lambda x: x >= 1)
    with opened(path) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        return upright(to_rgb(image), image)


def load_part(path: str | Path, crop: v2.RandomResizedCrop) -> Image.Image:
    """``crop(load_image(path))``, sooner: the part is drawn before the image is decoded.

    A JPEG is decoded at half, a quarter or an eighth of its size, as long as the part keeps
    `ENOUGH` pixels for one of the result, and the part is resized without being copied first. To
    learn 224 x 224 of it, a photograph of 1600 x 1200 takes three quarters of the time; one of
    500 x 375, whose parts are not that large, as long. At its edges the result also knows what was
    beside them.

    Args:
        path: of the file.
        crop: how a part is drawn, and the size of the result.

    Raises:
        DataError: as for `load_image`.
    """
    with opened(path) as image:
        # As the image lies in the file: what is drawn favours neither side, and is turned with it.
        drawn = crop.make_params([image])
        left, top, width, height = (drawn[x] for x in ("left", "top", "width", "height"))
        box = left, top, left + width, top + height
        high, wide = crop.size
        full, smaller = image.size, max(1, min(width // wide, height // high) // ENOUGH)
        drafted = image.draft(None, (full[0] // smaller, full[1] // smaller))
        if drafted is not None:  # a JPEG; its reduced size was rounded up, but not this one
            reduced = drafted[1][2]
            box = tuple(x * reduced / full[0] for x in box)
        image.load()
        part = to_rgb(image).resize((wide, high), Image.Resampling.BILINEAR, box)
        return upright(part, image)


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The image in a file, not yet decoded.

    Raises:
        DataError: of whatever is raised while it is open: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        raise DataError(f"{path} must be an image, got something else") from None
    except Exception as error:  # decoders of broken files raise what they happen to stumble over
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {why}") from error


def upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Turned as the EXIF data of the ``image`` say that it is made of."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
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
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
