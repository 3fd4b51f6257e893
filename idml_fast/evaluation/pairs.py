"""Pairs of items: does ``beta`` know which decisions are wrong, and what to forecast of a match?"""

from __future__ import annotations

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
from ._weighted import auroc, check, check_sides, mean, sums, weights_of

BINS = 15  # of a reliability diagram
PAIRS_AT_ONCE = 2**16


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
    """Every query with its ``k`` nearest neighbours, the nearest first, and ``k`` others drawn at
    random.

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
    check_sides(sem, labels, sem2, labels2)
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
    check("beta", beta, "match", match)
    check("distance", distance, "match", match)
    return auroc(beta, _misjudged(distance, match), weights_of(weights, beta))


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
    check("features", features.sum(dim=1), "match", match)
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
    check("forecast", forecast, "match", match)
    place = _equal_mass(forecast, bins)
    parts = forecast.double(), match.double(), torch.ones_like(forecast).double()
    told, came, count = (sums(place, part, bins) for part in parts)
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
    check("forecast", forecast, "match", match)
    weights = weights_of(weights, forecast)
    excess = torch.einsum("p,p...->p...", forecast.double() - match.double(), weights)
    gap = sums(_equal_mass(forecast, bins), excess, bins)
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
    check("forecast", forecast, "match", match)
    return mean((forecast.double() - match.double()) ** 2, weights_of(weights, forecast))


def _misjudged(distance: Tensor, match: Tensor) -> Tensor:
    """``[P]`` bool: decided wrongly by the best threshold of the distance."""
    thresholds, place = distance.unique(return_inverse=True)
    # What a threshold gains over the one that lets no pair match.
    gains = sums(place, 2.0 * match.double() - 1, len(thresholds)).cumsum(0)
    best = gains.argmax()
    return ((place <= best) & (gains[best] > 0)) != match


def _equal_mass(forecast: Tensor, bins: int) -> Tensor:
    """``[P]``: the bin of each forecast, by its mean rank among all."""
    _, place, counts = forecast.unique(return_inverse=True, return_counts=True)
    share = (counts.cumsum(0) - counts / 2).double() / len(forecast)  # in (0, 1)
    return (bins * share).long()[place]
