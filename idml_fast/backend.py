"""Which backend serves an operation on given tensors, and why each other one does not."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch
from torch import Tensor

from . import _checks

# In order of preference. A backend serves the operations that it has a kernel for.
KERNELS: dict[str, tuple[str, ...]] = {
    "cuda": (),
    "triton": (),
    "cpu": ("pairwise", "rowstats", "paired", "nearest"),
}
BACKENDS = (*KERNELS, "reference")
# Bytes that a forward may keep for its backward, besides what it returns, so that products need not
# be taken twice; 256 MiB unless you set another number. 0 always takes them twice.
workspace = 2**28

OPERATIONS = ("pairwise", "rowstats", "paired", "nearest")

# Why no native kernel can run; None if they can. Looked up once, without importing the module:
# torch.compile traces `refusal`, and can trace neither a search nor a cached function.
NATIVE_MISSING = (
    "the native module idml_fast._C is not built; `pip install -e .` builds it"
    if importlib.util.find_spec("idml_fast._C") is None
    else None
)


def choose(op: str, tensor: Tensor, backend: str | None = None) -> str:
    """The backend that serves ``op`` on tensors like this: the first that can, or the named one.

    `reference` is never chosen by itself in place of a kernel: it must be named.

    Raises:
        ValueError: ``backend`` is no backend's name.
        RuntimeError: the named backend, or every kernel, refuses; the message gives each reason.
    """
    if backend is not None:
        _checks.one_of("backend", backend, BACKENDS)
        reason = refusal(backend, op, tensor.device.type)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot serve {op} here: {reason}")
        return backend
    reasons = refusals(op, tensor.device.type)
    for name, reason in reasons.items():
        if reason is None:
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(
        f"no kernel can serve {op} on {tensor.device.type} here ({told}); "
        "backend='reference' runs it in eager PyTorch"
    )


def refusals(op: str, device: str) -> dict[str, str | None]:
    """`refusal` of every backend that has kernels, by name, in order of preference."""
    return {name: refusal(name, op, device) for name in KERNELS}


def refusal(backend: str, op: str, device: str) -> str | None:
    """Why ``backend`` cannot serve ``op`` on tensors of this type of device; None if it can."""
    if backend == "reference":
        return None
    if op not in KERNELS[backend]:
        return "it has no kernel for this operation yet"
    if device != "cpu":
        return f"it serves tensors on the CPU, not on {device}"
    return NATIVE_MISSING


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
        "",
        f"{'backend':<12}" + "".join(f"{op:<12}" for op in OPERATIONS),
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons: list[str] = []
    for backend in BACKENDS:
        refusals = {op: refusal(backend, op, device) for op in OPERATIONS}
        row = "".join(f"{'yes' if refusals[op] is None else '-':<12}" for op in OPERATIONS)
        lines.append(f"{backend:<12}{row}".rstrip())
        for reason in dict.fromkeys(r for r in refusals.values() if r is not None):
            ops = ", ".join(op for op in OPERATIONS if refusals[op] == reason)
            reasons.append(f"  {backend}, {ops}: {reason}")
    return "\n".join([*lines, "", f"Why not (tensors on {device}):", *reasons])


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
