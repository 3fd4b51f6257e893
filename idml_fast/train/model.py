"""The two-headed network, and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._files import written_whole
from ..metric import Metric
from .config import LossConfig, ModelConfig
from .criterion import Criterion

METADATA = "idml_fast"  # the entry of a model file that says how to build its network


class TwoHeaded(nn.Module):
    """A backbone with a semantic head and an uncertainty head.

    The semantic embedding is L2-normalised. The uncertainty embedding is not: of constant length it
    would get no gradient from the loss and mean nothing.

    Args:
        config: the backbone and the widths.
        channels: of the images.
        size: height and width of the images, in pixels.

    Attributes:
        parts: in how many parts, one after the other, images go through the backbone where a
            gradient is wanted. Each part goes through it once more for that, so that the
            activations of one part alone are held.

    Raises:
        SettingsError: timm has no such backbone for such images, or its weights cannot be had.
    """

    def __init__(self, config: ModelConfig, channels: int, size: Sequence[int]) -> None:
        super().__init__()
        self.config, self.channels, self.size = config, channels, tuple(size)
        if config.backbone == "small":
            self.trunk = _small(config.width, channels)
            features = 2 * config.width * 2 * 2
        else:
            from .vision import Backbone  # timm, which the digits do not need

            self.trunk = Backbone(config, channels, size)
            features = self.trunk.width
        self.sem = nn.Linear(features, config.sem_dim)
        self.unc = nn.Linear(features, config.unc_dim)
        self.parts = 1

    def forward(
        self,
        images: Tensor,  # [N, channels, height, width] in [0, 1]
    ) -> tuple[Tensor, Tensor]:
        """``(sem [N, Ds], unc [N, Du])`` of the images."""
        features = self.features(images)
        return F.normalize(self.sem(features), dim=1), self.unc(features)

    def features(
        self,
        images: Tensor,  # [N, channels, height, width] in [0, 1]
    ) -> Tensor:  # [N, F]
        """What both heads are given; ``model.sem`` makes of it the embedding before its length is
        normalised."""
        if self.parts == 1 or not torch.is_grad_enabled():
            return self.trunk(images)
        parts = images.chunk(self.parts)
        return torch.cat([checkpoint(self.trunk, part, use_reentrant=False) for part in parts])


def _small(width: int, channels: int) -> nn.Sequential:
    narrow, wide = width, 2 * width
    return nn.Sequential(
        *_convolution(channels, narrow),
        *_convolution(narrow, narrow),
        nn.MaxPool2d(2),
        *_convolution(narrow, wide),
        nn.MaxPool2d(2),
        *_convolution(wide, wide),
        nn.AdaptiveAvgPool2d(2),  # nothing to the digits; photographs would make heads of gigabytes
        nn.Flatten(),
    )


def _convolution(channels: int, out: int) -> tuple[nn.Module, ...]:
    # Group norm: no batch statistics, so an image's embedding depends on that image alone.
    groups = next(n for n in (4, 2, 1) if out % n == 0)
    return nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(groups, out), nn.ReLU()


def save(model: TwoHeaded, criterion: Criterion, path: Path) -> None:
    """Write the model as safetensors, with the metric and the network's configuration in the file's
    metadata.

    What the loss has learned and remembers is in the file too, its names beginning with ``loss.``
    and ``bank.``: `load_loss` finds it there.
    """
    described = {
        "model": {
            "config": asdict(model.config),
            "channels": model.channels,
            "size": model.size,
        },
        "loss": {"config": asdict(criterion.config), "num_classes": criterion.num_classes},
        "metric": asdict(criterion.loss.metric),
    }
    # One entry: the order of several is not the same from file to file.
    metadata = {METADATA: json.dumps(described)}
    with written_whole(path) as partial:
        state = {**model.state_dict(), **criterion.state_dict()}
        state = {name: x.contiguous() for name, x in state.items()}
        partial.write_bytes(to_bytes(state, metadata))


def load(path: str | Path) -> tuple[TwoHeaded, Metric]:
    """The model that a run has written, in evaluation mode on the CPU, and the metric it learned.

    Args:
        path: such as ``runs/digits/introspective.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by ``idml-fast train``.

    >>> model, metric = load("runs/digits/introspective.safetensors")  # doctest: +SKIP
    >>> sem, unc = model(images)  # doctest: +SKIP
    """
    described, state = _read(path)
    config = ModelConfig(**described["model"].pop("config"))
    # All weights are in this file: nothing is to be fetched, nor read from another one.
    config = replace(config, pretrained=False, weights=None)
    model = TwoHeaded(config, **described["model"])
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval(), Metric(**described["metric"])


def load_loss(path: str | Path) -> nn.Module:
    """The loss of a run with what it has learned: proxies, a boundary, or a classification head.

    Arguments and errors are those of `load`. In evaluation mode on the CPU.

    >>> path = "runs/softmax/introspective.safetensors"
    >>> (model, _), head = load(path), load_loss(path)  # doctest: +SKIP
    >>> classes = head.logits(model(images)[0]).argmax(1)  # doctest: +SKIP
    """
    described, state = _read(path)
    widths = (described["model"]["config"][name] for name in ("sem_dim", "unc_dim"))
    config = LossConfig(**described["loss"]["config"])
    num_classes = described["loss"]["num_classes"]
    criterion = Criterion(config, Metric(**described["metric"]), num_classes, *widths)
    criterion.load_state_dict({name: state[name] for name in criterion.state_dict()})
    return criterion.loss.eval()


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says of itself, and its tensors."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if METADATA not in metadata:
        raise ValueError(f"path must be a model that idml-fast train has written, got {path}")
    return json.loads(metadata[METADATA]), load_file(path)
