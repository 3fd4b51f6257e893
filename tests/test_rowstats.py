"""`rowstats`: values and gradients of the kernel, its edges, its promises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from conftest import (
    FORMS,
    NAMES,
    Inputs,
    assert_accurate,
    assert_equals_in_double,
    draw,
    to_double,
)
from hypothesis import strategies
from idml_fast._cpu import tile
from torch import Tensor

from idml_fast import Metric, reference, rowstats
from idml_fast import backend as backends
from idml_fast.stats import (
    CONDITIONS,
    Count,
    Extremum,
    HingeCount,
    HingeSum,
    Histogram,
    LogSumExp,
    Max,
    Min,
    Statistic,
    Sum,
)

DOUBLE, FLOAT, HALVES = torch.float64, torch.float32, (torch.bfloat16, torch.float16)
METRICS = {
    **{form: Metric(1.5, 0.25, form) for form in FORMS},
    **{f"plain {form}": Metric.plain(form) for form in ("distance", "cosine")},
}
POWERS = 1.0, 2.0, 0.5, 3.0

each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
each_condition = pytest.mark.parametrize("where", CONDITIONS)
two_sets_and_self = pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])


@dataclasses.dataclass
class Problem:
    """Embeddings and labels."""

    inputs: Inputs
    labels: Tensor  # [N]
    labels2: Tensor | None  # [M], None: the rows against themselves

    def scores(self, metric: Metric) -> Tensor:  # [N, M]
        """In float64."""
        return reference.pairwise(**self.double().inputs, metric=metric)

    def change(self, **inputs: Any) -> Problem:
        """The same with other embeddings."""
        return dataclasses.replace(self, inputs=self.inputs | inputs)

    def double(self) -> Problem:
        """The same numbers in float64."""
        tensors = {k: x for k, x in self.inputs.items() if isinstance(x, Tensor)}
        return self.change(**to_double(tensors))


def problem(
    n: int,
    m: int | None,  # None: the rows against themselves
    ds: int = 9,
    du: int = 5,
    *,
    classes: int = 4,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Normally distributed embeddings, uniformly distributed labels."""
    generator = torch.Generator().manual_seed(seed + 1000)
    labels, labels2 = (
        None if k is None else torch.randint(classes, (k,), generator=generator) for k in (n, m)
    )
    return Problem(draw(n, m, ds, du, seed=seed, **options), labels, labels2)


# ----------------------------------------------------------------------------- the statistics asked


def gap(x: Tensor, share: float) -> Tensor:  # [N, M] -> [N]
    """A number per row within the widest gap between its values around a quantile, or anywhere if
    the values around it are all the same.

    Rounding moves no score across it, so a bound or a threshold there is the same to everybody.
    """
    count = x.shape[1]
    if count == 0:
        return torch.zeros(len(x))
    ends = x.amin(1, keepdim=True) - 1, x.amax(1, keepdim=True) + 1
    ordered = torch.cat([*ends, x], dim=1).sort(1).values
    gaps = ordered.diff(dim=1)
    position = torch.arange(count + 1) / (count + 1)
    preferred = ((position - share).abs() < 0.2) & (gaps > 1e-5)
    left = (gaps + 1e9 * preferred).argmax(1, keepdim=True)
    return (ordered.gather(1, left) + ordered.gather(1, left + 1))[:, 0].float() / 2


def statistics(scores: Tensor, where: str = "any", power: float = 1.0) -> dict[str, Statistic]:
    """Every statistic with every kind of window, fit for these scores."""
    x = scores**power
    low, middle, high = (gap(x, share) for share in (0.25, 0.5, 0.75))
    number = gap(x.reshape(1, -1), 0.5).item()
    least, greatest = (x.min().item(), x.max().item()) if x.numel() else (0.0, 1.0)
    spread = max(greatest - least, 1.0)
    bins = {"low": least + 0.1317 * spread, "high": least + 0.8631 * spread, "bins": 6}
    common = {"where": where, "power": power}
    return {
        "log-sum-exp": LogSumExp(**common, scale=-4.0, shift=0.3),
        "log-sum-exp above": LogSumExp(**common, scale=3.0, above=low),
        "sum": Sum(**common),
        "sum between": Sum(**common, above=low, below=high),
        "sum above a number": Sum(**common, above=number),
        "count": Count(**common),
        "count between": Count(**common, above=low, below=high),
        "count below a number": Count(**common, below=number),
        "hinge sum": HingeSum(**common, scale=1.5, threshold=middle),
        "hinge sum above": HingeSum(**common, scale=-2.0, threshold=high, above=low),
        "hinge sum from a number": HingeSum(**common, threshold=number),
        "hinge count": HingeCount(**common, scale=-2.0, threshold=high, above=low),
        "hinge count from a number": HingeCount(**common, threshold=number),
        "histogram": Histogram(**common, **bins),
        "histogram below": Histogram(**common, **bins, below=middle),
        "min": Min(**common),
        "min above": Min(**common, above=middle),
        "max": Max(**common),
        "max below": Max(**common, below=middle),
    }


STATISTICS = list(statistics(torch.zeros(1, 1)))
# One of each kind, for where a window does not matter. None with a number for all rows: that cannot
# lie in a gap between all scores that is wider than the errors of half dtypes.
KINDS = [
    "log-sum-exp",
    "sum between",
    "count between",
    "hinge sum above",
    "hinge count",
    "histogram",
    "min above",
    "max",
]


