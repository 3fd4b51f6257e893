"""Whether the uncertainty means something: does it know which answers are wrong?

An *uncertainty* is a number for each item, larger for a less certain one; to the measures of items
only its order counts. Every measure, those of pairs too, takes ``weights``, how often each item
counts; with a column for each of B samples it gives B numbers, so that `bootstrap` need not ask B
times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..metric import Metric
from ..nearest import nearest
from ._weighted import auroc, check, check_numbers, check_sides, sums, weights_of

# Variation and response of a live uncertainty, see `alive_or_dead`.
VARIES, RESPONDS = 0.01, 0.1


def error_auroc(
    uncertainty: Tensor,  # [N]
    wrong: Tensor,  # [N] bool
    weights: Tensor | None = None,  # [N] or [N, B]
) -> Tensor:  # [] or [B]
    """R-AUROC: how well the uncertainty ranks wrong answers above right ones.

    Equals ``P(u_w > u_r) + P(u_w = u_r) / 2`` for a wrong answer w and a right one r, drawn at
    random: 1 for a perfect ranking, 0.5 for one that knows nothing. Where no answer is wrong, or
    none right, there is nothing to rank and it is NaN.

    It says nothing of how many are wrong: embeddings that collapse make easy mistakes, which are
    easy to foresee. Read it beside Recall@1.

    Args:
        uncertainty: ``[N]``, larger for a less certain item.
        wrong: ``[N]`` bool, such as whether the nearest neighbour is of another class.
        weights: ``[N]`` or ``[N, B]`` float64, how often each item counts; absent: once.

    Raises:
        TypeError, ValueError: ``wrong`` is not bool, or an argument does not match the others.

    Source: Kirchhof et al., *URL: A Representation Learning Benchmark for Transferable Uncertainty
    Estimates*, NeurIPS 2023.

    >>> error_auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, True])).item()
    1.0
    """
    check("uncertainty", uncertainty, "wrong", wrong)
    return auroc(uncertainty, wrong, weights_of(weights, uncertainty))


def risk_coverage(
    uncertainty: Tensor,  # [N]
    wrong: Tensor,  # [N] bool
) -> tuple[Tensor, Tensor]:  # [N], [N]
    """The risk-coverage curve: the error rate of the most certain answers, by their share.

    ``coverage[j] = (j + 1) / N``, and ``risk[j]`` is the share of wrong answers among the ``j + 1``
    most certain. Items of equal uncertainty may come in any order: the risk is its mean over these
    orders, so that none of them matters.

    Arguments and errors are those of `error_auroc`.

    Source: Geifman and El-Yaniv, *Selective Classification for Deep Neural Networks*, NeurIPS 2017.

    >>> risk_coverage(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([False, True, False]))[1]
    tensor([0.0000, 0.2500, 0.3333], dtype=torch.float64)
    """
    check("uncertainty", uncertainty, "wrong", wrong)
    _, place, answers = uncertainty.unique(return_inverse=True, return_counts=True)
    rate = sums(place, wrong.double(), len(answers)) / answers
    answered = torch.arange(1, len(wrong) + 1, dtype=torch.float64, device=rate.device)
    return answered / len(wrong), rate.repeat_interleave(answers).cumsum(0) / answered


def aurc(
    uncertainty: Tensor,  # [N]
    wrong: Tensor,  # [N] bool
    weights: Tensor | None = None,  # [N] or [N, B]
) -> Tensor:  # [] or [B]
    """The area under the risk-coverage curve: ``risk.mean()`` of `risk_coverage`, in [0, 1].

    Smaller is better; an uncertainty that knows nothing has the error rate itself. An item that
    counts several times is as many items of equal uncertainty.

    Arguments and errors are those of `error_auroc`.

    Source: Geifman, Uziel and El-Yaniv, *Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers*, ICLR 2019.

    >>> aurc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, False, True])).item()
    0.111...
    """
    check("uncertainty", uncertainty, "wrong", wrong)
    weights = weights_of(weights, uncertainty)
    groups, place = uncertainty.unique(return_inverse=True)
    answers = sums(place, weights, len(groups))
    errors = sums(place[wrong], weights[wrong], len(groups))
    # A group of n equal items with e errors, after n0 items with e0, adds the risks
    #   sum_{t=1..n} (e0 + t e/n) / (n0 + t) = e + (e0 - n0 e/n) sum_{t=1..n} 1 / (n0 + t).
    before, errors_before = answers.cumsum(0) - answers, errors.cumsum(0) - errors
    reciprocals = torch.digamma(before + answers + 1) - torch.digamma(before + 1)
    rate = errors / answers.clamp_min(1)  # whole numbers: a group of none has no errors
    risks = errors + (errors_before - before * rate) * reciprocals
    return risks.sum(dim=0) / answers.sum(dim=0)


def ood_auroc(
    inside: Tensor,  # [N]
    outside: Tensor,  # [M]
    weights: Tensor | None = None,  # [N + M] or [N + M, B]
) -> Tensor:  # [] or [B]
    """How well the uncertainty ranks images from elsewhere above the data set's own: the AUROC.

    Args:
        inside: ``[N]``, uncertainties of the data set's own images.
        outside: ``[M]``, those of others, such as `shuffled` ones.
        weights: as for `error_auroc`; the own images come first.

    Raises:
        TypeError, ValueError: an argument does not match the others.

    >>> ood_auroc(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 3.0])).item()
    0.75
    """
    both = torch.cat([inside, outside])
    foreign = torch.arange(len(both), device=both.device) >= len(inside)
    check("inside and outside", both, "foreign", foreign)
    return auroc(both, foreign, weights_of(weights, both))


def severity_correlation(
    norms: Tensor,  # [S, N]
    weights: Tensor | None = None,  # [N] or [N, B]
) -> Tensor:  # [] or [B]
    """Spearman's rank correlation of an uncertainty with the severity, over all images and
    severities.

    Args:
        norms: ``[S, N]``, such as ``||u||``, with severity ``s`` in row ``s``.
        weights: as for `error_auroc`; an image counts with all of its severities.

    Returns:
        In [-1, 1]; NaN where the uncertainty is the same everywhere, so that there are no ranks.

    Raises:
        ValueError: ``norms`` is not a matrix of at least two rows, or has NaN.

    >>> severity_correlation(torch.tensor([[1.0], [2.0], [40.0]])).item()
    1.0
    """
    if norms.dim() != 2 or len(norms) < 2:
        raise ValueError(f"norms must have shape [S, N] with S >= 2, got {list(norms.shape)}")
    check_numbers("norms", norms)
    weights = weights_of(weights, norms[0])
    severity = torch.arange(len(norms), dtype=torch.float64, device=norms.device)
    severity -= severity.mean()
    groups, place = norms.flatten().unique(return_inverse=True)
    counts = sums(place, torch.cat([weights] * len(norms)), len(groups))
    severities = sums(place, torch.cat([s * weights for s in severity]), len(groups))
    # Every severity counts the same images, so that its rank is linear in it.
    total = counts.sum(dim=0)
    rank = counts.cumsum(0) - counts / 2 - total / 2  # equal items share their mean; centred
    variances = (counts * rank**2).sum(dim=0) * total * (severity**2).mean()
    return (rank * severities).sum(dim=0) / variances.sqrt()


@dataclass(frozen=True)
class Verdict:
    """Whether an uncertainty is alive, and the numbers behind it.

    Args:
        alive: it varies and, where damaged images are known, responds.
        variation: standard deviation over mean of ``||u||`` on clean images; 0 if all are 0.
        response: of Spearman's correlations with the severity of a corruption, the largest in
            magnitude, with its sign; None without damaged images.
        corruption: whose that is.
    """

    alive: bool
    variation: float
    response: float | None = None
    corruption: str | None = None


def alive_or_dead(
    norms: Tensor,  # [N]
    corrupted: Mapping[str, Tensor] | None = None,  # [S, N] each
) -> Verdict:
    """Whether ``||u||`` tells images apart at all.

    Alive is what varies by at least 1 % of its mean over clean images, and goes with the severity
    of some corruption, upwards or downwards, with a rank correlation of at least 0.1. Rounding
    makes no difference that large: that of bfloat16, the coarsest dtype, is at most 2^-9 = 0.2 % of
    ``||u||``, and an L2-normalised ``u``, as in the authors' released network, varies by less. A
    correlation of 0.1 stands for 1 % of the variance of the ranks too; by chance alone it comes
    out within ``3 / sqrt(S N)`` of 0, 0.04 for 6 severities of 900 images.

    To be alive is necessary, not sufficient: a head of random weights is. Whether it knows anything
    is for the other measures.

    Args:
        norms: ``[N]``, ``||u||`` of clean images.
        corrupted: by corruption, ``[S, N]`` as for `severity_correlation`; absent: only the
            variation counts.

    >>> alive_or_dead(torch.tensor([0.8, 1.2])).alive, alive_or_dead(torch.ones(9)).alive
    (True, False)
    """
    check_numbers("norms", norms)
    middle = norms.double().mean().item()
    variation = norms.double().std(correction=0).item() / middle if middle else 0.0
    if not corrupted:
        return Verdict(variation >= VARIES, variation)
    found = {kind: severity_correlation(values).item() for kind, values in corrupted.items()}
    found = {kind: 0.0 if np.isnan(value) else value for kind, value in found.items()}
    kind = max(found, key=lambda kind: abs(found[kind]))
    alive = variation >= VARIES and abs(found[kind]) >= RESPONDS
    return Verdict(alive, variation, found[kind], kind)


def wrong_answers(
    sem: Tensor,  # [N, Ds]
    labels: Tensor,  # [N]
    sem2: Tensor | None = None,  # [M, Ds]
    labels2: Tensor | None = None,  # [M]
) -> tuple[Tensor, Tensor]:  # [N] bool, [N] bool
    """Whether each query's nearest item is of another class; and whether any is of its class.

    A query whose class has no other item cannot be answered rightly: leave it out.

    Raises:
        TypeError, ValueError: labels do not match their embeddings, or there is no other item.
    """
    check_sides(sem, labels, sem2, labels2)
    itself = sem2 is None
    gallery = labels if itself else labels2
    _, found = nearest(sem, None, sem2, k=1, metric=Metric.plain(), exclude_self=itself)
    return gallery[found[:, 0]] != labels, has_match(labels, labels2)


def has_match(
    labels: Tensor,  # [N]
    labels2: Tensor | None = None,  # [M]
) -> Tensor:  # [N] bool
    """Whether each query has another item of its class, among the queries or in the gallery."""
    if labels2 is not None:
        return torch.isin(labels, labels2)
    _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
    return sizes[classes] > 1


def image_uncertainty(
    unc: Tensor,  # [N, Du] or [N]
) -> Tensor:  # [N]
    """``||u||`` of every image; an uncertainty that is a number is taken as it is."""
    return unc if unc.dim() == 1 else unc.norm(dim=1)
