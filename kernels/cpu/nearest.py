"""Launches the CPU kernels of `nearest`; called through `torch.ops.idml_fast`, checks done."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from idml_fast import _C

from .tile import Walk, matrix, metric_of, threads, vector


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
) -> tuple[Tensor, Tensor, Tensor]:  # [N, k] each
    """The scores, the columns and the keys of the best, see `idml_fast.nearest`.

    Rows against themselves are two sets here: all tiles of some rows follow each other, so that no
    more candidates are held than those of these rows.
    """
    if sem2 is None:
        sem2, unc2, labels2 = sem, unc, labels
    walk = Walk(sem, unc, sem2, unc2)
    metric = metric_of(tau, gamma, learned, form)
    scores, columns, keys = (None if x is None else x.clone() for x in best)
    if scores is None:
        scores = torch.full((len(sem), k), -math.inf if largest else math.inf, dtype=walk.dtype)
        columns = torch.full((len(sem), k), -1)
        keys = torch.full((len(sem), k), -math.inf, dtype=walk.dtype)
    labels, labels2 = (None if x is None else x.long().contiguous() for x in (labels, labels2))
    above = None if above is None else above.to(walk.dtype).contiguous()
    draws = _C.DistanceWeighted(*weights, seed.item()) if weights else _C.DistanceWeighted()
    held = Held(walk.tile_shape[0], k, walk.dtype)
    for tile in walk:
        rows, cols = tile.rows, tile.cols
        if cols.start == 0:
            held.start(scores[rows], columns[rows], keys[rows])
        choice = _C.Choice(
            rows.start,
            first + cols.start,
            exclude_self,
            where != "different",
            where != "same",
            vector(None if labels is None else labels[rows]),
            vector(None if labels2 is None else labels2[cols]),
            vector(None if above is None else above[rows]),
            largest,
            bool(weights),
            draws,
        )
        _C.nearest_offer(tile.native, metric, choice, held.native, threads())
        if cols.stop == walk.shape[1]:
            held.finish()
    return scores, columns, keys


class Held:
    """The best columns of some rows at a time, with room for more, see nearest.h."""

    def __init__(self, rows: int, k: int, dtype: torch.dtype) -> None:
        # A row's candidates are sifted when its room is full. That is seldom if there is room for
        # twice the k best, or for some hundreds more if k is small.
        room = max(2 * k, k + 256)
        self.k = k
        self.scores = torch.empty(rows, room, dtype=dtype)
        self.columns = torch.empty(rows, room, dtype=torch.int64)
        self.keys = torch.empty_like(self.scores)

    def start(
        self,
        scores: Tensor,  # [n, k], the best so far; `finish` writes the best of all there
        columns: Tensor,  # [n, k]
        keys: Tensor,  # [n, k]
    ) -> None:
        self.found = keys, scores, columns
        self.counts = (columns >= 0).sum(1)
        self.thresholds = keys[:, -1].where(columns[:, -1] >= 0, math.nan)
        room = [x[: len(keys)] for x in (self.keys, self.scores, self.columns)]
        for held, found in zip(room, self.found, strict=True):
            held[:, : self.k] = found
        state = vector(self.counts), vector(self.thresholds)
        self.native = _C.Best(self.k, *map(matrix, room), *state)

    def finish(self) -> None:
        _C.nearest_finish(self.native, _C.Results(*map(matrix, self.found)), threads())
