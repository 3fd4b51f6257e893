"""The one table of configurations, and how float32 is multiplied."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from idml_fast import _checks, backend


class Config(NamedTuple):
    """How a tile of pairs is walked."""

    rows: int  # of a tile
    cols: int  # of a tile: as many, or a fraction of it
    width: int  # features at a time, or fewer if the embeddings have fewer
    warps: int
    stages: int  # how many steps are loaded ahead


class Configs(NamedTuple):
    """Those for one kind of products on one architecture."""

    forward: Config
    backward: Config
    # Of rows against themselves, whose tiles stand for two: it holds more in registers.
    mirrored_backward: Config


# By the kind of products ("half" for bfloat16 and float16, else the precision of float32), the
# width of the embeddings (the least of these that is enough, else the last) and the architecture:
# 80 for the A100; 86 for the other chips of Ampere, for Ada and for the consumer chips of
# Blackwell, which have less shared memory; 90 for Hopper; 100 for Blackwell. 0 is Triton's
# interpreter: small tiles, of which a small problem has many.
KINDS = ("half", *backend.PRECISIONS)
WIDTHS = (64, 128, 512)
ARCHITECTURES = (80, 86, 90, 100)
INTERPRETED = Configs(*[Config(16, 16, 16, 4, 1)] * 3)
# The relative error of a product of float32, by its precision.
PRODUCT_ERRORS = {"ieee": 2.0**-23, "tf32x3": 2.0**-21, "bf16x3": 2.0**-15, "tf32": 2.0**-10}


def _configs(kind: str, width: int, architecture: int) -> Configs:
    """Tiles that leave the registers without spills, or with few."""
    # Never one step alone: the loads of a loop that is unrolled are all done at its head.
    step = 64 if kind == "half" and width > 64 else 32
    stages = 2 if width <= 2 * step else 3  # few steps need not be loaded far ahead
    large = Config(128, 64, step, 8, stages)
    small = Config(128, 32, step, 8, stages)
    if kind == "half" or architecture >= 90:
        small = Config(64, 64, step, 8, stages)
    return Configs(forward=large, backward=large, mirrored_backward=small)


TABLE: dict[tuple[str, int, int], Configs] = {
    (kind, width, architecture): _configs(kind, width, architecture)
    if architecture
    else INTERPRETED
    for kind in KINDS
    for width in WIDTHS
    for architecture in (0, *ARCHITECTURES)
}


def config_of(
    purpose: str, width: int, dtype: torch.dtype, precision: str, device: torch.device
) -> Config:
    """The configuration for one of the purposes that `Configs` names.

    With ``IDML_FAST_AUTOTUNE=1`` it is searched for first, once a process, and the row that the
    table should have is printed.
    """
    kind = precision if dtype == torch.float32 else "half"
    least = next((x for x in WIDTHS if x >= width), WIDTHS[-1])
    key = kind, least, architecture_of(device)
    if os.environ.get("IDML_FAST_AUTOTUNE") == "1":
        from .autotune import search

        search(key, purpose, width, dtype, device)
    config = getattr(TABLE[key], purpose)
    narrow = 1 << max(width - 1, 15).bit_length()  # the least that a product takes is 16
    return config._replace(width=min(config.width, narrow))


def architecture_of(device: torch.device) -> int:
    """The row of the table for a device; 0 for the interpreter."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or major >= 12 or (major == 8 and minor > 0):
        return 86
    return min(major, 10) * 10


def precision_of(dtype: torch.dtype) -> str:
    """The `input_precision` of Triton's products, which matters for float32 only."""
    if dtype != torch.float32:
        return "ieee"
    if backend.precision is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    _checks.one_of("idml_fast.backend.precision", backend.precision, backend.PRECISIONS)
    return backend.precision


def near_of(dtype: torch.dtype, precision: str) -> float:
    """The share of ||x||^2 + ||y||^2 below which a square is taken from differences.

    Products of bfloat16 and float16 are exact in float32, so that only the sums have an error, of
    2^-23: a square of 2^-14 of the scale still has one of 2^-9 of itself, as much as the rounding
    of bfloat16, and a square of 2^-12 one of 2^-11, as much as that of float16. For float32 it
    leaves 2^-15 of a square, and an error of tf32, 2^-11, leaves 2^-5.
    """
    if dtype != torch.float32:
        return 2.0**-14 if dtype == torch.bfloat16 else 2.0**-12
    return 2.0**-6 if precision == "tf32" else 2.0**-8
