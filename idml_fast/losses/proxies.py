"""Losses that compare items with a learned proxy of each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from .._operands import autocast
from ..metric import FORMS, Metric
from ..stats import Count, LogSumExp
from ._loss import Loss, Pairs, loss_function, softplus


@loss_function
def proxy_anchor_loss(
    pairs: Pairs,
    *,
    proxies: Tensor,  # [C, Ds]
    proxies_unc: Tensor | None = None,  # [C, Du]
    margin: float = 0.1,
    alpha: float = 32.0,
    metric: Metric = Metric.paper("cosine"),
) -> Tensor:  # []
    """The Proxy-Anchor loss, see `ProxyAnchorLoss`; ``proxies_unc=None`` stands for zeros."""
    _checks.metric_of("the Proxy-Anchor loss", metric, "cosine", "official")
    _checks.finite("margin", margin)
    _checks.positive("alpha", alpha)
    items, anchors = _sides(pairs, proxies, proxies_unc, metric)
    found = Pairs(*anchors, *items).rowstats(
        metric,
        {
            "pull": LogSumExp(where="same", scale=-alpha, shift=margin),
            "push": LogSumExp(where="different", scale=alpha, shift=-margin),
            "positives": Count(where="same"),
        },
    )
    pull, push = softplus(found["pull"]), softplus(found["push"])  # log(1 + sum exp)
    with_positives = (found["positives"] > 0).sum().clamp_min(1)
    return pull.sum() / with_positives + push.sum() / max(1, len(proxies))


@loss_function
def proxy_nca_loss(
    pairs: Pairs,
    *,
    proxies: Tensor,  # [C, Ds]
    proxies_unc: Tensor | None = None,  # [C, Du]
    softmax_scale: float = 1.0,
    power: float = 2.0,
    metric: Metric = Metric.paper(),
) -> Tensor:  # []
    """The Proxy-NCA loss, see `ProxyNCALoss`; ``proxies_unc=None`` stands for zeros."""
    _checks.metric_of("the Proxy-NCA loss", metric, *FORMS)
    _checks.positive("softmax_scale", softmax_scale)
    items, classes = _sides(pairs, proxies, proxies_unc, metric)
    closeness = {"scale": -metric.sign * softmax_scale, "power": power}
    found = Pairs(*items, *classes).rowstats(
        metric,
        {
            "own": LogSumExp(where="same", **closeness),
            "every": LogSumExp(where="any", **closeness),
        },
    )
    return (found["every"] - found["own"]).sum() / max(1, len(items[0]))


class ProxyLoss(Loss):
    """What the losses with proxies have in common: the proxies that they learn.

    Args:
        num_classes: C, the number of classes, each with one proxy.
        sem_dim: Ds, the width of the semantic embedding.
        unc_dim: Du, the width of the uncertainty embedding; None: as ``sem_dim``. Only learned
            proxy uncertainties need it.
        proxy_unc: ``"zero"``: a proxy is certain; ``"learned"``: it has an uncertainty embedding.
        normalize_proxies: scale the proxies to unit length before they are compared. The semantic
            embeddings are taken as they come: normalise them in the model.
        settings: of the loss.

    Attributes:
        proxies: parameter ``[C, Ds]``; give it to your optimizer.
        proxies_unc: parameter ``[C, Du]`` if learned, else None.
    """

    _own = ("proxies", "proxies_unc")

    def __init__(
        self,
        num_classes: int,
        sem_dim: int,
        unc_dim: int | None = None,
        *,
        proxy_unc: str = "zero",
        normalize_proxies: bool = True,
        **settings: Any,
    ) -> None:
        unc_dim = sem_dim if unc_dim is None else unc_dim
        sizes = {"num_classes": num_classes, "sem_dim": sem_dim, "unc_dim": unc_dim}
        for name, size in sizes.items():
            _checks.integer(name, size, ">= 1", lambda size: size >= 1)
        _checks.one_of("proxy_unc", proxy_unc, ("zero", "learned"))
        super().__init__(proxies=torch.empty(1, 1, device="cpu"), **settings)
        self.normalize_proxies = normalize_proxies
        self.proxies = nn.Parameter(torch.empty(num_classes, sem_dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")
        if proxy_unc == "learned":
            self.proxies_unc = nn.Parameter(torch.empty(num_classes, unc_dim))
            nn.init.normal_(self.proxies_unc, std=unc_dim**-0.5)

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that the function is called with."""
        proxies = F.normalize(self.proxies) if self.normalize_proxies else self.proxies
        return super().settings() | {"proxies": proxies}

    def extra_repr(self) -> str:
        """The sizes and settings that `print` shows."""
        classes, sem_dim = self.proxies.shape
        return f"{classes}, {sem_dim}, {super().extra_repr()}"


