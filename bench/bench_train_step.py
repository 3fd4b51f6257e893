"""A training step: what the loss takes of it, and whether image files are read as fast.

The same network, a ResNet with the two heads that `idml-fast train` gives it, learns the same batch
with our Proxy-Anchor; with the authors' expression as they released it, its scores dense and its
labels made binary by scikit-learn on the CPU (but not printed); and with that of
pytorch-metric-learning, which compares the semantic embeddings alone. "network" has no loss: its
gradient is given. Image files are read, varied and batched for it by ours, as bytes, of which the
trainer makes real numbers on the device, and by the usual code, as real numbers.
"""

import sys
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import race
import rivals
import torch
from machine import ROOT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from idml_fast import Metric
from idml_fast.losses import ProxyAnchorLoss

sys.path.append(str(ROOT / "tests"))
import any_torchvision

if "torchvision" not in sys.modules:
    any_torchvision.define_missing_operators()
pytest.importorskip("torchvision", reason="the extra idml_fast[vision] is not installed")
pytest.importorskip("timm", reason="the extra idml_fast[vision] is not installed")
pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")
pytest.importorskip("pytorch_metric_learning", reason="the peer is not installed")

from PIL import Image
from pytorch_metric_learning import losses as pml
from torchvision.transforms import v2

from idml_fast.train.config import ModelConfig
from idml_fast.train.datasets import Listing
from idml_fast.train.images import Images
from idml_fast.train.model import TwoHeaded
from idml_fast.train.vision import transforms

METRIC = Metric.paper("cosine")
BATCH = 120
PROXIES = {"CUB-200-2011": 100, "Stanford Online Products": 11_318}
SMALL, LARGE = ("test_resnet", 64), ("resnet50", 224)  # networks, and the side of their images
MARGIN, ALPHA = 0.1, 32  # as the released loss has them
STEP_BARS = {
    "CUB-200-2011": {"released": 1.1, "pml": 1.1},
    "Stanford Online Products": {"released": 0.9, "pml": 1.1},
}
PHOTOGRAPHS = {(500, 375): 1.1, (1600, 1200): 0.85}  # sizes; the most that ours takes of the usual
FILES, READ = 8, 64  # different image files, and how many are read a call
PATHS = tuple(f"{number}.jpg" for number in range(FILES))


@pytest.mark.parametrize("name", PROXIES)
def test_step(race_case, name):
    race_case(step_case(name, *SMALL, bars=STEP_BARS[name]))


@pytest.mark.parametrize("name", PROXIES)
def test_step_of_a_large_network(race_case, full, name):
    if not full:
        pytest.skip(f"training step, {LARGE[0]}, {name}: this takes minutes: --full")
    race_case(step_case(name, *LARGE, rounds=0))


