"""`paired`: the scores of listed pairs only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, reference
from . import backend as backends
from ._operands import (
    OPERANDS,
    autocast,
    by_operand,
    define,
    define_backward,
    empty_gradients,
    operands,
    save,
    saved,
)
from .metric import Metric


def paired(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | str | None = None,  # [M, Du] or "zero"
    *,
    index: tuple[Tensor, Tensor] | None = None,  # [T], [T]
    metric: Metric = Metric(),
    backend: str | None = None,
) -> Tensor:  # [T]
    """Introspective scores of the pairs ``(rows[t], cols[t])``.

    Replaces, without the N x M matrix::

        scores = idml_fast.pairwise(sem, unc, sem2, unc2, metric=metric)[rows, cols]

    The kernel reads the embeddings where they are: no ``sem[rows]`` ``[T, Ds]`` is made, in the
    forward or in the backward, which measures each pair again. An item may be in any number of
    pairs; its gradient is added up in the pairs' order, so the same input gives the same bits. All
    pairs are computed from the differences of their components, near-duplicates as well.

    Args:
        sem, unc, sem2, unc2, metric, backend: as for `idml_fast.pairwise`.
        index: ``(rows, cols)``, int64 positions on the device of ``sem``; None pairs row t with
            column t (then N = M, and ``sem2`` must be given).

    Returns:
        One score a pair in the dtype of the inputs; under autocast in the autocast dtype.
        Differentiable once, in what `idml_fast.pairwise` is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.
        RuntimeError: no backend serves these tensors, or a second derivative is asked for.

    Source: Wang et al., *Introspective Deep Metric Learning*, TPAMI 2023, arXiv 2309.09982.

    >>> import torch, idml_fast
    >>> sem, unc = torch.eye(3), torch.zeros(3, 2)
    >>> index = torch.tensor([0, 0]), torch.tensor([0, 2])
    >>> idml_fast.paired(sem, unc, index=index)
    tensor([0.0000, 1.4142])
    """
    sem, unc, sem2, unc2 = autocast(sem, unc, sem2, unc2)
    _checks.pairs(sem, unc, sem2, unc2, metric)
    if index is None:
        _checks.same_length(sem, sem2)
    else:
        _checks.index(index, sem, sem if sem2 is None else sem2)
    served = backends.choose("paired", sem, backend)
    if served == "reference":
        return reference.paired(sem, unc, sem2, unc2, index=index, metric=metric)
    rows, cols = (None, None) if index is None else index
    return torch.ops.idml_fast.paired(*operands(sem, unc, sem2, unc2, metric), rows, cols, served)


def _forward_fake(sem: Tensor, *arguments: Any) -> Tensor:
    rows = arguments[-3]
    return sem.new_empty((sem if rows is None else rows).shape[0])


def _backward_fake(upstream: Tensor, *arguments: Any, wanted: list[bool]) -> list[Tensor]:
    return empty_gradients(arguments, wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, inputs, *inputs[8:-1])


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    operands, index, wanted = saved(ctx)
    gradients = torch.ops.idml_fast.paired_backward(
        upstream, *operands, *index, ctx.backend, wanted=wanted
    )
    return *by_operand(gradients, wanted), None, None, None


# Without an index, row t is paired with column t. The backward takes a negative column as no pair:
# `idml_fast.nearest` differentiates its scores with it, and may not have found all it looked for.
define(
    "paired",
    f"({OPERANDS}, Tensor? rows, Tensor? cols, str backend) -> Tensor",
    fake=_forward_fake,
    save=_save,
    backward=_backward,
)
define_backward(
    "paired",
    f"(Tensor upstream, {OPERANDS}, Tensor? rows, Tensor? cols, str backend, *, bool[] wanted)"
    " -> Tensor[]",
    fake=_backward_fake,
)
