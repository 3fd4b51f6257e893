"""The images of a run, split by class or within the classes, and the damage done to them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..evaluation import CORRUPTIONS
from .config import DataConfig

HELD_OUT = 0.25  # of the images of each class, if all classes are learned


class Data(NamedTuple):
    """Images in [0, 1] and their labels: to learn from, and to be judged by."""

    train_images: Tensor  # [N, channels, height, width] float32
    train_labels: Tensor  # [N] int64, 0 .. number of classes - 1
    test_images: Tensor  # [M, channels, height, width] float32
    test_labels: Tensor  # [M] int64, as the data set counts them


def load_data(config: DataConfig, seed: int = 0) -> Data:
    """The data set of that name; ``digits`` comes with scikit-learn, so nothing is downloaded.

    For retrieval it is split zero-shot: no class is on both sides. For classification all classes
    are, and the seed chooses which of their images are held out. It also chooses which training
    images are damaged, if the configuration says that some are.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None]  # sixteen grey levels
    labels = torch.from_numpy(digits.target).long()
    if config.task == "classification":
        train, test = train_test_split(
            torch.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed
        )
        classes = labels.unique()
    else:
        classes = torch.tensor(sorted(set(config.train_classes)))
        train = torch.isin(labels, classes)
        test = torch.isin(labels, torch.tensor(config.test_classes))
    learned = torch.searchsorted(classes, labels[train])
    return Data(*damaged(images[train], learned, config, seed), images[test], labels[test])


def damaged(
    images: Tensor,  # [N, channels, height, width]
    labels: Tensor,  # [N] int64, 0 .. number of classes - 1
    config: DataConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Copies of the images and labels with ``config``'s shares of them damaged.

    Mixed first, by the true labels, then blurred; an image may meet with more than one damage. Each
    kind has its own random numbers: none changes which images another one takes.
    """
    images, labels, truth = images.clone(), labels.clone(), labels.numpy()
    shares = config.mixed, config.blurred, config.label_noise
    draws = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)]
    mixed, blurred, relabelled = (
        torch.from_numpy(draw.permutation(len(truth))[: round(share * len(truth))])
        for share, draw in zip(shares, draws, strict=True)
    )
    others = [draws[0].choice(np.flatnonzero(truth != truth[i])) for i in mixed]
    images[mixed] = (images[mixed] + images[others]) / 2  # the right side is all still undamaged
    for severity, chosen in enumerate(blurred.tensor_split(5), start=1):
        images[chosen] = CORRUPTIONS["blur"](images[chosen], severity)
    # A step of 1 .. C - 1 around the circle of the classes: every other one is as likely.
    count = labels.unique().numel()
    steps = draws[2].integers(1, count, len(relabelled))
    labels[relabelled] = (labels[relabelled] + torch.from_numpy(steps)) % count
    return images, labels
