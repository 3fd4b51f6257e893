"""`nearest`: what it finds, draws and differentiates, whole and in blocks."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from conftest import (
    FORMS,
    Inputs,
    assert_accurate,
    assert_equals_in_double,
    draw,
    to_double,
)
from hypothesis import strategies
from idml_fast._cpu import nearest as cpu_nearest
from idml_fast._cpu import tile
from torch import Tensor

from idml_fast import DistanceWeighted, Metric, _blocks, nearest, paired, pairwise, reference

OP = torch.ops.idml_fast.nearest.default
FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)
METRICS = {
    **{form: Metric(1.5, 0.25, form) for form in FORMS},
    **{f"plain {form}": Metric.plain(form) for form in ("distance", "cosine")},
}
PLAIN = Metric.plain()
CONDITIONS = "any", "same", "different"
each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, FLOAT, *HALVES], ids=str)
two_sets_and_self = pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])
Found = tuple[Tensor, Tensor]  # values, columns


def draw_labels(n: int, m: int | None, classes: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = {"labels": torch.randint(classes, (n,), generator=generator)}
    if m is not None:
        labels["labels2"] = torch.randint(classes, (m,), generator=generator)
    return labels


def on_a_grid(n: int, m: int | None, seed: int = 0, **options: Any) -> Inputs:
    """Embeddings of small integers: many pairs have exactly the same score, in any dtype and in
    any order of summation."""
    return {
        k: None if x is None else x.round().clamp(-1, 1)
        for k, x in draw(n, m, 3, 2, seed=seed, **options).items()
    }


def on_a_sphere(n: int, m: int | None, width: int = 8, seed: int = 0) -> Inputs:
    """Unit vectors and small uncertainties, as the draws by distance expect them."""
    inputs = draw(n, m, width, 3, seed=seed)
    return {
        k: x if x is None else x * 0.1 if k.startswith("unc") else torch.nn.functional.normalize(x)
        for k, x in inputs.items()
    }


def assert_same(ours: Found, theirs: Found) -> None:
    """The same columns, and in float64 the same values."""
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    finite = theirs[0].isfinite()
    assert torch.equal(ours[0][~finite].nan_to_num(), theirs[0][~finite].nan_to_num())
    if ours[0].dtype == torch.float64:
        assert_equals_in_double("values", ours[0][finite], theirs[0][finite])


def assert_identical(ours: Found, theirs: Found) -> None:
    """The same bits."""
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0], theirs[0])


# ------------------------------------------------------------------------------------ what is found

# n, m (None: the rows against themselves), ds, du
SHAPES = {
    "aligned": (64, 32, 64, 64),
    "ragged": (37, 29, 19, 11),  # no power of two, no multiple of a vector
    "one row": (1, 29, 19, 11),
    "one column": (37, 1, 19, 11),
    "one pair": (1, 1, 19, 11),
    "narrow": (17, 13, 2, 1),
    "unc wider than sem": (17, 13, 5, 70),
    "more columns than a row has room for": (5, 1500, 3, 2),
    "a row beyond a tile": (tile.TILE[0] + 1, 3, 3, 2),
    "a column beyond a tile": (tile.TILE[0], tile.TILE[1] + 1, 2, 2),
    "self": (33, None, 19, 11),
    "self, one row": (1, None, 19, 11),
}


@each_metric
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, metric):
    inputs = draw(*shape)
    count = shape[0] if shape[1] is None else shape[1]
    for k in {1, min(3, count), count if count < 100 else 70}:
        found = [nearest(**inputs, k=k, metric=metric, backend=b) for b in ("cpu", "reference")]
        assert_same(*found)


@each_metric
@pytest.mark.usefixtures("small_tiles")
@two_sets_and_self
def test_every_k(m, metric):
    inputs = draw(26, m, 7, 5)
    for k in range(1, (26 if m is None else m) + 1):
        found = [nearest(**inputs, k=k, metric=metric, backend=b) for b in ("cpu", "reference")]
        assert_same(*found)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("where", CONDITIONS)
@pytest.mark.parametrize("largest", [None, False, True])
@pytest.mark.parametrize(
    ("m", "exclude_self"), [(29, False), (None, False), (None, True)], ids=["two", "self", "others"]
)
def test_conditions(m, exclude_self, largest, where):
    inputs, labels = draw(26, m, 7, 5), draw_labels(26, m)
    ordered = pairwise(**inputs).sort(1).values
    # Above these are few of the columns, half and none.
    bounds = [(ordered[:, at] + ordered[:, at + 1]) / 2 for at in (22, 12)]
    for above in (None, *bounds, ordered[:, -1] + 1):
        options = {
            "k": 6, "where": where, "largest": largest, "exclude_self": exclude_self, **labels,
            "above": above,
        }  # fmt: skip
        assert_same(nearest(**inputs, **options), nearest(**inputs, **options, backend="reference"))


@pytest.mark.usefixtures("small_tiles")
def test_a_score_at_the_bound_is_not_above_it():
    inputs = on_a_grid(26, 29)
    above = pairwise(**inputs, metric=PLAIN)[:, 0]
    values, columns = nearest(**inputs, k=29, metric=PLAIN, above=above)
    assert (values > above[:, None]).all()  # infinity where there are no more
    expected = (pairwise(**inputs, metric=PLAIN) > above[:, None]).sum(1)
    assert torch.equal((columns >= 0).sum(1), expected)


# Not in bfloat16: its products carry norms, which round even for small integers.
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, torch.float16], ids=str)
@two_sets_and_self
@pytest.mark.parametrize("largest", [False, True])
def test_ties_go_to_the_smaller_column(largest, m, dtype):
    inputs = on_a_grid(26, m, dtype=dtype)
    for k in (1, 2, 5, 20, 26):
        found = nearest(**inputs, k=k, metric=PLAIN, largest=largest)
        expected = nearest(**inputs, k=k, metric=PLAIN, largest=largest, backend="reference")
        # PyTorch's square root of a double is not the nearest one on every processor.
        same = assert_same if dtype == torch.float64 else assert_identical
        same(found, expected)


def test_all_columns_are_the_same():
    inputs = {"sem": torch.zeros(3, 2), "unc": torch.ones(3, 2)}
    inputs |= {"sem2": torch.ones(3000, 2), "unc2": torch.ones(3000, 2)}
    for k in (1, 7, 600, 3000):
        assert torch.equal(nearest(**inputs, k=k)[1], torch.arange(k).expand(3, k))


@pytest.mark.parametrize("k", [1, 5, 300, 700])
@pytest.mark.parametrize("order", ["falling", "rising", "shuffled"])
def test_a_row_runs_out_of_room(order, k):
    """Every column is better than all before it, or worse, or either."""
    distances = torch.arange(1.0, 5001.0)
    if order == "falling":
        distances = distances.flip(0)
    elif order == "shuffled":
        distances = distances[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    found = nearest(torch.zeros(2, 1), None, distances[:, None], k=k, metric=PLAIN)
    expected = distances.sort().indices[:k].expand(2, k)
    assert_identical(found, (distances[expected], expected))


def assert_follows_the_rule(inputs: Inputs, k: int, metric: Metric) -> None:
    """`assert_accurate` of the scores; a column may take the place of another only where rounding
    can do that."""
    values, columns = nearest(**inputs, k=k, metric=metric)
    truth = reference.pairwise(**to_double(inputs), metric=metric)
    eager = reference.pairwise(**inputs, metric=metric)
    assert_accurate(
        "values", values, eager.gather(1, columns), truth.gather(1, columns), by_row=False
    )
    assert (columns.sort(1).values.diff(dim=1) > 0).all(), "a column was found twice"
    expected = truth.sort(dim=1, descending=metric.larger_is_closer).values[:, :k]
    lost = (truth.gather(1, columns) - expected).abs()
    # Either score may be off by what the rule allows.
    allowed = 4 * (eager.double() - truth).abs().amax(1, keepdim=True)
    assert (lost <= allowed).all(), f"lost {lost.max()}, at most {allowed.min()} are rounding"


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
@each_metric
@two_sets_and_self
def test_accuracy(m, metric, dtype):
    inputs = draw(48, None if m is None else 512, 67, 35, dtype=dtype)
    assert_follows_the_rule(inputs, 20, metric)


@each_metric
@two_sets_and_self
def test_wide_rows_in_double(m, metric):
    inputs = draw(48, None if m is None else 512, 67, 35)
    found = [nearest(**inputs, k=20, metric=metric, backend=b) for b in ("cpu", "reference")]
    assert_same(*found)


def test_a_plain_metric_does_not_read_unc():
    inputs = draw(26, 29, 7, 5)
    broken = inputs | {"unc": torch.full_like(inputs["unc"], math.nan)}
    found = nearest(**broken, k=5, metric=PLAIN)
    assert_identical(found, nearest(inputs["sem"], None, inputs["sem2"], k=5, metric=PLAIN))


@pytest.mark.parametrize(("first", "second"), [("zero", None), (None, "zero"), ("zero", "zero")])
@pytest.mark.parametrize("form", FORMS)
def test_certain_items(form, first, second):
    inputs, metric = draw(26, 29, 7, 5), Metric(1.5, 0.25, form)
    spelt_out = inputs | {
        name: torch.zeros_like(inputs[name])
        for name, x in (("unc", first), ("unc2", second))
        if x == "zero"
    }
    inputs |= {name: x for name, x in (("unc", first), ("unc2", second)) if x == "zero"}
    assert_same(nearest(**inputs, k=5, metric=metric), nearest(**spelt_out, k=5, metric=metric))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_dtype(dtype):
    inputs, labels = draw(26, 29, 7, 5), draw_labels(26, 29)
    expected = nearest(**inputs, **labels, k=5, where="same")
    labels = {"labels": labels["labels"].to(dtype), "labels2": labels["labels2"]}
    assert_identical(nearest(**inputs, **labels, k=5, where="same"), expected)


def test_non_contiguous_inputs():
    inputs, labels = draw(26, 29, 7, 5), draw_labels(26, 29)
    options = {**labels, "k": 5, "where": "different", "above": torch.full((26,), 1.0)}
    expected = nearest(**inputs, **options)
    strided = {k: x.repeat_interleave(2, 0).T.contiguous().T[::2] for k, x in inputs.items()}
    options |= {k: x.repeat_interleave(2)[::2] for k, x in labels.items()}
    options["above"] = torch.tensor(1.0).expand(26)
    assert_same(nearest(**strided, **options), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rows(backend):
    for m in (3, None):
        values, columns = nearest(**draw(0, m, 5, 3), k=2, backend=backend)
        assert values.shape == columns.shape == (0, 2)
        assert columns.dtype == torch.int64


# --------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.usefixtures("small_tiles")
@each_dtype
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 29])
def test_a_nan_comes_first(k, largest, dtype):
    inputs = draw(26, 29, 7, 5, dtype=dtype)
    inputs["sem2"][[3, 11]] = math.nan
    inputs["unc"][5] = math.nan
    for above in (None, torch.full((26,), 2.0, dtype=dtype), torch.full((26,), math.nan)):
        options = {"k": k, "largest": largest, "above": above}
        values, columns = nearest(**inputs, **options)
        nan = torch.full((26, 29), False)
        nan[:, [3, 11]] = nan[5] = True
        for i in range(26):
            expected = nan[i].nonzero()[:k, 0]
            assert torch.equal(columns[i, : len(expected)], expected)
            assert torch.equal(values[i].isnan(), torch.arange(k) < len(expected))
        if dtype == torch.float64:
            assert_same((values, columns), nearest(**inputs, **options, backend="reference"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("largest", [False, True])
def test_an_infinite_score_is_found_and_a_missing_column_is_not(largest):
    inputs = draw(26, 29, 7, 5)
    inputs["sem2"][[3, 11]] = math.inf
    labels = draw_labels(26, 29)
    options = {"k": 29, "metric": PLAIN, "largest": largest, "where": "same", **labels}
    values, columns = nearest(**inputs, **options)
    assert_same((values, columns), nearest(**inputs, **options, backend="reference"))
    for i in range(26):
        count = (labels["labels2"] == labels["labels"][i]).sum()
        assert (columns[i, count:] == -1).all()
        assert (columns[i, :count] >= 0).all()
        assert (values[i, count:] == (-math.inf if largest else math.inf)).all()


# -------------------------------------------------------------------------------------- any problem


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True, database=None)
@hypothesis.given(strategies.data())
def test_any_problem(data):
    """On a grid, where scores tie and are exact: whatever the tiles, blocks and conditions are, the
    reference is met in every column."""

    def pick(name, *choices):
        return data.draw(strategies.sampled_from(choices), label=name)

    n, m = (data.draw(strategies.integers(1, 40), label=name) for name in ("n", "m"))
    alone = data.draw(strategies.booleans(), label="rows against themselves")
    inputs = on_a_grid(n, None if alone else m, seed=data.draw(strategies.integers(0, 99)))
    m = n if alone else m
    exclude_self = alone and m > 1 and data.draw(strategies.booleans(), label="exclude_self")
    options = {
        "k": data.draw(strategies.integers(1, m - exclude_self), label="k"),
        "metric": pick("metric", PLAIN, Metric(2.0), Metric(1.0, 0.5, "cosine")),
        "where": pick("where", *CONDITIONS),
        "largest": pick("largest", None, False, True),
        "exclude_self": exclude_self,
        **draw_labels(n, None if alone else m, classes=pick("classes", 1, 2, 5)),
    }
    if options["metric"].form == "distance" and data.draw(strategies.booleans(), label="draws"):
        options |= {"largest": None, "sample": DistanceWeighted(3, 0.5, 2.0), "seed": n}
    size = data.draw(strategies.integers(1, 50), label="block")
    with pytest.MonkeyPatch.context() as patch:
        shape = tuple(data.draw(strategies.integers(1, 30), label="tile") for _ in range(2))
        patch.setattr(tile, "TILE", shape)
        patch.setattr(_blocks, "MULTIPLE", size)
        patch.setattr(_blocks, "BYTES", 1)
        found = nearest(**inputs, **options)
        in_blocks = nearest(**inputs, **options, progress=pick("progress", True, False))
    assert_same(found, nearest(**inputs, **options, backend="reference"))
    assert_same(in_blocks, found)


# -------------------------------------------------------------------------------------------- draws


def brute_force_log_weight(d: float, width: int, cutoff: float, upto: float) -> float:
    if d >= upto:
        return -math.inf
    d = max(d, cutoff)
    return -math.log(d ** (width - 2) * (1 - d * d / 4) ** ((width - 3) / 2))


def at_distances(*distances: float) -> dict[str, Tensor]:
    """A point of the unit circle, and others at these distances of it."""
    angles = 2 * torch.tensor(distances, dtype=torch.float64).div(2).asin()
    sem2 = torch.stack([angles.cos(), angles.sin()], dim=1)
    return {"sem": torch.tensor([[1.0, 0.0]], dtype=torch.float64), "unc": None, "sem2": sem2}


PHILOX = {  # counter, key: words; from kat_vectors of Random123, philox4x32 10
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX.values(), ids=PHILOX)
def test_philox_by_its_known_answers(counter, key, words):
    low, high = (
        torch.tensor(np.uint64(x | y << 32).astype(np.int64)) for x, y in (counter[:2], counter[2:])
    )
    found = reference.philox(low, high, key[0] | key[1] << 32)
    assert tuple(int(word) for word in found) == words


def keys_by_definition(
    scores: Tensor, weights: list[float], seed: int, first: int
) -> Tensor:  # [N, M]
    """Logarithms of the weights plus Gumbel numbers, pair by pair."""
    keys = torch.empty(scores.shape, dtype=torch.float64)
    for i, j in itertools.product(*map(range, scores.shape)):
        column = first + j
        words = reference.philox(torch.tensor(column // 4), torch.tensor(i), seed)
        u = (int(words[column % 4]) + 0.5) / 2**32
        log_weight = brute_force_log_weight(scores[i, j].item(), *weights)
        keys[i, j] = log_weight - math.log(-math.log1p(-u))
    return keys


@pytest.mark.parametrize("dtype", [torch.float64, FLOAT], ids=str)
@pytest.mark.parametrize("width", [2, 3, 8, 512])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
@pytest.mark.parametrize("first", [0, 3, 2**34 - 10])
def test_keys_of_the_draws(first, seed, width, dtype):
    """In the kernel; the last columns go beyond what the counter's first word can count."""
    inputs = {k: None if x is None else x.to(dtype) for k, x in on_a_sphere(5, 23, 3).items()}
    weights = [float(width), 0.5, 1.4]
    tensors, metric = (inputs["sem"], None, inputs["sem2"], None), (math.inf, 0.0, None, "distance")
    options = None, None, "any", False, False, None, weights, torch.tensor(seed), 23, first
    scores, columns, keys = OP(*tensors, *metric, *options, None, None, None, "cpu")
    assert torch.equal(keys.sort(1, descending=True).values, keys)
    for i in range(5):
        drawn = columns[i] >= 0
        assert torch.equal(drawn.sum(), (pairwise(**inputs, metric=PLAIN)[i] < 1.4).sum())
        place = columns[i, drawn] - first
        # From the kernel's own scores: their errors are not the keys'.
        own = torch.full((1, 23), 1.0, dtype=torch.float64)
        own[0, place] = scores[i, drawn].double()
        rows = torch.zeros(i, 23, dtype=torch.float64)
        expected = keys_by_definition(torch.cat([rows + 1, own]), weights, seed, first)[i, place]
        # Every logarithm may be off by some units in the last place of the largest term.
        error = (keys[i, drawn].double() - expected).abs()
        assert (error <= 4 * torch.finfo(dtype).eps * max(width, 20)).all()


