"""How every benchmark here is run: a case, its contestants taking turns, and what comes out.

A shared machine is slow for seconds at a time. Contestants measured one after the other would meet
different machines, so here every round calls each of them once, and a ratio is the median over the
rounds of the ratio within a round: what slows a round slows both sides of it and cancels, whereas
two medians may come from different moments.

On a GPU times are those between CUDA events, and each call finds an L2 cache without its inputs.
"""

import ctypes
import gc
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch

Call = Callable[[], tuple[torch.Tensor, ...]]  # returns every tensor it made that a user keeps
Contestants = dict[str, Call]  # "ours" and its peers, on the same inputs

MIB = 2**20
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Median:
    """What the median over several cases is held to."""

    title: str
    peer: str
    time: float  # the largest ratio ours / peer
    memory: float  # the largest ratio of what each takes beyond inputs and results


@dataclass(frozen=True)
class Choice:
    """Which of two backends should serve an operation: that of ours, or that of a peer."""

    op: str
    dtype: str
    width: int
    peer: str
    least: float  # how many times as fast as the peer ours has to be


@dataclass(frozen=True)
class Case:
    """One op at one size. A second process builds it again: `build` must be importable by name."""

    title: str
    build: Callable[..., Contestants]  # called as build(*shape, peers): ours, then the peers
    shape: tuple[int, ...]  # such as (N, M)
    peers: tuple[str, ...]
    flop: float  # of one call, in the matrix products that the definition asks for
    bars: dict[str, float] = field(default_factory=dict)  # peer: the largest ratio ours / peer
    memory_bar: float | None = None  # MiB that ours must stay under, beyond inputs and results
    rounds: int | None = None  # None: as many as the session asks for; 0: `run_once`
    median: Median | None = None  # that this case is part of
    device: str = "cpu"
    seconds_bar: float | None = None  # that ours may take
    # Where a bare matrix product is among the peers, as "product": what it counts, and the share of
    # its rate that ours must reach.
    product_flop: float | None = None
    share_bar: float | None = None
    # Of the time of as many products at that rate, or of the peer "store" if this is longer: the
    # most that ours may take.
    floor_bar: float | None = None
    choice: Choice | None = None
    # Of one call, if it trains, or reads what is trained with. Where the network alone is among the
    # peers, as "network", what is beyond its time is the loss's.
    images: int | None = None

    def flop_of(self, who: str) -> float:
        return self.product_flop if who == "product" else self.flop


@dataclass(frozen=True)
class Result:
    case: Case
    seconds: dict[str, list[float]]  # contestant: one time a round; none if it ran out of memory
    extra: dict[str, int]  # contestant: bytes beyond inputs and results; empty where not measurable

    def ratio(self, peer: str) -> float:
        """What ours takes as a fraction of what `peer` takes."""
        rounds = zip(self.seconds["ours"], self.seconds[peer], strict=True)
        return statistics.median(ours / other for ours, other in rounds)

    def memory_ratio(self, peer: str) -> float:
        """What ours takes of memory as a fraction of what `peer` takes."""
        return self.extra["ours"] / self.extra[peer]

    def share(self) -> float:
        """The rate of ours as a fraction of that of the bare product."""
        return self.case.flop / self.case.product_flop / self.ratio("product")

    def floor_ratio(self) -> float:
        """What ours takes as a fraction of what its products or its stores take, if longer."""
        share = self.case.flop / self.case.product_flop
        rounds = zip(*(self.seconds[who] for who in ("ours", "product", "store")), strict=True)
        return statistics.median(
            ours / max(product * share, store) for ours, product, store in rounds
        )

    def loss_share(self, who: str) -> float:
        """What the loss takes of a training step."""
        rounds = zip(self.seconds["network"], self.seconds[who], strict=True)
        return statistics.median(1 - network / other for network, other in rounds)

    def gain(self) -> float | None:
        """How many times as fast as the backend beside it ours is; None where that has no time."""
        choice = self.case.choice
        return 1 / self.ratio(choice.peer) if choice and self.seconds[choice.peer] else None

    def is_chosen(self) -> bool:
        gain = self.gain()
        return gain is not None and gain >= self.case.choice.least

    def verdicts(self) -> dict[str, tuple[str, bool]]:
        """Contestant: the bar that its line of the table is held to, and whether it is met."""
        held = {
            peer: (f"at most {bar:.2f}", self.ratio(peer) <= bar)
            for peer, bar in self.case.bars.items()
            if self.seconds[peer]
        }
        bars = []
        if self.case.memory_bar is not None and self.extra:
            met = self.extra["ours"] < self.case.memory_bar * MIB
            bars.append((f"under {self.case.memory_bar:.0f} MiB", met))
        if self.case.seconds_bar is not None:
            met = statistics.median(self.seconds["ours"]) < self.case.seconds_bar
            bars.append((f"under {self.case.seconds_bar:.0f} s", met))
        if bars:
            texts, met = zip(*bars, strict=True)
            held["ours"] = (", ".join(texts), all(met))
        if self.case.share_bar is not None:
            bar = self.case.share_bar
            held["product"] = (f"at least {bar:.0%}", self.share() >= bar)
        if self.case.floor_bar is not None:
            bar, ratio = self.case.floor_bar, self.floor_ratio()
            text = f"ours take {ratio:.2f} of the longer of both, at most {bar:.2f}"
            held["store"] = (text, ratio <= bar)
        return held


