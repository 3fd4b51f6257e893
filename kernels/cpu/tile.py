"""The walk over tiles of pairs on the CPU: Gram products by `torch.mm`, into small buffers.

The epilogues work in float32 (float64 for float64). bfloat16 products stay in bfloat16 where the
machine multiplies it natively; other half inputs are widened a panel at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from idml_fast import _C

# Rows and columns of a tile. 2^20 float32 pairs are 4 MiB: the two buffers and the panels they come
# from stay in the last cache, and the products are large enough for the BLAS to reach its speed.
TILE = 1024, 1024
SELF_TILE = 512, 512


class Tile(NamedTuple):
    """The pairs of some rows and some columns, ready for an epilogue."""

    rows: slice
    cols: slice
    native: _C.Tile
    # Of sem and, unless the metric is conventional, of unc:
    values: list[Tensor]  # [n, m] in the epilogue's dtype: memory for its results
    row_panels: list[Tensor]  # [n, D] in the products' dtype
    col_panels: list[Tensor]  # [m, D] likewise


class Embedding:
    """`sem` or `unc` of one side."""

    def __init__(self, x: Tensor) -> None:  # [n, D]
        self.x = x
        self.epilogue_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.native_bf16 = x.dtype == torch.bfloat16 and _C.has_bf16()
        self.product_dtype = x.dtype if self.native_bf16 else self.epilogue_dtype
        self.squares = torch.empty(len(x), dtype=self.epilogue_dtype)  # [n], squared norms
        self.measured: set[int] = set()  # where the parts begin whose norms are there

    def panel(self, part: slice) -> Tensor:
        """Some items in the products' dtype: a view, unless they have to be widened.

        Their norms are taken when a part is first asked for: the product that follows then finds it
        in the cache. Every part must always be cut alike.
        """
        panel = self.x[part].to(self.product_dtype)
        if part.start not in self.measured:
            _C.squared_norms(matrix(panel), vector(self.squares[part]), threads())
            self.measured.add(part.start)
        return panel

    def factors(self, panel: Tensor, part: slice, sign: int, *, left: bool) -> Tensor:
        """A panel as the product takes it, [n, D] or wider.

        A product in bfloat16 is ``2 (|x||y| + sign x.y)``, the norms as sums of three bfloat16 in
        six more columns: so it cancels within the float32 accumulator, and only what remains is
        rounded to bfloat16. ``x.y`` itself, rounded first, would lose it.
        """
        if not self.native_bf16:
            return panel
        rest, thirds = self.squares[part, None].sqrt(), []
        for _ in range(3):
            thirds.append(rest.to(panel.dtype))
            rest = rest - thirds[-1]
        high, middle, low = thirds
        if left:
            return torch.cat([panel, high, high, middle, high, low, middle], dim=1)
        norms = torch.cat([high, middle, high, low, high, middle], dim=1)
        return torch.cat([2 * sign * panel, 2 * norms], dim=1)


class Gram:
    """One of the walk's two products: of `sem`, or of `unc`."""

    def __init__(self, x: Tensor, y: Tensor | None, sign: int, pairs: int) -> None:
        self.sign = sign
        self.x = Embedding(x)
        self.y = self.x if y is None else Embedding(y)
        self.buffer = torch.empty(pairs, dtype=self.x.epilogue_dtype)
        self.product_buffer = self.buffer
        if self.x.native_bf16:
            self.product_buffer = torch.empty(pairs, dtype=torch.bfloat16)

    def values(self, rows: slice, cols: slice) -> Tensor:  # [n, m]
        """Where the epilogue's results for a tile go; every tile uses the same memory."""
        shape = rows.stop - rows.start, cols.stop - cols.start
        return self.buffer[: math.prod(shape)].view(shape)

    def multiply(self, left: Tensor, col_panel: Tensor, rows: slice, cols: slice) -> Tensor:
        """The product of a tile, [n, m]; ``left`` are the factors of its rows."""
        shape = self.values(rows, cols).shape
        products = self.product_buffer[: shape.numel()].view(shape)
        right = self.y.factors(col_panel, cols, self.sign, left=False)
        return torch.mm(left, right.T, out=products)

    def native(
        self,
        row_panel: Tensor,
        col_panel: Tensor,
        rows: slice,
        cols: slice,
        products: Tensor | None,
    ) -> _C.Gram:
        """A tile's product as the kernels take it."""
        return _C.Gram(
            _C.Panel(matrix(row_panel), vector(self.x.squares[rows])),
            _C.Panel(matrix(col_panel), vector(self.y.squares[cols])),
            matrix(products),
            matrix(self.values(rows, cols)),
        )


class Walk:
    """Iterates over the tiles of all pairs; without a second side, over their upper triangle.

    With ``multiply_sem=False`` the product of `sem` is not taken.
    """

    def __init__(
        self,
        sem: Tensor,  # [N, Ds]
        unc: Tensor | None,  # [N, Du]
        sem2: Tensor | None,  # [M, Ds]
        unc2: Tensor | None,  # [M, Du]
        *,
        multiply_sem: bool = True,
    ) -> None:
        self.symmetric = sem2 is None
        self.multiply_sem = multiply_sem
        self.shape = len(sem), len(sem if sem2 is None else sem2)
        if self.symmetric:
            self.tile_shape = SELF_TILE
        else:
            height = max(1, min(self.shape[0], TILE[0]))
            self.tile_shape = height, math.prod(TILE) // height
        pairs = math.prod(map(min, self.tile_shape, self.shape))
        self.grams = [Gram(sem, sem2, -1, pairs)]
        if unc is not None:
            self.grams.append(Gram(unc, unc2, 1, pairs))
        self.dtype = self.grams[0].x.epilogue_dtype

    def __iter__(self) -> Iterator[Tile]:
        multiplied = [self.multiply_sem] + [True] * (len(self.grams) - 1)
        for rows in parts(self.shape[0], self.tile_shape[0]):
            row_panels = [gram.x.panel(rows) for gram in self.grams]
            lefts = [
                gram.x.factors(panel, rows, gram.sign, left=True) if wanted else None
                for gram, panel, wanted in zip(self.grams, row_panels, multiplied, strict=True)
            ]
            first = rows.start if self.symmetric else 0
            for cols in parts(self.shape[1], self.tile_shape[1], first):
                col_panels = [gram.y.panel(cols) for gram in self.grams]
                native = []
                for gram, left, x, y in zip(self.grams, lefts, row_panels, col_panels, strict=True):
                    products = None if left is None else gram.multiply(left, y, rows, cols)
                    native.append(gram.native(x, y, rows, cols, products))
                values = [gram.values(rows, cols) for gram in self.grams]
                yield Tile(rows, cols, _C.Tile(*native), values, row_panels, col_panels)


def parts(count: int, size: int, first: int = 0) -> Iterator[slice]:
    """``range(first, count)`` in slices of ``size``, the last one shorter."""
    for start in range(first, count, size):
        yield slice(start, min(start + size, count))


def matrix(x: Tensor | None) -> _C.Matrix:  # [n, m]
    """The view of a matrix that the native module takes; ``x`` must outlive it. None is absent."""
    if x is None:
        return _C.Matrix()
    return _C.Matrix(x.data_ptr(), *x.shape, *x.stride(), x.element_size())


def vector(x: Tensor | None) -> _C.Matrix:  # [n]
    """Likewise for a contiguous vector, as a matrix of one row."""
    return matrix(None if x is None else x[None])


def threads() -> int:
    """As many as PyTorch uses."""
    return torch.get_num_threads()