@pytest.mark.parametrize("metric", [Metric(1.5, 0.25), PLAIN], ids=["distance", "plain distance"])
@pytest.mark.usefixtures("small_tiles")
@two_sets_and_self
@pytest.mark.parametrize("where", CONDITIONS)
def test_draws_like_the_reference(where, m, metric):
    inputs, labels = on_a_sphere(26, m), draw_labels(26, m)
    above = torch.full((26,), 0.7)
    for options in ({}, {"above": above}, {"exclude_self": m is None}):
        options |= {"sample": DistanceWeighted(), "where": where, "metric": metric, **labels}
        for k in (1, 5, 20):
            found = nearest(**inputs, k=k, seed=k, **options)
            assert_same(found, nearest(**inputs, k=k, seed=k, **options, backend="reference"))


def test_draws_do_not_depend_on_the_dtype():
    inputs = on_a_sphere(26, 29)
    options = {"k": 5, "metric": PLAIN, "sample": DistanceWeighted(), "seed": 1}
    expected = nearest(**inputs, **options)[1]
    found = nearest(**{k: x.float() for k, x in inputs.items()}, **options)[1]
    assert torch.equal(found, expected)


DISTANCES = 0.3, 0.6, 0.9, 1.1, 1.3, 1.5
SAMPLE = DistanceWeighted(5, 0.5, 1.4)


