"""The CUDA kernels on an NVIDIA GPU: every operation that they have is theirs in these tests.

`pytest -m gpu` runs them; tests/test_cuda.py runs the same kernels in an emulation.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import test_gpu
import test_nearest
import test_rowstats
import torch
from conftest import (
    FORMS,
    Inputs,
    assert_accurate,
    assert_follows_the_rule,
    draw,
    draw_upstream,
    evaluate,
    to_double,
)
from test_gpu import DEVICE, EDGES, FLOAT, HALVES, METRIC, differentiate, on_device, operation
from test_pairwise import IDENTICAL, assert_together_follow_the_rule, strided
from test_triton import with_near_pairs
from torch import Tensor
from torch.nn.functional import pad

from idml_fast import Metric, nearest, paired, pairwise, reference, rowstats, stats
from idml_fast import backend as backends

pytestmark = pytest.mark.gpu

# Statistics without windows: what is rounded may move a score into one or out of it.
NAMES = ["log-sum-exp", "sum", "hinge sum", "max"]

each_op = pytest.mark.parametrize("op", backends.KERNELS["cuda"])
each_form = pytest.mark.parametrize("form", FORMS)
two_sets_and_self = pytest.mark.parametrize("m", [150, None], ids=["two sets", "self"])
in_half = pytest.mark.parametrize("arithmetic", ["bf16"])
in_both_halves = pytest.mark.parametrize("arithmetic", HALVES)
in_float = pytest.mark.parametrize("arithmetic", ["tf32"])
in_float_and_half = pytest.mark.parametrize("arithmetic", ["tf32", "bf16"])


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation without a backend's name is for the CUDA kernels. Without a GPU, or without
    kernels that are built for it, these tests fail: none of them is skipped."""
    assert torch.cuda.is_available(), "these tests need an NVIDIA GPU and a torch that uses it"
    reason = backends.refusal("cuda", "pairwise", torch.device("cuda", 0), torch.bfloat16)
    assert reason is None, f"these tests need the CUDA kernels: {reason}"
    from idml_fast import _gpu

    major, minor = torch.cuda.get_device_capability()
    names = [name for name in _gpu.ARCHITECTURES if name.rstrip("af")[:-1] == str(major)]
    assert "90a" in names if major == 9 else names, (
        f"these tests need the CUDA kernels for this GPU, of compute capability {major}.{minor}; "
        f"they are built for {_gpu.ARCHITECTURES}"
    )
    choose = backends.choose

    def cuda(op: str, tensor: Tensor, backend: str | None = None, beyond_cuda=()) -> str:
        return choose(op, tensor, backend or "cuda", beyond_cuda)

    monkeypatch.setattr(backends, "choose", cuda)


