"""Launches the Triton kernels of `rowstats`; called through `torch.ops.idml_fast`, checks done.

Each tile writes what it knows of its rows (and, where it stands for its mirror image, of its
columns) into a place of its own; a second kernel puts these together in the order of the tiles. A
problem of one column of tiles needs no second kernel.

What is known of an item, whether of one tile or of all, in `state_rows` numbers a statistic, all of
them 0 for no columns:

    log_sum_exp  the x of the largest term, and the sum of exp(scale (x' - x))
    sum, count   that
    hinge        the sum, and how many terms are positive
    histogram    the bins
    extremum     x, and one more than its column
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from idml_fast import backend
from idml_fast.rowstats import INTEGERS, NUMBERS, empty_results, state_rows

from .gradient import collect
from .score import score
from .tile import Walk, launch

# Items and tiles that `combine` takes at a time.
ITEMS = tl.constexpr(32)
TILES = tl.constexpr(32)


# What kernels are compiled for: these fields of each statistic, one statistic after the other.
FIELDS = tl.constexpr(11)
REDUCTION = tl.constexpr(0)
WHERE = tl.constexpr(1)
POWER = tl.constexpr(2)
BINS = tl.constexpr(3)
THRESHOLD = tl.constexpr(4)  # rows of the bounds; -1 for none
ABOVE = tl.constexpr(5)
BELOW = tl.constexpr(6)
VALUE = tl.constexpr(7)  # first rows of the values and of the integers; -1 for none
INTEGER = tl.constexpr(8)
STATE = tl.constexpr(9)  # first row of the state
SECOND = tl.constexpr(10)  # whether it has a second number there


def forward(*arguments: Any, make: type[Walk] = Walk) -> tuple[Tensor, ...]:
    """The results, see `idml_fast.rowstats.empty_results`."""
    labels, labels2, bounds, *description = arguments[8:15]
    values, integers, state, kept = empty_results(*arguments)
    walk = make(*arguments[:8])
    statistics, numbers = _described(*description[:4])
    if 0 in walk.shape:
        state.zero_()
    items = _items(walk, labels, labels2, bounds)
    results = state, values, integers, len(labels)
    # A quarter of the workspace: these chunks are large enough.
    sides = walk.sides(4 * len(state) / walk.config.cols, backend.workspace // 4)
    started = set()

    def put_together(of_tiles: Tensor, tiles: int, part: slice, continues: bool) -> None:
        launch(
            combine,
            triton.cdiv(part.stop - part.start, ITEMS.value),
            walk.device,
            *(numbers, of_tiles, tiles, len(state), part.start, part.stop, results),
            *(continues, statistics),
            num_warps=8,  # with 4 it spills on the A100
            num_stages=1,
        )

    for chunk in walk.chunks(*sides):
        n, m = chunk.shape
        height, width = walk.tiles(n, m)
        if walk.finishes and width == 1 and m == walk.shape[1] and not walk.symmetric:
            outputs = None, None, results
            walk.launch(chunk, reduce_tile, (numbers, *items, outputs), None, statistics)
            continue
        of_rows = walk.memory_of_tiles(chunk, width, len(state), n)
        of_cols = of_rows
        if not chunk.triangle:
            of_cols = walk.memory_of_tiles(chunk, height, len(state), m) if walk.symmetric else None
        outputs = _strided(of_rows), _strided(of_cols), None
        walk.launch(chunk, reduce_tile, (numbers, *items, outputs), None, statistics)
        sides = [(chunk.rows, of_rows)]
        if walk.symmetric and not chunk.triangle:
            sides.append((chunk.cols, of_cols))
        for part, of_tiles in sides:
            put_together(of_tiles, len(of_tiles), part, part.start in started)
            started.add(part.start)
    if 0 in walk.shape:
        put_together(state, 0, slice(0, len(labels)), False)
    return values, integers, state, kept


def backward(
    upstream: Tensor,  # [K, N]
    state: Tensor,  # [S, N]
    kept: Tensor,
    *arguments: Any,
    wanted: list[bool],
    make: type[Walk] = Walk,
) -> list[Tensor]:
    """The gradients of those operands that are wanted."""
    labels, labels2, bounds, *description = arguments[8:15]
    walk = make(*arguments[:8], backward=True)
    statistics, numbers = _described(*description[:4])
    items = _items(walk, labels, labels2, bounds)
    learned = upstream.contiguous(), state, len(labels)
    return collect(
        walk, arguments[4:8], wanted, differentiate, (numbers, *items, learned), statistics
    )


def _described(
    reductions: list[str], wheres: list[str], numbers: list[float], integers: list[int]
) -> tuple[tuple[Any, ...], tuple[tuple[float, ...], ...]]:
    """The fields of the statistics; and of each its scale, shift, low and width."""
    fields: list[Any] = []
    of_each: list[tuple[float, ...]] = []
    state = 0
    for k, (reduction, where) in enumerate(zip(reductions, wheres, strict=True)):
        bins, *place = integers[k * len(INTEGERS) : (k + 1) * len(INTEGERS)]
        power, *others = numbers[k * len(NUMBERS) : (k + 1) * len(NUMBERS)]
        second = reduction in ("log_sum_exp", "hinge", "extremum")
        fields += [reduction, where, power, bins, *place, state, second]
        of_each.append(tuple(others))
        state += state_rows(reduction, bins)
    return tuple(fields), tuple(of_each)


def _items(
    walk: Walk,
    labels: Tensor,  # [N]
    labels2: Tensor | None,  # [M]
    bounds: Tensor | None,  # [B, N]
) -> tuple[Any, ...]:
    """The labels of rows and columns, and the bounds of rows, as the kernels take them."""
    labels = labels.long().contiguous()
    labels2 = labels if walk.own else labels2.long().contiguous()
    return labels, labels2, None if bounds is None else bounds.contiguous(), len(labels)


def _strided(of_tiles: Tensor | None) -> tuple[Any, ...] | None:  # [tiles, S, n]
    return None if of_tiles is None else (of_tiles, *of_tiles.stride()[:2])


@triton.jit
def reduce_tile(
    pairs, place, arguments, metric, FORM: tl.constexpr, SYMMETRIC: tl.constexpr,
    UPSTREAM: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """The epilogue of the forward: writes what a tile knows of its rows, and of its columns if it
    stands for its mirror image; or the results, if it knows all."""
    numbers, labels, labels2, bounds, bounds_stride, outputs = arguments
    of_rows, of_cols, results = outputs
    row_start, col_start, row_there, col_there, tile_row, tile_col, _, on_diagonal = place
    alpha2, beta2, versine, _, _ = pairs
    scores = score(alpha2, beta2, versine, metric, FORM)
    same, there = compare(labels, labels2, place, SYMMETRIC)
    rows = tl.arange(0, scores.shape[0])
    cols = tl.arange(0, scores.shape[1])
    if of_rows is None:
        reduce_items(
            scores, same, there, row_start + rows, row_there, col_start + cols, numbers, bounds,
            bounds_stride, None, None, results, STATISTICS,
        )  # fmt: skip
    else:
        of_tile = of_rows[0] + tile_col.to(tl.int64) * of_rows[1]
        of_tile += tile_row * scores.shape[0] + rows
        reduce_items(
            scores, same, there, row_start + rows, row_there, col_start + cols, numbers, bounds,
            bounds_stride, of_tile, of_rows[2], None, STATISTICS,
        )  # fmt: skip
    if SYMMETRIC:
        if not on_diagonal:
            of_mirror = of_cols[0] + tile_row.to(tl.int64) * of_cols[1]
            of_mirror += tile_col * scores.shape[1] + cols
            reduce_items(
                tl.trans(scores), tl.trans(same), tl.trans(there), col_start + cols, col_there,
                row_start + rows, numbers, bounds, bounds_stride, of_mirror, of_cols[2], None,
                STATISTICS,
            )  # fmt: skip


@triton.jit
def compare(labels, labels2, place, SYMMETRIC: tl.constexpr):
    """Which pairs have the same label, and which are there and not an item with itself."""
    row_start, col_start, row_there, col_there, _, _, _, _ = place
    rows = row_start + tl.arange(0, row_there.shape[0])
    cols = col_start + tl.arange(0, col_there.shape[0])
    of_rows = tl.load(labels + rows, mask=row_there, other=0)
    of_cols = tl.load(labels2 + cols, mask=col_there, other=0)
    there = row_there[:, None] & col_there[None, :]
    if SYMMETRIC:
        there = there & (rows[:, None] != cols[None, :])
    return of_rows[:, None] == of_cols[None, :], there


@triton.jit
def raised(scores, POWER: tl.constexpr):
    """``scores ^ POWER``, of negative scores too if it is whole."""
    if POWER == 1:
        return scores
    elif POWER == 0.5:
        return tl.sqrt(scores)
    elif POWER > 1:
        return scores * raised(scores, POWER - 1)
    else:
        return tl.exp2(POWER * tl.log2(scores))


@triton.jit
def bounds_of(bounds, stride, row: tl.constexpr, items, there):
    """The bounds of some items, to be set against their scores."""
    return tl.load(bounds + row * stride + items, mask=there, other=0)[:, None]


@triton.jit
def look(
    x, same, there, items, items_there, bounds, stride, STATISTICS: tl.constexpr, k: tl.constexpr
):
    """Which pairs a statistic looks at. No window hides a NaN."""
    where: tl.constexpr = STATISTICS[k * FIELDS + WHERE]
    above: tl.constexpr = STATISTICS[k * FIELDS + ABOVE]
    below: tl.constexpr = STATISTICS[k * FIELDS + BELOW]
    found = there
    if where == "same":
        found = there & same
    elif where == "different":
        found = there & (same == 0)
    if above >= 0:
        found = found & ((x <= bounds_of(bounds, stride, above, items, items_there)) == 0)
    if below >= 0:
        found = found & ((x >= bounds_of(bounds, stride, below, items, items_there)) == 0)
    return found


@triton.jit
def reduce_items(
    scores, same, there, items, items_there, others, numbers, bounds, bounds_stride, memory,
    stride, results, STATISTICS: tl.constexpr,
):  # fmt: skip
    """What a tile knows of its items, along its second dimension: into the tile's memory, or into
    the results."""
    for k in tl.static_range(len(STATISTICS) // FIELDS):
        reduce_statistic(
            scores, same, there, items, items_there, others, numbers, bounds, bounds_stride,
            memory, stride, results, STATISTICS, k,
        )  # fmt: skip


@triton.jit
def reduce_statistic(
    scores, same, there, items, items_there, others, numbers, bounds, bounds_stride, memory,
    stride, results, STATISTICS: tl.constexpr, k: tl.constexpr,
):  # fmt: skip
    """One statistic of `reduce_items`."""
    reduction: tl.constexpr = STATISTICS[k * FIELDS + REDUCTION]
    scale, _, low, width = numbers[k]
    x = raised(scores, STATISTICS[k * FIELDS + POWER])
    looked = look(x, same, there, items, items_there, bounds, bounds_stride, STATISTICS, k)
    a = tl.zeros((scores.shape[0],), tl.float32)
    b = tl.zeros((scores.shape[0],), tl.float32)
    if reduction == "log_sum_exp":
        # The x of the largest term and not that term: it is exact, and so are differences.
        sign = tl.where(scale < 0, -1.0, 1.0)
        a = sign * tl.max(tl.where(looked, sign * x, float("-inf")), 1)
        # The largest may be infinite: minus itself it would be NaN.
        below = tl.where(x == a[:, None], 0.0, scale * (x - a[:, None]))
        b = tl.sum(tl.where(looked, tl.exp(below), 0.0), 1)
        a = tl.where(b == 0, 0.0, a)
    elif reduction == "sum":
        a = tl.sum(tl.where(looked, x, 0.0), 1)
    elif reduction == "count":
        a = tl.sum(looked.to(tl.float32), 1)
    elif reduction == "hinge":
        threshold = bounds_of(
            bounds, bounds_stride, STATISTICS[k * FIELDS + THRESHOLD], items, items_there
        )
        excess = tl.where(looked, scale * (x - threshold), 0.0)
        a = tl.sum(tl.where(excess < 0, 0.0, excess), 1)
        b = tl.sum((excess > 0).to(tl.float32), 1)
    elif reduction == "extremum":
        a, b = first_extremum(x, looked, others, scale)
    if reduction == "histogram":
        for bin in tl.static_range(STATISTICS[k * FIELDS + BINS] + 1):
            share = 1 - tl.abs(x - (low + bin * width)) / width
            share = tl.where(share < 0, 0.0, share)
            a = tl.sum(tl.where(looked, share, 0.0), 1)
            keep(a, b, items, items_there, numbers, memory, stride, results, STATISTICS, k, bin)
    else:
        keep(a, b, items, items_there, numbers, memory, stride, results, STATISTICS, k, 0)


@triton.jit
def first_extremum(x, looked, others, scale):
    """The largest scale x (scale is 1 or -1) and one more than where it first occurs, as bits; the
    first NaN before all."""
    last: tl.constexpr = 2**31 - 1
    is_nan = looked & (x != x)
    numbers = looked & (x == x)
    top = tl.max(tl.where(numbers, scale * x, float("-inf")), 1)
    wins = numbers & (scale * x == top[:, None])
    first_nan = tl.min(tl.where(is_nan, others[None, :], last), 1)
    first = tl.min(tl.where(wins, others[None, :], last), 1)
    value = tl.where(first_nan < last, float("nan"), scale * top)
    first = tl.where(first_nan < last, first_nan, first)
    column = tl.where(first < last, first + 1, 0)
    return value, column.to(tl.float32, bitcast=True)


@triton.jit
def keep(
    a, b, items, there, numbers, memory, stride, results, STATISTICS: tl.constexpr,
    k: tl.constexpr, bin: tl.constexpr,
):  # fmt: skip
    """Writes what is known of items by one tile: into its memory, or as the results."""
    reduction: tl.constexpr = STATISTICS[k * FIELDS + REDUCTION]
    if memory is not None:
        memory += (STATISTICS[k * FIELDS + STATE] + bin) * stride
        tl.store(memory, a, mask=there)
        if STATISTICS[k * FIELDS + SECOND]:
            tl.store(memory + stride, b, mask=there)
    else:
        if reduction == "extremum":
            b = b.to(tl.int32, bitcast=True)
        a = a.to(tl.float64)
        b = b.to(tl.float64)
        finish(a, b, items, there, numbers[k], results, STATISTICS, k, bin)


@triton.jit
def finish(
    a,
    b,
    items,
    there,
    numbers,
    results,
    STATISTICS: tl.constexpr,
    k: tl.constexpr,
    bin: tl.constexpr,
):
    """Writes the state of some items and the results that it stands for."""
    state, values, integers, count = results
    reduction: tl.constexpr = STATISTICS[k * FIELDS + REDUCTION]
    value: tl.constexpr = STATISTICS[k * FIELDS + VALUE]
    integer: tl.constexpr = STATISTICS[k * FIELDS + INTEGER]
    scale, shift, _, _ = numbers
    state += (STATISTICS[k * FIELDS + STATE] + bin) * count + items
    tl.store(state, a, mask=there)
    if STATISTICS[k * FIELDS + SECOND]:
        tl.store(state + count, b, mask=there)
    if reduction == "log_sum_exp":
        top = scale * (a.to(tl.float32) - shift)
        a = tl.where(b == 0, float("-inf"), top + tl.log(b.to(tl.float32)))
    elif reduction == "extremum":
        a = tl.where(b == 0, -scale * float("inf"), a)
        b -= 1
    elif reduction == "count":
        b = a
    if value >= 0:
        tl.store(values + (value + bin) * count + items, a.to(tl.float32), mask=there)
    if integer >= 0:
        tl.store(integers + integer * count + items, b.to(tl.int64), mask=there)


@triton.jit
def combine(
    numbers, of_tiles, tiles, state_rows, first, last, results, CONTINUES: tl.constexpr,
    STATISTICS: tl.constexpr,
):  # fmt: skip
    """Puts together what the tiles of a chunk know of its items, with what was known before."""
    local = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    items = first + local
    there = items < last
    count = last - first
    for k in tl.static_range(len(STATISTICS) // FIELDS):
        for bin in tl.static_range(STATISTICS[k * FIELDS + BINS] + 1):
            combine_statistic(
                numbers[k], of_tiles, tiles, state_rows, count, local, items, there, results,
                CONTINUES, STATISTICS, k, bin,
            )  # fmt: skip


@triton.jit
def combine_statistic(
    numbers, of_tiles, tiles, state_rows, count, local, items, there, results,
    CONTINUES: tl.constexpr, STATISTICS: tl.constexpr, k: tl.constexpr, bin: tl.constexpr,
):  # fmt: skip
    """One statistic of `combine`, or one bin of a histogram."""
    reduction: tl.constexpr = STATISTICS[k * FIELDS + REDUCTION]
    scale = numbers[0]
    state = results[0]
    row = STATISTICS[k * FIELDS + STATE] + bin
    a = tl.zeros((ITEMS,), tl.float64)
    b = tl.zeros((ITEMS,), tl.float64)
    if CONTINUES:
        a = tl.load(state + row * results[3] + items, mask=there, other=0)
        if STATISTICS[k * FIELDS + SECOND]:
            b = tl.load(state + (row + 1) * results[3] + items, mask=there, other=0)
    tile = tl.arange(0, TILES)
    while tl.min(tile) < tiles:
        place = (tile[:, None].to(tl.int64) * state_rows + row) * count + local[None, :]
        mask = (tile < tiles)[:, None] & there[None, :]
        more_a = tl.load(of_tiles + place, mask=mask, other=0)
        more_b = more_a
        if STATISTICS[k * FIELDS + SECOND]:
            more_b = tl.load(of_tiles + place + count, mask=mask, other=0)
        if reduction == "log_sum_exp":
            a, b = add_log_sum_exp(a, b, more_a, more_b, scale)
        elif reduction == "extremum":
            a, b = add_extremum(a, b, more_a, more_b, scale)
        else:
            a += tl.sum(more_a.to(tl.float64), 0)
            b += tl.sum(more_b.to(tl.float64), 0)
        tile += TILES
    finish(a, b, items, there, numbers, results, STATISTICS, k, bin)


@triton.jit
def add_log_sum_exp(top, total, tops, totals, scale):
    """The top and the total of some tiles added to those before."""
    sign = tl.where(scale < 0, -1.0, 1.0)
    before = tl.where(total == 0, float("-inf"), sign * top.to(tl.float32))
    found = tl.max(tl.where(totals == 0, float("-inf"), sign * tops), 0)
    found = tl.where(before > found, before, found)
    terms = tl.where(
        sign * tops == found[None, :],
        totals,
        totals * tl.exp(scale * (tops - sign * found[None, :])),
    )
    terms = tl.where(totals == 0, 0.0, terms)
    fade = tl.where(before == found, 1.0, tl.exp(tl.abs(scale) * (before - found)))
    old = tl.where(total == 0, 0.0, total * fade.to(tl.float64))
    total = old + tl.sum(terms.to(tl.float64), 0)
    return tl.where(total == 0, 0.0, sign * found).to(tl.float64), total


@triton.jit
def add_extremum(value, column, values, columns, scale):
    """The extremum of some tiles, in the order of their columns, or the one before."""
    last: tl.constexpr = 2**31 - 1
    columns = columns.to(tl.int32, bitcast=True)
    there = columns != 0
    is_nan = there & (values != values)
    numbers = there & (values == values)
    top = tl.max(tl.where(numbers, scale * values, float("-inf")), 0)
    wins = numbers & (scale * values == top[None, :])
    first_nan = tl.min(tl.where(is_nan, columns, last), 0)
    first = tl.min(tl.where(wins, columns, last), 0)
    found = tl.where(first_nan < last, float("nan"), scale * top)
    first = tl.where(first_nan < last, first_nan, first)
    before = value.to(tl.float32)
    better = (column == 0) | (scale * found > scale * before) | (found != found)
    better = better & (first < last) & (before == before)
    return (
        tl.where(better, found, before).to(tl.float64),
        tl.where(better, first.to(tl.float64), column),
    )


@triton.jit
def differentiate(
    pairs, place, arguments, metric, FORM: tl.constexpr, SYMMETRIC: tl.constexpr,
    STATISTICS: tl.constexpr,
):  # fmt: skip
    """The upstream gradient of a tile's scores: of the statistics of its rows, and of those of its
    columns if these are items as well."""
    numbers, labels, labels2, bounds, bounds_stride, learned = arguments
    row_start, col_start, row_there, col_there, _, _, _, _ = place
    alpha2, beta2, versine, _, _ = pairs
    scores = score(alpha2, beta2, versine, metric, FORM)
    same, there = compare(labels, labels2, place, SYMMETRIC)
    rows = row_start + tl.arange(0, scores.shape[0])
    cols = col_start + tl.arange(0, scores.shape[1])
    found = tl.zeros_like(scores)
    for k in tl.static_range(len(STATISTICS) // FIELDS):
        if STATISTICS[k * FIELDS + VALUE] >= 0:
            found += derivatives(
                scores, same, there, rows, row_there, cols, numbers[k], bounds, bounds_stride,
                learned, STATISTICS, k,
            )  # fmt: skip
    if SYMMETRIC:
        for k in tl.static_range(len(STATISTICS) // FIELDS):
            if STATISTICS[k * FIELDS + VALUE] >= 0:
                mirror = derivatives(
                    tl.trans(scores), tl.trans(same), tl.trans(there), cols, col_there, rows,
                    numbers[k], bounds, bounds_stride, learned, STATISTICS, k,
                )  # fmt: skip
                found += tl.trans(mirror)
    return found


@triton.jit
def derivatives(
    scores, same, there, items, items_there, others, numbers, bounds, bounds_stride, learned,
    STATISTICS: tl.constexpr, k: tl.constexpr,
):  # fmt: skip
    """The upstream gradient of a statistic of some items times its derivatives by their scores."""
    upstream, state, count = learned
    reduction: tl.constexpr = STATISTICS[k * FIELDS + REDUCTION]
    power: tl.constexpr = STATISTICS[k * FIELDS + POWER]
    scale, _, low, width = numbers
    x = raised(scores, power)
    looked = look(x, same, there, items, items_there, bounds, bounds_stride, STATISTICS, k)
    upstream += STATISTICS[k * FIELDS + VALUE] * count + items
    incoming = tl.load(upstream, mask=items_there, other=0)[:, None]
    state += STATISTICS[k * FIELDS + STATE] * count + items
    found = tl.zeros_like(scores)
    if reduction == "log_sum_exp":
        top = tl.load(state, mask=items_there, other=0).to(tl.float32)[:, None]
        total = tl.load(state + count, mask=items_there, other=1).to(tl.float32)[:, None]
        below = tl.where(x == top, 0.0, scale * (x - top))
        found = (incoming * scale / total) * tl.exp(below)
    elif reduction == "sum":
        found += incoming
    elif reduction == "hinge":
        threshold = bounds_of(
            bounds, bounds_stride, STATISTICS[k * FIELDS + THRESHOLD], items, items_there
        )
        excess = scale * (x - threshold)
        found = tl.where(excess > 0, incoming * scale, tl.where(excess <= 0, 0.0, excess))
    elif reduction == "histogram":
        for bin in tl.static_range(STATISTICS[k * FIELDS + BINS] + 1):
            slope = tl.load(upstream + bin * count, mask=items_there, other=0)[:, None] / width
            away = x - (low + bin * width)
            slope = tl.where(away > 0, -slope, slope)
            found += tl.where((away != 0) & (tl.abs(away) < width), slope, 0.0)
        found = tl.where(x != x, x, found)
    elif reduction == "extremum":
        column = tl.load(state + count, mask=items_there, other=0).to(tl.int64)[:, None] - 1
        found = tl.where(others[None, :] == column, incoming, 0.0)
    if power != 1:  # nothing for identical items
        found *= power * raised(scores, power - 1)
        found = tl.where(scores == 0, 0.0, found)
    return tl.where(looked, found, 0.0)
