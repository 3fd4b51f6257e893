"""Mixup and CutMix: two images in one, with the labels of both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MIXES = ("none", "mixup", "cutmix")


class Mixed(NamedTuple):
    """A batch whose images are each made of two.

    The loss of such a batch is ``lam * L(images, labels_a) + (1 - lam) * L(images, labels_b)``.
    """

    images: Tensor  # [N, channels, height, width]
    labels_a: Tensor  # [N], of the images that make up the share lam
    labels_b: Tensor  # [N], of the other images
    lam: float  # in [0, 1]


def mix(
    kind: str,
    images: Tensor,  # [N, channels, height, width]
    labels: Tensor,  # [N]
    alpha: float,
    draws: np.random.Generator,
) -> Mixed:
    """Mix each image of a batch with another one of it.

    Args:
        kind: ``"mixup"``: ``lam * one + (1 - lam) * other`` at each pixel; ``"cutmix"``: a
            rectangle of the other image in the one, at the same place, one rectangle for a batch.
        images: ``[N, channels, height, width]``; they stay as they are.
        labels: ``[N]``.
        alpha: ``lam ~ Beta(alpha, alpha)``, one for a batch; > 0. CutMix then gives the share of
            the pixels that really stay, after rounding and cutting the rectangle at the edges.
        draws: where the numbers come from, so that a seed gives them again.

    Source: Zhang et al., *mixup: Beyond Empirical Risk Minimization*, ICLR 2018; Yun et al.,
    *CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features*, ICCV
    2019.
    """
    lam = float(draws.beta(alpha, alpha))
    order = torch.from_numpy(draws.permutation(len(images))).to(images.device)
    others = images[order]
    if kind == "mixup":
        mixed = torch.lerp(others, images, lam)
    else:
        rows, columns = (_span(side, (1 - lam) ** 0.5, draws) for side in images.shape[-2:])
        mixed = images.clone()
        mixed[..., rows, columns] = others[..., rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        lam = 1 - area / images[0, 0].numel()
    return Mixed(mixed, labels, labels[order], lam)


def _span(side: int, share: float, draws: np.random.Generator) -> slice:
    """That share of a side, around a place anywhere on it."""
    length, centre = round(share * side), int(draws.integers(side))
    first = centre - length // 2
    return slice(max(0, first), min(side, first + length))
