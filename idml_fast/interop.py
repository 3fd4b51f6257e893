"""pytorch-metric-learning: its losses, miners and memories with the introspective metric.

Their embedding is one tensor, so both parts of an item travel in one: the *joint* embedding
``[sem | unc]``, ``[N, Ds + Du]``. `Joined` makes a two-headed model return it, and the distances
here take it apart again. Where pytorch-metric-learning asks for an ``embedding_size``, it is
``Ds + Du``: proxies and class weights then have an uncertainty too, and learn it.

Pass ``normalize_embeddings=False`` to its testers and to its ``InferenceModel``: they would
normalise the joint embedding, and with it the length of ``unc`` that is the uncertainty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .metric import Metric
from .paired import paired
from .pairwise import pairwise

try:
    from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
except ModuleNotFoundError as error:
    raise ImportError(
        "idml_fast.interop needs pytorch-metric-learning: pip install 'idml_fast[pml]'"
    ) from error

__all__ = ["IntrospectiveDistance", "IntrospectiveSimilarity", "Joined", "join", "split"]


def join(
    sem: Tensor,  # [N, Ds]
    unc: Tensor,  # [N, Du]
) -> Tensor:  # [N, Ds + Du]
    """The joint embedding ``[sem | unc]``, in the wider dtype of the two.

    Raises:
        TypeError, ValueError: an argument is no matrix, or they differ in their number of rows.

    >>> join(torch.ones(1, 3), torch.zeros(1, 2))
    tensor([[1., 1., 1., 0., 0.]])
    """
    _checks.parts(sem, unc)
    return torch.cat([sem, unc], dim=1)


def split(
    embeddings: Tensor,  # [N, Ds + Du]
    sem_dim: int,
    *,
    dim: int = 1,
) -> tuple[Tensor, Tensor]:  # [N, Ds], [N, Du]
    """``(sem, unc)`` of joint embeddings: two views, nothing is copied.

    Args:
        embeddings: what `join` returned.
        sem_dim: Ds, the width of ``sem``.
        dim: along which the two lie side by side.

    Raises:
        ValueError: the embeddings are narrower than ``sem_dim``.

    >>> sem, unc = split(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    >>> unc
    tensor([[3.]])
    """
    _checks.joint("embeddings", embeddings, sem_dim, dim)
    return embeddings.split([sem_dim, embeddings.shape[dim] - sem_dim], dim)


class Joined(nn.Module):
    """A model that returns ``(sem, unc)``, returning its joint embeddings instead.

    Args:
        model: of any arguments; its ``sem`` and ``unc`` are as for `join`.

    >>> class TwoHeaded(nn.Module):
    ...     def forward(self, x):
    ...         return x, -x
    >>> Joined(TwoHeaded())(torch.ones(1, 2))
    tensor([[ 1.,  1., -1., -1.]])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # [N, Ds + Du]
        """The joint embeddings of what the model makes of these arguments."""
        parts = self.model(*args, **kwargs)
        _checks.instance("what the model returns", parts, tuple, "a pair (sem, unc)")
        return join(*parts)


class _OfJoint:
    """What both distances override of pytorch-metric-learning's ``BaseDistance``."""

    def __init__(self, sem_dim: int, metric: Metric, backend: str | None, **kwargs: Any) -> None:
        _checks.integer("sem_dim", sem_dim, ">= 1", lambda sem_dim: sem_dim >= 1)
        _checks.lp(kwargs.get("p", 2))
        super().__init__(**kwargs)
        self.sem_dim, self.metric, self.backend = sem_dim, metric, backend

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        # Losses pass the batch as its own reference, which the base would normalise a second time.
        return super().forward(query_emb, None if ref_emb is query_emb else ref_emb)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        itself = ref_emb is None or ref_emb is query_emb
        if query_emb.ndim > 2:  # SmoothAPLoss compares each class with itself, in one call for all
            refs = [None] * len(query_emb) if itself else ref_emb
            sets = zip(query_emb, refs, strict=True)
            return torch.stack([self.compute_mat(query, ref) for query, ref in sets])
        sem, unc = self._parts("query_emb", query_emb)
        sem2, unc2 = (None, None) if itself else self._parts("ref_emb", ref_emb)
        mat = pairwise(sem, unc, sem2, unc2, metric=self.metric, backend=self.backend)
        # Under autocast, losses put numbers into it that only the embeddings' dtype may hold.
        return mat.to(query_emb.dtype)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        query, ref = self._parts("query_emb", query_emb), self._parts("ref_emb", ref_emb)
        scores = paired(*query, *ref, metric=self.metric, backend=self.backend)
        return scores.to(query_emb.dtype)

    def normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        sem, unc = split(embeddings, self.sem_dim, dim=dim)
        return torch.cat([super().normalize(sem, dim=dim, **kwargs), unc], dim=dim)

    def get_norm(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        sem, _ = split(embeddings, self.sem_dim, dim=dim)
        return super().get_norm(sem, dim=dim, **kwargs)

    def check_shapes(self, query_emb: Tensor, ref_emb: Tensor | None) -> None:
        super().check_shapes(query_emb, ref_emb)
        self._parts("query_emb", query_emb)
        if ref_emb is not None:
            self._parts("ref_emb", ref_emb)

    def _parts(self, name: str, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(sem, unc)``, ``unc`` None for a metric that does not read it."""
        reads_unc = self.metric.reads_unc
        _checks.joint(name, embeddings, self.sem_dim, has_unc=reads_unc)
        sem, unc = split(embeddings, self.sem_dim)
        return sem, unc if reads_unc else None


class IntrospectiveDistance(_OfJoint, LpDistance):
    """``LpDistance`` of joint embeddings, weakened by the pair's uncertainty: smaller is closer.

    ``forward(query_emb, ref_emb=None)`` is `idml_fast.pairwise` on the two parts, which it reads
    where they are; a batch against itself takes half the products, and its diagonal is exactly 0.
    ``pairwise_distance(query_emb, ref_emb)`` is `idml_fast.paired`. Both return the dtype of the
    embeddings, under autocast too. ``normalize`` and ``get_norm`` mean the semantic part only, so
    statistics (``collect_stats=True``) do too.

    An ``LpDistance`` to whoever demands one. But what a loss computes from the embeddings itself
    knows nothing of their parts: ``AngularLoss`` and ``AngularMiner`` take the joint embedding for
    one point, and ``DistanceWeightedMiner`` its width for the dimension of the sphere.

    Args:
        sem_dim: Ds, the width of the semantic part of the joint embedding.
        metric: of form ``"distance"``. `Metric.plain` reads ``sem`` alone; embeddings may then be
            ``[N, Ds]``. For a ``tau`` that learns, set the attribute ``metric`` anew in each step.
        normalize_embeddings: whether the semantic part is L2-normalised first.
        power: of the distances; 2 for ``FastAPLoss``, ``NCALoss`` and ``ProxyNCALoss``.
        backend: as for `idml_fast.pairwise`.
        **kwargs: what pytorch-metric-learning's distances take besides, such as ``collect_stats``.

    Raises:
        TypeError, ValueError: an argument is out of its range, or ``metric`` of another form; when
            called, embeddings do not fit, as for `idml_fast.pairwise`.

    Source: Wang et al., *Introspective Deep Metric Learning*, TPAMI 2023, arXiv 2309.09982.

    >>> from pytorch_metric_learning.losses import TripletMarginLoss
    >>> loss = TripletMarginLoss(distance=IntrospectiveDistance(sem_dim=3))
    >>> sem, unc = torch.eye(3), torch.zeros(3, 2)
    >>> loss(join(sem, unc), torch.tensor([0, 0, 1]))
    tensor(0.0500)
    """

    def __init__(
        self,
        sem_dim: int,
        *,
        metric: Metric = Metric.paper("distance"),
        normalize_embeddings: bool = True,
        power: float = 1,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        _checks.metric_of("IntrospectiveDistance", metric, "distance")
        options = {"normalize_embeddings": normalize_embeddings, "power": power}
        super().__init__(sem_dim, metric, backend, **options, **kwargs)


class IntrospectiveSimilarity(_OfJoint, CosineSimilarity):
    """``CosineSimilarity`` of joint embeddings, weakened by the pair's uncertainty: larger is
    closer.

    As `IntrospectiveDistance`, for the cosine forms of the metric; the diagonal of a batch against
    itself is exactly 1. ``normalize_embeddings=False`` leaves the lengths of the semantic parts as
    they are, in the distance that weighs the uncertainty: the cosine itself never depends on them.

    >>> from pytorch_metric_learning.losses import ProxyAnchorLoss
    >>> similarity = IntrospectiveSimilarity(sem_dim=3)
    >>> loss = ProxyAnchorLoss(num_classes=2, embedding_size=3 + 2, distance=similarity)
    >>> loss(join(torch.eye(3), torch.zeros(3, 2)), torch.tensor([0, 0, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        sem_dim: int,
        *,
        metric: Metric = Metric.paper("cosine"),
        normalize_embeddings: bool = True,
        power: float = 1,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        _checks.metric_of("IntrospectiveSimilarity", metric, "cosine", "official")
        super().__init__(sem_dim, metric, backend, power=power, **kwargs)
        self.normalize_embeddings = normalize_embeddings  # CosineSimilarity takes no such argument
