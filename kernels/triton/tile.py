"""The walk over tiles of pairs on a GPU: both Gram products, the squares, then an epilogue.

Imported when a kernel is first launched, never with the package. A tile has as many columns as rows
or a fraction of them, so that rows against themselves can take the upper triangle of square blocks
of tiles, and a tile beside the diagonal stands for its mirror image too.

Kernels take an embedding as a tuple: its memory, the strides of items and of features, and its
squared norms, None if every tile takes them itself. Four times None stands for zeros. Offsets
within a tile are of 32 bits, so that a stride may be 2^24 at the most; all others are of 64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .score import inverse_root

# Row tiles that go along the columns together, so that both stay in the L2 cache.
GROUP = 8
# A problem of so few tiles is over before another kernel would have started: its tiles take their
# norms and see to their near pairs themselves.
FEW_TILES = 264
# Programs that look for the tiles to be taken again, and how many tiles each looks at together.
LOOKING = 264
LOOKED_AT = 128
# Items and features at a time of `squared_norms`.
NORM_ITEMS = tl.constexpr(16)
NORM_WIDTH = tl.constexpr(256)
# Squares of differences that are added up apart: the error of a sum grows with the terms that are
# added one after the other.
SUMMED = tl.constexpr(16)


class Chunk(NamedTuple):
    """Some rows and some columns, whose tiles are walked by one launch."""

    rows: slice
    cols: slice
    # Whether these are the upper triangle of rows against themselves.
    triangle: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start


class Walk:
    """All pairs of rows and columns.

    Without a second side the rows are the columns, and each tile stands for its mirror image too;
    not so with ``mirrored=False``.
    """

    # Whether a tile may do all that its rows need: in a problem of few tiles take their norms and
    # see to near pairs, and give the results if it has all of the columns.
    finishes = True

    def __init__(
        self,
        sem: Tensor,  # [N, Ds]
        unc: Tensor | None,  # [N, Du]
        sem2: Tensor | None,  # [M, Ds]
        unc2: Tensor | None,  # [M, Du]
        tau: float,
        gamma: float,
        learned: Tensor | None,  # [2]
        form: str,
        *,
        backward: bool = False,
        mirrored: bool = True,
    ) -> None:
        self.own = sem2 is None
        self.symmetric = self.own and mirrored
        self.form = form
        self.metric = metric_of(tau, gamma, learned)
        if self.own:
            sem2, unc2 = sem, unc
        self.embeddings = sem, unc, sem2, unc2
        self.shape = len(sem), len(sem2)
        self.device, self.dtype = sem.device, sem.dtype
        self.widths = sem.shape[1], max(0 if x is None else x.shape[1] for x in (unc, unc2))
        self.precision = configs.precision_of(sem.dtype)
        purpose = "forward"
        if backward:
            purpose = "mirrored_backward" if self.symmetric else "backward"
        self.config = self.configure(purpose)
        self.few = self.finishes and math.prod(self.tiles(*self.shape)) <= FEW_TILES
        given = (sem, unc) if self.own else self.embeddings
        measured = [embedding(x) for x in given] if self.few else _with_norms(*given)
        self.measured = measured * 2 if self.own else measured

    def configure(self, purpose: str) -> configs.Config:
        """How tiles are walked."""
        return configs.config_of(purpose, max(self.widths), self.dtype, self.precision, self.device)

    def tiles(self, rows: int, cols: int) -> tuple[int, int]:
        """How many tiles so many rows and columns have, in each direction."""
        return triton.cdiv(rows, self.config.rows), triton.cdiv(cols, self.config.cols)

    def chunks(self, height: int, width: int) -> Iterator[Chunk]:
        """All pairs, rows after rows, in chunks of at most so many rows and columns.

        Both are multiples of a tile's rows, and equal in a symmetric walk.
        """
        for rows in parts(self.shape[0], height):
            for cols in parts(self.shape[1], width, rows.start if self.symmetric else 0):
                yield Chunk(rows, cols, self.symmetric and rows == cols)

    def sides(self, bytes_per_pair: float, limit: int) -> tuple[int, int]:
        """The height and width of the largest chunks with so many bytes a pair within a limit.

        They are square, which needs the fewest of both, unless there are too few rows or columns.
        """
        block = self.config.rows
        pairs = int(limit / bytes_per_pair)
        rows, cols = (triton.cdiv(count, block) * block for count in self.shape)
        if self.symmetric and rows * cols > pairs:
            rows = cols = math.isqrt(pairs)
        height = min(rows, max(math.isqrt(pairs), pairs // max(cols, 1)))
        height = max(height // block * block, block)
        width = min(cols, pairs // height)
        return height, max(width // block * block, block)

    def programs(self, chunk: Chunk) -> int:
        """How many programs take the tiles of a chunk, see `place_of_tile`."""
        row_tiles, col_tiles = self.tiles(*chunk.shape)
        groups = triton.cdiv(row_tiles, GROUP)
        if chunk.triangle:
            blocks = triton.cdiv(groups, 2) * (2 * row_tiles - (groups - 1) * GROUP) * GROUP
            return blocks * self.config.rows // self.config.cols
        return groups * GROUP * col_tiles

    def memory_of_tiles(self, chunk: Chunk, *shape: int) -> Tensor:
        """Memory for what the tiles of a chunk know of their items, one after the other.

        Where rows and columns share it, the mirror image of a tile has one place for as many tiles
        as a square block has: the others stay 0.
        """
        make = torch.zeros if chunk.triangle else torch.empty
        return make(*shape, dtype=torch.float32, device=self.device)

    def launch(
        self,
        chunk: Chunk,
        epilogue: Any,
        arguments: tuple[Any, ...],
        upstream: Any = None,
        statistics: tuple[Any, ...] = (),
    ) -> None:
        """Runs ``epilogue(pairs, place, arguments, metric, FORM, SYMMETRIC, UPSTREAM, STATISTICS)``
        on each tile of a chunk.

        * ``pairs``: alpha^2, beta^2 and the versine of each, ``[rows, cols]`` of a tile, and
          1 / ||s|| of its rows and of its columns (the last three are 0 in the distance form);
        * ``place``: the tile's first row and first column, which of its rows and columns are there,
          its row and column among the chunk's tiles, its program, and whether it is on the
          diagonal, where a tile of a symmetric walk has (i, j) as well as (j, i).

        An epilogue may be run twice on a tile: it must write, not add up.
        """
        programs = self.programs(chunk)
        flags = None
        if not self.few:
            flags = torch.empty(programs, dtype=torch.int8, device=self.device)
        for near in ["here"] if self.few else ["flag", "again"]:
            launch(
                walk,
                min(programs, LOOKING) if near == "again" else programs,
                self.device,
                *self.measured,
                self.metric,
                *(chunk.rows.start, chunk.rows.stop, chunk.cols.start, chunk.cols.stop),
                flags,
                programs,
                arguments,
                *self.widths,
                *(configs.near_of(self.dtype, self.precision), near),
                *(self.form, self.precision),
                *(self.own, self.symmetric, chunk.triangle),
                *(epilogue, upstream, statistics),
                *(self.config.rows, self.config.cols, self.config.width, GROUP, LOOKED_AT),
                num_warps=self.config.warps,
                num_stages=self.config.stages,
            )


def launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: int
) -> None:
    """Starts a kernel on the current stream of a device; nothing for no programs."""
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*arguments, **options)


def metric_of(tau: float, gamma: float, learned: Tensor | None) -> tuple[Any, ...]:
    """A metric as the kernels take it, see score.py."""
    if learned is None and tau == math.inf:
        return None, None, None
    return 1 / tau, gamma, learned


def embedding(x: Tensor | None, squares: Tensor | None = None) -> tuple[Any, ...]:  # [n, D], [n]
    """An embedding as the kernels take it."""
    return (None,) * 4 if x is None else (x, *x.stride(), squares)


def parts(count: int, size: int, first: int = 0) -> Iterator[slice]:
    """``range(first, count)`` in slices of ``size``, the last one shorter."""
    for start in range(first, count, size):
        yield slice(start, min(start + size, count))


def _with_norms(*embeddings: Tensor | None) -> list[tuple[Any, ...]]:
    """Embeddings as the kernels take them, with their squared norms, in one launch."""
    counts = [0 if x is None else len(x) for x in embeddings]
    device = embeddings[0].device
    squares = torch.empty(sum(counts), dtype=torch.float32, device=device).split(counts)
    measured = [embedding(x, own) for x, own in zip(embeddings, squares, strict=True)]
    given = [k for k, x in enumerate(embeddings) if x is not None]
    launch(
        squared_norms,
        sum(triton.cdiv(n, NORM_ITEMS.value) for n in counts),
        device,
        tuple(measured[k] for k in given),
        tuple(counts[k] for k in given),
        tuple(embeddings[k].shape[1] for k in given),
        num_warps=4,
        num_stages=1,
    )
    return measured


@triton.jit
def squared_norms(embeddings, counts, WIDTHS: tl.constexpr):
    """The squared norms of all embeddings, each into its own memory."""
    block = tl.program_id(0)
    for k in tl.static_range(len(WIDTHS)):
        count = counts[k]
        start = block * NORM_ITEMS
        if (start >= 0) & (start < count):
            items = tl.arange(0, NORM_ITEMS)
            x = from_item(embeddings[k], start)
            found = norms_of(x, tl.minimum(items, count - start - 1), WIDTHS[k])
            tl.store(x[3] + items, found, mask=items < count - start)
        block -= tl.cdiv(count, NORM_ITEMS)


@triton.jit
def from_item(x, item):
    """An embedding from one item on, so that what follows needs no offsets of 64 bits."""
    memory, item_stride, feature_stride, squares = x
    if memory is not None:
        memory += item.to(tl.int64) * item_stride
    if squares is not None:
        squares += item
    return memory, item_stride, feature_stride, squares


@triton.jit
def norms_of(x, items, WIDTH: tl.constexpr):
    """``||x_i||^2`` of some items."""
    memory, item_stride, feature_stride, _ = x
    found = tl.zeros((items.shape[0],), tl.float32)
    features = tl.arange(0, NORM_WIDTH)
    for start in range(0, WIDTH, NORM_WIDTH):
        place = items[:, None] * item_stride + features[None, :] * feature_stride
        there = (features < WIDTH - start)[None, :]
        part = tl.load(memory + place, mask=there, other=0).to(tl.float32)
        found += tl.sum(part * part, 1)
        memory += tl.cast(feature_stride, tl.int64) * NORM_WIDTH
    return found


@triton.jit
def load_norms(x, items, WIDTH: tl.constexpr):
    """The squared norms of some items, taken now if they are not there."""
    if x[0] is None:
        return tl.zeros((items.shape[0],), tl.float32)
    elif x[3] is None:
        return norms_of(x, items, WIDTH)
    else:
        return tl.load(x[3] + items)


@triton.jit
def dot_products(
    x, y, rows, cols, WIDTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """``x_i . y_j`` of all rows and columns, without masks but for the last features."""
    features = tl.arange(0, STEP)
    left, row_stride, left_stride, _ = x
    right, col_stride, right_stride, _ = y
    left_place = rows[:, None] * row_stride + features[None, :] * left_stride
    right_place = cols[None, :] * col_stride + features[:, None] * right_stride
    found = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for _ in range(WIDTH // STEP):
        a = tl.load(left + left_place)
        b = tl.load(right + right_place)
        found = tl.dot(a, b, found, input_precision=PRECISION)
        left += tl.cast(left_stride, tl.int64) * STEP
        right += tl.cast(right_stride, tl.int64) * STEP
    if WIDTH % STEP != 0:
        there = features < WIDTH % STEP
        a = tl.load(left + left_place, mask=there[None, :], other=0)
        b = tl.load(right + right_place, mask=there[:, None], other=0)
        found = tl.dot(a, b, found, input_precision=PRECISION)
    return found


@triton.jit
def store_tile(values, memory, row_stride, row, col, there):
    """Writes a tile where it belongs in a matrix."""
    rows = row + tl.arange(0, values.shape[0]).to(tl.int64)
    cols = col + tl.arange(0, values.shape[1])
    tl.store(memory + rows[:, None] * row_stride + cols[None, :], values, mask=there)


@triton.jit
def squares_of_differences(x, y, rows, cols, SIGN: tl.constexpr, WIDTH: tl.constexpr):
    """``||x_i + SIGN y_j||^2``, feature by feature."""
    left, row_stride, left_stride, _ = x
    right, col_stride, right_stride, _ = y
    left_place = rows * row_stride
    right_place = cols * col_stride
    found = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    feature = 0
    while feature < WIDTH:
        part = tl.zeros_like(found)
        end = tl.minimum(feature + SUMMED, WIDTH)
        while feature < end:
            a = tl.load(left + left_place).to(tl.float32)
            b = tl.load(right + right_place).to(tl.float32)
            difference = a[:, None] + SIGN * b[None, :]
            part += difference * difference
            left += left_stride
            right += right_stride
            feature += 1
        found += part
    return found


@triton.jit
def squares_of_pairs(
    dots, x, y, rows, cols, scale, own, SIGN: tl.constexpr, WIDTH: tl.constexpr,
    LIMIT: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """``||x_i + SIGN y_j||^2`` from products, and whether they have cancelled for any pair but
    ``own``: below a share LIMIT of ``||x||^2 + ||y||^2``, the scale. Then all of the tile's are
    taken from differences, here or when the tile is taken again."""
    found = scale + (2 * SIGN) * dots
    any_near = tl.max(((found < LIMIT * scale) & (own == 0)).to(tl.int32))
    if NEAR == "here":
        if any_near > 0:
            found = squares_of_differences(x, y, rows, cols, SIGN, WIDTH)
    return tl.where(found < 0, 0.0, found), any_near  # a NaN stays


@triton.jit
def versines_of_pairs(
    dots, alpha2, row_squares, col_squares, inverse_row, inverse_col, near, NEAR: tl.constexpr
):
    """``1 - cos``; where the products have cancelled ``(||x - y||^2 - (||x|| - ||y||)^2) / (2 ||x||
    ||y||)``. A zero vector has cosine 0, identical ones have versine 0."""
    inverses = inverse_row[:, None] * inverse_col[None, :]
    if NEAR == "flag":
        found = 1 - dots * inverses
    else:
        difference = (row_squares * inverse_row)[:, None] - (col_squares * inverse_col)[None, :]
        found = (alpha2 - difference * difference) * inverses * 0.5
        found = tl.where(inverses == 0, 1.0, found)
        if NEAR == "here":
            found = tl.where(near, found, 1 - dots * inverses)
    found = tl.where(found < 0, 0.0, found)
    return tl.where(alpha2 == 0, 0.0, found)


@triton.jit
def place_of_tile(
    program, row_tiles, col_tiles, TRIANGLE: tl.constexpr, GROUP: tl.constexpr, RATIO: tl.constexpr
):
    """The tile that a program takes, as its row and column among the tiles; and whether it is one.

    A group of row tiles goes along the columns together. In a triangle, where a later group has
    fewer columns, the first and the last group are laid end to end, the second and the last but
    one, and so on: all of these are equally long. There it goes by blocks of RATIO tiles.
    """
    groups = tl.cdiv(row_tiles, GROUP)
    part = program % RATIO
    length = col_tiles
    if TRIANGLE:
        program = program // RATIO
        length = 2 * row_tiles - (groups - 1) * GROUP
    group = program // (GROUP * length)
    rest = program % (GROUP * length)
    col = rest // GROUP
    there = group >= 0
    if TRIANGLE:
        first_length = row_tiles - group * GROUP
        second = groups - 1 - group
        is_second = col >= first_length
        there = (group != second) | (is_second == 0)
        col = tl.where(is_second, col - first_length + second * GROUP, col + group * GROUP)
        group = tl.where(is_second, second, group)
    row = group * GROUP + rest % GROUP
    there = there & (row < row_tiles)
    if TRIANGLE:
        there = there & (row <= col)
        col = col * RATIO + part
        there = there & (col < col_tiles)
    return row, col, there


@triton.jit
def take_tile(
    program, sem, unc, sem2, unc2, metric, first_row, last_row, first_col, last_col, flags,
    arguments, SEM_WIDTH: tl.constexpr, UNC_WIDTH: tl.constexpr, LIMIT: tl.constexpr,
    NEAR: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
    SYMMETRIC: tl.constexpr, TRIANGLE: tl.constexpr, EPILOGUE: tl.constexpr,
    UPSTREAM: tl.constexpr, STATISTICS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of pairs, see `Walk.launch`."""
    row_tiles = tl.cdiv(last_row - first_row, ROWS)
    col_tiles = tl.cdiv(last_col - first_col, COLS)
    tile_row, tile_col, there = place_of_tile(
        program, row_tiles, col_tiles, TRIANGLE, GROUP, ROWS // COLS
    )
    any_near = 0
    if there:
        row_start = first_row + tile_row * ROWS
        col_start = first_col + tile_col * COLS
        on_diagonal = (col_start >= row_start) & (col_start < row_start + ROWS)
        rows = tl.arange(0, ROWS)
        cols = tl.arange(0, COLS)
        row_there = rows < last_row - row_start
        col_there = cols < last_col - col_start
        # Beyond the edge the last item stands in, so that no product needs a mask.
        rows = tl.minimum(rows, last_row - row_start - 1)
        cols = tl.minimum(cols, last_col - col_start - 1)
        row_sem = from_item(sem, row_start)
        row_unc = from_item(unc, row_start)
        col_sem = from_item(sem2, col_start)
        col_unc = from_item(unc2, col_start)

        # `unc` first: it leaves one number a pair, whereas the cosine forms need two of `sem`.
        row_squares = load_norms(row_unc, rows, UNC_WIDTH)
        col_squares = load_norms(col_unc, cols, UNC_WIDTH)
        beta2 = row_squares[:, None] + col_squares[None, :]
        near_unc = 0
        if unc[0] is not None and unc2[0] is not None:
            if NEAR == "again":
                beta2 = squares_of_differences(row_unc, col_unc, rows, cols, 1, UNC_WIDTH)
            else:
                dots = dot_products(row_unc, col_unc, rows, cols, UNC_WIDTH, STEP, PRECISION)
                no_own = tl.zeros_like(dots) > 0
                beta2, near_unc = squares_of_pairs(
                    dots, row_unc, col_unc, rows, cols, beta2, no_own, 1, UNC_WIDTH, LIMIT, NEAR
                )

        row_squares = load_norms(row_sem, rows, SEM_WIDTH)
        col_squares = load_norms(col_sem, cols, SEM_WIDTH)
        scale = row_squares[:, None] + col_squares[None, :]
        own = scale < 0
        if OWN:
            own = (rows + row_start)[:, None] == (cols + col_start)[None, :]
        dots = scale
        if NEAR == "again":
            alpha2 = squares_of_differences(row_sem, col_sem, rows, cols, -1, SEM_WIDTH)
        else:
            dots = dot_products(row_sem, col_sem, rows, cols, SEM_WIDTH, STEP, PRECISION)
            alpha2, any_near = squares_of_pairs(
                dots, row_sem, col_sem, rows, cols, scale, own, -1, SEM_WIDTH, LIMIT, NEAR
            )
            any_near |= near_unc
        if OWN:  # exactly, unless the item has a NaN or an infinity
            alpha2 = tl.where(own, scale - scale, alpha2)
        if FORM == "distance":
            versine = tl.zeros_like(alpha2)
            inverse_row = tl.zeros_like(row_squares)
            inverse_col = tl.zeros_like(col_squares)
        else:
            inverse_row = inverse_root(row_squares)
            inverse_col = inverse_root(col_squares)
            near = alpha2 < LIMIT * scale
            versine = versines_of_pairs(
                dots, alpha2, row_squares, col_squares, inverse_row, inverse_col, near, NEAR
            )
        pairs = alpha2, beta2, versine, inverse_row, inverse_col
        place = (
            row_start, col_start, row_there, col_there, tile_row, tile_col, program, on_diagonal
        )  # fmt: skip
        EPILOGUE(pairs, place, arguments, metric, FORM, SYMMETRIC, UPSTREAM, STATISTICS)
    if NEAR == "flag":
        tl.store(flags + program, any_near)


