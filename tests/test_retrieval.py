"""Retrieval, by hand, against brute force and against pytorch-metric-learning."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("faiss", reason="the extra idml_fast[train] is not installed")

from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from idml_fast import Metric, _blocks, pairwise
from idml_fast.evaluation import retrieval
from idml_fast.evaluation.retrieval import measures

MODULE = sys.modules["idml_fast.evaluation.retrieval"]
KS = (1, 2, 4, 8)
# Our names, and those of pytorch-metric-learning.
THEIRS = {
    "recall_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "map_at_r": "mean_average_precision_at_r",
    "map": "mean_average_precision",
    "mrr": "mean_reciprocal_rank",
}
INTROSPECTIVE = {
    "distance": Metric(tau=3, gamma=0.5),
    "cosine": Metric(tau=2, form="cosine"),
    "official": Metric.official(),
}


def problem(rows=60, columns=None, classes=9, width=4, grid=False, seed=0):
    """Embeddings and labels; of a grid, whose coordinates leave many exact ties."""
    generator = torch.Generator().manual_seed(seed)

    def side(count):
        sem = torch.randn(count, width, generator=generator)
        if grid:
            sem = torch.randint(3, (count, width), generator=generator).float()
        return sem, torch.randint(classes, (count,), generator=generator)

    return side(rows) if columns is None else (*side(rows), *side(columns))


def brute_force(scores, labels, labels2, itself, larger_is_closer=False):
    """All measures, query by query, in plain Python."""
    found, unmatched = {}, []
    for i, row in enumerate(scores.tolist()):
        others = [j for j in range(len(row)) if not (itself and i == j)]
        others.sort(key=lambda j: (-row[j] if larger_is_closer else row[j], j))
        hits = [int(labels2[j] == labels[i]) for j in others]
        r = sum(hits)
        if r == 0:
            unmatched.append(i)
            continue
        precision = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
        values = {
            **{f"recall_at_{k}": float(any(hits[:k])) for k in KS},
            **{f"precision_at_{k}": sum(hits[:k]) / k for k in KS},
            "r_precision": sum(hits[:r]) / r,
            "map_at_r": sum(p * h for p, h in zip(precision[:r], hits[:r], strict=True)) / r,
            "mrr": 1 / (1 + hits.index(1)),
            "map": sum(p * h for p, h in zip(precision, hits, strict=True)) / r,
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found, unmatched


def assert_is(found, wanted, unmatched):
    assert list(found.per_query) == list(wanted)
    assert found.unmatched.tolist() == unmatched
    for name, values in wanted.items():
        assert found.per_query[name].dtype == torch.float64
        assert found.per_query[name].tolist() == pytest.approx(values, abs=1e-12), name
        assert found.values[name] == pytest.approx(sum(values) / len(values), abs=1e-12), name


def assert_same(found, wanted):
    """Sums over relevant items apart, of which another batch may have more."""
    assert torch.equal(found.queries, wanted.queries)
    for name, values in wanted.per_query.items():
        torch.testing.assert_close(found.per_query[name], values, rtol=1e-14, atol=0)


def test_measures_by_hand():
    # Three relevant items found at ranks 1, 3 and 5; one found at rank 2.
    ranks = torch.tensor([[1, 3, 5], [2, math.inf, math.inf]], dtype=torch.float64)
    found = {name: values.tolist() for name, values in measures(ranks, (1, 4)).items()}
    assert found == {
        "recall_at_1": [1, 0],
        "recall_at_4": [1, 1],
        "precision_at_1": [1, 0],
        "precision_at_4": [2 / 4, 1 / 4],
        "r_precision": [pytest.approx(2 / 3), 0],
        "map_at_r": [pytest.approx((1 + 2 / 3) / 3), 0],
        "mrr": [1, 1 / 2],
        "map": [pytest.approx((1 + 2 / 3 + 3 / 5) / 3), 1 / 2],
    }


@pytest.mark.parametrize("columns", [None, 45])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("classes", [2, 9, 40])
def test_retrieval_is_brute_force(columns, grid, classes):
    given = problem(columns=columns, grid=grid, classes=classes)
    sem, labels, *gallery = given
    sem2, labels2 = gallery or (sem, labels)
    scores = pairwise(sem, None, sem2, metric=Metric.plain())
    assert_is(retrieval(*given), *brute_force(scores, labels, labels2, columns is None))


@pytest.mark.parametrize("listed", [0, 3])
@pytest.mark.parametrize("columns", [None, 45])
def test_what_is_not_listed_is_sorted(monkeypatch, listed, columns):
    given = problem(columns=columns)
    wanted = retrieval(*given)
    monkeypatch.setattr(MODULE, "LISTED", listed)
    assert_same(retrieval(*given), wanted)


@pytest.mark.parametrize("grid", [False, True])
def test_too_many_for_one_walk(monkeypatch, grid):
    given = problem(grid=grid)
    wanted = retrieval(*given)
    monkeypatch.setattr(MODULE, "AT_ONCE", 0)
    assert_same(retrieval(*given), wanted)


@pytest.mark.parametrize("form", INTROSPECTIVE)
@pytest.mark.parametrize("columns", [None, 45])
def test_the_introspective_metric(form, columns):
    sem, labels, *gallery = problem(columns=columns)
    sem2, labels2 = gallery or (None, None)
    metric = INTROSPECTIVE[form]
    unc = problem(width=3, seed=1)[0]
    unc2 = None if columns is None else problem(columns, width=3, seed=2)[0]
    found = retrieval(sem, labels, sem2, labels2, unc=unc, unc2=unc2, metric=metric)
    scores = pairwise(sem, unc, sem2, unc2, metric=metric)
    wanted = brute_force(
        scores,
        labels,
        labels if labels2 is None else labels2,
        columns is None,
        metric.larger_is_closer,
    )
    assert_is(found, *wanted)
    assert found.values != retrieval(sem, labels, sem2, labels2).values


class Sorted:
    """Neighbours as pytorch-metric-learning asks for them, a tie to the smaller one."""

    def __call__(self, query, k, reference, ref_includes_query):
        distances = torch.cdist(query.double(), reference.double())
        if ref_includes_query:
            distances.fill_diagonal_(math.inf)
        values, columns = distances.sort(dim=1, stable=True)
        k = min(k, len(reference) - ref_includes_query)
        return values[:, :k], columns[:, :k]


@pytest.mark.parametrize("columns", [None, 200])
@pytest.mark.parametrize("grid", [False, True])
def test_the_values_of_pytorch_metric_learning(columns, grid):
    given = problem(300, columns, classes=40, grid=grid, seed=5)
    given[1][7] = 99  # nothing relevant
    theirs = AccuracyCalculator(
        include=tuple(THEIRS.values()), knn_func=Sorted(), device=torch.device("cpu")
    )
    gallery = given[2:] or (None, None)
    wanted = theirs.get_accuracy(*given[:2], *gallery, ref_includes_query=columns is None)
    found = retrieval(*given).values
    for ours, name in THEIRS.items():
        assert found[ours] == pytest.approx(wanted[name], abs=1e-6), ours


def test_duplicates_are_neighbours_and_the_item_itself_is_not():
    sem = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    found = retrieval(sem, labels, ks=(1, 4)).values
    # Ties go to the smaller column: 0 -> 1, 1 -> 0, 2 -> 0, 3 -> 0; 4 and 5 find each other.
    assert found["recall_at_1"] == pytest.approx(4 / 6)
    assert found["recall_at_4"] == 1.0


def test_duplicates_far_from_zero_are_as_near():
    sem = 1000 + torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    found = retrieval(sem.repeat(2, 1), torch.arange(20).repeat(2), ks=(1,)).values
    assert set(found.values()) == {1.0}


def test_k_beyond_the_gallery():
    sem = torch.tensor([[0.0], [1.0], [5.0]])
    found = retrieval(sem, torch.tensor([0, 1, 0]), ks=(1, 8)).values
    assert found["recall_at_1"] == found["r_precision"] == 0
    assert found["recall_at_8"] == 1
    assert found["precision_at_8"] == 1 / 8
    # Row 0 finds row 2 at rank 2, row 2 finds row 0 at rank 2.
    assert found["mrr"] == found["map"] == 1 / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_not_rounded(dtype):
    sem, labels = problem(40)
    sem = sem.to(dtype)
    assert_same(retrieval(sem, labels), retrieval(sem.double(), labels))


def test_autocast_changes_nothing():
    given = problem(40)
    wanted = retrieval(*given)
    with torch.autocast("cpu"):
        assert_same(retrieval(*given), wanted)


@pytest.mark.parametrize("columns", [None, 1500])
@pytest.mark.parametrize("grid", [False, True])
def test_arrays_come_in_blocks(monkeypatch, tmp_path, columns, grid):
    given = problem(1100, columns, classes=300, grid=grid)
    wanted = retrieval(*given)
    monkeypatch.setattr(_blocks, "BYTES", 1 << 20)  # 1024 columns, some queries
    paths = [tmp_path / f"{number}.npy" for number in range(len(given))]
    for path, x in zip(paths, given, strict=True):
        np.save(path, x.numpy())
    assert_same(retrieval(*(np.load(path, mmap_mode="r") for path in paths)), wanted)


def test_a_bar_counts_pairs(capsys):
    given = problem()
    wanted, found = retrieval(*given), retrieval(*given, progress=True)
    assert found.values == wanted.values
    told = capsys.readouterr().err
    assert "retrieval: 100%" in told
    assert "3.60k/3.60k" in told  # 60 x 60


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(3, 2), torch.tensor([0, 0])), {}, r"labels must have shape \[3\] like sem"),
        ((torch.ones(0, 2), torch.zeros(0).long()), {}, "sem must hold at least one item"),
        (
            (torch.ones(1, 2), torch.zeros(1).long(), torch.ones(0, 2), torch.zeros(0).long()),
            {},
            "sem2 must hold at least one item, got none",
        ),
        ((torch.ones(3, 2), torch.tensor([0, 1, 2])), {}, "labels must give some query a relevant"),
        ((torch.ones(3, 2), torch.zeros(3).long(), torch.ones(3, 2)), {}, "sem2 and labels2 must"),
        (
            (torch.ones(2, 2), torch.zeros(2).long(), torch.ones(2, 3), torch.zeros(2).long()),
            {},
            r"sem2 must have shape \[M, 2\] like sem \[2, 2\], got \[2, 3\]",
        ),
        ((torch.ones(2, 2), torch.zeros(2).long()), {"ks": (1, 0)}, "ks must be integers >= 1"),
        (
            (torch.tensor([[1.0, 2.0], [3.0, math.nan]]), torch.zeros(2).long()),
            {},
            "sem must be finite, got nan in row 1",
        ),
        (
            (torch.ones(2, 2), torch.zeros(2).long()),
            {"unc": torch.tensor([[1.0], [math.inf]]), "metric": Metric()},
            "unc must be finite, got inf in row 1",
        ),
        (
            (
                torch.ones(2, 2),
                torch.zeros(2).long(),
                torch.full((3, 2), -math.inf),
                torch.zeros(3).long(),
            ),
            {},
            "sem2 must be finite, got -inf in row 0",
        ),
    ],
)
def test_retrieval_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        retrieval(*arguments, **options)


def test_the_first_bad_row_of_a_later_block(monkeypatch):
    monkeypatch.setattr(_blocks, "BYTES", 1 << 12)
    sem, labels = problem(1500)
    sem[1490, 1] = sem[1400, 3] = math.nan
    with pytest.raises(ValueError, match="sem must be finite, got nan in row 1400"):
        retrieval(sem, labels)


def test_a_metric_that_reads_unc_wants_it():
    with pytest.raises(TypeError, match="unc must be a tensor because"):
        retrieval(*problem(), metric=Metric())
