"""The one table of configurations, and the precision of float32 products."""

from __future__ import annotations

from typing import NamedTuple

import torch

from idml_fast import backend


class Config(NamedTuple):
    """How a tile is walked."""

    rows: int  # of a tile
    cols: int  # of a tile; as many, or a fraction of it
    width: int  # features at a time
    warps: int
    stages: int  # how many steps are loaded ahead


def precision_of(dtype: torch.dtype) -> str:
    """The `input_precision` of Triton's products; matters for float32 only."""
    if dtype != torch.float32:
        return "ieee"
    if backend.precision is not None:
        return backend.precision
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def near_of(dtype: torch.dtype, precision: str) -> float:
    """The share of ||x||^2 + ||y||^2 below which a square is taken from differences."""
    return 2.0**-8


def config_of(width: int, dtype, precision: str, device: torch.device) -> Config:
    return Config(128, 128, 64, 8, 3) if device.type == "cuda" else Config(32, 16, 16, 4, 1)
