"""The statistics of a row of scores that `idml_fast.rowstats` can compute.

Each names the columns it looks at by their labels: ``where="same"`` as the row's, ``"different"``,
or ``"any"``. When the rows are compared against themselves, a row never looks at its own column.
``x`` is the score, raised to ``power`` first. ``above`` and ``below``, numbers or one number per
row ``[N]``, narrow it to the columns with ``above < x < below``: a window, which gets no gradient
and never hides a NaN. `reduce` is the definition, in eager PyTorch, on a matrix of scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

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
    # What a kernel takes of every statistic, unless it is an argument of its own: the reduction,
    # how many rows of numbers that gives, and what it reads.
    reduction: ClassVar[str]
    values: ClassVar[int] = 1  # rows that can have a gradient
    integers: ClassVar[int] = 0
    scale: ClassVar[float] = 1.0
    shift: ClassVar[float] = 0.0
    threshold: ClassVar[None] = None
    low: ClassVar[float] = 0.0
    width: ClassVar[float] = 1.0
    bins: ClassVar[int] = 0

    where: str
    power: float = 1.0
    above: float | Tensor | None = None
    below: float | Tensor | None = None

    def __post_init__(self) -> None:
        _checks.one_of("where", self.where, CONDITIONS)
        _checks.number("power", self.power, "> 0 and finite", lambda power: 0 < power < math.inf)
        for name, bound in (("above", self.above), ("below", self.below)):
            if bound is not None and not isinstance(bound, Tensor):
                kind = "a number, a tensor or None"
                _checks.number(name, bound, "a number", lambda bound: bound == bound, kind)

    def reduce(
        self,
        scores: Tensor,  # [N, M]
        meets: Tensor,  # [N, M], bool: the columns that meet the condition on the labels
    ) -> Tensor | Extremum:
        """The statistic of each row."""
        x = self._raised(scores, meets)
        looked_at = meets
        if self.above is not None:
            looked_at = looked_at & ~(x <= _by_row(self.above, x))
        if self.below is not None:
            looked_at = looked_at & ~(x >= _by_row(self.below, x))
        return self._of(x, looked_at)

    def _raised(self, scores: Tensor, meets: Tensor) -> Tensor:
        if self.power == 1:
            return scores
        # An infinite derivative (a root at 0) or a NaN (a root of a negative score) would stay NaN
        # when it is multiplied by the 0 of an identical pair or of a column not looked at.
        learns = meets if self.power > 1 else meets & (scores != 0)
        return torch.where(learns, scores, scores.detach()) ** self.power

    def _of(self, x: Tensor, looked_at: Tensor) -> Tensor | Extremum:
        """The statistic of each row of ``x``, over the columns looked at; both ``[N, M]``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LogSumExp(_Statistic):
    """``log sum_j exp(scale (x_j - shift))``, ``[N]``; -inf for a row without columns."""

    reduction = "log_sum_exp"

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.finite("scale", self.scale)
        _checks.finite("shift", self.shift)

    def _of(self, x: Tensor, looked_at: Tensor) -> Tensor:
        scaled = self.scale * (x - self.shift)
        # An empty row would be -inf minus -inf in logsumexp's derivative: give it zeros to add up.
        empty = ~looked_at.any(1, keepdim=True)
        total = scaled.masked_fill(~looked_at & ~empty, -math.inf).logsumexp(1)
        return total.masked_fill(empty[:, 0], -math.inf)


@dataclass(frozen=True, kw_only=True)
class Sum(_Statistic):
    """``sum_j x_j``, ``[N]``."""

    reduction = "sum"

    def _of(self, x: Tensor, looked_at: Tensor) -> Tensor:
        return x.masked_fill(~looked_at, 0).sum(1)


@dataclass(frozen=True, kw_only=True)
class Count(_Statistic):
    """The number of columns looked at, ``[N]``, int64."""

    reduction = "count"
    values = 0
    integers = 1

    def _of(self, x: Tensor, looked_at: Tensor) -> Tensor:
        return looked_at.sum(1)


