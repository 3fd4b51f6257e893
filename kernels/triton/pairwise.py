"""Launches the Triton kernels of `pairwise`; called through `torch.ops.idml_fast`, checks done."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .gradient import collect
from .score import score
from .tile import Walk, store_tile


def forward(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *metric: Any,
    make: type[Walk] = Walk,
) -> Tensor:  # [N, M]
    """The scores; rows against themselves fill both triangles from the upper one."""
    walk = make(sem, unc, sem2, unc2, *metric)
    scores = sem.new_empty(walk.shape)
    for chunk in walk.chunks(*[max(*walk.shape, 1)] * 2):  # one, of all
        walk.launch(chunk, store, (scores, scores.stride(0)))
    return scores


def backward(
    upstream: Tensor,  # [N, M]
    scores: Tensor | None,  # [N, M], not needed here
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *metric: Any,
    wanted: list[bool],
    make: type[Walk] = Walk,
) -> list[Tensor]:
    """The gradients of those operands that are wanted."""
    walk = make(sem, unc, sem2, unc2, *metric, backward=True)
    return collect(walk, metric, wanted, load_upstream, (upstream, *upstream.stride()))


@triton.jit
def store(
    pairs, place, arguments, metric, FORM: tl.constexpr, SYMMETRIC: tl.constexpr,
    UPSTREAM: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """The epilogue of the forward: writes the scores, and their mirror image."""
    memory, stride = arguments
    row_start, col_start, row_there, col_there, _, _, _, on_diagonal = place
    alpha2, beta2, versine, _, _ = pairs
    scores = score(alpha2, beta2, versine, metric, FORM).to(memory.dtype.element_ty)
    there = row_there[:, None] & col_there[None, :]
    store_tile(scores, memory, stride, row_start, col_start, there)
    if SYMMETRIC:
        if not on_diagonal:
            store_tile(tl.trans(scores), memory, stride, col_start, row_start, tl.trans(there))


@triton.jit
def load_upstream(
    pairs, place, arguments, metric, FORM: tl.constexpr, SYMMETRIC: tl.constexpr,
    STATISTICS: tl.constexpr,
):  # fmt: skip
    """The upstream gradient of a tile, and of its mirror image where it stands for both."""
    memory, row_stride, col_stride = arguments
    row_start, col_start, row_there, col_there, _, _, _, _ = place
    rows = row_start + tl.arange(0, row_there.shape[0]).to(tl.int64)
    cols = col_start + tl.arange(0, col_there.shape[0]).to(tl.int64)
    there = row_there[:, None] & col_there[None, :]
    to = memory + rows[:, None] * row_stride + cols[None, :] * col_stride
    found = tl.load(to, mask=there, other=0).to(tl.float32)
    if SYMMETRIC:
        to = memory + cols[:, None] * row_stride + rows[None, :] * col_stride
        mirror = tl.load(to, mask=tl.trans(there), other=0).to(tl.float32)
        found += tl.trans(mirror)
    return found