def test_one_draw_has_the_right_frequencies():
    n = 20_000
    inputs = at_distances(*DISTANCES)
    inputs["sem"] = inputs["sem"].expand(n, 2)
    columns = nearest(**inputs, k=1, metric=PLAIN, sample=SAMPLE, seed=3)[1][:, 0]
    weights = torch.tensor([brute_force_log_weight(d, 5, 0.5, 1.4) for d in DISTANCES]).exp()
    expected = n * weights / weights.sum()
    counts = columns.bincount(minlength=6)
    assert counts[5] == 0
    statistic = ((counts - expected).square() / expected)[:5].sum()
    assert statistic < 18.47  # 0.999 quantile for 4 degrees of freedom


def test_two_draws_have_the_right_frequencies_together():
    """Without replacement: the second is drawn from what the first has left."""
    n = 50_000
    inputs = at_distances(*DISTANCES)
    inputs["sem"] = inputs["sem"].expand(n, 2)
    columns = nearest(**inputs, k=2, metric=PLAIN, sample=SAMPLE, seed=4)[1]
    weights = torch.tensor([brute_force_log_weight(d, 5, 0.5, 1.4) for d in DISTANCES[:5]]).exp()
    p = weights / weights.sum()
    expected = n * p[:, None] * p / (1 - p[:, None])
    counts = (5 * columns[:, 0] + columns[:, 1]).bincount(minlength=25).view(5, 5)
    assert not counts.diagonal().any()
    apart = ~torch.eye(5, dtype=torch.bool)
    statistic = ((counts - expected).square() / expected)[apart].sum()
    assert statistic < 43.82  # 0.999 quantile for 19 degrees of freedom


