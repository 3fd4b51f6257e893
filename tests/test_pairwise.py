"""`pairwise`: values and gradients of the kernel, its edges, and what it promises."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FORMS,
    NAMES,
    Inputs,
    assert_accurate,
    assert_equals_in_double,
    assert_follows_the_rule,
    draw,
    draw_upstream,
    evaluate,
    golden_names,
    load_golden,
    to_double,
)
from idml_fast._cpu import pairwise as cpu_pairwise
from idml_fast._cpu import tile

import idml_fast
from idml_fast import Metric, pairwise, reference

FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)
BACKENDS = "cpu", "reference"
OP = torch.ops.idml_fast.pairwise.default
BACKWARD_OP = torch.ops.idml_fast.pairwise_backward.default

# n, m (None: the rows against themselves), ds, du
TILE_ROWS, TILE_PAIRS = tile.TILE[0], math.prod(tile.TILE)
SHAPES = {
    "aligned": (64, 32, 64, 64),
    "ragged": (37, 29, 19, 11),  # no power of two, no multiple of a vector
    "one row": (1, 29, 19, 11),
    "one column": (37, 1, 19, 11),
    "one pair": (1, 1, 19, 11),
    "width 1": (17, 13, 1, 1),
    "width 3": (17, 13, 3, 2),
    "width 511": (17, 13, 511, 5),  # one less than a power of two
    "width 513": (17, 13, 513, 5),  # one more
    "unc wider than sem": (17, 13, 5, 70),
    "one row, wide tile": (1, TILE_PAIRS // TILE_ROWS + 1, 3, 2),
    "a row beyond a tile": (TILE_ROWS + 1, 3, 3, 2),
    "a column beyond a tile": (TILE_ROWS, TILE_PAIRS // TILE_ROWS + 1, 2, 2),
    "self": (33, None, 19, 11),
    "self, one row": (1, None, 19, 11),
    "self, two tiles": (tile.SELF_TILE[0] + 1, None, 2, 2),
}
METRICS = {
    **{form: Metric(1.5, 0.25, form) for form in FORMS},
    **{f"plain {form}": Metric.plain(form) for form in ("distance", "cosine")},
    "strong": Metric(0.5, 0.5),
}
each_form = pytest.mark.parametrize("form", FORMS)
each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
two_sets_and_self = pytest.mark.parametrize("m", [5, None], ids=["two sets", "self"])


def brute_force(inputs: Inputs, metric: Metric, upstream: torch.Tensor) -> dict[str, np.ndarray]:
    """Scores and gradients pair by pair from their written-out derivatives, in numpy's longest
    floating type (80 bits and more on the usual machines); for inputs without degenerate pairs."""
    with_self = inputs["sem2"] is None
    sem, unc, sem2, unc2 = (
        None if x is None else x.numpy().astype(np.longdouble) for x in inputs.values()
    )
    if with_self:
        sem2, unc2 = sem, unc
    scores = np.zeros((len(sem), len(sem2)), np.longdouble)
    grads = [np.zeros_like(x) for x in (sem, unc, sem2, unc2)]
    for i, j in itertools.product(range(len(sem)), range(len(sem2))):
        s, t, u, v = sem[i], sem2[j], unc[i], unc2[j]
        if with_self and i == j:
            scores[i, j] = 1.0 if metric.larger_is_closer else 0.0
            continue
        alpha, beta = np.sqrt(((s - t) ** 2).sum()), np.sqrt(((u + v) ** 2).sum())
        power = 2 if metric.form == "official" else 1
        r = (beta**power + metric.gamma) / (metric.tau * alpha**power) if metric.reads_unc else 0
        decay = np.exp(-np.longdouble(r))
        dr_dbeta = power * beta ** (power - 1) / (metric.tau * alpha**power)
        norm_s, norm_t = np.sqrt((s * s).sum()), np.sqrt((t * t).sum())
        cos = (s * t).sum() / (norm_s * norm_t)
        if metric.larger_is_closer:
            scores[i, j] = 1 - (1 - cos) * decay
            by_alpha, by_cos = -(1 - cos) * decay * power * r / alpha, decay
            by_beta = (1 - cos) * decay * dr_dbeta
        else:
            scores[i, j] = alpha * decay
            by_alpha, by_cos = decay * (1 + r), 0
            by_beta = -alpha * decay * dr_dbeta
        g = upstream[i, j].item()
        away, along = (s - t) / alpha, (u + v) / beta
        grads[0][i] += g * (by_alpha * away + by_cos * (t / norm_t - cos * s / norm_s) / norm_s)
        grads[2][j] += g * (-by_alpha * away + by_cos * (s / norm_s - cos * t / norm_t) / norm_t)
        grads[1][i] += g * by_beta * along
        grads[3][j] += g * by_beta * along
    if with_self:
        grads = [grads[0] + grads[2], grads[1] + grads[3]]
    found = {"scores": scores}
    for name, grad in zip(NAMES, grads, strict=False):
        if metric.reads_unc or name.startswith("sem"):
            found[f"grad_{name}"] = grad
    return found


# ----------------------------------------------------------------------------- values and gradients


def golden_pairs(name: str) -> tuple[Inputs, Metric, dict[str, torch.Tensor]]:
    meta, arrays = load_golden(name)
    metric = Metric(meta["tau"], meta["gamma"], meta["form"])
    inputs = {k: arrays.get(k) for k in NAMES}
    assert (inputs["sem2"] is None) == meta["self_pairs"]
    return inputs, metric, arrays


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", golden_names("pairwise_*"))
def test_golden_in_double(name, backend):
    inputs, metric, golden = golden_pairs(name)
    found = evaluate(inputs, metric, golden["upstream"], backend)
    assert_equals_in_double("scores", found["scores"], golden["out"])
    for what in found.keys() - {"scores"}:
        assert_equals_in_double(what, found[what], golden[what])
    assert found.keys() - {"scores"} == {k for k in golden if k.startswith("grad_")}


def eager_in_another_order(inputs, metric, upstream, seed):
    """`evaluate` with the components of sem and of unc shuffled: the same sums in another order."""
    generator = torch.Generator().manual_seed(seed)
    widths = {k[:3]: x.shape[1] for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    orders = {k: torch.randperm(width, generator=generator) for k, width in widths.items()}
    shuffled = {
        k: x[:, orders[k[:3]]] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()
    }
    found = evaluate(shuffled, metric, upstream, "reference")
    for name in inputs:
        if (what := f"grad_{name}") in found:
            found[what] = found[what][:, orders[name[:3]].argsort()]
    return found


def assert_follows_the_rule_of_eight(
    inputs: Inputs,
    metric: Metric,
    upstream: torch.Tensor,
    backend: str | None = None,
    *,
    allowance: float = 1,
) -> None:
    """`assert_follows_the_rule` for matrices that are too small a sample of eager's errors: it is
    taken over eight orders of eager's sums. Errors may be larger by the ``allowance``."""
    ours = evaluate(inputs, metric, upstream, backend)
    exact = {
        k: x.double() for k in ("tau", "gamma") if isinstance(x := getattr(metric, k), torch.Tensor)
    }
    in_double = dataclasses.replace(metric, **exact)
    truth = evaluate(to_double(inputs), in_double, upstream.double(), "reference")
    eagers = [eager_in_another_order(inputs, metric, upstream, seed) for seed in range(8)]
    assert ours.keys() == truth.keys()
    for what, x in ours.items():
        eager = torch.stack([eager[what] for eager in eagers])
        if allowance != 1:
            eager = (truth[what] + allowance * (eager - truth[what])).to(x.dtype)
        assert_accurate(what, x.expand_as(eager), eager, truth[what].expand_as(eager))


