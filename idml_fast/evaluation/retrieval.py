"""Retrieval: what the nearest neighbours of every query are worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ..metric import Metric
from ..nearest import nearest


def recall_at_k(
    relevant: Tensor,  # [N, K] bool
    k: int,
) -> float:
    """Share of the queries with a relevant item among their ``k`` nearest.

    Equals ``relevant[:, :k].any(dim=1).float().mean()``.

    Args:
        relevant: ``[N, K]`` bool, ``K >= k``; whether the j-th nearest item has the query's label.
        k: how many neighbours count.

    Raises:
        ValueError: ``relevant`` has fewer than ``k`` columns or no rows.
    """
    _check(relevant, k)
    return relevant[:, :k].any(dim=1).double().mean().item()


def r_precision(
    relevant: Tensor,  # [N, K] bool
    total: Tensor,  # [N] int
) -> float:
    """Mean over the queries of: relevant items among the ``R`` nearest, divided by ``R``.

    ``R`` is the number of relevant items there are for that query.

    Args:
        relevant: ``[N, K]`` bool, ``K >= total.max()``.
        total: ``[N]`` integer, ``R`` of every query, at least 1.

    Raises:
        ValueError: ``relevant`` has fewer than ``total.max()`` columns or no rows.

    Source: Musgrave et al., *A Metric Learning Reality Check*, arXiv 2003.08505.
    """
    return (_within_r(relevant, total).sum(dim=1) / total).mean().item()


def map_at_r(
    relevant: Tensor,  # [N, K] bool
    total: Tensor,  # [N] int
) -> float:
    """Mean average precision at R: ``1/R * sum_{i <= R} precision(i) * relevant(i)``, averaged.

    ``precision(i)`` is the share of relevant items among the ``i`` nearest. Arguments and errors
    are those of :func:`r_precision`.

    Source: Musgrave et al., *A Metric Learning Reality Check*, arXiv 2003.08505.
    """
    hits = _within_r(relevant, total)
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.cumsum(dim=1) / rank
    return ((precision * hits).sum(dim=1) / total).mean().item()


def retrieval(
    sem: Tensor,  # [N, Ds]
    labels: Tensor,  # [N]
    sem2: Tensor | None = None,  # [M, Ds]
    labels2: Tensor | None = None,  # [M]
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
) -> dict[str, float]:
    """Recall@k, R-precision and MAP@R of the semantic embeddings under the plain distance.

    The definitions are those of pytorch-metric-learning's ``AccuracyCalculator``: without a
    gallery every item is a query among all the others (itself excluded by identity, so that
    duplicates count), and a query for which no relevant item exists is left out of the averages.
    The neighbours come from `idml_fast.nearest`, ``max(ks, R)`` for each query.

    Args:
        sem: ``[N, Ds]`` float, the semantic embeddings of the queries.
        labels: ``[N]`` integer.
        sem2: ``[M, Ds]``, the gallery; absent: the queries among themselves.
        labels2: ``[M]`` integer; goes with ``sem2``.
        ks: the ``k`` of Recall@k.

    Returns:
        ``recall_at_<k>`` for every ``k``, ``r_precision`` and ``map_at_r``, each in [0, 1].

    Raises:
        TypeError, ValueError: one of ``sem2`` and ``labels2`` comes without the other, labels do
            not match their embeddings, or there is nothing to retrieve: no item, or none relevant.
    """
    if (sem2 is None) != (labels2 is None):
        raise ValueError("sem2 and labels2 must be given together, got only one of them")
    _checks.labels("labels", labels, sem, "sem")
    if sem2 is not None:
        _checks.labels("labels2", labels2, sem2, "sem2")
    itself = sem2 is None
    gallery = labels if itself else labels2
    if not len(gallery):
        raise ValueError(f"{'sem' if itself else 'sem2'} must hold at least one item, got none")
    # Counted by class, not by comparing all labels with all: that would be the [N, M] matrix.
    classes, sizes = gallery.unique(return_counts=True)
    place = torch.searchsorted(classes, labels.to(classes.dtype)).clamp(max=len(classes) - 1)
    total = torch.where(classes[place] == labels, sizes[place], 0) - int(itself)
    query = total > 0
    if not query.any():
        raise ValueError("labels must give some query a relevant item, got none that has one")

    k = min(max([*ks, int(total.max())]), len(gallery) - int(itself))
    _, columns = nearest(sem, None, sem2, k=k, metric=Metric.plain(), exclude_self=itself)
    relevant = (gallery[columns] == labels[:, None])[query]
    return {
        **{f"recall_at_{n}": recall_at_k(relevant, min(n, k)) for n in ks},
        "r_precision": r_precision(relevant, total[query]),
        "map_at_r": map_at_r(relevant, total[query]),
    }


def _within_r(relevant: Tensor, total: Tensor) -> Tensor:
    """``[N, max R]`` bool: relevant, and among the ``R`` nearest of that query."""
    most = int(total.max()) if total.numel() else 1
    _check(relevant, most)
    rank = torch.arange(most, device=relevant.device)
    return relevant[:, :most] & (rank < total[:, None])


def _check(relevant: Tensor, k: int) -> None:
    if relevant.dim() != 2 or not len(relevant) or relevant.shape[1] < k:
        raise ValueError(
            f"relevant must have shape [N, K] with N >= 1 and K >= {k}, got {list(relevant.shape)}"
        )
