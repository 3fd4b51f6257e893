"""Every loss beside the one of pytorch-metric-learning on our dense distance.

Both compare a batch with itself (the losses with proxies: with the proxies), four items of each
class. Theirs has the N x M scores from `idml_fast.pairwise`, so that what differs is the loss.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import race
import rivals
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idml_fast import losses

pml = pytest.importorskip(
    "pytorch_metric_learning.losses",
    reason="pytorch_metric_learning is not installed; the extra `bench` has it",
)
miners = pytest.importorskip("pytorch_metric_learning.miners")
interop = pytest.importorskip("idml_fast.interop")

D = 512  # width of both embeddings
OF_A_CLASS = 4
MEDIAN = race.Median("losses", "pml", time=0.5, memory=0.1)


def distance(power: int = 1) -> nn.Module:
    return interop.IntrospectiveDistance(D, power=power)


def similarity() -> nn.Module:
    return interop.IntrospectiveSimilarity(D)


class Mined(nn.Module):
    """A loss of theirs on the tuples that a miner of theirs finds."""

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


# Ours and theirs, each made for a number of classes.
LOSSES: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "Proxy-Anchor": (
        lambda classes: losses.ProxyAnchorLoss(classes, D, proxy_unc="learned"),
        lambda classes: pml.ProxyAnchorLoss(classes, 2 * D, distance=similarity()),
    ),
    "Proxy-NCA": (
        lambda classes: losses.ProxyNCALoss(classes, D, proxy_unc="learned"),
        lambda classes: pml.ProxyNCALoss(classes, 2 * D, distance=distance(power=2)),
    ),
    "Multi-Similarity": (
        lambda _: losses.MultiSimilarityLoss(),
        lambda _: pml.MultiSimilarityLoss(distance=similarity()),
    ),
    "Multi-Similarity, mined": (
        lambda _: losses.MultiSimilarityLoss(epsilon=0.1),
        lambda _: Mined(
            pml.MultiSimilarityLoss(distance=similarity()),
            miners.MultiSimilarityMiner(0.1, distance=similarity()),
        ),
    ),
    "Contrastive": (
        lambda _: losses.ContrastiveLoss(),
        lambda _: pml.ContrastiveLoss(distance=distance()),
    ),
    "Triplet, hard": (
        lambda _: losses.TripletMarginLoss(mining="hard"),
        lambda _: Mined(
            pml.TripletMarginLoss(distance=distance()), miners.BatchHardMiner(distance=distance())
        ),
    ),
    "FastAP": (
        lambda _: losses.FastAPLoss(),
        lambda _: pml.FastAPLoss(distance=distance(power=2)),
    ),
    "N-pair": (lambda _: losses.NPairsLoss(), lambda _: pml.NPairsLoss(distance=similarity())),
    "NCA": (lambda _: losses.NCALoss(), lambda _: pml.NCALoss(distance=distance())),
    "SupCon": (lambda _: losses.SupConLoss(), lambda _: pml.SupConLoss(distance=similarity())),
    "Triplet, all": (
        lambda _: losses.TripletMarginLoss(),
        lambda _: pml.TripletMarginLoss(distance=distance()),
    ),
    "Triplet, semi-hard": (
        lambda _: losses.TripletMarginLoss(margin=0.2, mining="semihard_all"),
        lambda _: Mined(
            pml.TripletMarginLoss(0.2, distance=distance()),
            miners.TripletMarginMiner(0.2, "semihard", distance=distance()),
        ),
    ),
    "Margin, all": (
        lambda _: losses.MarginLoss(),
        lambda _: pml.MarginLoss(distance=distance()),
    ),
    "Margin, distance-weighted": (
        lambda _: losses.MarginLoss(sampling="distance_weighted"),
        lambda _: Mined(
            pml.MarginLoss(distance=distance()), miners.DistanceWeightedMiner(distance=distance())
        ),
    ),
    "NT-Xent": (lambda _: losses.NTXentLoss(), lambda _: pml.NTXentLoss(distance=similarity())),
}
DRAWN = {"Margin, distance-weighted"}  # theirs draws class by class; draws are not compared
# Of theirs, which lists tuples of items, and takes as many numbers for each.
COSTS = {
    "Multi-Similarity, mined": rivals.Cost(8, 12),
    **dict.fromkeys(("Triplet, all", "Triplet, semi-hard", "Margin, all"), rivals.Cost(12, 30)),
    "FastAP": rivals.Cost(18, 30),
    "Margin, distance-weighted": rivals.Cost(150, 12),
}
ALONE = {"NT-Xent"}  # theirs has a matrix of positive x negative pairs: 206 GB at 4096 rows


TRUTH = 512  # items, of which the results are compared


@pytest.mark.parametrize("name", LOSSES)
def test_loss(race_case, rows, full, name):
    classes = rows // OF_A_CLASS
    # Two Gram products forward and two gradients of each; of rows against themselves both gradients
    # are one product. The N-pair loss takes one pair of each class.
    pairs = rows * (classes if name.startswith("Proxy") else rows)
    pairs = classes * classes if name == "N-pair" else pairs
    products = 6 if name.startswith(("Proxy", "N-pair")) else 4
    race_case(
        race.Case(
            title=f"{name}, forward + backward, fp32, {rows} items of {classes} classes, D = {D}",
            build=partial(contestants, name=name),
            shape=(rows,),
            peers=() if name in ALONE else ("pml",),
            flop=products * 2.0 * pairs * D,
            pairs=pairs,
            costs={"pml": COSTS.get(name, rivals.COSTS["pml"])},
            truth=None if name in DRAWN else (TRUTH,),
            median=MEDIAN if full and rows == 4096 and name not in ALONE else None,  # over all
        )
    )


def contestants(n: int, peers: tuple[str, ...], *, name: str) -> race.Contestants:
    torch.manual_seed(0)
    sem, unc = F.normalize(torch.randn(n, D)), torch.randn(n, D) / D**0.5
    labels = torch.arange(n) // OF_A_CLASS
    ours, theirs = (make(len(labels) // OF_A_CLASS) for make in LOSSES[name])
    items = [sem.requires_grad_(), unc.requires_grad_()]
    if hasattr(theirs, "proxies"):
        theirs.proxies.data.copy_(interop.join(ours.proxies, ours.proxies_unc))

    def step(loss: nn.Module, join: bool, sem: Tensor, unc: Tensor) -> tuple[Tensor, ...]:
        # Their distance normalises what it is given: here ours too, or gradients would differ.
        items = sem, unc
        value = loss(*([interop.join(*items)] if join else (F.normalize(sem), unc)), labels)
        return (value.detach(), *torch.autograd.grad(value, [*items, *loss.parameters()]))

    build = {
        "truth": lambda: rivals.truth(partial(step, deepcopy(ours).double(), False), items),
        "pml": lambda: partial(step, theirs, True, *items),
    }
    return {"ours": partial(step, ours, False, *items)} | {peer: build[peer]() for peer in peers}
