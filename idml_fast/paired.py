"""`paired`: the scores of listed pairs only."""

from __future__ import annotations

from torch import Tensor

from . import _checks, reference
from . import backend as backends
from .metric import Metric
from .pairwise import autocast


def paired(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | None = None,  # [M, Du]
    *,
    index: tuple[Tensor, Tensor] | None = None,  # [T], [T]
    metric: Metric = Metric(),
    backend: str | None = None,
) -> Tensor:  # [T]
    """Introspective scores of the pairs ``(rows[t], cols[t])``.

    Replaces, without the N x M matrix::

        scores = idml_fast.pairwise(sem, unc, sem2, unc2, metric=metric)[rows, cols]

    It is computed in eager PyTorch: the embeddings of the T pairs are gathered.

    Args:
        sem, unc, sem2, unc2, metric: as for `idml_fast.pairwise`.
        index: ``(rows, cols)``, int64 positions; None pairs row t with column t (then N = M, and
            ``sem2`` must be given).
        backend: None, or ``"reference"``.

    Returns:
        One score a pair in the dtype of the inputs, differentiable in all embeddings.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.
        RuntimeError: the named backend cannot serve this.

    >>> import torch, idml_fast
    >>> sem, unc = torch.eye(3), torch.zeros(3, 2)
    >>> index = torch.tensor([0, 0]), torch.tensor([0, 2])
    >>> idml_fast.paired(sem, unc, index=index)
    tensor([0.0000, 1.4142])
    """
    sem, unc, sem2, unc2 = autocast(sem, unc, sem2, unc2)
    _checks.pairs(sem, unc, sem2, unc2, metric)
    columns = sem if sem2 is None else sem2
    if index is None:
        _checks.same_length(sem, sem2)
    else:
        _checks.index(index, len(sem), len(columns))
    backends.choose("paired", sem, backend or "reference")
    return reference.paired(sem, unc, sem2, unc2, index=index, metric=metric)