def assert_together_follow_the_rule(
    problems: list[Inputs], metric: Metric, backend: str | None = None
) -> None:
    """`assert_follows_the_rule` for small problems of one shape: each alone is no sample of eager's
    errors, all of them together are one."""
    ours, eager, truth = [], [], []
    for inputs in problems:
        upstream = draw_upstream(inputs)
        ours.append(evaluate(inputs, metric, upstream, backend))
        eager.append(evaluate(inputs, metric, upstream, "reference"))
        truth.append(evaluate(to_double(inputs), metric, upstream.double(), "reference"))
    for what in ours[0]:
        assert_accurate(what, *(torch.stack([x[what] for x in xs]) for xs in (ours, eager, truth)))


@pytest.mark.parametrize("name", golden_names("pairwise_*"))
def test_golden_in_float(name):
    inputs, metric, golden = golden_pairs(name)
    inputs = {k: None if x is None else x.float() for k, x in inputs.items()}
    assert_follows_the_rule_of_eight(inputs, metric, golden["upstream"].float())


@each_metric
@pytest.mark.parametrize("backend", BACKENDS)
@two_sets_and_self
def test_against_written_out_derivatives(m, backend, metric):
    inputs = draw(6, m, 7, 3, seed=3)
    upstream = draw_upstream(inputs)
    found, truth = (
        evaluate(inputs, metric, upstream, backend),
        brute_force(inputs, metric, upstream),
    )
    assert found.keys() == truth.keys()
    for what, x in found.items():
        assert_equals_in_double(what, x, truth[what])


