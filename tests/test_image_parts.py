"""Random parts of image files: those of torchvision, of JPEGs no more decoded than they take."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")
pytest.importorskip("torchvision", reason="the extra idml_fast[vision] is not installed")

from PIL import Image, ImageOps
from test_images import noise, photograph, saved
from torchvision.transforms import v2

from idml_fast.train import images as images_module
from idml_fast.train.datasets import DataError
from idml_fast.train.images import load_image, load_part


def part(path: Path, size: int | tuple[int, int], seed: int) -> np.ndarray:
    torch.manual_seed(seed)
    image = load_part(path, v2.RandomResizedCrop(size))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def part_of_all(path: Path, size: int | tuple[int, int], seed: int) -> np.ndarray:
    """As it is usually made: decoded, cut out, resized."""
    torch.manual_seed(seed)
    return np.asarray(v2.RandomResizedCrop(size)(load_image(path))).astype(int)


def part_in_place(path: Path, size: int, seed: int) -> np.ndarray:
    """Decoded, and resized where it lies."""
    torch.manual_seed(seed)
    image = load_image(path)
    drawn = v2.RandomResizedCrop(size).make_params([image])
    left, top, width, height = (drawn[x] for x in ("left", "top", "width", "height"))
    box = left, top, left + width, top + height
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


@pytest.mark.parametrize(
    "name, size", [("image.png", 24), ("image.jpg", 24), ("image.png", (9, 30))]
)
def test_a_part_is_the_one_that_torchvision_cuts_out(tmp_path, name, size):
    path = saved(tmp_path, photograph(60, 44), name)
    for seed in range(20):
        found, wanted = part(path, size, seed), part_of_all(path, size, seed)
        assert found.shape == wanted.shape
        # Beside an edge, one looks over it, and the other sees what is on it once more.
        inside = np.s_[3:-3, 3:-3]
        assert np.abs(found[inside] - wanted[inside]).max() <= 1
        assert np.abs(found - wanted).max() <= 6
    assert np.abs(found - part(path, size, seed=0)).mean() > 10  # parts differ


def test_of_a_jpeg_no_more_is_decoded_than_a_part_takes(tmp_path, monkeypatch):
    """The whole part at the least of the four sizes at which it has twice the pixels."""
    decoded, to_rgb = [], images_module.to_rgb
    monkeypatch.setattr(images_module, "to_rgb", lambda x: decoded.append(x.size) or to_rgb(x))
    path = saved(tmp_path, photograph(801, 603), "image.jpg", quality=95)
    sizes = {s: (-(-801 // s), -(-603 // s)) for s in (1, 2, 4, 8)}
    for seed in range(40):
        crop = v2.RandomResizedCrop(30)
        torch.manual_seed(seed)
        drawn = crop.make_params([Image.new("RGB", (801, 603))])
        side = min(drawn["width"], drawn["height"])
        wanted = max((s for s in sizes if side >= 60 * s), default=1)
        found = part(path, 30, seed)
        assert decoded.pop() == sizes[wanted]
        error = np.abs(found - part_of_all(path, 30, seed))
        decoded.clear()
        assert error.mean() < 1
        assert error.max() <= 6


def test_all_four_sizes_are_met(tmp_path, monkeypatch):
    decoded, to_rgb = set(), images_module.to_rgb
    monkeypatch.setattr(images_module, "to_rgb", lambda x: decoded.add(x.width) or to_rgb(x))
    path = saved(tmp_path, photograph(800, 600), "image.jpg")
    for size in (8, 30, 90, 200):
        part(path, size, seed=0)
    assert decoded == {100, 200, 400, 800}


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("name", ["image.jpg", "image.png"])
def test_a_part_is_turned_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = saved(tmp_path, photograph(200, 120), f"lying_{name}")
    turned = saved(tmp_path, photograph(200, 120), name, exif=exif)
    for seed in range(5):
        same = Image.fromarray(part(lying, (16, 12), seed).astype(np.uint8))
        same.getexif()[0x0112] = orientation
        wanted = np.asarray(ImageOps.exif_transpose(same))
        assert np.array_equal(part(turned, (16, 12), seed), wanted)


@pytest.mark.parametrize("width, height", [(1, 1), (3, 1), (1, 900), (7, 5), (8, 1000)])
@pytest.mark.parametrize("name", ["image.jpg", "image.png"])
def test_parts_of_small_and_of_narrow_images(tmp_path, name, width, height):
    path = saved(tmp_path, photograph(width, height), name)
    for seed in range(10):
        assert np.array_equal(part(path, 6, seed), part_in_place(path, 6, seed))


@pytest.mark.parametrize("name", ["image.jpg", "image.png"])
def test_a_part_of_an_image_that_is_cut_off_is_named(tmp_path, name):
    path = saved(tmp_path, Image.fromarray(noise(64, 64, 3)), name)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} cannot be read: "):
        load_part(path, v2.RandomResizedCrop(8))
    path.write_text("<html>404</html>")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} must be an image, got"):
        load_part(path, v2.RandomResizedCrop(8))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16"])
def test_parts_of_images_of_other_modes(tmp_path, mode):
    image = photograph(40, 30)
    if mode == "I;16":
        image = Image.fromarray(noise(30, 40, high=65536, dtype=np.uint16))
    path = saved(tmp_path, image.convert(mode), "image.jpg" if mode == "CMYK" else "image.png")
    for seed in range(5):
        assert np.array_equal(part(path, 16, seed), part_in_place(path, 16, seed))
