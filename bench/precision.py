"""The error of every operation in every precision, as docs/precision.md tells it.

    python bench/precision.py           measure, record in bench/results/precision.json, write
    python bench/precision.py --write   write docs/precision.md of what is recorded

Truth is float64 on the same rounded inputs. The CPU is measured. Triton's kernels are interpreted,
and their ways to multiply float32 emulated (`idml_fast._triton.interpreter`): nothing here needs a
GPU. What `make gpu-check` measures on one is in bench/results/gpu-errors.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

# Read when idml_fast is imported, also by the processes that measure.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from idml_fast._triton import configs, interpreter, tile
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor
from torch.nn.functional import normalize

import idml_fast
from idml_fast import _C, Metric, reference
from idml_fast import backend as backends
from idml_fast.stats import LogSumExp, Sum

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "precision.json"
OF_GPU = RECORD.with_name("gpu-errors.json")
DOCUMENT = ROOT / "docs" / "precision.md"
TEMPLATE = "precision.md.j2"

BACKENDS = {"cpu": "CPU", "triton": "Triton"}
# What a table tells apart, and what is taken together for it.
PARTS = {
    "values": ("values",),
    "gradient of sem": ("sem", "sem2"),
    "gradient of unc": ("unc", "unc2"),
}

Call = Callable[[dict[str, Tensor], str | None], Tensor]  # embeddings and a backend to values


class Way(NamedTuple):
    """A backend, a dtype, and how products are multiplied in it."""

    backend: str
    dtype: str
    mode: str  # of float32 products in Triton, else "own": the one that there is

    @property
    def how(self) -> str:
        """Where its numbers come from."""
        if self.backend == "cpu":
            return "measured"
        return "interpreted" if self.mode in ("ieee", "own") else "emulated"

    @property
    def allowed(self) -> float | None:
        """The largest multiple of eager's error: two, and as many times more as a product of this
        mode has a larger error than one of IEEE float32. None for float64, in which eager itself is
        the truth."""
        if self.dtype == "float64":
            return None
        errors = configs.PRODUCT_ERRORS
        return 2 * errors.get(self.mode, errors["ieee"]) / errors["ieee"]


WAYS = (
    *(Way("cpu", dtype, "own") for dtype in ("float64", "float32", "bfloat16", "float16")),
    *(Way("triton", "float32", mode) for mode in backends.PRECISIONS),
    *(Way("triton", dtype, "own") for dtype in ("bfloat16", "float16")),
)


class Size(NamedTuple):
    """How large a problem is."""

    rows: int
    cols: int
    sem: int  # features
    unc: int


# An interpreted program takes milliseconds.
SIZES = {"cpu": Size(64, 128, 512, 64), "triton": Size(16, 32, 512, 64)}
NEIGHBOURS = 10
# So many orders of eager's sums are a sample of its errors.
ORDERS = 4
# A weak effect of the uncertainty, so that the distance of near-duplicates shows.
WEAK = Metric(tau=1000.0)


class Distribution(NamedTuple):
    """Which embeddings are compared, and how."""

    name: str
    apart: float | None = None  # of the length: the distance between all items
    length: float = 1.0
    identical: bool = False  # whether each row has a column like it
    metric: Metric = Metric()

    def draw(self, size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
        """sem, unc, sem2 and unc2, rounded to a dtype."""
        generator = torch.Generator().manual_seed(0)

        def directions(count: int, width: int) -> Tensor:
            drawn = torch.randn(count, width, generator=generator, dtype=torch.float64)
            return self.length * normalize(drawn)

        sem, sem2 = (directions(count, size.sem) for count in size[:2])
        unc, unc2 = (directions(count, size.unc) for count in size[:2])
        if self.apart is not None:
            centre = directions(1, size.sem)
            sem, sem2 = (centre + self.apart / math.sqrt(2) * x for x in (sem, sem2))
        if self.identical:
            sem2[: size.rows] = sem
        drawn = {"sem": sem, "unc": unc, "sem2": sem2, "unc2": unc2}
        return {name: x.to(dtype) for name, x in drawn.items()}


DISTRIBUTIONS = (
    Distribution("ordinary"),
    Distribution("0.2 apart", apart=2e-1, metric=WEAK),
    Distribution("0.1 apart", apart=1e-1, metric=WEAK),
    Distribution("0.01 apart", apart=1e-2, metric=WEAK),
    Distribution("0.001 apart", apart=1e-3, metric=WEAK),
    Distribution("identical", identical=True, metric=WEAK),
    Distribution("100 long", length=100.0),
)


def labels_of(size: Size) -> dict[str, Tensor]:
    """Four classes, of which every row has the same and others."""
    return {"labels": torch.arange(size.rows) % 4, "labels2": torch.arange(size.cols) % 4}


def pairwise(size: Size, metric: Metric) -> Call:
    return lambda given, backend: idml_fast.pairwise(**given, metric=metric, backend=backend)[None]


def rowstats(size: Size, metric: Metric) -> Call:
    stats = {"lse": LogSumExp(where="different", scale=-2.0), "sum": Sum(where="same")}
    options = {**labels_of(size), "metric": metric, "stats": stats}
    return lambda given, backend: torch.stack(
        [*idml_fast.rowstats(**given, **options, backend=backend).values()]
    )


def paired(size: Size, metric: Metric) -> Call:
    rows = torch.arange(4 * size.rows) % size.rows
    cols = torch.arange(4 * size.rows) % size.cols  # identical items are among them
    options = {"index": (rows, cols), "metric": metric}
    return lambda given, backend: idml_fast.paired(**given, **options, backend=backend)[None]


def nearest(size: Size, metric: Metric) -> Call:
    """Ours comes first, and eager's and the truth are of the columns that it has found: which of
    two columns a rounding error apart is the nearer one is not an error. Its gradients are those of
    `paired`, to the bit."""
    found = []

    def call(given: dict[str, Tensor], backend: str | None) -> Tensor:
        given = {name: x.detach() for name, x in given.items()}
        if backend != "reference":
            values, columns = idml_fast.nearest(
                **given, k=NEIGHBOURS, metric=metric, backend=backend
            )
            found[:] = [columns]
            return values[None]
        return reference.pairwise(**given, metric=metric).gather(1, *found)[None]

    return call


OPERATIONS: dict[str, Callable[[Size, Metric], Call]] = {
    "pairwise": pairwise,
    "rowstats": rowstats,
    "paired": paired,
    "nearest": nearest,
}


def differentiate(call: Call, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The values, and the gradient of every embedding, in rows of what is of one scale."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    values = call(leaves, backend)
    found = {"values": values.detach().double().flatten(1)}
    if values.requires_grad:
        # Eighths: no dtype rounds them.
        upstream = (torch.arange(values.numel()).view_as(values) * 5 % 13 - 6) / 8
        gradients = torch.autograd.grad(values, [*leaves.values()], upstream.to(values.dtype))
        found |= {k: x.double().view(1, -1) for k, x in zip(leaves, gradients, strict=True)}
    return found


def eager_in_another_order(call: Call, inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """What eager finds with the features shuffled: the same sums in another order."""
    generator = torch.Generator().manual_seed(seed)
    orders = {k: torch.randperm(inputs[k].shape[1], generator=generator) for k in ("sem", "unc")}
    shuffled = {name: x[:, orders[name[:3]]] for name, x in inputs.items()}
    found = differentiate(call, shuffled, "reference")
    for name in inputs.keys() & found.keys():
        gradient = found[name].view_as(inputs[name])
        found[name] = gradient[:, orders[name[:3]].argsort()].flatten()[None]
    return found


def compare(ours: Tensor, eagers: list[Tensor], truth: Tensor, eps: float) -> dict[str, float]:
    """The largest error, as a share of the largest true number and as a multiple of eager's largest
    error; and this multiple for what the rule counts, which is what goes beyond the rounding of a
    true number that no result of its dtype can avoid."""
    error = (ours - truth).abs()
    of_eager = (torch.stack(eagers) - truth).abs().amax((0, 2))[:, None]
    counted = (error - eps / 2 * truth.abs()).clamp_min(0)
    multiples = [torch.where(x > 0, x / of_eager, 0).max().item() for x in (error, counted)]
    return {
        "relative": (error / truth.abs().amax(1, keepdim=True)).max().item(),
        "multiple": multiples[0],
        "by the rule": multiples[1],
    }


def measure(
    op: str,
    way: Way,
    size: Size | None = None,
    distributions: tuple[Distribution, ...] = DISTRIBUTIONS,
) -> dict[str, Any]:
    """A row of the record: the errors of an operation in one way, for every distribution."""
    size = size or SIZES[way.backend]
    dtype = getattr(torch, way.dtype)
    errors = {}
    with served(way):
        for distribution in distributions:
            call = OPERATIONS[op](size, distribution.metric)
            inputs = distribution.draw(size, dtype)
            ours = differentiate(call, inputs, way.backend)
            eagers = [eager_in_another_order(call, inputs, seed) for seed in range(ORDERS)]
            truth = differentiate(call, to_double(inputs), "reference")
            errors[distribution.name] = {
                what: compare(x, [e[what] for e in eagers], truth[what], torch.finfo(dtype).eps)
                for what, x in ours.items()
            }
    return {"op": op, **way._asdict(), "how": way.how, "allowed": way.allowed, "errors": errors}


def promises(way: Way, what: str, distribution: str) -> bool:
    """Whether an entry is held to the rule: not the gradients of near pairs on a GPU in float32,
    which are as exact as if the embeddings had been rounded once more."""
    near = [
        x.name for x in DISTRIBUTIONS if x.apart is not None and x.apart**2 / 2 < reference.NEAR
    ]
    of_near = what in ("sem", "sem2") and distribution in near
    return not (of_near and way.backend == "triton" and way.dtype == "float32")


def to_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in inputs.items()}


@contextmanager
def served(way: Way) -> Iterator[None]:
    """Kernels are run this way, in one thread; Triton's by the mended interpreter, in large tiles
    (which take it less time), and as in a problem of many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    large = configs.Configs(*[configs.Config(64, 64, 64, 4, 1)] * 3)
    with (
        interpreter.mended(),
        patch.object(backends, "precision", None if way.mode == "own" else way.mode),
        patch.object(configs, "TABLE", dict.fromkeys(configs.TABLE, large)),
        patch.object(tile, "FEW_TILES", 0),
    ):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def record() -> dict[str, Any]:
    """The errors of everything, and what they belong to: what the document is made of."""
    about = machine()
    jobs = [job for job in itertools.product(OPERATIONS, WAYS) if has_products(*job)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = dict(zip(jobs, pool.map(measure, *zip(*jobs, strict=True)), strict=True))
    for op, way in itertools.product(OPERATIONS, WAYS):
        if (op, way) not in rows:
            same = rows[op, way._replace(mode="ieee")]
            rows[op, way] = same | {"mode": way.mode, "allowed": way.allowed}
    return {**about, "rows": [rows[job] for job in itertools.product(OPERATIONS, WAYS)]}


def has_products(op: str, way: Way) -> bool:
    """Whether a way is another one than IEEE float32: `paired` multiplies no matrices."""
    return op != "paired" or way.how != "emulated"


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    described = "git", "describe", "--always", "--dirty", "--exclude=*"
    commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 products": "native" if _C.has_bf16() else "widened",
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit.stdout.strip() or "unknown",
    }


