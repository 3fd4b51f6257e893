"""`rowstats` by the Triton kernels, under Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import pytest
import test_nearest
import torch
from conftest import FORMS, draw
from hypothesis import strategies
from test_rowstats import (
    HALVES,
    KINDS,
    METRICS,
    Problem,
    assert_follows_the_rule,
    in_turn,
    measure,
    positive,
    problem,
)
from test_rowstats_operation import BACKWARD_OP, OP, arguments
from test_triton import WAYS, Way, learnable, walking

from idml_fast import Metric, pairwise, reference, rowstats
from idml_fast.stats import Count, HingeSum, LogSumExp, Max, Min, Sum

pytestmark = pytest.mark.usefixtures("interpreter")

FLOAT = torch.float32
two_sets_and_self = pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])


def assert_accurate(given: Problem, stats: dict, metric: Metric) -> None:
    """All statistics, and the gradients of all of them together, keep the accuracy rule."""
    assert_follows_the_rule(given, stats, metric, backend="triton", apart=False)


def assert_reduces_its_scores(
    given: Problem, stats: dict, metric: Metric, backend: str = "triton"
) -> None:
    """What the definitions make of the backend's own scores: for shapes that are no sample of
    eager's errors. Only the rounding of sums over a row differs."""
    ours = measure(given, stats, metric, backend)
    with pytest.MonkeyPatch.context() as patch:

        def scores(*operands, metric):
            return pairwise(*operands, metric=metric, backend=backend)

        patch.setattr(reference, "pairwise", scores)
        expected = measure(given, stats, metric, "reference")
    for what, x in ours.items():
        if x.is_floating_point():
            torch.testing.assert_close(x, expected[what], rtol=1e-5, atol=1e-4, msg=what)
        else:
            assert torch.equal(x, expected[what]), what


POWERS = 1.0, 2.0, 3.0, 0.5, 1.5, 2.5


@pytest.mark.parametrize("way", ["one tile", "some tiles at a time"])
@two_sets_and_self
@pytest.mark.parametrize("power", POWERS)
def test_every_statistic(power, m, way):
    """Each with its windows and thresholds; the condition on labels goes in turn."""
    given, metric = problem(37, m, 19, 11, dtype=FLOAT), METRICS["distance"]
    stats = in_turn(given.scores(metric), power, POWERS.index(power) + (m is None))
    with walking(way):
        assert_accurate(given, stats, metric)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one tile"])
@two_sets_and_self
def test_every_way_to_walk(m, way):
    given, metric = problem(37, m, 19, 11, dtype=FLOAT), METRICS["cosine"]
    with walking(way):
        assert_accurate(given, in_turn(given.scores(metric), names=KINDS), metric)


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("metric", METRICS)
@two_sets_and_self
def test_accuracy_in_half(m, metric, dtype):
    given = problem(37, m, 19, 11, dtype=dtype)
    stats = in_turn(given.scores(METRICS[metric]), names=KINDS)
    with walking("one tile"):
        assert_accurate(given, stats, METRICS[metric])


@pytest.mark.parametrize("power", [2.0, 0.5])
@pytest.mark.parametrize("form", ["cosine", "official"])
def test_powers_of_cosines(form, power):
    given = positive(problem(37, 29, 19, 11, dtype=FLOAT), power)
    with walking("one tile"):
        stats = in_turn(given.scores(METRICS[form]), power, names=KINDS)
        assert_accurate(given, stats, METRICS[form])


@pytest.mark.parametrize("form", FORMS)
@two_sets_and_self
def test_tau_and_gamma_learn(m, form):
    """One number each: held to what the definitions make of the backend's own scores."""
    given, metric = problem(37, m, 19, 11, dtype=FLOAT), learnable(form)
    stats = {
        "lse": LogSumExp(where="different", scale=-2.0),
        "sum": Sum(where="same"),
    }
    with walking("some tiles at a time"):
        assert_reduces_its_scores(given, stats, metric)


