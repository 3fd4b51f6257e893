"""Image files: every mode becomes RGB in the way that is stated, and what is broken is named."""

from __future__ import annotations

import os
import pickle
import random
import re
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from idml_fast.train.datasets import DataError, Listing
from idml_fast.train.images import Images, load_image

WIDTH, HEIGHT = 5, 4


def noise(*shape: int, high: int = 256, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def photograph(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth, so that JPEG keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    planes = 255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def saved(tmp_path: Path, image: Image.Image, name: str = "image.png", **options) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def loaded(path: Path, at_least: int | None = None) -> np.ndarray:
    image = load_image(path, at_least)
    assert image.mode == "RGB"
    return np.asarray(image)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours [..., 3] with an opacity [...] from 0 to 255, laid on white."""
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


# ------------------------------------------------------------------------------ modes


def test_rgb_stays(tmp_path):
    pixels = noise(HEIGHT, WIDTH, 3)
    assert np.array_equal(loaded(saved(tmp_path, Image.fromarray(pixels))), pixels)


@pytest.mark.parametrize("name", ["image.png", "image.jpg"])
def test_grey_becomes_three_equal_channels(tmp_path, name):
    path = saved(tmp_path, photograph().convert("L"), name)
    with Image.open(path) as there:
        assert there.mode == "L"
        grey = np.asarray(there)
    assert np.array_equal(loaded(path), np.stack([grey] * 3, axis=-1))


def test_black_and_white(tmp_path):
    pixels = noise(HEIGHT, WIDTH, high=2).astype(bool)
    path = saved(tmp_path, Image.fromarray(pixels))
    assert np.array_equal(loaded(path), np.stack([255 * pixels] * 3, axis=-1))


def palette_image(colours: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """An image in these colours, and which of them each pixel has."""
    indices = noise(HEIGHT, WIDTH, high=len(colours))
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    return image, indices


def test_a_palette_is_looked_up(tmp_path):
    colours = noise(7, 3)
    image, indices = palette_image(colours)
    path = saved(tmp_path, image)
    with Image.open(path) as there:
        assert there.mode == "P"
    assert np.array_equal(loaded(path), colours[indices])


@pytest.mark.parametrize("alpha", [b"\0\x80\xff\x40", 2], ids=["alphas", "one colour"])
def test_what_is_transparent_in_a_palette_is_laid_on_white(tmp_path, alpha):
    colours = noise(4, 3)
    image, indices = palette_image(colours)
    path = saved(tmp_path, image, transparency=alpha)
    opacity = np.frombuffer(alpha, np.uint8) if isinstance(alpha, bytes) else [255, 255, 0, 255]
    wanted = on_white(colours[indices], np.asarray(opacity)[indices])
    assert np.abs(loaded(path) - wanted).max() <= 1  # rounding


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_is_laid_on_white(tmp_path, mode):
    pixels = noise(HEIGHT, WIDTH, len(mode))
    pixels[0, 0, -1], pixels[0, 1, -1] = 0, 255
    path = saved(tmp_path, Image.fromarray(pixels))
    colour = pixels[..., :-1] if mode == "RGBA" else np.repeat(pixels[..., :1], 3, axis=-1)
    assert np.abs(loaded(path) - on_white(colour, pixels[..., -1])).max() <= 1
    assert loaded(path)[0, 0].tolist() == [255, 255, 255]
    assert loaded(path)[0, 1].tolist() == colour[0, 1].tolist()


@pytest.mark.parametrize("mode, clear", [("RGB", (10, 20, 30)), ("L", 10)])
def test_one_transparent_colour_becomes_white(tmp_path, mode, clear):
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), 99 if mode == "L" else (1, 2, 3))
    found = loaded(saved(tmp_path, image, transparency=clear))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == ([99] * 3 if mode == "L" else [1, 2, 3])


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
def test_of_sixteen_bits_the_upper_eight_stay(tmp_path, name):
    deep = noise(HEIGHT, WIDTH, high=65536, dtype=np.uint16)
    deep[0, :3] = 0, 65535, 256
    path = saved(tmp_path, Image.fromarray(deep), name)
    with Image.open(path) as there:
        assert there.mode in ("I;16", "I")
    assert np.array_equal(loaded(path), np.stack([deep >> 8] * 3, axis=-1))


def test_cmyk_is_converted_by_the_plain_formula(tmp_path):
    path = saved(tmp_path, photograph().convert("CMYK"), "image.jpg", quality=100)
    with Image.open(path) as there:
        assert there.mode == "CMYK"
        ink = np.asarray(there).astype(float) / 255
    wanted = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert np.abs(loaded(path) - wanted).max() <= 1.5


@pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
def test_numbers_without_a_white_are_refused(tmp_path, dtype, mode):
    path = saved(tmp_path, Image.fromarray(noise(HEIGHT, WIDTH, dtype=dtype)), "image.tif")
    sentence = f"{path} cannot be read: which of the numbers in its pixels (mode {mode}) is white?"
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        load_image(path)


# ------------------------------------------------------------------------------ upright


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("name", ["image.jpg", "image.png"])
def test_images_are_turned_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, photograph(24, 16), name, exif=exif)
    with Image.open(path) as there:
        wanted = np.asarray(ImageOps.exif_transpose(there))
    assert np.array_equal(loaded(path), wanted)
    assert wanted.shape == ((24, 16, 3) if 5 <= orientation <= 8 else (16, 24, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_data_do_not_break_an_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9003] = 6, "maker", "2020:01:01"
    path = saved(tmp_path, photograph(), "image.jpg", exif=exif)
    data = path.read_bytes()
    begin = data.index(b"Exif")
    end = begin + len(exif.tobytes())
    draw = random.Random(0)
    upright = 0
    for _ in range(500):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(begin, end)] = draw.randrange(256)
        path.write_bytes(broken)
        upright += loaded(path).shape == (WIDTH, HEIGHT, 3)
    assert 0 < upright < 500  # it was still read, or no more


# ------------------------------------------------------------------------------ reduced


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("width, height", [(64, 64), (257, 256), (799, 601), (100, 33), (16, 900)])
def test_a_reduced_image_is_never_smaller_than_asked_for(tmp_path, mode, width, height):
    path = saved(tmp_path, photograph(width, height).convert(mode), "image.jpg")
    for at_least in (1, 7, 8, 32, 33, 100, 256, 300, 2000):
        found = loaded(path, at_least)
        assert min(found.shape[:2]) >= min(at_least, width, height)
        scales = [s for s in (1, 2, 4, 8) if min(width, height) // s >= at_least or s == 1]
        assert found.shape[:2] == tuple(-(-side // scales[-1]) for side in (height, width))


def test_a_reduced_image_is_the_same_image(tmp_path):
    path = saved(tmp_path, photograph(640, 480), "image.jpg", quality=95)
    small = photograph(640, 480).resize((160, 120), Image.Resampling.BOX)
    assert loaded(path, 100).shape == (120, 160, 3)
    assert np.abs(loaded(path, 100) - np.asarray(small).astype(float)).max() < 8


def test_a_reduced_image_is_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, photograph(640, 320), "image.jpg", exif=exif)
    assert loaded(path, 80).shape == (160, 80, 3)


def test_only_jpeg_is_reduced(tmp_path):
    assert loaded(saved(tmp_path, photograph(64, 64)), 8).shape == (64, 64, 3)


@pytest.mark.parametrize("at_least, error", [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_at_least_how_many_pixels(tmp_path, at_least, error):
    path = saved(tmp_path, photograph())
    with pytest.raises(error, match=r"^at_least must be (>= 1|an integer), got "):
        load_image(path, at_least)


# ------------------------------------------------------------------------------ refusals


def refused(path: Path, sentence: str, at_least: int | None = None) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} {sentence}$"):
        load_image(path, at_least)


@pytest.mark.parametrize("at_least", [None, 8])
@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.webp", "image.bmp", "image.ppm"])
def test_an_image_that_is_cut_off_is_named(tmp_path, name, at_least):
    """Wherever it is cut off; without its very last byte it may still be whole."""
    path = saved(tmp_path, Image.fromarray(noise(32, 32, 3)), name)
    whole, data = loaded(path, at_least), path.read_bytes()
    for size in {*range(0, len(data) - 1, max(1, len(data) // 60)), len(data) // 2}:
        path.write_bytes(data[:size])
        refused(path, r"(cannot be read: .+|must be an image, got something else)", at_least)
    path.write_bytes(data[:-1])
    try:
        assert np.array_equal(loaded(path, at_least), whole)
    except DataError as error:
        assert "cannot be read: " in str(error)


@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.webp", "image.bmp"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_broken_image_is_read_or_named(tmp_path, name):
    """Nothing but a `DataError` comes out of bytes that are wrong."""
    path = saved(tmp_path, Image.fromarray(noise(16, 16, 3)), name)
    data = path.read_bytes()
    draw, refusals = random.Random(0), 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 6)):
            broken[draw.randrange(4, len(data))] = draw.randrange(256)
        # A header that claims to be large is not what this is about.
        if name == "image.bmp":
            broken[18:26] = data[18:26]
        path.write_bytes(broken)
        try:
            loaded(path)
        except DataError as error:
            assert str(path) in str(error)
            refusals += 1
    assert refusals > 0


def test_files_that_are_no_images_are_named(tmp_path):
    path = tmp_path / "image.jpg"
    refused(path, "cannot be read: No such file or directory")
    path.write_text("<html>404</html>")
    refused(path, "must be an image, got something else")
    path.write_bytes(b"")
    refused(path, "must be an image, got something else")
    path.unlink()
    path.mkdir()
    refused(path, "cannot be read: Is a directory")


def test_an_image_that_claims_to_be_huge_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path, photograph(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(path, r"cannot be read: Image size \(10000 pixels\) exceeds limit of 2000 pixels.*")


# ------------------------------------------------------------------------------ the data set


def to_tensor(path: Path) -> Tensor:  # [3, height, width]
    """On the top level, so that workers can find it."""
    return torch.from_numpy(np.array(load_image(path, 8))).permute(2, 0, 1)


NAMES = ("grey.jpg", "cmyk.jpg", "palette.png", "alpha.png", "deep.png", "鳥 1.jpg")


@pytest.fixture
def images(tmp_path):
    """Images of all kinds, the classes not in order."""
    picture = photograph(16, 12)
    kinds = (
        picture.convert("L"),
        picture.convert("CMYK"),
        picture.quantize(8),
        picture.convert("RGBA"),
        Image.fromarray(noise(12, 16, high=65536, dtype=np.uint16)),
        picture,
    )
    for image, name in zip(kinds, NAMES, strict=True):
        image.save(tmp_path / name)
    labels = np.array([2, 0, 1, 1, 2, 0], dtype=np.int64)
    return Images(tmp_path, Listing(NAMES, labels, ("a", "b", "c")), to_tensor)


def test_an_item_is_image_label_and_place(images):
    assert len(images) == len(NAMES)
    for i, name in enumerate(NAMES):
        image, label, index = images[i]
        assert torch.equal(image, to_tensor(images.root / name))
        assert (label, index) == (images.listing.labels[i], i)
        assert type(label) is int


def test_unless_it_is_told_how_to_read_the_image_itself(images):
    image, label, index = Images(str(images.root), images.listing)[5]
    assert (image.mode, image.size, label, index) == ("RGB", (16, 12), 0, 5)


def test_a_copy_by_pickle_has_the_same_items(images):
    copy = pickle.loads(pickle.dumps(images))
    for (image, *others), (image2, *others2) in zip(images, copy, strict=True):
        assert torch.equal(image, image2) and others == others2


@pytest.mark.parametrize("workers, context", [(0, None), (2, "fork"), (1, "spawn")])
def test_a_loader_with_workers(images, workers, context):
    loader = DataLoader(
        images, batch_size=4, num_workers=workers, multiprocessing_context=context, shuffle=True
    )
    batches = list(loader)
    assert [len(batch[0]) for batch in batches] == [4, 2]
    found, labels, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert sorted(indices.tolist()) == list(range(len(NAMES)))
    assert labels.dtype == indices.dtype == torch.int64
    assert np.array_equal(labels.numpy(), images.listing.labels[indices.numpy()])
    for image, index in zip(found, indices.tolist(), strict=True):
        assert torch.equal(image, images[index][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_names_the_image_that_is_cut_off(images, workers):
    path = images.root / NAMES[-1]
    os.truncate(path, path.stat().st_size // 2)
    loader = DataLoader(images, batch_size=2, num_workers=workers)
    with pytest.raises(DataError, match=re.escape(f"{path} cannot be read: ")) as caught:
        list(loader)
    # A loader that is found among garbage waits five seconds for each of its workers.
    traceback.clear_frames(caught.tb)
