"""The statistics of a row of scores that `idml_fast.rowstats` can compute.

Each names the columns it looks at by their labels: ``where="same"`` as the row's, ``"different"``,
or ``"any"``. When the rows are compared against themselves, a row never looks at its own column.
``x`` is the score, raised to ``power`` first. `reduce` is the definition, in eager PyTorch, on a
matrix of scores ``[N, M]`` and the mask of the columns to look at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks

CONDITIONS = ("same", "different", "any")


class Extremum(NamedTuple):
    """The smallest or largest score of each row and the column where it first occurs."""

    values: Tensor  # [N], the score's dtype; +inf (Min) or -inf (Max) for a row without columns
    columns: Tensor  # [N], int64; -1 for a row without columns


@dataclass(frozen=True, kw_only=True)
class _Statistic:
    where: str
    power: float = 1.0

    def __post_init__(self) -> None:
        _checks.one_of("where", self.where, CONDITIONS)
        _checks.number("power", self.power, "> 0 and finite", lambda power: 0 < power < math.inf)

    def _raised(self, scores: Tensor) -> Tensor:
        return scores if self.power == 1 else scores**self.power


@dataclass(frozen=True, kw_only=True)
class LogSumExp(_Statistic):
    """``log sum_j exp(scale (x_j - shift))``, ``[N]``; -inf for a row without columns."""

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.finite("scale", self.scale)
        _checks.finite("shift", self.shift)

    def reduce(self, scores: Tensor, looked_at: Tensor) -> Tensor:
        scaled = self.scale * (self._raised(scores) - self.shift)
        # An empty row would be -inf minus -inf in logsumexp's derivative: give it zeros to add up.
        empty = ~looked_at.any(1, keepdim=True)
        total = scaled.masked_fill(~looked_at & ~empty, -math.inf).logsumexp(1)
        return total.masked_fill(empty[:, 0], -math.inf)


@dataclass(frozen=True, kw_only=True)
class Sum(_Statistic):
    """``sum_j x_j``, ``[N]``."""

    def reduce(self, scores: Tensor, looked_at: Tensor) -> Tensor:
        return self._raised(scores).masked_fill(~looked_at, 0).sum(1)


@dataclass(frozen=True, kw_only=True)
class Count(_Statistic):
    """The number of columns looked at, ``[N]``, int64."""

    def reduce(self, scores: Tensor, looked_at: Tensor) -> Tensor:
        return looked_at.sum(1)


@dataclass(frozen=True, kw_only=True)
class HingeSum(_Statistic):
    """``sum_j max(0, scale (x_j - threshold))``, ``[N]``; ``scale=-1`` turns the hinge around.

    ``threshold`` is a number, or one differentiable number per row, ``[N]``.
    """

    scale: float = 1.0
    threshold: float | Tensor = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.finite("scale", self.scale)
        if not isinstance(self.threshold, Tensor):
            _checks.finite("threshold", self.threshold, "a number or a tensor")

    def _excess(self, scores: Tensor, looked_at: Tensor) -> Tensor:
        threshold = self.threshold
        if isinstance(threshold, Tensor):
            threshold = threshold[:, None]
        excess = self.scale * (self._raised(scores) - threshold)
        return excess.masked_fill(~looked_at, 0).relu()

    def reduce(self, scores: Tensor, looked_at: Tensor) -> Tensor:
        return self._excess(scores, looked_at).sum(1)


@dataclass(frozen=True, kw_only=True)
class HingeCount(HingeSum):
    """How many terms of `HingeSum` are positive, ``[N]``, int64."""

    def reduce(self, scores: Tensor, looked_at: Tensor) -> Tensor:
        return (self._excess(scores, looked_at) > 0).sum(1)


@dataclass(frozen=True, kw_only=True)
class Histogram(_Statistic):
    """A soft histogram of ``x`` over ``[low, high]``, ``[N, bins + 1]``.

    Bin ``b`` is a triangle around ``low + b (high - low) / bins`` that is as wide as two bins, so
    that every score within the range weighs 1 in all.
    """

    low: float
    high: float
    bins: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.finite("low", self.low)
        _checks.finite("high", self.high)
        _checks.number("high", self.high, f"> low = {self.low}", lambda high: high > self.low)
        _checks.integer("bins", self.bins, ">= 1", lambda bins: bins >= 1)

    def reduce(self, scores: Tensor, looked_at: Tensor) -> Tensor:
        width = (self.high - self.low) / self.bins
        x = self._raised(scores)
        counts = [
            (1 - (x - (self.low + b * width)).abs() / width)
            .relu()
            .masked_fill(~looked_at, 0)
            .sum(1)
            for b in range(self.bins + 1)
        ]
        return torch.stack(counts, dim=1)


@dataclass(frozen=True, kw_only=True)
class Min(_Statistic):
    """The smallest ``x_j`` and its column, an `Extremum`; the smaller column wins a tie."""

    def reduce(self, scores: Tensor, looked_at: Tensor) -> Extremum:
        return _extremum(self._raised(scores), looked_at, math.inf)


@dataclass(frozen=True, kw_only=True)
class Max(_Statistic):
    """The largest ``x_j`` and its column, an `Extremum`; the smaller column wins a tie."""

    def reduce(self, scores: Tensor, looked_at: Tensor) -> Extremum:
        return _extremum(self._raised(scores), looked_at, -math.inf)


def _extremum(x: Tensor, looked_at: Tensor, missing: float) -> Extremum:
    if x.shape[1] == 0:
        # The sum of no columns is 0, and keeps the values in the graph.
        none = torch.full((len(x),), -1, device=x.device)
        return Extremum(x.sum(1) + missing, none)
    masked = x.masked_fill(~looked_at, missing)
    values = masked.amin(1) if missing > 0 else masked.amax(1)
    # argmin and argmax do not promise the first of several; the first True of a mask is.
    columns = (looked_at & (masked == values[:, None])).int().argmax(1)
    columns = columns.masked_fill(~looked_at.any(1), -1)
    values = x.gather(1, columns.clamp_min(0)[:, None])[:, 0].masked_fill(columns < 0, missing)
    return Extremum(values, columns)


Statistic = LogSumExp | Sum | Count | HingeSum | HingeCount | Histogram | Min | Max
