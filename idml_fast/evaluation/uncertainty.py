"""Whether the uncertainty is alive: does ``||u||`` grow when an image gets worse?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

SEVERITIES = range(6)  # 0 is the clean image


def blur(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    severity: int,
) -> Tensor:
    """Gaussian blur; the width is 0.05, 0.075, 0.1, 0.14, 0.19 of the shorter side."""
    sigma = (0.0, 0.05, 0.075, 0.1, 0.14, 0.19)[severity] * min(images.shape[-2:])
    if not sigma:
        return images
    radius = math.ceil(2.5 * sigma)
    offset = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    for weight, pad in ((kernel, (radius, radius, 0, 0)), (kernel.mT, (0, 0, radius, radius))):
        padded = F.pad(images, pad, mode="replicate")
        images = F.conv2d(padded, weight, groups=images.shape[1])
    return images


def noise(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    severity: int,
) -> Tensor:
    """Gaussian noise of deviation 0.1, 0.2, 0.3, 0.45, 0.6, clipped to [0, 1]; always the same."""
    sigma = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6)[severity]
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * drawn.to(images)).clamp(0, 1)


def occlusion(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    severity: int,
) -> Tensor:
    """A black rectangle, always at the same place: 0.25, 0.375, 0.5, 0.625, 0.75 of either side."""
    share = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75)[severity]
    place = torch.rand(2, len(images), 1, generator=torch.Generator().manual_seed(0))
    covered = []
    for side, corner in zip(images.shape[-2:], place.to(images.device), strict=True):
        length = round(share * side)
        first = (corner * (side - length + 1)).floor()
        pixel = torch.arange(side, device=images.device)
        covered.append((pixel >= first) & (pixel < first + length))  # [N, side]
    rows, columns = covered
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


CORRUPTIONS = {"blur": blur, "noise": noise, "occlusion": occlusion}


def corrupted_norms(
    embed: Callable[[Tensor], tuple[Tensor, Tensor]],
    images: Tensor,  # [N, C, H, W] in [0, 1]
) -> dict[str, Tensor]:
    """``||u||`` of every image at every severity of every corruption.

    Args:
        embed: takes images, gives ``(sem, unc)``, as a model does.
        images: ``[N, C, H, W]`` float in [0, 1], before any normalisation.

    Returns:
        For ``blur``, ``noise`` and ``occlusion``: ``[6, N]``, row 0 the clean images and rows 1 to
        5 rising severity.
    """
    return {
        name: torch.stack([embed(corrupt(images, s))[1].norm(dim=1) for s in SEVERITIES])
        for name, corrupt in CORRUPTIONS.items()
    }


def severity_correlation(
    norms: Tensor,  # [S, N]
) -> float:
    """Spearman's rank correlation of ``||u||`` with the severity, over all images and severities.

    Args:
        norms: ``[S, N]``, ``||u||`` with severity ``s`` in row ``s``.

    Returns:
        In [-1, 1]; NaN where ``||u||`` is the same everywhere, so that there are no ranks.

    Raises:
        ValueError: ``norms`` is not a matrix of at least two rows.
    """
    if norms.dim() != 2 or len(norms) < 2:
        raise ValueError(f"norms must have shape [S, N] with S >= 2, got {list(norms.shape)}")
    if bool((norms == norms.flatten()[0]).all()):
        return math.nan  # scipy would say the same, with a warning
    severity = torch.arange(len(norms)).repeat_interleave(norms.shape[1])
    ranks = spearmanr(severity.numpy(), norms.detach().flatten().cpu().numpy())
    return float(ranks.statistic)