@each_form
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_in_double(shape, form):
    inputs, metric = draw(*shape), Metric(1.5, 0.25, form)
    upstream = draw_upstream(inputs)
    ours, eager = (evaluate(inputs, metric, upstream, backend) for backend in BACKENDS)
    for what, x in ours.items():
        assert_equals_in_double(what, x, eager[what])


@each_metric
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])
def test_many_ragged_tiles(m, metric):
    inputs = draw(53, m, 9, 6)
    upstream = draw_upstream(inputs)
    ours, eager = (evaluate(inputs, metric, upstream, backend) for backend in BACKENDS)
    assert ours.keys() == eager.keys()
    for what, x in ours.items():
        assert_equals_in_double(what, x, eager[what])


# Rows of 512 scores, so that a row is a good sample of eager's errors.
ACCURACY = {
    "two sets": {"n": 48, "m": 512, "ds": 67, "du": 35},
    "self": {"n": 400, "m": None, "ds": 67, "du": 35},
    "wide": {"n": 40, "m": 512, "ds": 513, "du": 511},
    "a thousand times larger": {"n": 48, "m": 512, "ds": 67, "du": 35, "scale": 1e3},
}


@each_metric
@pytest.mark.parametrize("case", ACCURACY)
def test_accuracy_in_float(case, metric):
    assert_follows_the_rule(draw(**ACCURACY[case], dtype=FLOAT), metric)


@each_metric
@pytest.mark.parametrize("case", ["two sets", "self", "wide"])
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_accuracy_in_half(dtype, case, metric):
    assert_follows_the_rule(draw(**ACCURACY[case], dtype=dtype), metric)


@each_metric
@pytest.mark.parametrize("native", [True, False], ids=["bf16 products", "widened"])
def test_accuracy_of_both_ways_to_multiply_bf16(monkeypatch, native, metric):
    # Whatever this machine has: torch multiplies bfloat16 on any, if slowly.
    monkeypatch.setattr(tile._C, "has_bf16", lambda: native)
    inputs = draw(**ACCURACY["two sets"], dtype=torch.bfloat16)
    sem = inputs["sem"]
    assert tile.Embedding(sem, len(sem), sem.dtype).native_bf16 == native
    assert_follows_the_rule(inputs, metric)


@each_form
@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=["fp32", "bf16", "fp16"])
def test_accuracy_with_rows_longer_than_columns(dtype, form):
    inputs = draw(**ACCURACY["two sets"], dtype=dtype)
    inputs["sem"] *= 10
    metric = Metric(1.5, 0.25, form)
    ours, eager = (evaluate(inputs, metric, backend=backend) for backend in BACKENDS)
    truth = evaluate(to_double(inputs), metric, backend="reference")
    assert_accurate("scores", ours["scores"], eager["scores"], truth["scores"], by_row=True)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_accuracy_of_other_instruction_sets(isa):
    tests = "test_accuracy_in_float or test_accuracy_in_half or test_golden_in_double or test_zero"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, __file__],
        env={**os.environ, "IDML_FAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_the_instruction_set_can_be_lowered(isa):
    code = "from idml_fast import _C; print(_C.isa())"
    environment = {**os.environ, "IDML_FAST_CPU_ISA": isa}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() in ({"AVX2", "baseline"} if isa == "avx2" else {"baseline"})


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma", "expected"), [(2, 1, 1, 0.7358), (1, 2, 0, 0.406)]
)
def test_derivative_values_of_the_paper(alpha, beta, gamma, expected):
    """H(alpha, beta, tau = 1, gamma), how fast D grows with alpha, in the paper's figure."""
    sem = torch.tensor([[float(alpha), 0.0]], requires_grad=True)
    unc = torch.tensor([[0.0, float(beta)]])
    scores = pairwise(sem, unc, torch.zeros(1, 2), torch.zeros(1, 2), metric=Metric(1.0, gamma))
    scores.backward()
    assert sem.grad[0, 0].item() == pytest.approx(expected, abs=5e-5)  # four digits are printed