def in_turn(
    scores: Tensor, power: float = 1.0, first: int = 0, names: Sequence[str] = STATISTICS
) -> dict[str, Statistic]:
    """Of `statistics` one under each condition in turn, beginning with the ``first``."""
    under = [statistics(scores, where, power) for where in CONDITIONS]
    return {name: under[(k + first) % 3][name] for k, name in enumerate(names)}


def positive(problem: Problem, power: float) -> Problem:
    """With scores > 0 whatever the form, where the power needs it."""
    sides = {k: problem.inputs[k] for k in ("sem", "sem2")}
    if power == 0.5:
        sides = {k: None if x is None else x.abs() for k, x in sides.items()}
    return problem.change(**sides)


# ------------------------------------------------------------------------------------ what is found


def measure(
    problem: Problem,
    stats: Mapping[str, Statistic],
    metric: Metric,
    backend: str | None = None,
    *,
    learning: Mapping[str, Tensor] | None = None,  # [N] each
    apart: bool = False,
) -> dict[str, Tensor]:
    """The statistics by name, an extremum's columns under ``<name>.columns``, and the gradients of
    a random combination of them: of every embedding under ``grad_<input>``, of tensors in the
    metric under ``grad_tau`` and ``grad_gamma``, of thresholds under ``grad_<name>.threshold``.

    ``learning``: the rows of a statistic that are in the combination; infinite ones never are.
    ``apart=True``: a combination of each statistic alone, its gradients under
    ``grad_<input> of <name>``.
    """

    def leaf(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        leaves[name] = x.detach().requires_grad_()
        return leaves[name]

    leaves: dict[str, Tensor] = {}
    inputs = {k: leaf(k, x) for k, x in problem.inputs.items()}
    metric = dataclasses.replace(
        metric, tau=leaf("tau", metric.tau), gamma=leaf("gamma", metric.gamma)
    )
    stats = {
        name: dataclasses.replace(stat, threshold=leaf(f"{name}.threshold", stat.threshold))
        if type(stat) is HingeSum
        else stat
        for name, stat in stats.items()
    }
    labels = {"labels": problem.labels, "labels2": problem.labels2}
    found = rowstats(**inputs, **labels, metric=metric, stats=stats, backend=backend)
    assert list(found) == list(stats)
    results, learned, upstream = {}, {}, {}
    for position, (name, x) in enumerate(found.items()):
        if isinstance(x, Extremum):
            results[f"{name}.columns"] = x.columns
            x = x.values
        results[name] = x.detach()
        if x.is_floating_point():
            generator = torch.Generator().manual_seed(position)
            weights = torch.randn(x.shape, generator=generator).to(x)
            rows = (learning or {}).get(name, x.new_ones(len(x)))
            weights *= rows.view(-1, *[1] * (x.dim() - 1))
            learned[name] = x
            upstream[name] = weights.masked_fill(~x.detach().isfinite(), 0)
    if not learned:
        return results
    combinations = {f" of {name}": [name] for name in learned} if apart else {"": list(learned)}
    for suffix, names in combinations.items():
        gradients = torch.autograd.grad(
            [learned[name] for name in names],
            list(leaves.values()),
            [upstream[name] for name in names],
            retain_graph=apart,
            allow_unused=True,
            materialize_grads=True,
        )
        named = zip(leaves, gradients, strict=True)
        results |= {f"grad_{k}{suffix}": x for k, x in named}
    return results


def without_the_nonfinite(what: str, truth: Tensor, *results: Tensor) -> list[Tensor]:
    """The results with 0 for what is infinite or NaN, once that is found to be as in the truth."""
    nonfinite = ~truth.isfinite()
    for x in results:
        torch.testing.assert_close(
            x.masked_fill(~nonfinite, 0).double(),
            truth.masked_fill(~nonfinite, 0).double(),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda message: f"{what}: {message}",
        )
    return [x.masked_fill(nonfinite, 0) for x in results]


def assert_same_in_double(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Integers are equal, the rest to 1e-10."""
    assert ours.keys() == truth.keys()
    for what, x in ours.items():
        if not x.is_floating_point():
            assert torch.equal(x, truth[what]), what
            continue
        x, expected = without_the_nonfinite(what, truth[what], x, truth[what])
        # The gradient of a float32 threshold is rounded to float32.
        if x.dtype == FLOAT:
            torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
        else:
            assert_equals_in_double(what, x, expected)


def assert_equals_the_reference(
    problem: Problem, stats: Mapping[str, Statistic], metric: Metric
) -> None:
    """In float64."""
    ours = measure(problem, stats, metric)
    assert_same_in_double(ours, measure(problem, stats, metric, "reference"))


def undisputed(problem: Problem, stat: Statistic, metric: Metric, eps: float) -> Tensor:
    """The rows in which rounding does not exchange one extremum for another, or move a score across
    the centre of a histogram's bin, where its derivative jumps."""
    scores = problem.scores(metric)
    x = scores**stat.power
    near = 4 * eps * x.abs().clamp_min(1)
    if isinstance(stat, Histogram):
        centres = torch.linspace(stat.low, stat.high, stat.bins + 1).to(x)
        return ~((x[:, :, None] - centres).abs() < near[:, :, None]).any(2).any(1)
    if not isinstance(stat, Min | Max):
        return torch.ones_like(problem.labels, dtype=torch.bool)
    meets = reference.columns_looked_at(
        scores, problem.labels, problem.labels2, stat.where, exclude_self=problem.labels2 is None
    )
    best = stat.reduce(scores, meets)
    column = best.columns.clamp_min(0)[:, None]
    second = stat.reduce(scores, meets.scatter(1, column, False)).values
    return (second - best.values).abs() > near.gather(1, column)[:, 0]


def in_other_orders(problem: Problem, count: int) -> Iterator[tuple[Problem, dict[str, Tensor]]]:
    """The problem with the components of its embeddings shuffled, so that the same sums are taken
    in another order; and by input, how to put its components back."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        shuffled, back = {}, {}
        orders: dict[str, Tensor] = {}
        for k, x in problem.inputs.items():
            if isinstance(x, Tensor):
                order = orders.setdefault(
                    k.removesuffix("2"), torch.randperm(x.shape[1], generator=generator)
                )
                shuffled[k], back[k] = x[:, order], order.argsort()
        yield problem.change(**shuffled), back


def assert_follows_the_rule(
    problem: Problem,
    stats: Mapping[str, Statistic],
    metric: Metric,
    eps: float | None = None,  # of the products; None: that of the inputs' dtype
    *,
    backend: str | None = None,
    apart: bool = True,
) -> None:
    """`assert_accurate` of every statistic and of the gradients of each alone (``apart=False``: of
    all together); integers are equal.

    The results are too small a sample of eager's errors: it is taken over several orders of eager's
    sums as well.
    """
    eps = eps or torch.finfo(problem.inputs["sem"].dtype).eps
    learning = {name: undisputed(problem, stat, metric, eps) for name, stat in stats.items()}
    options = {"learning": learning, "apart": apart}
    ours = measure(problem, stats, metric, backend, **options)
    truth = measure(problem.double(), stats, metric, "reference", **options)
    eagers = []
    for shuffled, back in in_other_orders(problem, 8):
        eager = measure(shuffled, stats, metric, "reference", **options)
        for k, order in back.items():
            for what in eager:
                if what.split(" of ")[0] == f"grad_{k}":
                    eager[what] = eager[what][:, order]
        eagers.append(eager)
    assert all(x.keys() == ours.keys() for x in (truth, *eagers))
    for what, x in ours.items():
        if what.endswith(".columns"):
            sure = learning[what.removesuffix(".columns")]
            assert torch.equal(x[sure], truth[what][sure]), what
        elif not x.is_floating_point():
            assert torch.equal(x, truth[what]), what
        else:
            eager = [eager[what] for eager in eagers]
            x, expected, *eager = without_the_nonfinite(what, truth[what], x, truth[what], *eager)
            eager = torch.stack(eager)
            assert_accurate(what, x.expand_as(eager), eager, expected.expand_as(eager))


# ---------------------------------------------------------------------------- values and gradients


@each_condition
@two_sets_and_self
@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic_alone(name, m, where):
    given, metric = problem(37, m), METRICS["distance"]
    stat = statistics(given.scores(metric), where)[name]
    assert_equals_the_reference(given, {"it": stat}, metric)


@each_metric
@pytest.mark.usefixtures("small_tiles")
@two_sets_and_self
@pytest.mark.parametrize("power", POWERS)
def test_all_statistics_together(power, m, metric):
    given = positive(problem(53, m), power)
    stats = in_turn(given.scores(metric), power, POWERS.index(power))
    assert_equals_the_reference(given, stats, metric)


@pytest.mark.usefixtures("small_tiles")
@two_sets_and_self
def test_statistics_of_several_powers_and_windows_together(m):
    given, metric = problem(37, m), METRICS["distance"]
    stats = {
        f"{name}, {power}": stat
        for power in POWERS
        for name, stat in in_turn(given.scores(metric), power).items()
    }
    assert_equals_the_reference(given, stats, metric)


SHAPES = {
    "aligned": (32, 64, 64, 64),
    "ragged": (37, 29, 19, 11),  # no power of two, no multiple of a vector
    "one row": (1, 29, 19, 11),
    "one column": (37, 1, 19, 11),
    "one pair": (1, 1, 19, 11),
    "width 1": (17, 13, 1, 1),
    "unc wider than sem": (17, 13, 5, 70),
    "self": (33, None, 19, 11),
    "self, one row": (1, None, 19, 11),
    "self, two rows": (2, None, 19, 11),
    "no rows": (0, 3, 19, 11),
    "no columns": (3, 0, 19, 11),
    "no pairs": (0, 0, 19, 11),
    "self, no rows": (0, None, 19, 11),
}


@each_metric
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, metric):
    given = problem(*shape)
    stats = in_turn(given.scores(metric))
    if metric.larger_is_closer and shape[2] == 1:  # the cosines are 1, to the last bit but one
        stats = {name: stat for name, stat in stats.items() if not isinstance(stat, Min | Max)}
    assert_equals_the_reference(given, stats, metric)


@pytest.mark.parametrize(
    ("n", "m"),
    [
        (tile.TILE[0] + 1, tile.TILE[1] + 1),
        (1, math.prod(tile.TILE) + 1),
        (tile.SELF_TILE[0] + 1, None),
    ],
    ids=["two sets", "one row", "self"],
)
def test_beyond_a_tile(n, m):
    given, metric = problem(n, m, 2, 2), METRICS["distance"]
    threshold = torch.full((n,), 1.0, dtype=DOUBLE)
    stats = {
        "log-sum-exp": LogSumExp(where="different", scale=-2.0),
        "hinge sum": HingeSum(where="same", scale=-1.0, threshold=threshold),
        "min": Min(where="same"),
    }
    assert_equals_the_reference(given, stats, metric)


ACCURACY = {"two sets": (48, 100, 67, 35), "self": (80, None, 67, 35)}


@each_metric
@pytest.mark.parametrize("shape", ACCURACY.values(), ids=ACCURACY)
def test_accuracy_in_float(shape, metric):
    given = problem(*shape, dtype=FLOAT)
    assert_follows_the_rule(given, in_turn(given.scores(metric), names=KINDS), metric)


@each_metric
@pytest.mark.parametrize("shape", [(48, 40, 33, 17), (44, None, 33, 17)], ids=ACCURACY)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_accuracy_in_half(dtype, shape, metric):
    given = problem(*shape, dtype=dtype)
    assert_follows_the_rule(given, in_turn(given.scores(metric), names=KINDS), metric)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 700, 9, 5), (200, None, 9, 5)], ids=ACCURACY)
def test_accuracy_of_sums_over_many_columns(shape, form):
    """The weights of a row have one sign, so that its gradient is large beside each of its terms:
    adding them one by one to that would lose their last digits."""
    given, metric = problem(*shape, dtype=FLOAT), METRICS[form]
    stats = {"sum": Sum(where="any"), "log-sum-exp": LogSumExp(where="different")}
    assert_follows_the_rule(given, stats, metric)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("power", [2.0, 0.5])
@pytest.mark.parametrize("shape", ACCURACY.values(), ids=ACCURACY)
def test_accuracy_over_many_tiles(shape, power):
    given, metric = problem(*shape, dtype=FLOAT), METRICS["distance"]
    assert_follows_the_rule(given, in_turn(given.scores(metric), power, names=KINDS), metric)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [7, None], ids=["two sets", "self"])
@each_condition
def test_gradcheck(where, m, form):
    given = problem(5, m, 3, 2, classes=2)
    metric = Metric(*(torch.tensor(x, dtype=DOUBLE) for x in (1.5, 0.25)), form)
    stats = statistics(given.scores(metric), where)
    stats = {k: x for k, x in stats.items() if not isinstance(x, Count | HingeCount)}
    thresholds = {k: x.threshold.double() for k, x in stats.items() if k.startswith("hinge sum ab")}
    inputs = {k: x for k, x in given.inputs.items() if x is not None}
    leaves = [x.requires_grad_() for x in (*inputs.values(), *thresholds.values())]

    def values(tau, gamma, *leaves):
        tensors = dict(zip([*inputs, *thresholds], leaves, strict=True))
        asked = {
            k: dataclasses.replace(x, threshold=tensors[k]) if k in thresholds else x
            for k, x in stats.items()
        }
        found = rowstats(
            **{k: tensors[k] for k in inputs},
            labels=given.labels,
            labels2=given.labels2,
            metric=Metric(tau, gamma, form),
            stats=asked,
        ).values()
        found = [x.values if isinstance(x, Extremum) else x for x in found]
        return tuple(x.masked_fill(x.isinf(), 0) for x in found)

    assert torch.autograd.gradcheck(
        values, [metric.tau.requires_grad_(), metric.gamma.requires_grad_(), *leaves]
    )


# ------------------------------------------------------------------------------ windows, thresholds


def test_a_threshold_per_row_learns():
    given, metric = problem(37, 29), METRICS["distance"]
    threshold = gap(given.scores(metric), 0.5).double().requires_grad_()
    options = {"where": "different", "scale": -2.0, "threshold": threshold}
    found = rowstats(
        **given.inputs,
        labels=given.labels,
        labels2=given.labels2,
        metric=metric,
        stats={"sum": HingeSum(**options), "count": HingeCount(**options)},
    )
    upstream = torch.linspace(-1, 1, 37, dtype=DOUBLE)
    (gradient,) = torch.autograd.grad(found["sum"], threshold, upstream)
    assert_equals_in_double("threshold", gradient, 2.0 * found["count"] * upstream)


def test_a_window_has_no_gradient():
    given, metric = problem(37, 29), METRICS["distance"]
    bound = gap(given.scores(metric), 0.5).double().requires_grad_()
    # The same tensor bounds and is the threshold, as the distance of a positive in a triplet.
    stats = {
        "hinge": HingeSum(where="any", scale=-1.0, threshold=bound + 0.5, above=bound),
        "sum": Sum(where="any", above=bound, below=bound + 1),
    }
    labels = {"labels": given.labels, "labels2": given.labels2}
    found, expected = (
        rowstats(**given.inputs, **labels, metric=metric, stats=stats, backend=backend)
        for backend in (None, "reference")
    )
    window = found["sum"].sum() + 0 * bound.sum()
    (nothing,) = torch.autograd.grad(window, bound, retain_graph=True)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    (gradient,) = torch.autograd.grad(found["hinge"].sum(), bound)
    (truth,) = torch.autograd.grad(expected["hinge"].sum(), bound)
    assert_equals_in_double("threshold", gradient, truth)


@pytest.mark.usefixtures("small_tiles")
@two_sets_and_self
def test_bounds_beyond_all_numbers(m):
    """What an extremum of a row without columns gives: it is used as a bound or a threshold."""
    given, metric = problem(37, m), METRICS["distance"]
    bounds = torch.tensor([-math.inf, math.inf, 2.0]).repeat(13)[:37]
    stats = {
        "above": Sum(where="different", above=bounds),
        "below": LogSumExp(where="different", below=bounds),
        "above, count": Count(where="any", above=bounds),
        "below, histogram": Histogram(where="same", below=bounds, low=1.01, high=3.02, bins=3),
        "min": Min(where="any", above=bounds),
        "max": Max(where="any", below=bounds),
        "numbers": Count(where="any", above=-math.inf, below=math.inf),
        "hinge": HingeSum(where="any", scale=-1.0, threshold=bounds.clamp(max=2.0)),
    }
    assert_equals_the_reference(given, stats, metric)


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_bounds_of_another_dtype(dtype):
    """Bounds and thresholds may be float64, or integers, beside any embeddings."""
    given, metric = problem(12, 9, dtype=dtype), METRICS["distance"]
    bounds = gap(given.scores(metric), 0.5)
    for same in (bounds.double(), torch.full((12,), 2)):
        stats = {
            "sum": Sum(where="any", above=same),
            "hinge": HingeSum(where="any", threshold=same),
        }
        expected = {
            "sum": Sum(where="any", above=same.float()),
            "hinge": HingeSum(where="any", threshold=same.float()),
        }
        labels = {"labels": given.labels, "labels2": given.labels2}
        found = rowstats(**given.inputs, **labels, metric=metric, stats=stats)
        truth = rowstats(**given.inputs, **labels, metric=metric, stats=expected)
        for name, x in found.items():
            assert x.dtype == FLOAT
            assert torch.equal(x, truth[name])


def test_the_values_of_an_extremum_can_bound_another_statistic():
    """Semi-hard negatives in two calls; the bound comes from the kernel's own scores."""
    given, metric = problem(37, None, dtype=FLOAT), METRICS["distance"]
    find = {"labels": given.labels, "metric": metric}
    hardest = rowstats(**given.inputs, **find, stats={"it": Max(where="any")})["it"].values
    beyond = Count(where="any", above=hardest)
    there = Count(where="any", below=hardest)
    found = rowstats(**given.inputs, **find, stats={"beyond": beyond, "there": there})
    assert found["beyond"].tolist() == [0] * 37
    assert found["there"].tolist() == [35] * 37  # all but itself and the hardest


# ---------------------------------------------------------------------------------- log-sum-exp


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
@pytest.mark.parametrize("scale", [1000.0, -1000.0])
@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_large_exponents(order, shift, scale, dtype):
    """exp(1000 x) overflows; exp(-1000 (x + 20)) is 0, however large it is among its like.

    Columns in the order of their scores, so that every tile or none exceeds those before it.
    """
    given, metric = problem(24, 150, 33, 17, dtype=dtype), METRICS["distance"]
    columns = given.scores(metric).mean(0).argsort(descending=order == "descending")
    inputs = {k: given.inputs[k][columns] for k in ("sem2", "unc2")}
    given = dataclasses.replace(given.change(**inputs), labels2=given.labels2[columns])
    stats = {
        f"power {power}": LogSumExp(where="different", scale=scale, shift=shift, power=power)
        for power in (1.0, 2.0)
    }
    assert all(x.isfinite().all() for x in measure(given, stats, metric).values())
    if dtype == DOUBLE:
        assert_equals_the_reference(given, stats, metric)
    else:
        assert_follows_the_rule(given, stats, metric)


def test_the_small_end_of_a_log_sum_exp():
    """One column more or less is seen however far below 1 all terms are."""
    sem, sem2 = torch.zeros(1, 1), torch.full((3, 1), 50.0)
    stats = {"it": LogSumExp(where="any", scale=-100.0)}
    for count in (1, 2, 3):
        labels = {"labels": torch.zeros(1).long(), "labels2": torch.zeros(count).long()}
        found = rowstats(
            sem.double(),
            None,
            sem2[:count].double(),
            **labels,
            metric=Metric.plain(),
            stats=stats,
        )["it"]
        assert found.item() == pytest.approx(-5000 + math.log(count), abs=1e-10)


# ------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "labels",
    [
        [5] * 20,  # one class: nobody has a "different" column
        list(range(20)),  # all distinct: nobody has a "same" column
        [0] * 19 + [1],  # one row without a positive
        [-1, 0, 1, -1] * 5,
    ],
    ids=["one class", "all distinct", "an only one", "negative"],
)
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("m", [20, None], ids=["two sets", "self"])
def test_labels(m, labels):
    labels, metric = torch.tensor(labels), METRICS["distance"]
    labels2 = None if m is None else torch.full((20,), 5)
    given = dataclasses.replace(problem(20, m), labels=labels, labels2=labels2)
    scores = given.scores(metric)
    stats = {
        f"{name}, {where}": stat
        for where in CONDITIONS
        for name, stat in statistics(scores, where).items()
    }
    assert_equals_the_reference(given, stats, metric)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype2", [None, *INTEGERS], ids=str)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_any_integer_dtype(dtype, dtype2):
    labels = torch.tensor([3, 0, 100, 3, 7]).to(dtype)
    labels2 = None if dtype2 is None else torch.tensor([3, 3, 7, 0]).to(dtype2)
    if dtype.is_signed and (dtype2 is None or dtype2.is_signed):
        labels[0] = -1
        if labels2 is not None:
            labels2[3] = -1
    inputs = draw(5, None if dtype2 is None else 4, 3, 2)
    found = rowstats(**inputs, labels=labels, labels2=labels2, stats={"it": Count(where="same")})[
        "it"
    ]
    same = labels.long()[:, None] == (labels if labels2 is None else labels2).long()
    if dtype2 is None:
        same.fill_diagonal_(False)
    assert torch.equal(found, same.sum(1))


def test_labels_are_compared_in_all_their_bits():
    labels = torch.tensor([1, 1 + 2**32, -(2**63), 2**63 - 1, 0])
    stats = {"same": Count(where="same"), "different": Count(where="different")}
    found = rowstats(**draw(5, 5, 3, 2), labels=labels, labels2=labels.flip(0), stats=stats)
    assert found["same"].tolist() == [1] * 5
    assert found["different"].tolist() == [4] * 5


# ----------------------------------------------------------------------- non-contiguous, degenerate


def strided(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    return x.repeat_interleave(2, 0).repeat_interleave(2, -1)[::2, ::2]


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "every other row and column"])
@two_sets_and_self
def test_non_contiguous_inputs(m, layout, dtype):
    given, metric = problem(37, m, dtype=dtype), METRICS["distance"]
    stats = in_turn(given.scores(metric), names=KINDS)
    views = {k: None if x is None else strided(x, layout) for k, x in given.inputs.items()}
    assert not any(x is not None and x.is_contiguous() for x in views.values())
    strided_stats = {
        name: dataclasses.replace(
            stat,
            **{
                k: x.repeat_interleave(3)[::3]
                for k in ("above", "below", "threshold")
                if isinstance(x := getattr(stat, k, None), Tensor)
            },
        )
        for name, stat in stats.items()
    }
    labels = {
        k: None if x is None else x.repeat_interleave(2)[::2]
        for k, x in (("labels", given.labels), ("labels2", given.labels2))
    }
    viewed = dataclasses.replace(given, inputs=views, **labels)
    if dtype == DOUBLE:
        truth = measure(given, stats, metric, "reference")
        assert_same_in_double(measure(viewed, strided_stats, metric), truth)
    else:
        assert_follows_the_rule(viewed, strided_stats, metric)