def step_case(name: str, backbone: str, side: int, **rest) -> race.Case:
    return race.Case(
        title=f"training step, {backbone} at {side} x {side}, {BATCH} images, "
        f"{PROXIES[name]} proxies ({name})",
        build=partial(steps, backbone=backbone, side=side),
        shape=(BATCH, PROXIES[name]),
        peers=("released", "pml", "network"),
        flop=0,
        images=BATCH,
        **rest,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", PHOTOGRAPHS, ids=lambda size: "x".join(map(str, size)))
def test_loading(race_case, size, workers):
    race_case(
        race.Case(
            title=f"reading {READ} JPEG files of {size[0]} x {size[1]} to learn 224 x 224 of them, "
            f"{workers} workers",
            build=partial(readers, workers=workers),
            shape=size,
            peers=("usual",),
            flop=0,
            images=READ,
            rounds=3,
            bars={"usual": PHOTOGRAPHS[size]} if workers == 0 else {},
        )
    )


class Released(nn.Module):
    def __init__(self, proxies: Tensor) -> None:
        super().__init__()
        self.proxies = nn.Parameter(proxies.clone())

    def forward(self, sem: Tensor, unc: Tensor, labels: Tensor) -> Tensor:
        return rivals.released(sem, unc, labels, self.proxies)


class Plain(nn.Module):
    """That of pytorch-metric-learning, which has no uncertainty."""

    def __init__(self, proxies: Tensor) -> None:
        super().__init__()
        self.loss = pml.ProxyAnchorLoss(*proxies.shape, margin=MARGIN, alpha=ALPHA)
        self.loss.proxies.data.copy_(proxies)

    def forward(self, sem: Tensor, unc: Tensor, labels: Tensor) -> Tensor:
        return self.loss(sem, labels)


class NoLoss(nn.Module):
    """Its proxies are the optimiser's, as those of the others are."""

    def __init__(self, proxies: Tensor) -> None:
        super().__init__()
        self.proxies = nn.Parameter(proxies.clone())

    def forward(self, sem: Tensor, unc: Tensor, labels: Tensor) -> Tensor:
        return sem.sum() + unc.sum() + self.proxies.sum()


def ours(proxies: Tensor, metric: Metric) -> ProxyAnchorLoss:
    loss = ProxyAnchorLoss(*proxies.shape, margin=MARGIN, alpha=ALPHA, metric=metric)
    loss.proxies.data.copy_(proxies)
    return loss


def steps(
    batch: int,
    classes: int,
    peers: tuple[str, ...],
    *,
    backbone: str,
    side: int,
    metric: Metric = METRIC,
) -> race.Contestants:
    """Forward, backward and AdamW; each has a copy of the network."""
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, pretrained=False, freeze_norm=False)
    network = TwoHeaded(config, 3, (side, side))
    images, labels = torch.rand(batch, 3, side, side), torch.randint(classes, (batch,))
    proxies = F.normalize(torch.randn(classes, config.sem_dim))
    made = {"released": Released, "pml": Plain, "network": NoLoss}
    criteria = {"ours": ours(proxies, metric)} | {peer: made[peer](proxies) for peer in peers}

    def contestant(network: nn.Module, loss: nn.Module) -> race.Call:
        learning = torch.optim.AdamW([*network.parameters(), *loss.parameters()], lr=1e-4)

        def step() -> tuple[Tensor]:
            value = loss(*network(images), labels)
            value.backward()
            learning.step()
            learning.zero_grad()
            return (value.detach(),)

        return step

    return {who: contestant(deepcopy(network), loss) for who, loss in criteria.items()}


def readers(width: int, height: int, peers: tuple[str, ...], *, workers: int) -> race.Contestants:
    """Batches of image files; processes that read are started once."""
    root = Path(photographs(width, height).name)
    listing = Listing(PATHS * (READ // FILES), np.arange(READ), tuple(map(str, range(READ))))
    sets = {"ours": Images(root, listing, transforms(256, 224)[0]), "usual": Usual(root)}

    def contestant(images: Dataset) -> race.Call:
        # Processes that are forked have what was done to make torchvision importable.
        several = {"persistent_workers": True, "multiprocessing_context": "fork"}
        loader = DataLoader(images, 16, num_workers=workers, **(several if workers else {}))

        def read() -> tuple[Tensor, ...]:
            for _ in loader:
                pass
            return ()

        return read

    return {who: contestant(sets[who]) for who in ("ours", *peers)}


class Usual(Dataset):
    """As in most training code."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(224),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return READ

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        with Image.open(self.root / PATHS[index % FILES]) as image:
            return self.transform(image.convert("RGB")), index, index


@cache
def photographs(width: int, height: int) -> TemporaryDirectory:
    """Files of noise at every scale, the coarser the stronger, as in nature: a quarter of a byte a
    pixel as JPEG. They last as long as the process."""
    folder = TemporaryDirectory()
    for number, path in enumerate(PATHS):
        draw = np.random.default_rng(number)
        total = np.zeros((height, width, 3), np.float32)
        for scale in (1, 2, 4, 8, 16, 32, 64):
            shape = -(-height // scale), -(-width // scale), 3
            noise = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))
            total += scale**0.75 * (np.asarray(noise.resize((width, height))) - 127.5)
        total = 127.5 + 50 * total / total.std()
        image = Image.fromarray(total.clip(0, 255).astype(np.uint8))
        image.save(Path(folder.name) / path, quality=90)
    return folder
