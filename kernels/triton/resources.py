"""What the kernels take of a GPU: registers, spills, shared memory, matrix instructions.

    python -m idml_fast._triton.resources [--architectures 80 90] [--kinds half ieee] [--widths 512]

compiles every configuration of the table ahead of time, on a machine with or without a GPU. The
launchers run on tensors without memory, and what they would launch is compiled instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from idml_fast import backend, stats
from idml_fast.rowstats import describe

from . import configs, nearest, paired, pairwise, rowstats

# Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# The machine's instruction for a matrix product, as disassembled.
MATRIX_INSTRUCTIONS = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA"}
ITEMS = 1 << 14
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
ALIGNED = [["tt.divisibility", 16]]
# Multi-Similarity's.
STATISTICS = [
    stats.LogSumExp(where="same", scale=-2.0, shift=0.5),
    stats.LogSumExp(where="different", scale=50.0, shift=0.5),
]


class Kernel(NamedTuple):
    """A kernel as it would be launched."""

    function: JITFunction
    arguments: tuple[Any, ...]
    warps: int
    stages: int


class Row(NamedTuple):
    """A line of the table."""

    architecture: int
    kind: str  # of the products
    width: int  # of both embeddings
    case: str  # which launcher, and of what
    kernel: str
    registers: int
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes
    matrix_instructions: int


def table(
    architectures: Iterable[int],
    kinds: Iterable[str],
    widths: Iterable[int],
    cases: Iterable[str],
    kernels: Iterable[str] | None = None,
) -> Iterator[Row]:
    """Compiles everything, or kernels of some names, on all cores, and yields a line a kernel."""
    jobs = itertools.product(architectures, kinds, widths, cases, [kernels])
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for rows in pool.map(_rows, *zip(*jobs, strict=True)):
            yield from rows


def _rows(
    architecture: int, kind: str, width: int, case: str, kernels: Iterable[str] | None
) -> list[Row]:
    return [
        Row(architecture, kind, width, case, *measure(kernel, architecture))
        for kernel in launched(CASES[case], kind, width, architecture)
        if kernels is None or name_of(kernel) in kernels
    ]


def launched(
    call: Callable[[torch.dtype, int], Any], kind: str, width: int, architecture: int
) -> list[Kernel]:
    """The kernels that a call launches on tensors without memory, each once."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    with recording(architecture, None if kind == "half" else kind) as kernels:
        call(dtype, width)
    return list({key_of(kernel): kernel for kernel in kernels}.values())


@contextmanager
def recording(architecture: int, precision: str | None) -> Iterator[list[Kernel]]:
    """While it is on, launches are listed, not done, as if on a GPU of this architecture."""
    kernels: list[Kernel] = []

    def record(function: JITFunction, *arguments: Any, **options: Any) -> None:
        kernels.append(Kernel(function, arguments, options["num_warps"], options["num_stages"]))

    before = JITFunction.run, configs.architecture_of, backend.precision
    JITFunction.run = record
    configs.architecture_of = lambda device: architecture
    backend.precision = precision
    try:
        yield kernels
    finally:
        JITFunction.run, configs.architecture_of, backend.precision = before


def key_of(kernel: Kernel) -> str:
    """What a kernel is compiled for."""
    return repr((kernel.function.__name__, *signature_of(kernel), kernel.warps, kernel.stages))