def test_bounds_expanded_from_one_number():
    given, metric = problem(37, 29), METRICS["distance"]
    stats = {
        "sum": Sum(where="any", above=torch.tensor(2.0).expand(37)),
        "hinge": HingeSum(where="any", threshold=torch.tensor(2.0).expand(37)),
    }
    assert_equals_the_reference(given, stats, metric)


def with_copies(m: int | None) -> Problem:
    """Every item three times, also among the columns. Of integers, so that all sums are exact and
    copies have equal scores to the bit."""
    given = problem(12, m)
    rounded = {k: None if x is None else (2 * x).round() for k, x in given.inputs.items()}
    copied = {k: None if x is None else x.repeat(3, 1) for k, x in rounded.items()}
    labels = given.labels.repeat(3)
    if m is None:
        return Problem(copied, labels, None)
    copied["sem2"] = torch.cat([copied["sem2"], copied["sem"]])
    copied["unc2"] = torch.cat([copied["unc2"], -copied["unc"]])  # beta = 0 with its row
    return Problem(copied, labels, torch.cat([given.labels2.repeat(3), labels]))


@each_metric
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("m", [5, None], ids=["two sets", "self"])
@pytest.mark.parametrize("power", POWERS)
def test_copies(power, m, metric):
    """alpha = 0: no gradient from such a pair, and no NaN, whatever is asked of it. Ties of extrema
    go to the smaller column."""
    given = positive(with_copies(m), power)
    stats = in_turn(given.scores(metric), power, POWERS.index(power))
    found = measure(given, stats, metric)
    assert all(x.isfinite().all() for what, x in found.items() if what.startswith("grad"))
    assert_same_in_double(found, measure(given, stats, metric, "reference"))


