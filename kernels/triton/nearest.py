"""Launches the Triton kernels of `nearest`; called through `torch.ops.idml_fast`, checks done.

The walk's epilogue writes the keys of a chunk of pairs into the workspace; `merge` takes the
largest of each row, see select.py. A key is a score, its negative, or that of a draw.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from idml_fast import backend

from .score import score
from .select import MOST_KEYS, NOTHING, merge, ordered, values_of
from .tile import Walk, store_tile


def forward(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    tau: float,
    gamma: float,
    learned: Tensor | None,  # [2]
    form: str,
    labels2: Tensor | None,  # [M]
    labels: Tensor | None,  # [N]
    where: str,
    largest: bool,
    exclude_self: bool,
    above: Tensor | None,  # [N]
    weights: list[float],
    seed: Tensor | None,  # []
    k: int,
    first: int,
    *best: Tensor | None,  # [N, k] each
    make: type[Walk] = Walk,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, k] each
    """The scores, the columns and the keys of the best, see `idml_fast.nearest`."""
    walk = make(sem, unc, sem2, unc2, tau, gamma, learned, form, mirrored=False)
    columns = torch.full((len(sem), k), -1, device=sem.device)
    keys = torch.full((len(sem), k), NOTHING.value, dtype=torch.int32, device=sem.device)
    scores = torch.full((len(sem), k), math.nan, device=sem.device) if weights else None
    if best[1] is not None:
        columns.copy_(best[1])
        keys.copy_(keys_of(best[2]).where(columns >= 0, keys))
        if weights:
            scores.copy_(best[0])
    labels, labels2 = (None if x is None else x.long().contiguous() for x in (labels, labels2))
    if walk.own:
        labels2 = labels
    above = None if above is None else above.float().contiguous()
    of_row = (8 if weights else 4) * min(MOST_KEYS, walk.shape[1])  # bytes
    block = walk.config.rows
    height = max(backend.workspace // max(of_row, 1) // block, 1) * block
    shape = min(height, walk.shape[0]), min(MOST_KEYS, walk.shape[1])
    memory = sem.new_empty(math.prod(shape), dtype=torch.int32)
    score_memory = sem.new_empty(math.prod(shape), dtype=torch.float32) if weights else None
    draws = (*weights, seed.item(), first) if weights else None
    options = where, largest, exclude_self
    for chunk in walk.chunks(height, MOST_KEYS):
        n, m = chunk.shape
        of_pairs = memory[: n * m].view(n, m)
        scores_of_pairs = None if scores is None else score_memory[: n * m].view(n, m)
        arguments = of_pairs, scores_of_pairs, m, labels, labels2, above, draws
        walk.launch(chunk, store_keys, arguments, None, options)
        own_scores = None if scores is None else scores[chunk.rows]
        begin = first + chunk.cols.start
        merge(of_pairs, keys[chunk.rows], columns[chunk.rows], begin, scores_of_pairs, own_scores)
    return _in_order(scores, columns, keys, largest)


def keys_of(values: Tensor) -> Tensor:
    """What `ordered` makes of float32 numbers."""
    bits = (values + 0.0).view(torch.int32)
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return keys.masked_fill(values.isnan(), 0x7FC00000)


def _in_order(
    scores: Tensor | None,  # [N, k], if they are not the keys
    columns: Tensor,  # [N, k]
    keys: Tensor,  # [N, k]
    largest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best first; of equal ones the smaller column, which comes before the other already."""
    keys, order = keys.sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    values = values_of(keys)
    if scores is not None:
        found = scores.gather(1, order)
    else:
        found = values if largest else 0 - values  # 0, not -0
    missing = -math.inf if largest else math.inf
    return found.masked_fill(columns < 0, missing), columns, values


@triton.jit
def store_keys(
    pairs, place, arguments, metric, FORM: tl.constexpr, SYMMETRIC: tl.constexpr,
    UPSTREAM: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """The epilogue: writes the keys of a tile, and `NOTHING` for pairs that are not looked at."""
    memory, score_memory, stride, labels, labels2, above, draws = arguments
    WHERE: tl.constexpr = OPTIONS[0]
    LARGEST: tl.constexpr = OPTIONS[1]
    EXCLUDE_SELF: tl.constexpr = OPTIONS[2]
    row_start, col_start, row_there, col_there, tile_row, tile_col, _, _ = place
    alpha2, beta2, versine, _, _ = pairs
    scores = score(alpha2, beta2, versine, metric, FORM)
    rows = row_start + tl.arange(0, scores.shape[0])
    cols = col_start + tl.arange(0, scores.shape[1])
    there = row_there[:, None] & col_there[None, :]
    looked = there
    if WHERE != "any":
        of_rows = tl.load(labels + rows, mask=row_there, other=0)
        of_cols = tl.load(labels2 + cols, mask=col_there, other=0)
        same = of_rows[:, None] == of_cols[None, :]
        looked = looked & (same == (WHERE == "same"))
    if EXCLUDE_SELF:
        looked = looked & (rows[:, None] != cols[None, :])
    if above is not None:  # no bound hides a NaN
        bound = tl.load(above + rows, mask=row_there, other=0)
        looked = looked & ((scores <= bound[:, None]) == 0)
    row = tile_row * scores.shape[0]
    col = tile_col * scores.shape[1]
    if draws is None:
        keys = scores
        if not LARGEST:
            keys = -scores
    else:
        keys = keys_of_draws(scores, rows, cols, draws)
        looked = looked & ((scores >= draws[2]) == 0)
        store_tile(scores, score_memory, stride, row, col, there)
    store_tile(tl.where(looked, ordered(keys), NOTHING), memory, stride, row, col, there)


@triton.jit
def keys_of_draws(scores, rows, cols, draws):
    """ln(weight of the score) - ln(E of the pair), the same E as of every other backend: the order
    of the largest is that of draws without replacement, see csrc/random.h."""
    width, cutoff, upto, seed, first = draws
    distance = tl.where(scores < cutoff, cutoff, scores)
    distance = tl.where(scores >= upto, cutoff, distance)
    weight = (2 - width) * tl.log(distance)
    weight += (3 - width) / 2 * tl.log(1 - distance * distance / 4)
    rows = rows.to(tl.int64)[:, None] + tl.zeros_like(scores).to(tl.int64)
    cols = cols.to(tl.int64)[None, :] + first + tl.zeros_like(rows)
    group = cols // 4
    a, b, c, d = tl.philox(
        seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), rows.to(tl.uint32),
        (rows >> 32).to(tl.uint32),
    )  # fmt: skip
    left = tl.where(cols % 4 == 0, a, b)
    right = tl.where(cols % 4 == 2, c, d)
    word = tl.where(cols % 4 < 2, left, right)
    u = word.to(tl.float32) * 2.0**-32 + 2.0**-33
    u = tl.minimum(u, 1 - 2.0**-24)
    # 1 - u is rounded; what is lost is added to its logarithm.
    rest = 1 - u
    lost = (1 - rest) - u
    return weight - tl.log(-(tl.log(rest) + lost / rest))
