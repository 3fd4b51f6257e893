"""Which backend serves an operation on given tensors, and why each other one does not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import _checks

OPERATIONS = ("pairwise", "rowstats", "paired", "nearest")
# In order of preference. A backend serves the operations that it has a kernel for.
KERNELS: dict[str, tuple[str, ...]] = {
    "cuda": ("pairwise", "rowstats", "nearest"),
    "triton": OPERATIONS,
    "cpu": OPERATIONS,
}
BACKENDS = (*KERNELS, "reference")
# The types of device, as PyTorch's dispatcher names them, whose tensors a backend may serve.
DEVICES = ("CPU", "CUDA")
# Bytes that an operation may take for a while, besides what it returns: on a CPU, products that a
# forward keeps for its backward; on a GPU, tiles of weights, keys or sums on their way to the next
# kernel. 256 MiB unless you set another number. 0 is as few as can be.
workspace = 2**28
# How a GPU multiplies float32: "ieee", or by its matrix units with "tf32x3", "bf16x3" or "tf32",
# each less exact and faster than the one before. None follows PyTorch's own switch,
# `torch.set_float32_matmul_precision`: "ieee" for "highest", else "tf32". The products of the
# gradients are PyTorch's own and always follow its switch.
precision: str | None = None
PRECISIONS = ("ieee", "tf32x3", "bf16x3", "tf32")
# Whether the CUDA kernels are taken where they can serve. None takes them where they have been
# measured to be faster than Triton's, which is nowhere: they have not run on a GPU yet.
prefer_cuda: bool | None = None
# Those measurements: an operation, a dtype, and the least and the largest width of `sem`.
CUDA_IS_FASTER: tuple[tuple[str, torch.dtype, int, int], ...] = ()

# Why no native or Triton kernel can run; None if they can. Looked up once, without importing the
# modules: torch.compile traces `refusal`, and can trace neither a search nor a cached function.
NATIVE_MISSING = (
    "the native module idml_fast._C is not built; `pip install -e .` builds it"
    if importlib.util.find_spec("idml_fast._C") is None
    else None
)
GPU_MISSING = (
    "the native module idml_fast._gpu is not built; `pip install -e .` builds it where nvcc is"
    if importlib.util.find_spec("idml_fast._gpu") is None
    else None
)
TRITON_MISSING = (
    "Triton is not installed; `pip install triton` installs it, for Linux"
    if importlib.util.find_spec("triton") is None
    else None
)
# Triton's interpreter, for tests, runs its kernels on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def choose(
    op: str, tensor: Tensor, backend: str | None = None, beyond_cuda: Sequence[str] = ()
) -> str:
    """The backend that serves ``op`` on tensors like this: the first that can, or the named one.

    ``beyond_cuda`` names what the call asks for that the CUDA kernels do not have. `reference` is
    never chosen by itself in place of a kernel: it must be named.

    Raises:
        ValueError: ``backend`` is no backend's name.
        RuntimeError: the named backend, or every kernel, refuses; the message gives each reason.
    """
    if backend is not None:
        _checks.one_of("backend", backend, BACKENDS)
        reason = refusal(backend, op, tensor.device, tensor.dtype, beyond_cuda)
        if backend == "triton" and INTERPRETED and tensor.device.type == "cpu":
            reason = _refusal_of_dtype(tensor.dtype)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot serve {op} here: {reason}")
        return backend
    reasons = refusals(op, tensor.device, tensor.dtype, beyond_cuda)
    serving = [name for name, reason in reasons.items() if reason is None]
    if serving == ["cuda", "triton"] and not _prefers_cuda(op, tensor):
        return "triton"
    if serving:
        return serving[0]
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(
        f"no kernel can serve {op} on {tensor.device.type} here ({told}); "
        "backend='reference' runs it in eager PyTorch"
    )


def refusals(
    op: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    beyond_cuda: Sequence[str] = (),
) -> dict[str, str | None]:
    """`refusal` of every backend that has kernels, by name, in order of preference."""
    return {name: refusal(name, op, device, dtype, beyond_cuda) for name in KERNELS}


def refusal(
    backend: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    beyond_cuda: Sequence[str] = (),
) -> str | None:
    """Why ``backend`` cannot serve ``op`` on tensors like this; None if it can."""
    if backend == "reference":
        return None
    if op not in KERNELS[backend]:
        return "it has no kernel for this operation yet"
    if backend == "cpu":
        if device.type != "cpu":
            return f"it serves tensors on the CPU, not on {device.type}"
        return NATIVE_MISSING
    if device.type != "cuda":
        return f"it serves tensors on a GPU, not on {device.type}"
    # The CUDA kernels are launched by Triton's launchers, beside whose small kernels they run.
    reason = TRITON_MISSING or _refusal_of_dtype(dtype) or _refusal_of_gpu(device.index)
    if backend == "cuda" and reason is None:
        reason = GPU_MISSING or _refusal_by_cuda(dtype, beyond_cuda)
    return reason


def _prefers_cuda(op: str, tensor: Tensor) -> bool:
    if prefer_cuda is not None:
        return prefer_cuda
    return any(
        (op, tensor.dtype) == (of, dtype) and least <= tensor.shape[1] <= largest
        for of, dtype, least, largest in CUDA_IS_FASTER
    )


def _refusal_by_cuda(dtype: torch.dtype, beyond_cuda: Sequence[str]) -> str | None:
    if dtype == torch.float32:
        # torch.compile cannot trace a look at PyTorch's switch.
        switched = precision is None and not torch.compiler.is_compiling()
        if switched and torch.get_float32_matmul_precision() == "highest":
            return "it multiplies float32 as tf32, and torch's float32 matmul precision is highest"
        if not switched and precision != "tf32":
            return f"it multiplies float32 as tf32, and backend.precision is {precision!r}"
    return f"it does not serve {beyond_cuda[0]}" if beyond_cuda else None


def _refusal_of_dtype(dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it has no kernels for float64"
    return None


def _refusal_of_gpu(index: int | None) -> str | None:
    # torch.compile cannot trace a look at the GPU. What it compiles has mostly run before.
    if torch.compiler.is_compiling() or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    return None


def launcher(backend: str, op: str) -> ModuleType:
    """The module that launches the kernels of ``op``, beside these kernels."""
    return importlib.import_module(f"idml_fast._{backend}.{op}")


def kept(backend: str) -> int:
    """How many bytes a forward may keep for its backward. A GPU keeps none: its products take less
    time than writing them to memory and reading them back."""
    return workspace if backend == "cpu" else 0


def report() -> str:
    """What `idml-fast doctor` prints: versions, devices, and what each backend can do here."""
    from . import __version__

    lines = [
        f"idml_fast  {__version__}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads, "
        f"float32 products: {torch.get_float32_matmul_precision()}",
        f"triton     {_triton()}",
        f"GPU        {_gpu()}",
        f"_C         {_native()}",
        f"_gpu       {_native_gpu()}",
        "",
        f"{'backend':<12}" + "".join(f"{op:<12}" for op in OPERATIONS),
    ]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    reasons: list[str] = []
    for backend in BACKENDS:
        refusals = {op: refusal(backend, op, device) for op in OPERATIONS}
        row = "".join(f"{'yes' if refusals[op] is None else '-':<12}" for op in OPERATIONS)
        lines.append(f"{backend:<12}{row}".rstrip())
        for reason in dict.fromkeys(r for r in refusals.values() if r is not None):
            ops = ", ".join(op for op in OPERATIONS if refusals[op] == reason)
            reasons.append(f"  {backend}, {ops}: {reason}")
    return "\n".join([*lines, "", f"Why not (tensors on {device.type}):", *reasons])


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    from importlib.metadata import version

    return version("triton")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _native() -> str:
    if NATIVE_MISSING is not None:
        return f"missing: {NATIVE_MISSING}"
    from . import _C

    lowered = os.environ.get("IDML_FAST_CPU_ISA")
    told = [f"vectors: {_C.isa()}" + (f" (IDML_FAST_CPU_ISA={lowered})" if lowered else "")]
    told.append("threads: OpenMP" if _C.has_threads() else "threads: one (built without OpenMP)")
    return ", ".join(told)


def _native_gpu() -> str:
    if GPU_MISSING is not None:
        return f"missing: {GPU_MISSING}"
    from . import _gpu

    # "90a" is compute capability 9.0a.
    capabilities = (re.sub(r"(\d[a-z]?)$", r".\1", name) for name in _gpu.ARCHITECTURES)
    return f"compiled for compute capability {', '.join(capabilities)}"
