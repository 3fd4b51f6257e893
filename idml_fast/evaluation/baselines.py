"""What says how certain an image is without an uncertainty embedding: the peers of ``||u||``.

Each gives a vector in which a larger number means a less certain image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks
from ..metric import Metric
from ..nearest import nearest


def semantic_norm(
    raw: Tensor,  # [N, Ds]
) -> Tensor:  # [N]
    """``-||s||`` of the semantic embeddings before they are normalised.

    A network pushes an image as far from the origin as it finds evidence in it.

    Source: Scott et al., *von Mises-Fisher Loss*, ICCV 2021.

    >>> semantic_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist()
    [-5.0, -1.0]
    """
    return -raw.norm(dim=1)


def proxy_distance(
    sem: Tensor,  # [N, Ds]
    proxies: Tensor,  # [C, Ds]
) -> Tensor:  # [N]
    """The distance to the nearest proxy, both as the loss compares them.

    >>> sem = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    >>> proxy_distance(sem, torch.tensor([[0.0, 0.0], [9.0, 0.0]])).tolist()
    [1.0, 3.0]
    """
    return nearest(sem, None, proxies, k=1, metric=Metric.plain())[0][:, 0]


def softmax_entropy(
    logits: Tensor,  # [N, C]
) -> Tensor:  # [N]
    """The entropy of ``softmax(logits)``, in nats: 0 for a sure class, ``log(C)`` for none.

    >>> softmax_entropy(torch.tensor([[0.0, 0.0], [999.0, 0.0]])).tolist()
    [0.693..., 0.0]
    """
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1)


def mc_dropout(
    features: Tensor,  # [N, F]
    head: Callable[[Tensor], Tensor],
    *,
    p: float = 0.2,
    passes: int = 20,
    seed: int = 0,
) -> Tensor:  # [N]
    """How far embeddings scatter under dropout: their mean squared distance from their mean.

    ``1/T sum_t ||s_t - mean_t s_t||^2`` with ``s_t = head(features * mask_t / (1 - p))``. A mask
    is one of a pass and not of an image: the same ``passes`` thinned networks see all images, so
    that an image's number depends on that image alone.

    Args:
        features: ``[N, F]``, what the semantic head is given.
        head: takes features, gives the semantic embeddings as they are compared.
        p: share of the features that a pass leaves out, in [0, 1).
        passes: T.
        seed: of the masks.

    Raises:
        TypeError, ValueError: ``p`` or ``passes`` is out of its range.

    Source: Gal and Ghahramani, *Dropout as a Bayesian Approximation*, ICML 2016. A network that
    was trained without dropout is only approximated by it.

    >>> mc_dropout(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.nn.functional.normalize)[0].item()
    0.0
    """
    _checks.number("p", p, ">= 0 and < 1", lambda p: 0 <= p < 1)
    _checks.integer("passes", passes, ">= 1", lambda passes: passes >= 1)
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(passes, features.shape[1], generator=draw) >= p
    first, *masks = kept.to(features) / (1 - p)
    first = head(features * first)
    # Differences from the first pass: without any scatter they are 0, and nothing cancels.
    shift, spread = torch.zeros_like(first), torch.zeros_like(first[:, 0])
    for mask in masks:
        difference = head(features * mask) - first
        shift += difference / passes
        spread += difference.square().sum(dim=1) / passes
    return (spread - shift.square().sum(dim=1)).clamp_min(0)
