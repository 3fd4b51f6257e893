"""The backward of a walk: its epilogue writes the pairs' weights, matrix products do the rest,

    grad sem += weights @ sem2     grad sem2 += weights^T @ sem     and likewise for unc,

besides what multiplies an item's own embedding, the sum of its weights. The weights are rounded to
the dtype of the embeddings, and the sums are those of the rounded ones, so that what two near items
do to each other still cancels. It does so in float32: the gradient of a near pair is as exact as if
its embeddings had been rounded to float32 once more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from idml_fast import backend

from .score import weights
from .tile import Chunk, Walk, embedding, launch, store_tile

# What `add_own` takes at a time.
ITEMS = tl.constexpr(32)
TILES = tl.constexpr(32)
FEATURES = tl.constexpr(64)


def collect(
    walk: Walk,
    metric: tuple[Any, ...],
    wanted: list[bool],
    upstream: Any,
    arguments: tuple[Any, ...],
    statistics: tuple[Any, ...] = (),
) -> list[Tensor]:
    """The gradients of sem, unc, sem2, unc2 and the learned [tau, gamma], of those wanted.

    ``upstream(pairs, place, arguments, metric, FORM, SYMMETRIC, STATISTICS)`` is a device function:
    the upstream gradient of a tile's scores, and of its mirror image where it stands for that too.
    """
    *of_embeddings, of_metric = wanted
    sem, unc, sem2, unc2 = walk.embeddings
    certain = unc is None or unc2 is None  # then a product with uncertainties is zero
    rows = [
        Gradient(sem, sem2, of_embeddings[0], rolling=not walk.own),
        Gradient(unc, None if certain else unc2, of_embeddings[1], rolling=not walk.own),
    ]
    cols = rows
    if not walk.own:
        cols = [
            Gradient(sem2, sem, of_embeddings[2]),
            Gradient(unc2, None if certain else unc, of_embeddings[3]),
        ]
    multiplied = [row.multiplied or col.multiplied for row, col in zip(rows, cols, strict=True)]
    # Half of the workspace is for the weights, half for what the products add up to.
    pair = max(1, sum(multiplied)) * walk.dtype.itemsize
    height, width = walk.sides(pair, backend.workspace // 2)
    pairs = min(height, walk.shape[0]) * min(width, walk.shape[1])
    memory = [sem.new_empty(pairs) if used else None for used in multiplied]
    of_tiles = []
    for chunk in walk.chunks(height, width):
        n, m = chunk.shape
        of_chunk = [None if x is None else x[: n * m].view(n, m) for x in memory]
        row_tiles, col_tiles = walk.tiles(n, m)
        row_sums = [row.sums_of_tiles(walk, chunk, col_tiles, n) for row in rows]
        col_sums = row_sums
        if not chunk.triangle:
            col_sums = [col.sums_of_tiles(walk, chunk, row_tiles, m) for col in cols]
        mirrored = 1 if chunk.triangle else None
        outputs = *of_chunk, m, mirrored, *row_sums, n, *col_sums, m, None
        if of_metric:
            programs = walk.programs(chunk)
            of_tiles.append(sem.new_zeros(programs, 2, dtype=torch.float32))
            outputs = *outputs[:-1], of_tiles[-1]
        walk.launch(chunk, weigh, (outputs, arguments), upstream, statistics)
        for k, pair_weights in enumerate(of_chunk):
            rows[k].add(chunk.rows, pair_weights, chunk.cols, row_sums[k])
            if not chunk.triangle:
                transposed = None if pair_weights is None else pair_weights.T
                cols[k].add(chunk.cols, transposed, chunk.rows, col_sums[k])
        _finish(walk, chunk, rows, cols)
    found = [x.gradient for x in (rows if walk.own else rows + cols) if x.wanted]
    if 0 in walk.shape:
        found = [x.zero_() for x in found]
    if of_metric:
        sums = torch.cat([sem.new_zeros(1, 2, dtype=torch.float32), *of_tiles]).double().sum(0)
        found.append(metric_gradient(sums, metric))
    return found


class Gradient:
    """The gradient of one embedding, by weights times ``others``; None if those are zero."""

    def __init__(
        self, x: Tensor | None, others: Tensor | None, wanted: bool, *, rolling: bool = False
    ) -> None:
        self.x = x  # [n, D]
        self.others = others  # [m, D]
        self.wanted = wanted
        self.multiplied = wanted and others is not None
        self.gradient = torch.empty_like(x) if wanted else None
        # What the products add up to, in float32; if `rolling`, of one part after the other.
        self.rolling = rolling
        self.total: Tensor | None = None
        self.started: set[int] = set()  # where the parts begin that have been added to
        # The sum of these rows multiplies the items themselves, [tiles or 1, n].
        self.sums: Tensor | None = None

    def sums_of_tiles(self, walk: Walk, chunk: Chunk, *shape: int) -> Tensor | None:  # tiles, n
        """Memory for the sums of some items' weights in each tile."""
        return walk.memory_of_tiles(chunk, *shape) if self.wanted else None

    def add(
        self,
        part: slice,
        pair_weights: Tensor | None,  # [n, m]
        others: slice,
        sums: Tensor | None,  # [tiles, n]
    ) -> None:
        """Adds what some others bring to some items."""
        if not self.wanted:
            return
        starts = part.start not in self.started
        self._add_sums(part, sums)
        self.started.add(part.start)
        if self.multiplied:
            _add_product(self._total(part), pair_weights, self.others[others], starts)

    def _add_sums(self, part: slice, sums: Tensor) -> None:
        if not self.started and sums.shape[1] == len(self.x):
            self.sums = sums
            return
        if not self.started:
            self.sums = sums.new_zeros(1, len(self.x))
        elif len(self.sums) > 1:
            self.sums = self.sums.sum(0, keepdim=True)
        self.sums[0, part] += sums.sum(0)

    def _total(self, part: slice) -> Tensor:
        """Where the products of some items add up."""
        if self.gradient.dtype == torch.float32:
            return self.gradient[part]
        count = part.stop - part.start
        if self.total is None:  # the first part is the longest
            shape = count if self.rolling else len(self.x), self.x.shape[1]
            self.total = self.x.new_empty(shape, dtype=torch.float32)
        return self.total[:count] if self.rolling else self.total[part]

    def job(self, part: slice) -> tuple[Any, ...]:
        """What `add_own` takes of some items."""
        total = self._total(part) if self.multiplied else None
        of_total = (None,) * 3 if total is None else (total, *total.stride())
        sums = self.sums[:, part]
        gradient = self.gradient[part]
        own = *embedding(self.x[part])[:3], sums, sums.stride(0), len(sums)
        return *own, *of_total, gradient, *gradient.stride(), len(gradient)