@each_metric
@two_sets_and_self
def test_gradcheck(m, metric):
    inputs = [None if x is None else x.requires_grad_() for x in draw(4, m, 3, 2).values()]
    given = [x for x in inputs if x is not None]
    if not metric.reads_unc:
        given = given[::2]

    def scores(*xs):
        rest = iter(xs)
        chosen = [next(rest) if any(x is g for g in given) else x for x in inputs]
        return pairwise(*chosen, metric=metric, backend="cpu")

    assert torch.autograd.gradcheck(scores, given)


# ----------------------------------------------------------------------------------------- autograd


def subsets(names):
    return [c for k in range(1, len(names) + 1) for c in itertools.combinations(names, k)]


@each_form
@pytest.mark.parametrize("m", [6, None], ids=["two sets", "self"])
def test_every_subset_of_inputs_that_require_gradients(m, form):
    inputs, metric = draw(7, m, 5, 3), Metric(form=form)
    upstream = draw_upstream(inputs)
    everything = evaluate(inputs, metric, upstream)
    for chosen in subsets([k for k, x in inputs.items() if x is not None]):
        leaves = {
            k: None if x is None else x.clone().requires_grad_(k in chosen)
            for k, x in inputs.items()
        }
        pairwise(**leaves, metric=metric).backward(upstream)
        for name, x in leaves.items():
            if name in chosen:
                assert torch.equal(x.grad, everything[f"grad_{name}"])
            else:
                assert x is None or x.grad is None


def test_nothing_requires_a_gradient():
    assert not pairwise(**draw(7, 6, 5, 3)).requires_grad


@pytest.mark.parametrize("form", ["distance", "cosine"])
def test_a_plain_metric_does_not_read_unc(form):
    inputs = draw(7, 6, 5, 3)
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    leaves["unc"].data.fill_(math.nan)
    scores = pairwise(**leaves, metric=Metric.plain(form))
    scores.sum().backward()
    assert torch.equal(
        scores, pairwise(leaves["sem"], None, leaves["sem2"], metric=Metric.plain(form))
    )
    assert leaves["unc"].grad is None
    assert leaves["unc2"].grad is None
    expected = (
        torch.cdist(inputs["sem"], inputs["sem2"])
        if form == "distance"
        else torch.cosine_similarity(inputs["sem"][:, None], inputs["sem2"], dim=2)
    )
    assert_equals_in_double("scores", scores, expected)


def strided(x, layout):
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every other row and column":
        return x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    return x[:1].expand_as(x)  # "one row expanded"


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, *HALVES], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "every other row and column", "one row expanded"])
def test_non_contiguous_inputs(layout, dtype, form):
    inputs, metric = draw(24, 18, 33, 17, dtype=dtype), Metric(form=form)
    if layout == "one row expanded":
        inputs |= {"sem2": None, "unc2": None}  # all items are the same: every pair is an edge
    views = {k: None if x is None else strided(x, layout) for k, x in inputs.items()}
    assert not any(x is not None and x.is_contiguous() for x in views.values())
    upstream = draw_upstream(views)
    ours, eager = (evaluate(views, metric, upstream, backend) for backend in BACKENDS)
    truth = evaluate(to_double(views), metric, upstream.double(), "reference")
    for what, x in ours.items():
        if dtype == torch.float64:
            assert_equals_in_double(what, x, truth[what])
        else:
            assert_accurate(what, x, eager[what], truth[what])


@two_sets_and_self
def test_non_contiguous_upstream(m):
    inputs = draw(7, m, 5, 3)
    upstream = draw_upstream(inputs)
    expected = evaluate(inputs, Metric(), upstream)
    for layout in ("transposed", "every other row and column"):
        found = evaluate(inputs, Metric(), strided(upstream, layout))
        for what, x in found.items():
            assert torch.equal(x, expected[what])


@two_sets_and_self
def test_expanded_upstream(m):
    inputs = draw(7, m, 5, 3)
    ones = torch.ones(7, 7 if m is None else m, dtype=torch.float64)
    expected = evaluate(inputs, Metric(), ones)
    leaves = {k: None if x is None else x.clone().requires_grad_() for k, x in inputs.items()}
    pairwise(**leaves).sum().backward()
    for name, x in leaves.items():
        assert x is None or torch.equal(x.grad, expected[f"grad_{name}"])


@each_form
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0), (0, None)])
def test_empty(n, m, backend, form):
    inputs = draw(n, m, 5, 3, dtype=FLOAT)
    found = evaluate(inputs, Metric(form=form), draw_upstream(inputs), backend)
    assert found["scores"].shape == (n, n if m is None else m)
    for name, x in inputs.items():
        assert x is None or torch.equal(found[f"grad_{name}"], torch.zeros_like(x))


