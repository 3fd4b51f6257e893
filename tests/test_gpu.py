"""On an NVIDIA GPU: values and gradients of every operation and loss, edges, what they promise.

`pytest -m gpu` runs these tests; without it they are not selected.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import test_losses
import test_nearest
import test_paired
import test_rowstats
import torch
from conftest import (
    FORMS,
    NAMES,
    Inputs,
    assert_accurate,
    draw,
    draw_upstream,
    evaluate,
    in_eager_pytorch,
    to_double,
)
from conftest import assert_follows_the_rule as assert_pairwise_follows_the_rule
from idml_fast._triton.configs import PRODUCT_ERRORS
from test_pairwise import (
    IDENTICAL,
    assert_together_follow_the_rule,
    near_duplicates,
    strided,
)
from torch import Tensor
from torch.nn.functional import normalize

from idml_fast import (
    DistanceWeighted,
    Metric,
    _blocks,
    losses,
    nearest,
    paired,
    pairwise,
    reference,
    rowstats,
)
from idml_fast import backend as backends
from idml_fast.stats import LogSumExp, Max, Sum

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
FLOAT, DOUBLE = torch.float32, torch.float64
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# How float32 is multiplied, and the precision of the eager products that the result is held to.
MODES = {"ieee": "highest", "tf32x3": "highest", "bf16x3": "high", "tf32": "high"}
METRICS = test_rowstats.METRICS
METRIC = METRICS["distance"]

each_op = pytest.mark.parametrize("op", backends.OPERATIONS)
two_sets_and_self = pytest.mark.parametrize("m", [139, None], ids=["two sets", "self"])
in_float_and_half = pytest.mark.parametrize("arithmetic", ["ieee", "bf16"])
in_float = pytest.mark.parametrize("arithmetic", ["ieee"])
in_half = pytest.mark.parametrize("arithmetic", ["bf16"])
# Not all of both: every combination has to be compiled.
each_form_in_float_and_one_in_half = pytest.mark.parametrize(
    ("form", "arithmetic"), [*((form, "ieee") for form in FORMS), ("distance", "bf16")]
)


@pytest.fixture(autouse=True)
def gpu() -> None:
    """These tests fail without a GPU: none of them is skipped."""
    assert torch.cuda.is_available(), "these tests need an NVIDIA GPU and a torch that uses it"


@contextmanager
def multiplying(arithmetic: str) -> Iterator[torch.dtype]:
    """A dtype for embeddings, and float32 products as wanted, ours and eager's."""
    before = backends.precision, torch.get_float32_matmul_precision()
    backends.precision = arithmetic if arithmetic in MODES else None
    torch.set_float32_matmul_precision(MODES.get(arithmetic, "highest"))
    try:
        yield HALVES.get(arithmetic, FLOAT)
    finally:
        backends.precision = before[0]
        torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def dtype(arithmetic: str) -> Iterator[torch.dtype]:
    """The dtype of embeddings for the arithmetic of the test."""
    with multiplying(arithmetic) as dtype:
        yield dtype


@pytest.fixture
def record(pytestconfig: pytest.Config, race: Any) -> Callable[[str, Any], None]:
    """Prints what a test has measured and, with ``--measured``, writes it down."""

    def write(name: str, found: Any) -> None:
        text = json.dumps({**race.machine("cuda"), name: found}, indent=1)
        print(text)
        folder = pytestconfig.getoption("--measured")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"gpu-{name}.json").write_text(text + "\n")

    return write


