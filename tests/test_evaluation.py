"""The evaluation, against examples worked by hand and against brute force."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn", reason="the extra idml_fast[train] is not installed")

from idml_fast.evaluation import (
    map_at_r,
    nmi,
    r_precision,
    recall_at_k,
    retrieval,
)

# Two queries: three relevant items found at ranks 1, 3, 5 and one found at rank 2.
RELEVANT = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
TOTAL = torch.tensor([3, 1])


def brute_force(sem, labels, sem2=None, labels2=None, ks=(1, 2, 4, 8)):
    """Every definition, query by query, in plain Python."""
    itself = sem2 is None
    sem2, labels2 = (sem, labels) if itself else (sem2, labels2)
    found = {f"recall_at_{k}": [] for k in ks} | {"r_precision": [], "map_at_r": []}
    for i in range(len(sem)):
        others = [j for j in range(len(sem2)) if not (itself and i == j)]
        others.sort(key=lambda j: ((sem[i] - sem2[j]).norm().item(), j))
        hits = [int(labels2[j] == labels[i]) for j in others]
        r = sum(hits)
        if r == 0:
            continue
        for k in ks:
            found[f"recall_at_{k}"].append(any(hits[:k]))
        found["r_precision"].append(sum(hits[:r]) / r)
        found["map_at_r"].append(sum(hits[n] * sum(hits[: n + 1]) / (n + 1) for n in range(r)) / r)
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_recall_by_hand():
    assert recall_at_k(RELEVANT, 1) == 0.5
    assert recall_at_k(RELEVANT, 2) == 1.0


def test_r_precision_by_hand():
    # Of the three nearest of the first query two are relevant; the second's nearest is not.
    assert r_precision(RELEVANT, TOTAL) == pytest.approx((2 / 3 + 0) / 2)


def test_map_at_r_by_hand():
    # First query: (1/1 + 0 + 2/3) / 3. Second: 0.
    assert map_at_r(RELEVANT, TOTAL) == pytest.approx((1 + 2 / 3) / 3 / 2)


def test_retrieval_by_hand():
    sem = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    labels = torch.tensor([7, 7, 9, 9])
    assert retrieval(sem, labels, ks=(1,)) == {
        "recall_at_1": 1.0,
        "r_precision": 1.0,
        "map_at_r": 1.0,
    }
    crossed = retrieval(sem, torch.tensor([7, 9, 7, 9]), ks=(1, 2))
    # The nearest are 1, 0, 3, 2: never the own class; among the two nearest it is for 0 and 3
    # (0: 1, 2; 1: 0, 2; 2: 3, 1; 3: 2, 1).
    assert crossed == {"recall_at_1": 0, "recall_at_2": 0.5, "r_precision": 0, "map_at_r": 0}


@pytest.mark.parametrize("gallery", [False, True])
def test_retrieval_is_brute_force(gallery):
    draw = torch.Generator().manual_seed(3)
    sem = torch.randn(40, 3, generator=draw)
    labels = torch.randint(5, (40,), generator=draw)
    labels[0] = 99  # alone in its class: no query
    arguments = (sem, labels)
    if gallery:
        sem2 = torch.randn(25, 3, generator=draw)
        arguments += (
            sem2,
            torch.randint(4, (25,), generator=draw),
        )  # class 4 is not in the gallery
    found, wanted = retrieval(*arguments), brute_force(*arguments)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_duplicates_are_neighbours_and_the_item_itself_is_not():
    sem = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    found = retrieval(sem, labels, ks=(1, 4))
    # Ties go to the smaller column: 0 -> 1, 1 -> 0, 2 -> 0, 3 -> 0; 4 and 5 find each other.
    assert found["recall_at_1"] == pytest.approx(4 / 6)
    assert found["recall_at_4"] == 1.0


def test_k_beyond_the_gallery():
    sem = torch.tensor([[0.0], [1.0], [5.0]])
    assert retrieval(sem, torch.tensor([0, 1, 0]), ks=(1, 8)) == {
        "recall_at_1": 0.0,
        "recall_at_8": 1.0,
        "r_precision": 0.0,
        "map_at_r": 0.0,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 2), torch.tensor([0, 0])), r"labels must have shape \[3\] like sem"),
        ((torch.ones(0, 2), torch.zeros(0).long()), "sem must hold at least one item, got none"),
        (
            (torch.ones(1, 2), torch.zeros(1).long(), torch.ones(0, 2), torch.zeros(0).long()),
            "sem2 must hold at least one item, got none",
        ),
        ((torch.ones(3, 2), torch.tensor([0, 1, 2])), "labels must give some query a relevant"),
        ((torch.ones(3, 2), torch.zeros(3).long(), torch.ones(3, 2)), "sem2 and labels2 must be"),
    ],
)
def test_retrieval_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval(*arguments)


def test_relevance_that_is_too_narrow():
    with pytest.raises(ValueError, match=r"K >= 3, got \[2, 2\]"):
        r_precision(RELEVANT[:, :2], TOTAL)
    with pytest.raises(ValueError, match=r"K >= 6, got \[2, 5\]"):
        recall_at_k(RELEVANT, 6)


def test_nmi_of_clear_and_of_meaningless_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    labels = torch.arange(3).repeat_interleave(20)
    noise = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    clear = centres[labels] + 0.1 * noise
    assert nmi(clear, labels) == pytest.approx(1.0)
    assert nmi(clear, 2 - labels) == pytest.approx(1.0)  # names of clusters do not matter
    shuffled = labels[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    assert nmi(clear, shuffled) < 0.2
    assert nmi(noise, labels, seed=1) == nmi(noise, labels, seed=1)


def test_nmi_by_hand():
    # Clusters {0, 1} and {2, 3}; labels a a a b. H(labels) and H(clusters) in nats:
    entropy_labels = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    entropy_clusters = math.log(2)
    mutual = (
        0.5 * math.log(0.5 / (0.75 * 0.5))
        + 2 * 0.25 * math.log(0.25)
        - (0.25 * math.log(0.75 * 0.5) + 0.25 * math.log(0.25 * 0.5))
    )
    sem = torch.tensor([[0.0], [0.1], [9.0], [9.1]])
    wanted = mutual / ((entropy_labels + entropy_clusters) / 2)
    assert nmi(sem, torch.tensor([0, 0, 0, 1])) == pytest.approx(wanted)