def signature_of(kernel: Kernel) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """The types of a kernel's arguments, its constants, and what is known of the others."""
    constants: dict[Any, Any] = {}
    known: dict[Any, Any] = {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, Tensor):
            known[path] = ALIGNED
            return "*" + TYPES[value.dtype]
        if isinstance(value, tuple):
            return tuple(type_of(x, (*path, i)) for i, x in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            known[path] = ALIGNED
        return "i32" if abs(value) < 2**31 else "i64"

    types = {}
    parameters = zip(kernel.function.params, kernel.arguments, strict=True)
    for i, (parameter, value) in enumerate(parameters):
        if parameter.is_constexpr:
            constants[(i,)] = value
        types[parameter.name] = "constexpr" if parameter.is_constexpr else type_of(value, (i,))
    return types, constants, known


def measure(kernel: Kernel, architecture: int) -> tuple[str, int, int, int, int]:
    """Compiles a kernel: its name, registers, spilled bytes, shared memory, matrix instructions."""
    source = ASTSource(kernel.function, *signature_of(kernel))
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([tool, option, binary], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        )
    told = usage.stdout + usage.stderr
    registers, stack = (int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK"))
    pattern = rf"\b{MATRIX_INSTRUCTIONS[architecture]}\b"
    instructions = len(re.findall(pattern, code.stdout))
    return name_of(kernel), registers, stack, compiled.metadata.shared, instructions


def name_of(kernel: Kernel) -> str:
    """The kernel's name; of a walk what becomes of its near pairs too."""
    names = [parameter.name for parameter in kernel.function.params]
    arguments = dict(zip(names, kernel.arguments, strict=True))
    near = f" {arguments['NEAR']}" if "NEAR" in arguments else ""
    return kernel.function.__name__ + near


def _inputs(dtype: torch.dtype, width: int, two_sets: bool, form: str) -> tuple[Any, ...]:
    """Operands without memory."""
    sem, unc, sem2, unc2 = (torch.empty(ITEMS, width, dtype=dtype, device="meta") for _ in range(4))
    second = (sem2, unc2) if two_sets else (None, None)
    return sem, unc, *second, 5.0, 0.5, None, form


def _wanted(operands: tuple[Any, ...]) -> list[bool]:
    return [*(x is not None for x in operands[:4]), False]


def _pairwise(dtype: torch.dtype, *arguments: Any) -> None:
    operands = _inputs(dtype, *arguments)
    scores = pairwise.forward(*operands)
    pairwise.backward(scores, None, *operands, wanted=_wanted(operands))


def _rowstats(dtype: torch.dtype, *arguments: Any) -> None:
    operands = _inputs(dtype, *arguments)
    labels = torch.empty(len(operands[0]), dtype=torch.int64, device="meta")
    described, _ = describe(STATISTICS, operands[0])
    items = labels, None if operands[2] is None else labels, *described
    values, _, state, kept = rowstats.forward(*operands, *items, 0)
    rowstats.backward(values, state, kept, *operands, *items, wanted=_wanted(operands))


def _nearest(dtype: torch.dtype, *arguments: Any) -> None:
    options = None, None, "any", False, False, None, [], None, 100, 0, None, None, None
    nearest.forward(*_inputs(dtype, *arguments), *options)


def _paired(dtype: torch.dtype, *arguments: Any) -> None:
    operands = _inputs(dtype, *arguments)
    index = torch.empty(2, ITEMS, dtype=torch.int64, device="meta")
    scores = paired.forward(*operands, *index)
    paired.backward(scores, *operands, *index, wanted=_wanted(operands))


CASES: dict[str, Callable[[torch.dtype, int], None]] = {
    f"{call.__name__[1:]}, {'two sets' if two_sets else 'self'}, {form}": (
        lambda dtype, width, call=call, two_sets=two_sets, form=form: call(
            dtype, width, two_sets, form
        )
    )
    for call in (_pairwise, _rowstats, _nearest, _paired)
    for two_sets in (True, False)
    for form in ("distance", "cosine")
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=configs.ARCHITECTURES)
    parser.add_argument("--kinds", nargs="+", choices=configs.KINDS, default=configs.KINDS)
    parser.add_argument("--widths", type=int, nargs="+", default=configs.WIDTHS)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--kernels", nargs="+", help="names as in the table; without it all")
    parser.add_argument("--json", action="store_true", help="a line a kernel, as JSON")
    chosen = parser.parse_args()
    titles = Row._fields
    layout = "{:>12}  {:8}  {:>5}  {:28}  {:16}" + "  {:>9}" * 4
    if not chosen.json:
        print(layout.format(*(title.replace("_", " ") for title in titles)))
    chosen_rows = chosen.architectures, chosen.kinds, chosen.widths, chosen.cases, chosen.kernels
    for row in table(*chosen_rows):
        print(json.dumps(row._asdict()) if chosen.json else layout.format(*row), flush=True)


if __name__ == "__main__":
    main()
