"""Launches the CPU kernels of `pairwise`; called through `torch.ops.idml_fast`, checks done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idml_fast import _C

from .gradient import collect
from .tile import Tile, Walk, matrix, metric_of, multiplies_bf16, threads


def forward(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *metric: Any,
) -> Tensor:  # [N, M]
    """The scores, tile by tile; rows against themselves fill both triangles from the upper one."""
    walk = Walk(sem, unc, sem2, unc2)
    native = metric_of(*metric)
    scores = sem.new_empty(walk.shape)
    _C.advise_huge_pages(matrix(scores))
    # The kernel writes where the scores belong or, if it does not know their dtype, into a buffer.
    direct = is_stored(scores, walk.dtype)
    buffer = torch.empty(0 if direct else len(walk.grams[0].buffer), dtype=walk.dtype)
    for tile in walk:
        target = scores[tile.rows, tile.cols]
        mirror = scores[tile.cols, tile.rows] if walk.symmetric else None
        if direct:
            place, mirrored = target, mirror
        else:
            place = buffer[: target.numel()].view(target.shape)
            mirrored = place if walk.symmetric and tile.rows == tile.cols else None
        _C.pairwise_forward(tile.native, native, matrix(place), matrix(mirrored), threads())
        if not direct:
            target.copy_(place)
            if mirror is not None:
                mirror.copy_(place.T)
    return scores


def backward(
    upstream: Tensor,  # [N, M]
    scores: Tensor | None,  # [N, M], for the distance form
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *metric: Any,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of those operands that are wanted.

    The products come again; of the distance form in float32 only that of `unc`, since its scores
    give alpha. In bfloat16 a product takes less time than that does, and has more digits.
    """
    if multiplies_bf16(sem.dtype):
        scores = None
    walk = Walk(sem, unc, sem2, unc2, multiply_sem=scores is None)
    native = metric_of(*metric)

    def weigh(tile: Tile, gradients: _C.Gradients) -> _C.NearPairs:
        # A symmetric walk's tile stands for (i, j) and for (j, i).
        incoming = readable(upstream[tile.rows, tile.cols], walk.dtype)
        mirror = forwarded = None
        if walk.symmetric:
            mirror = readable(upstream[tile.cols, tile.rows], walk.dtype)
        if scores is not None:
            forwarded = readable(scores[tile.rows, tile.cols], walk.dtype)
        arrived = _C.PairwiseUpstream(matrix(incoming), matrix(mirror), matrix(forwarded))
        return _C.pairwise_backward(tile.native, native, arrived, gradients, threads())

    return collect(walk, metric, wanted, weigh)


def is_stored(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels of an epilogue's dtype read and write numbers as ``x`` has them."""
    return x.dtype == dtype or (x.dtype == torch.bfloat16 and dtype == torch.float32)


def readable(x: Tensor, dtype: torch.dtype) -> Tensor:  # [n, m]
    """A tile that the kernels can read, with contiguous rows: itself if it is, else a copy."""
    if is_stored(x, dtype) and x.stride(1) == 1:
        return x
    return torch.empty(x.shape, dtype=dtype).copy_(x)
