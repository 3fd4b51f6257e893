"""Losses on introspective scores: small expressions of `idml_fast.rowstats`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _checks
from .metric import Metric
from .pairwise import autocast
from .rowstats import rowstats
from .stats import Count, LogSumExp


def proxy_anchor_loss(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | None,  # [N, Du]
    labels: Tensor,  # [N]
    proxies: Tensor,  # [C, Ds]
    proxies_unc: Tensor | None = None,  # [C, Du]
    *,
    metric: Metric | None = None,
    margin: float = 0.1,
    alpha: float = 32.0,
) -> Tensor:  # []
    """The Proxy-Anchor loss, see `ProxyAnchorLoss`; ``proxies_unc=None`` stands for zeros."""
    metric = Metric.paper("cosine") if metric is None else metric
    _checks.proxy_anchor(metric, margin, alpha)
    _checks.tensor("proxies", proxies)
    if unc is None:
        proxies_unc = None
    sem, unc, proxies, proxies_unc = autocast(sem, unc, proxies, proxies_unc)
    _checks.embeddings(
        sem, unc, proxies, proxies_unc, metric, columns=("proxies", "proxies_unc", "C")
    )
    _checks.labels("labels", labels, sem, "sem")
    _checks.labels_below("labels", labels, len(proxies))
    if unc is not None and proxies_unc is None:
        proxies_unc = "zero"
    classes = torch.arange(len(proxies), device=proxies.device)
    found = rowstats(
        proxies,
        proxies_unc,
        sem,
        unc,
        labels=classes,
        labels2=labels,
        metric=metric,
        stats={
            "pull": LogSumExp(where="same", scale=-alpha, shift=margin),
            "push": LogSumExp(where="different", scale=alpha, shift=-margin),
            "positives": Count(where="same"),
        },
    )
    # log(1 + sum exp) is the softplus of the log-sum-exp, and 0 for a proxy without columns. Above
    # its threshold PyTorch leaves out exp(-x), which at its own 20 is far more than float64 rounds.
    pull, push = (F.softplus(found[name], threshold=40.0) for name in ("pull", "push"))
    with_positives = (found["positives"] > 0).sum().clamp_min(1)
    return pull.sum() / with_positives + push.sum() / max(1, len(proxies))


class ProxyAnchorLoss(nn.Module):
    """The Proxy-Anchor loss on introspective cosines, with its learned proxies.

    With ``x[c, i]`` the score of proxy c and item i::

        pull = sum_c log(1 + sum_{i: y_i = c} exp(-alpha (x[c, i] - margin))) / #(classes present)
        push = sum_c log(1 + sum_{i: y_i != c} exp(alpha (x[c, i] + margin))) / C
        loss = pull + push

    Args:
        num_classes: C, the number of classes, each with one proxy.
        sem_dim: Ds, the width of the semantic embedding.
        unc_dim: Du, the width of the uncertainty embedding; None: as ``sem_dim``. Only learned
            proxy uncertainties need it.
        metric: of a cosine form; None: `Metric.paper` ``("cosine")``.
        margin, alpha: of the loss, as above.
        proxy_unc: ``"zero"``: a proxy is certain; ``"learned"``: it has an uncertainty embedding.
        normalize_proxies: scale the proxies to unit length before they are compared. The semantic
            embeddings are taken as they come: normalise them in the model.

    Attributes:
        proxies: parameter ``[C, Ds]``.
        proxies_unc: parameter ``[C, Du]`` if learned, else None.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Kim et al., *Proxy Anchor Loss for Deep Metric Learning*, CVPR 2020, with the scores of
    Wang et al., *Introspective Deep Metric Learning*, TPAMI 2023.

    >>> loss = ProxyAnchorLoss(num_classes=3, sem_dim=8)
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        sem_dim: int,
        unc_dim: int | None = None,
        *,
        metric: Metric | None = None,
        margin: float = 0.1,
        alpha: float = 32.0,
        proxy_unc: str = "zero",
        normalize_proxies: bool = True,
    ) -> None:
        super().__init__()
        unc_dim = sem_dim if unc_dim is None else unc_dim
        for name, size in [
            ("num_classes", num_classes),
            ("sem_dim", sem_dim),
            ("unc_dim", unc_dim),
        ]:
            _checks.integer(name, size, ">= 1", lambda size: size >= 1)
        _checks.one_of("proxy_unc", proxy_unc, ("zero", "learned"))
        self.metric = Metric.paper("cosine") if metric is None else metric
        _checks.proxy_anchor(self.metric, margin, alpha)
        self.margin = margin
        self.alpha = alpha
        self.normalize_proxies = normalize_proxies
        self.proxies = nn.Parameter(torch.empty(num_classes, sem_dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")
        self.proxies_unc = None
        if proxy_unc == "learned":
            self.proxies_unc = nn.Parameter(torch.empty(num_classes, unc_dim))
            nn.init.normal_(self.proxies_unc, std=unc_dim**-0.5)

    def forward(
        self,
        sem: Tensor,  # [N, Ds]
        unc: Tensor | None,  # [N, Du]
        labels: Tensor,  # [N]
    ) -> Tensor:  # []
        """The loss of a batch; 0 with zero gradients for an empty one."""
        proxies = F.normalize(self.proxies) if self.normalize_proxies else self.proxies
        return proxy_anchor_loss(
            sem,
            unc,
            labels,
            proxies,
            self.proxies_unc,
            metric=self.metric,
            margin=self.margin,
            alpha=self.alpha,
        )

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        classes, sem_dim = self.proxies.shape
        return f"{classes}, {sem_dim}, {self.metric}, margin={self.margin}, alpha={self.alpha}"
