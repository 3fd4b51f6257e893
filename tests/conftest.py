"""What the tests share: inputs, the accuracy rule, the golden files, small tiles."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import any_torchvision
import numpy as np
import pytest
import torch
from torch import Tensor

# No test fetches weights, nor waits until they cannot be had.
os.environ["HF_HUB_OFFLINE"] = "1"

# Triton's interpreter runs its kernels on the CPU. It is for the whole process, since idml_fast
# reads this when it is imported, and Triton when it meets a kernel. Where there is a GPU the
# kernels are compiled for it: tests/test_gpu*.py are theirs there.
if torch.cuda.is_available():
    collect_ignore_glob = ["test_triton*.py", "test_cuda.py", "test_precision.py"]
else:
    os.environ["TRITON_INTERPRET"] = "1"

from idml_fast._cpu import tile

import idml_fast
from idml_fast import Metric

any_torchvision.define_missing_operators()

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = "sem", "unc", "sem2", "unc2"
FORMS = "distance", "cosine", "official"
# What float64 must agree to with a result of float64 or better, absolutely and relatively.
DOUBLE = 1e-10

Inputs = dict[str, Tensor | str | None]  # sem, unc, sem2, unc2 by name; "zero" for certain items


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--measured",
        type=Path,
        metavar="FOLDER",
        help="write what tests/test_gpu.py measures into this folder, as JSON",
    )


@pytest.fixture(scope="session")
def interpreter() -> Iterator[None]:
    """Triton's interpreter rounds as a GPU does."""
    from idml_fast._triton.interpreter import mended

    with mended():
        yield


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What the benchmarks measure with."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("race")


def draw(
    n: int,
    m: int | None,  # None: the rows against themselves
    ds: int,
    du: int,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 1.0,
) -> Inputs:
    """Normally distributed embeddings."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"sem": (n, ds), "unc": (n, du)}
    if m is not None:
        shapes |= {"sem2": (m, ds), "unc2": (m, du)}
    drawn: Inputs = dict.fromkeys(NAMES)
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn[name] = (scale * x).to(dtype)
    return drawn


def draw_upstream(inputs: Inputs, seed: int = 1) -> Tensor:  # [N, M]
    """A normally distributed upstream gradient for the scores of these embeddings."""
    cols = inputs["sem"] if inputs["sem2"] is None else inputs["sem2"]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(inputs["sem"]), len(cols), generator=generator, dtype=torch.float64)
    return drawn.to(cols)


def evaluate(
    inputs: Inputs,
    metric: Metric,
    upstream: Tensor | None = None,  # [N, M]; None: no gradients
    backend: str | None = None,
) -> dict[str, Tensor]:
    """The scores, and the gradient of every input, and of every tensor in the metric, under
    ``grad_<name>``."""
    given = inputs | {"tau": metric.tau, "gamma": metric.gamma}
    leaves = {
        k: x.detach().requires_grad_() if isinstance(x, Tensor) else x for k, x in given.items()
    }
    metric = dataclasses.replace(metric, tau=leaves["tau"], gamma=leaves["gamma"])
    embeddings = {k: leaves[k] for k in inputs}
    scores = idml_fast.pairwise(**embeddings, metric=metric, backend=backend)
    found = {"scores": scores.detach()}
    if upstream is not None:
        given = [k for k, x in leaves.items() if isinstance(x, Tensor)]
        gradients = torch.autograd.grad(
            scores, [leaves[k] for k in given], upstream.to(scores.dtype), allow_unused=True
        )
        found |= {f"grad_{k}": g for k, g in zip(given, gradients, strict=True) if g is not None}
    return found


@contextmanager
def in_eager_pytorch() -> Iterator[None]:
    """The reference serves every operation, also those that a loss calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idml_fast.backend, "choose", lambda *_: "reference")
        yield


