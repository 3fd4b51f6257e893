"""`rowstats`: statistics of each row of scores, under a condition on the labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _checks, reference
from .metric import Metric
from .pairwise import autocast, pairwise
from .stats import Extremum, HingeSum, Statistic


def rowstats(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | None = None,  # [M, Du]
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

    The scores come from the kernel of `idml_fast.pairwise`; the statistics are computed from them
    in eager PyTorch, in float32 or better, so memory grows with N x M.

    Args:
        sem, unc, sem2, unc2, metric, backend: as for `idml_fast.pairwise`. Without ``sem2`` the
            rows are compared with themselves, and a row never looks at its own column.
        labels, labels2: integer labels of the rows and of the columns; ``labels2`` goes with
            ``sem2``.
        stats: a name for each statistic wanted, see `idml_fast.stats`.

    Returns:
        The statistics under their names; ``[N]`` each (`stats.Histogram`: ``[N, bins + 1]``,
        `stats.Min` and `stats.Max`: values and columns). Values are differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.
        RuntimeError: no backend serves these tensors.

    >>> import torch, idml_fast
    >>> sem, unc = torch.eye(3), torch.zeros(3, 2)
    >>> count = idml_fast.stats.Count(where="same")
    >>> labels = torch.tensor([0, 0, 1])
    >>> idml_fast.rowstats(sem, unc, labels=labels, stats={"positives": count})
    {'positives': tensor([1, 1, 0])}
    """
    sem, unc, sem2, unc2 = autocast(sem, unc, sem2, unc2)
    _checks.pairs(sem, unc, sem2, unc2, metric)
    _checks.labels("labels", labels, sem, "sem")
    _checks.column_labels(labels2, sem2)
    _checks.instance("stats", stats, Mapping, "a mapping of names to idml_fast.stats")
    for name, stat in stats.items():
        _checks.instance(f"stats[{name!r}]", stat, Statistic, "one of idml_fast.stats")
        if isinstance(stat, HingeSum) and isinstance(stat.threshold, Tensor):
            _checks.vector(f"stats[{name!r}].threshold", stat.threshold, sem, "sem")
    scores = pairwise(sem, unc, sem2, unc2, metric=metric, backend=backend)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    return reference.reduce_rows(scores, labels, labels2, stats)
