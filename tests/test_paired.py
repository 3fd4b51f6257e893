"""`paired`: values and gradients of the kernel, its edges, its promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import FORMS, assert_accurate, assert_equals_in_double, draw, to_double
from torch import Tensor

from idml_fast import Metric, paired, pairwise

OP = torch.ops.idml_fast.paired
BACKWARD_OP = torch.ops.idml_fast.paired_backward
DOUBLE, FLOAT = torch.float64, torch.float32
DTYPES = {"fp32": FLOAT, "bf16": torch.bfloat16, "fp16": torch.float16}
METRICS = {
    **{form: Metric(1.5, 0.25, form) for form in FORMS},
    **{f"plain {form}": Metric.plain(form) for form in ("distance", "cosine")},
}

each_form = pytest.mark.parametrize("form", FORMS)
each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
two_sets_and_self = pytest.mark.parametrize("m", [23, None], ids=["two sets", "self"])


def draw_index(n, m, count, seed=0):
    """Positions of rows and of columns, with repetitions."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(k, (count,), generator=generator) for k in (n, m or n))


def measure(inputs, index, metric, backend=None) -> dict[str, Tensor]:
    """The scores, and the gradients of all embeddings for an upstream gradient drawn for them."""
    leaves = {
        k: x.detach().requires_grad_() if isinstance(x, Tensor) else x for k, x in inputs.items()
    }
    scores = paired(**leaves, index=index, metric=metric, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(len(scores), generator=generator, dtype=DOUBLE).to(FLOAT)
    given = {k: x for k, x in leaves.items() if isinstance(x, Tensor)}
    gradients = torch.autograd.grad(
        scores, list(given.values()), upstream.to(scores), allow_unused=True
    )
    found = {k: g for k, g in zip(given, gradients, strict=True) if g is not None}
    return {"scores": scores.detach()} | found


def assert_follows_the_rule(inputs, index, metric):
    ours, eager = (measure(inputs, index, metric, backend) for backend in (None, "reference"))
    truth = measure(to_double(inputs), index, metric, "reference")
    assert ours.keys() == eager.keys() == truth.keys()
    for what, x in ours.items():
        assert_accurate(what, x, eager[what], truth[what])


def assert_equals_the_reference(inputs, index, metric):
    ours, truth = (measure(inputs, index, metric, backend) for backend in (None, "reference"))
    assert ours.keys() == truth.keys()
    for what, x in ours.items():
        assert_equals_in_double(what, x, truth[what])


# ----------------------------------------------------------------------------- values and gradients

SHAPES = {  # n, m, ds, du, pairs
    "ragged": (37, 23, 19, 5, 301),
    "self": (37, None, 19, 5, 301),
    "wider than a vector": (10, 7, 200, 130, 99),
    "width 1": (9, 8, 1, 1, 40),
    "one item": (1, 1, 5, 3, 4),
    "one item, self": (1, None, 5, 3, 4),
    "no pairs": (5, 4, 3, 2, 0),
    "most items in no pair": (500, None, 6, 4, 10),
}


@each_metric
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, metric):
    n, m, ds, du, count = shape
    assert_equals_the_reference(draw(n, m, ds, du), draw_index(n, m, count), metric)


@each_metric
@two_sets_and_self
@each_dtype
def test_accuracy(dtype, m, metric):
    inputs = draw(37, m, 48, 20, dtype=dtype)
    assert_follows_the_rule(inputs, draw_index(37, m, 400), metric)


@each_form
def test_without_an_index_rows_meet_the_columns_beside_them(form):
    inputs, metric = draw(30, 30, 8, 5), Metric(1.5, 0.25, form)
    assert_equals_the_reference(inputs, None, metric)
    diagonal = pairwise(**inputs, metric=metric).diagonal()
    assert_equals_in_double("scores", paired(**inputs, metric=metric), diagonal)


@each_form
@two_sets_and_self
def test_scores_are_those_of_pairwise(m, form):
    inputs, (rows, cols) = draw(37, m, 19, 5), draw_index(37, m, 301)
    metric = Metric(1.5, 0.25, form)
    found = paired(**inputs, index=(rows, cols), metric=metric)
    assert_equals_in_double("scores", found, pairwise(**inputs, metric=metric)[rows, cols])