def test_numbers_of_rows_and_columns_are_independent():
    """Which of 16 equal columns a row draws: rows, and neighbours among them, are all alike."""
    n, m = 4096, 16
    sem = torch.zeros(n, 2)
    options = {"k": 1, "metric": PLAIN, "sample": SAMPLE}
    drawn = [
        nearest(sem, None, torch.ones(m, 2) * 0.6, seed=seed, **options)[1][:, 0] for seed in (0, 1)
    ]
    for first, second in (drawn, (drawn[0][1:], drawn[0][:-1])):
        counts = (m * first + second).bincount(minlength=m * m)
        expected = len(first) / (m * m)
        statistic = ((counts - expected).square() / expected).sum()
        assert statistic < 330.5  # 0.999 quantile for 255 degrees of freedom


def test_draws_follow_the_seed():
    inputs = on_a_sphere(26, 300)
    options = {"k": 5, "sample": DistanceWeighted()}
    first, again, other = (nearest(**inputs, **options, seed=seed) for seed in (1, 1, 2))
    assert_identical(first, again)
    assert (first[1] != other[1]).double().mean() > 0.9


def test_draws_without_a_seed_follow_the_generator_of_pytorch():
    inputs = on_a_sphere(26, 300)
    options = {"k": 5, "sample": DistanceWeighted()}
    torch.manual_seed(7)
    first, second = nearest(**inputs, **options), nearest(**inputs, **options)
    torch.manual_seed(7)
    assert_identical(nearest(**inputs, **options), first)
    assert not torch.equal(first[1], second[1])


def test_the_width_is_that_of_sem():
    inputs = on_a_sphere(26, 300, width=6)
    found, expected = (
        nearest(**inputs, k=5, sample=DistanceWeighted(width), seed=0) for width in (None, 6)
    )
    assert_identical(found, expected)
    assert not torch.equal(found[1], nearest(**inputs, k=5, sample=DistanceWeighted(60), seed=0)[1])


def test_columns_that_are_too_far_are_not_drawn():
    inputs = at_distances(1.39, 1.41, 0.2, 2.0, 1.2)
    values, columns = nearest(**inputs, k=5, metric=PLAIN, sample=DistanceWeighted(3), seed=0)
    assert set(columns[0].tolist()) == {0, 2, 4, -1}
    assert columns[0, 3:].tolist() == [-1, -1]
    assert values[0, 3:].tolist() == [math.inf, math.inf]


def test_the_diameter_is_no_special_case():
    """1 - d^2 / 4 is 0 there, and negative beyond it, where no column is drawn."""
    inputs = at_distances(1.0, 2.0)
    inputs["sem2"] = torch.cat([inputs["sem2"], torch.tensor([[-7.0, 0.0]])])
    sample = DistanceWeighted(50, 0.5, 2.0)
    columns = nearest(**inputs, k=3, metric=PLAIN, sample=sample, seed=0)[1]
    assert columns.tolist() == [[0, -1, -1]]


