"""Launches the Triton kernels of `paired`; called through `torch.ops.idml_fast`, checks done.

A program measures some pairs from the differences of their features. The backward does so again and
keeps four numbers a pair, see score.py; then every item goes through its own pairs, which a sort
has put side by side, so that nothing is added up in an order left to chance.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient import metric_gradient
from .score import inverse_root, score, weights
from .tile import embedding, launch, metric_of

# Features of so many pairs that a program holds at a time, in how many warps.
HELD = 4096
WARPS = 4
MOST_PAIRS = 64
MOST_MEASURED = 512  # features; each further step sums up across the threads
MOST_ADDED = 256  # features
# So many pairs in a row that are all of one item are added up by a program of their own.
WINDOW = tl.constexpr(256)
# The share of ||x||^2 + ||y||^2 below which ||x - y||^2 gives a versine more exactly than x . y.
NEAR = tl.constexpr(2.0**-8)


def forward(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *arguments: Any,
) -> Tensor:  # [T]
    """The scores of the listed pairs, gathered in the kernel."""
    *metric, rows, cols = arguments
    rows, cols = _index(rows, cols, sem)
    scores = sem.new_empty(len(rows))
    _measure(score_pairs, (sem, unc, sem2, unc2), metric, rows, cols, (scores,))
    return scores


def backward(
    upstream: Tensor,  # [T]
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *arguments: Any,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of those operands that are wanted. A negative column stands for no pair.

    For a while it takes 16 bytes a pair for its weights, 16 for the index, about 40 for each sort,
    and a row of float32 for every 256 pairs. An item in 10^5 pairs costs what as many pairs of many
    items cost, since its pairs are added up 256 at a time by as many programs as that takes; and
    then one program adds up these sums.

    PyTorch sorts up to 2^31 - 1 numbers: so many pairs have a gradient, or half as many of rows
    against themselves.
    """
    *metric, rows, cols = arguments
    *of_rows, of_sem2, of_unc2, learns = wanted
    index = torch.stack(_index(rows, cols, sem))
    # For an upstream gradient of one: row, col, product, sum and what [tau, gamma] need.
    pair_weights = torch.empty(6 if learns else 4, *index.shape[1:], device=sem.device)
    of_metric = pair_weights[4:] if learns else None
    outputs = upstream, upstream.stride(0), pair_weights, of_metric
    _measure(weigh_pairs, (sem, unc, sem2, unc2), metric, *index, outputs)
    lists = index, pair_weights, metric[3]
    if sem2 is None:
        found = _gather(index.flatten(), 0, (sem, unc), (sem, unc), of_rows, *lists)
    else:
        found = _gather(index[0], 0, (sem, unc), (sem2, unc2), of_rows, *lists)
        of_cols = [of_sem2, of_unc2]
        found += _gather(index[1], index.shape[1], (sem2, unc2), (sem, unc), of_cols, *lists)
    if learns:
        found.append(metric_gradient(of_metric.sum(1, dtype=torch.float64), metric))
    return found


