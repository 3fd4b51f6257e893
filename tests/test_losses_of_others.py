"""The plain losses are those of pytorch-metric-learning."""

import pytest
import pytorch_metric_learning.losses as pml
import torch
from conftest import assert_equals_in_double
from pytorch_metric_learning import miners
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from test_losses import batch
from torch.nn.functional import normalize

from idml_fast import Metric, losses


class Mined(torch.nn.Module):
    """A loss of theirs behind a miner of theirs."""

    def __init__(self, loss, miner):
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings, labels, *, ref_emb=None, ref_labels=None):
        found = self.miner(embeddings, labels, ref_emb, ref_labels)
        return self.loss(embeddings, labels, found, ref_emb, ref_labels)


def mined(loss, miner):
    return lambda distance: Mined(loss(distance=distance), miner(distance=distance))


# Ours, the form of our metric, and theirs for a distance.
PEERS = {
    "contrastive": (
        losses.ContrastiveLoss,
        "distance",
        lambda distance: pml.ContrastiveLoss(distance=distance),
    ),
    "contrastive of cosines": (
        lambda metric: losses.ContrastiveLoss(pos_margin=0.9, neg_margin=0.2, metric=metric),
        "cosine",
        lambda distance: pml.ContrastiveLoss(0.9, 0.2, distance=distance),
    ),
    "multi-similarity": (
        losses.MultiSimilarityLoss,
        "cosine",
        lambda distance: pml.MultiSimilarityLoss(distance=distance),
    ),
    "multi-similarity of distances": (
        losses.MultiSimilarityLoss,
        "distance",
        lambda distance: pml.MultiSimilarityLoss(distance=distance),
    ),
    "nca": (
        lambda metric: losses.NCALoss(softmax_scale=3, metric=metric),
        "distance",
        lambda distance: pml.NCALoss(3, distance=distance),
    ),
    "nca of cosines": (losses.NCALoss, "cosine", lambda distance: pml.NCALoss(distance=distance)),
    "ntxent": (losses.NTXentLoss, "cosine", lambda distance: pml.NTXentLoss(distance=distance)),
    "ntxent of distances": (
        lambda metric: losses.NTXentLoss(temperature=0.2, metric=metric),
        "distance",
        lambda distance: pml.NTXentLoss(0.2, distance=distance),
    ),
    "supcon": (losses.SupConLoss, "cosine", lambda distance: pml.SupConLoss(distance=distance)),
    "supcon of distances": (
        losses.SupConLoss,
        "distance",
        lambda distance: pml.SupConLoss(distance=distance),
    ),
    "triplet": (
        losses.TripletMarginLoss,
        "distance",
        lambda distance: pml.TripletMarginLoss(distance=distance),
    ),
    "triplet of cosines": (
        losses.TripletMarginLoss,
        "cosine",
        lambda distance: pml.TripletMarginLoss(distance=distance),
    ),
    "hard triplets": (
        lambda metric: losses.TripletMarginLoss(mining="hard", metric=metric),
        "distance",
        mined(pml.TripletMarginLoss, miners.BatchHardMiner),
    ),
    "hard triplets of cosines": (
        lambda metric: losses.TripletMarginLoss(mining="hard", metric=metric),
        "cosine",
        mined(pml.TripletMarginLoss, miners.BatchHardMiner),
    ),
    "semi-hard triplets": (
        lambda metric: losses.TripletMarginLoss(margin=0.2, mining="semihard_all", metric=metric),
        "distance",
        mined(
            lambda distance: pml.TripletMarginLoss(0.2, distance=distance),
            lambda distance: miners.TripletMarginMiner(0.2, "semihard", distance=distance),
        ),
    ),
    "semi-hard triplets of cosines": (
        lambda metric: losses.TripletMarginLoss(margin=0.2, mining="semihard_all", metric=metric),
        "cosine",
        mined(
            lambda distance: pml.TripletMarginLoss(0.2, distance=distance),
            lambda distance: miners.TripletMarginMiner(0.2, "semihard", distance=distance),
        ),
    ),
    "margin": (  # theirs is rounded to float32
        lambda metric: losses.MarginLoss(beta=1.25, metric=metric),
        "distance",
        lambda distance: pml.MarginLoss(beta=1.25, distance=distance),
    ),
    "margin of cosines": (
        lambda metric: losses.MarginLoss(beta=0.375, metric=metric),
        "cosine",
        lambda distance: pml.MarginLoss(beta=0.375, distance=distance),
    ),
    "margin of each class": (
        lambda metric: losses.MarginLoss(num_classes=6, learn_beta=True, metric=metric),
        "distance",
        lambda distance: pml.MarginLoss(num_classes=6, learn_beta=True, distance=distance),
    ),
    "mined multi-similarity": (
        lambda metric: losses.MultiSimilarityLoss(epsilon=0.1, metric=metric),
        "cosine",
        mined(
            pml.MultiSimilarityLoss,
            lambda distance: miners.MultiSimilarityMiner(0.1, distance=distance),
        ),
    ),
    "mined multi-similarity of distances": (
        lambda metric: losses.MultiSimilarityLoss(epsilon=0.1, metric=metric),
        "distance",
        mined(
            pml.MultiSimilarityLoss,
            lambda distance: miners.MultiSimilarityMiner(0.1, distance=distance),
        ),
    ),
}
# These compare a batch with itself only, over there.
ALONE = {
    "fast_ap": (
        losses.FastAPLoss,
        "distance",
        lambda distance: pml.FastAPLoss(distance=LpDistance(power=2)),
    ),
    "n-pair": (losses.NPairsLoss, "cosine", lambda distance: pml.NPairsLoss(distance=distance)),
}
DISTANCES = {"distance": lambda: LpDistance(normalize_embeddings=False), "cosine": CosineSimilarity}


