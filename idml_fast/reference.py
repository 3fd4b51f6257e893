"""The four operations in eager PyTorch: the definition that the kernels are compared with.

Any floating dtype, any device, differentiable as often as wanted, also in a `Metric`'s tensors;
memory grows with N x M. ``"zero"`` stands for uncertainties that are all zeros. Letters, edges and
sources are those of `idml_fast.Metric`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .metric import Metric
from .stats import Extremum, Statistic

if TYPE_CHECKING:
    from .nearest import DistanceWeighted

# Pairs whose squared distance is below this share of ||x||^2 + ||y||^2 have lost it to cancellation
# in ||x||^2 + ||y||^2 - 2 x.y and are recomputed from the differences.
NEAR = 2.0**-8


def pairwise(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | str | None = None,  # [M, Du] or "zero"
    *,
    metric: Metric,
) -> Tensor:  # [N, M]
    """See `idml_fast.pairwise`."""
    sem2, unc2 = (sem, unc) if sem2 is None else (sem2, unc2)
    unc, unc2 = _uncertainties(unc, unc2, len(sem), len(sem2), metric)
    dots = sem @ sem2.T
    alpha2 = _squares(sem, sem2, -1, dots)
    beta2 = torch.zeros_like(alpha2) if unc is None else _squares(unc, unc2, 1, unc @ unc2.T)
    if metric.form == "distance":
        versine = None
    else:
        cosine = dots * _inverse_norms(sem)[:, None] * _inverse_norms(sem2)
        versine = 1 - cosine
    return score(alpha2, beta2, versine, metric)


def score(alpha2: Tensor, beta2: Tensor, versine: Tensor | None, metric: Metric) -> Tensor:
    """The score of pairs with squared distances ``alpha2``, squared uncertainties ``beta2`` and
    ``versine = 1 - cos`` (which the distance form does not need); tensors of one shape."""
    alpha, beta = _root(alpha2), _root(beta2)
    if versine is not None:
        # Rounding may take the cosine of parallel items above 1. Only the value is clamped: the
        # gradient of nearly parallel items is not zero. A NaN stays one.
        versine = versine - versine.detach().clamp_max(0)
    identical = alpha2 == 0
    base = alpha if versine is None else versine.masked_fill(identical, 0)
    if metric.reads_unc:
        squared = metric.form == "official"
        length = metric.tau * (alpha2 if squared else alpha)
        uncertainty = beta2 if squared else beta
        # exp(-inf) = 0 would hide an infinite embedding: inf - inf makes it NaN, x - x adds 0 to
        # anything finite and nothing to the gradient.
        uncertainty = uncertainty + (uncertainty - uncertainty) + metric.gamma
        # Where exp(-r) rounds to 0, r itself is left out: its derivatives overflow, and a product
        # of 0 and infinity is NaN.
        finfo = torch.finfo(alpha.dtype)
        vanishing = math.log(2 / finfo.eps) - math.log(finfo.tiny)
        vanished = identical | (uncertainty >= vanishing * length)
        decay = torch.exp(-uncertainty / length.masked_fill(vanished, 1))
        base = base.masked_fill(vanished, 0) * decay
    return base if versine is None else 1 - base


def rowstats(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | str | None = None,  # [M, Du] or "zero"
    *,
    labels: Tensor,  # [N]
    labels2: Tensor | None = None,  # [M]
    metric: Metric,
    stats: Mapping[str, Statistic],
) -> dict[str, Tensor | Extremum]:
    """See `idml_fast.rowstats`."""
    scores = pairwise(sem, unc, sem2, unc2, metric=metric)
    return reduce_rows(scores, labels, labels2, stats)


def reduce_rows(
    scores: Tensor,  # [N, M]
    labels: Tensor,  # [N]
    labels2: Tensor | None,  # [M], None: the rows against themselves
    stats: Mapping[str, Statistic],
) -> dict[str, Tensor | Extremum]:
    """`rowstats` of scores that are already there."""
    masks = {
        where: columns_looked_at(scores, labels, labels2, where, exclude_self=labels2 is None)
        for where in {stat.where for stat in stats.values()}
    }
    return {name: stat.reduce(scores, masks[stat.where]) for name, stat in stats.items()}


def paired(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | str | None = None,  # [M, Du] or "zero"
    *,
    index: tuple[Tensor, Tensor] | None = None,  # [T], [T]
    metric: Metric,
) -> Tensor:  # [T]
    """See `idml_fast.paired`."""
    sem2, unc2 = (sem, unc) if sem2 is None else (sem2, unc2)
    unc, unc2 = _uncertainties(unc, unc2, len(sem), len(sem2), metric)
    if index is not None:
        rows, cols = index
        sem, sem2 = sem[rows], sem2[cols]
        unc, unc2 = (None, None) if unc is None else (unc[rows], unc2[cols])
    alpha2 = (sem - sem2).square().sum(1)
    beta2 = torch.zeros_like(alpha2) if unc is None else (unc + unc2).square().sum(1)
    versine = None
    if metric.form != "distance":
        versine = 1 - (sem * sem2).sum(1) * _inverse_norms(sem) * _inverse_norms(sem2)
    return score(alpha2, beta2, versine, metric)


def nearest(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None = None,  # [M, Ds]
    unc2: Tensor | str | None = None,  # [M, Du] or "zero"
    *,
    k: int,
    metric: Metric,
    labels: Tensor | None = None,  # [N]
    labels2: Tensor | None = None,  # [M]
    where: str = "any",
    largest: bool | None = None,
    exclude_self: bool = False,
    above: Tensor | None = None,  # [N]
    sample: DistanceWeighted | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k]
    """See `idml_fast.nearest`."""
    scores = pairwise(sem, unc, sem2, unc2, metric=metric)
    largest = metric.larger_is_closer if largest is None else largest
    weights = [] if sample is None else sample.weights(sem)
    return best_columns(
        scores, k, labels, labels2, where, largest, exclude_self, above, weights, seed
    )


def best_columns(
    scores: Tensor,  # [N, M]
    k: int,
    labels: Tensor | None,  # [N]
    labels2: Tensor | None,  # [M]
    where: str,
    largest: bool,
    exclude_self: bool,
    above: Tensor | None,  # [N]
    weights: Sequence[float] = (),  # width, cutoff, upto; none: nothing is drawn
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k]
    """`nearest` of scores that are already there."""
    looked_at = columns_looked_at(scores, labels, labels2, where, exclude_self=exclude_self)
    # Neither bound hides a NaN.
    if above is not None:
        looked_at = looked_at & ~(scores <= above[:, None].to(scores.dtype))
    keys = scores.detach() if largest else -scores.detach()
    if weights:
        *_, upto = weights
        looked_at = looked_at & ~(scores >= upto)
        keys = _log_weights(scores.detach().double(), *weights) + _gumbel(scores, seed)
    missing = -math.inf if largest else math.inf
    found = min(k, scores.shape[1])
    # Two stable sorts, by key and then by mask: a NaN comes first, a tie goes to the smaller column
    # (topk promises no order), and columns not looked at come last, even behind an infinite score.
    order = keys.sort(dim=1, descending=True, stable=True).indices
    first = looked_at.gather(1, order).byte().sort(dim=1, descending=True, stable=True).indices
    columns = order.gather(1, first[:, :found])
    chosen = looked_at.gather(1, columns)
    values = scores.gather(1, columns).masked_fill(~chosen, missing)
    columns = columns.masked_fill(~chosen, -1)
    return (
        torch.nn.functional.pad(values, (0, k - found), value=missing),
        torch.nn.functional.pad(columns, (0, k - found), value=-1),
    )


def _log_weights(
    scores: Tensor,  # [N, M]
    width: float,
    cutoff: float,
    upto: float,
) -> Tensor:  # [N, M]
    """``-log q(d)`` of `idml_fast.DistanceWeighted`, up to a constant; any number from upto on."""
    d = scores.clamp(cutoff).masked_fill(scores >= upto, cutoff)
    return (2 - width) * d.log() + (3 - width) / 2 * (1 - d.square() / 4).log()


def _gumbel(scores: Tensor, seed: int) -> Tensor:  # [N, M], float64
    """A Gumbel distributed number for each pair: the k largest sums with the logarithms of weights
    are k draws without replacement (Efraimidis and Spirakis, Weighted Random Sampling with a
    Reservoir, 2006)."""
    rows, cols = (torch.arange(n, device=scores.device) for n in scores.shape)
    words = philox((cols // 4)[None], rows[:, None], int(seed))
    word = torch.stack(words).gather(0, (cols % 4).expand(1, *scores.shape))[0]
    return -torch.log(-torch.log1p(-(word.double() + 0.5) / 2**32))


def philox(low: Tensor, high: Tensor, key: int) -> tuple[Tensor, ...]:
    """The four 32-bit words that Philox4x32-10 makes of a counter, in int64.

    The counter's first two words are the halves of ``low``, its last two those of ``high``; the key
    is 64 bits. Source: Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011.
    """
    half = 0xFFFFFFFF
    halves = [x >> shift & half for x in (low, high) for shift in (0, 32)]
    a, b, c, d = torch.broadcast_tensors(*halves)
    for n in range(10):
        # int64 products wrap around, which leaves their 64 bits as they are.
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        key0, key1 = key + n * 0x9E3779B9 & half, (key >> 32) + n * 0xBB67AE85 & half
        a, b = (second >> 32) & half ^ b ^ key0, second & half
        c, d = (first >> 32) & half ^ d ^ key1, first & half
    return a, b, c, d


def columns_looked_at(
    scores: Tensor,  # [N, M]
    labels: Tensor | None,  # [N]
    labels2: Tensor | None,  # [M]
    where: str,
    *,
    exclude_self: bool,
) -> Tensor:  # [N, M], bool
    """Which columns each row looks at, by their labels."""
    if where == "any" or labels is None:
        looked_at = torch.ones_like(scores, dtype=torch.bool)
    else:
        same = labels[:, None] == (labels if labels2 is None else labels2)
        looked_at = same if where == "same" else ~same
    if exclude_self:
        looked_at = looked_at & ~torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    return looked_at


def _uncertainties(
    unc: Tensor | str | None,  # [N, Du] or "zero"
    unc2: Tensor | str | None,  # [M, Du] or "zero"
    rows: int,
    cols: int,
    metric: Metric,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Both sides' uncertainties with the zeros spelt out; None where beta is 0 or not read."""
    given = [x for x in (unc, unc2) if isinstance(x, Tensor)]
    if not given or not metric.reads_unc:
        return None, None
    width = given[0].shape[1]
    return (
        unc if isinstance(unc, Tensor) else given[0].new_zeros(rows, width),
        unc2 if isinstance(unc2, Tensor) else given[0].new_zeros(cols, width),
    )


def _squares(x: Tensor, y: Tensor, sign: int, dots: Tensor) -> Tensor:
    """``||x_i + sign y_j||^2``, ``[N, M]``, from ``dots = x @ y.T``."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = (scale + 2 * sign * dots).clamp_min(0)
    rows, cols = (squares < NEAR * scale).nonzero(as_tuple=True)
    return squares.index_put((rows, cols), (x[rows] + sign * y[cols]).square().sum(1))


def _root(squares: Tensor) -> Tensor:
    """The square root whose derivative at 0 is 0."""
    positive = squares > 0
    return torch.where(positive, squares.where(positive, 1).sqrt(), squares.detach())


def _inverse_norms(x: Tensor) -> Tensor:  # [N, D] -> [N]
    """``1 / ||x||``, 0 for a zero vector."""
    squares = x.square().sum(1)
    nonzero = squares != 0
    return torch.where(nonzero, squares.where(nonzero, 1).rsqrt(), 0 * squares)
