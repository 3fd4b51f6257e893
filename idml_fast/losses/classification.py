"""The classification head of the paper: a softmax that the uncertainty weakens in training."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from ..metric import Metric
from ..pairwise import pairwise
from ._loss import Pairs, loss_function
from .proxies import ProxyLoss, proxy_nca_loss


@loss_function
def introspective_softmax_loss(
    pairs: Pairs,
    *,
    proxies: Tensor,  # [C, Ds]
    proxies_unc: Tensor | None = None,  # [C, Du]
    softmax_scale: float = 16.0,
    metric: Metric = Metric.paper("cosine"),
) -> Tensor:  # []
    """The cross-entropy of `IntrospectiveSoftmax`; ``proxies_unc=None`` stands for zeros."""
    _checks.metric_of("the introspective softmax", metric, "cosine", "official")
    proxy = {"proxies": proxies, "proxies_unc": proxies_unc}
    return proxy_nca_loss(*pairs, **proxy, softmax_scale=softmax_scale, power=1.0, metric=metric)


class IntrospectiveSoftmax(ProxyLoss, function=introspective_softmax_loss):
    """A classification head whose logits are weakened by the uncertainty, in training only.

    With ``z[i, c]`` the cosine of item i and the direction of class c, and ``r`` as in `Metric`
    between the two (a class is certain)::

        x = 1 - (1 - z) exp(-r)                             in training
        x = z                                               in evaluation
        loss = mean_i -log(exp(softmax_scale x[i, y_i]) / sum_c exp(softmax_scale x[i, c]))

    Replaces ``F.cross_entropy(head.logits(sem, unc), labels)``; no ``[N, C]`` is allocated, however
    many classes there are. With ``Metric.plain("cosine")`` it is the conventional softmax of
    cosines.

    Args:
        num_classes, sem_dim, unc_dim, proxy_unc, normalize_proxies: see `ProxyLoss`.
        softmax_scale: sharpness of the softmax, > 0; cosines alone could not come near 0 and 1.
        metric: of a cosine form.

    Attributes:
        proxies: parameter ``[C, Ds]``, the directions of the classes.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Wang et al., *Introspective Deep Metric Learning*, TPAMI 2023.

    >>> import torch
    >>> head = IntrospectiveSoftmax(num_classes=3, sem_dim=8)
    >>> sem, unc = torch.randn(4, 8), torch.randn(4, 2)
    >>> head(sem, unc, torch.tensor([0, 2, 2, 1])).shape
    torch.Size([])
    >>> head.eval().logits(sem).argmax(1).shape
    torch.Size([4])
    """

    def logits(
        self,
        sem: Tensor,  # [N, Ds]
        unc: Tensor | None = None,  # [N, Du]
    ) -> Tensor:  # [N, C]
        """``softmax_scale x``: weakened by ``unc`` in training, plain cosines in evaluation.

        Raises:
            TypeError, ValueError: an argument does not fit; ``unc`` is needed in training.
        """
        settings = self.settings()
        proxies, proxies_unc = settings["proxies"], settings["proxies_unc"]
        metric = self.metric
        if not self.training:
            metric, unc, proxies_unc = Metric.plain("cosine"), None, None
        elif unc is not None and proxies_unc is None:
            proxies_unc = "zero"
        return self.softmax_scale * pairwise(sem, unc, proxies, proxies_unc, metric=metric)