def _index(rows: Tensor | None, cols: Tensor | None, sem: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of both; row t with column t if there are none."""
    if rows is None:
        rows = cols = torch.arange(len(sem), device=sem.device)
    return rows, cols


def _measure(
    kernel: Any,
    embeddings: tuple[Tensor | None, ...],  # [N, Ds], [N, Du], [M, Ds], [M, Du]
    metric: list[Any],
    rows: Tensor,  # [T]
    cols: Tensor,  # [T]
    outputs: tuple[Any, ...],
) -> None:
    """Launches a kernel that measures all pairs."""
    sem, unc, sem2, unc2 = embeddings
    if sem2 is None:
        sem2, unc2 = sem, unc
    widths = sem.shape[1], max(0 if x is None else x.shape[1] for x in (unc, unc2))
    pairs, features = _block(max(widths), MOST_MEASURED)
    *numbers, form = metric
    launch(
        kernel,
        triton.cdiv(len(rows), pairs),
        sem.device,
        *map(embedding, (sem, unc, sem2, unc2)),
        metric_of(*numbers),
        (rows, rows.stride(0), cols, cols.stride(0), len(rows)),
        outputs,
        *(*widths, form, pairs, features),
        num_warps=WARPS,
        num_stages=1,
    )


def _gather(
    own: Tensor,  # [L]
    first: int,
    items: tuple[Tensor, Tensor | None],  # [n, Ds], [n, Du]
    others: tuple[Tensor, Tensor | None],  # [m, Ds], [m, Du]
    wanted: list[bool],
    index: Tensor,  # [2, T]
    pair_weights: Tensor,  # [4 or 6, T]
    form: str,
) -> list[Tensor]:
    """The gradients of one side's items; ``own`` is ``index.flatten()`` from ``first`` on."""
    if not any(wanted):
        return []
    count = len(items[0])
    # A sort of 32 bits takes half the time of one of 64.
    keys = own.int() if count < 2**31 else own
    keys, order = keys.sort(stable=True)
    bounds = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
    starts = torch.searchsorted(keys, bounds)
    lists = order, first, index, pair_weights, index.shape[1]
    kinds = "difference" if form == "distance" else "both", "sum"
    found = []
    for x, y, kind, is_wanted in zip(items, others, kinds, wanted, strict=True):
        if not is_wanted:
            continue
        width = x.shape[1]
        partners, features = _block(width, MOST_ADDED)
        blocks = triton.cdiv(width, features)
        windows = len(own) // WINDOW.value
        sums = torch.empty(windows, width, dtype=torch.float32, device=x.device)
        gradient = x.new_empty(x.shape)
        arguments = embedding(x), embedding(y), lists
        options = kind, width, partners, features
        launches = (
            (add_windows, windows, keys, sums),
            (add_items, count, starts, sums, embedding(gradient)),
        )
        for kernel, programs, *outputs in launches:
            launch(
                kernel,
                programs * blocks,
                x.device,
                *(*arguments, *outputs, *options),
                num_warps=WARPS,
                num_stages=1,
            )
        found.append(gradient)
    return found


def _block(width: int, most: int) -> tuple[int, int]:
    """How many pairs and how many of their features a program takes at a time."""
    features = min(triton.next_power_of_2(max(width, 16)), most)
    return min(HELD // features, MOST_PAIRS), features


@triton.jit
def load_features(x, items, there, features, WIDTH: tl.constexpr):
    """Some features of some items; 0 where there are none."""
    memory, item_stride, feature_stride, _ = x
    found = tl.zeros((items.shape[0], features.shape[0]), tl.float32)
    if memory is not None:
        place = items[:, None] * item_stride + features[None, :].to(tl.int64) * feature_stride
        mask = there[:, None] & (features < WIDTH)[None, :]
        found = tl.load(memory + place, mask=mask, other=0).to(tl.float32)
    return found


@triton.jit
def measure(
    sem, unc, sem2, unc2, index, SEM_WIDTH: tl.constexpr, UNC_WIDTH: tl.constexpr,
    FORM: tl.constexpr, PAIRS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """A program's pairs: alpha^2, beta^2, the versine and 1 / ||s|| of both (0 in the distance
    form), their numbers, and which of them are there. Of no pair nothing is read."""
    row_memory, row_stride, col_memory, col_stride, count = index
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    there = pairs < count
    rows = tl.load(row_memory + pairs * row_stride, mask=there, other=0)
    cols = tl.load(col_memory + pairs * col_stride, mask=there, other=-1)
    there = there & (cols >= 0)

    beta2 = tl.zeros((PAIRS,), tl.float32)
    for start in range(0, UNC_WIDTH, FEATURES):
        features = start + tl.arange(0, FEATURES)
        sum = load_features(unc, rows, there, features, UNC_WIDTH)
        sum += load_features(unc2, cols, there, features, UNC_WIDTH)
        beta2 += tl.sum(sum * sum, 1)

    alpha2 = tl.zeros((PAIRS,), tl.float32)
    dots = alpha2
    row_squares = alpha2
    col_squares = alpha2
    for start in range(0, SEM_WIDTH, FEATURES):
        features = start + tl.arange(0, FEATURES)
        x = load_features(sem, rows, there, features, SEM_WIDTH)
        y = load_features(sem2, cols, there, features, SEM_WIDTH)
        alpha2 += tl.sum((x - y) * (x - y), 1)
        if FORM != "distance":
            dots += tl.sum(x * y, 1)
            row_squares += tl.sum(x * x, 1)
            col_squares += tl.sum(y * y, 1)

    versine = alpha2
    inverse_row = inverse_root(row_squares)
    inverse_col = inverse_root(col_squares)
    if FORM != "distance":
        inverses = inverse_row * inverse_col
        difference = row_squares * inverse_row - col_squares * inverse_col
        near = alpha2 < NEAR * (row_squares + col_squares)
        from_difference = (alpha2 - difference * difference) * inverses * 0.5
        versine = tl.where(near, from_difference, 1 - dots * inverses)
        # Of identical items it is 0; a NaN stays.
        versine = tl.where((versine < 0) | (alpha2 == 0), 0.0, versine)
    return alpha2, beta2, versine, inverse_row, inverse_col, pairs, there


@triton.jit
def score_pairs(
    sem, unc, sem2, unc2, metric, index, outputs, SEM_WIDTH: tl.constexpr, UNC_WIDTH: tl.constexpr,
    FORM: tl.constexpr, PAIRS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The scores of some pairs."""
    alpha2, beta2, versine, _, _, pairs, there = measure(
        sem, unc, sem2, unc2, index, SEM_WIDTH, UNC_WIDTH, FORM, PAIRS, FEATURES
    )
    scores = score(alpha2, beta2, versine, metric, FORM)
    tl.store(outputs[0] + pairs, scores.to(outputs[0].dtype.element_ty), mask=there)


@triton.jit
def weigh_pairs(
    sem, unc, sem2, unc2, metric, index, outputs, SEM_WIDTH: tl.constexpr, UNC_WIDTH: tl.constexpr,
    FORM: tl.constexpr, PAIRS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The weights of some pairs, times their upstream gradients; 0 for no pair."""
    upstream, upstream_stride, pair_weights, of_metric = outputs
    alpha2, beta2, versine, inverse_row, inverse_col, pairs, there = measure(
        sem, unc, sem2, unc2, index, SEM_WIDTH, UNC_WIDTH, FORM, PAIRS, FEATURES
    )
    incoming = tl.load(upstream + pairs * upstream_stride, mask=there, other=0).to(tl.float32)
    product, row, col, sum, of_gamma, uncertainty = weights(
        alpha2, beta2, versine, inverse_row, inverse_col, metric, FORM
    )
    count = tl.cast(index[4], tl.int64)
    to = pair_weights + pairs
    listed = pairs < count
    tl.store(to, tl.where(there, incoming * row, 0.0), mask=listed)
    tl.store(to + count, tl.where(there, incoming * col, 0.0), mask=listed)
    tl.store(to + 2 * count, tl.where(there, incoming * product, 0.0), mask=listed)
    tl.store(to + 3 * count, tl.where(there, incoming * sum, 0.0), mask=listed)
    if of_metric is not None:
        of_gamma = tl.where(there, incoming * of_gamma, 0.0)
        tl.store(of_metric + pairs, of_gamma, mask=listed)
        of_uncertainty = tl.where(there, of_gamma * uncertainty, 0.0)
        tl.store(of_metric + count + pairs, of_uncertainty, mask=listed)


@triton.jit
def sum_of_pairs(
    x, y, lists, item, features, begin, end, gap, gap_end, KIND: tl.constexpr,
    WIDTH: tl.constexpr, PARTNERS: tl.constexpr,
):  # fmt: skip
    """What an item's pairs add to its gradient, from ``begin`` to ``end`` but for a gap; the sum of
    every so many of them is still to be taken."""
    order, first, index, pair_weights, count = lists
    count = tl.cast(count, tl.int64)
    one = tl.zeros((1,), tl.int64)
    own = load_features(x, item + one, one == 0, features, WIDTH)
    total = tl.zeros((PARTNERS, features.shape[0]), tl.float32)
    while begin < end:
        place = begin + tl.arange(0, PARTNERS)
        there = (place < gap) | ((place >= gap_end) & (place < end))
        # Rows are followed by columns, and each has its partner in the other half.
        listed = tl.load(order + place, mask=there, other=0) + first
        pair = tl.where(listed < count, listed, listed - count)
        partner = tl.where(listed < count, listed + count, listed - count)
        partner = tl.load(index + partner, mask=there, other=-1)
        there = there & (partner >= 0)
        other = load_features(y, partner, there, features, WIDTH)
        if KIND == "sum":
            weight = tl.load(pair_weights + 3 * count + pair, mask=there, other=0)
            terms = weight[:, None] * (own + other)
        elif KIND == "difference":
            weight = tl.load(pair_weights + listed, mask=there, other=0)
            terms = weight[:, None] * (own - other)
        else:
            weight = tl.load(pair_weights + listed, mask=there, other=0)
            product = tl.load(pair_weights + 2 * count + pair, mask=there, other=0)
            terms = weight[:, None] * own + product[:, None] * other
        total += tl.where(there[:, None], terms, 0.0)
        begin += PARTNERS
        begin = tl.where((begin >= gap) & (begin < gap_end), gap_end, begin)
    return total


@triton.jit
def add_windows(
    x, y, lists, keys, sums, KIND: tl.constexpr, WIDTH: tl.constexpr, PARTNERS: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """The sum of a window of sorted pairs, if all of them are of one item."""
    blocks = tl.cdiv(WIDTH, FEATURES)
    window = (tl.program_id(0) // blocks).to(tl.int64)
    features = tl.program_id(0) % blocks * FEATURES + tl.arange(0, FEATURES)
    begin = window * WINDOW
    end = begin + WINDOW
    item = tl.load(keys + begin)
    if (item >= 0) & (item == tl.load(keys + end - 1)):
        total = sum_of_pairs(
            x, y, lists, item, features, begin, end, end, end, KIND, WIDTH, PARTNERS
        )
        tl.store(sums + window * WIDTH + features, tl.sum(total, 0), mask=features < WIDTH)


@triton.jit
def add_items(
    x, y, lists, starts, sums, gradient, KIND: tl.constexpr, WIDTH: tl.constexpr,
    PARTNERS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The gradient of an item: its pairs in no window of its own, then the sums of its windows."""
    blocks = tl.cdiv(WIDTH, FEATURES)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    features = tl.program_id(0) % blocks * FEATURES + tl.arange(0, FEATURES)
    begin = tl.load(starts + item)
    end = tl.load(starts + item + 1)
    window = tl.cdiv(begin, WINDOW)
    end_window = end // WINDOW
    gap = tl.minimum(window * WINDOW, end)
    gap_end = tl.maximum(end_window * WINDOW, gap)
    total = sum_of_pairs(
        x, y, lists, item, features, begin, end, gap, gap_end, KIND, WIDTH, PARTNERS
    )
    while window < end_window:
        some = window + tl.arange(0, PARTNERS)
        mask = (some < end_window)[:, None] & (features < WIDTH)[None, :]
        total += tl.load(sums + some[:, None] * WIDTH + features[None, :], mask=mask, other=0)
        window += PARTNERS
    memory, item_stride, feature_stride, _ = gradient
    to = memory + item * item_stride + features.to(tl.int64) * feature_stride
    tl.store(to, tl.sum(total, 0).to(memory.dtype.element_ty), mask=features < WIDTH)
