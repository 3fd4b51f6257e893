"""The loss of a run: chosen by name, with its options and its memory bank."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import losses
from ..losses.proxies import ProxyLoss
from ..memory import MemoryBank
from ..metric import Metric

if TYPE_CHECKING:
    from .config import LossConfig

LOSSES = {
    "proxy_anchor": losses.ProxyAnchorLoss,
    "proxy_nca": losses.ProxyNCALoss,
    "multi_similarity": losses.MultiSimilarityLoss,
    "contrastive": losses.ContrastiveLoss,
    "triplet_margin": losses.TripletMarginLoss,
    "margin": losses.MarginLoss,
    "fast_ap": losses.FastAPLoss,
    "npairs": losses.NPairsLoss,
    "nca": losses.NCALoss,
    "ntxent": losses.NTXentLoss,
    "supcon": losses.SupConLoss,
    "softmax": losses.IntrospectiveSoftmax,
}
TASKS = {
    "retrieval": tuple(name for name in LOSSES if name != "softmax"),
    "classification": ("softmax",),
}


class SettingsError(ValueError):
    """A setting or an argument does not fit; the message says which, and what would."""


def own_form(name: str) -> str:
    """The form of the metric that this loss was defined with."""
    return inspect.signature(LOSSES[name]).parameters["metric"].default.form


class Criterion(nn.Module):
    """A loss and the memory bank of earlier batches, if it has one.

    What either holds (proxies, a learned boundary, remembered items) is part of ``state_dict()``.

    Args:
        config: which loss, its options, the size of its bank.
        metric: it compares by.
        num_classes: C, the number of classes that are learned.
        sem_dim: Ds, the width of the semantic embedding.
        unc_dim: Du, the width of the uncertainty embedding.

    Raises:
        SettingsError: an option is not one of the loss.
        TypeError, ValueError: an option does not suit the loss.
    """

    def __init__(
        self, config: LossConfig, metric: Metric, num_classes: int, sem_dim: int, unc_dim: int
    ) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        loss, options = LOSSES[config.name], dict(config.options)
        sizes: dict[str, Any] = {}
        if issubclass(loss, ProxyLoss):
            sizes = {"num_classes": num_classes, "sem_dim": sem_dim, "unc_dim": unc_dim}
        wanted = inspect.signature(loss).parameters.keys() - sizes.keys() - {"metric"}
        unknown = sorted(options.keys() - wanted)
        if unknown:
            known = f"one of {', '.join(sorted(wanted))}" if wanted else "none at all"
            raise SettingsError(f"loss.options of {config.name} must be {known}, got {unknown[0]}")
        classes = options.get("num_classes")
        if classes not in (None, num_classes):  # found out by a label otherwise, in training
            raise SettingsError(
                f"loss.options.num_classes must be null or {num_classes}, the number of classes "
                f"that are learned, got {classes}"
            )
        if "proxy_unc" in options and not metric.reads_unc:
            options["proxy_unc"] = "zero"  # nothing would teach the others
        try:
            self.loss = loss(**sizes, **options, metric=metric)
        except (TypeError, ValueError) as error:
            raise type(error)(f"loss {config.name}: {error}") from None
        self.bank = MemoryBank(config.memory, sem_dim, unc_dim) if config.memory else None

    def forward(
        self,
        sem: Tensor,  # [N, Ds]
        unc: Tensor,  # [N, Du]
        labels: Tensor,  # [N]
    ) -> Tensor:  # []
        """The loss of the batch, plus its loss against the items of the bank once there are any."""
        value = self.loss(sem, unc, labels)
        if self.bank is not None and len(self.bank):
            value = value + self.loss(sem, unc, labels, *self.bank.columns)
        return value

    @torch.no_grad()
    def predict(
        self,
        sem: Tensor,  # [N, Ds]
    ) -> Tensor:  # [N]
        """The class of each item by the plain logits of a classification head, on its device."""
        head = self.loss.eval()
        classes = head.logits(sem.to(head.proxies)).argmax(dim=1)
        head.train()
        return classes.to(sem.device)