def on_device(x: Any) -> Any:
    """Tensors on the GPU: also those in dicts, tuples, problems, statistics and metrics."""
    if isinstance(x, Tensor | torch.nn.Module):
        return x.to(DEVICE)
    if isinstance(x, dict):
        return {name: on_device(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(map(on_device, x))
    if dataclasses.is_dataclass(x):
        fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
        return dataclasses.replace(x, **on_device(fields))
    return x


def sizes(inputs: Inputs) -> tuple[int, int | None]:
    return len(inputs["sem"]), None if inputs["sem2"] is None else len(inputs["sem2"])


# ---------------------------------------------------------------------------- values and gradients


def rowstats_follow_the_rule(inputs: Inputs, metric: Metric, eps: float | None = None) -> None:
    """One statistic of each kind, under every condition, with windows and thresholds."""
    labels = on_device(test_nearest.draw_labels(*sizes(inputs), classes=4))
    given = test_rowstats.Problem(inputs, labels["labels"], labels.get("labels2"))
    scores = given.scores(metric).cpu()
    stats = on_device(test_rowstats.in_turn(scores, names=test_rowstats.KINDS))
    test_rowstats.assert_follows_the_rule(given, stats, metric, eps)


def paired_follows_the_rule(inputs: Inputs, metric: Metric, eps: float | None = None) -> None:
    index = on_device(test_paired.draw_index(*sizes(inputs), 700))
    test_paired.assert_follows_the_rule(inputs, index, metric)


def nearest_follows_the_rule(inputs: Inputs, metric: Metric, eps: float | None = None) -> None:
    n, m = sizes(inputs)
    test_nearest.assert_follows_the_rule(inputs, min(10, n if m is None else m), metric)


def pairwise_follows_the_rule(inputs: Inputs, metric: Metric, eps: float | None = None) -> None:
    assert_pairwise_follows_the_rule(inputs, metric)


RULES = {
    "pairwise": pairwise_follows_the_rule,
    "rowstats": rowstats_follow_the_rule,
    "paired": paired_follows_the_rule,
    "nearest": nearest_follows_the_rule,
}
# Columns, no multiple of a tile. The scores of a row must be many to be a sample of eager's errors,
# and few to leave gaps for the bounds of the statistics' windows.
COLUMNS = {"pairwise": 530, "rowstats": 130, "paired": 130, "nearest": 530}
# Every metric, and every arithmetic.
COMBINATIONS = [
    *((name, "bf16") for name in METRICS),
    *(("distance", arithmetic) for arithmetic in (*MODES, "fp16")),
    *(("cosine", arithmetic) for arithmetic in ("ieee", "tf32")),
]


@each_op
@two_sets_and_self
@pytest.mark.parametrize(("metric", "arithmetic"), COMBINATIONS)
def test_accuracy(op, m, metric, arithmetic, dtype):
    # No width is a multiple of 16. Rows against themselves have as many scores as there are rows.
    n = 397 if COLUMNS[op] == 530 else 139
    inputs = on_device(draw(n, m and COLUMNS[op], 83, 41, dtype=dtype))
    eps = PRODUCT_ERRORS.get(arithmetic)
    RULES[op](inputs, METRICS[metric], eps)


@in_float_and_half
@pytest.mark.parametrize("power", [2.0, 0.5])
def test_accuracy_of_powers(power, dtype):
    given = on_device(test_rowstats.problem(70, 100, 83, 41, dtype=dtype))
    scores = given.scores(METRIC).cpu()
    stats = on_device(test_rowstats.in_turn(scores, power, names=test_rowstats.KINDS))
    test_rowstats.assert_follows_the_rule(given, stats, METRIC)


SHAPES = test_rowstats.SHAPES | {
    "width 1": (170, 130, 1, 1),
    "many tiles": (700, 530, 64, 32),
    "wide": (70, 530, 513, 511),
    "one row, many tiles": (1, 1500, 19, 11),
    "one column, many tiles": (1500, 1, 19, 11),
    "self, many tiles": (650, None, 64, 32),
}


@in_float_and_half
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_of_pairwise(shape, dtype):
    problems = [on_device(draw(*shape, dtype=dtype, seed=seed)) for seed in range(6)]
    assert_together_follow_the_rule(problems, METRIC)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_of_rowstats(shape, monkeypatch):
    """What the definitions make of our own scores, so that every shape is a large enough sample."""
    given = on_device(test_rowstats.problem(*shape, dtype=FLOAT))
    stats = on_device(test_rowstats.in_turn(given.scores(METRIC).cpu()))
    found = test_rowstats.measure(given, stats, METRIC)
    monkeypatch.setattr(reference, "pairwise", pairwise)
    expected = test_rowstats.measure(given, stats, METRIC, "reference")
    # The same scores: what may differ is the rounding of sums over 700 of them.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@each_op
@in_float
@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
def test_zero_is_an_uncertainty_of_zeros(op, certain, dtype):
    inputs = on_device(draw(139, COLUMNS[op], 83, 41, dtype=dtype))
    inputs |= dict.fromkeys(certain, "zero")
    RULES[op](inputs, METRIC)


@each_op
@in_half
@pytest.mark.parametrize("layout", ["transposed", "every other row and column"])
def test_non_contiguous_inputs(op, layout, dtype):
    inputs = on_device(draw(139, COLUMNS[op], 83, 41, dtype=dtype))
    RULES[op]({name: strided(x, layout) for name, x in inputs.items()}, METRIC)


@in_float_and_half
@pytest.mark.parametrize("layout", ["transposed", "every other row and column"])
def test_non_contiguous_upstream(layout, dtype):
    inputs = on_device(draw(139, 530, 83, 41, dtype=dtype))
    upstream = strided(draw_upstream(inputs), layout)
    assert_pairwise_follows_the_rule(inputs, METRIC, upstream)


def operation(op: str, n: int, m: int | None) -> Callable[..., Tensor]:
    """An operation on so many rows and columns that gives one tensor, all else settled."""
    labels = on_device(test_nearest.draw_labels(n, m, classes=4))
    index = on_device(test_paired.draw_index(n, m, 700)) if n else None
    stats = {"lse": LogSumExp(where="different", scale=-2.0), "sum": Sum(where="same")}
    return {
        "pairwise": pairwise,
        "rowstats": lambda **given: torch.cat([*rowstats(**given, **labels, stats=stats).values()]),
        "paired": partial(paired, index=index),
        "nearest": lambda **given: nearest(**given, **labels, where="different", k=5)[0],
    }[op]


def differentiate(
    call: Callable[..., Tensor], inputs: Inputs, metric: Metric = METRIC, backend: str | None = None
) -> dict[str, Tensor]:
    """The values, and the gradients of the inputs and of tensors in the metric."""
    leaves = {k: x.detach().requires_grad_() for k, x in inputs.items() if isinstance(x, Tensor)}
    of_metric = {
        k: x.detach().requires_grad_()
        for k in ("tau", "gamma")
        if isinstance(x := getattr(metric, k), Tensor)
    }
    metric = dataclasses.replace(metric, **of_metric)
    values = call(**inputs | leaves, metric=metric, backend=backend)
    # Eighths: no dtype rounds them.
    upstream = torch.arange(values.numel(), device=values.device).view_as(values) % 13 / 8 - 0.75
    leaves |= of_metric
    gradients = torch.autograd.grad(values, [*leaves.values()], upstream.to(values))
    return {"values": values.detach()} | dict(zip(leaves, gradients, strict=True))


@each_op
@each_form_in_float_and_one_in_half
def test_tau_and_gamma_learn(op, form, dtype):
    """They are one number each: eager's error is sampled over several problems."""
    call = operation(op, 70, 60)
    ours, eager, truth = [], [], []
    for seed in range(12):
        inputs = on_device(draw(70, 60, 83, 41, dtype=dtype, seed=seed))
        metric = test_rowstats.learnable(form, FLOAT)["both"]
        exact = test_rowstats.learnable(form, DOUBLE)["both"]
        ours.append(differentiate(call, inputs, on_device(metric)))
        eager.append(differentiate(call, inputs, on_device(metric), "reference"))
        truth.append(differentiate(call, to_double(inputs), on_device(exact), "reference"))
    for what in ("tau", "gamma"):
        assert_accurate(what, *(torch.stack([x[what] for x in xs]) for xs in (ours, eager, truth)))


@in_float_and_half
@two_sets_and_self
def test_the_gradient_of_nearest_is_that_of_the_pairs_found(m, dtype):
    inputs = on_device(draw(139, m, 83, 41, dtype=dtype))
    rows = torch.arange(139, device=DEVICE).repeat_interleave(5)
    columns = nearest(**inputs, k=5, metric=METRIC)[1].flatten()
    found = differentiate(lambda **given: nearest(**given, k=5)[0].flatten(), inputs)
    expected = differentiate(partial(paired, index=(rows, columns)), inputs)
    for name in inputs.keys() & expected.keys():
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])
@pytest.mark.parametrize("arithmetic", ["ieee", "fp16"])
def test_ties_go_to_the_smaller_column(m, dtype):
    inputs = on_device(test_nearest.on_a_grid(26, m, dtype=dtype))
    for k in (1, 5, 26):
        found = nearest(**inputs, k=k, metric=Metric.plain())
        expected = nearest(**inputs, k=k, metric=Metric.plain(), backend="reference")
        test_nearest.assert_identical(found, expected)


