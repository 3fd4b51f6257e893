"""`pairwise`: the score of every row with every column."""

from __future__ import annotations

from typing import Any

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


def pairwise(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | str | None = None,  # [M, Du] or "zero"
    *,
    metric: Metric = Metric(),
    backend: str | None = None,
) -> Tensor:  # [N, M]
    """Introspective scores of all pairs, in the time of their two matrix products.

    Replaces, for the distance form::

        alpha = torch.cdist(sem, sem2)
        beta = torch.cdist(unc, -unc2)
        scores = alpha * torch.exp(-(beta + metric.gamma) / (metric.tau * alpha))

    Neither ``alpha`` nor ``beta`` nor anything else of N x M is allocated besides the result, in
    the forward or in the backward, which computes them again tile by tile; the distance form's
    backward keeps the result for that, so it must not be changed in place. Without ``sem2`` the
    rows are compared with themselves at half the products; the diagonal is then exactly 0 (1 for
    the cosine forms) and carries no gradient. Near-duplicates are computed from their differences,
    so that the relative error of an alpha stays below 128 times that of the products' accumulation.
    That is slow: a batch of near-duplicates only (cosines above 0.998) takes about 20 times longer.
    The same input gives the same bits, for one number of threads or on one GPU.

    Args:
        sem, sem2: semantic embeddings; float32, float64, bfloat16 or float16, of any strides.
        unc, unc2: uncertainty embeddings, not normalised; their width may differ from that of
            ``sem``. ``"zero"`` for items that are certain (such as proxies): that side's embeddings
            are then neither made nor multiplied. May be None for a metric that does not read them
            (`Metric.plain`).
        metric: temperature, offset and form.
        backend: None takes the fastest that serves these tensors (`idml_fast.backend`).

    Returns:
        Scores in the dtype of the inputs; under autocast in the autocast dtype. Differentiable once
        in all embeddings and, where they are tensors, in ``metric.tau`` and ``metric.gamma``. NaN
        and Inf in an embedding come out as NaN or Inf.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.
        RuntimeError: no backend serves these tensors, or a second derivative is asked for.

    Source: Wang et al., *Introspective Deep Metric Learning*, TPAMI 2023, arXiv 2309.09982.

    >>> import torch, idml_fast
    >>> sem, unc = torch.eye(3), torch.zeros(3, 2)
    >>> idml_fast.pairwise(sem, unc)[0]
    tensor([0.0000, 1.4142, 1.4142])
    """
    sem, unc, sem2, unc2 = autocast(sem, unc, sem2, unc2)
    _checks.pairs(sem, unc, sem2, unc2, metric)
    given = {"sem": sem, "unc": unc, "sem2": sem2, "unc2": unc2}
    served = backends.choose("pairwise", sem, backend, beyond_cuda(given, metric))
    if served == "reference":
        return reference.pairwise(sem, unc, sem2, unc2, metric=metric)
    return torch.ops.idml_fast.pairwise(*operands(sem, unc, sem2, unc2, metric), served)


def _forward_fake(sem: Tensor, unc: Tensor | None, sem2: Tensor | None, *_: Any) -> Tensor:
    return sem.new_empty(sem.shape[0], (sem if sem2 is None else sem2).shape[0])


def _backward_fake(
    upstream: Tensor, scores: Tensor | None, *operands: Any, wanted: list[bool]
) -> list[Tensor]:
    return empty_gradients(operands, wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The distance form can be inverted: its scores, which exist anyway, spare the backward one of
    # the two products.
    save(ctx, inputs, output if inputs[7] == "distance" else None)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    operands, (scores,), wanted = saved(ctx)
    gradients = torch.ops.idml_fast.pairwise_backward(
        upstream, scores, *operands, ctx.backend, wanted=wanted
    )
    return *by_operand(gradients, wanted), None


define(
    "pairwise",
    f"({OPERANDS}, str backend) -> Tensor",
    fake=_forward_fake,
    save=_save,
    backward=_backward,
)
define_backward(
    "pairwise",
    f"(Tensor upstream, Tensor? scores, {OPERANDS}, str backend, *, bool[] wanted) -> Tensor[]",
    fake=_backward_fake,
)