def _add_product(total: Tensor, pair_weights: Tensor, items: Tensor, starts: bool) -> None:
    """total = weights @ items, or += ; in float32 whatever the factors are."""
    # `out` keeps autocast, if it is on, from choosing another dtype.
    if total.dtype == items.dtype:
        torch.mm(pair_weights, items, out=total) if starts else total.addmm_(pair_weights, items)
    elif total.device.type != "cuda":  # interpreted: no product there has a wider result
        product = torch.mm(pair_weights.float(), items.float(), out=torch.empty_like(total))
        total.copy_(product) if starts else total.add_(product)
    elif starts:
        torch.ops.aten.mm.dtype_out(pair_weights, items, torch.float32, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, pair_weights, items, torch.float32, out=total)


def _finish(walk: Walk, chunk: Chunk, rows: list[Gradient], cols: list[Gradient]) -> None:
    """Finishes the gradients of the items for which this chunk was the last, in one launch."""
    done = []
    if chunk.cols.stop == walk.shape[1]:
        if not walk.own:
            done += [(row, chunk.rows) for row in rows]
        if chunk.rows.stop == walk.shape[0]:
            done += [(col, slice(0, walk.shape[1])) for col in cols]
    jobs = [(gradient.job(part), gradient.x.shape[1]) for gradient, part in done if gradient.wanted]
    launch(
        add_own,
        sum(triton.cdiv(job[-1], ITEMS.value) for job, _ in jobs),
        walk.device,
        tuple(job for job, _ in jobs),
        tuple(width for _, width in jobs),
        num_warps=4,
        num_stages=1,
    )


def metric_gradient(sums: Tensor, metric: tuple[Any, ...]) -> Tensor:  # [2] -> [2]
    """The gradient of [tau, gamma] from the sums of of_gamma and of that times the uncertainty."""
    learned = metric[2]
    tau, gamma = learned.double()
    of_gamma, of_uncertainty = sums
    return torch.stack([-(of_uncertainty + gamma * of_gamma) / tau, of_gamma]).to(learned.dtype)