@pytest.mark.parametrize("form", FORMS)
def test_near_duplicates(form):
    sem, unc = draw(40, None, 33, 9)["sem"], draw(40, None, 9, 1)["sem"]
    near = sem + 1e-3 * draw(40, None, 33, 9, seed=1)["sem"]
    inputs = {"sem": sem, "unc": unc, "sem2": near, "unc2": unc + 0.1}
    inputs = {k: x.float() for k, x in inputs.items()}
    given = Problem(inputs, torch.arange(40), torch.arange(40))
    metric = Metric(100.0, 0.0, form)
    assert_follows_the_rule(given, in_turn(given.scores(metric), names=KINDS), metric)


@each_condition
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("m", "name"), [*((29, name) for name in NAMES), (None, "sem"), (None, "unc")]
)
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, torch.bfloat16], ids=str)
def test_nan_comes_out_where_it_is_looked_at(dtype, m, name, where):
    given, metric = problem(37, m, classes=9, dtype=dtype), METRICS["distance"]
    stats = statistics(given.scores(metric), where)
    given.inputs[name][23, 1] = math.nan
    find = {"labels": given.labels, "labels2": given.labels2, "metric": metric, "stats": stats}
    found = rowstats(**given.inputs, **find)
    meets = reference.columns_looked_at(
        given.scores(metric), given.labels, given.labels2, where, exclude_self=m is None
    )
    touched = torch.zeros_like(meets)
    if m is None or not name.endswith("2"):
        touched[23] = True
    if m is None or name.endswith("2"):
        touched[:, 23] = True
    looking = (meets & touched).any(1)
    assert looking.any()
    expected = rowstats(**given.inputs, **find, backend="reference")
    for what, x in found.items():
        truth = expected[what]
        if isinstance(x, Extremum):
            first = (meets & touched).int().argmax(1)
            assert torch.equal(x.columns[looking], first[looking]), what
            x, truth = x.values, truth.values
        if x.is_floating_point():
            assert x[looking].isnan().all(), what
            assert not x[~looking].isnan().any(), what
        if dtype == DOUBLE:
            assert_same_in_double({what: x}, {what: truth})