class ProxyAnchorLoss(ProxyLoss, function=proxy_anchor_loss):
    """The Proxy-Anchor loss on introspective cosines, with its learned proxies.

    With ``x[c, i]`` the score of proxy c and item i::

        pull = sum_c log(1 + sum_{i: y_i = c} exp(-alpha (x[c, i] - margin))) / #(classes present)
        push = sum_c log(1 + sum_{i: y_i != c} exp(alpha (x[c, i] + margin))) / C
        loss = pull + push

    Args:
        num_classes, sem_dim, unc_dim, proxy_unc, normalize_proxies: see `ProxyLoss`.
        margin, alpha: of the loss, as above.
        metric: of a cosine form.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Kim et al., *Proxy Anchor Loss for Deep Metric Learning*, CVPR 2020, with the scores of
    Wang et al., *Introspective Deep Metric Learning*, TPAMI 2023.

    >>> loss = ProxyAnchorLoss(num_classes=3, sem_dim=8)
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 1])).shape
    torch.Size([])
    """


class ProxyNCALoss(ProxyLoss, function=proxy_nca_loss):
    """The Proxy-NCA loss on introspective distances, with its learned proxies.

    With ``x[i, c]`` the score of item i and proxy c::

        loss = mean_i -log(exp(-softmax_scale x[i, y_i] ** power)
                           / sum_c exp(-softmax_scale x[i, c] ** power))

    Args:
        num_classes, sem_dim, unc_dim, proxy_unc, normalize_proxies: see `ProxyLoss`.
        softmax_scale: sharpness of the softmax, > 0.
        power: of the score, > 0.
        metric: of any form; a similarity is not negated.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Movshovitz-Attias et al., *No Fuss Distance Metric Learning Using Proxies*, ICCV 2017;
    the own proxy is part of the sum, as in pytorch-metric-learning.

    >>> loss = ProxyNCALoss(num_classes=3, sem_dim=8, softmax_scale=3.0)
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 1])).shape
    torch.Size([])
    """


Side = tuple[Tensor, Tensor | str | None, Tensor]  # embeddings and labels of rows or of columns


def _sides(
    pairs: Pairs,
    proxies: Tensor,  # [C, Ds]
    proxies_unc: Tensor | None,  # [C, Du]
    metric: Metric,
) -> tuple[Side, Side]:
    """The items, all in one, and the proxies of the classes."""
    _checks.tensor("proxies", proxies)
    sem, unc, labels, sem2, unc2, labels2 = pairs.checked(metric)
    if sem2 is not None:
        _checks.same_kind("unc2", unc2, "unc", unc)
        sem, labels = torch.cat([sem, sem2]), torch.cat([labels, labels2])
        unc = torch.cat([unc, unc2]) if isinstance(unc, Tensor) else unc
    if unc is None:
        proxies_unc = None
    proxies, proxies_unc = autocast(proxies, proxies_unc)
    _checks.embeddings(
        sem, unc, proxies, proxies_unc, metric, columns=("proxies", "proxies_unc", "C")
    )
    _checks.labels_below("labels", labels, len(proxies))
    if unc is not None and proxies_unc is None:
        proxies_unc = "zero"
    classes = torch.arange(len(proxies), device=proxies.device)
    return (sem, unc, labels), (proxies, proxies_unc, classes)
