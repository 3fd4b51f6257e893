"""`nearest` by the Triton kernels, under Triton's interpreter; the selection alone has
tests/test_triton_select.py."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import draw
from idml_fast._triton import nearest as triton_nearest
from test_nearest import (
    CONDITIONS,
    METRICS,
    OP,
    PLAIN,
    assert_identical,
    assert_same,
    cuts,
    draw_labels,
    on_a_grid,
    on_a_sphere,
    searched,
)
from test_nearest import (
    WAYS as SEARCHES,
)
from test_triton import walking

from idml_fast import DistanceWeighted, _blocks, nearest, pairwise

pytestmark = pytest.mark.usefixtures("interpreter")

FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)
two_sets_and_self = pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])


def to_float(inputs):
    return {
        k: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }


@pytest.mark.parametrize("most_keys", [16, triton_nearest.MOST_KEYS], ids=["chunks", "whole rows"])
@pytest.mark.parametrize("way", ["few tiles", "tiles half as wide", "a tile at a time"])
@two_sets_and_self
def test_ties_go_to_the_smaller_column(m, way, most_keys, monkeypatch):
    """On a grid, where scores tie, the reference is met in every column."""
    monkeypatch.setattr(triton_nearest, "MOST_KEYS", most_keys)
    inputs = on_a_grid(20, m, dtype=FLOAT)
    with walking(way):
        for k in (1, 5, m or 20):
            found = nearest(**inputs, k=k, metric=PLAIN, backend="triton")
            expected = nearest(**inputs, k=k, metric=PLAIN, backend="reference")
            assert_same(found, expected)
            torch.testing.assert_close(found[0], expected[0])
            assert not found[0].signbit().any()


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@two_sets_and_self
def test_the_best_of_the_backends_own_scores(m, metric, dtype):
    inputs, metric = draw(20, m, 19, 11, dtype=dtype), METRICS[metric]
    with walking("one tile"):
        values, columns = nearest(**inputs, k=6, metric=metric, backend="triton")
        scores = pairwise(**inputs, metric=metric, backend="triton")
    assert torch.equal(values, scores.gather(1, columns))
    expected = scores.sort(1, descending=metric.larger_is_closer).values[:, :6]
    assert torch.equal(values, expected)
    assert (columns.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("where", CONDITIONS)
@pytest.mark.parametrize("largest", [None, True])
@pytest.mark.parametrize(("m", "exclude_self"), [(29, False), (None, True)], ids=["two", "others"])
def test_conditions(m, exclude_self, largest, where):
    inputs, labels = on_a_grid(26, m, dtype=FLOAT), draw_labels(26, m)
    with walking("many tiles"):
        for above in (None, 2.0, 9.0):  # scores are on the bound; none is above it
            options = {
                "k": 6, "where": where, "largest": largest, "exclude_self": exclude_self, **labels,
                "above": None if above is None else torch.full((26,), above), "metric": PLAIN,
            }  # fmt: skip
            found = nearest(**inputs, **options, backend="triton")
            assert_same(found, nearest(**inputs, **options, backend="reference"))


@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
def test_certain_items(certain):
    inputs, metric = draw(26, 29, 7, 5, dtype=FLOAT), METRICS["cosine"]
    zeros = inputs | {k: torch.zeros_like(inputs[k]) for k in certain}
    found, expected = (
        nearest(**x, k=5, metric=metric, backend=backend)
        for x, backend in (
            (inputs | dict.fromkeys(certain, "zero"), "triton"),
            (zeros, "reference"),
        )
    )
    assert_same(found, expected)


def test_non_contiguous_inputs_and_labels_of_any_integer_dtype():
    inputs, labels = draw(26, 29, 7, 5, dtype=FLOAT), draw_labels(26, 29)
    options = {"k": 5, "where": "different", "backend": "triton"}
    expected = nearest(**inputs, **options, **labels, above=torch.full((26,), 1.0))
    strided = {k: x.repeat_interleave(2, 0).T.contiguous().T[::2] for k, x in inputs.items()}
    labels = {k: x.repeat_interleave(2)[::2] for k, x in labels.items()}
    for dtype in (torch.uint8, torch.int32):
        of_dtype = labels | {"labels": labels["labels"].to(dtype)}
        above = torch.tensor(1.0).expand(26)
        assert_identical(nearest(**strided, **options, **of_dtype, above=above), expected)


# -------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("where", CONDITIONS)
@pytest.mark.parametrize("way", ["few tiles", "a tile at a time"])
@two_sets_and_self
def test_draws_like_the_other_backends(m, way, where, monkeypatch):
    monkeypatch.setattr(triton_nearest, "MOST_KEYS", 16)
    inputs, labels = to_float(on_a_sphere(26, m)), draw_labels(26, m)
    options = {
        "k": 5, "sample": DistanceWeighted(), "seed": 2**40 + 1, "where": where, **labels,
        "above": torch.full((26,), 0.7),
    }  # fmt: skip
    with walking(way):
        found = nearest(**inputs, **options, backend="triton")
    expected = nearest(**inputs, **options, backend="cpu")
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("first", [0, 3, 2**34 - 10])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_keys_of_the_draws(seed, first):
    """The last columns go beyond what the counter's first word can count."""
    inputs = to_float(on_a_sphere(5, 23, 3))
    tensors, metric = (inputs["sem"], None, inputs["sem2"], None), (math.inf, 0.0, None, "distance")
    weights = [8.0, 0.5, 1.4]
    options = None, None, "any", False, False, None, weights, torch.tensor(seed), 23, first
    found, expected = (
        OP(*tensors, *metric, *options, None, None, None, backend) for backend in ("triton", "cpu")
    )
    assert torch.equal(found[1], expected[1])
    drawn = found[1] >= 0
    # Every logarithm may be off by some units in the last place of the largest term.
    error = (found[2] - expected[2])[drawn].abs()
    assert (error <= 8 * torch.finfo(FLOAT).eps * 20).all()