def test_a_nan_is_drawn_first():
    inputs = on_a_sphere(26, 29)
    inputs["sem2"][17] = math.nan
    options = {"k": 3, "metric": PLAIN, "sample": DistanceWeighted(), "seed": 0}
    values, columns = nearest(**inputs, **options)
    assert (columns[:, 0] == 17).all()
    assert values[:, 0].isnan().all()
    assert not values[:, 1:].isnan().any()
    assert_same((values, columns), nearest(**inputs, **options, backend="reference"))


# -------------------------------------------------------------------------------- columns in blocks


def cuts(inputs: Inputs, *at: int) -> list[tuple[Tensor, ...]]:
    """The columns in blocks that end at these."""
    sizes = np.diff([0, *at, len(inputs["sem2"])]).tolist()
    columns = [x.split(sizes) for x in (inputs["sem2"], inputs["unc2"], inputs["labels2"])]
    return list(zip(*columns, strict=True))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays and tensors are cut into blocks of ten columns."""
    monkeypatch.setattr(_blocks, "BYTES", 1)
    monkeypatch.setattr(_blocks, "MULTIPLE", 10)


WAYS = {
    "whole": {},
    "conditions": {"where": "different", "above": torch.full((26,), 1.5)},
    "largest": {"largest": True, "where": "same"},
    "cosine": {"metric": Metric(form="cosine")},
    "draws": {"sample": DistanceWeighted(), "seed": 5},
}
each_way = pytest.mark.parametrize("way", WAYS)
in_each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def searched(way: str) -> tuple[dict[str, Any], dict[str, Any], Found]:
    """Rows and columns, the other arguments, and what is found in one call."""
    inputs = (on_a_sphere if way == "draws" else draw)(26, 57, *([] if way == "draws" else [7, 5]))
    inputs |= draw_labels(26, 57)
    options = {"k": 6, **WAYS[way]}
    return inputs, options, nearest(**inputs, **options)


@each_way
@in_each_backend
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("at", [(), (1,), (20, 40), (13, 13, 27), (0, 57)], ids=str)
def test_blocks_handed_over(at, backend, way):
    inputs, options, expected = searched(way)
    rows = {name: inputs[name] for name in ("sem", "unc", "labels")}
    blocks = cuts(inputs, *at)
    found = nearest(**rows, sem2=iter(blocks), **options, backend=backend)
    assert_same(found, expected)
    found = nearest(**rows, sem2=[list(block) for block in blocks], **options, backend=backend)
    assert_same(found, expected)


@each_way
@in_each_backend
@pytest.mark.usefixtures("small_tiles", "small_blocks")
def test_columns_of_an_array(backend, way):
    inputs, options, expected = searched(way)
    inputs |= {name: inputs[name].numpy() for name in ("sem2", "unc2", "labels2")}
    assert_same(nearest(**inputs, **options, backend=backend), expected)
    inputs["labels2"] = torch.from_numpy(inputs["labels2"])
    assert_same(nearest(**inputs, **options, backend=backend), expected)


@pytest.mark.usefixtures("small_tiles", "small_blocks")
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_columns_of_a_file(tmp_path, mode):
    inputs, options, expected = searched("conditions")
    for name in ("sem2", "unc2", "labels2"):
        np.save(tmp_path / f"{name}.npy", inputs[name].numpy())
        inputs[name] = np.load(tmp_path / f"{name}.npy", mmap_mode=mode)
    found = nearest(**inputs, **options)
    assert_same(found, expected)
    if mode == "c":  # what was written there is in memory alone
        inputs["sem2"][:] = 0
        nearest(**inputs, **options)
        assert not inputs["sem2"].any()


@pytest.mark.usefixtures("small_blocks")
def test_an_array_with_strides_and_one_without_uncertainties():
    inputs = draw(26, 57, 7, 5)
    wide = np.zeros((57, 14))
    wide[:, ::2] = inputs["sem2"].numpy()
    expected = nearest(**inputs | {"unc2": "zero"}, k=6)
    found = nearest(inputs["sem"], inputs["unc"], wide[:, ::2], "zero", k=6)
    assert_same(found, expected)
    expected = nearest(inputs["sem"], None, inputs["sem2"], k=6, metric=PLAIN)
    assert_same(nearest(inputs["sem"], None, wide[:, ::2], k=6, metric=PLAIN), expected)


def test_blocks_without_uncertainties():
    inputs = draw(26, 57, 7, 5)
    sem, unc, sem2, _ = inputs.values()
    expected = nearest(sem, unc, sem2, "zero", k=6)
    assert_same(nearest(sem, unc, sem2.split(10), "zero", k=6), expected)
    blocks = [(x, "zero") for x in sem2.split(10)]
    assert_same(nearest(sem, unc, blocks, k=6), expected)
    expected = nearest(sem, None, sem2, k=6, metric=PLAIN)
    assert_same(nearest(sem, None, sem2.split(10), k=6, metric=PLAIN), expected)


@each_dtype
def test_blocks_cut_where_tiles_are_give_the_same_bits(monkeypatch, dtype):
    monkeypatch.setattr(tile, "TILE", (20, 10))
    inputs = draw(26, 57, 7, 5, dtype=dtype) | draw_labels(26, 57)
    rows = {name: inputs[name] for name in ("sem", "unc", "labels")}
    for options in ({"where": "same"}, {"sample": DistanceWeighted(), "seed": 2}):
        whole = nearest(**inputs, k=6, **options)
        assert_identical(nearest(**rows, sem2=cuts(inputs, 10, 40), k=6, **options), whole)


@pytest.mark.usefixtures("small_tiles", "small_blocks")
@two_sets_and_self
def test_progress(m, capsys):
    inputs = draw(26, m, 7, 5)
    options = {"k": 6, "exclude_self": m is None}
    found = nearest(**inputs, **options, progress=True)
    assert_same(found, nearest(**inputs, **options))
    shown = capsys.readouterr().err
    count = 26 if m is None else m
    assert f"{count}.0/{count}.0" in shown
    assert "columns" in shown


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm; `pip install 'idml_fast"):
        nearest(**draw(26, 29, 7, 5), k=1, progress=True)


def test_autocast_reaches_blocks():
    inputs = draw(26, 57, 7, 5, dtype=FLOAT)
    sem, unc, sem2, unc2 = inputs.values()
    with torch.autocast("cpu", torch.bfloat16):
        expected = nearest(**inputs, k=6)
        found = [
            nearest(sem, unc, sem2.numpy(), unc2.numpy(), k=6),
            nearest(sem, unc, [(sem2, unc2)], k=6),
            nearest(sem, unc, sem2, unc2, k=6, progress=True),
        ]
    assert expected[0].dtype == torch.bfloat16
    for each in found:
        assert each[0].dtype == torch.bfloat16
        assert_identical(each, expected)


MEMORY = """
import sys
from pathlib import Path
import numpy as np, torch
from idml_fast import Metric, nearest

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[what].removesuffix("kB")) // 1024