@triton.jit
def weigh(
    pairs, place, arguments, metric, FORM: tl.constexpr, SYMMETRIC: tl.constexpr,
    UPSTREAM: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """The epilogue of every backward: writes a tile's weights and their sums."""
    outputs, upstream_arguments = arguments
    (
        sem_weights, unc_weights, stride, mirrored, sem_rows, unc_rows, rows_stride,
        sem_cols, unc_cols, cols_stride, of_tiles,
    ) = outputs  # fmt: skip
    _, _, row_there, col_there, _, _, program, on_diagonal = place
    alpha2, beta2, versine, inverse_row, inverse_col = pairs
    incoming = UPSTREAM(pairs, place, upstream_arguments, metric, FORM, SYMMETRIC, STATISTICS)
    product, row, col, sum, of_gamma, uncertainty = weights(
        alpha2, beta2, versine, inverse_row[:, None], inverse_col[None, :], metric, FORM
    )
    there = row_there[:, None] & col_there[None, :]
    if sem_weights is not None:
        product = tl.where(there, incoming * product, 0.0).to(sem_weights.dtype.element_ty)
        store_weights(product, sem_weights, stride, mirrored, place, there)
        if FORM == "distance":
            row = -product.to(tl.float32)
            col = row
        else:
            row = tl.where(there, incoming * row, 0.0)
            col = tl.where(there, incoming * col, 0.0)
        store_sums(row, col, sem_rows, rows_stride, sem_cols, cols_stride, place, SYMMETRIC)
    if unc_rows is not None or unc_cols is not None:
        sum = tl.where(there, incoming * sum, 0.0)
        if unc_weights is not None:
            rounded = sum.to(unc_weights.dtype.element_ty)
            store_weights(rounded, unc_weights, stride, mirrored, place, there)
            sum = rounded.to(tl.float32)
        store_sums(sum, sum, unc_rows, rows_stride, unc_cols, cols_stride, place, SYMMETRIC)
    if of_tiles is not None:
        of_gamma = tl.where(there, incoming * of_gamma, 0.0)
        share = 1.0
        if SYMMETRIC:  # a tile on the diagonal has both (i, j) and (j, i)
            share = tl.where(on_diagonal, 0.5, 1.0)
        tl.store(of_tiles + 2 * program, share * tl.sum(of_gamma))
        tl.store(of_tiles + 2 * program + 1, share * tl.sum(of_gamma * uncertainty))


@triton.jit
def store_weights(values, memory, stride, mirrored, place, there):
    """Writes a tile, and its mirror image too if it is to be ``mirrored``."""
    _, _, _, _, tile_row, tile_col, _, on_diagonal = place
    row = tile_row * values.shape[0]
    col = tile_col * values.shape[1]
    store_tile(values, memory, stride, row, col, there)
    if mirrored is not None:
        if not on_diagonal:
            store_tile(tl.trans(values), memory, stride, col, row, tl.trans(there))


@triton.jit
def store_sums(row, col, rows, rows_stride, cols, cols_stride, place, SYMMETRIC: tl.constexpr):
    """Writes the sums of a tile's rows, and those of its columns; not if these are rows of the same
    tiles on the diagonal."""
    _, _, row_there, col_there, tile_row, tile_col, _, on_diagonal = place
    if rows is not None:
        items = tile_row * row.shape[0] + tl.arange(0, row.shape[0])
        to = rows + tile_col.to(tl.int64) * rows_stride + items
        tl.store(to, tl.sum(row, 1), mask=row_there)
    if cols is not None:
        items = tile_col * row.shape[1] + tl.arange(0, row.shape[1])
        to = cols + tile_row.to(tl.int64) * cols_stride + items
        found = tl.sum(col, 0)
        if SYMMETRIC:
            if not on_diagonal:
                tl.store(to, found, mask=col_there)
        else:
            tl.store(to, found, mask=col_there)


@triton.jit
def add_own(jobs, WIDTHS: tl.constexpr):
    """gradient = total + (sum of the sums) x, for some items of several embeddings."""
    block = tl.program_id(0)
    for k in tl.static_range(len(WIDTHS)):
        (
            memory, item_stride, feature_stride, sums, sums_stride, tiles, total,
            total_item_stride, total_feature_stride, gradient, gradient_item_stride,
            gradient_feature_stride, count,
        ) = jobs[k]  # fmt: skip
        start = block * ITEMS
        if (start >= 0) & (start < count):
            item = start.to(tl.int64)
            items = tl.arange(0, ITEMS)
            there = items < count - start
            own = tl.zeros((ITEMS,), tl.float64)
            tile = tl.arange(0, TILES)
            while tl.min(tile) < tiles:
                place = start + tile[:, None].to(tl.int64) * sums_stride + items[None, :]
                mask = (tile < tiles)[:, None] & there[None, :]
                own += tl.sum(tl.load(sums + place, mask=mask, other=0).to(tl.float64), 0)
                tile += TILES
            own = own.to(tl.float32)[:, None]
            for first in range(0, WIDTHS[k], FEATURES):
                features = first + tl.arange(0, FEATURES)
                mask = there[:, None] & (features < WIDTHS[k])[None, :]
                x = tl.load(
                    memory + (item + items)[:, None] * item_stride
                    + features[None, :].to(tl.int64) * feature_stride, mask=mask, other=0,
                ).to(tl.float32)  # fmt: skip
                found = own * x
                if total is not None:
                    found += tl.load(
                        total + (item + items)[:, None] * total_item_stride
                        + features[None, :] * total_feature_stride, mask=mask, other=0,
                    )  # fmt: skip
                tl.store(
                    gradient + (item + items)[:, None] * gradient_item_stride
                    + features[None, :].to(tl.int64) * gradient_feature_stride,
                    found.to(gradient.dtype.element_ty), mask=mask,
                )  # fmt: skip
        block -= tl.cdiv(count, ITEMS)