@pytest.fixture
def dtype(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of embeddings for the arithmetic of the test. The products of the gradients are
    PyTorch's own, of float32 exact ones."""
    monkeypatch.setattr(backends, "precision", "tf32")
    return HALVES.get(arithmetic, FLOAT)


def padded(x: Tensor | str | None) -> Tensor | str | None:
    """The same with rows at multiples of 16 bytes."""
    return pad(x, (0, -x.shape[1] % 8)) if isinstance(x, Tensor) else x


def drawn(*shape: int | None, **options) -> Inputs:
    return on_device(draw(*shape, **options))


def assert_within(
    ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float, only: str | None = None
) -> None:
    """A bound on the errors, as a share of the largest number."""
    for what in [only] if only else ours:
        x, expected = ours[what].double(), truth[what].double()
        error = (x - expected).abs().max() / expected.abs().max()
        assert error <= bound, f"{what}: {error:.3g}, bound {bound:.3g}"


# ---------------------------------------------------------------------------- values and gradients


def statistics_follow_the_rule(inputs: Inputs, metric: Metric) -> None:
    labels = on_device(test_nearest.draw_labels(*test_gpu.sizes(inputs), classes=4))
    given = test_rowstats.Problem(inputs, labels["labels"], labels.get("labels2"))
    some = on_device(test_rowstats.in_turn(given.scores(metric).cpu(), names=NAMES))
    test_rowstats.assert_follows_the_rule(given, some, metric, apart=False)


RULES = test_gpu.RULES | {"rowstats": statistics_follow_the_rule}


@each_op
@each_form
@two_sets_and_self
@in_both_halves
def test_accuracy(op, m, form, dtype):
    """Ragged tiles; more steps than stages; a last step that is not full."""
    RULES[op](drawn(200, m, 200, 40, dtype=dtype), Metric(1.5, 0.25, form))


@each_form
@two_sets_and_self
@in_float
def test_float32_is_multiplied_as_tf32(m, form, dtype):
    inputs, metric = drawn(200, m, 200, 40, dtype=dtype), Metric(1.5, 0.25, form)
    upstream = draw_upstream(inputs)
    ours = evaluate(inputs, metric, upstream)
    truth = evaluate(to_double(inputs), metric, upstream.double(), "reference")
    assert_within(ours, truth, 2.0**-10)


SHAPES = [(1, 1, 8, 8), (129, 3, 64, 64), (3, 300, 8, 264), (128, 128, 128, 8), (300, None, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@in_half
def test_shapes(shape, dtype):
    problems = [drawn(*shape, dtype=dtype, seed=seed) for seed in range(6)]
    assert_together_follow_the_rule(problems, METRIC)


MANY_TILES = [(1000, 3000, 512, 512), (1000, 3000, 200, 40), (1900, None, 512, 512)]


@pytest.mark.parametrize("shape", MANY_TILES, ids=str)
@in_both_halves
def test_many_tiles(shape, dtype):
    assert_follows_the_rule(drawn(*shape, dtype=dtype), METRIC)


@each_op
@in_float_and_half
@pytest.mark.parametrize("shape", [(6000, 5000, 200, 40), (6000, None, 64, 64)], ids=str)
def test_triton_finds_the_same(op, shape, dtype):
    """In so many tiles that every multiprocessor takes several."""
    call, inputs = operation(op, *shape[:2]), drawn(*shape, dtype=dtype)
    ours, theirs = differentiate(call, inputs), differentiate(call, inputs, backend="triton")
    # The gradients of nearest may be those of other columns.
    assert_within(ours, theirs, 2.0**-6, "values" if op == "nearest" else None)


@each_op
@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
@in_half
def test_zero_is_an_uncertainty_of_zeros(op, certain, dtype):
    inputs = drawn(140, 150, 72, 40, dtype=dtype) | dict.fromkeys(certain, "zero")
    RULES[op](inputs, METRIC)


@each_op
@in_float_and_half
def test_widths_need_not_be_whole(op, dtype):
    """Only rows have to begin at multiples of 16 bytes: what lies between is not read."""
    wide = drawn(140, 150, 72, 40, dtype=dtype)
    whole = {name: x.clone() for name, x in wide.items()}
    for name, x in wide.items():
        x[:, -3:], whole[name][:, -3:] = math.nan, 0
    call = operation(op, 140, 150)
    ours = differentiate(call, {name: x[:, :-3] for name, x in wide.items()})
    expected = differentiate(call, whole)
    assert torch.equal(ours["values"], expected["values"])
    assert all(x.isfinite().all() for x in ours.values())


@pytest.mark.parametrize("layout", ["transposed", "every other row and column", "one row expanded"])
@in_half
def test_upstream_gradients_of_any_strides(layout, dtype):
    inputs = drawn(140, 150, 40, 24, dtype=dtype)
    upstream = strided(draw_upstream(inputs), layout)
    ours = evaluate(inputs, METRIC, upstream)
    expected = evaluate(inputs, METRIC, upstream.contiguous())
    assert all(torch.equal(x, expected[what]) for what, x in ours.items())


@pytest.mark.parametrize(
    ("n", "m", "power"), [(140, 150, 1.0), (140, None, 2.0), (140, 150, 0.5), (650, None, 1.0)]
)
@in_float
def test_every_statistic(n, m, power, dtype, monkeypatch):
    """What the definitions make of the scores that the kernels themselves compute."""
    given = on_device(test_rowstats.problem(n, m, 8, 8, dtype=dtype))
    every = test_rowstats.in_turn(given.scores(METRIC).cpu(), power, int(2 * power) + (m is None))
    every = {k: x for k, x in every.items() if not isinstance(x, stats.Histogram)}
    for k in range(0, len(every), 4):
        some = on_device(dict(list(every.items())[k : k + 4]))
        found = test_rowstats.measure(given, some, METRIC)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "pairwise", pairwise)
            expected = test_rowstats.measure(given, some, METRIC, "reference")
        # What may differ is the rounding of sums over a row.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("m", "where", "above"), [(150, "same", 1.9), (150, "any", None), (None, "different", None)]
)
@pytest.mark.parametrize("arithmetic", ["tf32", "fp16"])
def test_ties_go_to_the_smaller_column(m, where, above, dtype):
    grid = on_device(test_nearest.on_a_grid(140, m, dtype=dtype))
    inputs = {name: padded(x) for name, x in grid.items()}
    labels = on_device(test_nearest.draw_labels(140, m))
    above = None if above is None else torch.full((140,), above, device=DEVICE)
    options = {"where": where, "above": above, "exclude_self": m is None, "metric": Metric.plain()}
    for k in (1, 5, 26):
        found = nearest(**inputs, **labels, **options, k=k)
        expected = nearest(**inputs, **labels, **options, k=k, backend="reference")
        test_nearest.assert_same(found, expected)


@two_sets_and_self
@in_float_and_half
def test_the_gradient_of_nearest_is_that_of_the_pairs_found(m, dtype):
    inputs = drawn(140, m, 72, 40, dtype=dtype)
    rows = torch.arange(140, device=DEVICE).repeat_interleave(5)
    columns = nearest(**inputs, k=5, metric=METRIC)[1].flatten()
    found = differentiate(lambda **given: nearest(**given, k=5)[0].flatten(), inputs)
    listed = partial(paired, index=(rows, columns))
    expected = differentiate(listed, inputs, backend="triton")
    for name in inputs.keys() & expected.keys():
        assert torch.equal(found[name], expected[name]), name


# -------------------------------------------------------------------------------------------- edges


@each_form
@two_sets_and_self
@in_both_halves
def test_pairs_whose_products_cancel_are_taken_again(m, form, dtype):
    inputs, upstream = on_device(with_near_pairs(draw(140, m, 72, 40, dtype=dtype)))
    assert_follows_the_rule(inputs, Metric(1.5, 0.25, form), upstream)


@each_form
@pytest.mark.parametrize("name", EDGES)
@in_half
def test_edges(name, form, dtype):
    given = test_gpu.edge(name, 530, dtype)
    inputs = on_device({name: padded(x) for name, x in given.items()})
    assert_follows_the_rule(inputs, Metric(1000.0, 0.0, form))


@each_form
@pytest.mark.parametrize("arithmetic", ["tf32", *HALVES])
def test_identical_items_are_exact(form, dtype):
    given, metric = test_gpu.edge("identical items", 130, dtype), Metric(1.5, 0.25, form)
    inputs = on_device({name: padded(x) for name, x in given.items()})
    assert (pairwise(**inputs, metric=metric)[100:, :40].diagonal() == IDENTICAL[form]).all()
    itself = pairwise(inputs["sem"], inputs["unc"], metric=metric)
    assert (itself.diagonal() == IDENTICAL[form]).all()


@each_form
@pytest.mark.parametrize("arithmetic", ["tf32", *HALVES])
def test_rows_against_themselves_are_symmetric_to_the_bit(form, dtype):
    inputs = drawn(1300, None, 72, 40, dtype=dtype)
    scores = pairwise(**inputs, metric=Metric(1.5, 0.25, form))
    assert torch.equal(scores, scores.T)


@in_both_halves
def test_uncertainties_of_any_size(dtype):
    """Of lengths from 2^-4 to 2^4 in one tile."""
    inputs = drawn(140, 150, 40, 40, dtype=dtype)
    for name in ("unc", "unc2"):
        powers = torch.arange(len(inputs[name]), device=DEVICE) % 9 - 4
        inputs[name] *= (2.0**powers)[:, None].to(dtype)
    eager = pairwise(**inputs, backend="reference")
    truth = pairwise(**to_double(inputs), backend="reference")
    assert_accurate("scores", pairwise(**inputs), eager, truth, by_row=True)


@each_form
@pytest.mark.parametrize("name", ["sem", "unc", "sem2", "unc2"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@in_half
def test_nan_and_inf_come_out_where_they_went_in(value, name, form, dtype):
    inputs, metric = drawn(140, 150, 40, 24, dtype=dtype), Metric(form=form)
    before = pairwise(**inputs, metric=metric)
    inputs[name][5, 3] = value
    found = evaluate(inputs, metric, draw_upstream(inputs))
    touched = torch.zeros_like(before, dtype=torch.bool)
    touched[(slice(None), 5) if name.endswith("2") else 5] = True
    assert not found["scores"][touched].isfinite().any()
    assert torch.equal(found["scores"][~touched], before[~touched])
    for other in ("sem2", "unc2") if name.endswith("2") else ("sem", "unc"):
        gradient = found[f"grad_{other}"]
        assert torch.cat([gradient[:5], gradient[6:]]).isfinite().all(), other
    labels = {"labels": torch.zeros(140).long(), "labels2": torch.zeros(150).long()}
    of_rows = rowstats(
        **inputs, **on_device(labels), metric=metric, stats={"sum": stats.Sum(where="any")}
    )
    assert torch.equal(~of_rows["sum"].isfinite(), touched.any(1))
    if math.isnan(value):
        values, columns = nearest(**inputs, k=2, metric=metric)
        assert torch.equal(values[:, 0].isnan(), touched.any(1))
        assert (columns[touched.any(1), 0] == touched.int().argmax(1)[touched.any(1)]).all()


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0), (0, None)])
@in_float_and_half
def test_empty(n, m, dtype):
    inputs = drawn(n, m, 8, 8, dtype=dtype)
    found = evaluate(inputs, METRIC, draw_upstream(inputs))
    assert found["scores"].shape == (n, n if m is None else m)
    assert all(not x.any() for x in found.values())
    assert differentiate(operation("rowstats", n, m), inputs)["values"].shape == (2 * n,)
    if n == 0 and m != 0:
        assert [x.shape for x in nearest(**inputs, k=1)] == [(0, 1), (0, 1)]


