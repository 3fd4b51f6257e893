"""Losses that pull positive pairs and push negative ones, each by its own measure."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..metric import FORMS, Metric
from ..stats import HingeCount, HingeSum, LogSumExp, Max, Min
from ._loss import Loss, Pairs, loss_function, softplus


@loss_function
def contrastive_loss(
    pairs: Pairs,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    metric: Metric = Metric.paper(),
) -> Tensor:  # []
    """The contrastive loss, see `ContrastiveLoss`."""
    _checks.metric_of("the contrastive loss", metric, *FORMS)
    _checks.finite("pos_margin", pos_margin)
    _checks.finite("neg_margin", neg_margin)
    pull = {"where": "same", "scale": metric.sign, "threshold": pos_margin}
    push = {"where": "different", "scale": -metric.sign, "threshold": neg_margin}
    found = pairs.rowstats(
        metric,
        {
            "pull": HingeSum(**pull),
            "pulled": HingeCount(**pull),
            "push": HingeSum(**push),
            "pushed": HingeCount(**push),
        },
    )
    pull = found["pull"].sum() / found["pulled"].sum().clamp_min(1)
    return pull + found["push"].sum() / found["pushed"].sum().clamp_min(1)


class ContrastiveLoss(Loss, function=contrastive_loss):
    """The contrastive loss on introspective distances.

    With ``x[i, j]`` the score, over positive pairs (i, p) and negative pairs (i, n)::

        pull = sum max(0, x[i, p] - pos_margin) / #(terms that are not 0)
        push = sum max(0, neg_margin - x[i, n]) / #(terms that are not 0)
        loss = pull + push

    For a metric of a cosine form both differences are turned around; the margins that suit it are
    ``pos_margin=1, neg_margin=0``.

    Args:
        pos_margin: positive pairs closer than this are left alone.
        neg_margin: negative pairs farther than this are left alone.
        metric: of any form.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Hadsell et al., *Dimensionality Reduction by Learning an Invariant Mapping*, CVPR 2006,
    averaged as in pytorch-metric-learning.

    >>> loss = ContrastiveLoss(neg_margin=0.5)
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """


@loss_function
def multi_similarity_loss(
    pairs: Pairs,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = None,
    metric: Metric = Metric.paper("cosine"),
) -> Tensor:  # []
    """The Multi-Similarity loss, see `MultiSimilarityLoss`."""
    _checks.metric_of("the Multi-Similarity loss", metric, *FORMS)
    _checks.positive("alpha", alpha)
    _checks.positive("beta", beta)
    _checks.finite("base", base)
    sign = metric.sign
    pulled, pushed = {}, {}  # the windows of the scores that count
    if epsilon is not None:
        _checks.finite("epsilon", epsilon, "a number or None")
        closest, farthest = (Min, Max) if sign > 0 else (Max, Min)
        hardest = {"positive": farthest(where="same"), "negative": closest(where="different")}
        with torch.no_grad():
            found = pairs.rowstats(metric, hardest)
        beyond, within = ("above", "below") if sign > 0 else ("below", "above")
        pulled = {beyond: found["negative"].values - sign * epsilon}
        pushed = {within: found["positive"].values + sign * epsilon}
    stats = {
        "pull": LogSumExp(where="same", scale=sign * alpha, shift=base, **pulled),
        "push": LogSumExp(where="different", scale=-sign * beta, shift=base, **pushed),
    }
    found = pairs.rowstats(metric, stats)
    pull, push = softplus(found["pull"]), softplus(found["push"])  # log(1 + sum exp)
    return (pull / alpha + push / beta).sum() / max(1, len(pairs.sem))


class MultiSimilarityLoss(Loss, function=multi_similarity_loss):
    """The Multi-Similarity loss on introspective cosines.

    With ``x[i, j]`` the score, over the positives p and negatives n of each row::

        pull_i = log(1 + sum_p exp(-alpha (x[i, p] - base))) / alpha
        push_i = log(1 + sum_n exp(beta (x[i, n] - base))) / beta
        loss = mean_i (pull_i + push_i)

    Args:
        alpha, beta: weights of the exponents, > 0.
        base: offset of the scores.
        epsilon: mines the pairs first: a negative counts if it is closer than the row's hardest
            positive, by ``x[i, n] > min_p x[i, p] - epsilon``, a positive if
            ``x[i, p] < max_n x[i, n] + epsilon``. None: every pair counts.
        metric: of any form; for distances all exponents and comparisons are turned around.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Wang et al., *Multi-Similarity Loss with General Pair Weighting for Deep Metric
    Learning*, CVPR 2019.

    >>> loss = MultiSimilarityLoss(epsilon=0.1)
    >>> loss(torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """
