"""The second half of `nearest`: of the keys of a chunk of pairs and the best so far, the k largest.

A key is a float32 as an int32 of the same order. Integers can be halved between: the k-th largest
is found by counting, not by sorting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import launch, parts

# The key of a pair that is not looked at, and of a place that has no column yet.
NOTHING = tl.constexpr(-(2**31))
INFINITY = tl.constexpr(0x7F800000)  # the bits of a float32, and its key
NAN = tl.constexpr(0x7FC00000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all bits of a float32 but its sign; above any key
# The most that one program holds in its registers, of the best and of a chunk.
MOST_BEST = 4096
MOST_KEYS = 8192
# Keys of a chunk that each thread of a warp holds.
KEYS_PER_THREAD = 32


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

    Nothing is sorted and nothing of n x m is allocated, unless k is beyond 4096, more than a program
    holds: then it is done like that. A row of which no key is better than its k best is only read.

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
    for columns in parts(keys.shape[1], MOST_KEYS):
        part = keys[:, columns]
        part_scores = None if scores is None else scores[:, columns]
        held = triton.next_power_of_2(max(k, part.shape[1]))
        launch(
            merge_row,
            len(keys),
            keys.device,
            *(part, part.stride(0), part.shape[1]),
            *(best_keys, best_columns, k, first + columns.start),
            *(part_scores, 0 if scores is None else scores.stride(0), best_scores),
            triton.next_power_of_2(k),
            triton.next_power_of_2(part.shape[1]),
            num_warps=max(1, held // (32 * KEYS_PER_THREAD)),
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
def take(keys, low, high, wanted):
    """Which keys are taken, and into which place: all from ``high`` on, and the first ``wanted`` of
    those from ``low`` to below it. And how many there are of these and of those."""
    above = keys >= high
    between = (keys >= low) & (keys < high)
    # Both are counted in one scan, in the lower and in the upper half of an integer.
    counts = tl.cumsum(above.to(tl.int32) + (between.to(tl.int32) << 16), 0)
    nth_above = counts & 0xFFFF
    nth_between = counts >> 16
    taken = above | (between & (nth_between <= wanted))
    places = nth_above + tl.minimum(nth_between, wanted) - 1
    return taken, places, tl.max(nth_above, 0), tl.max(nth_between, 0)


@triton.jit
def merge_row(
    keys, key_stride, count, best_keys, best_columns, k, first, scores, score_stride, best_scores,
    BEST: tl.constexpr, NEW: tl.constexpr,
):  # fmt: skip
    """A row a program, see `merge`. It holds BEST >= k and NEW >= count keys."""
    row = tl.program_id(0).to(tl.int64)
    keys += row * key_stride
    best_keys += row * k
    best_columns += row * k
    items = tl.arange(0, NEW)
    best_items = tl.arange(0, BEST)
    best_there = best_items < k
    new = tl.load(keys + items, mask=items < count, other=NOTHING)
    best = tl.load(best_keys + best_items, mask=best_there, other=NOTHING)
    worst = tl.min(tl.where(best_there, best, MAGNITUDE), 0)
    top = tl.max(new, 0)
    if top > worst:
        # At least k keys, or all that there are, reach `low`; less than k reach `high`. They close
        # in on the k-th largest, until exactly k reach `low` or nothing is between them.
        low_of_best = tl.min(tl.where(best > NOTHING, best, top), 0)
        low = tl.minimum(low_of_best, tl.min(tl.where(new > worst, new, top), 0))
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

        # Of those in between, all equal if there are too many, the first are taken.
        wanted = k - reach_high
        kept, kept_places, above, between = take(best, low, high, wanted)
        left = tl.maximum(wanted - between, 0)
        taken, places, _, _ = take(new, low, high, left)
        places += above + wanted - left
        columns = tl.load(best_columns + best_items, mask=kept)
        if scores is not None:
            scores += row * score_stride
            best_scores += row * k
            new_scores = tl.load(scores + items, mask=taken)
            kept_scores = tl.load(best_scores + best_items, mask=kept)
        # All of the best are read before the first of them is written.
        tl.debug_barrier()
        tl.store(best_keys + kept_places, best, mask=kept)
        tl.store(best_keys + places, new, mask=taken)
        tl.store(best_columns + kept_places, columns, mask=kept)
        tl.store(best_columns + places, tl.cast(first, tl.int64) + items, mask=taken)
        if scores is not None:
            tl.store(best_scores + kept_places, kept_scores, mask=kept)
            tl.store(best_scores + places, new_scores, mask=taken)
