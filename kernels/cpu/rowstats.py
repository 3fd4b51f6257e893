"""Launches the CPU kernels of `rowstats`; called through `torch.ops.idml_fast`, checks done."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from idml_fast import _C
from idml_fast.rowstats import INTEGERS, NUMBERS, Place, empty_results, state_rows

from .gradient import collect
from .tile import Tile, Walk, matrix, metric_of, threads


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The results, see `idml_fast.rowstats.empty_results`."""
    sem, unc, sem2, unc2, *metric = arguments[:8]
    labels, labels2, bounds, *description = arguments[8:15]
    values, integers, state, kept = empty_results(*arguments)
    walk = Walk(sem, unc, sem2, unc2)
    if kept.shape[1]:
        walk.keep(kept)
    metric = metric_of(*metric)
    statistics = Statistics(*description)
    statistics.start(state)
    items = Items(walk, labels, labels2, bounds, state)
    scores = torch.empty(walk.tile_shape if walk.symmetric else 0, dtype=walk.dtype)
    for tile in walk:
        found = matrix(scores if walk.symmetric else None)
        _C.rowstats_forward(
            tile.native, metric, statistics.native, *items.of(tile), found, threads()
        )
    statistics.finish(state, values, integers)
    return values, integers, state, kept


def backward(
    upstream: Tensor,  # [K, N]
    state: Tensor,  # [S, N]
    kept: Tensor,
    *arguments: Any,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of those operands that are wanted."""
    sem, unc, sem2, unc2, *metric = arguments[:8]
    labels, labels2, bounds, *description = arguments[8:15]
    walk = Walk(sem, unc, sem2, unc2)
    if kept.shape[1]:
        walk.keep(kept, again=True)
    native = metric_of(*metric)
    statistics = Statistics(*description).native
    items = Items(walk, labels, labels2, bounds, state, upstream)

    def weigh(tile: Tile, gradients: _C.Gradients) -> _C.NearPairs:
        return _C.rowstats_backward(
            tile.native, native, statistics, *items.of(tile), walk.symmetric, gradients, threads()
        )

    return collect(walk, metric, wanted, weigh)


class Statistics:
    """What is reduced, and where each reduction keeps its state between tiles."""

    def __init__(
        self,
        reductions: list[str],
        wheres: list[str],
        numbers: list[float],
        integers: list[int],
    ) -> None:
        self.reductions = reductions
        self.scales = numbers[NUMBERS.index("scale") :: len(NUMBERS)]
        self.places: list[Place] = []
        self.states: list[slice] = []
        self.native: list[_C.Statistic] = []
        first = 0
        for k, (reduction, where) in enumerate(zip(reductions, wheres, strict=True)):
            bins, *place = integers[k * len(INTEGERS) : (k + 1) * len(INTEGERS)]
            self.places.append(Place(*place))
            self.states.append(slice(first, first + state_rows(reduction, bins)))
            own = numbers[k * len(NUMBERS) : (k + 1) * len(NUMBERS)]
            self.native.append(_C.Statistic(reduction, where, *own, bins, first, *place[:4]))
            first = self.states[-1].stop

    def start(self, state: Tensor) -> None:  # [S, N]
        """Writes the state of no columns."""
        state.zero_()
        for reduction, part in zip(self.reductions, self.states, strict=True):
            if reduction in ("log_sum_exp", "extremum"):
                state[part.start] = -math.inf
            if reduction == "extremum":
                state[part.start + 1] = -1

    def finish(
        self,
        state: Tensor,  # [S, N]
        values: Tensor,  # [K, N]
        integers: Tensor,  # [I, N]
    ) -> None:
        """Writes the results that the state of all columns stands for."""
        for reduction, scale, place, part in zip(
            self.reductions, self.scales, self.places, self.states, strict=True
        ):
            found = state[part]
            if reduction == "log_sum_exp":
                found = found[:1] + found[1:].log()
            elif reduction == "extremum":
                found = torch.stack([scale * found[0], found[1]])
            if place.integer >= 0:
                integers[place.integer] = found[-1]
                found = found[:-1]
            if place.value >= 0:
                values[place.value : place.value + len(found)] = found


class Items:
    """What the kernels know of the rows and of the columns of a walk."""

    def __init__(
        self,
        walk: Walk,
        labels: Tensor,  # [N]
        labels2: Tensor | None,  # [M]
        bounds: Tensor | None,  # [B, N]
        state: Tensor,  # [S, N]
        upstream: Tensor | None = None,  # [K, N], of a backward
    ) -> None:
        labels = labels.to(torch.int64).contiguous()
        self.rows = [
            None if x is None else x.contiguous() for x in (labels[None], bounds, state, upstream)
        ]
        self.cols = self.rows
        if not walk.symmetric:
            self.cols = [labels2.to(torch.int64).contiguous()[None], *[None] * 3]

    def of(self, tile: Tile) -> tuple[_C.Items, _C.Items]:
        """Those of one tile."""
        return _part(self.rows, tile.rows), _part(self.cols, tile.cols)


def _part(numbers: list[Tensor | None], part: slice) -> _C.Items:  # [_, n]
    return _C.Items(part.start, *(matrix(None if x is None else x[:, part]) for x in numbers))
