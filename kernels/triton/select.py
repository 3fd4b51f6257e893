"""The second half of `nearest`: of the keys of a chunk of pairs and the best so far, the k largest.

A key is a float32 as an int32 of the same order. Integers can be halved between: the k-th largest
is found by counting, not by sorting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tile

# The key of a pair that is not looked at, and of a place that has no column yet.
NOTHING = tl.constexpr(-(2**31))
INFINITY = tl.constexpr(0x7F800000)  # the bits of a float32, and its key
NAN = tl.constexpr(0x7FC00000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all bits of a float32 but its sign; above any key
# The most that one program holds in its registers, of the best and of a chunk.
MOST_BEST = 4096
MOST_KEYS = 8192
# Threads of a warp; it holds at least one key each, so that none is held twice.
LANES = 32
# How many keys a thread searches, and how many it then writes at a time.
KEYS_PER_THREAD = 32
STEP_PER_THREAD = 4


def values_of(keys: Tensor) -> Tensor:  # any shape
    """The float32 numbers that `ordered` made these keys of; -inf where there is `NOTHING`."""
    magnitudes = keys.clamp(min=-INFINITY.value).abs().view(torch.float32)
    return torch.where(keys < 0, -magnitudes, magnitudes)


def merge(
    keys: Tensor,  # [n, m] of int32, rows contiguous
    best_keys: Tensor,  # [n, k] of int32, contiguous
    best_columns: Tensor,  # [n, k] of int64, contiguous
    first: int,
    scores: Tensor | None = None,  # [n, m] of float32, rows contiguous
    best_scores: Tensor | None = None,  # [n, k] of float32, contiguous
) -> None:
    """Lets the next columns take part: the best are changed in place.

    Replaces::

        keys, place = torch.cat((best_keys, keys), 1).sort(stable=True, descending=True)
        place = place[:, :k].sort().values
        best_columns = torch.cat((best_columns, columns), 1).gather(1, place)

    Nothing is sorted and nothing of n x m is allocated, unless k is above 4096, more than a program
    holds: then it is done like that. A row none of whose keys is better than its k best is only
    read.

    Args:
        keys: of the pairs of some rows and the next columns, see `ordered`; a pair that is not
            looked at has `NOTHING`.
        best_keys, best_columns: the k largest so far, in the order of their columns. Of equal keys
            that of the smaller column is kept. Places without a column are the last and have
            `NOTHING`; they are left as they are.
        first: the number of the first of these columns among all.
        scores, best_scores: numbers that go along with the keys.
    """
    k = best_keys.shape[1]
    if k > MOST_BEST:
        _merge_by_sorting(keys, best_keys, best_columns, first, scores, best_scores)
        return
    for columns in tile.parts(keys.shape[1], MOST_KEYS):
        part = keys[:, columns]
        part_scores = None if scores is None else scores[:, columns]
        best, new = (max(LANES, triton.next_power_of_2(n)) for n in (k, part.shape[1]))
        warps = max(1, max(best, new) // (KEYS_PER_THREAD * LANES))
        tile.launch(
            merge_row,
            len(keys),
            keys.device,
            *(part, part.stride(0), part.shape[1]),
            *(best_keys, best_columns, k, first + columns.start),
            *(part_scores, 0 if scores is None else part_scores.stride(0), best_scores),
            *(best, new, STEP_PER_THREAD * LANES * warps),
            num_warps=warps,
            num_stages=1,
        )


def _merge_by_sorting(
    keys: Tensor,  # [n, m]
    best_keys: Tensor,  # [n, k]
    best_columns: Tensor,  # [n, k]
    first: int,
    scores: Tensor | None,  # [n, m]
    best_scores: Tensor | None,  # [n, k]
) -> None:
    """`merge` by PyTorch's sort."""
    n, m = keys.shape
    k = best_keys.shape[1]
    columns = torch.arange(first, first + m, device=keys.device).expand(n, m)
    found, place = torch.cat((best_keys, keys), 1).sort(stable=True, descending=True)
    # Back into the order of columns, behind them those that there are not.
    place = place[:, :k].masked_fill(found[:, :k] == NOTHING.value, k + m).sort().values
    there = place < k + m
    place = place.clamp(max=k + m - 1)
    together = [(best_keys, keys), (best_columns, columns)]
    if scores is not None:
        together.append((best_scores, scores))
    for best, new in together:
        best.copy_(torch.cat((best, new), 1).gather(1, place).where(there, best))