def run(benchmark, case: Case, rounds: int) -> Result:
    """Time the contestants in turn, then measure the memory of each."""
    if case.rounds == 0:
        return run_once(benchmark, case)
    if case.device == "cuda":
        return run_on_gpu(benchmark, case, case.rounds or rounds)
    contestants = case.build(*case.shape, case.peers)
    seconds = times(benchmark, contestants, case.rounds or rounds)
    extra = {}
    if Path("/proc/self/clear_refs").exists():  # Linux
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_process:
            extra["ours"] = fresh_process.submit(first_call_memory, case).result()
        extra |= {peer: peak_memory(contestants[peer]) for peer in case.peers}
    benchmark.extra_info.update(seconds=seconds, extra_bytes=extra)
    return Result(case, seconds, extra)


def run_once(benchmark, case: Case) -> Result:
    """Each contestant once, its memory in the same call: for what takes minutes."""
    case.build(*(64 for _ in case.shape), ())["ours"]()  # loads code, starts threads
    seconds: dict[str, list[float]] = {}
    extra: dict[str, int] = {}
    for who, call in case.build(*case.shape, case.peers).items():
        timed = partial(benchmark.pedantic, call, rounds=1) if who == "ours" else call
        start = time.perf_counter()
        if case.device == "cuda" or Path("/proc/self/clear_refs").exists():  # Linux
            extra[who] = peak_memory(timed, case.device)
        else:
            timed()
        seconds[who] = [time.perf_counter() - start]
    benchmark.extra_info.update(seconds=seconds, extra_bytes=extra)
    return Result(case, seconds, extra)


def run_on_gpu(benchmark, case: Case, rounds: int) -> Result:
    """The memory of each contestant, then their times in turn; one that has no room has no time."""
    case.build(*(64 for _ in case.shape), ())["ours"]()  # loads libraries, which keep some memory
    contestants = case.build(*case.shape, case.peers)
    extra: dict[str, int] = {}
    for who, call in contestants.items():
        try:
            if who != "ours":  # of ours the first call counts: it might keep what it allocates
                call()
            extra[who] = peak_memory(call, case.device)
        except torch.cuda.OutOfMemoryError:
            if who == "ours":
                raise
    contestants = {"ours": contestants["ours"], "ours again": contestants["ours"], **contestants}
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    order = deque(who for who in contestants if who in extra or who == "ours again")
    for _ in range(rounds):
        order.rotate()
        for who in order:
            seconds[who].append(seconds_on_gpu(contestants[who]))
    # The wall's clock, for what pytest-benchmark prints.
    benchmark.pedantic(lambda: seconds_on_gpu(contestants["ours"]), rounds=1)
    benchmark.extra_info.update(seconds=seconds, extra_bytes=extra)
    return Result(case, seconds, extra)


def seconds_on_gpu(call: Call) -> float:
    """Between two events around a call, which the host enqueues while the GPU empties its cache."""
    other_data().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    results = call()
    end.record()
    end.synchronize()
    del results
    return start.elapsed_time(end) / 1e3