@pytest.mark.parametrize("way", test_nearest.WAYS)
def test_conditions_whole_and_in_blocks(way, monkeypatch):
    inputs, options, (_, expected) = test_nearest.searched(way)
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    options = on_device(options)
    _, whole = nearest(**on_device(inputs), **options)
    assert torch.equal(whole.cpu(), expected)
    monkeypatch.setattr(_blocks, "BYTES", 1)
    monkeypatch.setattr(_blocks, "MULTIPLE", 10)
    arrays = {name: inputs[name].numpy() for name in ("sem2", "unc2", "labels2")}
    _, in_blocks = nearest(**on_device(inputs) | arrays, **options)
    assert torch.equal(in_blocks, whole)


@two_sets_and_self
def test_draws_like_the_reference(m):
    drawn = on_device(test_nearest.on_a_sphere(139, m))
    inputs = {name: x if x is None else x.float() for name, x in drawn.items()}
    options = {"k": 3, "sample": DistanceWeighted(), "seed": 2**40 + 1}
    _, columns = nearest(**inputs, **options)
    _, expected = nearest(**to_double(inputs), **options, backend="reference")
    assert torch.equal(columns, expected)


# ------------------------------------------------------------------------------------------- losses


def batch(dtype: torch.dtype, n: int = 96, seed: int = 0) -> tuple[Tensor, ...]:
    return on_device(test_losses.batch(n, dtype, seed))


