"""The machine of a run: what it is, how fast it is, and whether it was the run's alone."""

import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"cpu": (4096, 512), "cuda": (8192, 8192)}  # rows and width of the product that is measured

TROUBLE = 0.10  # a rate or a frequency that falls by more is told
BUSY = 0.03  # of the processors' time, taken by others during a case: more is told
LOAD = 0.5  # of the machine before the run: more is told
PROCESSORS = Path("/sys/devices/system/cpu")
# Why a GPU runs more slowly than it could: bits of nvidia-smi's clocks_event_reasons.active.
GPU_BRAKES = {
    0x04: "its power limit",
    0x08: "a hardware slowdown",
    0x20: "its temperature",
    0x40: "its temperature (by hardware)",
    0x80: "the external power brake",
}


def about(device: str) -> dict[str, str | float]:
    """What a run's numbers belong to."""
    cpu_info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else None
    processor = model[1] if model else platform.processor() or platform.machine()
    found = {
        "device": processor,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        ask = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        found = {
            "device": torch.cuda.get_device_name(),
            "driver": answer(*ask),
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "processor": processor,
        }
    return found | {
        "torch": torch.__version__,
        "idml_fast": version("idml_fast"),
        "python": platform.python_version(),
        "commit": answer("git", "describe", "--always", "--dirty", "--exclude=*"),
    }


def answer(*command: str) -> str:
    """What a command says; "unknown" where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "unknown"


def last_cache() -> int:
    """Bytes of the largest cache that a processor has; a guess where nothing tells."""
    sizes = [path.read_text().strip() for path in PROCESSORS.glob("cpu0/cache/index*/size")]
    units = {"K": 2**10, "M": MIB}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 * MIB)


def free_memory() -> float:
    """Bytes that a process may still have; infinite where nothing tells."""
    about_memory = Path("/proc/meminfo")
    if not about_memory.exists():
        return math.inf
    free = int(re.search(r"MemAvailable:\s*(\d+) kB", about_memory.read_text())[1]) * 1024
    group = Path("/sys/fs/cgroup")  # a container may have less than its machine
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


# ----------------------------------------------------------------------------------- how fast it is


@dataclass(frozen=True)
class Pace:
    """How fast the machine is at a moment, and what has slowed it until then."""

    rates: dict[str, float]  # FLOP/s of a product in each dtype; bytes/s of a copy
    frequency: float | None = None  # of the processors, in GHz
    throttled: int = 0  # how often the processors had to cool down
    brakes: tuple[str, ...] = ()  # of a GPU that is at work

    def falls(self, last: "Pace") -> list[str]:
        """In words, what has become of the machine from here to the end of a run."""
        found = [
            f"the rate of {what} went from {told(what, rate)} to {told(what, last.rates[what])} "
            "during the run"
            for what, rate in self.rates.items()
            if abs(last.rates[what] / rate - 1) > TROUBLE
        ]
        if self.frequency and last.frequency and last.frequency < (1 - TROUBLE) * self.frequency:
            found.append(
                f"the processors' frequency fell from {self.frequency:.2f} to "
                f"{last.frequency:.2f} GHz during the run"
            )
        if last.throttled > self.throttled:
            times = last.throttled - self.throttled
            found.append(f"the processors were throttled {times} times: they were too hot")
        brakes = dict.fromkeys((*self.brakes, *last.brakes))
        return found + [f"the GPU is slowed by {brake}" for brake in brakes]


def told(what: str, rate: float) -> str:
    return f"{rate / 1e9:.0f} {'GB/s' if what == 'copy' else 'GFLOP/s'}"


def pace(device: str) -> Pace:
    frequencies = [float(x.read_text()) for x in PROCESSORS.glob("cpu*/cpufreq/scaling_cur_freq")]
    counts = PROCESSORS.glob("cpu*/thermal_throttle/*_throttle_count")
    return Pace(
        rates(device),
        sum(frequencies) / len(frequencies) / 1e6 if frequencies else None,
        sum(int(path.read_text()) for path in counts),
        gpu_brakes() if device == "cuda" else (),
    )


def rates(device: str) -> dict[str, float]:
    """FLOP/s of a matrix product in each dtype, and bytes/s of a copy that no cache can hold."""
    rows, width = SIZES[device]
    found = {}
    for name, dtype in DTYPES.items():
        x, y = torch.randn(2, rows, width, device=device).to(dtype)
        out = torch.empty(rows, rows, dtype=dtype, device=device)
        seconds = fastest(lambda x=x, y=y, out=out: torch.mm(x, y.T, out=out), device)
        found[f"{name} product"] = 2.0 * rows * rows * width / seconds
    size = min(2 * last_cache(), 256 * MIB) if device == "cpu" else 1024 * MIB
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), device)
    found["copy"] = 2.0 * source.nbytes / seconds  # each byte is read and written
    return found


def fastest(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, the fewest of five, or of as many as there are in half a second."""
    found: list[float] = []
    call()
    while len(found) < 5 and sum(found) < 0.5:
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def gpu_brakes() -> tuple[str, ...]:
    """What slows the GPU while it multiplies: about a second of products."""
    rows, width = SIZES["cuda"]
    x = torch.randn(rows, width, device="cuda").bfloat16()
    for _ in range(500):
        x @ x
    ask = "--query-gpu=clocks_event_reasons.active", "--format=csv,noheader", "--id=0"
    told = answer("nvidia-smi", *ask)
    wait("cuda")
    return brakes_in(told)


def brakes_in(told: str) -> tuple[str, ...]:
    bits = int(told, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", told) else 0
    return tuple(brake for bit, brake in GPU_BRAKES.items() if bits & bit)


# -------------------------------------------------------------------------------- who else is there


@dataclass(frozen=True)
class Moment:
    """Seconds that have gone by until now, on the clock and of all processors together."""

    clock: float
    busy: float  # with any process
    stolen: float  # by other guests of the same host
    own: float  # with this process and those that it has started

    def taken(self, later: "Moment", processors: int) -> dict[str, float]:
        """What others took of the processors from here to a later moment, if it is too much."""
        whole = (later.clock - self.clock) * processors
        stolen = (later.stolen - self.stolen) / whole
        others = (later.busy - self.busy - (later.own - self.own)) / whole
        found = {"other processes": others, "other guests of the host": stolen}
        return {who: share for who, share in found.items() if share > BUSY}


def now() -> Moment | None:
    """None where /proc does not tell."""
    account = Path("/proc/stat")
    if not account.exists():
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, soft_irq, stolen = map(
        int, account.read_text().split("\n", 1)[0].split()[1:9]
    )
    busy = user + nice + system + irq + soft_irq
    return Moment(time.perf_counter(), busy / tick, stolen / tick, own_ticks() / tick)


def own_ticks() -> int:
    """Of this process's group, to which belong the processes that it starts."""
    group, total = os.getpgrp(), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Of a process: its name in brackets, state, parent, group, ...
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == group:
            total += sum(map(int, fields[11:15]))  # user, system, and both of ended children
    return total
