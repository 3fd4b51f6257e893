"""`rowstats`: statistics of each row of scores, under a condition on the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, reference
from . import backend as backends
from ._operands import (
    OPERANDS,
    autocast,
    beyond_cuda,
    by_operand,
    define,
    define_backward,
    empty_gradients,
    operands,
    save,
    saved,
)
from .metric import Metric
from .stats import Extremum, Histogram, Statistic

MOST_FOR_CUDA = 4  # statistics at a time, MOST_STATISTICS in kernels/cuda/launch.h


def rowstats(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | str | None = None,  # [M, Du] or "zero"
    *,
    labels: Tensor,  # [N]
    labels2: Tensor | None = None,  # [M]
    metric: Metric = Metric(),
    stats: Mapping[str, Statistic],
    backend: str | None = None,
) -> dict[str, Tensor | Extremum]:
    """Statistics of each row's scores with the columns of the same, another or any label.

    Replaces, for ``stats={"hardness": stats.LogSumExp(where="different", scale=-1)}``::

        scores = idml_fast.pairwise(sem, unc, sem2, unc2, metric=metric)
        scores = scores.masked_fill(labels[:, None] == labels2, math.inf)
        hardness = torch.logsumexp(-scores, dim=1)

    All statistics come from one walk over tiles of pairs; nothing of N x M is allocated, in the
    forward or in the backward, which walks again with the statistics that the forward has saved.
    Where all products of the forward fit into `idml_fast.backend.workspace` bytes, they are kept
    for the backward instead of being multiplied again. Without ``sem2`` the rows are compared with
    themselves at half the products. Sums are taken in float64 and statistics are float32 (float64
    for float64) whatever the inputs. The same input gives the same bits, for one number of threads.

    Args:
        sem, unc, sem2, unc2, metric, backend: as for `idml_fast.pairwise`. Without ``sem2`` a row
            never looks at its own column.
        labels, labels2: labels of the rows and of the columns, of any integer dtype; ``labels2``
            goes with ``sem2``.
        stats: a name for each statistic wanted, see `idml_fast.stats`.

    Returns:
        The statistics under their names; ``[N]`` each (`stats.Histogram`: ``[N, bins + 1]``,
        `stats.Min` and `stats.Max`: values and columns). Values are differentiable once, in what
        `idml_fast.pairwise` is, and in the thresholds of `stats.HingeSum`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.
        RuntimeError: no backend serves these tensors, or a second derivative is asked for.

    >>> import torch, idml_fast
    >>> sem, unc = torch.eye(3), torch.zeros(3, 2)
    >>> count = idml_fast.stats.Count(where="same")
    >>> labels = torch.tensor([0, 0, 1])
    >>> idml_fast.rowstats(sem, unc, labels=labels, stats={"positives": count})
    {'positives': tensor([1, 1, 0])}
    """
    sem, unc, sem2, unc2 = autocast(sem, unc, sem2, unc2)
    _checks.batch(sem, unc, labels, sem2, unc2, labels2, metric)
    _checks.instance("stats", stats, Mapping, "a mapping of names to idml_fast.stats")
    for name, stat in stats.items():
        _checks.instance(f"stats[{name!r}]", stat, Statistic, "one of idml_fast.stats")
        for bound in ("above", "below", "threshold"):
            value = getattr(stat, bound, None)
            if isinstance(value, Tensor):
                _checks.vector(f"stats[{name!r}].{bound}", value, sem, "sem")
    given = {"sem": sem, "unc": unc, "sem2": sem2, "unc2": unc2}
    asked = beyond_cuda(given, metric)
    if any(isinstance(stat, Histogram) for stat in stats.values()):
        asked.append("a histogram")
    if len(stats) > MOST_FOR_CUDA:
        asked.append(f"more than {MOST_FOR_CUDA} statistics")
    served = backends.choose("rowstats", sem, backend, asked)
    if served == "reference":
        scores = reference.pairwise(sem, unc, sem2, unc2, metric=metric)
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()
        return reference.reduce_rows(scores, labels, labels2, stats)
    arguments = operands(sem, unc, sem2, unc2, metric)
    statistics, places = describe(list(stats.values()), sem)
    learns = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*arguments, *statistics)
    )
    values, integers, *_ = torch.ops.idml_fast.rowstats(
        *arguments, labels, labels2, *statistics, backends.kept(served) if learns else 0, served
    )
    return {
        name: _result(stat, values, integers, place)
        for (name, stat), place in zip(stats.items(), places, strict=True)
    }


class Place(NamedTuple):
    """Where the numbers of a statistic are; -1 for what it does not have."""

    threshold: int  # row of `bounds`
    above: int
    below: int
    value: int  # first row of the values
    integer: int  # row of the integers


# How the operation takes statistics: what each threshold and window is for each row, [B, N]; and
# flattened, `NUMBERS` numbers and `INTEGERS` integers (its bins, its Place) of each.
STATISTICS = (
    "Tensor? bounds, str[] reductions, str[] wheres, float[] numbers, int[] integers, "
    "int value_rows, int integer_rows"
)
NUMBERS = ("power", "scale", "shift", "low", "width")
INTEGERS = ("bins", *Place._fields)


def state_rows(reduction: str, bins: int) -> int:
    """Rows of float64 that a reduction needs between tiles, and for its backward."""
    return bins + 1 if reduction == "histogram" else 1 if reduction in ("sum", "count") else 2


def describe(stats: list[Statistic], sem: Tensor) -> tuple[tuple[Any, ...], list[Place]]:
    """The statistics as the operation takes them, see `STATISTICS`, and where their numbers are."""
    dtype = torch.promote_types(sem.dtype, torch.float32)
    bounds: list[Tensor] = []
    places: list[Place] = []
    values = integers = 0
    for stat in stats:
        rows = []
        for name in ("threshold", "above", "below"):
            bound = getattr(stat, name)
            rows.append(-1 if bound is None else len(bounds))
            if isinstance(bound, Tensor):
                bounds.append((bound if name == "threshold" else bound.detach()).to(dtype))
            elif bound is not None:
                bounds.append(sem.new_full((len(sem),), bound, dtype=dtype))
        places.append(
            Place(*rows, values if stat.values else -1, integers if stat.integers else -1)
        )
        values += stat.values
        integers += stat.integers
    numbers = [float(getattr(stat, name)) for stat in stats for name in NUMBERS]
    layout = [x for stat, place in zip(stats, places, strict=True) for x in (stat.bins, *place)]
    return (
        torch.stack(bounds) if bounds else None,
        [stat.reduction for stat in stats],
        [stat.where for stat in stats],
        numbers,
        layout,
        values,
        integers,
    ), places


def _result(
    stat: Statistic,
    values: Tensor,  # [K, N]
    integers: Tensor,  # [I, N]
    place: Place,
) -> Tensor | Extremum:
    if isinstance(stat, Histogram):
        return values[place.value : place.value + stat.values].T
    if stat.reduction == "extremum":
        return Extremum(values[place.value], integers[place.integer])
    return values[place.value] if stat.values else integers[place.integer]


def empty_results(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | None,  # [M, Du]
    *others: Any,
) -> tuple[Tensor, ...]:
    """Memory for the results: the values ``[K, N]`` and the integers ``[I, N]``; for the backward,
    the state ``[S, N]`` that they come from, and each product's bytes, none if they are more than
    the workspace."""
    *_, reductions, _, _, integers, value_rows, integer_rows, workspace = others
    state = sum(map(state_rows, reductions, integers[:: len(INTEGERS)]))
    dtype = torch.promote_types(sem.dtype, torch.float32)
    products = 1 + int(unc is not None and (sem2 is None or unc2 is not None))
    kept = sem.shape[0] * (sem if sem2 is None else sem2).shape[0] * dtype.itemsize
    return (
        sem.new_empty(value_rows, sem.shape[0], dtype=dtype),
        sem.new_empty(integer_rows, sem.shape[0], dtype=torch.int64),
        sem.new_empty(state, sem.shape[0], dtype=torch.float64),
        sem.new_empty(products, kept if products * kept <= workspace else 0, dtype=torch.uint8),
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return empty_results(*arguments[:-1])


def _backward_fake(*arguments: Any, wanted: list[bool]) -> list[Tensor]:
    return empty_gradients(arguments[3:11], wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    labels, labels2, bounds, *statistics, _, _ = inputs[8:]
    _, integers, state, kept = output
    save(ctx, inputs, integers, state, kept, labels, labels2, bounds)
    ctx.statistics = statistics
    ctx.mark_non_differentiable(state)
    # Only the values have a gradient: do not make zeros as large as what is kept.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    operands, (integers, state, kept, labels, labels2, bounds), wanted = saved(ctx)
    if upstream is None:
        return (None,) * len(ctx.needs_input_grad)
    statistics = ctx.statistics
    gradients = torch.ops.idml_fast.rowstats_backward(
        upstream,
        state,
        kept,
        *operands,
        labels,
        labels2,
        bounds,
        *statistics,
        ctx.backend,
        wanted=wanted,
    )
    of_bounds = None
    if bounds is not None and ctx.needs_input_grad[10]:
        of_bounds = _of_bounds(bounds, upstream, integers, *statistics[2:4])
    others = [None] * (len(ctx.needs_input_grad) - 11)
    return *by_operand(gradients, wanted), None, None, of_bounds, *others


def _of_bounds(
    bounds: Tensor,  # [B, N]
    upstream: Tensor,  # [K, N]
    integers: Tensor,  # [I, N]
    numbers: list[float],
    layout: list[int],
) -> Tensor:  # [B, N]
    """The gradient of the hinges' thresholds: every positive term falls by the scale."""
    found = [torch.zeros_like(row) for row in bounds]
    sizes = len(NUMBERS), len(INTEGERS)
    for k in range(len(layout) // sizes[1]):
        scale = numbers[k * sizes[0] + NUMBERS.index("scale")]
        place = Place(*layout[k * sizes[1] + 1 : (k + 1) * sizes[1]])
        if place.threshold >= 0 and place.value >= 0:
            found[place.threshold] = -scale * upstream[place.value] * integers[place.integer]
    return torch.stack(found)


define(
    "rowstats",
    f"({OPERANDS}, Tensor labels, Tensor? labels2, {STATISTICS}, int workspace, str backend)"
    " -> (Tensor values, Tensor integers, Tensor state, Tensor kept)",
    fake=_forward_fake,
    save=_save,
    backward=_backward,
)
define_backward(
    "rowstats",
    f"(Tensor upstream, Tensor state, Tensor kept, {OPERANDS}, Tensor labels, Tensor? labels2, "
    f"{STATISTICS}, str backend, *, bool[] wanted) -> Tensor[]",
    fake=_backward_fake,
)
