"""All measures of all uncertainties in one table, each number with its bootstrap interval."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from ._weighted import check_numbers, mean
from .pairs import Pairs, brier, ece, match_forecast, pair_auroc, pair_uncertainty, sampled_pairs
from .uncertainty import (
    aurc,
    error_auroc,
    has_match,
    image_uncertainty,
    ood_auroc,
    severity_correlation,
)

# How many weights `bootstrap` draws at once: what measures make of them then stays in the cache.
# But at least a few samples, since each call sorts the items anew.
AT_ONCE, SAMPLES_AT_ONCE = 2**15, 16


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
    if wrong is not None and wrong.shape != sem.shape[:1]:
        raise ValueError(f"wrong must have shape [{len(sem)}] like sem, got {list(wrong.shape)}")
    pairs = sampled_pairs(sem, labels, sem2, labels2, seed=seed)
    matched = torch.ones(len(sem), dtype=torch.bool, device=sem.device)
    if wrong is None:  # a query's nearest item is in its first pair: no second search
        wrong, matched = ~pairs.match.view(len(sem), -1)[:, 0], has_match(labels, labels2)
    if not matched.any():
        raise ValueError("labels must give some query another item of its class, got none")
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


def _check_candidates(
    name: str, candidates: Mapping[str, Tensor], items: Tensor, items_name: str
) -> None:
    for candidate, unc in candidates.items():
        shown = f"{name}[{candidate!r}]"
        _checks.tensor(shown, unc)
        if unc.dim() not in (1, 2) or len(unc) != len(items):
            wanted = f"[{len(items)}] or [{len(items)}, Du] like {items_name}"
            raise ValueError(f"{shown} must have shape {wanted}, got {list(unc.shape)}")
        check_numbers(shown, unc)
