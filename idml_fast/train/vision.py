"""What image files are trained with: transforms of torchvision, networks and weights of timm.

Needs the extra ``idml_fast[vision]``; what trains on the digits does not import this.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .config import ModelConfig
from .criterion import SettingsError
from .datasets.files import some
from .images import load_image, load_part

try:
    import timm
    from timm.data import resolve_model_data_config
    from timm.layers import convert_sync_batchnorm
    from timm.models import load_state_dict
    from torchvision.transforms import v2
except RuntimeError as error:  # torchvision's operators do not find those of torch
    raise SettingsError(
        f"torchvision must be built for torch {torch.__version__}, got another one: {error}"
    ) from error

POOLINGS = {
    "avgmax": lambda x, places: x.mean(places) + x.amax(places),
    "avg": lambda x, places: x.mean(places),
    "max": lambda x, places: x.amax(places),
}


def transforms(resize: int, size: int) -> tuple[v2.Compose, v2.Compose]:
    """What makes ``[3, size, size]`` of an image file: varied at random, to learn from it, and
    plain, to judge by it.

    The first is uint8, a quarter of the bytes to be sent to the trainer and to its GPU, where
    `to_float` makes real numbers of it; the second is float32 in [0, 1].

    Nothing is normalised: a network does that itself, as its weights want it.

    Args:
        resize: the shorter side, in pixels, of which the plain one then cuts out the centre.
        size: of the result, in pixels.
    """
    varied = partial(load_part, crop=v2.RandomResizedCrop(size)), v2.RandomHorizontalFlip()
    # A JPEG may be decoded at twice the size that is asked for: the resize sees to the rest.
    plain = partial(load_image, at_least=2 * resize), v2.Resize(resize), v2.CenterCrop(size)
    scaled = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*varied, v2.PILToTensor()]), v2.Compose([*plain, v2.PILToTensor(), scaled])


class Backbone(nn.Module):
    """A network of timm without its classifier, and the pooling of its feature map.

    Args:
        config: says which, and where its weights are from.
        channels: of the images: 3.
        size: height and width of the images, in pixels.

    Raises:
        SettingsError: there is no such network, it takes no such images, it has no feature map to
            pool, or its weights cannot be had.
    """

    def __init__(self, config: ModelConfig, channels: int, size: Sequence[int]) -> None:
        super().__init__()
        self.pooling, self.freeze_norm = config.pooling, config.freeze_norm
        self.network = network(config)
        about = resolve_model_data_config(self.network)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(about[name])[:, None, None])
        try:
            with torch.no_grad():
                features = self.eval().unpooled(torch.zeros(1, channels, *size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise SettingsError(
                f"data.image_size must suit {config.backbone}, got {size[0]}: {error}"
            ) from error
        self.width = features.shape[1] if self.pooling == "own" else self.network.num_features
        self.places = self._places(config.backbone, features.shape)
        if self.freeze_norm:
            for norm in self._norms():
                norm.requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # as convolutions are the fastest
        self.train()

    def forward(
        self,
        images: Tensor,  # [N, 3, height, width] in [0, 1]
    ) -> Tensor:  # [N, width]
        features = self.unpooled(images)
        return POOLINGS[self.pooling](features, self.places) if self.places else features

    def unpooled(
        self,
        images: Tensor,  # [N, 3, height, width] in [0, 1]
    ) -> Tensor:
        """The feature map; or, if the network pools it by itself, its features, ``[N, width]``."""
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        own = self.pooling == "own"
        return self.network(images) if own else self.network.forward_features(images)

    def train(self, mode: bool = True) -> Backbone:
        """As of any module, but that frozen batch norms stay as they are."""
        super().train(mode)
        if self.freeze_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def synchronise_norms(self) -> None:
        """From now on batch norms take their statistics over all processes.

        Some of timm's have an activation in them, which PyTorch's own conversion would drop.
        """
        self.network = convert_sync_batchnorm(self.network)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, _BatchNorm)]

    def _places(self, name: str, shape: torch.Size) -> tuple[int, int] | None:
        """Which dimensions of the feature map are places; None: it is not pooled here."""
        if self.pooling == "own":
            return None
        if len(shape) == 4 and self.width in (shape[1], shape[3]):
            return (2, 3) if shape[1] == self.width else (1, 2)
        raise SettingsError(
            f"model.pooling must be own for {name}, whose features {list(shape)} are no map, "
            f"got {self.pooling}"
        )


def network(config: ModelConfig) -> nn.Module:
    """The network without its classifier, and with its weights.

    Raises:
        SettingsError: there is no such network, or its weights cannot be had.
    """
    name, fetched = config.backbone, config.pretrained and config.weights is None
    if not timm.is_model(name):
        raise SettingsError(f"model.backbone must be small or a network of timm, got {name}")
    try:
        found = timm.create_model(name, pretrained=fetched, num_classes=0)
    except Exception as error:  # there is no end to what a connection may raise
        why = " ".join(str(error).split()) or type(error).__name__
        if not fetched:
            raise SettingsError(f"model.backbone cannot be {name}: {why}") from error
        raise SettingsError(
            f"the weights of {name} cannot be had: give them with --model.weights FILE, or begin "
            f"with random ones, --model.pretrained false ({why})"
        ) from error
    if config.weights is not None:
        fill(found, name, Path(config.weights))
    return found


def fill(found: nn.Module, name: str, path: Path) -> None:
    """Give the network the weights that are in a file; no code in it is run.

    Raises:
        SettingsError: the file cannot be read, or its weights are not those of this network. A
            classifier may be among them.
    """
    if not path.is_file():
        raise SettingsError(f"model.weights must be a file, got {path}")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # nor is there to what readers raise on foreign bytes
        why = str(error).partition("\n")[0] or type(error).__name__
        raise SettingsError(
            f"model.weights must be weights in safetensors or PyTorch's format, got {path}: {why}"
        ) from error
    classifiers = found.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    left_out = tuple(f"{classifier}." for classifier in classifiers)
    state = {key: x for key, x in state.items() if not key.startswith(left_out)}
    try:
        missing, foreign = found.load_state_dict(state, strict=False)
    except RuntimeError as error:  # its first line is a heading
        raise _other_weights(name, path, str(error).splitlines()[1].strip()) from error
    if missing:
        raise _other_weights(name, path, f"there is no {some(missing)}")
    if foreign:
        raise _other_weights(name, path, f"it has no {some(foreign)}")


def _other_weights(name: str, path: Path, why: str) -> SettingsError:
    return SettingsError(f"model.weights must be those of {name}, got {path}: {why}")
