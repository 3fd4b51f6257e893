"""`paired` in the Triton backend, under Triton's interpreter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton.language as tl
from conftest import Inputs, assert_accurate, draw, to_double
from idml_fast._triton import paired as kernels
from test_paired import draw_index, each_dtype, each_form, each_metric, two_sets_and_self
from torch import Tensor

from idml_fast import Metric, reference
from idml_fast._operands import operands

pytestmark = pytest.mark.usefixtures("interpreter")

OP = torch.ops.idml_fast.paired
FLOAT = torch.float32
Index = tuple[Tensor, Tensor] | None  # rows and columns


def measure(
    inputs: Inputs, index: Index, metric: Metric, *, eager: bool = False
) -> dict[str, Tensor]:
    """The scores, and the gradients of all that has one, for an upstream gradient drawn for them;
    by the kernels or by the definition."""
    leaves = {
        k: x.detach().requires_grad_() if isinstance(x, Tensor) else x for k, x in inputs.items()
    }
    given = {k: x for k, x in leaves.items() if isinstance(x, Tensor)}
    if isinstance(metric.tau, Tensor):
        of_metric = {"tau": metric.tau, "gamma": metric.gamma}
        of_metric = {k: x.detach().to(leaves["sem"]).requires_grad_() for k, x in of_metric.items()}
        metric = Metric(**of_metric, form=metric.form)
        given |= of_metric
    if eager:
        scores = reference.paired(**leaves, index=index, metric=metric)
    else:
        scores = OP(*operands(*leaves.values(), metric), *(index or (None, None)), "triton")
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(len(scores), generator=generator).to(inputs["sem"].dtype)
    gradients = torch.autograd.grad(
        scores, list(given.values()), upstream, allow_unused=True, materialize_grads=True
    )
    return {"scores": scores.detach()} | dict(zip(given, gradients, strict=True))


def assert_follows_the_rule(inputs: Inputs, index: Index, metric: Metric) -> dict[str, Tensor]:
    """`assert_accurate` of the scores and of all gradients, which it returns."""
    ours = measure(inputs, index, metric)
    eager = measure(inputs, index, metric, eager=True)
    truth = measure(to_double(inputs), index, metric, eager=True)
    assert ours.keys() == eager.keys() == truth.keys()
    for what, x in ours.items():
        assert_accurate(what, x, eager[what], truth[what])
    return ours


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for what, x in ours.items():
        assert torch.equal(x, theirs[what]), what


# ----------------------------------------------------------------------------- values and gradients


@each_metric
@two_sets_and_self
@each_dtype
def test_accuracy(dtype: torch.dtype, m: int | None, metric: Metric) -> None:
    inputs = draw(20, m, 48, 20, dtype=dtype)
    assert_follows_the_rule(inputs, draw_index(20, m, 300), metric)


# n, m, ds, du, pairs: as a rule so many that their errors are a sample
SHAPES = {
    "ragged": (37, 23, 19, 5, 701),
    "self": (37, None, 19, 5, 701),
    "wider than a block": (6, 5, 600, 300, 50),
    "width 1": (40, 35, 1, 1, 701),
    "one item": (1, 1, 5, 3, 4),
    "one item, self": (1, None, 5, 3, 4),
    "no pairs": (5, 4, 3, 2, 0),
    "most items in no pair": (100, None, 6, 4, 20),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...]) -> None:
    n, m, ds, du, count = shape
    inputs = draw(n, m, ds, du, dtype=FLOAT)
    assert_follows_the_rule(inputs, draw_index(n, m, count), Metric(1.5, 0.25))


def test_one_pair() -> None:
    """Its errors are no sample; those of thirty lists of one pair are."""
    problems = [draw(5, 4, 3, 2, dtype=FLOAT, seed=seed) for seed in range(30)]
    metric, index = Metric(1.5, 0.25), draw_index(5, 4, 1)
    ours, eager, truth = (
        [measure(inputs, index, metric, eager=by_definition) for inputs in some]
        for some, by_definition in (
            (problems, False),
            (problems, True),
            ([to_double(inputs) for inputs in problems], True),
        )
    )
    for what in ours[0]:
        assert_accurate(what, *(torch.stack([x[what] for x in xs]) for xs in (ours, eager, truth)))


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0), (0, None)])
def test_no_items(n: int, m: int | None) -> None:
    inputs = draw(n, m, 4, 3, dtype=FLOAT)
    found = measure(inputs, (torch.empty(0, dtype=torch.int64),) * 2, Metric(1.5, 0.25))
    assert found.pop("scores").shape == (0,)
    for name, x in found.items():
        assert torch.equal(x, torch.zeros_like(inputs[name]))


@each_form
def test_without_an_index_rows_meet_the_columns_beside_them(form: str) -> None:
    inputs, metric = draw(12, 12, 8, 5, dtype=FLOAT), Metric(1.5, 0.25, form)
    places = torch.arange(12)
    assert_same(measure(inputs, None, metric), measure(inputs, (places, places), metric))


@each_form
@two_sets_and_self
def test_tau_and_gamma_learn(m: int | None, form: str) -> None:
    metric = Metric(torch.tensor(1.5), torch.tensor(0.25), form)
    inputs, index = draw(16, m, 19, 5, dtype=FLOAT), draw_index(16, m, 200)
    # One number is no sample of errors: one is taken of each of ten lists.
    lists = list(zip(*(x.split(20) for x in index), strict=True))
    ours, eager, truth = (
        [measure(xs, some, metric, eager=by_definition) for some in lists]
        for xs, by_definition in ((inputs, False), (inputs, True), (to_double(inputs), True))
    )
    for what in ("tau", "gamma"):
        assert_accurate(what, *(torch.stack([x[what] for x in xs]) for xs in (ours, eager, truth)))


@each_form
@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
def test_zero_is_an_uncertainty_of_zeros(certain: tuple[str, ...], form: str) -> None:
    inputs, index = draw(12, 9, 9, 5, dtype=FLOAT), draw_index(12, 9, 100)
    metric = Metric(1.5, 0.25, form)
    named = measure(inputs | dict.fromkeys(certain, "zero"), index, metric)
    zeros = measure(
        inputs | {name: torch.zeros_like(inputs[name]) for name in certain}, index, metric
    )
    for name in certain:
        del zeros[name]
    assert_same(named, zeros)


@each_form
def test_zero_of_rows_against_themselves(form: str) -> None:
    inputs, index = draw(12, None, 9, 5, dtype=FLOAT), draw_index(12, None, 100)
    metric = Metric(1.5, 0.25, form)
    zeros = measure(inputs | {"unc": torch.zeros_like(inputs["unc"])}, index, metric)
    del zeros["unc"]
    assert_same(measure(inputs | {"unc": "zero"}, index, metric), zeros)


@two_sets_and_self
def test_every_subset_of_gradients(m: int | None) -> None:
    inputs, index = draw(4, m, 5, 3, dtype=FLOAT), draw_index(4, m, 20)
    learned = torch.tensor([1.5, 0.25])
    arguments = torch.ones(20), *inputs.values(), 1.5, 0.25, learned, "cosine", *index
    given = [x is not None for x in (*inputs.values(), learned)]
    everything = iter(kernels.backward(*arguments, wanted=given))
    everything = [next(everything) if is_given else None for is_given in given]
    for wanted in itertools.product(*((False, True) if x else (False,) for x in given)):
        expected = [x for x, is_wanted in zip(everything, wanted, strict=True) if is_wanted]
        found = kernels.backward(*arguments, wanted=list(wanted))
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


# ------------------------------------------------------------------------------- many pairs an item


@two_sets_and_self
def test_an_item_in_many_pairs(m: int | None) -> None:
    rows, cols = draw_index(9, m, 5000)
    rows[:3000], cols[1500:] = 4, 7
    inputs = draw(9, m, 9, 5, dtype=FLOAT)
    assert_follows_the_rule(inputs, (rows, cols), Metric(1.5, 0.25, "cosine"))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_windows(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Items whose pairs begin and end before, at and after a window's bounds; some have none.
    monkeypatch.setattr(kernels, "WINDOW", tl.constexpr(4))
    counts = torch.tensor([first, 0, 1, 3, 4, 5, 0, 7, 8, 9, 12, 2, 400, 4])
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    _, cols = draw_index(1, 5, len(rows))
    inputs = draw(len(counts), 5, 19, 5, dtype=FLOAT)
    assert_follows_the_rule(inputs, (rows, cols), Metric(1.5, 0.25, "cosine"))


# -------------------------------------------------------------------------------------------- edges


@two_sets_and_self
@each_dtype
def test_non_contiguous(dtype: torch.dtype, m: int | None) -> None:
    inputs, index = draw(9, m, 19, 5, dtype=dtype), draw_index(9, m, 100)
    metric = Metric(1.5, 0.25, "cosine")
    plain = measure(inputs, index, metric)
    for strided in (
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, -x], dim=2)[:, :, 0],
        lambda x: torch.cat([x, x])[: len(x)],
    ):
        changed = {k: None if x is None else strided(x) for k, x in inputs.items()}
        spaced = tuple(torch.stack([x, -x], dim=1)[:, 0] for x in index)
        assert_same(measure(changed, spaced, metric), plain)


def test_an_expanded_upstream_gradient() -> None:
    inputs, index = draw(20, 15, 8, 5, dtype=FLOAT), draw_index(20, 15, 50)
    arguments = *inputs.values(), 1.5, 0.25, None, "distance", *index
    wanted = [True] * 4 + [False]
    found, expected = (
        kernels.backward(upstream, *arguments, wanted=wanted)
        for upstream in (torch.tensor(2.0).expand(50), torch.full((50,), 2.0))
    )
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_offsets_need_64_bits() -> None:
    # The third item is 2^31 numbers behind the first; none of those between is touched.
    plain = draw(3, None, 4, 3, dtype=torch.bfloat16)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    sem = far.as_strided((3, 4), (2**30 + 8, 1))
    unc = far.as_strided((3, 3), (1, 2**30 + 16), 20)
    sem.copy_(plain["sem"])
    unc.copy_(plain["unc"])
    index, metric = (torch.tensor([0, 1, 2, 2]), torch.tensor([2, 0, 1, 2])), Metric(1.5, 0.25)
    assert_same(
        measure(plain | {"sem": sem, "unc": unc}, index, metric), measure(plain, index, metric)
    )


@each_form
@each_dtype
def test_identical_items_are_exact_and_learn_nothing(dtype: torch.dtype, form: str) -> None:
    inputs = draw(20, 20, 33, 9, dtype=dtype)
    inputs["sem2"] = inputs["sem"].clone()
    found = measure(inputs, None, Metric(1.5, 0.25, form))
    assert torch.equal(found["scores"], torch.full((20,), float(form != "distance"), dtype=dtype))
    for name in ("sem", "unc", "sem2", "unc2"):
        assert torch.equal(found[name], torch.zeros_like(inputs[name]))


@each_form
@pytest.mark.parametrize("tau", [1.5, 50.0])
def test_near_duplicates_follow_the_rule(tau: float, form: str) -> None:
    inputs = draw(100, 100, 33, 9, dtype=FLOAT)
    inputs["sem2"] = inputs["sem"] + 1e-4 * inputs["sem2"]
    assert_follows_the_rule(inputs, None, Metric(tau, 0.0, form))


@each_form
@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_opposite_uncertainties_learn_nothing(gamma: float, form: str) -> None:
    inputs = draw(20, 20, 8, 5, dtype=FLOAT)
    inputs["unc2"] = -inputs["unc"]
    found = assert_follows_the_rule(inputs, None, Metric(1.5, gamma, form))
    for name in ("unc", "unc2"):
        assert torch.equal(found[name], torch.zeros_like(inputs[name]))


@each_form
@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_identical_items_without_uncertainty(gamma: float, form: str) -> None:
    inputs = draw(20, None, 8, 5, dtype=FLOAT)
    inputs["unc"].zero_()
    found = measure(inputs, (torch.arange(20),) * 2, Metric(1.5, gamma, form))
    assert torch.equal(found["scores"], torch.full((20,), float(form != "distance")))
    for name in ("sem", "unc"):
        assert torch.equal(found[name], torch.zeros_like(inputs[name]))


@each_form
def test_zero_vectors(form: str) -> None:
    inputs, index = draw(20, 15, 8, 5, dtype=FLOAT), draw_index(20, 15, 100)
    inputs["sem"][3:6] = 0
    inputs["sem2"][2:5] = 0
    assert_follows_the_rule(inputs, index, Metric(1.5, 0.25, form))


@each_form
@pytest.mark.parametrize("name", ["sem", "unc"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_comes_out(value: float, name: str, form: str) -> None:
    inputs, (rows, cols) = draw(20, 15, 8, 5, dtype=FLOAT), draw_index(20, 15, 100)
    inputs[name][3, 2] = value
    found = measure(inputs, (rows, cols), Metric(1.5, 0.25, form))
    assert torch.equal(found["scores"].isfinite(), rows != 3)
    assert torch.equal(found[name].isfinite().all(1), torch.arange(20) != 3)
    met = torch.zeros(15, dtype=torch.bool).index_fill(0, cols[rows == 3], True)
    assert torch.equal(found[f"{name}2"].isfinite().all(1), ~met)


@each_form
@two_sets_and_self
def test_negative_columns_of_the_backward_are_no_pairs(m: int | None, form: str) -> None:
    inputs, (rows, cols) = draw(12, m, 8, 5, dtype=FLOAT), draw_index(12, m, 600)
    metric = 1.5, 0.25, torch.tensor([1.5, 0.25]), form
    upstream = torch.randn(600, generator=torch.Generator().manual_seed(0))
    # Item 3 is in no other pair, and not finite: nothing of it is read.
    missing = (torch.arange(600) % 3 == 0) | (rows == 3)
    kept = ~missing & (cols != 3)
    rows, cols, upstream = rows[missing | kept], cols[missing | kept], upstream[missing | kept]
    missing, kept = missing[missing | kept], kept[missing | kept]
    inputs["sem"][3], inputs["unc"][3] = math.nan, math.inf
    wanted = [x is not None for x in (*inputs.values(), metric)]
    expected = kernels.backward(
        upstream[kept], *inputs.values(), *metric, rows[kept], cols[kept], wanted=wanted
    )
    upstream[missing], cols[missing] = math.nan, -1
    found = kernels.backward(upstream, *inputs.values(), *metric, rows, cols, wanted=wanted)
    for x, y in zip(found, expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y)


# --------------------------------------------------------------------------------- what it promises


@two_sets_and_self
def test_the_same_bits_at_every_repeat(m: int | None) -> None:
    rows, cols = draw_index(12, m, 600)
    rows[:300] = 11
    inputs, metric = draw(12, m, 33, 9, dtype=FLOAT), Metric(1.5, 0.25)
    first = measure(inputs, (rows, cols), metric)
    for _ in range(2):
        assert_same(measure(inputs, (rows, cols), metric), first)


@two_sets_and_self
def test_opcheck(m: int | None) -> None:
    inputs = draw(6, m, 4, 3, dtype=FLOAT)
    leaves = [None if x is None else x.T.contiguous().T.requires_grad_() for x in inputs.values()]
    learned = torch.tensor([1.5, 0.25], requires_grad=True)
    arguments = *leaves, math.nan, math.nan, learned, "cosine", *draw_index(6, m, 20), "triton"
    torch.library.opcheck(OP, arguments)
