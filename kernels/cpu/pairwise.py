"""Launches the CPU kernels of `pairwise`; called through `torch.ops.idml_fast`, checks done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idml_fast import _C

from .gradient import collect
from .tile import Tile, Walk, matrix, metric_of, threads


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
    # The kernel writes where the scores belong or, if their dtype is not its own, into a buffer.
    direct = scores.dtype == walk.dtype
    buffer = torch.empty_like(walk.grams[0].buffer[: 0 if direct else None])
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

    The products come again; of the distance form only that of `unc`, since its scores give alpha.
    """
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


def readable(x: Tensor, dtype: torch.dtype) -> Tensor:  # [n, m]
    """A tile in the epilogue's dtype with contiguous rows: itself if it is, else a copy."""
    if x.dtype == dtype and x.stride(1) == 1:
        return x
    return torch.empty(x.shape, dtype=dtype).copy_(x)