# ------------------------------------------------------------- certain items, learned tau and gamma


@each_metric
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("m", "certain"),
    [(29, ["unc"]), (29, ["unc2"]), (29, ["unc", "unc2"]), (None, ["unc"])],
    ids=["the rows", "the columns", "both", "self"],
)
def test_zero_stands_for_zeros(m, certain, metric):
    given = problem(37, m)
    zeros = given.change(**{k: torch.zeros_like(given.inputs[k]) for k in certain})
    stats = statistics(zeros.scores(metric), "different")
    expected = measure(zeros, stats, metric, "reference")
    for k in certain:
        del expected[f"grad_{k}"]
    said = given.change(**dict.fromkeys(certain, "zero"))
    assert_same_in_double(measure(said, stats, metric), expected)
    assert_same_in_double(measure(said, stats, metric, "reference"), expected)


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
@pytest.mark.parametrize("certain", ["unc", "unc2"])
def test_accuracy_beside_certain_items(certain, dtype):
    given, metric = problem(48, 40, 33, 17, dtype=dtype), METRICS["distance"]
    given.inputs[certain].zero_()
    stats = in_turn(given.scores(metric), names=KINDS)
    assert_follows_the_rule(given.change(**{certain: "zero"}), stats, metric)


def learnable(form: str, dtype: torch.dtype = DOUBLE) -> dict[str, Metric]:
    """Metrics of which tau, gamma or both get a gradient."""
    tau, gamma = (torch.tensor(x, dtype=dtype) for x in (1.5, 0.25))
    return {
        "tau": Metric(tau, 0.25, form),
        "gamma": Metric(1.5, gamma, form),
        "both": Metric(tau, gamma, form),
    }


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("which", ["tau", "gamma", "both"])
@pytest.mark.parametrize("form", FORMS)
@two_sets_and_self
def test_tau_and_gamma_learn(m, form, which):
    given, metric = problem(37, m), learnable(form)[which]
    stats = statistics(given.scores(METRICS[form]), "different")
    assert_equals_the_reference(given, stats, metric)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [5, None], ids=["two sets", "self"])
