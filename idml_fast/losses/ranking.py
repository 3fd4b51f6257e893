"""Losses that are a measure of the ranking itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..metric import Metric
from ..stats import Count, Histogram
from ._loss import Loss, Pairs, loss_function


@loss_function
def fast_ap_loss(
    pairs: Pairs,
    *,
    num_bins: int = 10,
    metric: Metric = Metric.paper(),
) -> Tensor:  # []
    """FastAP, see `FastAPLoss`."""
    _checks.metric_of("FastAP", metric, "distance")
    _checks.integer("num_bins", num_bins, ">= 1", lambda bins: bins >= 1)
    # Squared distances on the unit sphere; an introspective distance is never the larger one.
    bins = {"power": 2.0, "low": 0.0, "high": 4.0, "bins": num_bins}
    found = pairs.rowstats(
        metric,
        {
            "positive": Histogram(where="same", **bins),
            "every": Histogram(where="any", **bins),
            "positives": Count(where="same"),
        },
    )
    positives, retrieved = found["positives"], found["every"].cumsum(1)
    precision = found["positive"].cumsum(1) / torch.where(retrieved > 0, retrieved, 1)
    ap = (found["positive"] * precision).sum(1) / positives.clamp_min(1)
    valid = positives > 0
    return torch.where(valid, 1 - ap, 0).sum() / valid.sum().clamp_min(1)


class FastAPLoss(Loss, function=fast_ap_loss):
    """FastAP, a soft average precision, on introspective distances.

    With ``h[i, b]`` the soft histograms of a row's squared scores over ``[0, 4]``, ``h+`` of its
    positives and ``h`` of all columns, ``H`` their cumulated sums::

        loss = mean_i (1 - sum_b h+[i, b] H+[i, b] / H[i, b] / #positives_i)

    over the rows that have a positive.

    Args:
        num_bins: intervals of the histograms, >= 1; they have one centre more.
        metric: of form ``"distance"``; ``sem`` must have length 1, so that no distance exceeds 2.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Cakir et al., *Deep Metric Learning to Rank*, CVPR 2019.

    >>> loss = FastAPLoss(num_bins=20)
    >>> sem = torch.nn.functional.normalize(torch.randn(4, 8))
    >>> loss(sem, torch.randn(4, 2), torch.tensor([0, 2, 2, 0])).shape
    torch.Size([])
    """