def measured(
    name: str, dtype: torch.dtype, wrap: Callable[[torch.nn.Module], Any] = lambda loss: loss
) -> tuple[dict[str, Tensor], ...]:
    """The value and gradients of a loss: ours, eager's and the truth."""
    torch.manual_seed(0)
    loss = on_device(test_losses.ALL[name]().to(dtype))
    items = batch(dtype)
    exact = [x.double() if x.is_floating_point() else x for x in items]
    with in_eager_pytorch():
        eager = test_losses.evaluate(loss, *items)
        truth = test_losses.evaluate(copy.deepcopy(loss).double(), *exact)
    ours = test_losses.evaluate(wrap(loss), *items).values()
    return dict(zip(eager, ours, strict=True)), eager, truth


def assert_gradients_follow_the_rule(
    ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    for what in ours.keys() - {"value"}:
        assert_accurate(what, ours[what], eager[what], truth[what])


@in_float
@pytest.mark.parametrize("name", test_losses.ALL)
def test_gradients_of_losses(name, dtype):
    assert_gradients_follow_the_rule(*measured(name, dtype))


@in_float
def test_values_of_losses(dtype):
    # One number is one draw of a rounding error: the losses are the sample for one another.
    found = []
    for name in test_losses.ALL:
        *values, truth = (x["value"] for x in measured(name, dtype))
        found.append([x / truth for x in (*values, truth)])
    assert_accurate("values", *(torch.stack(xs) for xs in zip(*found, strict=True)))


# -------------------------------------------------------------------------------------------- edges


def edge(name: str, m: int, dtype: torch.dtype) -> Inputs:
    """140 rows and m columns, some of whose pairs are special."""
    inputs = draw(140, m, 64, 20, dtype=dtype)
    if name == "identical items":
        inputs["sem2"][:40] = inputs["sem"][100:]
    elif name == "identical items of opposite uncertainties":
        inputs["sem2"][:40], inputs["unc2"][:40] = inputs["sem"][100:], -inputs["unc"][100:]
    elif name == "opposite uncertainties":
        inputs["unc2"][:40] = -inputs["unc"][100:]
    elif name == "zero vectors":
        for x in inputs.values():
            x[[3, 77]] = 0
    elif name == "near-duplicates":
        inputs["sem"][:24], inputs["sem2"][100:124] = near_duplicates(dtype)
    elif name == "near-duplicates only":
        inputs["sem2"] = (inputs["sem2"] * 1e-3 + inputs["sem"][0]).to(dtype)
        inputs["sem"] = (inputs["sem"] * 1e-3 + inputs["sem"][0]).to(dtype)
    return inputs


EDGES = (
    "identical items",
    "identical items of opposite uncertainties",
    "opposite uncertainties",
    "zero vectors",
    "near-duplicates",
    "near-duplicates only",
)


@each_op
@each_form_in_float_and_one_in_half
@pytest.mark.parametrize("name", EDGES)
def test_edges(op, name, form, dtype):
    # A gamma of 0, so that nothing hides what a beta of 0 does; a weak effect of the uncertainty,
    # so that near-duplicates show.
    RULES[op](on_device(edge(name, COLUMNS[op], dtype)), Metric(1000.0, 0.0, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arithmetic", [*MODES, *HALVES])
def test_identical_items_are_exact(form, dtype):
    inputs = on_device(edge("identical items", 130, dtype))
    scores = pairwise(**inputs, metric=Metric(1.5, 0.25, form))
    assert (scores[100:, :40].diagonal() == IDENTICAL[form]).all()
    itself = pairwise(inputs["sem"], inputs["unc"], metric=Metric(1.5, 0.25, form))
    assert (itself.diagonal() == IDENTICAL[form]).all()
    assert torch.equal(itself, itself.T)


@each_form_in_float_and_one_in_half
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_come_out_where_they_went_in(value, name, form, dtype):
    inputs = on_device(draw(140, 130, 33, 20, dtype=dtype))
    inputs[name][3, 2] = value
    metric = Metric(form=form)
    touched = torch.zeros(140, 130, dtype=torch.bool, device=DEVICE)
    if name.endswith("2"):
        touched[:, 3] = True
    else:
        touched[3] = True
    found = evaluate(inputs, metric, draw_upstream(inputs))
    assert torch.equal(~found["scores"].isfinite(), touched)
    side = ("sem2", "unc2") if name.endswith("2") else ("sem", "unc")
    for other in side:  # the other items of this side have nothing to do with it
        gradient = found[f"grad_{other}"]
        assert torch.cat([gradient[:3], gradient[4:]]).isfinite().all(), other
    labels = {"labels": torch.zeros(140).long(), "labels2": torch.zeros(130).long()}
    stats = {"sum": Sum(where="any")} | ({"max": Max(where="any")} if math.isnan(value) else {})
    of_rows = rowstats(**inputs, **on_device(labels), metric=metric, stats=stats)
    assert torch.equal(~of_rows["sum"].isfinite(), touched.any(1))
    if math.isnan(value):
        assert torch.equal(of_rows["max"].values.isnan(), touched.any(1))
        values, columns = nearest(**inputs, k=2, metric=metric)
        assert torch.equal(values[:, 0].isnan(), touched.any(1))
        assert (columns[touched.any(1), 0] == touched.int().argmax(1)[touched.any(1)]).all()


@in_float_and_half
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0), (0, None)])
def test_empty(n, m, dtype):
    inputs = on_device(draw(n, m, 5, 3, dtype=dtype))
    found = evaluate(inputs, METRIC, draw_upstream(inputs))
    assert found["scores"].shape == (n, n if m is None else m)
    assert all(not x.any() for x in found.values())
    assert differentiate(operation("rowstats", n, m), inputs)["values"].shape == (2 * n,)
    if n == 0 and m != 0:
        assert [x.shape for x in nearest(**inputs, k=1)] == [(0, 1), (0, 1)]
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert paired(**inputs, index=(nothing, nothing)).shape == (0,)