@two_sets_and_self
def test_a_second_derivative_is_refused(m):
    inputs = [None if x is None else x.requires_grad_() for x in draw(4, m, 3, 2).values()]
    (gradient,) = torch.autograd.grad(pairwise(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative; backend='reference' has"):
        gradient.sum().backward()


@each_form
def test_the_reference_has_a_second_derivative(form):
    inputs = [x.requires_grad_() for x in draw(3, 2, 3, 2).values()]
    metric = Metric(1.5, 0.25, form)
    assert torch.autograd.gradgradcheck(
        lambda *x: pairwise(*x, metric=metric, backend="reference"), inputs
    )


# ---------------------------------------------------------------------------------- PyTorch's tools


@each_form
@two_sets_and_self
def test_opcheck(m, form):
    inputs = [
        None if x is None else x.requires_grad_() for x in draw(6, m, 4, 3, dtype=FLOAT).values()
    ]
    torch.library.opcheck(OP, (*inputs, 5.0, 0.5, None, form, "cpu"))


@two_sets_and_self
def test_opcheck_with_learned_tau_and_gamma(m):
    inputs = [
        None if x is None else x.requires_grad_() for x in draw(6, m, 4, 3, dtype=FLOAT).values()
    ]
    learned = torch.tensor([5.0, 0.5], requires_grad=True)
    torch.library.opcheck(OP, (*inputs, math.nan, math.nan, learned, "distance", "cpu"))


def test_opcheck_of_a_plain_metric():
    sem = draw(6, None, 4, 3, dtype=FLOAT)["sem"].requires_grad_()
    torch.library.opcheck(OP, (sem, None, None, None, math.inf, 0.0, None, "cosine", "cpu"))


@two_sets_and_self
@pytest.mark.parametrize("form", ["distance", "cosine"])
@pytest.mark.parametrize("learned", [None, torch.tensor([5.0, 0.5])], ids=["numbers", "learned"])
@pytest.mark.parametrize("wanted", [[True] * 5, [True, False, False, True, False], [False] * 5])
def test_opcheck_of_the_backward(wanted, learned, form, m):
    inputs = draw(6, m, 4, 3, dtype=FLOAT)
    operands = (*inputs.values(), 5.0, 0.5, learned, form)
    scores = OP(*operands, "cpu") if form == "distance" else None
    leaves = (*inputs.values(), learned)
    wanted = [w and x is not None for w, x in zip(wanted, leaves, strict=True)]
    arguments = (draw_upstream(inputs), scores, *operands, "cpu")
    torch.library.opcheck(BACKWARD_OP, arguments, {"wanted": wanted})


@pytest.mark.parametrize("m", [15, None], ids=["two sets", "self"])
def test_compiled_without_graph_breaks(m, recwarn):
    metric = Metric.paper()
    inputs = [
        None if x is None else x.requires_grad_() for x in draw(20, m, 8, 5, dtype=FLOAT).values()
    ]
    given = [x for x in inputs if x is not None]

    def scores(*xs):
        return 2 * pairwise(*xs, metric=metric)

    eager = scores(*inputs)
    compiled = torch.compile(scores, fullgraph=True)(*inputs)
    assert torch.equal(compiled, eager)
    found, expected = (torch.autograd.grad(x.square().sum(), given) for x in (compiled, eager))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    ours = [str(w.message) for w in recwarn if "idml_fast" in str(w.message)]
    assert not ours  # PyTorch's own are its own


def test_autocast():
    inputs = draw(20, 15, 8, 5, dtype=FLOAT)
    inputs["unc"] = inputs["unc"].bfloat16()  # as a layer under autocast returns it
    halves = {k: x.bfloat16() for k, x in inputs.items()}
    upstream = draw_upstream(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(inputs, Metric(), upstream)
    expected = evaluate(halves, Metric(), upstream)
    assert found["scores"].dtype == torch.bfloat16
    assert torch.equal(found["scores"], expected["scores"])
    for name, x in inputs.items():
        assert found[f"grad_{name}"].dtype == x.dtype
        assert torch.equal(found[f"grad_{name}"].bfloat16(), expected[f"grad_{name}"])


def test_autocast_leaves_double_alone():
    inputs = draw(20, 15, 8, 5)
    upstream = draw_upstream(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(inputs, Metric(), upstream)
    for what, x in evaluate(inputs, Metric(), upstream).items():
        assert torch.equal(found[what], x)


# -------------------------------------------------------------------------------------------- edges

ALL_DTYPES = pytest.mark.parametrize("dtype", [torch.float64, FLOAT, *HALVES], ids=str)
IDENTICAL = {"distance": 0.0, "cosine": 1.0, "official": 1.0}


@ALL_DTYPES
@each_form
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("opposite_unc", [False, True])
def test_identical_items(opposite_unc, gamma, backend, form, dtype):
    """alpha = 0: exactly the score of identical items, no gradient; even with beta = gamma = 0."""
    inputs = draw(1, None, 33, 17, dtype=dtype, seed=2)
    unc = inputs["unc"]
    inputs |= {"sem2": inputs["sem"].clone(), "unc2": -unc if opposite_unc else unc.clone()}
    found = evaluate(inputs, Metric(1.0, gamma, form), torch.ones(1, 1), backend)
    assert found.pop("scores").item() == IDENTICAL[form]
    for what, gradient in found.items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), what


@ALL_DTYPES
@each_form
def test_opposite_uncertainties(form, dtype):
    """beta = 0: the pair is certain, and gives no gradient to unc."""
    inputs = draw(1, 1, 33, 17, dtype=dtype)
    inputs["unc2"] = -inputs["unc"]
    found = evaluate(inputs, Metric(1.0, 0.0, form), torch.ones(1, 1))
    plain = Metric.plain("distance" if form == "distance" else "cosine")
    assert torch.equal(found["scores"], evaluate(inputs, plain)["scores"])
    for name in ("unc", "unc2"):
        assert torch.equal(found[f"grad_{name}"], torch.zeros_like(inputs[name]))


@each_form
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, *HALVES], ids=str)
def test_zero_vectors(dtype, backend, form):
    inputs, metric = draw(5, 4, 6, 3, dtype=dtype), Metric(1.0, 0.5, form)
    inputs["sem"][2] = 0
    inputs["unc"][2] = 0
    found = evaluate(inputs, metric, draw_upstream(inputs), backend)
    assert all(x.isfinite().all() for x in found.values())
    alpha, beta = inputs["sem2"].double().norm(dim=1), inputs["unc2"].double().norm(dim=1)
    power = 2 if form == "official" else 1
    decay = torch.exp(-(beta**power + 0.5) / alpha**power)
    expected = alpha * decay if form == "distance" else 1 - decay  # the cosine is 0
    torch.testing.assert_close(
        found["scores"][2].double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps
    )


@each_form
def test_two_zero_vectors_are_identical(form):
    zeros = torch.zeros(3, 4)
    assert (pairwise(zeros, zeros, zeros, zeros, metric=Metric(form=form)) == IDENTICAL[form]).all()


def near_duplicates(dtype):
    """Pairs (t, t) at distances from 2^-22 to 2 times the vectors' length; [N, D] twice."""
    sem = draw(24, None, 64, 1, seed=5)["sem"].to(dtype)
    steps = torch.exp2(torch.arange(24) - 22.0)[:, None]
    away = draw(24, None, 64, 1, seed=6)["sem"]
    return sem, (sem.double() + steps * away).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, *HALVES], ids=str)