@each_form
@two_sets_and_self
def test_an_item_in_many_pairs(m, form):
    # More than a chunk of 256, for one row and for one column.
    rows, cols = draw_index(20, m, 10_000)
    rows[:6000], cols[3000:] = 4, 7
    assert_equals_the_reference(draw(20, m, 9, 5), (rows, cols), Metric(1.5, 0.25, form))


@each_form
@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
def test_zero_is_an_uncertainty_of_zeros(certain, form):
    inputs, index = draw(30, 23, 9, 5), draw_index(30, 23, 200)
    metric = Metric(1.5, 0.25, form)
    named = measure(inputs | dict.fromkeys(certain, "zero"), index, metric)
    zeros = {name: torch.zeros_like(inputs[name]) for name in certain}
    truth = measure(inputs | zeros, index, metric, "reference")
    for what, x in named.items():
        assert_equals_in_double(what, x, truth[what])


@each_form
@two_sets_and_self
def test_every_subset_of_inputs_that_require_gradients(m, form):
    inputs, index, metric = draw(9, m, 5, 3), draw_index(9, m, 40), Metric(1.5, 0.25, form)
    everything = measure(inputs, index, metric)
    names = [k for k, x in inputs.items() if x is not None]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            leaves = {
                k: None if x is None else x.clone().requires_grad_(k in chosen)
                for k, x in inputs.items()
            }
            scores = paired(**leaves, index=index, metric=metric)
            generator = torch.Generator().manual_seed(1)
            scores.backward(torch.randn(40, generator=generator, dtype=DOUBLE).float().double())
            for name in names:
                if name in chosen:
                    assert torch.equal(leaves[name].grad, everything[name])
                else:
                    assert leaves[name].grad is None


@each_form
@two_sets_and_self
def test_gradcheck(m, form):
    inputs, index = draw(5, m and 4, 3, 2), draw_index(5, m and 4, 12)
    if m is None:
        index[1][0] = index[0][0]  # an item with itself
    inputs["sem"][1] = inputs["sem"][2]
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
    leaves += [torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in (1.5, 0.25)]

    def scores(*xs):
        *embeddings, tau, gamma = xs
        embeddings += [None] * (4 - len(embeddings))
        return paired(*embeddings, index=index, metric=Metric(tau, gamma, form))

    assert torch.autograd.gradcheck(scores, leaves)


# -------------------------------------------------------------------------------------------- edges


@two_sets_and_self
@each_dtype
def test_non_contiguous(dtype, m):
    inputs, index = draw(37, m, 19, 5, dtype=dtype), draw_index(37, m, 100)
    metric = Metric(1.5, 0.25)
    plain = measure(inputs, index, metric)
    for strided in (
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, -x], dim=2)[:, :, 0],
        lambda x: torch.cat([x, x])[: len(x)],
    ):
        changed = {k: None if x is None else strided(x) for k, x in inputs.items()}
        spaced = tuple(torch.stack([x, -x], dim=1)[:, 0] for x in index)
        found = measure(changed, spaced, metric)
        for what, x in plain.items():
            assert torch.equal(found[what], x)


@each_form
@each_dtype
def test_identical_items_are_exact_and_learn_nothing(dtype, form):
    inputs = draw(20, 20, 33, 9, dtype=dtype)
    inputs["sem2"] = inputs["sem"].clone()
    found = measure(inputs, None, Metric(1.5, 0.25, form))
    assert torch.equal(found["scores"], torch.full((20,), float(form != "distance"), dtype=dtype))
    for name in ("unc", "unc2"):
        assert torch.equal(found[name], torch.zeros_like(inputs[name]))
    if form == "distance":
        assert torch.equal(found["sem"], torch.zeros_like(inputs["sem"]))


@each_form
def test_near_duplicates_follow_the_rule(form):
    inputs = draw(200, 200, 33, 9, dtype=FLOAT)
    inputs["sem2"] = inputs["sem"] + 1e-4 * inputs["sem2"]
    assert_follows_the_rule(inputs, None, Metric(50.0, 0.0, form))


