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
# A tile of bfloat16 has twice the rows and the columns: its products are done so soon that what
# every tile does besides would show.
BF16_SIDE = 2


class Tile(NamedTuple):
    """The pairs of some rows and some columns, ready for an epilogue."""

    rows: slice
    cols: slice
    native: _C.Tile
    # In the products' dtype, of sem and, unless no uncertainty is read, of unc:
    weights: list[Tensor]  # [n, m], memory for those of a backward
    row_panels: list[Tensor | None]  # [n, D]; None for zeros
    col_panels: list[Tensor | None]  # [m, D]; likewise


class Embedding:
    """`sem` or `unc` of one side: ``x``, or zeros for ``count`` items if that is None."""

    def __init__(self, x: Tensor | None, count: int, dtype: torch.dtype) -> None:
        self.x = x  # [n, D]
        self.epilogue_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.native_bf16 = multiplies_bf16(dtype)
        self.product_dtype = dtype if self.native_bf16 else self.epilogue_dtype
        self.squares = torch.zeros(count, dtype=self.epilogue_dtype)  # [n], squared norms
        self.measured: set[int] = set()  # where the parts begin whose norms are there

    def panel(self, part: slice) -> Tensor | None:
        """Some items in the products' dtype: a view, unless they have to be widened.

        Their norms are taken when a part is first asked for: the product that follows then finds it
        in the cache. Every part must always be cut alike.
        """
        if self.x is None:
            return None
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

        An odd width gets a column of zeros: matrix units take two numbers at a time, and of the
        last pair would read one of the next row, whose NaN times zero is NaN.
        """
        if not self.native_bf16:
            return panel
        rest, thirds = self.squares[part, None].sqrt(), []
        for _ in range(3):
            thirds.append(rest.to(panel.dtype))
            rest = rest - thirds[-1]
        high, middle, low = thirds
        even = panel.new_zeros(len(panel), panel.shape[1] % 2)
        if left:
            return torch.cat([panel, high, high, middle, high, low, middle, even], dim=1)
        norms = torch.cat([high, middle, high, low, high, middle], dim=1)
        return torch.cat([2 * sign * panel, 2 * norms, even], dim=1)


class Gram:
    """One of the walk's two products: of `sem`, or of `unc`."""

    def __init__(self, x: Embedding, y: Embedding, sign: int, pairs: int) -> None:
        self.x, self.y, self.sign = x, y, sign
        self.certain = x.x is None or y.x is None  # nothing to multiply: one side is zero
        self.multiplied = not self.certain
        # Every tile has its products here, and then its weights.
        self.buffer = torch.empty(pairs, dtype=x.product_dtype)
        self.products = self.buffer

    def weights(self, rows: slice, cols: slice) -> Tensor:  # [n, m]
        """Where a backward writes those of a tile: over its products, unless they are kept."""
        return _cut(self.buffer, 0, rows, cols)

    def left(self, row_panel: Tensor | None, rows: slice) -> Tensor | None:
        """The factors of some rows; None if they are not multiplied."""
        if not self.multiplied:
            return None
        return self.x.factors(row_panel, rows, self.sign, left=True)

    def native(
        self,
        left: Tensor | None,
        row_panel: Tensor | None,
        col_panel: Tensor | None,
        rows: slice,
        cols: slice,
        first: int,  # where the tile's products begin
    ) -> _C.Gram:
        """A tile's product, taken unless that was done before, as the kernels want it."""
        products = None if self.certain else _cut(self.products, first, rows, cols)
        if left is not None:
            right = self.y.factors(col_panel, cols, self.sign, left=False)
            torch.mm(left, right.T, out=products)
        return _C.Gram(
            _C.Panel(matrix(row_panel), vector(self.x.squares[rows])),
            _C.Panel(matrix(col_panel), vector(self.y.squares[cols])),
            matrix(products),
            matrix(self.weights(rows, cols)),
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
        self.shape = len(sem), len(sem if sem2 is None else sem2)
        side = BF16_SIDE if multiplies_bf16(sem.dtype) else 1
        height, width = (side * length for length in (SELF_TILE if self.symmetric else TILE))
        self.tile_shape = height, width
        if not self.symmetric:
            self.tile_shape = _tile_shape(*self.shape, height, width)
        pairs = math.prod(map(min, self.tile_shape, self.shape))
        sides = [(sem, sem2, -1)]
        if unc is not None or unc2 is not None:
            sides.append((unc, unc2, 1))
        self.grams = []
        for first, second, sign in sides:
            x = Embedding(first, self.shape[0], sem.dtype)
            y = x if self.symmetric else Embedding(second, self.shape[1], sem.dtype)
            self.grams.append(Gram(x, y, sign, pairs))
        self.grams[0].multiplied = multiply_sem
        self.dtype = self.grams[0].x.epilogue_dtype
        self.keeps = False

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """The rows and the columns of each tile."""
        height, width = self.tile_shape
        for rows in parts(self.shape[0], height):
            for cols in parts(self.shape[1], width, rows.start if self.symmetric else 0):
                yield rows, cols

    def keep(self, kept: Tensor, *, again: bool = False) -> None:
        """Puts the products of each tile into memory of their own, ``kept`` ``[products, bytes]``.

        With ``again``, they are there, from another walk over the same pairs.
        """
        multiplied = [gram for gram in self.grams if gram.multiplied]
        for gram, memory in zip(multiplied, kept, strict=True):
            gram.products = memory.view(gram.x.product_dtype)
            gram.multiplied = not again
        self.keeps = True

    def __iter__(self) -> Iterator[Tile]:
        first = 0
        previous = None
        for rows, cols in self.tiles():
            if rows != previous:
                previous = rows
                row_panels = [gram.x.panel(rows) for gram in self.grams]
                lefts = [
                    gram.left(panel, rows)
                    for gram, panel in zip(self.grams, row_panels, strict=True)
                ]
            col_panels = [gram.y.panel(cols) for gram in self.grams]
            native = [
                gram.native(left, x, y, rows, cols, first)
                for gram, left, x, y in zip(self.grams, lefts, row_panels, col_panels, strict=True)
            ]
            weights = [gram.weights(rows, cols) for gram in self.grams]
            yield Tile(rows, cols, _C.Tile(*native), weights, row_panels, col_panels)
            if self.keeps:
                first += weights[0].numel()


def _tile_shape(rows: int, cols: int, height: int, width: int) -> tuple[int, int]:
    """As many pairs as ``height`` x ``width``, in a longer tile of few rows or columns."""
    pairs, least = height * width, width
    height = max(1, min(rows, height))
    width = max(1, min(cols, pairs // height))
    return (height if width >= least else pairs // width), width


def _cut(buffer: Tensor, first: int, rows: slice, cols: slice) -> Tensor:  # [n, m]
    """A tile's share of a buffer, from its element ``first`` on."""
    shape = _shape(rows, cols)
    return buffer[first : first + math.prod(shape)].view(shape)


def _shape(rows: slice, cols: slice) -> tuple[int, int]:
    return rows.stop - rows.start, cols.stop - cols.start


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


def multiplies_bf16(dtype: torch.dtype) -> bool:
    """Whether products are taken in bfloat16."""
    return dtype == torch.bfloat16 and _C.has_bf16()


def threads() -> int:
    """As many as PyTorch uses."""
    return torch.get_num_threads()


def metric_of(tau: float, gamma: float, learned: Tensor | None, form: str) -> _C.Metric:
    """The metric that an operation's arguments describe."""
    return _C.Metric(form, *((tau, gamma) if learned is None else learned.tolist()))