@cache
def other_data() -> torch.Tensor:
    """Four times what the L2 cache holds."""
    size = 4 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def times(benchmark, contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """pytest-benchmark times ours; the others run in the `setup` that it calls before every round.

    Its own statistics, comparisons and JSON are thus those of ours.
    """
    for call in contestants.values():
        call()  # compiles, starts threads
    ours = contestants["ours"]
    # The same call twice a round: ratios of others are no more exact than the ratio of these two.
    others = {"ours again": ours, **contestants}
    del others["ours"]
    seconds: dict[str, list[float]] = {who: [] for who in others}
    order = deque(others)

    results = []  # of one call at a time, given back before the next: freeing is nobody's time

    def play_others() -> None:
        # Who runs after a big allocator finds memory that the system has at hand: all take turns.
        order.rotate()
        for who in order:
            results.clear()
            start = time.perf_counter()
            results.append(others[who]())
            seconds[who].append(time.perf_counter() - start)
        results.clear()

    benchmark.pedantic(lambda: results.append(ours()), setup=play_others, rounds=rounds)
    return {"ours": list(benchmark.stats.stats.data), **seconds}


def first_call_memory(case: Case) -> int:
    """`peak_memory` of ours where it never ran before: a workspace kept between calls counts.

    Peers are measured in a later call, since torch.compile compiles in its first.
    """
    case.build(*(64 for _ in case.shape), ())["ours"]()  # loads code, starts threads
    return peak_memory(case.build(*case.shape, ())["ours"])


def peak_memory(call: Call, device: str = "cpu") -> int:
    """Bytes in use at the peak of a call beyond those before it and those that it returns: resident
    ones, or what PyTorch has allocated of the GPU's memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)
    # Freed memory that the C library keeps would hide what is asked for anew.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident("VmRSS")
    results = call()
    return resident("VmHWM") - before - sum(t.nbytes for t in results)


def resident(what: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (most since it was reset) of this process, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].removesuffix("kB")) * 1024


def table(results: list[Result]) -> str:
    """One block a case, one line a contestant."""
    columns = ("median ms", "spread", "TFLOP/s", "extra MiB", "ours / it", "bar")
    lines = []
    for result in results:
        verdicts = result.verdicts()
        lines += ["", result.case.title]
        lines.append(line("", *columns))
        for who, seconds in result.seconds.items():
            if not seconds:
                lines.append(f"  {who:11}  out of memory")
                continue
            median = statistics.median(seconds)
            rate = result.case.flop_of(who) / median / 1e12
            bar, met = verdicts.get(who, ("", True))
            notes = [bar and f"{bar}: {'met' if met else 'MISSED'}"]
            if who == "product":
                notes.insert(0, f"ours reach {result.share():.0%} of its rate")
            if result.case.images is not None:
                notes.append(f"{result.case.images / median:.0f} images/s")
                if "network" in result.seconds and who != "network":
                    notes.append(f"the loss {result.loss_share(who):.1%}")
            if result.is_chosen() and who == result.case.choice.peer:
                notes.append(f"ours are {result.gain():.2f} times as fast: to be chosen")
            lines.append(
                line(
                    who,
                    milliseconds(median),
                    spread(seconds),
                    (f"{rate:.3f}" if rate < 100 else f"{rate:.0f}") if rate else "",
                    f"{result.extra[who] / MIB:.1f}" if who in result.extra else "",
                    f"{result.ratio(who):.2f}" if who != "ours" else "",
                    ", ".join(filter(None, notes)),
                )
            )
    return "\n".join(lines)


def summary(results: list[Result]) -> str:
    """One line a case: ours, the share of the product's rate, and what ours takes of each peer."""
    lines = []
    for result in results:
        median = statistics.median(result.seconds["ours"])
        rate = result.case.flop / median / 1e12
        cells = [f"{milliseconds(median)} ms", f"{rate:.1f} TFLOP/s"]
        if "product" in result.case.peers:
            cells.append(f"{result.share():.0%} of the product's")
        peers = [peer for peer in result.case.peers if peer != "product"]
        cells += [
            f"{result.ratio(peer):.2f} of {peer}" if result.seconds[peer] else f"{peer}: no room"
            for peer in peers
        ]
        if "ours" in result.extra:
            cells.append(f"{result.extra['ours'] / MIB:.0f} MiB")
        if result.is_chosen():
            cells.append(f"{result.gain():.2f} times as fast as {result.case.choice.peer}")
        cells += [f"MISSED: {bar}" for bar, met in result.verdicts().values() if not met]
        lines += [result.case.title, f"   {', '.join(cells)}"]
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds >= 1e-3 else f"{seconds * 1e3:.3f}"


def medians(results: list[Result]) -> dict[str, tuple[str, bool]]:
    """In words, every median over cases, and whether it meets its bars; by title."""
    found = {}
    for median in dict.fromkeys(result.case.median for result in results if result.case.median):
        cases = [result for result in results if result.case.median == median]
        ratios = {"time": (median.time, [case.ratio(median.peer) for case in cases])}
        if all(case.extra for case in cases):
            memory = [case.memory_ratio(median.peer) for case in cases]
            ratios["memory"] = (median.memory, memory)
        middle = {what: statistics.median(values) for what, (_, values) in ratios.items()}
        told = ", ".join(
            f"{what} {middle[what]:.2f} (bar {bar:.2f})" for what, (bar, _) in ratios.items()
        )
        met = all(middle[what] <= bar for what, (bar, _) in ratios.items())
        verdict = "met" if met else "MISSED"
        text = f"median over {len(cases)} {median.title}, ours to {median.peer}: {told}: {verdict}"
        found[median.title] = text, met
    return found


def choices(results: list[Result]) -> list[dict[str, str | float | bool]]:
    """Of every case that decides between backends: how many times as fast ours is, and whether that
    is enough."""
    return [
        {
            "op": result.case.choice.op,
            "dtype": result.case.choice.dtype,
            "width": result.case.choice.width,
            "case": result.case.title,
            f"{result.case.choice.peer}_to_ours": result.gain(),
            "chosen": result.is_chosen(),
        }
        for result in results
        if result.gain() is not None
    ]


def line(who: str, *cells: str) -> str:
    *numbers, bar = cells
    return f"  {who:11}{''.join(f'{number:>11}' for number in numbers)}  {bar}".rstrip()


def spread(seconds: list[float]) -> str:
    """The width of the middle half of the times, as a fraction of their median."""
    if len(seconds) < 2:
        return ""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{(high - low) / median:.0%}"


def machine(device: str) -> dict[str, str | float]:
    """What a run's numbers belong to."""
    cpu_info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else None
    processor = model[1] if model else platform.processor() or platform.machine()
    about = {
        "device": processor,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        ask = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        about = {
            "device": torch.cuda.get_device_name(),
            "driver": answer(*ask),
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "processor": processor,
        }
    return about | {
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
