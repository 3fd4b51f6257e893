"""Losses that tell a row's positives from its other columns by a softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from ..metric import FORMS, Metric
from ..stats import Count, LogSumExp, Sum
from ._loss import Loss, Pairs, loss_function, softplus
from ._positive import listed, positive_columns


@loss_function
def nca_loss(
    pairs: Pairs,
    *,
    softmax_scale: float = 1.0,
    power: float = 1.0,
    metric: Metric = Metric.paper(),
) -> Tensor:  # []
    """Neighbourhood component analysis, see `NCALoss`."""
    _checks.metric_of("NCA", metric, *FORMS)
    _checks.positive("softmax_scale", softmax_scale)
    closeness = {"scale": -metric.sign * softmax_scale, "power": power}
    found = pairs.rowstats(
        metric,
        {
            "own": LogSumExp(where="same", **closeness),
            "every": LogSumExp(where="any", **closeness),
        },
    )
    valid = found["own"] != -math.inf  # rows with a positive, or with a NaN
    terms = torch.where(valid, found["every"] - found["own"], 0)
    return terms.sum() / valid.sum().clamp_min(1)


class NCALoss(Loss, function=nca_loss):
    """Neighbourhood component analysis on introspective distances.

    With ``x[i, j]`` the score, over the positives p and all columns j of each row that has one::

        loss = mean_i -log(sum_p exp(-softmax_scale x[i, p] ** power)
                           / sum_j exp(-softmax_scale x[i, j] ** power))

    Args:
        softmax_scale: sharpness of the softmax, > 0.
        power: of the score, > 0; 2 is pytorch-metric-learning's default, the squared distance.
        metric: of any form; a similarity is not negated.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Goldberger et al., *Neighbourhood Components Analysis*, NIPS 2004.

    >>> loss = NCALoss(softmax_scale=3.0)
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """


@loss_function
def supcon_loss(
    pairs: Pairs,
    *,
    temperature: float = 0.1,
    metric: Metric = Metric.paper("cosine"),
) -> Tensor:  # []
    """The supervised contrastive loss, see `SupConLoss`."""
    _checks.metric_of("the supervised contrastive loss", metric, *FORMS)
    _checks.positive("temperature", temperature)
    scale = -metric.sign / temperature
    found = pairs.rowstats(
        metric,
        {
            "every": LogSumExp(where="any", scale=scale),
            "positive": Sum(where="same"),
            "positives": Count(where="same"),
            "negatives": Count(where="different"),
        },
    )
    mean = found["positive"] / found["positives"].clamp_min(1)
    valid = (found["positives"] > 0) & (found["negatives"].sum() > 0)
    terms = torch.where(valid, found["every"] - scale * mean, 0)
    return terms.sum() / valid.sum().clamp_min(1)


class SupConLoss(Loss, function=supcon_loss):
    """The supervised contrastive loss on introspective cosines.

    With ``x[i, j]`` the score, over the positives p and all columns j of each row that has one::

        loss = mean_i mean_p -log(exp(x[i, p] / temperature) / sum_j exp(x[i, j] / temperature))

    Args:
        temperature: of the softmax, > 0.
        metric: of any form; a distance is negated.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020. As in
    pytorch-metric-learning, a batch without a negative pair has loss 0.

    >>> loss = SupConLoss(temperature=0.2)
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """


@loss_function
def ntxent_loss(
    pairs: Pairs,
    *,
    temperature: float = 0.07,
    metric: Metric = Metric.paper("cosine"),
) -> Tensor:  # []
    """The normalised, temperature-scaled cross-entropy, see `NTXentLoss`."""
    _checks.metric_of("NT-Xent", metric, *FORMS)
    _checks.positive("temperature", temperature)
    scale = -metric.sign / temperature
    stats = {"push": LogSumExp(where="different", scale=scale)}
    push = pairs.rowstats(metric, stats)["push"]
    table = positive_columns(pairs.labels, pairs.labels2)
    rows, cols = listed(table)
    pull = scale * pairs.paired(metric, (rows, cols))
    terms = softplus(push[rows] - pull)  # -log(e^pull / (e^pull + e^push))
    return terms.sum() / (table >= 0).sum().clamp_min(1)


class NTXentLoss(Loss, function=ntxent_loss):
    """The normalised, temperature-scaled cross-entropy (InfoNCE) on introspective cosines.

    With ``x[i, j]`` the score, over all positive pairs (i, p), with the negatives n of row i::

        loss = mean_(i, p) -log(exp(x[i, p] / temperature)
                   / (exp(x[i, p] / temperature) + sum_n exp(x[i, n] / temperature)))

    Replaces, in pytorch-metric-learning, a matrix of positive pairs x negative pairs; here memory
    grows with the number of positive pairs alone.

    Args:
        temperature: of the softmax, > 0.
        metric: of any form; a distance is negated.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*,
    ICML 2020.

    >>> loss = NTXentLoss(temperature=0.1)
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """


@loss_function
def npairs_loss(
    pairs: Pairs,
    *,
    metric: Metric = Metric.paper("cosine"),
) -> Tensor:  # []
    """The N-pair loss, see `NPairsLoss`."""
    _checks.metric_of("the N-pair loss", metric, *FORMS)
    sem, unc, labels, sem2, unc2, labels2 = pairs.checked(metric)
    first = positive_columns(labels, labels2)[:, :1].flatten()  # none at all if no row has one
    in_order, order = labels.long().sort(stable=True)
    anchors = order[in_order.diff(prepend=in_order[:1] - 1) != 0]
    anchors = anchors[first[anchors] >= 0] if len(first) else anchors[:0]
    columns = first[anchors]
    other, other_unc = (sem, unc) if sem2 is None else (sem2, unc2)
    classes = torch.arange(len(anchors), device=labels.device)
    rows = sem[anchors], _rows(unc, anchors), classes
    return nca_loss(*rows, other[columns], _rows(other_unc, columns), classes, metric=metric)


class NPairsLoss(Loss, function=npairs_loss):
    """The N-pair loss on introspective cosines.

    Of each label that has a positive pair, the first row is the anchor ``a`` and its first positive
    the column ``p``. With ``x[a, p]`` the score, over those pairs alone::

        loss = mean_a -log(exp(x[a, p_a]) / sum_b exp(x[a, p_b]))

    Args:
        metric: of any form; a distance is negated.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Sohn, *Improved Deep Metric Learning with Multi-class N-pair Loss Objective*, NIPS 2016;
    the pairs are those that pytorch-metric-learning takes.

    >>> loss = NPairsLoss()
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """


def _rows(unc: Tensor | str | None, rows: Tensor) -> Tensor | str | None:
    """These rows of the uncertainties; of ``"zero"`` and of none there is nothing to take."""
    return unc[rows] if isinstance(unc, Tensor) else unc
