"""The images of a run, split by class or within the classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

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
    are, and the seed chooses which of their images are held out.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None]  # sixteen grey levels
    labels = torch.from_numpy(digits.target).long()
    if config.task == "classification":
        train, test = train_test_split(
            torch.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed
        )
        return Data(images[train], labels[train], images[test], labels[test])
    train_classes = torch.tensor(sorted(set(config.train_classes)))
    train = torch.isin(labels, train_classes)
    test = torch.isin(labels, torch.tensor(config.test_classes))
    return Data(
        images[train],
        torch.searchsorted(train_classes, labels[train]),
        images[test],
        labels[test],
    )