# ----------------------------------------------------------------------------------------- promises


@each_op
@in_float_and_half
@two_sets_and_self
def test_a_hundred_repeats_give_the_same_bits(op, m, dtype):
    call = operation(op, 700, m)
    inputs = on_device(draw(700, m, 83, 41, dtype=dtype))
    metric = on_device(test_rowstats.learnable("distance", FLOAT)["both"])
    first = differentiate(call, inputs, metric)
    for _ in range(99):
        for what, x in differentiate(call, inputs, metric).items():
            assert torch.equal(x, first[what]), what


@each_op
@in_float_and_half
def test_streams_do_not_disturb_one_another(op, dtype):
    call = operation(op, 1500, 1300)
    problems = [on_device(draw(1500, 1300, 83, 41, dtype=dtype, seed=k)) for k in range(4)]
    expected = [differentiate(call, inputs) for inputs in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(5):
        found = []
        for stream, inputs in zip(streams, problems, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(differentiate(call, inputs))
        torch.cuda.synchronize()
        for ours, alone in zip(found, expected, strict=True):
            assert all(torch.equal(x, alone[what]) for what, x in ours.items())


@each_op
def test_every_device_is_served_whichever_is_current(op):
    inputs = draw(139, 130, 83, 41, dtype=FLOAT)
    expected = differentiate(operation(op, 139, 130), on_device(inputs))
    count = torch.cuda.device_count()
    for device in range(count):
        with torch.cuda.device(device):
            call, there = operation(op, 139, 130), on_device(inputs)
        with torch.cuda.device((device + 1) % count):
            found = differentiate(call, there)
        assert all(x.device.index == device for x in found.values())
        assert all(torch.equal(on_device(x), expected[what]) for what, x in found.items())


def test_two_devices_in_one_call_are_refused():
    inputs = draw(5, 4, 3, 2, dtype=FLOAT)
    with pytest.raises(ValueError, match=r"^sem2 must be on cuda:0 like sem, got cpu$"):
        pairwise(**inputs | on_device({k: inputs[k] for k in ("sem", "unc")}))


@each_op
def test_double_is_refused_with_the_reason(op):
    inputs = on_device(draw(5, 4, 3, 2))
    for backend in (None, "triton"):
        with pytest.raises(RuntimeError, match="float64"):
            operation(op, 5, 4)(**inputs, metric=METRIC, backend=backend)


@pytest.mark.parametrize(("precision", "mode"), [("highest", "ieee"), ("high", "tf32")])
def test_float32_products_follow_pytorch(precision, mode):
    inputs = on_device(draw(139, 130, 83, 41, dtype=FLOAT))
    with multiplying(mode):
        expected = pairwise(**inputs)
    with multiplying("bf16"):  # leaves it to PyTorch
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(pairwise(**inputs), expected)
    with multiplying("ieee" if mode == "tf32" else "tf32"):
        assert not torch.equal(pairwise(**inputs), expected)


@each_op
def test_autocast_takes_its_dtype(op):
    call = operation(op, 139, 130)
    inputs = on_device(draw(139, 130, 83, 41, dtype=FLOAT))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = call(**inputs, metric=METRIC)
    rounded = {name: x.bfloat16() for name, x in inputs.items()}
    assert torch.equal(found, call(**rounded, metric=METRIC))


def loss_step(name: str, dtype: torch.dtype) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """Forward and backward of a loss, and the items that it reads anew at each call."""
    torch.manual_seed(0)
    loss = on_device(test_losses.ALL[name]().to(dtype))
    sem, unc, labels = items = batch(dtype)
    leaves = [sem.requires_grad_(), unc.requires_grad_(), *loss.parameters()]

    def step() -> list[Tensor]:
        value = loss(*items)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return step, [sem, unc, labels]


WITHOUT_LISTS = [name for name in test_losses.ALL if name not in test_losses.DATA_DEPENDENT]


@in_float
@pytest.mark.parametrize("name", WITHOUT_LISTS)
def test_a_step_does_not_wait_for_the_gpu(name, dtype):
    step, _ = loss_step(name, dtype)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@in_float
@pytest.mark.parametrize("name", WITHOUT_LISTS)
def test_a_captured_step_takes_new_items(name, dtype):
    step, items = loss_step(name, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            for old, new in zip(items, batch(dtype, seed=seed), strict=True):
                old.copy_(new)
        graph.replay()
        found = [x.clone() for x in captured]
        graph.replay()
        expected = step()
        for x, again, alone in zip(found, captured, expected, strict=True):
            assert torch.equal(x, again)
            torch.testing.assert_close(x, alone)


@in_half
@pytest.mark.parametrize("name", ["proxy_anchor_learned", "multi_similarity", "triplet_hard"])
def test_a_whole_step_compiles(name, dtype):
    torch._dynamo.reset()  # the losses share their forward, which it compiles a few times only
    compiled = partial(torch.compile, fullgraph=True)
    assert_gradients_follow_the_rule(*measured(name, dtype, compiled))


# -------------------------------------------------------------------- large problems, few resources


def normalized(n: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Made where it stays: large ones would take long to copy."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return normalize(torch.randn(n, width, generator=generator, device=DEVICE)).to(dtype)


def test_more_than_2_31_pairs():
    """70,000 x 70,000: rows, and columns, drawn from all are what the reference makes of them."""
    n = 70_000
    inputs = {name: normalized(n, 16, FLOAT, seed) for seed, name in enumerate(NAMES)}
    generator = torch.Generator(DEVICE).manual_seed(9)
    labels = torch.randint(1000, (2, n), generator=generator, device=DEVICE)
    chosen = torch.cat([torch.arange(n, device=DEVICE)[k] for k in (slice(24), slice(-24, None))])
    stats = {"sum": Sum(where="different"), "lse": LogSumExp(where="different", scale=-3.0)}

    def found(which: str, rows: Any, columns: Any, dtype: torch.dtype, backend: str | None):
        """A statistic of some rows, and its gradients, over some columns."""
        parts = {k: x[columns if k.endswith("2") else rows] for k, x in inputs.items()}
        of_labels = {"labels": labels[0, rows], "labels2": labels[1, columns]}
        call = partial(rowstats, **of_labels, stats={which: stats[which]})
        exact = {k: x.to(dtype) for k, x in parts.items()}
        leaves = {k: x.detach().requires_grad_() for k, x in exact.items()}
        values = call(**leaves, metric=METRIC, backend=backend)[which]
        gradients = torch.autograd.grad(values.sum(), [*leaves.values()])
        return {"values": values.detach()} | dict(zip(leaves, gradients, strict=True))

    everything = slice(None)
    for which in stats:
        ours = found(which, everything, everything, FLOAT, None)
        sides = [("values", "sem", "unc")]
        if which == "sum":  # what a column gets from it does not depend on the other columns
            sides.append(("sem2", "unc2"))
        for side in sides:
            part = (chosen, everything) if "sem" in side else (everything, chosen)
            eager = found(which, *part, FLOAT, "reference")
            truth = found(which, *part, DOUBLE, "reference")
            for what in side:
                assert_accurate(f"{which}, {what}", ours[what][chosen], eager[what], truth[what])


def test_more_than_2_31_scores():
    n = 47_000
    inputs = {name: normalized(n, 16, torch.bfloat16, seed) for seed, name in enumerate(NAMES)}
    scores = pairwise(**inputs, metric=METRIC)
    last = {k: x if k.endswith("2") else x[-100:] for k, x in inputs.items()}
    eager = evaluate(last, METRIC, backend="reference")["scores"]
    truth = evaluate(to_double(last), METRIC, backend="reference")["scores"]
    assert_accurate("scores", scores[-100:], eager, truth, by_row=True)


MULTI_SIMILARITY = {
    "pull": LogSumExp(where="same", scale=-2.0, shift=0.5),
    "push": LogSumExp(where="different", scale=50.0, shift=0.5),
}


def test_memory_does_not_grow_with_the_pairs(race):
    """32,768 x 32,768 scores in bfloat16 are 2 GiB; 300 MiB beyond inputs and results will do."""

    def step(n: int) -> Callable[[], tuple[Tensor, ...]]:
        inputs = [normalized(n, 512, torch.bfloat16, k).requires_grad_() for k in range(4)]
        labels = torch.arange(n, device=DEVICE) // 4

        def call() -> tuple[Tensor, ...]:
            found = rowstats(
                *inputs,
                labels=labels,
                labels2=labels,
                metric=Metric.paper("cosine"),
                stats=MULTI_SIMILARITY,
            )
            return torch.autograd.grad(sum(x.mean() for x in found.values()), inputs)

        return call

    step(4096)()  # what cuBLAS takes once
    assert race.peak_memory(step(32_768), "cuda") <= 300 * race.MIB


def kernels(step: Callable[[], Any]) -> dict[str, int]:
    """How many kernels a step launches: in all, and of our own."""
    from triton.runtime import JITFunction

    from idml_fast import _triton

    modules = [
        importlib.import_module(f"{_triton.__name__}.{module.name}")
        for module in pkgutil.iter_modules(_triton.__path__)
    ]
    own = {x.__name__ for m in modules for x in vars(m).values() if isinstance(x, JITFunction)}
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    launched = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return {"all": len(launched), "ours": sum(name in own for name in launched)}


def test_kernels_of_a_step(record):
    """Proxy-Anchor with the 11,318 proxies of Stanford Online Products, a batch of 120."""
    torch.manual_seed(0)
    loss = on_device(losses.ProxyAnchorLoss(11_318, 512))
    sem, unc = (normalized(120, 512, FLOAT, seed).requires_grad_() for seed in (0, 1))
    labels = torch.arange(120, device=DEVICE) * 7
    leaves = [sem, unc, *loss.parameters()]
    torch._dynamo.reset()
    found = {
        name: kernels(lambda f=f: torch.autograd.grad(f(sem, unc, labels), leaves))
        for name, f in {"eager": loss, "compiled": torch.compile(loss, fullgraph=True)}.items()
    }
    record("kernels", found)
    for count in found.values():
        assert 1 <= count["ours"] <= 6
        assert count["ours"] < count["all"]


def test_errors_of_every_precision(record, monkeypatch):
    """The largest error of each way to multiply float32, as a multiple of eager's in IEEE float32;
    it may be as much larger as a product's own error is, times the two of the rule."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for op in backends.OPERATIONS:
        call = operation(op, 150, 530)
        inputs = on_device(draw(150, 530, 512, 512, dtype=FLOAT, scale=512**-0.5))
        truth = differentiate(call, to_double(inputs), backend="reference")
        eager = differentiate(call, inputs, backend="reference")
        for mode in MODES:
            # The products of the gradients are PyTorch's own, here exact ones.
            monkeypatch.setattr(backends, "precision", mode)
            ours = differentiate(call, inputs)
            # The gradients of nearest are those of paired, if for other columns.
            names = ["values"] if op == "nearest" else list(ours)
            table.setdefault(op, {})[mode] = {
                what: float(largest_error(ours, truth, what) / largest_error(eager, truth, what))
                for what in names
            }
    record("errors", table)
    for op, modes in table.items():
        for mode, errors in modes.items():
            bound = 2 * PRODUCT_ERRORS[mode] / PRODUCT_ERRORS["ieee"]
            assert max(errors.values()) <= bound, f"{op}, {mode}: {errors}, bound {bound}"


def largest_error(found: dict[str, Tensor], truth: dict[str, Tensor], what: str) -> Tensor:
    return (found[what] - truth[what]).abs().max()


@pytest.mark.parametrize("columns", [None, 200])
def test_retrieval_is_that_of_the_cpu(columns):
    """On a grid, whose distances every precision has exactly, ties among them."""
    pytest.importorskip("faiss", reason="the extra idml_fast[train] is not installed")
    from test_retrieval import assert_same, problem

    from idml_fast.evaluation import Retrieval, retrieval

    given = problem(300, columns, classes=40, grid=True)
    found = retrieval(*(x.cuda() for x in given))
    per_query = {name: values.cpu() for name, values in found.per_query.items()}
    assert_same(Retrieval(per_query, found.queries.cpu(), found.unmatched.cpu()), retrieval(*given))