def test_tau_and_gamma_learn_nothing_from_copies(m, form):
    given = with_copies(m)
    for gamma in (0.25, 0.0):  # with 0 a copy of beta = 0 is not uncertain at all
        metric = Metric(*(torch.tensor(x, dtype=DOUBLE) for x in (1.5, gamma)), form)
        stats = {"sum": Sum(where="any"), "lse": LogSumExp(where="same", scale=-3.0)}
        found = measure(given, stats, metric)
        assert all(x.isfinite().all() for what, x in found.items() if what.startswith("grad"))
        assert_equals_the_reference(given, stats, metric)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("certain", [["unc"], ["unc", "unc2"]], ids=["the rows", "both"])
def test_tau_and_gamma_learn_beside_certain_items(certain, form):
    given, metric = problem(37, 29), learnable(form)["both"]
    said = given.change(**dict.fromkeys(certain, "zero"))
    zeros = given.change(**{k: torch.zeros_like(given.inputs[k]) for k in certain})
    stats = statistics(zeros.scores(METRICS[form]))
    expected = measure(zeros, stats, metric, "reference")
    for k in certain:
        del expected[f"grad_{k}"]
    assert_same_in_double(measure(said, stats, metric), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_accuracy_of_the_gradients_of_tau_and_gamma(dtype, form):
    """They are one number each: eager's error is sampled over several problems."""
    stats = {"it": LogSumExp(where="different", scale=-2.0)}
    found = {"ours": [], "eager": [], "truth": []}
    for seed in range(12):
        given = problem(24, 20, 33, 17, seed=seed, dtype=dtype)
        metric, exact = (learnable(form, x)["both"] for x in (FLOAT, DOUBLE))
        found["ours"].append(measure(given, stats, metric))
        found["eager"].append(measure(given, stats, metric, "reference"))
        found["truth"].append(measure(given.double(), stats, exact, "reference"))
    for what in ("grad_tau", "grad_gamma"):
        assert_accurate(what, *(torch.stack([x[what] for x in xs]) for xs in found.values()))


# --------------------------------------------------------------------------------- what it promises


@two_sets_and_self
@pytest.mark.parametrize(
    ("tiles", "self_tile"), [((1, 1), 1), ((16, 64), 33), ((3, 100), 64), ((64, 2), 17)]
)
def test_the_size_of_the_tiles_changes_rounding_only(monkeypatch, tiles, self_tile, m):
    monkeypatch.setattr(tile, "TILE", tiles)
    monkeypatch.setattr(tile, "SELF_TILE", (self_tile, self_tile))
    given, metric = problem(37, m, 67, 35, dtype=FLOAT), METRICS["cosine"]
    assert_follows_the_rule(given, in_turn(given.scores(metric), names=KINDS), metric)


@pytest.mark.usefixtures("small_tiles", "threads")
@two_sets_and_self
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_repeats_give_the_same_bits(dtype, m):
    """What is promised: with the same number of threads the same input gives the same bits."""
    given, metric = problem(41, m, 33, 17, dtype=dtype), learnable("distance", FLOAT)["both"]
    stats = statistics(given.scores(METRICS["distance"]), "different")
    first = measure(given, stats, metric)
    for _ in range(19):
        for what, x in measure(given, stats, metric).items():
            assert torch.equal(x, first[what]), what


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("n", "m"), [(150, 700), (600, None)], ids=["two sets", "self"])
def test_repeats_of_whole_tiles_give_the_same_bits(n, m):
    given, metric = problem(n, m, 33, 17, dtype=FLOAT), METRICS["cosine"]
    stats = {
        "lse": LogSumExp(where="different", scale=9.0),
        "hinge": HingeSum(where="same", threshold=torch.full((n,), 0.1)),
        "min": Min(where="any"),
    }
    first = measure(given, stats, metric)
    for _ in range(19):
        for what, x in measure(given, stats, metric).items():
            assert torch.equal(x, first[what]), what