@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
def test_zero_is_an_uncertainty_of_zeros(certain):
    given = problem(37, 29, 19, 11, dtype=FLOAT).change(**dict.fromkeys(certain, "zero"))
    spelt_out = dataclasses.replace(given).change(
        **{k: torch.zeros(37 if k == "unc" else 29, 11) for k in certain}
    )
    stats = in_turn(spelt_out.scores(METRICS["distance"]), names=KINDS)
    with walking("many tiles"):
        assert_accurate(given, stats, METRICS["distance"])


SHAPES = {
    "aligned": (32, 16, 16, 32),  # one column of tiles: the tiles give the results themselves
    "one row": (1, 29, 19, 11),
    "one column": (37, 1, 19, 11),
    "one pair": (1, 1, 19, 11),
    "width 1": (17, 13, 1, 1),
    "unc wider than sem": (17, 13, 5, 70),
    "self, one row": (1, None, 19, 11),
    "self, two rows": (2, None, 19, 11),
    "self, a row beyond a tile": (17, None, 19, 11),
    "no rows": (0, 3, 19, 11),
    "no columns": (3, 0, 19, 11),
    "no pairs": (0, 0, 19, 11),
    "self, no rows": (0, None, 19, 11),
}


@pytest.mark.parametrize("way", ["few tiles", "a tile at a time"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, way):
    given, metric = problem(*shape, dtype=FLOAT), METRICS["distance"]
    with walking(way):
        assert_reduces_its_scores(given, in_turn(given.scores(metric), names=KINDS), metric)


def test_more_tiles_than_are_combined_at_a_time():
    """`combine` takes 32 of them, as does the sum of the gradient's own weights."""
    given, metric = problem(3, 16 * 33, 4, 3, dtype=FLOAT), METRICS["distance"]
    stats = {"lse": LogSumExp(where="any"), "sum": Sum(where="same"), "min": Min(where="different")}
    with walking(Way()):
        assert_reduces_its_scores(given, stats, metric)


@two_sets_and_self
def test_labels_of_any_integer_dtype(m):
    given = problem(37, m, 5, 3, dtype=FLOAT)
    stats = {"sum": Sum(where="same"), "count": Count(where="different")}
    options = {"stats": stats, "backend": "triton"}
    labels2 = {} if m is None else {"labels2": given.labels2.repeat_interleave(2)[::2]}
    expected = rowstats(**given.inputs, labels=given.labels, **labels2, **options)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        labels = {"labels": given.labels.to(dtype), **labels2}
        found = rowstats(**given.inputs, **labels, **options)
        assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("way", ["one tile", "a tile at a time"])
@pytest.mark.parametrize("largest", [False, True])
def test_of_equal_extrema_the_first_is_found_and_a_nan_before_all(largest, way):
    inputs = test_nearest.on_a_grid(37, 29, dtype=FLOAT)
    inputs["sem2"][20] = math.nan
    labels = {"labels": torch.arange(37) % 2, "labels2": torch.arange(29) % 2}
    stats = {"it": (Max if largest else Min)(where="different")}
    options = {**labels, "metric": Metric.plain(), "stats": stats}
    with walking(way):
        found = rowstats(**inputs, **options, backend="triton")["it"]
    expected = rowstats(**inputs, **options, backend="reference")["it"]
    assert torch.equal(found.columns, expected.columns)
    torch.testing.assert_close(found.values, expected.values, equal_nan=True)


@pytest.mark.parametrize("name", ["sem", "unc2"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_of_an_item(value, name):
    """As in the definitions, through every kind of statistic; Inf may come out as NaN."""
    given = problem(19, 18, 6, 5, dtype=FLOAT)
    given.inputs[name][3, 2] = value
    stats = {
        "lse": LogSumExp(where="any", scale=-2.0),
        "sum": Sum(where="any", below=3.0),
        "count": Count(where="any", below=3.0),  # no window hides a NaN
        "hinge": HingeSum(where="any", threshold=1.0),
        "min": Min(where="any"),
    }
    options = {"labels": given.labels, "labels2": given.labels2, "stats": stats}
    with walking("many tiles"):
        found = rowstats(**given.inputs, **options, backend="triton")
    expected = rowstats(**given.inputs, **options, backend="reference")
    for what in ("lse", "sum", "hinge"):
        assert torch.equal(found[what].isfinite(), expected[what].isfinite()), what
    if math.isnan(value):
        assert torch.equal(found["count"], expected["count"])
    assert torch.equal(found["min"].values.isfinite(), expected["min"].values.isfinite())


@two_sets_and_self
def test_bounds_beyond_all_numbers(m):
    """What an extremum of a row without columns gives: it is used as a bound or a threshold."""
    given, metric = problem(37, m, 5, 3, dtype=FLOAT), METRICS["distance"]
    bounds = torch.tensor([-math.inf, math.inf, 2.0]).repeat(13)[:37]
    stats = {
        "above": Sum(where="different", above=bounds),
        "below": LogSumExp(where="different", below=bounds),
        "min": Min(where="same", above=bounds),
    }
    with walking("many tiles"):
        assert_reduces_its_scores(given, stats, metric)


def test_exponents_of_thousands():
    """A log-sum-exp is kept as its largest term's score, so that differences are exact."""
    given, metric = problem(20, 29, 9, 5, dtype=FLOAT), METRICS["distance"]
    stats = {
        "soft min": LogSumExp(where="any", scale=-1e4),
        "soft max": LogSumExp(where="any", scale=1e4, shift=1.0),
        "none": LogSumExp(where="any", scale=0.0),
    }
    with walking("a tile at a time"):
        assert_accurate(given, stats, metric)


@two_sets_and_self
def test_repeats_give_the_same_bits(m):
    given, metric = problem(20, m, 9, 5, dtype=FLOAT), learnable("distance")
    stats = in_turn(given.scores(METRICS["distance"]), names=KINDS)
    with walking("a tile at a time"):
        first = measure(given, stats, metric, "triton")
        for what, x in measure(given, stats, metric, "triton").items():
            assert torch.equal(x.nan_to_num(7), first[what].nan_to_num(7)), what


@pytest.mark.parametrize("m", [5, None], ids=["two sets", "self"])
def test_opcheck(m):
    given = arguments(m, 0, torch.tensor([5.0, 0.5]))
    learning = [
        x.detach().clone().requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in given
    ]
    torch.library.opcheck(OP, (*learning, "triton"))
    values, _, state, kept = OP(*given, "triton")
    wanted = [x is not None for x in (*given[:4], given[6])]
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(
        BACKWARD_OP, (upstream, state, kept, *given[:-1], "triton"), {"wanted": wanted}
    )


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)
@hypothesis.given(strategies.data())
def test_any_problem(data):
    """Whatever the shape, the metric, the tiles, the workspace and the statistics are."""

    def number(name, least, most):
        return data.draw(strategies.integers(least, most), label=name)

    def pick(name, *choices):
        return data.draw(strategies.sampled_from(choices), label=name)

    n, m, ds, du = (
        number(name, 1, most) for name, most in (("n", 40), ("m", 40), ("ds", 20), ("du", 20))
    )
    m = pick("columns", m, None)
    way = Way(
        tiles=pick("tiles", (16, 16), (32, 16), (32, 32)),
        few=pick("few", 0, 264),
        group=number("group", 1, 3),
        workspace=pick("workspace", 0, 4096, 2**28),
    )
    form = pick("form", *FORMS)
    power = pick("power", 1.0, 2.0) if form != "distance" else pick("power", *POWERS)
    given = Problem(
        draw(n, m, ds + 1, du, dtype=FLOAT, seed=number("seed", 0, 99)),
        **test_nearest.draw_labels(n, m) | ({"labels2": None} if m is None else {}),
    )
    metric = Metric(1.5, 0.25, form)
    stats = in_turn(given.scores(metric), power, number("first", 0, 2))
    chosen = data.draw(strategies.sets(strategies.sampled_from(sorted(stats)), min_size=1))
    with walking(way):
        assert_reduces_its_scores(given, {name: stats[name] for name in chosen}, metric)
