"""Losses that compare an anchor's positives with its negatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..metric import FORMS, Metric
from ..nearest import DistanceWeighted, nearest
from ..stats import Count, HingeCount, HingeSum, Max, Min
from ._loss import Loss, Pairs, loss_function
from ._positive import listed, positive_columns

MINING = ("all", "hard", "semihard", "semihard_all")
SAMPLING = ("all", "distance_weighted")


@loss_function
def triplet_margin_loss(
    pairs: Pairs,
    *,
    margin: float = 0.05,
    mining: str = "all",
    metric: Metric = Metric.paper(),
) -> Tensor:  # []
    """The triplet loss, see `TripletMarginLoss`."""
    _checks.metric_of("the triplet loss", metric, *FORMS)
    _checks.finite("margin", margin)
    _checks.one_of("mining", mining, MINING)
    pairs = pairs.checked(metric)
    sign = metric.sign
    closest, farthest, beyond = (Min, Max, "above") if sign > 0 else (Max, Min, "below")

    if mining == "hard":
        hardest = {"positive": farthest(where="same"), "negative": closest(where="different")}
        found = pairs.rowstats(metric, hardest)
        # Minus infinity where a row has no positive or no negative: no term.
        return _mean(sign * (found["positive"].values - found["negative"].values) + margin)

    table = positive_columns(pairs.labels, pairs.labels2)
    scores = pairs.paired(metric, listed(table))
    if not table.shape[1]:
        return scores.sum()  # nothing to compare: 0, with its gradients
    nowhere = scores.new_full(table.shape, -sign * math.inf)  # gives no term
    scores = nowhere.masked_scatter(table >= 0, scores)  # [N, K]

    # A statistic for every positive that a row may have: all come from one walk over the pairs.
    stats = {}
    for k, x in enumerate(scores.unbind(1)):
        if mining == "semihard":
            stats["closest", k] = closest(where="different", **{beyond: x})
            continue
        hinge = {"where": "different", "scale": -sign, "threshold": x + sign * margin}
        window = {beyond: x} if mining == "semihard_all" else {}
        stats["sum", k] = HingeSum(**hinge, **window)
        stats["count", k] = HingeCount(**hinge, **window)
    found = pairs.rowstats(metric, stats)
    if mining == "semihard":
        negatives = torch.stack([found["closest", k].values for k in range(table.shape[1])], 1)
        return _mean(sign * (scores - negatives) + margin)
    total, count = (
        torch.stack([found[name, k] for k in range(table.shape[1])]).sum()
        for name in ("sum", "count")
    )
    return total / count.clamp_min(1)


class TripletMarginLoss(Loss, function=triplet_margin_loss):
    """The triplet loss on introspective distances.

    With ``x[i, j]`` the score, over triplets of an anchor i, a positive p and a negative n::

        loss = sum max(0, x[i, p] - x[i, n] + margin) / #(terms that are not 0)

    No triplet is listed and nothing of N x M is allocated: the memory is that of the positive
    pairs, and the walk over all pairs is taken once.

    Args:
        margin: by how much a negative has to be farther than a positive.
        mining: the triplets. ``"all"``; ``"hard"``: each row's farthest positive and closest
            negative; ``"semihard"``: each positive pair with the closest negative that is farther
            than the positive; ``"semihard_all"``: with every negative that is farther (those beyond
            the margin are 0 anyway).
        metric: of any form; for a similarity the difference is turned around.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Schroff et al., *FaceNet: A Unified Embedding for Face Recognition and Clustering*, CVPR
    2015; ``"hard"``: Hermans et al., *In Defense of the Triplet Loss for Person Re-Identification*,
    arXiv 1703.07737. Averaged as in pytorch-metric-learning.

    >>> loss = TripletMarginLoss(margin=0.2, mining="semihard")
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """


@loss_function
def margin_loss(
    pairs: Pairs,
    *,
    margin: float = 0.2,
    beta: float | Tensor = 1.2,  # or [1] or [C]
    sampling: str = "all",
    metric: Metric = Metric.paper(),
) -> Tensor:  # []
    """The margin loss, see `MarginLoss`; a ``beta`` of more than one element is one per class."""
    _checks.metric_of("the margin loss", metric, *FORMS)
    _checks.finite("margin", margin)
    _checks.one_of("sampling", sampling, SAMPLING)
    pairs = pairs.checked(metric)
    sem, _, labels, sem2, _, labels2 = pairs
    _checks.boundary("beta", beta, labels)
    if isinstance(beta, Tensor):  # [N]
        beta = beta[labels.long()] if beta.numel() > 1 else beta.reshape(1).expand(len(labels))
    sign = metric.sign
    pull = {"where": "same", "scale": sign, "threshold": beta - sign * margin}
    push = {"where": "different", "scale": -sign, "threshold": beta + sign * margin}
    stats = {
        "pull": HingeSum(**pull),
        "pulled": HingeCount(**pull),
        "positives": Count(where="same"),
    }
    if sampling == "all":  # each term of a positive occurs once with every negative, and vice versa
        stats |= {
            "push": HingeSum(**push),
            "pushed": HingeCount(**push),
            "negatives": Count(where="different"),
        }
    found = pairs.rowstats(metric, stats)
    positives = found["positives"]
    if sampling == "all":
        negatives = found["negatives"]
        total = (negatives * found["pull"] + positives * found["push"]).sum()
        count = (negatives * found["pulled"] + positives * found["pushed"]).sum()
        return total / count.clamp_min(1)

    most = int(positives.max()) if len(positives) else 0
    if not most:
        return found["pull"].sum()  # nothing to compare: 0, with its gradients
    with torch.no_grad():  # the distances that are evenly spread are the semantic ones
        _, drawn = nearest(
            sem,
            None,
            sem2,
            k=most,
            metric=Metric.plain(),
            labels=labels,
            labels2=labels2,
            where="different",
            sample=DistanceWeighted(),
        )
    drawn = drawn.masked_fill(torch.arange(most, device=drawn.device) >= positives[:, None], -1)
    rows, cols = listed(drawn)
    scores = pairs.paired(metric, (rows, cols))
    at = push["threshold"][rows] if isinstance(beta, Tensor) else push["threshold"]
    terms = (sign * (at - scores)).relu()
    anchors = (drawn >= 0).any(1)
    total = torch.where(anchors, found["pull"], 0).sum() + terms.sum()
    return total / ((found["pulled"] * anchors).sum() + (terms > 0).sum()).clamp_min(1)


class MarginLoss(Loss, function=margin_loss):
    """The margin loss on introspective distances, with its learned boundary ``beta``.

    With ``x[i, j]`` the score, over triplets of an anchor i, a positive p and a negative n::

        loss = sum (max(0, margin + x[i, p] - beta) + max(0, margin + beta - x[i, n]))
               / #(terms that are not 0)

    Args:
        margin: half of the distance between positives and negatives.
        beta: the boundary between them, or where it starts from.
        learn_beta: whether it learns; give it to your optimizer.
        num_classes: C, for a boundary of its own for each class of the anchor; None: one for all.
        sampling: ``"all"`` triplets, or ``"distance_weighted"``: each positive pair with a negative
            that is drawn by its semantic distance, see `idml_fast.DistanceWeighted`, where the
            anchor has one within reach. ``torch.manual_seed`` fixes the draws; ``sem`` should have
            length 1.
        metric: of any form; for a similarity the differences are turned around.

    Attributes:
        beta: parameter ``[1]`` or ``[C]`` if it learns, else the number.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Wu et al., *Sampling Matters in Deep Embedding Learning*, ICCV 2017, averaged as in
    pytorch-metric-learning.

    >>> loss = MarginLoss(learn_beta=True, num_classes=3, sampling="distance_weighted")
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        beta: float = 1.2,
        learn_beta: bool = False,
        num_classes: int | None = None,
        **settings: Any,
    ) -> None:
        _checks.finite("beta", beta)
        if num_classes is not None:
            _checks.integer("num_classes", num_classes, ">= 1", lambda classes: classes >= 1)
        super().__init__(beta=beta, **settings)
        if learn_beta:
            classes = 1 if num_classes is None else num_classes
            self.beta = nn.Parameter(torch.full((classes,), float(beta)))


def _mean(terms: Tensor) -> Tensor:
    """The mean of those that are positive; 0 if none is."""
    return terms.relu().sum() / (terms > 0).sum().clamp_min(1)