columns = np.load(sys.argv[1], mmap_mode="r")
rows = torch.ones(64, columns.shape[1])
nearest(rows, None, columns[:100], k=5, metric=Metric.plain())  # loads code, starts threads
before = resident("VmRSS")
nearest(rows, None, columns, k=5, metric=Metric.plain())
print(columns.nbytes // 2**20, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' account of memory")
def test_a_file_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "columns.npy"
    columns = np.lib.format.open_memmap(path, "w+", np.float32, (2**18, 256))
    columns[:] = np.arange(256, dtype=np.float32)
    columns.flush()
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    size, most = map(int, ran.stdout.split())
    assert size == 256
    # A block, its pages of the file, and 20 MiB for tiles and candidates.
    assert most < 2 * _blocks.BYTES / 2**20 + 20


# -------------------------------------------------------------------- gradients, and other promises


def gradients(inputs: Inputs, weigh: Any, **options: Any) -> dict[str, Tensor]:
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items() if isinstance(x, Tensor)}
    values, columns = nearest(**inputs | leaves, **options)
    weigh(values.masked_fill(columns < 0, 0)).backward()
    return {k: x.grad for k, x in leaves.items()}


@pytest.mark.parametrize(
    ("metric", "draws"),
    [*((metric, False) for metric in METRICS.values()), (Metric(1.5, 0.25), True), (PLAIN, True)],
    ids=[*METRICS, "distance, drawn", "plain distance, drawn"],
)
@two_sets_and_self
def test_gradcheck(m, metric, draws):
    names = [k for k, x in draw(6, m, 3, 2).items() if x is not None]
    names = [k for k in names if metric.reads_unc or k.startswith("sem")]
    inputs = {k: x for k, x in on_a_sphere(6, 9 if m else None, 3).items() if x is not None}
    labels = draw_labels(6, 9 if m else None)
    options = {"k": 4, "metric": metric, "where": "different", **labels}
    if draws:
        options |= {"sample": DistanceWeighted(upto=2.0), "seed": 0}

    def values(*leaves):
        found, columns = nearest(**inputs | dict(zip(names, leaves, strict=True)), **options)
        return found.masked_fill(columns < 0, 0)

    leaves = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(values, leaves)


@pytest.mark.parametrize("form", FORMS)
def test_learned_tau_and_gamma(form):
    inputs = draw(26, 29, 7, 5)
    found = []
    for backend in ("cpu", "reference"):
        tau, gamma = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.5, 0.3))
        values, columns = nearest(**inputs, k=5, metric=Metric(tau, gamma, form), backend=backend)
        gradient = torch.autograd.grad(values.square().sum(), (tau, gamma))
        found.append((values.detach(), columns, *gradient))
    for ours, theirs in zip(*found, strict=True):
        assert_equals_in_double("value, column or gradient", ours.double(), theirs.double())


@each_metric
@two_sets_and_self
def test_gradients_are_those_of_the_reference(m, metric):
    """Near-duplicates and identical pairs are among them, and rows that find too few."""
    inputs = draw(26, m, 7, 5)
    if m is not None:
        inputs["sem2"][:20] = inputs["sem"][:20]
        inputs["sem2"][:10] *= 1 + 1e-4
    labels = draw_labels(26, m, classes=7)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(26, 6, dtype=torch.float64, generator=generator)
    options = {"k": 6, "metric": metric, "where": "same", **labels}
    ours, theirs = (
        gradients(inputs, lambda v: (v * weights).sum(), **options, backend=backend)
        for backend in ("cpu", "reference")
    )
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None or not ours[name].any()
        else:
            assert_equals_in_double(name, ours[name], gradient)


def test_nothing_of_what_is_not_found_has_a_gradient():
    """Not even where the upstream gradient of a missing value is NaN."""
    inputs = draw(4, 5, 3, 2)
    leaves = {k: x.requires_grad_() for k, x in inputs.items()}
    values, columns = nearest(**leaves, k=3, above=torch.full((4,), 1e9))
    assert (columns == -1).all()
    values.backward(torch.full_like(values, math.nan))
    assert all(not x.grad.any() for x in leaves.values())


def test_the_columns_have_no_gradient():
    inputs = {k: x.requires_grad_() for k, x in draw(4, 5, 3, 2).items()}
    values, columns = nearest(**inputs, k=2)
    assert values.requires_grad
    assert not columns.requires_grad
    assert not nearest(**{k: x.detach() for k, x in inputs.items()}, k=2)[0].requires_grad


