"""`rowstats`, `paired`, `nearest` and the statistics, against loops over single pairs."""

import itertools
import math

import pytest
import torch
from conftest import FORMS, NAMES, assert_accurate, assert_equals_in_double, draw, to_double

from idml_fast import Metric, nearest, paired, pairwise, reference, rowstats
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
    Sum,
)

BACKENDS = "cpu", "reference"
METRIC = Metric(1.5, 0.25)
each_backend = pytest.mark.parametrize("backend", [None, *BACKENDS])
each_condition = pytest.mark.parametrize("where", CONDITIONS)
two_sets_and_self = pytest.mark.parametrize("m", [9, None], ids=["two sets", "self"])

# Label 7 is only in the rows: they have no "same" column. In `labels2` 0 occurs four times.
LABELS = torch.tensor([0, 1, 2, 7, 0, 1])
LABELS2 = torch.tensor([0, 1, 2, 0, 1, 0, 1, 0, 1])


def problem(m, **options):
    """(inputs, labels of the rows and, unless None, of the columns)."""
    inputs = draw(6, m, 5, 3, **options)
    return inputs, {"labels": LABELS, "labels2": None if m is None else LABELS2}


def columns_of(i, scores, labels, labels2, where, exclude_self):
    """The columns that row i looks at, one by one."""
    others = labels if labels2 is None else labels2
    found = []
    for j in range(scores.shape[1]):
        same = labels is not None and labels[i] == others[j]
        meets = where == "any" or same == (where == "same")
        if meets and not (exclude_self and i == j):
            found.append(j)
    return found


# --------------------------------------------------------------------------------------- rowstats

THRESHOLDS = torch.linspace(0.5, 3, 6, dtype=torch.float64)
LOW, HIGH = THRESHOLDS - 0.25, THRESHOLDS + 1
PARAMETERS = {
    "log-sum-exp": (LogSumExp, {"scale": -2.0, "shift": 0.5}),
    "log-sum-exp above a number": (LogSumExp, {"scale": 3.0, "above": 1.5}),
    "log-sum-exp of cubes below a number a row": (LogSumExp, {"power": 3.0, "below": HIGH**3}),
    "sum": (Sum, {}),
    "sum of squares": (Sum, {"power": 2.0}),
    "sum of roots": (Sum, {"power": 0.5}),
    "sum between two numbers a row": (Sum, {"above": LOW, "below": HIGH}),
    "count": (Count, {}),
    "count of squares between two numbers": (Count, {"power": 2.0, "above": 1.0, "below": 6.0}),
    "hinge sum": (HingeSum, {"scale": -1.0, "threshold": 2.0}),
    "hinge sum, a threshold a row": (HingeSum, {"scale": 0.5, "threshold": THRESHOLDS}),
    "hinge sum above a number a row": (
        HingeSum,
        {"scale": -1.0, "threshold": HIGH, "above": LOW},
    ),
    "hinge count": (HingeCount, {"threshold": 1.5}),
    "hinge count below a number": (HingeCount, {"threshold": 1.0, "below": 2.5}),
    "histogram": (Histogram, {"low": 0.5, "high": 4.5, "bins": 5}),
    "histogram of squares": (Histogram, {"low": 0.0, "high": 9.0, "bins": 10, "power": 2.0}),
    "histogram below a number a row": (
        Histogram,
        {"low": 0.5, "high": 4.5, "bins": 5, "below": HIGH},
    ),
    "min": (Min, {}),
    "min above a number a row": (Min, {"above": LOW}),
    "max": (Max, {"power": 2.0}),
    "max of squares below a number": (Max, {"power": 2.0, "below": 4.0}),
}


