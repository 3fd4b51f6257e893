"""`nearest`: the closest columns of each row."""

from __future__ import annotations

from torch import Tensor

from . import _checks, reference
from .metric import Metric
from .pairwise import autocast, pairwise
from .stats import CONDITIONS


def nearest(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | None = None,  # [M, Du]
    *,
    k: int,
    metric: Metric = Metric(),
    labels: Tensor | None = None,  # [N]
    labels2: Tensor | None = None,  # [M]
    where: str = "any",
    largest: bool | None = None,
    exclude_self: bool = False,
    above: Tensor | None = None,  # [N]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k]
    """The k best columns of each row, and their scores.

    Replaces::

        scores = idml_fast.pairwise(sem, unc, sem2, unc2, metric=metric)
        values, columns = scores.topk(k, largest=metric.larger_is_closer)

    The scores come from the kernel of `idml_fast.pairwise`; they are sorted in eager PyTorch, so
    memory grows with N x M.

    Args:
        sem, unc, sem2, unc2, metric, backend: as for `idml_fast.pairwise`.
        k: how many columns, >= 1.
        labels, labels2, where: look only at columns with the ``"same"`` or a ``"different"`` label;
            ``labels2`` goes with ``sem2``.
        largest: whether a larger score is better; None takes what the metric means (the smallest
            distances, the largest cosines).
        exclude_self: leave out column i of row i, for rows compared with themselves.
        above: look only at scores above this number of each row.

    Returns:
        ``(values, columns)``, the best first; a tie goes to the smaller column. Where a row has
        fewer than k columns to look at, the rest are +inf (-inf if the largest are wanted) and -1.
        Values are differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.
        RuntimeError: no backend serves these tensors.

    >>> import torch, idml_fast
    >>> sem = torch.tensor([[0.0], [1.0], [3.0]])
    >>> idml_fast.nearest(sem, None, k=1, metric=Metric.plain(), exclude_self=True)[1]
    tensor([[1],
            [0],
            [1]])
    """
    sem, unc, sem2, unc2 = autocast(sem, unc, sem2, unc2)
    _checks.pairs(sem, unc, sem2, unc2, metric)
    _checks.integer("k", k, ">= 1", lambda k: k >= 1)
    _checks.one_of("where", where, CONDITIONS)
    if where != "any":
        _checks.labels("labels", labels, sem, "sem")
        _checks.column_labels(labels2, sem2)
    if exclude_self and sem2 is not None:
        raise ValueError("exclude_self must be False with sem2: its columns are other items")
    if above is not None:
        _checks.vector("above", above, sem, "sem")
    scores = pairwise(sem, unc, sem2, unc2, metric=metric, backend=backend)
    largest = metric.larger_is_closer if largest is None else largest
    return reference.best_columns(scores, k, labels, labels2, where, largest, exclude_self, above)