@pytest.mark.parametrize("name", PEERS | ALONE)
def test_plain_losses_are_those_of_pytorch_metric_learning(name):
    make, form, peer = (PEERS | ALONE)[name]
    ours, theirs = make(metric=Metric.plain(form)).double(), peer(DISTANCES[form]()).double()
    sem, _, labels = batch()
    x = sem.clone().requires_grad_()
    value = theirs(normalize(x), labels)
    parameters = list(theirs.parameters())
    gradients = torch.autograd.grad(value, [x, *parameters])
    found = evaluate_plain(ours, sem, labels)
    names = ["value", "sem", *(k for k, _ in theirs.named_parameters())]
    for what, x, y in zip(names, found, [value.detach(), *gradients], strict=True):
        assert_equals_in_double(what, x, y)


@pytest.mark.parametrize("name", PEERS)
def test_plain_losses_against_columns_are_those_of_pytorch_metric_learning(name):
    make, form, peer = PEERS[name]
    ours, theirs = make(metric=Metric.plain(form)).double(), peer(DISTANCES[form]()).double()
    sem, _, labels = batch()
    columns, _, labels2 = batch(40, seed=1)
    x = sem.clone().requires_grad_()
    value = theirs(normalize(x), labels, ref_emb=columns, ref_labels=labels2)
    found = evaluate_plain(ours, sem, labels, columns, None, labels2)
    assert_equals_in_double("value", found[0], value.detach())
    assert_equals_in_double("sem", found[1], torch.autograd.grad(value, x)[0])


def evaluate_plain(loss, sem, *others):
    """Value and gradients of a loss that does not read the uncertainties.

    Some of theirs normalise whatever they are given, so that both are given it normalised.
    """
    x = sem.clone().requires_grad_()
    labels, *columns = others
    value = loss(normalize(x), None, labels, *columns)
    return [value.detach(), *torch.autograd.grad(value, [x, *loss.parameters()])]
