"""What the measures have in common: items that count several times, ranks, and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks


def mean(
    values: Tensor,  # [N] float64
    weights: Tensor,  # [N] or [N, B] float64
) -> Tensor:  # [] or [B]
    """The weighted mean: a measure for `bootstrap` of what is a number for each query, such as
    whether it is answered rightly."""
    return values @ weights / weights.sum(dim=0)


def auroc(values: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """How well the values rank positive items above the others; ties count half."""
    groups, place = values.unique(return_inverse=True)
    above = sums(place[positive], weights[positive], len(groups))
    below = sums(place[~positive], weights[~positive], len(groups))
    won = above * (below.cumsum(0) - below / 2)
    return won.sum(dim=0) / (above.sum(dim=0) * below.sum(dim=0))


def sums(place: Tensor, weights: Tensor, groups: int) -> Tensor:
    """``[groups]`` or ``[groups, B]``: the sums of the weights of the items at each place."""
    return weights.new_zeros(groups, *weights.shape[1:]).index_add_(0, place, weights)


def weights_of(weights: Tensor | None, values: Tensor) -> Tensor:
    """The weights, once each if none are given."""
    if weights is None:
        return torch.ones(len(values), dtype=torch.float64, device=values.device)
    if weights.dim() not in (1, 2) or len(weights) != len(values):
        wanted = f"[{len(values)}] or [{len(values)}, B]"
        raise ValueError(f"weights must have shape {wanted}, got {list(weights.shape)}")
    return weights.double()


def check(name: str, values: Tensor, other: str, truth: Tensor) -> None:
    _checks.vector(name, values, truth, other)
    if truth.dtype != torch.bool:
        raise TypeError(f"{other} must be bool, got {str(truth.dtype).removeprefix('torch.')}")
    if not len(values):
        raise ValueError(f"{name} must hold at least one item, got none")
    check_numbers(name, values)


def check_numbers(name: str, values: Tensor) -> None:
    missing = values.isnan()
    if missing.any():
        place = missing.nonzero()[0].tolist()
        raise ValueError(f"{name} must be numbers, got NaN at {place}")


def check_sides(sem: Tensor, labels: Tensor, sem2: Tensor | None, labels2: Tensor | None) -> None:
    if (sem2 is None) != (labels2 is None):
        raise ValueError("sem2 and labels2 must be given together, got only one of them")
    _checks.labels("labels", labels, sem, "sem")
    if sem2 is not None:
        _checks.labels("labels2", labels2, sem2, "sem2")
    for name, x in {"sem": sem, **({} if sem2 is None else {"sem2": sem2})}.items():
        least = 2 if sem2 is None else 1
        if len(x) < least:
            raise ValueError(f"{name} must hold at least {least} items, got {len(x)}")
        check_numbers(name, x)
