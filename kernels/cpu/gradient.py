"""The backward of a walk: the kernels weigh the pairs of a tile, matrix products do the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from idml_fast import _C

from .tile import TILE, Embedding, Tile, Walk, matrix, parts, vector


def collect(
    walk: Walk,
    metric: tuple[Any, ...],
    wanted: list[bool],
    weigh: Callable[[Tile, _C.Gradients], _C.NearPairs],
) -> list[Tensor]:
    """The gradients of sem, unc, sem2, unc2 and the learned [tau, gamma], of those wanted.

    ``weigh`` writes the weights of a tile's pairs, see gradient.h.
    """
    *of_embeddings, of_metric = wanted
    rows, cols = [], []
    for k, gram in enumerate(walk.grams):
        of_row, of_col = of_embeddings[k::2]
        rows.append(Gradient(gram.x, gram.certain, of_row))
        cols.append(rows[k] if walk.symmetric else Gradient(gram.y, gram.certain, of_col))
    # Of tiles on a symmetric walk's diagonal, which hold every pair twice, and of all the others.
    sums = torch.zeros(2, 2, walk.shape[0], dtype=torch.float64) if of_metric else None
    for tile in walk:
        # A symmetric walk's columns are rows as well. On the diagonal the tile holds both pairs,
        # (i, j) and (j, i): there it counts for its rows alone.
        for_cols = not walk.symmetric or tile.rows != tile.cols
        per_row = None if sums is None else sums[int(for_cols), :, tile.rows]
        near = weigh(tile, _gradients(rows, cols if for_cols else [], tile, per_row))
        for k, any_near in enumerate([near.sem, near.unc][: len(rows)]):
            row, col = rows[k], cols[k]
            if row.total is None and col.total is None:
                continue
            row.add(tile.rows, tile.weights[k], tile.col_panels[k], any_near)
            if for_cols:
                col.add(tile.cols, tile.weights[k].T, tile.row_panels[k], any_near)
    found = [gradient.finish() for gradient in rows + ([] if walk.symmetric else cols)]
    if sums is not None:
        on_diagonal, elsewhere = sums.sum(2)
        found.append(metric_gradient(on_diagonal / 2 + elsewhere, metric))
    return [x for x in found if x is not None]


class Gradient:
    """The gradient of one embedding, accumulated in the epilogue's dtype."""

    def __init__(self, embedding: Embedding, certain: bool, wanted: bool) -> None:
        x = embedding.x
        self.embedding = embedding
        self.wanted = wanted
        # What multiplies the items themselves, [n].
        self.diagonal = torch.zeros_like(embedding.squares) if wanted else None
        # Where the other side is zero, there is nothing else.
        self.total = None  # [n, D]
        if wanted and not certain:
            self.total = torch.empty(x.shape, dtype=embedding.epilogue_dtype)
        self.started: set[int] = set()  # where the parts begin that are not empty memory any more

    def native(self, part: slice) -> tuple[_C.Matrix, _C.Matrix, bool]:
        """Where a tile adds up for some items, and whether that is empty memory as yet."""
        diagonal = None if self.diagonal is None else self.diagonal[part]
        items = None if self.total is None else self.total[part]
        return vector(diagonal), matrix(items), items is not None and part.start not in self.started

    def add(self, part: slice, weights: Tensor, others: Tensor, any_near: bool) -> None:
        """Adds ``weights [n, m] @ others [m, D]`` to some items; the kernel has added to them
        before if there is ``any_near``."""
        if self.total is None:
            return
        total = self.total[part]
        starts = part.start not in self.started and not any_near
        self.started.add(part.start)
        # `out` keeps autocast, if it is on, from choosing another dtype.
        if weights.dtype != total.dtype:
            product = torch.mm(weights, others, out=others.new_empty(total.shape))
            total.copy_(product) if starts else total.add_(product)
        elif starts:
            torch.mm(weights, others, out=total)
        else:
            total.addmm_(weights, others)

    def finish(self) -> Tensor | None:  # [n, D]
        """The gradient in the embedding's dtype; None if it is not wanted."""
        if not self.wanted:
            return None
        x = self.embedding.x
        if self.total is None:
            return (self.diagonal[:, None] * x).to(x.dtype)
        if not self.started:  # no pairs
            return torch.zeros_like(x)
        # Last, and apart from the products: these add up better if they do not begin with this.
        for part in parts(len(x), TILE[0]):
            self.total[part].addcmul_(self.diagonal[part, None], x[part].to(self.total.dtype))
        return self.total.to(x.dtype)


def _gradients(
    rows: list[Gradient], cols: list[Gradient], tile: Tile, sums: Tensor | None
) -> _C.Gradients:
    """Where the kernels add up for a tile; no ``cols`` where it counts for its rows alone."""
    absent = matrix(None), matrix(None), False
    native = []
    for k, row in enumerate(rows):
        row_diagonal, row_items, starts_rows = row.native(tile.rows)
        col_diagonal, col_items, starts_cols = cols[k].native(tile.cols) if cols else absent
        native.append(
            _C.Gradient(row_diagonal, col_diagonal, row_items, col_items, starts_rows, starts_cols)
        )
    unc = native[1] if len(native) > 1 else _C.Gradient()
    return _C.Gradients(native[0], unc, matrix(sums))


def metric_gradient(sums: Tensor, metric: tuple[Any, ...]) -> Tensor:  # [2] -> [2]
    """The gradient of [tau, gamma], from what the kernels have added up, see gradient.h."""
    learned = metric[2]
    tau, gamma = learned.double()
    of_gamma, of_beta = sums
    return torch.stack([-(of_beta + gamma * of_gamma) / tau, of_gamma]).to(learned.dtype)
