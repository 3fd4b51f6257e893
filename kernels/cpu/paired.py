"""Launches the CPU kernels of `paired`; called through `torch.ops.idml_fast`, checks done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idml_fast import _C

from .gradient import metric_gradient
from .tile import matrix, metric_of, threads, vector


def forward(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *arguments: Any,
) -> Tensor:  # [T]
    """The scores of the listed pairs, gathered in the kernel."""
    *metric, rows, cols = arguments
    row_side = Side(sem, unc)
    col_side = row_side if sem2 is None else Side(sem2, unc2)
    rows, cols = _index(rows, cols, len(sem))
    scores = torch.empty(len(rows), dtype=row_side.dtype)
    _C.paired_forward(
        row_side.native(),
        col_side.native(),
        metric_of(*metric),
        vector(rows),
        vector(cols),
        vector(scores),
        threads(),
    )
    return scores.to(sem.dtype)


def backward(
    upstream: Tensor,  # [T]
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *arguments: Any,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of those operands that are wanted. A negative column stands for no pair."""
    *metric, rows, cols = arguments
    of_sem, of_unc, of_sem2, of_unc2, learns = wanted
    row_side = Side(sem, unc, of_sem, of_unc)
    col_side = row_side if sem2 is None else Side(sem2, unc2, of_sem2, of_unc2)
    rows, cols = _index(rows, cols, len(sem))
    upstream = upstream.to(row_side.dtype)
    there = cols >= 0
    if not there.all():
        rows, cols, upstream = rows[there], cols[there], upstream[there]
    sums = torch.zeros(2, len(rows), dtype=torch.float64) if learns else None
    # Each side adds up for its own items; without a second side both do for the same.
    _gather(row_side, col_side, metric, rows, cols, upstream, sums)
    _gather(col_side, row_side, metric, cols, rows, upstream, None)
    found = row_side.finish() + ([] if sem2 is None else col_side.finish())
    return [*found, metric_gradient(sums.sum(1), metric)] if learns else found


class Side:
    """The embeddings of the rows or of the columns, and their gradients if they are wanted.

    float16 is widened: the kernels read float32, float64 and bfloat16.
    """

    def __init__(
        self,
        sem: Tensor,  # [n, Ds]
        unc: Tensor | None,  # [n, Du]
        of_sem: bool = False,
        of_unc: bool = False,
    ) -> None:
        self.stored = sem.dtype
        self.dtype = torch.promote_types(sem.dtype, torch.float32)
        self.embeddings = [
            x.float() if x is not None and x.dtype == torch.float16 else x for x in (sem, unc)
        ]
        self.gradients = [
            torch.zeros(x.shape, dtype=self.dtype) if wanted else None
            for x, wanted in ((sem, of_sem), (unc, of_unc))
        ]

    def native(self) -> _C.Side:
        """As the kernels take it."""
        return _C.Side(*map(matrix, self.embeddings))

    def finish(self) -> list[Tensor]:
        """The gradients that are wanted, in the embeddings' dtype."""
        return [x.to(self.stored) for x in self.gradients if x is not None]


def _index(rows: Tensor | None, cols: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Contiguous positions; row t with column t if there are none."""
    if rows is None:
        rows = cols = torch.arange(count)
    return rows.contiguous(), cols.contiguous()


def _gather(
    items: Side,
    others: Side,
    metric: list[Any],
    own: Tensor,  # [T]
    partners: Tensor,  # [T]
    upstream: Tensor,  # [T]
    sums: Tensor | None,  # [2, T]
) -> None:
    """Adds to the gradients of one side's items, each of which then has its pairs in a row."""
    if sums is None and not any(x is not None for x in items.gradients):
        return
    order = own.argsort(stable=True)
    starts = torch.zeros(len(items.embeddings[0]) + 1, dtype=torch.int64)
    torch.cumsum(own.bincount(minlength=len(starts) - 1), 0, out=starts[1:])
    partners, upstream = partners[order], upstream[order]
    pairs = _C.PairsByItem(vector(starts), vector(partners), vector(upstream), matrix(sums))
    _C.paired_backward(
        items.native(),
        others.native(),
        metric_of(*metric),
        pairs,
        *map(matrix, items.gradients),
        threads(),
    )