def to_double(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    return {k: x.double() if isinstance(x, Tensor) else x for k, x in inputs.items()}


def assert_accurate(
    what: str,
    ours: Tensor,
    eager: Tensor,
    truth: Tensor | np.ndarray,
    *,
    by_row: bool = False,
) -> None:
    """The accuracy rule: our error is at most twice the error of the eager formula.

    ``eager`` is the formula of `idml_fast.reference` in the dtype of ours, ``truth`` the same in
    float64 or better on the same (rounded) inputs. A single rounding error is random, sometimes
    zero, so every element of ours is held to twice the *largest* error that eager makes in a sample
    of like elements, plus one unit roundoff of the true value, which no result in this dtype can
    avoid:

    * ``by_row=True``, for scores: the sample is the element's row.
    * ``by_row=False``, for gradients and losses: the sample is the whole tensor. The elements of a
      gradient's row share the errors of that row's weights, so they rise and fall together and are
      one draw, not many. The embeddings of a test have one scale, so that its rows are alike.
    """
    assert ours.dtype == eager.dtype
    assert ours.shape == eager.shape == truth.shape
    if ours.numel() == 0:
        return
    roundoff = torch.finfo(ours.dtype).eps / 2
    ours, eager, truth = (np.atleast_1d(_wide(x)) for x in (ours, eager, truth))
    assert np.isfinite(truth).all(), f"{what}: the truth is not finite, the test cannot judge"
    eager_error = np.abs(eager - truth)
    sample = eager_error.max(axis=-1, keepdims=True) if by_row else eager_error.max()
    assert np.isfinite(sample).all(), f"{what}: eager is not finite, the test cannot judge"
    bound = 2 * sample + roundoff * np.abs(truth)
    error = np.abs(ours - truth)
    excess = np.where(np.isnan(error), np.inf, error) - bound
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, (
        f"{what} at {[int(i) for i in worst]}: got {ours[worst]}, the truth is {truth[worst]}; "
        f"error {error[worst]:.3g}, bound {bound[worst]:.3g}, eager has {eager[worst]}"
    )


def assert_follows_the_rule(inputs: Inputs, metric: Metric, upstream: Tensor | None = None) -> None:
    """`assert_accurate` of the scores and all gradients that the default backend computes."""
    upstream = draw_upstream(inputs) if upstream is None else upstream
    ours = evaluate(inputs, metric, upstream)
    eager = evaluate(inputs, metric, upstream, "reference")
    truth = evaluate(to_double(inputs), metric, upstream.double(), "reference")
    assert ours.keys() == eager.keys() == truth.keys()
    for what, x in ours.items():
        assert_accurate(what, x, eager[what], truth[what], by_row=what == "scores")


def assert_equals_in_double(what: str, ours: Tensor, truth: Tensor | np.ndarray) -> None:
    """A float64 result agrees with one of float64 or better to 1e-10."""
    assert ours.dtype == torch.float64
    assert ours.shape == truth.shape
    if ours.numel() == 0:
        return
    ours, truth = (np.atleast_1d(_wide(x)) for x in (ours, truth))
    error = np.abs(ours - truth) / np.maximum(1, np.abs(truth))
    error = np.where(np.isnan(error), np.inf, error)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= DOUBLE, (
        f"{what} at {[int(i) for i in worst]}: got {ours[worst]}, the truth is {truth[worst]}"
    )


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parameters and the arrays of a golden file; an absent array is left out."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != "meta"}
        return json.loads(str(file["meta"])), {k: x for k, x in arrays.items() if x.shape != (0,)}


def golden_names(pattern: str) -> list[str]:
    """The golden files whose name matches."""
    names = sorted(path.stem for path in GOLDEN.glob(f"{pattern}.npz"))
    assert names, f"no golden file is called {pattern}"
    return names


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a small problem has many, most of them ragged."""
    monkeypatch.setattr(tile, "TILE", (20, 7))  # beyond one block of 16 rows
    monkeypatch.setattr(tile, "SELF_TILE", (18, 18))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test on one and on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _wide(x: Tensor | np.ndarray) -> np.ndarray:
    """In numpy's widest floating type."""
    if isinstance(x, Tensor):
        x = x.detach().double().cpu().numpy()
    return x.astype(np.longdouble)