@each_form
@pytest.mark.parametrize("name", ["sem", "unc"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_comes_out(value, name, form):
    inputs, (rows, cols) = draw(20, 15, 8, 5), draw_index(20, 15, 100)
    inputs[name][3, 2] = value
    scores = paired(**inputs, index=(rows, cols), metric=Metric(1.5, 0.25, form))
    assert torch.equal(scores.isfinite(), rows != 3)


def test_negative_columns_of_the_backward_are_no_pairs():
    inputs, (rows, cols) = draw(20, 15, 8, 5), draw_index(20, 15, 100)
    operands = (*inputs.values(), 1.5, 0.25, torch.tensor([1.5, 0.25]), "distance")
    upstream = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    missing = torch.arange(100) % 3 == 0
    kept = ~missing
    expected = BACKWARD_OP(
        upstream[kept], *operands, rows[kept], cols[kept], "cpu", wanted=[True] * 5
    )
    upstream[missing] = math.nan
    cols[missing] = -1
    found = BACKWARD_OP(upstream, *operands, rows, cols, "cpu", wanted=[True] * 5)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# --------------------------------------------------------------------------------- what it promises


@two_sets_and_self
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits_at_every_repeat_and_number_of_threads(dtype, m):
    rows, cols = draw_index(50, m, 5000)
    rows[:2000] = 11
    inputs, metric = draw(50, m, 33, 9, dtype=dtype), Metric(1.5, 0.25)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = measure(inputs, (rows, cols), metric)
        torch.set_num_threads(2)
        for _ in range(20):
            for what, x in measure(inputs, (rows, cols), metric).items():
                assert torch.equal(x, first[what])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("m", "indexed"),
    [(6, True), (6, False), (None, True)],
    ids=["two sets", "without an index", "self"],
)
def test_opcheck(m, indexed):
    drawn = draw(6, m, 4, 3, dtype=FLOAT).values()
    inputs = [None if x is None else x.requires_grad_() for x in drawn]
    learned = torch.tensor([1.5, 0.25], requires_grad=True)
    index = draw_index(6, 6, 20) if indexed else (None, None)
    operands = (*inputs, math.nan, math.nan, learned, "cosine")
    torch.library.opcheck(OP, (*operands, *index, "cpu"))
    upstream = torch.ones(20 if indexed else 6)
    wanted = [x is not None for x in (*inputs, learned)]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in operands]
    torch.library.opcheck(BACKWARD_OP, (upstream, *detached, *index, "cpu"), {"wanted": wanted})


@two_sets_and_self
def test_compiled_without_graph_breaks(m):
    inputs = draw(20, m and 15, 8, 5, dtype=FLOAT)
    index = draw_index(20, m and 15, 50)
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]

    def total():
        return paired(**inputs, index=index, metric=Metric.paper()).square().sum()

    expected = torch.autograd.grad(total(), leaves)
    found = torch.autograd.grad(torch.compile(total, fullgraph=True)(), leaves)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_takes_its_dtype():
    inputs, index = draw(20, 15, 8, 5, dtype=FLOAT), draw_index(20, 15, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = paired(**inputs, index=index)
    assert torch.equal(found, paired(*(x.bfloat16() for x in inputs.values()), index=index))


def test_no_second_derivative():
    inputs, index = draw(20, 15, 8, 5), draw_index(20, 15, 50)
    sem = inputs["sem"].requires_grad_()
    (gradient,) = torch.autograd.grad(paired(**inputs, index=index).sum(), sem, create_graph=True)
    with pytest.raises(RuntimeError, match="paired has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["rows", "cols"])
def test_an_index_on_another_device_is_a_mistake(name):
    inputs, (rows, cols) = draw(20, 15, 8, 5), draw_index(20, 15, 50)
    moved = (rows.to("meta"), cols) if name == "rows" else (rows, cols.to("meta"))
    with pytest.raises(ValueError, match=rf"^index {name} must be on cpu like sem, got meta$"):
        paired(**inputs, index=moved)