@dataclass(frozen=True, kw_only=True)
class HingeSum(_Statistic):
    """``sum_j max(0, scale (x_j - threshold))``, ``[N]``; ``scale=-1`` turns the hinge around.

    ``threshold`` is a number, or one differentiable number per row, ``[N]``.
    """

    reduction = "hinge"
    integers = 1

    scale: float = 1.0
    threshold: float | Tensor = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.finite("scale", self.scale)
        if not isinstance(self.threshold, Tensor):
            _checks.finite("threshold", self.threshold, "a number or a tensor")

    def _excess(self, x: Tensor, looked_at: Tensor) -> Tensor:
        excess = self.scale * (x - _by_row(self.threshold, x))
        return excess.masked_fill(~looked_at, 0).relu()

    def _of(self, x: Tensor, looked_at: Tensor) -> Tensor:
        return self._excess(x, looked_at).sum(1)


@dataclass(frozen=True, kw_only=True)
class HingeCount(HingeSum):
    """How many terms of `HingeSum` are positive, ``[N]``, int64."""

    values = 0

    def _of(self, x: Tensor, looked_at: Tensor) -> Tensor:
        return (self._excess(x, looked_at) > 0).sum(1)


@dataclass(frozen=True, kw_only=True)
class Histogram(_Statistic):
    """A soft histogram of ``x`` over ``[low, high]``, ``[N, bins + 1]``.

    Bin ``b`` is a triangle around ``low + b (high - low) / bins`` that is as wide as two bins, so
    that every score within the range weighs 1 in all.
    """

    reduction = "histogram"

    low: float
    high: float
    bins: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.finite("low", self.low)
        _checks.finite("high", self.high)
        _checks.number("high", self.high, f"> low = {self.low}", lambda high: high > self.low)
        _checks.integer("bins", self.bins, ">= 1", lambda bins: bins >= 1)

    @property
    def values(self) -> int:
        """One row a bin."""
        return self.bins + 1

    @property
    def width(self) -> float:
        """The distance between two bins' centres."""
        return (self.high - self.low) / self.bins

    def _of(self, x: Tensor, looked_at: Tensor) -> Tensor:
        counts = [
            (1 - (x - (self.low + b * self.width)).abs() / self.width)
            .relu()
            .masked_fill(~looked_at, 0)
            .sum(1)
            for b in range(self.bins + 1)
        ]
        return torch.stack(counts, dim=1)


@dataclass(frozen=True, kw_only=True)
class Min(_Statistic):
    """The smallest ``x_j`` and its column, an `Extremum`; the smaller column wins a tie.

    The first NaN among the columns looked at wins over all.
    """

    reduction = "extremum"
    integers = 1
    scale = -1.0

    def _of(self, x: Tensor, looked_at: Tensor) -> Extremum:
        return _extremum(x, looked_at, math.inf)


@dataclass(frozen=True, kw_only=True)
class Max(_Statistic):
    """The largest ``x_j`` and its column, an `Extremum`; the smaller column wins a tie.

    The first NaN among the columns looked at wins over all.
    """

    reduction = "extremum"
    integers = 1

    def _of(self, x: Tensor, looked_at: Tensor) -> Extremum:
        return _extremum(x, looked_at, -math.inf)


def _by_row(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one per row ``[N]``, as it is set against ``x`` ``[N, M]``."""
    return value[:, None].to(x.dtype) if isinstance(value, Tensor) else value


def _extremum(x: Tensor, looked_at: Tensor, missing: float) -> Extremum:
    if x.shape[1] == 0:
        # The sum of no columns is 0, and keeps the values in the graph.
        none = torch.full((len(x),), -1, device=x.device)
        return Extremum(x.sum(1) + missing, none)
    masked = x.detach().masked_fill(~looked_at, missing)
    best = masked.amin(1) if missing > 0 else masked.amax(1)  # NaN if there is one
    # argmin and argmax do not promise the first of several. Of integers argmax does.
    wins = (masked == best[:, None]) | masked.isnan()
    columns = (looked_at & wins).int().argmax(1)
    columns = columns.masked_fill(~looked_at.any(1), -1)
    values = x.gather(1, columns.clamp_min(0)[:, None])[:, 0].masked_fill(columns < 0, missing)
    return Extremum(values, columns)


Statistic = LogSumExp | Sum | Count | HingeSum | HingeCount | Histogram | Min | Max
