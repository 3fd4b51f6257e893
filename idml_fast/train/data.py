"""The images of a run, split by class."""

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
    """The data set of that name; ``digits`` comes with scikit-learn, so nothing is downloaded."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None]  # sixteen grey levels
    labels = torch.from_numpy(digits.target).long()
    train_classes = torch.tensor(sorted(set(config.train_classes)))
    train = torch.isin(labels, train_classes)
    test = torch.isin(labels, torch.tensor(config.test_classes))
    return Data(
        images[train],
        torch.searchsorted(train_classes, labels[train]),
        images[test],
        labels[test],
    )