@triton.jit
def walk(
    sem, unc, sem2, unc2, metric, first_row, last_row, first_col, last_col, flags, tiles,
    arguments, SEM_WIDTH: tl.constexpr, UNC_WIDTH: tl.constexpr, LIMIT: tl.constexpr,
    NEAR: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
    SYMMETRIC: tl.constexpr, TRIANGLE: tl.constexpr, EPILOGUE: tl.constexpr,
    UPSTREAM: tl.constexpr, STATISTICS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STEP: tl.constexpr, GROUP: tl.constexpr, LOOKED_AT: tl.constexpr,
):  # fmt: skip
    """A tile a program. NEAR says what becomes of tiles with near pairs: their squares are taken
    from differences "here", or they are "flag"ged, and the flagged tiles are taken "again", from
    differences: apart, since the code for both would not fit the registers."""
    program = tl.program_id(0)
    if NEAR == "again":
        start = program * LOOKED_AT
        while start < tiles:
            near = start + tl.arange(0, LOOKED_AT)
            flagged = tl.load(flags + near, mask=near < tiles, other=0)
            # The next flagged tile, one after the other.
            tile = tl.min(tl.where(flagged != 0, near, tiles))
            while tile < tiles:
                take_tile(
                    tile, sem, unc, sem2, unc2, metric, first_row, last_row, first_col, last_col,
                    flags, arguments, SEM_WIDTH, UNC_WIDTH, LIMIT, NEAR, FORM, PRECISION, OWN,
                    SYMMETRIC, TRIANGLE, EPILOGUE, UPSTREAM, STATISTICS, ROWS, COLS, STEP, GROUP,
                )  # fmt: skip
                tile = tl.min(tl.where((flagged != 0) & (near > tile), near, tiles))
            start += tl.num_programs(0) * LOOKED_AT
    else:
        take_tile(
            program, sem, unc, sem2, unc2, metric, first_row, last_row, first_col, last_col,
            flags, arguments, SEM_WIDTH, UNC_WIDTH, LIMIT, NEAR, FORM, PRECISION, OWN, SYMMETRIC,
            TRIANGLE, EPILOGUE, UPSTREAM, STATISTICS, ROWS, COLS, STEP, GROUP,
        )  # fmt: skip