def render(measured: dict[str, Any], of_gpu: dict[str, Any] | None) -> str:
    """The document of a record, and of what a GPU has shown if one has."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        record=measured,
        gpu=of_gpu,
        rows={(row["op"], name_of(row)): row for row in measured["rows"]},
        beyond=beyond(measured),
        sizes=SIZES,
        weak=WEAK.tau,
        operations=list(OPERATIONS),
        modes=backends.PRECISIONS,
        distributions=[x.name for x in DISTRIBUTIONS],
        cell=cell,
        worst=worst,
        on_gpu=on_gpu,
        parts_of=parts_of,
    )


def name_of(row: dict[str, Any]) -> str:
    """The way of a row in words."""
    mode = "" if row["mode"] == "own" else f" {row['mode']}"
    return f"{BACKENDS[row['backend']]} {row['dtype']}{mode}"


def number(x: float) -> str:
    """Two digits: 2.1e-7."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def worst(row: dict[str, Any], part: str, distributions: list[str]) -> str:
    """The largest error of a part of the results."""
    return number(max(x["relative"] for name in distributions for x in errors_of(row, name, part)))


def on_gpu(measured: dict[str, Any] | None, op: str, mode: str) -> str:
    """The multiples that a GPU has shown, of values and of gradients."""
    if measured is None:
        return "not yet run"
    errors = dict(measured["errors"][op][mode])
    told = [errors.pop("values"), *([max(errors.values())] if errors else [])]
    return ", ".join(f"{x:.3g}" for x in told)