@triton.jit
def ordered(values):
    """The keys of float32 numbers: integers of the same order, NaN above all of them.

    -0 and 0 are one key, and so are all NaN; -inf is above `NOTHING`.
    """
    bits = values.to(tl.int32, bitcast=True)
    magnitudes = bits & MAGNITUDE
    keys = tl.where(bits < 0, -magnitudes, magnitudes)
    return tl.where(magnitudes > INFINITY, NAN, keys)


@triton.jit
def reaching(best, new, bar):
    """How many keys are at the bar or above."""
    return tl.sum((best >= bar).to(tl.int32), 0) + tl.sum((new >= bar).to(tl.int32), 0)


@triton.jit
def put(
    keys, columns, scores, count, low, high, taken, wanted, best_keys, best_columns, best_scores,
    first, STEP: tl.constexpr,
):  # fmt: skip
    """Puts keys behind those that have been taken: all from ``high`` on, and the first ``wanted``
    of those from ``low`` to below it. Returns how many have been taken and are still wanted.

    Without ``columns`` they count from ``first``.
    """
    start = 0
    while start < count:
        items = start + tl.arange(0, STEP)
        found = tl.load(keys + items, mask=items < count, other=NOTHING)
        # Later chunks have few keys to be taken, and most steps none.
        if tl.max(found, 0) >= low:
            above = found >= high
            between = (found >= low) & (found < high)
            # Both are counted in one scan, in the lower and in the upper half of an integer.
            counts = tl.cumsum(above.to(tl.int32) + (between.to(tl.int32) << 16), 0)
            total = tl.max(counts, 0)
            nth_above = counts & 0xFFFF
            nth_between = counts >> 16
            chosen = above | (between & (nth_between <= wanted))
            places = taken + nth_above + tl.minimum(nth_between, wanted) - 1
            if columns is None:
                found_columns = first + items.to(tl.int64)
            else:
                found_columns = tl.load(columns + items, mask=chosen)
            if scores is not None:
                found_scores = tl.load(scores + items, mask=chosen)
            # The best move up in their own memory: all of a step are read before any is written.
            tl.debug_barrier()
            tl.store(best_keys + places, found, mask=chosen)
            tl.store(best_columns + places, found_columns, mask=chosen)
            if scores is not None:
                tl.store(best_scores + places, found_scores, mask=chosen)
            taken += (total & 0xFFFF) + tl.minimum(total >> 16, wanted)
            wanted = tl.maximum(wanted - (total >> 16), 0)
        start += STEP
    return taken, wanted


@triton.jit
def merge_row(
    keys, key_stride, count, best_keys, best_columns, k, first, scores, score_stride, best_scores,
    BEST: tl.constexpr, NEW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A row a program, see `merge`. It searches BEST >= k and NEW >= count keys in its registers,
    and reads them again, STEP at a time, to write them: so that it takes few registers."""
    row = tl.program_id(0).to(tl.int64)
    keys += row * key_stride
    best_keys += row * k
    best_columns += row * k
    if scores is not None:
        scores += row * score_stride
        best_scores += row * k
    items = tl.arange(0, NEW)
    best_items = tl.arange(0, BEST)
    new = tl.load(keys + items, mask=items < count, other=NOTHING)
    best = tl.load(best_keys + best_items, mask=best_items < k, other=NOTHING)
    worst = tl.min(tl.where(best_items < k, best, MAGNITUDE), 0)
    top = tl.max(new, 0)
    if top > worst:
        # At least k keys, or all that there are, reach `low`; less than k reach `high`. They close
        # in on the k-th largest, until exactly k reach `low` or nothing is between them.
        low = tl.min(tl.where(best > NOTHING, best, top), 0)
        low = tl.minimum(low, tl.min(tl.where(new > worst, new, top), 0))
        high = tl.maximum(tl.max(best, 0), top) + 1
        reach_low = reaching(best, new, low)
        reach_high = 0
        while (reach_low > k) & (low + 1 < high):
            middle = (low & high) + ((low ^ high) >> 1)  # their sum could overflow
            reach = reaching(best, new, middle)
            if reach >= k:
                low = middle
                reach_low = reach
            else:
                high = middle
                reach_high = reach

        taken = 0
        wanted = k - reach_high
        taken, wanted = put(
            best_keys, best_columns, best_scores, k, low, high, taken, wanted,
            best_keys, best_columns, best_scores, None, STEP,
        )  # fmt: skip
        put(
            keys, None, scores, count, low, high, taken, wanted,
            best_keys, best_columns, best_scores, first, STEP,
        )  # fmt: skip
