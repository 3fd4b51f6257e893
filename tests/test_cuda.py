"""The CUDA kernels, run on the CPU by the emulation in tests/cuda, as on Ampere and on Hopper."""

from __future__ import annotations

import fcntl
import importlib.util
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch
from conftest import FORMS, ROOT, draw, draw_upstream, evaluate, to_double
from conftest import assert_accurate as assert_accurate_number
from test_nearest import PLAIN, assert_same, draw_labels, on_a_grid
from test_rowstats import assert_follows_the_rule, in_turn, problem
from test_triton import with_near_pairs
from test_triton_rowstats import assert_reduces_its_scores

import idml_fast
from idml_fast import Metric, backend, nearest, pairwise, rowstats, stats
from idml_fast.rowstats import MOST_FOR_CUDA

FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)
two_sets_and_self = pytest.mark.parametrize("m", [150, None], ids=["two sets", "self"])
each_form = pytest.mark.parametrize("form", FORMS)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module `_gpu`, compiled for the emulation once for all of pytest's processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "emulated"
    folder.mkdir(exist_ok=True)
    path = folder / f"_gpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            compile_emulation(folder, path)
    # By another name than that of the module for GPUs, which may have been imported.
    spec = importlib.util.spec_from_file_location("emulated._gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_emulation(folder: Path, path: Path) -> None:
    """Every source of the module, each in a process of its own."""
    sources = [*(ROOT / "kernels/cuda").glob("*.cu"), ROOT / "kernels/cuda/bindings.cpp"]
    folders = ROOT / "csrc", ROOT / "kernels/cuda", ROOT / "tests/cuda"
    paths = *folders, pybind11.get_include(), sysconfig.get_path("include")
    flags = [
        *("-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Wno-clobbered", "-Wno-unknown-pragmas"),
        "-U_FORTIFY_SOURCE",  # fibers jump from stack to stack, which a checked longjmp refuses
        *("-DIDML_FAST_HOPPER", '-DIDML_FAST_CUDA_ARCHS="emulated"'),
        *(f"-I{x}" for x in paths),
    ]
    compiler = os.environ.get("CXX", "c++")
    objects = [folder / f"{source.stem}.o" for source in sources]
    compiling = [
        subprocess.Popen([compiler, *flags, "-x", "c++", "-c", source, "-o", made])
        for source, made in zip(sources, objects, strict=True)
    ]
    assert [process.wait() for process in compiling] == [0] * len(compiling)
    subprocess.run([compiler, "-shared", *objects, "-o", path], check=True)


@pytest.fixture(params=["80", "90"], ids=["Ampere", "Hopper"])
def gpu(request, native, monkeypatch, interpreter):
    """The backend `cuda` serves tensors on the CPU, as such a GPU would."""
    monkeypatch.setenv("IDML_FAST_EMULATED", request.param)
    monkeypatch.setitem(sys.modules, "idml_fast._gpu", native)
    monkeypatch.setattr(idml_fast, "_gpu", native, raising=False)
    for name in [name for name in sys.modules if name.startswith("idml_fast._cuda")]:
        monkeypatch.delitem(sys.modules, name)
    refusal = backend.refusal

    def emulated(name, op, device, *others):
        on = torch.device("cuda", 0) if name == "cuda" else device
        return refusal(name, op, on, *others)

    monkeypatch.setattr(backend, "refusal", emulated)
    monkeypatch.setattr(backend, "_refusal_of_gpu", lambda index: None)
    monkeypatch.setattr(backend, "GPU_MISSING", None)
    monkeypatch.setattr(backend, "precision", "tf32")
    return request.param


def assert_accurate(inputs, metric, dtype, bound=None) -> None:
    """The accuracy rule, for scores and gradients; or a bound on the error, as a share of the
    largest number."""
    upstream = draw_upstream(inputs)
    ours = evaluate(inputs, metric, upstream, "cuda")
    eager = evaluate(inputs, metric, upstream, "reference")
    truth = evaluate(to_double(inputs), metric, upstream.double(), "reference")
    assert ours.keys() == truth.keys()
    for what, x in ours.items():
        if bound is None:
            by_row = what == "scores"
            assert_accurate_number(what, x, eager[what], truth[what], by_row=by_row)
        else:
            error = (x.double() - truth[what]).abs().max() / truth[what].abs().max()
            assert error <= bound, what


@each_half
@each_form
@two_sets_and_self
def test_accuracy(gpu, m, form, dtype):
    """Ragged tiles; more steps than stages; a last step that is not full."""
    inputs = draw(200, m, 200, 40, dtype=dtype)
    assert_accurate(inputs, Metric(1.5, 0.25, form), dtype)


@each_form
@two_sets_and_self
def test_float32_is_multiplied_as_tf32(gpu, m, form):
    inputs = draw(150, m, 72, 40, dtype=FLOAT)
    assert_accurate(inputs, Metric(1.5, 0.25, form), FLOAT, bound=2.0**-10)


@pytest.mark.parametrize(
    ("n", "m", "ds", "du"),
    [(1, 1, 8, 8), (129, 3, 64, 64), (3, 300, 8, 264), (128, 128, 128, 8), (300, None, 8, 8)],
)
def test_shapes(gpu, n, m, ds, du):
    assert_accurate(draw(n, m, ds, du, dtype=torch.bfloat16), Metric(), torch.bfloat16)


def test_widths_need_not_be_whole(gpu):
    """Only rows have to begin at multiples of 16 bytes: what lies between is not read."""
    wide = draw(140, 130, 24, 16, dtype=torch.bfloat16)
    inputs = {}
    for name, x in wide.items():
        x[:, -3:] = math.nan
        inputs[name] = x[:, :-3]
    scores = pairwise(**inputs, backend="cuda")
    # In float64: a product of bfloat16 on a CPU reads beyond an odd width itself, where it has AMX.
    expected = pairwise(**to_double(inputs), backend="reference")
    torch.testing.assert_close(scores.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
def test_zero_is_an_uncertainty_of_zeros(gpu, certain):
    inputs = draw(140, 150, 72, 40, dtype=torch.float16)
    inputs |= dict.fromkeys(certain, "zero")
    assert_accurate(inputs, Metric(), torch.float16)


@each_form
@two_sets_and_self
def test_pairs_whose_products_cancel_are_taken_again(gpu, m, form):
    inputs, _ = with_near_pairs(draw(140, m, 72, 40, dtype=torch.bfloat16))
    assert_accurate(inputs, Metric(1.5, 0.25, form), torch.bfloat16)


@each_half
def test_uncertainties_of_any_size(gpu, dtype):
    """Of lengths from 2^-4 to 2^4 in one tile."""
    inputs = draw(140, 150, 40, 40, dtype=dtype)
    for name in ("unc", "unc2"):
        sizes = torch.arange(len(inputs[name])) % 9 - 4
        inputs[name] *= (2.0**sizes)[:, None].to(dtype)
    ours = pairwise(**inputs, backend="cuda")
    eager = pairwise(**inputs, backend="reference")
    truth = pairwise(**to_double(inputs), backend="reference")
    assert_accurate_number("scores", ours, eager, truth, by_row=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sem", math.nan), ("unc", math.inf), ("sem2", math.inf), ("unc2", math.nan)],
)
def test_nan_and_inf_come_out_where_they_went_in(gpu, name, value):
    inputs = draw(140, 150, 40, 24, dtype=torch.bfloat16)
    before = pairwise(**inputs, backend="cuda")
    inputs[name] = inputs[name].clone()
    inputs[name][5, 3] = value
    scores = pairwise(**inputs, backend="cuda")
    touched = torch.zeros_like(scores, dtype=torch.bool)
    touched[(slice(None), 5) if name.endswith("2") else 5] = True
    assert not scores[touched].isfinite().any()
    assert torch.equal(scores[~touched], before[~touched])


def test_rows_against_themselves_are_symmetric_to_the_bit(gpu):
    scores = pairwise(*(torch.randn(300, 64).bfloat16() for _ in range(2)), backend="cuda")
    assert torch.equal(scores, scores.T)
    assert not scores.diagonal().any()


def test_the_same_input_gives_the_same_bits(gpu):
    inputs, metric = draw(200, None, 72, 40, dtype=torch.bfloat16), Metric()
    upstream = draw_upstream(inputs)
    first, second = (evaluate(inputs, metric, upstream, "cuda") for _ in range(2))
    assert all(torch.equal(x, second[what]) for what, x in first.items())


@pytest.mark.parametrize("strides", ["expanded", "transposed", "every other"])
def test_upstream_gradients_of_any_strides(gpu, strides):
    inputs, metric = draw(140, 150, 40, 24, dtype=torch.bfloat16), Metric()
    wide = torch.randn(300, 300).bfloat16()
    upstream = {
        "expanded": wide[0, 0].expand(140, 150),
        "transposed": wide[:150, :140].T,
        "every other": wide[:280:2, ::2],
    }[strides]
    ours = evaluate(inputs, metric, upstream, "cuda")
    expected = evaluate(inputs, metric, upstream.contiguous(), "cuda")
    assert all(torch.equal(x, expected[what]) for what, x in ours.items())


@pytest.mark.parametrize(("m", "power"), [(150, 1.0), (None, 2.0), (150, 0.5)])
def test_every_statistic(gpu, m, power):
    """Each with its windows and thresholds, of the scores that the kernels themselves compute."""
    given, metric = problem(140, m, 8, 8, dtype=FLOAT), Metric(1.5, 0.25)
    every = in_turn(given.scores(metric), power, int(2 * power) + (m is None))
    every = {k: x for k, x in every.items() if not isinstance(x, stats.Histogram)}
    for k in range(0, len(every), 4):
        some = dict(list(every.items())[k : k + 4])
        assert_reduces_its_scores(given, some, metric, "cuda")


@each_form
@two_sets_and_self
def test_statistics_of_every_form(gpu, m, form):
    given, metric = problem(140, m, 40, 24, dtype=torch.float16), Metric(1.5, 0.25, form)
    some = {
        "lse": stats.LogSumExp(where="different", scale=-2.0),
        "sum": stats.Sum(where="same"),
        "max": stats.Max(where="same"),
        "hinge": stats.HingeSum(where="different", scale=-1.0, threshold=1.0),
    }
    assert_follows_the_rule(given, some, metric, backend="cuda", apart=False)


@pytest.mark.parametrize(
    ("m", "where", "above"), [(150, "same", 2.0), (150, "any", None), (None, "different", None)]
)
def test_nearest(gpu, m, where, above):
    """On a grid, where scores tie, the reference is met in every column."""
    inputs = on_a_grid(140, m, dtype=torch.float16)
    inputs = {k: None if x is None else padded(x) for k, x in inputs.items()}
    above = None if above is None else torch.full((140,), above)
    options = dict(k=3, where=where, **draw_labels(140, m), above=above, exclude_self=m is None)
    found = nearest(**inputs, **options, metric=PLAIN, backend="cuda")
    assert_same(found, nearest(**inputs, **options, metric=PLAIN, backend="reference"))


def test_the_gradient_of_nearest(gpu):
    inputs = draw(140, 150, 40, 24, dtype=FLOAT)
    sem = inputs["sem"].requires_grad_()
    values, _ = nearest(**inputs, k=3, backend="cuda")
    values.sum().backward()
    assert sem.grad.abs().sum(1).min() > 0


def padded(x):
    """The same with rows at multiples of 16 bytes."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 8))


def test_what_it_does_not_serve_is_said(gpu):
    assert idml_fast._gpu.MOST_STATISTICS == MOST_FOR_CUDA == 4
    sem, unc = torch.randn(4, 8), torch.randn(4, 8)
    labels = torch.tensor([0, 0, 1, 1])
    calls = {
        "a tau or gamma that is a tensor": lambda: pairwise(
            sem, unc, metric=Metric(tau=torch.tensor(1.0)), backend="cuda"
        ),
        "unc whose rows do not begin at multiples of 16 bytes": lambda: pairwise(
            sem, unc[:, :6].contiguous(), backend="cuda"
        ),
        "sem whose rows overlap": lambda: pairwise(sem[:1].expand(4, 8), unc, backend="cuda"),
        "a histogram": lambda: rowstats(
            sem,
            unc,
            labels=labels,
            stats={"all": stats.Histogram(where="any", low=0.0, high=4.0, bins=4)},
            backend="cuda",
        ),
        "more than 4 statistics": lambda: rowstats(
            sem,
            unc,
            labels=labels,
            stats={str(k): stats.Count(where="any", above=float(k)) for k in range(5)},
            backend="cuda",
        ),
        "draws": lambda: nearest(
            sem, unc, k=1, sample=idml_fast.DistanceWeighted(), backend="cuda"
        ),
        "columns in blocks": lambda: nearest(sem, unc, [sem], k=1, unc2="zero", backend="cuda"),
    }
    for asked, call in calls.items():
        with pytest.raises(RuntimeError, match=f"it does not serve {asked}$"):
            call()
    with pytest.raises(RuntimeError, match="no kernels for float64"):
        pairwise(sem.double(), unc.double(), backend="cuda")


def test_an_error_names_the_kernel_and_its_shape(gpu):
    memory = torch.zeros(1 + 4 * 8)
    sem = torch.from_numpy(memory.numpy()[1:].reshape(4, 8))  # PyTorch knows of no offset
    if sem.data_ptr() % 16 == 0:
        pytest.fail("the memory of this test should not be aligned")
    told = "the CUDA kernel pairwise of 4 x 4 pairs: embeddings must begin at multiples of 16 bytes"
    with pytest.raises(RuntimeError, match=f"^{told}$"):
        pairwise(sem, sem, backend="cuda")