def errors_of(row: dict[str, Any], distribution: str, part: str) -> list[dict[str, float]]:
    return [x for what, x in row["errors"][distribution].items() if what in PARTS[part]]


def cell(row: dict[str, Any], distribution: str, part: str) -> str:
    """The largest errors of a part of the results, bold where they break the rule."""
    errors = errors_of(row, distribution, part)
    told = number(max(x["relative"] for x in errors))
    if row["allowed"] is None:
        return told
    multiple = max(x["multiple"] for x in errors)
    told += f" ({multiple:.1f})" if multiple < 9.95 else f" ({multiple:.0f})"
    broken = max(x["by the rule"] for x in errors) > row["allowed"]
    return f"**{told}**" if broken else told


def beyond(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What breaks the rule: of each way and operation which part, and of which distributions."""
    found = [
        {
            "way": name_of(row),
            "op": row["op"],
            "part": part,
            "distributions": [x for x in row["errors"] if cell(row, x, part).startswith("**")],
        }
        for row in measured["rows"]
        for part in parts_of(row)
    ]
    return [x for x in found if x["distributions"]]


def parts_of(row: dict[str, Any]) -> list[str]:
    """The parts of the results that a row has."""
    (errors, *_) = row["errors"].values()
    return [part for part, names in PARTS.items() if names[0] in errors]


def main() -> None:
    """Measures and writes, or only writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write what is recorded already")
    if not parser.parse_args().write:
        RECORD.write_text(json.dumps(record(), indent=1) + "\n")
    DOCUMENT.write_text(render(*recorded()))


def recorded() -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The record in the repository, and that of a GPU if there is one."""
    of_gpu = json.loads(OF_GPU.read_text()) if OF_GPU.exists() else None
    return json.loads(RECORD.read_text()), of_gpu


if __name__ == "__main__":
    main()