@pytest.mark.parametrize("m", [13, None], ids=["two sets", "self"])
def test_any_inputs_may_require_gradients(m):
    given, metric = problem(17, m), METRICS["distance"]
    stats = {"lse": LogSumExp(where="different"), "max": Max(where="any")}
    everything = measure(given, stats, metric)
    labels = {"labels": given.labels, "labels2": given.labels2}
    for name in [k for k, x in given.inputs.items() if x is not None]:
        leaf = given.inputs[name].clone().requires_grad_()
        found = rowstats(**given.inputs | {name: leaf}, **labels, metric=metric, stats=stats)
        weights = [
            torch.randn(17, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1)
        ]
        (gradient,) = torch.autograd.grad([found["lse"], found["max"].values], leaf, weights)
        assert torch.equal(gradient, everything[f"grad_{name}"])


def test_nothing_requires_a_gradient():
    given = problem(17, 13)
    labels = {"labels": given.labels, "labels2": given.labels2}
    stats = {"sum": Sum(where="any"), "min": Min(where="any")}
    found = rowstats(**given.inputs, **labels, stats=stats)
    assert not found["sum"].requires_grad
    assert not found["min"].values.requires_grad


def test_no_statistics():
    given = problem(17, 13)
    assert rowstats(**given.inputs, labels=given.labels, labels2=given.labels2, stats={}) == {}