def by_loop(
    kind,
    xs,
    columns,
    i,
    *,
    power=1.0,
    above=-math.inf,
    below=math.inf,
    scale=1.0,
    shift=0.0,
    threshold=0.0,
    **histogram,
):
    """One statistic of one row's scores ``xs``, which stand in ``columns``."""
    above, below, threshold = (
        x[i].item() if isinstance(x, torch.Tensor) else x for x in (above, below, threshold)
    )
    xs = [x**power for x in xs]
    columns = [j for x, j in zip(xs, columns, strict=True) if above < x < below]
    xs = [x for x in xs if above < x < below]
    hinges = [max(0.0, scale * (x - threshold)) for x in xs]
    if kind is LogSumExp:
        total = sum(math.exp(scale * (x - shift)) for x in xs)
        return math.log(total) if xs else -math.inf
    if kind is Histogram:
        low, bins = histogram["low"], histogram["bins"]
        width = (histogram["high"] - low) / bins
        centres = [low + b * width for b in range(bins + 1)]
        return [sum(max(0.0, 1 - abs(x - c) / width) for x in xs) for c in centres]
    if kind is Min:
        smallest = min(xs, default=math.inf)
        return smallest, columns[xs.index(smallest)] if xs else -1
    if kind is Max:
        largest = max(xs, default=-math.inf)
        return largest, columns[xs.index(largest)] if xs else -1
    return {
        Sum: sum(xs),
        Count: len(xs),
        HingeSum: sum(hinges),
        HingeCount: sum(h > 0 for h in hinges),
    }[kind]


@each_backend
@two_sets_and_self
@each_condition
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_statistic(name, where, m, backend):
    inputs, labels = problem(m)
    kind, parameters = PARAMETERS[name]
    stats = {"it": kind(where=where, **parameters)}
    found = rowstats(**inputs, **labels, metric=METRIC, stats=stats, backend=backend)["it"]
    scores = pairwise(**inputs, metric=METRIC, backend="reference")
    for i in range(6):
        looked_at = columns_of(i, scores, **labels, where=where, exclude_self=m is None)
        xs = [scores[i, j].item() for j in looked_at]
        expected = by_loop(kind, xs, looked_at, i, **parameters)
        if isinstance(found, Extremum):
            assert found.values[i].item() == pytest.approx(expected[0], abs=1e-10)
            assert found.columns[i].item() == expected[1]
        else:
            assert found[i].tolist() == pytest.approx(expected, abs=1e-10)


