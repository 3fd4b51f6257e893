"""The search for a better row of the table, behind IDML_FAST_AUTOTUNE=1."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from idml_fast.rowstats import describe
from idml_fast.stats import LogSumExp

from . import configs, rowstats
from .configs import Config

# Of the problem that is timed: large enough to fill the largest GPU many times.
ITEMS = 1 << 13
STATISTICS = [  # Multi-Similarity's
    LogSumExp(where="same", scale=-2.0, shift=0.5),
    LogSumExp(where="different", scale=50.0, shift=0.5),
]
CANDIDATES = [
    Config(rows, cols, width, warps, stages)
    for rows, cols, width, warps, stages in itertools.product(
        (64, 128), (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
    )
    if cols <= rows
]
searched: set[tuple[Any, ...]] = set()


def search(
    key: tuple[str, int, int], purpose: str, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Puts the fastest configuration for a purpose and width into a row of the table, and prints
    that row, unless it has done so before.

    What is timed are the row statistics of Multi-Similarity: the operations differ in their
    epilogues alone.
    """
    if (key, purpose, width, dtype) in searched:
        return
    searched.add((key, purpose, width, dtype))
    present = configs.TABLE[key]
    run = _problem(purpose, width, dtype, device)
    milliseconds = {}
    for config in dict.fromkeys([getattr(present, purpose), *CANDIDATES]):
        configs.TABLE[key] = present._replace(**{purpose: config})
        try:
            milliseconds[config] = triton.testing.do_bench(run, return_mode="median")
        except triton.OutOfResources:  # of shared memory
            continue
    best = min(milliseconds, key=milliseconds.get)
    configs.TABLE[key] = present._replace(**{purpose: best})
    before = milliseconds.get(getattr(present, purpose), float("nan"))
    print(
        f"idml_fast: {purpose} of width {width}, {dtype}: {milliseconds[best]:.3f} ms with {best}, "
        f"{before:.3f} ms with the table's. The row to add: {key}: {configs.TABLE[key]}"
    )


def _problem(
    purpose: str, width: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """What is timed."""
    sem, unc, sem2, unc2 = (torch.randn(ITEMS, width, device=device).to(dtype) for _ in range(4))
    if purpose == "mirrored_backward":
        sem2 = unc2 = None
    operands = sem, unc, sem2, unc2, 5.0, 0.0, None, "cosine"
    labels = torch.arange(ITEMS, device=device) // 4
    described, _ = describe(STATISTICS, sem)
    items = labels, None if sem2 is None else labels, *described
    wanted = [*(x is not None for x in operands[:4]), False]

    def forward() -> tuple[Tensor, ...]:
        return rowstats.forward(*operands, *items, 0)

    if purpose == "forward":
        return forward
    values, _, state, kept = forward()

    def backward() -> list[Tensor]:
        return rowstats.backward(values, state, kept, *operands, *items, wanted=wanted)

    return backward