# -------------------------------------------------------------------------------- columns in blocks


@pytest.mark.parametrize("search", SEARCHES)
def test_blocks_and_arrays(search, monkeypatch):
    inputs, options, (_, expected) = searched(search)
    inputs = to_float(inputs)
    options |= {"backend": "triton"}
    rows = {name: inputs[name] for name in ("sem", "unc", "labels")}
    with walking("few tiles half as wide"):
        whole = nearest(**inputs, **options)
        blocks = nearest(**rows, sem2=iter(cuts(inputs, 13, 13, 27)), **options)
        monkeypatch.setattr(_blocks, "BYTES", 1)
        monkeypatch.setattr(_blocks, "MULTIPLE", 20)
        arrays = {name: inputs[name].numpy() for name in ("sem2", "unc2", "labels2")}
        of_arrays = nearest(**inputs | arrays, **options)
    for found in (whole, blocks, of_arrays):
        assert torch.equal(found[1], expected)
        torch.testing.assert_close(found[0], whole[0])


# ------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("largest", [False, True])
def test_a_nan_comes_first(largest, dtype):
    inputs = draw(26, 29, 7, 5, dtype=dtype)
    inputs["sem2"][[3, 11]] = math.nan
    inputs["unc"][5] = math.nan
    nan = torch.full((26, 29), False)
    nan[:, [3, 11]] = nan[5] = True
    with walking("many tiles"):
        for above in (None, torch.full((26,), 2.0, dtype=dtype), torch.full((26,), math.nan)):
            options = {"k": 5, "largest": largest, "above": above, "backend": "triton"}
            values, columns = nearest(**inputs, **options)
            for i in range(26):
                expected = nan[i].nonzero()[:5, 0]
                assert torch.equal(columns[i, : len(expected)], expected)
                assert torch.equal(values[i].isnan(), torch.arange(5) < len(expected))


@pytest.mark.parametrize("largest", [False, True])
def test_an_infinite_score_is_found_and_a_missing_column_is_not(largest):
    inputs = draw(26, 29, 7, 5, dtype=FLOAT)
    inputs["sem2"][[3, 11]] = math.inf
    options = {
        "k": 29, "metric": PLAIN, "largest": largest, "where": "same", **draw_labels(26, 29)
    }  # fmt: skip
    found = nearest(**inputs, **options, backend="triton")
    assert_same(found, nearest(**inputs, **options, backend="reference"))


@pytest.mark.parametrize("m", [3, None])
def test_no_rows(m):
    values, columns = nearest(**draw(0, m, 5, 3, dtype=FLOAT), k=2, backend="triton")
    assert values.shape == columns.shape == (0, 2)
    assert columns.dtype == torch.int64


def test_repeats_give_the_same_bits():
    inputs = draw(20, 60, 7, 5, dtype=FLOAT)
    with walking("a tile at a time"):
        expected = nearest(**inputs, k=9, backend="triton")
        assert_identical(nearest(**inputs, k=9, backend="triton"), expected)


@pytest.mark.parametrize("m", [9, None], ids=["two sets", "self"])
@pytest.mark.parametrize("draws", [False, True], ids=["best", "drawn"])
def test_opcheck(draws, m):
    inputs = draw(6, m, 3, 2, dtype=FLOAT).values()
    labels = draw_labels(6, m)
    weights, seed = ([3.0, 0.5, 1.4], torch.tensor(1)) if draws else ([], None)
    options = (
        labels.get("labels2"), labels["labels"], "same", False, False, torch.zeros(6), weights,
        seed, 3,
    )  # fmt: skip
    metric = 1.5, 0.3, None, "distance"
    torch.library.opcheck(OP, (*inputs, *metric, *options, 0, None, None, None, "triton"))