def test_shapes_and_dtypes():
    inputs, labels = problem(9, dtype=torch.float32)
    stats = {name: kind(where="any", **p) for name, (kind, p) in PARAMETERS.items()}
    found = rowstats(**inputs, **labels, stats=stats)
    assert list(found) == list(PARAMETERS)
    assert found["count"].dtype == found["hinge count"].dtype == torch.int64
    assert found["histogram"].shape == (6, 6)
    assert found["min"].columns.dtype == torch.int64
    floats = [found["sum"], found["log-sum-exp"], found["min"].values, found["histogram"]]
    assert all(x.dtype == torch.float32 for x in floats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_half_inputs_are_float32(dtype):
    inputs, labels = problem(9, dtype=dtype)
    stats = {"sum": Sum(where="any"), "max": Max(where="any")}
    found = rowstats(**inputs, **labels, stats=stats)
    assert found["sum"].dtype == found["max"].values.dtype == torch.float32
    exact = pairwise(**to_double(inputs)).sum(1)
    torch.testing.assert_close(found["sum"].double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_statistics_obey_the_accuracy_rule():
    inputs = draw(64, 256, 67, 35, dtype=torch.float32)
    labels, labels2 = torch.arange(64) % 8, torch.arange(256) % 8
    stats = {"lse": LogSumExp(where="different", scale=-4.0), "sum": Sum(where="same", power=2.0)}

    def found(inputs, backend):
        return rowstats(**inputs, labels=labels, labels2=labels2, stats=stats, backend=backend)

    ours, eager = found(inputs, "cpu"), found(inputs, "reference")
    truth = found(to_double(inputs), "reference")
    for what in stats:
        assert_accurate(what, ours[what], eager[what], truth[what])


@each_condition
@two_sets_and_self
def test_gradients_of_statistics(m, where):
    inputs, labels = problem(m)
    leaves = {k: x.requires_grad_() for k, x in inputs.items() if x is not None}
    # Rows without a "same" column are among them: their infinities stay out of the sum.
    stats = {
        name: kind(where=where, **parameters) for name, (kind, parameters) in PARAMETERS.items()
    }

    def total(*xs):
        given = dict(zip(leaves, xs, strict=True))
        found = rowstats(**given, **labels, metric=METRIC, stats=stats).values()
        parts = [x.values if isinstance(x, Extremum) else x for x in found]
        return sum(p.masked_fill(p.isinf(), 0).sum() for p in parts if p.is_floating_point())

    assert torch.autograd.gradcheck(total, tuple(leaves.values()))


@each_condition
def test_gradients_are_finite_where_no_column_meets_the_condition(where):
    """Two rows of one label, alone: "different" is empty; of two labels: "same" is empty."""
    stats = {
        name: kind(where=where, **p) for name, (kind, p) in PARAMETERS.items() if "row" not in name
    }
    for labels in ([0, 0], [0, 1]):
        leaves = [x.requires_grad_() for x in draw(2, None, 5, 3).values() if x is not None]
        found = rowstats(*leaves, labels=torch.tensor(labels), stats=stats).values()
        floats = [x.values if isinstance(x, Extremum) else x for x in found]
        for x in floats:
            if x.is_floating_point():
                gradients = torch.autograd.grad(x.sum(), leaves, retain_graph=True)
                assert all(g.isfinite().all() for g in gradients)


def test_a_threshold_per_row_learns():
    inputs, labels = problem(9)
    threshold = THRESHOLDS.clone().requires_grad_()
    stats = {
        "sum": HingeSum(where="any", threshold=threshold, scale=2.0),
        "count": HingeCount(where="any", threshold=threshold, scale=2.0),
    }
    found = rowstats(**inputs, **labels, stats=stats)
    (gradient,) = torch.autograd.grad(found["sum"].sum(), threshold)
    assert torch.equal(gradient, -2.0 * found["count"])  # -scale for every positive hinge


def test_a_tie_of_extrema_goes_to_the_smaller_column():
    sem = torch.tensor([[0.0], [1.0], [-1.0], [1.0], [0.5]])
    stats = {"min": Min(where="any"), "max": Max(where="any")}
    labels = torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    found = rowstats(
        sem[:1],
        None,
        sem[1:],
        labels=labels[0],
        labels2=labels[1],
        metric=Metric.plain(),
        stats=stats,
    )
    assert found["max"].columns.tolist() == [0]
    assert found["max"].values.tolist() == [1.0]
    assert found["min"].columns.tolist() == [3]


def test_an_infinite_score_is_not_mistaken_for_an_absent_one():
    scores = torch.tensor([[math.inf, math.inf], [-math.inf, -math.inf]])
    looked_at = torch.tensor([[False, True], [False, True]])
    smallest = Min(where="any").reduce(scores, looked_at)
    largest = Max(where="any").reduce(scores, looked_at)
    assert smallest.columns.tolist() == largest.columns.tolist() == [1, 1]


def test_a_window_is_open_at_both_ends():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    for low, high in [(1.0, 3.0), (torch.tensor([1.0]), torch.tensor([3.0]))]:
        stat = Sum(where="any", above=low, below=high)
        assert stat.reduce(scores, everything).tolist() == [2.0]
    infinite = Count(where="any", above=-math.inf, below=math.inf)
    assert infinite.reduce(scores, everything).tolist() == [4]
    assert infinite.reduce(torch.tensor([[-math.inf, 0.0, math.inf, 0.0]]), everything) == 2


def test_a_window_is_set_against_the_power_of_the_score():
    scores, everything = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert Sum(where="any", power=2.0, above=1.5).reduce(scores, everything).tolist() == [13.0]


def test_bounds_and_thresholds_take_the_dtype_of_the_scores():
    """0.1 in float64 is not the float32 score of 0.1: without it a score would exceed itself."""
    scores, everything = torch.tensor([[0.1]]), torch.ones(1, 1, dtype=torch.bool)
    tenth = torch.tensor([0.1], dtype=torch.float64)
    for bound in (0.1, tenth):
        assert Count(where="any", above=bound).reduce(scores, everything).tolist() == [0]
        assert Count(where="any", below=bound).reduce(scores, everything).tolist() == [0]
    hinge = HingeSum(where="any", threshold=tenth).reduce(scores, everything)
    assert hinge.dtype == torch.float32
    assert hinge.tolist() == [0.0]


def test_a_window_has_no_gradient():
    scores, everything = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    scores.requires_grad_()
    above = torch.tensor([1.5], requires_grad=True)
    found = Sum(where="any", above=above).reduce(scores, everything)
    by_score, by_bound = torch.autograd.grad(found.sum(), [scores, above], allow_unused=True)
    assert by_score.tolist() == [[0.0, 1.0, 1.0]]
    assert by_bound is None


NAN_ROWS = torch.tensor([[3.0, math.nan, 1.0, math.nan], [3.0, 2.0, 1.0, math.nan]])


@pytest.mark.parametrize(
    "name", [name for name, (kind, _) in PARAMETERS.items() if kind not in (Count, HingeCount)]
)
def test_no_window_hides_a_nan(name):
    """It comes out of the row that looks at it, and not of the one that does not."""
    kind, parameters = PARAMETERS[name]
    narrow = {"above": torch.zeros(2), "below": torch.tensor([-1.0, -1.0])}
    parameters = {k: x[:2] if isinstance(x, torch.Tensor) else x for k, x in parameters.items()}
    meets = torch.tensor([[True, True, True, True], [True, True, True, False]])
    for window in ({}, narrow):
        found = kind(where="any", **parameters | window).reduce(NAN_ROWS, meets)
        values = found.values if isinstance(found, Extremum) else found
        assert values[0].isnan().all()
        assert not values[1].isnan().any()


@pytest.mark.parametrize("kind", [Min, Max])
def test_the_first_nan_is_the_extremum(kind):
    found = kind(where="any").reduce(NAN_ROWS, torch.ones(2, 4, dtype=torch.bool))
    assert found.values.isnan().all()
    assert found.columns.tolist() == [1, 3]
    without_the_first = torch.tensor([[True, False, True, True], [False] * 4])
    found = kind(where="any").reduce(NAN_ROWS, without_the_first)
    assert found.values.isnan().tolist() == [True, False]
    assert found.columns.tolist() == [3, -1]


@pytest.mark.parametrize("kind", [Min, Max])
def test_the_gradient_of_an_extremum_goes_to_its_column_alone(kind):
    scores = torch.tensor([[2.0, 1.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    meets = torch.tensor([[True] * 4, [False, False, True, True]])
    found = kind(where="any").reduce(scores, meets)
    (gradient,) = torch.autograd.grad(found.values.sum(), scores)
    expected = torch.zeros(2, 4)
    expected[0, 1 if kind is Min else 0] = expected[1, 2] = 1
    assert torch.equal(gradient, expected)


def test_a_root_gives_no_gradient_where_it_has_none():
    """At 0, the distance of identical items, and in a column not looked at."""
    scores = torch.tensor([[0.0, 4.0, -1.0]], requires_grad=True)
    meets = torch.tensor([[True, True, False]])
    found = Sum(where="any", power=0.5).reduce(scores, meets)
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    assert found.tolist() == [2.0]
    assert gradient.tolist() == [[0.0, 0.25, 0.0]]


@each_backend
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, None)])
def test_rowstats_of_nothing(n, m, backend):
    inputs = draw(n, m, 5, 3)
    labels = {"labels": torch.zeros(n, dtype=torch.int64)}
    labels["labels2"] = None if m is None else torch.zeros(m, dtype=torch.int64)
    stats = {
        name: kind(where="same", **p) for name, (kind, p) in PARAMETERS.items() if "row" not in name
    }
    found = rowstats(**inputs, **labels, stats=stats, backend=backend)
    assert found["sum"].tolist() == [0.0] * n
    assert found["count"].tolist() == [0] * n
    assert found["log-sum-exp"].tolist() == [-math.inf] * n
    assert found["min"].values.tolist() == [math.inf] * n
    assert found["max"].columns.tolist() == [-1] * n
    assert found["histogram"].shape == (n, 6)


def test_extrema_of_no_columns_can_be_differentiated():
    inputs = {k: x.requires_grad_() for k, x in draw(3, 0, 5, 3).items()}
    labels = {"labels": torch.zeros(3).long(), "labels2": torch.zeros(0).long()}
    found = rowstats(**inputs, **labels, stats={"it": Min(where="any")})["it"]
    assert found.columns.dtype == torch.int64
    (gradient,) = torch.autograd.grad(found.values.sum(), inputs["sem"])
    assert torch.equal(gradient, torch.zeros(3, 5, dtype=torch.float64))


def test_statistics_under_autocast_are_float32():
    inputs, labels = problem(9, dtype=torch.float32)
    inputs["unc"] = inputs["unc"].bfloat16()  # what a layer under autocast may give
    with torch.autocast("cpu", torch.bfloat16):
        found = rowstats(**inputs, **labels, stats={"it": Sum(where="any")})["it"]
        values, _ = nearest(**inputs, k=1)
    assert found.dtype == torch.float32
    assert values.dtype == torch.bfloat16


def test_a_soft_histogram_counts_every_score_in_its_range_once():
    inputs, labels = problem(9)
    stats = {"h": Histogram(where="any", low=0.0, high=100.0, bins=7)}
    found = rowstats(**inputs, **labels, stats=stats)["h"]
    assert_equals_in_double("counts", found.sum(1), torch.full((6,), 9.0, dtype=torch.float64))


# ----------------------------------------------------------------------------------------- paired


@pytest.mark.parametrize("form", FORMS)
@two_sets_and_self
def test_paired_is_pairwise_at_the_listed_pairs(m, form):
    inputs, metric = draw(6, m, 5, 3), Metric(1.5, 0.25, form)
    leaves = {k: x.requires_grad_() for k, x in inputs.items() if x is not None}
    # Twice the same pair, an item with itself, no particular order.
    rows, cols = torch.tensor([0, 5, 5, 2, 3, 3]), torch.tensor([4, 1, 1, 0, 5, 3])
    found = paired(**leaves, index=(rows, cols), metric=metric)
    expected = pairwise(**leaves, metric=metric, backend="reference")[rows, cols]
    assert_equals_in_double("scores", found, expected)
    weights = torch.linspace(1, 2, 6, dtype=torch.float64)
    for x, y in zip(
        torch.autograd.grad(found @ weights, list(leaves.values())),
        torch.autograd.grad(expected @ weights, list(leaves.values())),
        strict=True,
    ):
        assert_equals_in_double("gradient", x, y)


def test_paired_without_an_index_is_the_diagonal():
    inputs = draw(6, 6, 5, 3)
    assert_equals_in_double("scores", paired(**inputs), pairwise(**inputs).diagonal())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_paired_identical_items(gamma, form):
    x, u = (x.requires_grad_() for x in list(draw(4, None, 5, 3).values())[:2])
    found = paired(x, u, x.detach().clone(), -u.detach(), metric=Metric(1.0, gamma, form))
    assert (found == (0.0 if form == "distance" else 1.0)).all()
    assert all(not g.any() for g in torch.autograd.grad(found.sum(), (x, u)))


@pytest.mark.parametrize("form", ["distance", "cosine"])
def test_paired_by_a_plain_metric_does_not_read_unc(form):
    sem, _, sem2, _ = draw(6, 6, 5, 3).values()
    metric = Metric.plain(form)
    found = paired(sem, None, sem2, metric=metric)
    assert_equals_in_double("scores", found, pairwise(sem, None, sem2, metric=metric).diagonal())


def test_paired_of_no_pairs():
    none = torch.zeros(0, dtype=torch.int64)
    assert paired(**draw(6, 9, 5, 3), index=(none, none)).shape == (0,)
    assert paired(**draw(0, 0, 5, 3)).shape == (0,)


# ---------------------------------------------------------------------------------------- nearest


def nearest_by_loop(i, scores, labels, k, *, where, largest, exclude_self, above):
    """The k best columns of row i, padded: [(value, column)]."""
    found = []
    for j in columns_of(i, scores, **labels, where=where, exclude_self=exclude_self):
        x = scores[i, j].item()
        if above is None or x > above[i].item():
            found.append((-x if largest else x, j))
    best = [(-x if largest else x, j) for x, j in sorted(found)[:k]]
    return best + [(-math.inf if largest else math.inf, -1)] * (k - len(best))


@each_condition
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("largest", [False, True, None])
@pytest.mark.parametrize(
    ("m", "exclude_self"), [(9, False), (None, False), (None, True)], ids=["two", "self", "others"]
)
def test_nearest(m, exclude_self, largest, k, where):
    inputs, labels = problem(m)
    scores = reference.pairwise(**inputs, metric=METRIC)
    for above in (None, scores.mean(1)):
        values, columns = nearest(
            **inputs,
            **labels,
            k=k,
            metric=METRIC,
            where=where,
            largest=largest,
            exclude_self=exclude_self,
            above=above,
            backend="reference",
        )
        options = {"where": where, "exclude_self": exclude_self, "above": above}
        for i in range(6):
            expected = nearest_by_loop(i, scores, labels, k, largest=bool(largest), **options)
            assert list(zip(values[i].tolist(), columns[i].tolist(), strict=True)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_nearest_by_what_the_metric_means(form):
    inputs, metric = draw(6, 9, 5, 3), Metric(form=form)
    values, columns = nearest(**inputs, k=9, metric=metric)
    expected = pairwise(**inputs, metric=metric).sort(dim=1, descending=form != "distance")
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)


@each_backend
@pytest.mark.parametrize("largest", [False, True])
def test_a_tie_goes_to_the_smaller_column(largest, backend):
    sem = torch.tensor([[0.0]])
    sem2 = torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0]]).repeat(20, 1)
    metric = Metric.plain()
    found = nearest(sem, None, sem2, k=100, metric=metric, largest=largest, backend=backend)
    assert found[1].tolist() == [list(range(100))]


