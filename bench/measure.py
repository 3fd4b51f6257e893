"""What is measured around a call: its time on a GPU, its memory, its errors; and emptied caches."""

import ctypes
import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import machine
import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]  # returns every tensor it made that a user keeps

TELLS_MEMORY = Path("/proc/self/clear_refs").exists()  # Linux


@cache
def other_data(device: str) -> Tensor:
    """More than the last cache holds."""
    if device == "cuda":
        size = 4 * torch.cuda.get_device_properties().L2_cache_size
    else:
        size = min(2 * machine.last_cache(), 256 * machine.MIB)
    return torch.zeros(size, dtype=torch.uint8, device=device)


def empty_caches(device: str = "cpu") -> None:
    """A call then finds its inputs where a training step would: in memory."""
    other_data(device).bitwise_not_()


def seconds_on_gpu(call: Call) -> float:
    """Between two events around a call, which the host enqueues while the GPU empties its cache."""
    empty_caches("cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    results = call()
    end.record()
    end.synchronize()
    del results
    return start.elapsed_time(end) / 1e3


def peak_memory(call: Call, device: str = "cpu", results: list[Tensor] | None = None) -> int:
    """Bytes in use at the peak of a call beyond those before it and those that it returns: resident
    ones, or what PyTorch has allocated of the GPU's memory. What it returns goes to ``results``."""
    results = [] if results is None else results
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results += call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)
    # Freed memory that the C library keeps would hide what is asked for anew.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident("VmRSS")
    results += call()
    return resident("VmHWM") - before - sum(t.nbytes for t in results)


def resident(what: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (most since it was reset) of this process, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].removesuffix("kB")) * 1024


def error(results: list[Tensor], truth: list[Tensor]) -> float | None:
    """The largest error of any number, as a fraction of the largest number of its tensor; None if
    there is nothing to compare. A peer may keep a parameter in another shape: that is left out."""
    found = [
        (x.detach().to(y) - y).abs().max() / y.abs().max()
        for x, y in zip(results, truth, strict=False)
        if y.is_floating_point() and x.shape == y.shape and y.numel()
    ]
    return torch.stack(found).max().item() if found else None


def agreement(results: list[Tensor], truth: list[Tensor]) -> float | None:
    """Of the columns [N, k] that the truth finds in each row, the share that a search finds."""
    for x, y in zip(results, truth, strict=False):
        if not y.is_floating_point():
            return (x[:, :, None] == y[:, None]).any(1).double().mean().item()
    return None
