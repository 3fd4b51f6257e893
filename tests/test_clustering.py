"""Clustering, by hand and against scikit-learn's k-means."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("faiss", reason="the extra idml_fast[train] is not installed")

from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from idml_fast.evaluation import clustering

CENTRES = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
LABELS = torch.arange(3).repeat_interleave(20)
NOISE = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))


def test_clear_clusters():
    sem = CENTRES[LABELS] + 0.1 * NOISE
    everything = {"nmi": 1, "ami": 1, "f1": 1}
    assert clustering(sem, LABELS, starts=5) == pytest.approx(everything)
    assert clustering(sem, 2 - LABELS, starts=5) == pytest.approx(everything)  # names do not matter


def test_clusters_that_mean_nothing():
    shuffled = LABELS[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    found = clustering(CENTRES[LABELS] + 0.1 * NOISE, shuffled, starts=5)
    assert found["nmi"] < 0.2
    assert abs(found["ami"]) < 0.1
    assert found["f1"] < 0.5


def test_by_hand():
    # Clusters {0, 1} and {2, 3}; labels a a a b. Entropies in nats:
    entropy_labels = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    entropy_clusters = math.log(2)
    mutual = (
        0.5 * math.log(0.5 / (0.75 * 0.5))
        + 0.25 * math.log(0.25 / (0.75 * 0.5))
        + 0.25 * math.log(0.25 / (0.25 * 0.5))
    )
    # By chance: a cluster of two has the one b with probability 1/2, and then so on for the other;
    # whichever it is, one cluster is a a and the other a b, so that chance does as well.
    sem = torch.tensor([[0.0], [0.1], [9.0], [9.1]])
    found = clustering(sem, torch.tensor([0, 0, 0, 1]), starts=3)
    assert found["nmi"] == pytest.approx(mutual / ((entropy_labels + entropy_clusters) / 2))
    assert found["ami"] == pytest.approx(0, abs=1e-12)
    # Of the two pairs in a cluster one is of a class; of the three of a class one is in a cluster.
    assert found["f1"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


def test_f1_counts_pairs():
    sem = NOISE
    found = clustering(sem, LABELS, seed=3)
    # The same seed gives the same clusters: found again as the labels of a perfect clustering.
    assert clustering(sem, LABELS, seed=3) == found
    assert 0 < found["f1"] < 1


def test_no_pair_is_right():
    assert clustering(torch.tensor([[0.0], [0.1]]), torch.tensor([4, 7]))["f1"] == 0


def test_as_good_as_the_k_means_of_scikit_learn():
    digits = load_digits()
    sem, labels = torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target)
    theirs = KMeans(10, n_init=4, random_state=0).fit_predict(digits.data)
    right = sum(
        theirs[i] == theirs[j] and digits.target[i] == digits.target[j]
        for i, j in itertools.combinations(range(0, 1797, 6), 2)
    )
    assert right > 0
    found = clustering(sem, labels, starts=4)
    from sklearn.metrics import normalized_mutual_info_score

    assert found["nmi"] == pytest.approx(
        normalized_mutual_info_score(digits.target, theirs), abs=0.03
    )


def test_a_bar_counts_iterations(capsys):
    clustering(NOISE, LABELS, progress=True, iterations=3)
    assert "k-means" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 2), torch.zeros(2).long()), r"labels must have shape \[3\] like sem"),
        ((torch.ones(0, 2), torch.zeros(0).long()), "sem must hold at least one item, got none"),
        ((torch.tensor([[1.0], [math.nan]]), torch.zeros(2).long()), "got nan in row 1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        clustering(*arguments)
