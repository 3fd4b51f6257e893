"""Launches the CPU kernels of `pairwise`; called through `torch.ops.idml_fast`, checks done."""

from __future__ import annotations

import torch
from torch import Tensor

from idml_fast import _C

from .tile import TILE, Embedding, Walk, matrix, parts, threads, vector


def forward(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    tau: float,
    gamma: float,
    form: str,
) -> Tensor:  # [N, M]
    """The scores, tile by tile; rows against themselves fill both triangles from the upper one."""
    walk = Walk(sem, unc, sem2, unc2)
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
        _C.pairwise_forward(
            tile.native, _C.Form(form), tau, gamma, matrix(place), matrix(mirrored), threads()
        )
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
    tau: float,
    gamma: float,
    form: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of those of the four embeddings that are wanted.

    The products come again; of the distance form only that of `unc`, since its scores give alpha.
    """
    walk = Walk(sem, unc, sem2, unc2, multiply_sem=scores is None)
    rows = [Gradient(gram.x, w) for gram, w in zip(walk.grams, wanted[:2], strict=False)]
    cols = [Gradient(gram.y, w) for gram, w in zip(walk.grams, wanted[2:], strict=False)]
    if walk.symmetric:
        cols = rows
    for tile in walk:
        # A symmetric walk's tile stands for (i, j) and (j, i), and its columns are rows as well. On
        # the diagonal it holds both pairs already: there it counts for its rows alone.
        for_cols = not walk.symmetric or tile.rows != tile.cols
        incoming = readable(upstream[tile.rows, tile.cols], walk.dtype)
        mirror = forwarded = None
        if walk.symmetric:
            mirror = readable(upstream[tile.cols, tile.rows], walk.dtype)
        if scores is not None:
            forwarded = readable(scores[tile.rows, tile.cols], walk.dtype)
        gradients = [
            _C.Gradient(
                vector(row.diagonal[tile.rows]),
                vector(col.diagonal[tile.cols] if for_cols else None),
                matrix(row.items(tile.rows)),
                matrix(col.items(tile.cols) if for_cols else None),
            )
            for row, col in zip(rows, cols, strict=True)
        ]
        _C.pairwise_backward(
            tile.native,
            _C.Form(form),
            tau,
            gamma,
            _C.Upstream(matrix(incoming), matrix(mirror), matrix(forwarded)),
            threads(),
            *gradients,
        )
        for k, (row, col) in enumerate(zip(rows, cols, strict=True)):
            weights = tile.values[k].to(tile.row_panels[k].dtype)
            row.add(tile.rows, weights, tile.col_panels[k])
            if for_cols:
                col.add(tile.cols, weights.T, tile.row_panels[k])
    embeddings = [rows[0], rows[-1], cols[0], cols[-1]]
    return [e.finish() for e, w in zip(embeddings, wanted, strict=True) if w]


def readable(x: Tensor, dtype: torch.dtype) -> Tensor:  # [n, m]
    """A tile in the epilogue's dtype with contiguous rows: itself if it is, else a copy."""
    if x.dtype == dtype and x.stride(1) == 1:
        return x
    return torch.empty(x.shape, dtype=dtype).copy_(x)


class Gradient:
    """The gradient of one embedding, accumulated in the epilogue's dtype."""

    def __init__(self, embedding: Embedding, wanted: bool) -> None:
        x = embedding.x
        self.embedding = embedding
        self.total = None  # [n, D]
        if wanted:
            self.total = torch.zeros(x.shape, dtype=embedding.epilogue_dtype)
        # What multiplies the items themselves, [n].
        self.diagonal = torch.zeros(len(x), dtype=embedding.epilogue_dtype)

    def items(self, part: slice) -> Tensor | None:  # [n, D]
        """The gradient of some items so far; None if it is not wanted."""
        return None if self.total is None else self.total[part]

    def add(self, part: slice, weights: Tensor, others: Tensor) -> None:
        """Adds ``weights [n, m] @ others [m, D]`` to some items."""
        total = self.items(part)
        if total is None:
            return
        if weights.dtype == total.dtype:
            total.addmm_(weights, others)
        else:
            # `out` keeps autocast, if it is on, from choosing another dtype.
            total += torch.mm(weights, others, out=others.new_empty(total.shape))

    def finish(self) -> Tensor:  # [n, D]
        """The gradient in the embedding's dtype."""
        for part in parts(len(self.total), TILE[0]):
            items = self.embedding.x[part].to(self.total.dtype)
            self.total[part].addcmul_(self.diagonal[part, None], items)
        return self.total.to(self.embedding.x.dtype)