@two_sets_and_self
def test_a_graph_keeps_what_it_needs(m):
    """Also when it is used twice, and when another one comes between."""
    one, other = problem(37, m), problem(37, m, seed=1)
    metric = METRICS["distance"]
    stats = {"lse": LogSumExp(where="different"), "hinge": HingeSum(where="any", threshold=2.0)}

    def run(given):
        leaves = {
            k: None if x is None else x.clone().requires_grad_() for k, x in given.inputs.items()
        }
        find = {"labels": given.labels, "labels2": given.labels2, "metric": metric}
        found = rowstats(**leaves, **find, stats=stats)
        return found["lse"].sum() + found["hinge"].sum(), [
            x for x in leaves.values() if x is not None
        ]

    total, leaves = run(one)
    expected = torch.autograd.grad(total, leaves, retain_graph=True)
    between, others = run(other)
    torch.autograd.grad(between, others)
    for x, y in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, *HALVES], ids=str)
@pytest.mark.parametrize("form", FORMS)
@two_sets_and_self
def test_products_kept_for_the_backward_are_those_taken_again(monkeypatch, m, form, dtype):
    given, metric = problem(41, m, dtype=dtype), METRICS[form]
    stats = in_turn(given.scores(metric), names=KINDS)
    kept = measure(given, stats, metric)
    monkeypatch.setattr(backends, "workspace", 0)
    for what, x in measure(given, stats, metric).items():
        torch.testing.assert_close(x, kept[what], rtol=0, atol=0, equal_nan=True)


def test_inputs_are_left_as_they_were():
    given, metric = problem(37, 29, dtype=FLOAT), METRICS["distance"]
    stats = statistics(given.scores(metric), "same")
    bounds = [stats["sum between"].above, stats["hinge sum"].threshold]
    tensors = [*given.inputs.values(), given.labels, given.labels2, *bounds]
    before = [x.clone() for x in tensors]
    measure(given, stats, metric)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    n=strategies.integers(0, 30),
    m=strategies.none() | strategies.integers(0, 30),
    ds=strategies.integers(1, 9),
    du=strategies.integers(1, 6),
    classes=strategies.integers(1, 6),
    copies=strategies.booleans(),
    metric=strategies.sampled_from(sorted(METRICS)),
    certain=strategies.sampled_from([[], [], ["unc"], ["unc2"], ["unc", "unc2"]]),
    where=strategies.sampled_from(CONDITIONS),
    power=strategies.sampled_from(POWERS),
    names=strategies.sets(strategies.sampled_from(STATISTICS), min_size=1),
    tiles=strategies.tuples(strategies.integers(1, 40), strategies.integers(1, 40)),
    self_tile=strategies.integers(1, 40),
    workspace=strategies.sampled_from([0, backends.workspace]),
    seed=strategies.integers(0, 99),
)
def test_any_problem(
    n,
    m,
    ds,
    du,
    classes,
    copies,
    metric,
    certain,
    where,
    power,
    names,
    tiles,
    self_tile,
    workspace,
    seed,
):
    given, metric = problem(n, m, ds, du, classes=classes, seed=seed), METRICS[metric]
    if copies:  # of integers: then all sums are exact, and the scores of copies are equal
        given = given.change(
            **{
                k: (2 * x).round()[torch.arange(len(x)) % (len(x) // 2 + 1)]
                for k, x in given.inputs.items()
                if x is not None
            }
        )
        if metric.larger_is_closer:  # those of multiples are not, to the last bit
            names = {k for k in names if not k.startswith(("min", "max"))}
    given = positive(given, power)
    zeros = {k: torch.zeros_like(given.inputs[k]) for k in certain if given.inputs[k] is not None}
    stats = statistics(given.change(**zeros).scores(metric), where, power)
    stats = {name: stats[name] for name in sorted(names)}
    given = given.change(**dict.fromkeys(zeros, "zero"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile, "TILE", tiles)
        patch.setattr(tile, "SELF_TILE", (self_tile, self_tile))
        patch.setattr(backends, "workspace", workspace)
        assert_equals_the_reference(given, stats, metric)