def test_distances_of_near_duplicates(dtype):
    """alpha is right to a relative error of 128 units roundoff of the accumulation times 4.

    Squares below 2^-8 (||x||^2 + ||y||^2) are computed from the differences; above, an error of e
    in the product is one of e / 2^-8 in the square, half of it in alpha. e is a few units roundoff
    of the sum, here 4. A half dtype accumulates in float32, so what shows are the roundings of the
    square and of the result to that dtype.
    """
    sem, sem2 = near_duplicates(dtype)
    alpha = (sem.double() - sem2.double()).norm(dim=1)
    found = pairwise(sem, None, sem2, metric=Metric.plain()).diagonal().double()
    accumulation = torch.finfo(dtype if dtype in (FLOAT, torch.float64) else FLOAT).eps / 2
    bound = 128 * 4 * accumulation
    if dtype in HALVES:
        bound += 2 * torch.finfo(dtype).eps / 2
    assert ((found - alpha).abs() <= bound * alpha).all()
    assert (found[alpha == 0] == 0).all()


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_gradients_of_near_duplicates(dtype):
    """The gradient of a conventional distance is a unit vector however near the pair is."""
    sem, sem2 = near_duplicates(dtype)
    # Rows of 512 scores, as in the other tests of the rule: 24 are too few to know eager's error.
    others = draw(488, None, 64, 1, seed=7)["sem"].to(dtype)
    inputs: Inputs = {"sem": sem, "unc": None, "sem2": torch.cat([sem2, others]), "unc2": None}
    upstream = torch.eye(24, 512, dtype=dtype)  # row t with column t only
    assert_follows_the_rule(inputs, Metric.plain(), upstream)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, *HALVES], ids=str)
