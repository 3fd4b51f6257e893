"""Whether the uncertainty means something: does it know which answers are wrong?

An *uncertainty* is a number for each item, larger for a less certain one; to the measures of items
only its order counts. Every measure takes ``weights``, how often each item counts; with a column
for each of B samples it gives B numbers, so that `bootstrap` need not ask B times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .. import _checks
from ..metric import Metric
from ..nearest import nearest
from ..paired import paired

BINS = 15  # of a reliability diagram
# Variation and response of a live uncertainty, see `alive_or_dead`.
VARIES, RESPONDS = 0.01, 0.1
# How many weights `bootstrap` draws at once: what measures make of them then stays in the cache.
# But at least a few samples, since each call sorts the items anew.
AT_ONCE, SAMPLES_AT_ONCE = 2**15, 16
PAIRS_AT_ONCE = 2**16


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
    _check("uncertainty", uncertainty, "wrong", wrong)
    return _auroc(uncertainty, wrong, _weights(weights, uncertainty))


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
    _check("uncertainty", uncertainty, "wrong", wrong)
    _, place, answers = uncertainty.unique(return_inverse=True, return_counts=True)
    rate = _sums(place, wrong.double(), len(answers)) / answers
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
    _check("uncertainty", uncertainty, "wrong", wrong)
    weights = _weights(weights, uncertainty)
    groups, place = uncertainty.unique(return_inverse=True)
    answers = _sums(place, weights, len(groups))
    errors = _sums(place[wrong], weights[wrong], len(groups))
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
    _check("inside and outside", both, "foreign", foreign)
    return _auroc(both, foreign, _weights(weights, both))


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
    _check_numbers("norms", norms)
    weights = _weights(weights, norms[0])
    severity = torch.arange(len(norms), dtype=torch.float64, device=norms.device)
    severity -= severity.mean()
    groups, place = norms.flatten().unique(return_inverse=True)
    counts = _sums(place, torch.cat([weights] * len(norms)), len(groups))
    severities = _sums(place, torch.cat([s * weights for s in severity]), len(groups))
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
    _check_numbers("norms", norms)
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
    _check_sides(sem, labels, sem2, labels2)
    itself = sem2 is None
    gallery = labels if itself else labels2
    _, found = nearest(sem, None, sem2, k=1, metric=Metric.plain(), exclude_self=itself)
    if not itself:
        return gallery[found[:, 0]] != labels, torch.isin(labels, gallery)
    _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
    return gallery[found[:, 0]] != labels, sizes[classes] > 1


class Pairs(NamedTuple):
    """Pairs of a query and another item."""

    rows: Tensor  # [P], of the queries
    columns: Tensor  # [P], of the others
    distance: Tensor  # [P], semantic
    match: Tensor  # [P] bool: of the same class


def sampled_pairs(
    sem: Tensor,  # [N, Ds]
    labels: Tensor,  # [N]
    sem2: Tensor | None = None,  # [M, Ds]
    labels2: Tensor | None = None,  # [M]
    *,
    k: int = 5,
    seed: int = 0,
) -> Pairs:
    """Every query with its ``k`` nearest neighbours and with ``k`` others drawn at random.

    The nearest are the pairs that are hard to tell, and those that retrieval asks about; the
    others keep the easy ones from being forgotten. (A random one may happen to be a near one.)

    Args:
        sem: ``[N, Ds]`` float, the semantic embeddings of the queries.
        labels: ``[N]`` integer.
        sem2, labels2: the gallery; absent: the queries among themselves, none with itself.
        k: at least 1; less where there are fewer others.
        seed: of the draws.

    Raises:
        TypeError, ValueError: labels do not match their embeddings, or there is no other item.
    """
    _check_sides(sem, labels, sem2, labels2)
    _checks.integer("k", k, ">= 1", lambda k: k >= 1)
    itself = sem2 is None
    sem2, labels2 = (sem, labels) if itself else (sem2, labels2)
    others = len(sem2) - int(itself)
    k = min(k, others)
    _, near = nearest(
        sem, None, None if itself else sem2, k=k, metric=Metric.plain(), exclude_self=itself
    )
    rows = torch.arange(len(sem), device=sem.device)[:, None].expand(-1, k)
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(others, (len(sem), k), generator=draw).to(sem.device)
    if itself:
        drawn += drawn >= rows  # all but the row itself
    rows, columns = rows.repeat(1, 2).flatten(), torch.cat([near, drawn], dim=1).flatten()
    distance = paired(sem, None, sem2, None, index=(rows, columns), metric=Metric.plain())
    return Pairs(rows, columns, distance, labels[rows] == labels2[columns])


def image_uncertainty(
    unc: Tensor,  # [N, Du] or [N]
) -> Tensor:  # [N]
    """``||u||`` of every image; an uncertainty that is a number is taken as it is."""
    return unc if unc.dim() == 1 else unc.norm(dim=1)


def pair_uncertainty(
    pairs: Pairs,
    unc: Tensor,  # [N, Du] or [N]
    unc2: Tensor | None = None,  # [M, Du] or [M]
) -> Tensor:  # [P]
    """``beta = ||u_i + u_j||`` of every pair; of uncertainties that are numbers, their sum.

    ``unc2`` is of the gallery; absent: that of the queries.
    """
    unc2 = unc if unc2 is None else unc2
    if unc.dim() == 1:
        return unc[pairs.rows] + unc2[pairs.columns]
    split = (index.split(PAIRS_AT_ONCE) for index in (pairs.rows, pairs.columns))
    parts = zip(*split, strict=True)  # no [P, Du]
    return torch.cat([(unc[rows] + unc2[columns]).norm(dim=1) for rows, columns in parts])


def pair_auroc(
    beta: Tensor,  # [P]
    distance: Tensor,  # [P]
    match: Tensor,  # [P] bool
    weights: Tensor | None = None,  # [P] or [P, B]
) -> Tensor:  # [] or [B]
    """How well ``beta`` ranks wrong decisions about pairs above right ones: the AUROC.

    Decided is by the semantic distance: a pair is of one class if its distance is at most a
    threshold, the one that decides most of these very pairs rightly.

    Args:
        beta: ``[P]``, the uncertainties of the pairs.
        distance: ``[P]``, their semantic distances.
        match: ``[P]`` bool, whether they are of one class.
        weights: as for `error_auroc`; the threshold is that of all pairs, once each.

    Raises:
        TypeError, ValueError: ``match`` is not bool, or an argument does not match the others.

    >>> match = torch.tensor([True, True, False, True])  # the last one is taken for another class
    >>> pair_auroc(torch.tensor([1.0, 2.0, 1.0, 9.0]), torch.tensor([0.1, 0.2, 0.6, 0.7]), match)
    tensor(1., dtype=torch.float64)
    """
    _check("beta", beta, "match", match)
    _check("distance", distance, "match", match)
    return _auroc(beta, _misjudged(distance, match), _weights(weights, beta))


def match_forecast(
    features: Tensor,  # [P, F]
    match: Tensor,  # [P] bool
    query: Tensor,  # [P]
    *,
    seed: int = 0,
) -> Tensor:  # [P] float64
    """P(match | features) of every pair, by a logistic model that has not seen its query.

    Cross-fitted: the queries are split in two halves by the seed, and a model is fitted on the
    pairs of either half and asked about those of the other. (The other item of a pair may be a
    query of either half: a few coefficients learn nothing of a single item.) The features, such as
    the distance and ``beta``, are standardised; the model is scikit-learn's with its own, weak
    regularisation. Where all pairs of a half match, or none, that is what it forecasts.

    Args:
        features: ``[P, F]`` float.
        match: ``[P]`` bool, whether the pair is of one class.
        query: ``[P]`` integer, whose pair it is.
        seed: of the split.

    Raises:
        TypeError, ValueError: an argument does not match the others, or there is only one query.
    """
    if features.dim() != 2:
        raise ValueError(f"features must have shape [P, F], got {list(features.shape)}")
    _check("features", features.sum(dim=1), "match", match)
    _checks.labels("query", query, features, "features")
    names, place = query.cpu().unique(return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"query must name at least two queries, got {len(names)}")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    half = (order[place] % 2).numpy()
    x, y = features.double().cpu().numpy(), match.cpu().numpy()
    forecast = np.empty(len(y))
    for fitted in (0, 1):
        seen, judged = half == fitted, half != fitted
        if y[seen].all() or not y[seen].any():
            forecast[judged] = y[seen][0]
        else:
            model = make_pipeline(StandardScaler(), LogisticRegression())
            forecast[judged] = model.fit(x[seen], y[seen]).predict_proba(x[judged])[:, 1]
    return torch.from_numpy(forecast).to(features.device)


class Reliability(NamedTuple):
    """A reliability diagram: what was forecast in each bin, and what came."""

    forecast: Tensor  # [bins], mean
    observed: Tensor  # [bins], share of matches
    count: Tensor  # [bins], of pairs


def reliability(
    forecast: Tensor,  # [P] in [0, 1]
    match: Tensor,  # [P] bool
    *,
    bins: int = BINS,
) -> Reliability:
    """The reliability diagram of a forecast, in bins that hold equally many pairs.

    Equal forecasts share a bin, the one of their mean rank, so that the order of pairs does not
    matter; a bin that this leaves without pairs has NaN.

    Raises:
        TypeError, ValueError: ``match`` is not bool, or does not match ``forecast``.
    """
    _check("forecast", forecast, "match", match)
    place = _equal_mass(forecast, bins)
    parts = forecast.double(), match.double(), torch.ones_like(forecast).double()
    told, came, count = (_sums(place, part, bins) for part in parts)
    return Reliability(told / count, came / count, count)


def ece(
    forecast: Tensor,  # [P] in [0, 1]
    match: Tensor,  # [P] bool
    weights: Tensor | None = None,  # [P] or [P, B]
    *,
    bins: int = BINS,
) -> Tensor:  # [] or [B]
    """Expected calibration error: ``sum_b n_b / n |observed_b - forecast_b|`` of `reliability`.

    A forecast of the base rate for every pair is perfectly calibrated and worth nothing: read it
    beside `brier`. ``weights`` leave the bins as they are. Chance makes bins differ from their
    forecast, never agree with it: of few pairs the error comes out too large, and resampled it
    comes out larger still, so that its bootstrap interval lies high.

    Raises:
        TypeError, ValueError: ``match`` is not bool, or an argument does not match the others.

    >>> ece(torch.tensor([0.75, 0.75]), torch.tensor([True, False])).item()
    0.25
    """
    _check("forecast", forecast, "match", match)
    weights = _weights(weights, forecast)
    excess = torch.einsum("p,p...->p...", forecast.double() - match.double(), weights)
    gap = _sums(_equal_mass(forecast, bins), excess, bins)
    return gap.abs().sum(dim=0) / weights.sum(dim=0)


def brier(
    forecast: Tensor,  # [P] in [0, 1]
    match: Tensor,  # [P] bool
    weights: Tensor | None = None,  # [P] or [P, B]
) -> Tensor:  # [] or [B]
    """The Brier score: the mean of ``(forecast - match)^2``; smaller is better.

    Raises:
        TypeError, ValueError: ``match`` is not bool, or an argument does not match the others.

    >>> brier(torch.tensor([1.0, 0.5]), torch.tensor([True, False])).item()
    0.125
    """
    _check("forecast", forecast, "match", match)
    return mean((forecast.double() - match.double()) ** 2, _weights(weights, forecast))


def mean(
    values: Tensor,  # [N] float64
    weights: Tensor,  # [N] or [N, B] float64
) -> Tensor:  # [] or [B]
    """The weighted mean: a measure for `bootstrap` of what is a number for each query, such as
    whether it is answered rightly."""
    return values @ weights / weights.sum(dim=0)


@dataclass(frozen=True)
class Estimate:
    """A number and its interval, in the same unit; all NaN where there is no such number."""

    value: float
    low: float
    high: float


def bootstrap(
    measure: Callable[[Tensor], Tensor],
    items: int,
    *,
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """A measure of ``items`` with its percentile interval over samples drawn from them again.

    Replaces::

        for _ in range(resamples):
            drawn = torch.randint(items, (items,))
            found.append(measure(data[drawn]))

    Samples for which the measure is NaN (no wrong answer among them) are left out.

    Args:
        measure: takes ``[items, B]`` float64 weights on the CPU, how often each item is in each of
            B samples, and gives ``[B]``; or ``[items]``, and gives one number.
        items: what is drawn, such as queries.
        resamples: how many samples.
        level: share of the samples within the interval.
        seed: of the draws; measures with the same seed and items see the same samples.

    Raises:
        TypeError, ValueError: a number is out of its range.

    Source: Efron, *Bootstrap Methods: Another Look at the Jackknife*, Annals of Statistics 1979.

    >>> right = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    >>> bootstrap(lambda weights: right @ weights / 4, 4)
    Estimate(value=0.75, low=0.25, high=1.0)
    """
    _checks.integer("items", items, ">= 1", lambda items: items >= 1)
    _checks.integer("resamples", resamples, ">= 1", lambda resamples: resamples >= 1)
    _checks.number("level", level, "> 0 and < 1", lambda level: 0 < level < 1)
    draw = torch.Generator().manual_seed(seed)
    found, size = [], max(SAMPLES_AT_ONCE, AT_ONCE // items)
    for first in range(0, resamples, size):
        drawn = torch.randint(items, (items, min(size, resamples - first)), generator=draw)
        once = torch.ones(drawn.shape, dtype=torch.float64)
        found.append(measure(torch.zeros_like(once).scatter_add_(0, drawn, once)))
    outside = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(found).nanquantile(outside).tolist()
    return Estimate(measure(torch.ones(items, dtype=torch.float64)).item(), low, high)


@dataclass(frozen=True)
class UncertaintyTable:
    """What uncertainties know, beside how often the answers are right.

    Args:
        right: share of right answers: Recall@1, or the accuracy of a classification.
        distance: ``ece`` and ``brier`` of P(match | D), the distance alone.
        rows: by candidate: ``error_auroc``, ``aurc``, ``pair_auroc``, ``ece`` and ``brier`` of
            P(match | D, beta); where damaged images are known ``spearman_<corruption>``; where
            foreign ones are ``ood_auroc``.
        unmatched: queries of whose class there is no other item; they are in none of ``right``,
            ``error_auroc``, ``aurc``.
    """

    right: Estimate
    distance: dict[str, Estimate]
    rows: dict[str, dict[str, Estimate]]
    unmatched: int


@torch.no_grad()
def uncertainty_table(
    candidates: Mapping[str, Tensor],  # [N, Du] or [N] each
    sem: Tensor,  # [N, Ds]
    labels: Tensor,  # [N]
    sem2: Tensor | None = None,  # [M, Ds]
    labels2: Tensor | None = None,  # [M]
    candidates2: Mapping[str, Tensor] | None = None,  # [M, Du] or [M] each
    *,
    wrong: Tensor | None = None,  # [N] bool
    corrupted: Mapping[str, Mapping[str, Tensor]] | None = None,  # [S, N] each
    outside: Mapping[str, Tensor] | None = None,  # [K] each
    resamples: int = 400,
    seed: int = 0,
) -> UncertaintyTable:
    """All measures of all candidates, each with its bootstrap interval, beside Recall@1.

    What needs a model and images (``corrupted``, ``outside``) is left out where it is not given.
    Distances are semantic, whatever the candidate, so that candidates differ in their uncertainty
    alone. Intervals come from resampled queries (images, for damage); the logistic models, the
    threshold of `pair_auroc` and the bins of `ece` are those of all queries.

    Args:
        candidates: uncertainties by name, ``[N, Du]`` such as ``unc``, whose norm is then an
            image's uncertainty, or ``[N]`` such as a baseline, larger for a less certain image.
        sem, labels: of the queries.
        sem2, labels2: of the gallery; absent: the queries among themselves.
        candidates2: the candidates of the gallery; they go with ``sem2``.
        wrong: ``[N]`` bool, whether each answer is wrong; absent: see `wrong_answers`.
        corrupted: by candidate and corruption, see `corrupted`.
        outside: by candidate, uncertainties of out-of-distribution images, see `shuffled`.
        resamples: of the bootstrap.
        seed: of the pairs, the split and the bootstrap.

    Raises:
        TypeError, ValueError: an argument does not match the others, is NaN, or no query has
            another item of its class.

    >>> labels = torch.arange(3).repeat(20)
    >>> draw = torch.Generator().manual_seed(0)
    >>> unc = torch.rand(60, 2, generator=draw)
    >>> noise = unc.norm(dim=1, keepdim=True) * torch.randn(60, 3, generator=draw)
    >>> table = uncertainty_table({"unc": unc}, torch.eye(3)[labels] + noise, labels)
    >>> table.rows["unc"]["error_auroc"].value > 0.5
    True
    """
    _check_candidates("candidates", candidates, sem, "sem")
    by_candidate = {"corrupted": corrupted, "outside": outside}
    if sem2 is not None:
        by_candidate["candidates2"] = candidates2 or {}
    for name, given in by_candidate.items():
        if given is not None and given.keys() != candidates.keys():
            wanted, got = sorted(candidates), sorted(given)
            raise ValueError(f"{name} must name {wanted} like candidates, got {got}")
    if sem2 is not None:
        _check_candidates("candidates2", candidates2, sem2, "sem2")
    matched = torch.ones(len(sem), dtype=torch.bool, device=sem.device)
    if wrong is None:
        wrong, matched = wrong_answers(sem, labels, sem2, labels2)
    elif wrong.shape != matched.shape:
        raise ValueError(f"wrong must have shape [{len(sem)}] like sem, got {list(wrong.shape)}")
    if not matched.any():
        raise ValueError("labels must give some query another item of its class, got none")
    pairs = sampled_pairs(sem, labels, sem2, labels2, seed=seed)
    betas = {
        name: pair_uncertainty(pairs, unc, candidates2[name] if candidates2 else None).cpu()
        for name, unc in candidates.items()
    }
    # A few numbers for each query from here on.
    wrong, pairs = wrong[matched].cpu(), Pairs(*(part.cpu() for part in pairs))
    sampled = functools.partial(bootstrap, resamples=resamples, seed=seed)

    def of_items(measure: Callable[..., Tensor], count: int, *data: Tensor) -> Estimate:
        return sampled(lambda weights: measure(*data, weights), count)

    def of_pairs(measure: Callable[..., Tensor], *data: Tensor) -> Estimate:
        return sampled(lambda weights: measure(*data, pairs.match, weights[pairs.rows]), len(sem))

    def calibration(*features: Tensor) -> dict[str, Estimate]:
        told = match_forecast(torch.stack(features, dim=1), pairs.match, pairs.rows, seed=seed)
        return {"ece": of_pairs(ece, told), "brier": of_pairs(brier, told)}

    rows = {}
    for name, unc in candidates.items():
        norms = image_uncertainty(unc).cpu()
        damaged = corrupted[name] if corrupted else {}
        rows[name] = {
            "error_auroc": of_items(error_auroc, len(wrong), norms[matched.cpu()], wrong),
            "aurc": of_items(aurc, len(wrong), norms[matched.cpu()], wrong),
            "pair_auroc": of_pairs(pair_auroc, betas[name], pairs.distance),
            **calibration(pairs.distance, betas[name]),
            **{
                f"spearman_{kind}": of_items(severity_correlation, values.shape[1], values.cpu())
                for kind, values in damaged.items()
            },
        }
        if outside:
            foreign = outside[name].cpu()
            images = len(norms) + len(foreign)
            rows[name]["ood_auroc"] = of_items(ood_auroc, images, norms, foreign)
    return UncertaintyTable(
        of_items(mean, len(wrong), (~wrong).double()),
        calibration(pairs.distance),
        rows,
        int((~matched).sum()),
    )


def _auroc(values: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """How well the values rank positive items above the others; ties count half."""
    groups, place = values.unique(return_inverse=True)
    above = _sums(place[positive], weights[positive], len(groups))
    below = _sums(place[~positive], weights[~positive], len(groups))
    won = above * (below.cumsum(0) - below / 2)
    return won.sum(dim=0) / (above.sum(dim=0) * below.sum(dim=0))


def _misjudged(distance: Tensor, match: Tensor) -> Tensor:
    """``[P]`` bool: decided wrongly by the best threshold of the distance."""
    thresholds, place = distance.unique(return_inverse=True)
    # What a threshold gains over the one that lets no pair match.
    gains = _sums(place, 2.0 * match.double() - 1, len(thresholds)).cumsum(0)
    best = gains.argmax()
    return ((place <= best) & (gains[best] > 0)) != match


def _equal_mass(forecast: Tensor, bins: int) -> Tensor:
    """``[P]``: the bin of each forecast, by its mean rank among all."""
    _, place, counts = forecast.unique(return_inverse=True, return_counts=True)
    share = (counts.cumsum(0) - counts / 2).double() / len(forecast)  # in (0, 1)
    return (bins * share).long()[place]


def _sums(place: Tensor, weights: Tensor, groups: int) -> Tensor:
    """``[groups]`` or ``[groups, B]``: the sums of the weights of the items at each place."""
    return weights.new_zeros(groups, *weights.shape[1:]).index_add_(0, place, weights)


def _weights(weights: Tensor | None, values: Tensor) -> Tensor:
    """The weights, once each if none are given."""
    if weights is None:
        return torch.ones(len(values), dtype=torch.float64, device=values.device)
    if weights.dim() not in (1, 2) or len(weights) != len(values):
        wanted = f"[{len(values)}] or [{len(values)}, B]"
        raise ValueError(f"weights must have shape {wanted}, got {list(weights.shape)}")
    return weights.double()


def _check(name: str, values: Tensor, other: str, truth: Tensor) -> None:
    _checks.vector(name, values, truth, other)
    if truth.dtype != torch.bool:
        raise TypeError(f"{other} must be bool, got {str(truth.dtype).removeprefix('torch.')}")
    if not len(values):
        raise ValueError(f"{name} must hold at least one item, got none")
    _check_numbers(name, values)


def _check_numbers(name: str, values: Tensor) -> None:
    missing = values.isnan()
    if missing.any():
        place = missing.nonzero()[0].tolist()
        raise ValueError(f"{name} must be numbers, got NaN at {place}")


def _check_sides(sem: Tensor, labels: Tensor, sem2: Tensor | None, labels2: Tensor | None) -> None:
    if (sem2 is None) != (labels2 is None):
        raise ValueError("sem2 and labels2 must be given together, got only one of them")
    _checks.labels("labels", labels, sem, "sem")
    if sem2 is not None:
        _checks.labels("labels2", labels2, sem2, "sem2")
    for name, x in {"sem": sem, **({} if sem2 is None else {"sem2": sem2})}.items():
        least = 2 if sem2 is None else 1
        if len(x) < least:
            raise ValueError(f"{name} must hold at least {least} items, got {len(x)}")
        _check_numbers(name, x)


def _check_candidates(
    name: str, candidates: Mapping[str, Tensor], items: Tensor, items_name: str
) -> None:
    for candidate, unc in candidates.items():
        shown = f"{name}[{candidate!r}]"
        _checks.tensor(shown, unc)
        if unc.dim() not in (1, 2) or len(unc) != len(items):
            wanted = f"[{len(items)}] or [{len(items)}, Du] like {items_name}"
            raise ValueError(f"{shown} must have shape {wanted}, got {list(unc.shape)}")
        _check_numbers(shown, unc)