# ----------------------------------------------------------------------------------------- promises


@each_op
@pytest.mark.parametrize("m", [2500, None], ids=["two sets", "self"])
@in_float_and_half
def test_a_hundred_repeats_give_the_same_bits(op, m, dtype):
    call, inputs = operation(op, 3000, m), drawn(3000, m, 72, 40, dtype=dtype)
    first = differentiate(call, inputs)
    for _ in range(99):
        for what, x in differentiate(call, inputs).items():
            assert torch.equal(x, first[what]), what


@each_op
@pytest.mark.parametrize("m", [900, None], ids=["two sets", "self"])
@pytest.mark.parametrize("workspace", [0, 2**20])
@in_half
def test_chunks(op, m, workspace, dtype, monkeypatch):
    call, inputs = operation(op, 1000, m), drawn(1000, m, 72, 40, dtype=dtype)
    whole = differentiate(call, inputs)
    monkeypatch.setattr(backends, "workspace", workspace)
    # The order of sums is another.
    assert_within(differentiate(call, inputs), whole, 2.0**-7)


@each_op
@in_float_and_half
def test_kernels_go_to_the_current_stream_and_nobody_waits(op, dtype):
    """It sleeps for about a second while they are launched, and then has new inputs for them."""
    call = operation(op, 700, 530)
    inputs, others = (drawn(700, 530, 72, 40, dtype=dtype, seed=seed) for seed in (1, 2))
    device, stream = torch.cuda.current_device(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # loads and allocates what is needed
            expected = differentiate(call, others)
        stream.synchronize()
        torch.cuda._sleep(2 * 10**9)
        slept = torch.cuda.Event()
        slept.record()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for name, x in others.items():
                inputs[name].copy_(x)
            found = differentiate(call, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not slept.query(), "a launch has waited for the GPU"
        assert torch.cuda.current_device() == device
        assert all(torch.equal(x, expected[what]) for what, x in found.items())


@each_op
def test_every_device_is_served_whichever_is_current(op):
    inputs = draw(140, 150, 72, 40, dtype=torch.bfloat16)
    expected = differentiate(operation(op, 140, 150), on_device(inputs))
    count = torch.cuda.device_count()
    for device in range(count):
        with torch.cuda.device(device):
            call, there = operation(op, 140, 150), on_device(inputs)
        with torch.cuda.device((device + 1) % count):
            found = differentiate(call, there)
            assert torch.cuda.current_device() == (device + 1) % count
        assert all(x.device.index == device for x in found.values())
        assert all(torch.equal(on_device(x), expected[what]) for what, x in found.items())


@each_op
@in_float_and_half
def test_a_captured_step_takes_new_inputs(op, dtype):
    call, inputs = operation(op, 700, 530), drawn(700, 530, 72, 40, dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            differentiate(call, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate(call, inputs)
    for seed in (1, 2):
        for name, x in drawn(700, 530, 72, 40, dtype=dtype, seed=seed).items():
            inputs[name].copy_(x)
        graph.replay()
        expected = differentiate(call, inputs)
        assert all(torch.equal(x, expected[what]) for what, x in captured.items())