def test_nearest_with_an_infinite_score():
    """A column not looked at comes after an infinite one that is."""
    scores = torch.tensor([[math.inf, 1.0, 0.0]])
    found = reference.best_columns(scores, 3, None, None, "any", False, False, torch.tensor([0.5]))
    assert found[0].tolist() == [[1.0, math.inf, math.inf]]
    assert found[1].tolist() == [[1, 0, -1]]


def test_gradients_of_nearest_values():
    inputs = [x.requires_grad_() for x in draw(4, 5, 3, 2).values()]

    def values(*xs):
        labels = {"labels": torch.arange(4) % 2, "labels2": torch.arange(5) % 3}
        found = nearest(*xs, k=5, metric=METRIC, where="same", **labels, backend="reference")[0]
        return found.masked_fill(found.isinf(), 0)  # fewer than k

    assert torch.autograd.gradcheck(values, inputs)


# ---------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("op", ["pairwise", "paired", "nearest", "rowstats"])
def test_the_public_function_and_the_reference_agree(op):
    """`idml_fast.reference` is what the tests and the benchmarks compare with."""
    inputs, labels = problem(6)[0], {"labels": LABELS, "labels2": LABELS2[:6]}
    more = {
        "nearest": {"k": 2, "where": "different", **labels},
        "rowstats": {"stats": {"it": Sum(where="same")}, **labels},
    }.get(op, {})
    public = {"pairwise": pairwise, "paired": paired, "nearest": nearest, "rowstats": rowstats}[op]
    one = public(**inputs, **more, metric=METRIC, backend="reference")
    other = getattr(reference, op)(**inputs, **more, metric=METRIC)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_pair_by_pair(form):
    """The definition is checked against its own letters."""
    inputs, metric = draw(4, 3, 5, 3), Metric(1.5, 0.25, form)
    scores = reference.pairwise(**inputs, metric=metric)
    for i, j in itertools.product(range(4), range(3)):
        s, u, t, v = (inputs[k][j if k.endswith("2") else i] for k in NAMES)
        alpha, beta = torch.dist(s, t).item(), torch.dist(u, -v).item()
        power = 2 if form == "official" else 1
        decay = math.exp(-(beta**power + 0.25) / (1.5 * alpha**power))
        cos = torch.cosine_similarity(s, t, dim=0).item()
        expected = alpha * decay if form == "distance" else 1 - (1 - cos) * decay
        assert scores[i, j].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_embedding_is_not_masked(name, form):
    """exp(-inf) would make the score of an infinitely uncertain item a plain 0 or 1."""
    inputs = draw(4, 4, 5, 3)
    inputs[name][2, 1] = math.inf
    touched = torch.zeros(4, 4, dtype=torch.bool)
    if name.endswith("2"):
        touched[:, 2] = True
    else:
        touched[2] = True
    metric = Metric(form=form)
    scores = reference.pairwise(**inputs, metric=metric)
    assert torch.equal(~scores.isfinite(), touched)
    listed = reference.paired(**inputs, metric=metric)
    assert torch.equal(~listed.isfinite(), touched.diagonal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", [Metric.plain("cosine"), Metric.paper("cosine")], ids=str)
def test_no_cosine_of_parallel_items_exceeds_one(metric, dtype):
    sem, unc, _, unc2 = draw(256, 256, 7, 3, dtype=dtype).values()
    inputs = {"sem": sem, "unc": unc, "sem2": 2.5 * sem, "unc2": unc2}
    assert reference.pairwise(**inputs, metric=metric).max() <= 1
    assert reference.paired(**inputs, metric=metric).max() <= 1


def test_gradients_of_nearly_parallel_items():
    """1 - cos is beneath the rounding of a cosine here, its gradient is not."""
    sem, _, noise, _ = draw(256, 256, 7, 3, dtype=torch.float32).values()
    sem = torch.nn.functional.normalize(sem)
    sem2 = 2.5 * sem + 1e-4 * noise

    def gradient(sem):
        sem.requires_grad_()
        scores = reference.paired(sem, None, sem2.to(sem.dtype), metric=Metric.plain("cosine"))
        return torch.autograd.grad(scores.sum(), sem)[0]

    exact = gradient(sem.double())
    assert exact.norm(dim=1).min() > 1e-5
    torch.testing.assert_close(gradient(sem).double(), exact, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------- certain items, "zero"

OPTIONS = {  # of the operations in turn
    "pairwise": {},
    "paired": {"index": (torch.tensor([0, 5, 2]), torch.tensor([4, 1, 0]))},
    "nearest": {"k": 2},
    "rowstats": {"labels": LABELS, "labels2": LABELS2, "stats": {"it": Sum(where="different")}},
}


def options_of(op, m):
    """`OPTIONS` for two sets, or (``m=None``) for the rows against themselves."""
    options = dict(OPTIONS[op])
    if m is None and "labels2" in options:
        options["labels2"] = None
    return options


def tensors(op, found):
    """What an operation returned, as a list."""
    if op == "rowstats":
        return [found["it"]]
    return list(found) if op == "nearest" else [found]


def results_and_gradients(op, inputs, metric, **options):
    """All results of an operation of the reference, then its gradients by tensor."""
    given = {
        k: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x
        for k, x in inputs.items()
    }
    found = tensors(op, getattr(reference, op)(**given, metric=metric, **options))
    leaves = {k: x for k, x in given.items() if isinstance(x, torch.Tensor)}
    gradients = torch.autograd.grad(found[0].sum(), list(leaves.values()), allow_unused=True)
    return found, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("m", "certain"),
    [(9, ["unc"]), (9, ["unc2"]), (9, ["unc", "unc2"]), (None, ["unc"])],
    ids=["the rows", "the columns", "both", "self"],
)
def test_zero_stands_for_zeros(m, certain, form, op):
    inputs, metric, options = draw(6, m, 5, 3), Metric(1.5, 0.25, form), options_of(op, m)
    zeros = {k: torch.zeros_like(inputs[k]) for k in certain}
    expected, expected_gradients = results_and_gradients(op, inputs | zeros, metric, **options)
    found, gradients = results_and_gradients(
        op, inputs | dict.fromkeys(certain, "zero"), metric, **options
    )
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    for name, x in gradients.items():
        assert torch.equal(x, expected_gradients[name])


@pytest.mark.parametrize("op", OPTIONS)
def test_a_plain_metric_reads_no_zero(op):
    inputs, metric = draw(6, 9, 5, 3), Metric.plain()
    certain = {"unc": "zero", "unc2": "zero"}
    found, _ = results_and_gradients(op, inputs | certain, metric, **OPTIONS[op])
    expected, _ = results_and_gradients(op, inputs, metric, **OPTIONS[op])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# ----------------------------------------------------------------------- learned tau and gamma


def learned(tau=1.5, gamma=0.25, dtype=torch.float64):
    return [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (tau, gamma)]


def with_identical_pairs(m):
    """Row 1 is row 4, column 3 and column 5; the last is as certain a pair as can be (beta = 0)."""
    inputs = draw(6, m, 5, 3)
    inputs["sem"][1] = inputs["sem"][4]
    if m is not None:
        inputs["sem2"][3] = inputs["sem2"][5] = inputs["sem"][1]
        inputs["unc2"][5] = -inputs["unc"][1]
    return inputs


@pytest.mark.parametrize("form", FORMS)
@two_sets_and_self
def test_derivatives_by_tau_and_gamma_pair_by_pair(m, form):
    inputs, (tau, gamma) = with_identical_pairs(m), learned()
    s, u = inputs["sem"], inputs["unc"]
    t, v = (s, u) if m is None else (inputs["sem2"], inputs["unc2"])
    scores = reference.pairwise(**inputs, metric=Metric(tau, gamma, form))
    power = 2 if form == "official" else 1
    for i, j in itertools.product(range(len(s)), range(len(t))):
        alpha, beta = torch.dist(s[i], t[j]).item(), torch.dist(u[i], -v[j]).item()
        by_tau = by_gamma = 0.0
        if alpha > 0:
            r = (beta**power + 0.25) / (1.5 * alpha**power)
            base = alpha
            if form != "distance":
                base = torch.cosine_similarity(s[i], t[j], dim=0).item() - 1
            by_tau = base * math.exp(-r) * r / 1.5
            by_gamma = -base * math.exp(-r) / (1.5 * alpha**power)
        found = torch.autograd.grad(scores[i, j], [tau, gamma], retain_graph=True)
        assert [x.item() for x in found] == pytest.approx([by_tau, by_gamma], abs=1e-10)


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
@two_sets_and_self
def test_gradients_of_tau_and_gamma(m, form, op):
    inputs, options = with_identical_pairs(m), options_of(op, m)
    # sem stays out of it: a distance has no derivative at 0.
    unc = [inputs[k].requires_grad_() for k in ("unc", "unc2") if inputs[k] is not None]

    def values(tau, gamma, *unc):
        given = inputs | dict(zip(("unc", "unc2"), unc, strict=False))
        found = getattr(reference, op)(**given, metric=Metric(tau, gamma, form), **options)
        return tensors(op, found)[0]

    assert torch.autograd.gradcheck(values, [*learned(), *unc])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_gradients_are_finite_at_identical_and_nearly_identical_items(gamma, dtype, form):
    sem = draw(8, None, 5, 1)["sem"].to(dtype)
    near = sem * (1 + torch.finfo(dtype).eps)
    inputs = {"sem": torch.cat([sem, near, sem]), "unc": draw(24, None, 3, 1)["sem"].to(dtype)}
    leaves = [x.requires_grad_() for x in inputs.values()] + learned(0.5, gamma, dtype)
    scores = reference.pairwise(*leaves[:2], metric=Metric(*leaves[2:], form))
    assert scores.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(scores.sum(), leaves))
