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
    """The scores, tile by tile; the lower triangle of rows against themselves is a copy."""
    walk = Walk(sem, unc, sem2, unc2)
    scores = sem.new_empty(walk.shape)
    for tile in walk:
        target = scores[tile.rows, tile.cols]
        direct = target.dtype == walk.dtype
        place = target if direct else tile.sem.values
        _C.pairwise_forward(tile.native, _C.Form(form), tau, gamma, matrix(place), threads())
        if not direct:
            target.copy_(place)
        if walk.symmetric and tile.rows == tile.cols:
            # The BLAS does not promise that x.y and y.x round alike.
            target.copy_(target.triu() + target.triu(1).T)
        elif walk.symmetric:
            scores[tile.cols, tile.rows].copy_(target.T)
    return scores


def backward(
    upstream: Tensor,  # [N, M]
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    tau: float,
    gamma: float,
    form: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of those of the four embeddings that are wanted; the products come again."""
    walk = Walk(sem, unc, sem2, unc2)
    rows = [Gradient(gram.x, w) for gram, w in zip(walk.grams, wanted[:2], strict=False)]
    cols = [Gradient(gram.y, w) for gram, w in zip(walk.grams, wanted[2:], strict=False)]
    if walk.symmetric:
        cols = rows
    buffer = torch.empty_like(walk.grams[0].buffer)
    for tile in walk:
        # A symmetric walk's tile stands for (i, j) and (j, i), and its columns are rows as well. On
        # the diagonal it holds both pairs already: there it counts for its rows alone.
        for_cols = not walk.symmetric or tile.rows != tile.cols
        incoming = upstream[tile.rows, tile.cols]
        if walk.symmetric or incoming.dtype != walk.dtype or incoming.stride(1) != 1:
            incoming = buffer[: incoming.numel()].view(incoming.shape).copy_(incoming)
        if walk.symmetric:
            incoming += upstream[tile.cols, tile.rows].T
        diagonals = [
            _C.Diagonal(
                vector(row.diagonal[tile.rows]),
                vector(col.diagonal[tile.cols]) if for_cols else _C.Matrix(),
            )
            for row, col in zip(rows, cols, strict=True)
        ]
        _C.pairwise_backward(
            tile.native, _C.Form(form), tau, gamma, matrix(incoming), threads(), *diagonals
        )
        for row, col, products in zip(rows, cols, tile.products, strict=True):
            weights = products.values.to(products.row_panel.dtype)
            row.add(tile.rows, weights, products.col_panel)
            if for_cols:
                col.add(tile.cols, weights.T, products.row_panel)
    embeddings = [rows[0], rows[-1], cols[0], cols[-1]]
    return [e.finish() for e, w in zip(embeddings, wanted, strict=True) if w]


class Gradient:
    """The gradient of one embedding, accumulated in the epilogue's dtype."""

    def __init__(self, embedding: Embedding, wanted: bool) -> None:
        x = embedding.x
        self.embedding = embedding
        self.total = None  # [n, D]
        if wanted:
            self.total = torch.zeros(x.shape, dtype=embedding.epilogue_dtype)
        self.diagonal = torch.zeros_like(embedding.squares)  # [n], multiplies the items themselves

    def add(self, part: slice, weights: Tensor, others: Tensor) -> None:
        """Adds ``weights [n, m] @ others [m, D]`` to some items, if the gradient is wanted."""
        if self.total is None:
            return
        total = self.total[part]
        if weights.dtype == total.dtype:
            total.addmm_(weights, others)
        else:
            # `out` keeps autocast, if it is on, from choosing another dtype.
            total += torch.mm(weights, others, out=others.new_empty(total.shape))

    def finish(self) -> Tensor:  # [n, D]
        """The gradient in the embedding's dtype."""
        for part in parts(len(self.total), TILE[0]):
            items = self.embedding.panel(part).to(self.total.dtype)
            self.total[part].addcmul_(self.diagonal[part, None], items)
        return self.total.to(self.embedding.x.dtype)