def test_a_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in draw(4, 5, 3, 2).values()]
    values = nearest(*inputs, k=2)[0]
    (gradient,) = torch.autograd.grad(values.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_what_was_found_in_blocks_learns_by_paired():
    """As the docstring advises."""
    sem, unc, sem2, unc2 = draw(26, 57, 7, 5).values()
    sem.requires_grad_()
    with torch.no_grad():
        columns = nearest(sem, unc, [(sem2, unc2)], k=3)[1]
    index = torch.arange(26).repeat_interleave(3), columns.flatten()
    values = paired(sem, unc, sem2, unc2, index=index)
    expected = nearest(sem, unc, sem2, unc2, k=3)[0]
    assert_equals_in_double("values", values.view(26, 3), expected)
    gradient, expected = (torch.autograd.grad(x.sum(), sem)[0] for x in (values, expected))
    assert_equals_in_double("gradient", gradient, expected)


@pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])
def test_autocast(m):
    inputs = draw(26, m, 7, 5, dtype=FLOAT)
    halves = {k: None if x is None else x.bfloat16() for k, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(**inputs, k=5)
    assert_identical(found, nearest(**halves, k=5))


@pytest.mark.usefixtures("small_tiles")
@each_dtype
@two_sets_and_self
def test_the_same_bits_on_one_thread_and_on_two(m, dtype):
    inputs = draw(200, None if m is None else 300, 7, 5, dtype=dtype)
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads] = [
                *nearest(**inputs, k=5),
                *nearest(**inputs, k=5, sample=DistanceWeighted(), seed=1),
            ]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found.values()))


def test_a_hundred_repeats_give_the_same_bits():
    inputs = draw(70, 400, 7, 5, dtype=FLOAT)
    expected = nearest(**inputs, k=9)
    for _ in range(100):
        assert_identical(nearest(**inputs, k=9), expected)


@pytest.mark.parametrize("m", [9, None], ids=["two sets", "self"])
@pytest.mark.parametrize("draws", [False, True], ids=["best", "drawn"])
def test_opcheck(draws, m):
    inputs = [None if x is None else x.requires_grad_() for x in draw(6, m, 3, 2).values()]
    labels = draw_labels(6, m)
    learned = torch.tensor([1.5, 0.3], requires_grad=True)
    above = torch.zeros(6)
    weights, seed = ([3.0, 0.5, 1.4], torch.tensor(1)) if draws else ([], None)
    options = labels.get("labels2"), labels["labels"], "same", False, False, above, weights, seed, 3
    metric = math.nan, math.nan, learned, "distance"
    torch.library.opcheck(OP, (*inputs, *metric, *options, 0, None, None, None, "cpu"))


@pytest.mark.parametrize("draws", [False, True], ids=["best", "drawn"])
def test_compiles_into_one_graph(draws):
    inputs = {k: x.requires_grad_() for k, x in draw(26, 29, 7, 5).items()}
    options = {"k": 5, "where": "same", **draw_labels(26, 29)}
    if draws:
        options |= {"sample": DistanceWeighted(), "seed": 3}

    def loss(inputs):
        values, columns = nearest(**inputs, **options)
        return values.masked_fill(columns < 0, 0).square().sum(), columns

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value, columns = function(inputs)
        found.append([value.detach(), columns, *torch.autograd.grad(value, inputs.values())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


# ----------------------------------------------------------------------------------------- mistakes


SEM, UNC, SEM2, UNC2 = (torch.ones(shape) for shape in [(4, 8), (4, 3), (6, 8), (6, 3)])
LABELS, LABELS2 = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 0, 1, 2])
SETS = {"sem": SEM, "unc": UNC, "sem2": SEM2, "unc2": UNC2, "k": 1}
BLOCK = SEM2, UNC2


def blocks(*blocks: Any, **changes: Any) -> dict[str, Any]:
    return {"sem": SEM, "unc": UNC, "sem2": blocks, "k": 1} | changes