@each_form
def test_nan_and_inf_come_out_where_they_went_in(form, dtype, name, value):
    inputs = draw(9, 8, 6, 5, dtype=dtype)
    inputs[name][3, 2] = value
    found = evaluate(inputs, Metric(form=form), draw_upstream(inputs))
    touched = torch.zeros(9, 8, dtype=torch.bool)
    if name.endswith("2"):
        touched[:, 3] = True
    else:
        touched[3] = True
    assert torch.equal(~found["scores"].isfinite(), touched)
    # The other items of the same side have nothing to do with it.
    side = ("sem2", "unc2") if name.endswith("2") else ("sem", "unc")
    for other in side:
        gradient = found[f"grad_{other}"]
        assert torch.cat([gradient[:3], gradient[4:]]).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["sem", "unc"])
def test_nan_and_inf_of_rows_against_themselves(name, value):
    inputs = draw(9, None, 6, 5, dtype=FLOAT)
    inputs[name][3, 2] = value
    touched = torch.zeros(9, 9, dtype=torch.bool)
    touched[3] = touched[:, 3] = True
    scores = pairwise(**inputs)
    touched[3, 3] = not scores[3, 3].isfinite()  # the diagonal may say either
    assert torch.equal(~scores.isfinite(), touched)


# --------------------------------------------------------------------------------------- properties


@ALL_DTYPES
@each_form
@pytest.mark.usefixtures("small_tiles")
def test_rows_against_themselves_are_symmetric_to_the_bit(form, dtype):
    scores = pairwise(**draw(53, None, 33, 17, dtype=dtype), metric=Metric(form=form))
    assert torch.equal(scores, scores.T)
    assert (scores.diagonal() == IDENTICAL[form]).all()


@each_form
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_no_gradient_through_the_diagonal(dtype, form):
    inputs = draw(53, None, 33, 17, dtype=dtype)
    found = evaluate(inputs, Metric(form=form), 1e3 * torch.eye(53))
    for name in ("sem", "unc"):
        assert torch.equal(found[f"grad_{name}"], torch.zeros_like(inputs[name]))


@each_form
def test_rows_against_themselves_equal_two_equal_sets(form):
    inputs, metric = draw(40, None, 9, 6), Metric(1.5, 0.25, form)
    upstream = draw_upstream(inputs)
    found = evaluate(inputs, metric, upstream)
    twice = evaluate({**inputs, "sem2": inputs["sem"], "unc2": inputs["unc"]}, metric, upstream)
    assert_equals_in_double("scores", found["scores"], twice["scores"])
    for name in ("sem", "unc"):
        both = twice[f"grad_{name}"] + twice[f"grad_{name}2"]
        assert_equals_in_double(name, found[f"grad_{name}"], both)


@each_form
@pytest.mark.parametrize("m", [30, None], ids=["two sets", "self"])
def test_a_permutation_of_the_items_permutes_the_result(m, form):
    inputs, metric = draw(40, m, 9, 6), Metric(1.5, 0.25, form)
    upstream = draw_upstream(inputs)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    cols = rows if m is None else torch.randperm(m, generator=torch.Generator().manual_seed(2))
    order = {"sem": rows, "unc": rows, "sem2": cols, "unc2": cols}
    permuted = {k: None if x is None else x[order[k]] for k, x in inputs.items()}
    found = evaluate(permuted, metric, upstream[rows][:, cols])
    expected = evaluate(inputs, metric, upstream)
    assert_equals_in_double("scores", found["scores"], expected["scores"][rows][:, cols])
    for name in [k for k, x in inputs.items() if x is not None]:
        what = f"grad_{name}"
        assert_equals_in_double(what, found[what], expected[what][order[name]])


@ALL_DTYPES
@pytest.mark.parametrize("m", [50, None], ids=["two sets", "self"])
def test_a_distance_is_at_most_alpha(m, dtype):
    inputs = draw(60, m, 9, 6, dtype=dtype)
    alpha = pairwise(**inputs, metric=Metric.plain())
    for metric in (Metric(), Metric(0.01), Metric(100.0, 3.0)):
        scores = pairwise(**inputs, metric=metric)
        assert ((scores >= 0) & (scores <= alpha)).all()


