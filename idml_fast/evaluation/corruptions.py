"""Images made worse on purpose: five kinds of damage, each in five degrees, always the same.

The kinds are chosen so that no single change of an image's statistics goes with all of them: blur
and crop take detail away, noise adds it, occlusion takes content, contrast takes the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
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


def crop(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    severity: int,
) -> Tensor:
    """The centre, enlarged again to the whole size: 0.9, 0.8, 0.7, 0.6, 0.5 of either side.

    Bilinear, so that the part need not be a whole number of pixels.
    """
    share = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)[severity]
    if share == 1:
        return images
    centred = torch.diag(torch.tensor([share, share, 0.0]))[:2].to(images)
    grid = F.affine_grid(centred.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def contrast(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    severity: int,
) -> Tensor:
    """Towards the mean of each channel: 0.75, 0.5, 0.35, 0.2, 0.1 of the differences from it."""
    share = (1.0, 0.75, 0.5, 0.35, 0.2, 0.1)[severity]
    if share == 1:
        return images
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + share * (images - mean)


CORRUPTIONS = {
    "blur": blur,
    "noise": noise,
    "occlusion": occlusion,
    "crop": crop,
    "contrast": contrast,
}


def shuffled(
    images: Tensor,  # [N, C, H, W]
) -> Tensor:
    """Out-of-distribution images from those that are there: their pixels in another, fixed order.

    The order is the same for all images. Each keeps its grey levels, hence its brightness and
    contrast, and the images differ from each other as much as before, so neither gives them away;
    but no neighbour of a pixel is its neighbour any more, and nothing is left that any class, seen
    or unseen, is drawn with. Two images laid over each other, the other obvious choice, would have
    more ink than either, and are what a network sees that is trained with mixed images.
    """
    pixels = images.flatten(2)
    order = torch.randperm(pixels.shape[2], generator=torch.Generator().manual_seed(0))
    return pixels[:, :, order.to(images.device)].reshape(images.shape)


def corrupted(
    measure: Callable[[Tensor], Mapping[str, Tensor]],
    images: Tensor,  # [N, C, H, W] in [0, 1]
) -> dict[str, dict[str, Tensor]]:
    """Uncertainties of every image at every severity of every corruption.

    Args:
        measure: takes images, gives ``[N]`` numbers by name, larger for a less certain image. It is
            called once with the clean images and once with each damage, whatever it names.
        images: ``[N, C, H, W]`` float in [0, 1], before any normalisation.

    Returns:
        By name, then by corruption: ``[6, N]``, row 0 the clean images and rows 1 to 5 rising
        severity.
    """
    clean, damages = measure(images), SEVERITIES[1:]
    found: dict[str, dict[str, Tensor]] = {name: {} for name in clean}
    for kind, corrupt in CORRUPTIONS.items():
        measured = [clean, *(measure(corrupt(images, severity)) for severity in damages)]
        for name, kinds in found.items():
            kinds[kind] = torch.stack([numbers[name] for numbers in measured])
    return found


def corrupted_norms(
    embed: Callable[[Tensor], tuple[Tensor, Tensor]],
    images: Tensor,  # [N, C, H, W] in [0, 1]
) -> dict[str, Tensor]:
    """``||u||`` of every image at every severity of every corruption.

    Args:
        embed: takes images, gives ``(sem, unc)``, as a model does.
        images: ``[N, C, H, W]`` float in [0, 1], before any normalisation.

    Returns:
        By corruption: ``[6, N]``, row 0 the clean images and rows 1 to 5 rising severity.
    """
    return corrupted(lambda batch: {"norm": embed(batch)[1].norm(dim=1)}, images)["norm"]