# what is wrong: (the arguments, the error, its whole message)
MISTAKES = {
    "k more than there are columns": (
        SETS | {"k": 7},
        ValueError,
        "k must be at most 6, the number of columns, got 7",
    ),
    "k more than there are rows": (
        {"sem": SEM, "unc": UNC, "k": 5},
        ValueError,
        "k must be at most 4, the number of columns, got 5",
    ),
    "k more than there are others": (
        {"sem": SEM, "unc": UNC, "k": 4, "exclude_self": True},
        ValueError,
        "k must be at most 3, the number of columns besides the row's own, got 4",
    ),
    "k more than there are in all blocks": (
        blocks(BLOCK, BLOCK, k=13),
        ValueError,
        "k must be at most 12, the number of columns, got 13",
    ),
    "no blocks": (blocks(), ValueError, "k must be at most 0, the number of columns, got 1"),
    "sample a string": (
        SETS | {"sample": "distance weighted"},
        TypeError,
        "sample must be an idml_fast.DistanceWeighted, got str",
    ),
    "seed without sample": (
        SETS | {"seed": 1},
        TypeError,
        "sample must be an idml_fast.DistanceWeighted, got None",
    ),
    "seed a float": (
        SETS | {"sample": SAMPLE, "seed": 1.0},
        TypeError,
        "seed must be an integer, got float",
    ),
    "seed negative": (
        SETS | {"sample": SAMPLE, "seed": -1},
        ValueError,
        "seed must be >= 0 and below 2**63, got -1",
    ),
    "largest with sample": (
        SETS | {"sample": SAMPLE, "largest": False},
        ValueError,
        "largest must be None with sample, got False",
    ),
    "sample by similarities": (
        SETS | {"sample": SAMPLE, "metric": Metric(form="cosine")},
        ValueError,
        "metric must be of form 'distance' with sample, got 'cosine'",
    ),
    "sem2 a number": (
        SETS | {"sem2": 3.0},
        TypeError,
        "sem2 must be a torch.Tensor, got float",
    ),
    "an array of objects": (
        SETS | {"sem2": np.empty((6, 8), object)},
        TypeError,
        "sem2 must be of a dtype that PyTorch has, got object",
    ),
    "an array of the other byte order": (
        SETS | {"sem2": np.empty((6, 8), ">f4")},
        TypeError,
        "sem2 must be of a dtype that PyTorch has, got >f4",
    ),
    "an array of another dtype": (
        SETS | {"sem2": np.empty((6, 8))},
        TypeError,
        "sem2 must be float32 like sem, got float64",
    ),
    "an array of another width": (
        SETS | {"sem2": np.empty((6, 7), np.float32)},
        ValueError,
        "sem2 must have shape [M, 8] like sem [4, 8], got [6, 7]",
    ),
    "an array with too few uncertainties": (
        SETS | {"sem2": SEM2.numpy(), "unc2": UNC2.numpy()[:5]},
        ValueError,
        "unc2 must have shape [6, 3] like sem2 and unc [6, 8], got [5, 3]",
    ),
    "an array without uncertainties": (
        SETS | {"sem2": SEM2.numpy(), "unc2": None},
        TypeError,
        "unc2 must be given together with unc, got None",
    ),
    "an array of labels that are too few": (
        SETS
        | {"sem2": SEM2.numpy(), "labels": LABELS, "labels2": np.ones(5, int), "where": "same"},
        ValueError,
        "labels2 must have shape [6] like sem2 [6, 8], got [5]",
    ),
    "a block of another width": (
        blocks(BLOCK, (SEM2[:, :7], UNC2)),
        ValueError,
        "sem2 of block 1 must have shape [M, 8] like sem [4, 8], got [6, 7]",
    ),
    "a block of another dtype": (
        blocks(BLOCK, (SEM2, UNC2.double())),
        TypeError,
        "unc2 of block 1 must be float32 like sem, got float64",
    ),
    "a block on another device": (
        blocks((SEM2.to("meta"), UNC2)),
        ValueError,
        "sem2 of block 0 must be on cpu like sem, got meta",
    ),
    "a block without uncertainties": (
        blocks(BLOCK, SEM2),
        TypeError,
        "unc2 of block 1 must be given together with unc, got None",
    ),
    "a block without labels": (
        blocks(BLOCK, labels=LABELS, where="same"),
        TypeError,
        "labels2 of block 0 must be a torch.Tensor, got None",
    ),
    "a block with labels that are too few": (
        blocks((*BLOCK, LABELS2[:5]), labels=LABELS, where="same"),
        ValueError,
        "labels2 of block 0 must have shape [6] like sem2 of block 0 [6, 8], got [5]",
    ),
    "a block of another kind": (
        blocks(BLOCK, {"sem2": SEM2}),
        TypeError,
        "block 1 of sem2 must be a torch.Tensor or a tuple (sem2, unc2) or (sem2, unc2, labels2), "
        "got dict",
    ),
    "a block of four": (
        blocks((*BLOCK, LABELS2, LABELS2)),
        ValueError,
        "block 0 of sem2 must be a tuple (sem2, unc2) or (sem2, unc2, labels2), got 4 items",
    ),
    "uncertainties beside blocks": (
        blocks(BLOCK, unc2=UNC2),
        TypeError,
        "unc2 must be part of the blocks of sem2, or 'zero', got Tensor",
    ),
    "labels beside blocks": (
        blocks(BLOCK, labels=LABELS, labels2=LABELS2, where="same"),
        TypeError,
        "labels2 must be part of the blocks of sem2, got Tensor",
    ),
    "blocks that are the rows themselves": (
        blocks(BLOCK, exclude_self=True),
        ValueError,
        "exclude_self must be False with sem2: its columns are other items",
    ),
}
NO_GRADIENT = (
    " must not require a gradient with columns in blocks, whose values have none: search under "
    "torch.no_grad(), then compare with what was found by paired()"
)
LEARNS = torch.ones(4, 8, requires_grad=True)
MISTAKES |= {
    "rows that learn, blocks": (blocks(BLOCK, sem=LEARNS), ValueError, f"sem{NO_GRADIENT}"),
    "rows that learn, an array": (
        SETS | {"sem": LEARNS, "sem2": SEM2.numpy()},
        ValueError,
        f"sem{NO_GRADIENT}",
    ),
    "rows that learn, progress": (
        SETS | {"sem": LEARNS, "progress": True},
        ValueError,
        f"sem{NO_GRADIENT}",
    ),
    "blocks that learn": (
        blocks((LEARNS, torch.ones(4, 3))),
        ValueError,
        f"sem2 of block 0{NO_GRADIENT}",
    ),
    "a temperature that learns, blocks": (
        blocks(BLOCK, metric=Metric(torch.tensor(1.0, requires_grad=True))),
        ValueError,
        f"metric.tau{NO_GRADIENT}",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments, error, message):
    with pytest.raises(error) as raised:
        nearest(**arguments)
    assert type(raised.value) is error
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.5,), TypeError, "width must be an integer, got float"),
        ((1,), ValueError, "width must be >= 2, got 1"),
        ((8, 0), ValueError, "cutoff must be > 0, got 0"),
        ((8, "0.5"), TypeError, "cutoff must be a number, got str"),
        ((8, 0.5, 0.5), ValueError, "upto must be > cutoff = 0.5 and at most 2, got 0.5"),
        ((8, 0.5, 2.1), ValueError, "upto must be > cutoff = 0.5 and at most 2, got 2.1"),
    ],
)
def test_mistakes_about_draws(arguments, error, message):
    with pytest.raises(error) as raised:
        DistanceWeighted(*arguments)
    assert str(raised.value) == message


def test_mistakes_are_found_before_anything_is_computed(monkeypatch):
    def kernel(*arguments):
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(cpu_nearest, "forward", kernel)
    with pytest.raises(ValueError, match=r"^k must be at most 6"):
        nearest(**SETS | {"k": 7})


def test_rows_that_learn_can_be_searched_for_without_gradients():
    with torch.no_grad():
        assert not nearest(LEARNS, UNC, [BLOCK], k=1)[0].requires_grad