@ALL_DTYPES
@pytest.mark.parametrize("form", ["cosine", "official"])
@pytest.mark.parametrize("items", ["any", "of one direction"])
def test_a_cosine_is_at_most_one(items, form, dtype):
    inputs = draw(60, 50, 9, 6, dtype=dtype)
    if items == "of one direction":  # their cosine is 1, and must not be rounded beyond
        lengths = torch.linspace(0.5, 4, 110, dtype=dtype)[:, None]
        inputs["sem"], inputs["sem2"] = (lengths * inputs["sem"][:1]).split([60, 50])
    scores = pairwise(**inputs, metric=Metric(5.0, 0.0, form))
    assert (scores <= 1).all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("m", [200, None], ids=["two sets", "self"])
@pytest.mark.parametrize(
    ("form", "dtype"), [("distance", FLOAT), ("official", FLOAT), ("cosine", torch.bfloat16)]
)
def test_a_hundred_repeats_give_the_same_bits(form, dtype, m):
    """What is promised: with the same number of threads the same input gives the same bits."""
    inputs = draw(150, m, 33, 17, dtype=dtype)
    upstream = draw_upstream(inputs)
    first = evaluate(inputs, Metric(form=form), upstream)
    for _ in range(99):
        for what, x in evaluate(inputs, Metric(form=form), upstream).items():
            assert torch.equal(x, first[what]), what


@pytest.mark.usefixtures("small_tiles", "threads")
@pytest.mark.parametrize("m", [50, None], ids=["two sets", "self"])
def test_repeats_over_many_tiles_give_the_same_bits(m):
    inputs = draw(70, m, 33, 17, dtype=FLOAT)
    upstream = draw_upstream(inputs)
    first = evaluate(inputs, Metric(), upstream)
    for _ in range(9):
        for what, x in evaluate(inputs, Metric(), upstream).items():
            assert torch.equal(x, first[what]), what


@each_form
@pytest.mark.parametrize("m", [50, None], ids=["two sets", "self"])
def test_threads_do_not_change_the_bits_of_the_epilogue(monkeypatch, m, form):
    """Everything after the products gives the same bits whatever the number of threads.

    The products stay on torch's threads: another number may make a BLAS add up in another order.
    """
    inputs = draw(70, m, 33, 17, dtype=FLOAT)
    upstream = draw_upstream(inputs)
    found = []
    for count in (1, 2, 5):
        for module in (tile, cpu_pairwise):
            monkeypatch.setattr(module, "threads", lambda count=count: count)
        found.append(evaluate(inputs, Metric(form=form), upstream))
    for other in found[1:]:
        for what, x in other.items():
            assert torch.equal(x, found[0][what]), what


def test_inputs_are_left_as_they_were():
    inputs = draw(20, 15, 8, 5, dtype=FLOAT)
    upstream = draw_upstream(inputs)
    before = [x.clone() for x in (*inputs.values(), upstream)]
    evaluate(inputs, Metric(), upstream)
    for x, y in zip((*inputs.values(), upstream), before, strict=True):
        assert torch.equal(x, y)


MEMORY = """
import torch, idml_fast

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def inputs(n):
    sides = 1 if {symmetric} else 2
    return [torch.randn(n, {width}, requires_grad=True) for _ in range(2 * sides)]

warm = idml_fast.pairwise(*inputs(1024))  # so that every library is loaded and has its buffers
warm.backward(torch.ones_like(warm))
del warm
xs = inputs({n})
upstream = torch.ones({n}, {n})
before = status("VmRSS")
scores = idml_fast.pairwise(*xs)
scores.backward(upstream)
results = sum(x.nbytes for x in [scores, *(x.grad for x in xs)])
print(status("VmHWM") - before - results)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read on Linux")
@pytest.mark.parametrize("symmetric", [False, True], ids=["two sets", "self"])
def test_memory(symmetric):
    """Forward and backward of 64 MiB of scores take less than 32 MiB besides the results."""
    code = MEMORY.format(symmetric=symmetric, n=4096, width=64)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 32 * 2**20


def test_the_reference_is_the_definition():
    """What `backend="reference"` runs is `idml_fast.reference` itself."""
    inputs = draw(7, 6, 5, 3)
    assert torch.equal(
        pairwise(**inputs, backend="reference"), reference.pairwise(**inputs, metric=Metric())
    )
    assert idml_fast.pairwise is pairwise
