"""The images: one function a data set, each giving the same four tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from .config import DataConfig


class Data(NamedTuple):
    """Images in [0, 1] and their labels, split zero-shot: no class is on both sides."""

    train_images: Tensor  # [N, channels, height, width] float32
    train_labels: Tensor  # [N] int64, 0 .. number of classes - 1
    test_images: Tensor  # [M, channels, height, width] float32
    test_labels: Tensor  # [M] int64, as the data set counts them


def load_data(config: DataConfig) -> Data:
    """The data set of that name; ``digits`` comes with scikit-learn, so nothing is downloaded.

    Raises:
        ValueError: a class that the data set does not have, or fewer than two to train on.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None]  # sixteen grey levels
    labels = torch.from_numpy(digits.target).long()
    known = labels.unique().tolist()
    for name in ("train_classes", "test_classes"):
        classes = getattr(config, name)
        if len(set(classes)) < 2 or not set(classes) <= set(known):
            raise ValueError(f"data.{name} must be two or more of {known}, got {classes}")
    train_classes = torch.tensor(sorted(set(config.train_classes)))
    train = torch.isin(labels, train_classes)
    test = torch.isin(labels, torch.tensor(config.test_classes))
    return Data(
        images[train],
        torch.searchsorted(train_classes, labels[train]),
        images[test],
        labels[test],
    )
