"""How every benchmark here is run: a case, its contestants taking turns, and what comes out.

A shared machine is slow for seconds at a time. Contestants measured one after the other would meet
different machines, so here every round calls each of them once, and a ratio is the median over the
rounds of the ratio within a round: what slows a round slows both sides of it and cancels, whereas
two medians may come from different moments.

No call finds its inputs in a cache, and the first call of each is not timed. On a GPU times are
those between CUDA events.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext

import machine
import rivals
import torch
from machine import MIB
from measure import TELLS_MEMORY, Call, agreement, empty_caches, error, peak_memory, seconds_on_gpu
from torch import Tensor

Contestants = dict[str, Call]  # "ours" and its peers, on the same inputs

SLOW = 1.0  # seconds of a call that fills the caches itself, many times
CHEAP = 60.0  # seconds that ours may take where each is called once, to be called once more


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
    bytes: float = 0.0  # that one call has to move, where this is what bounds it and not `flop`
    dtype: str = "fp32"  # whose products' rate is the machine's
    op: str = ""  # the stem of its file
    # What the case takes, for `budget`: pairs of which a peer may keep a matrix, bytes of inputs
    # and results, and the peers whose cost is not that of `rivals.COSTS`.
    pairs: float = 0.0
    held: float = 0.0
    costs: dict[str, rivals.Cost] = field(default_factory=dict)
    # The shape, this one's or that of a part, at which results are compared with those of the
    # contestant "truth", which is float64; None: they are not compared.
    truth: tuple[int, ...] | None = None
    compared: Callable[[Tensor], Tensor] | None = None  # what of a result is compared: such as mean
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

    def count_of(self, who: str) -> float:
        """What a contestant's rate counts: operations, or bytes."""
        return self.product_flop if who == "product" else self.bytes or self.flop

    def is_judged_whole(self) -> bool:
        return self.truth == self.shape

    def part(self, result: Tensor) -> Tensor:
        return self.compared(result) if self.compared else result


@dataclass(frozen=True)
class Result:
    case: Case
    seconds: dict[str, list[float]]  # contestant: one time a round; none if it ran out of memory
    extra: dict[str, int]  # contestant: bytes beyond inputs and results; empty where not measurable
    # Contestant: its largest error beside float64, as a fraction; not finite where a result is not.
    errors: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)  # of found columns, with float64's
    taken: dict[str, float] = field(default_factory=dict)  # of the processors, by others

    def ratio(self, peer: str) -> float:
        """What ours takes as a fraction of what `peer` takes."""
        rounds = zip(self.seconds["ours"], self.seconds[peer], strict=True)
        return statistics.median(ours / other for ours, other in rounds)

    def noise(self) -> float | None:
        """How far the ratio of ours to itself, measured a second time, is from one."""
        return abs(self.ratio("ours again") - 1) if "ours again" in self.seconds else None

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
            if self.seconds.get(peer)  # it has room, and is installed
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
    """The errors and the memory of each contestant, and their times in turn."""
    result = Result(case, {}, {})
    if case.truth and not case.is_judged_whole():
        judge_part(result)
    before = machine.now()
    if case.device == "cuda":
        run_on_gpu(benchmark, result, case.rounds or rounds)
    elif case.rounds == 0:
        run_once(benchmark, result)
    else:
        before = run_rounds(benchmark, result, case.rounds or rounds)
    if before:
        result.taken.update(before.taken(machine.now(), os.cpu_count()))
    benchmark.extra_info.update(seconds=result.seconds, extra_bytes=result.extra)
    return result


def judge_part(result: Result) -> None:
    """The errors at a smaller size, of all that need not be compiled for it."""
    case = result.case
    truth = case.build(*case.truth, ("truth",))["truth"]()
    peers = tuple(peer for peer in case.peers if not rivals.cost(case, peer).compiles)
    for who, call in case.build(*case.truth, peers).items():
        judge(result, who, call(), truth)


def judge(result: Result, who: str, found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    found, truth = ([result.case.part(x) for x in tensors] for tensors in (found, truth))
    told = (result.errors, error(found, truth)), (result.agreement, agreement(found, truth))
    for by_contestant, value in told:
        if value is not None:
            by_contestant[who] = value


def run_rounds(benchmark, result: Result, rounds: int) -> machine.Moment | None:
    """Every contestant once for its memory and its error, then in turn; returns when that began."""
    case = result.case
    contestants = case.build(*case.shape, case.peers)
    truth = case.build(*case.shape, ("truth",))["truth"]() if case.is_judged_whole() else ()
    quick = set()
    for who, call in contestants.items():
        if rivals.cost(case, who).compiles:
            call()
        if first_call(result, who, call, truth) < SLOW:
            quick.add(who)
    truth = ()  # gives back its memory
    if TELLS_MEMORY:
        with ProcessPoolExecutor(1, mp_context=fresh_processes()) as fresh:
            result.extra["ours"] = fresh.submit(first_call_memory, case).result()
    before = machine.now()
    result.seconds.update(times(benchmark, contestants, rounds, quick))
    return before


def run_once(benchmark, result: Result) -> None:
    """Each contestant once, its memory and its error in the same call: for what takes minutes."""
    case = result.case
    case.build(*(64 for _ in case.shape), ())["ours"]()  # loads code, starts threads
    truth = case.build(*case.shape, ("truth",))["truth"]() if case.is_judged_whole() else ()
    for who, call in case.build(*case.shape, case.peers).items():
        if rivals.cost(case, who).compiles:
            call()
        timed = partial(benchmark.pedantic, call, rounds=1) if who == "ours" else call
        result.seconds[who] = [first_call(result, who, timed, truth)]
        if who == "ours" and result.seconds[who][0] < CHEAP:
            result.seconds["ours again"] = [first_call(result, "ours again", call, truth)]


def first_call(result: Result, who: str, call: Call, truth: Sequence[Tensor]) -> float:
    """Seconds of a call whose memory and error are kept."""
    found: list[Tensor] = []
    seconds = 0.0

    def timed() -> tuple[Tensor, ...]:
        nonlocal seconds
        start = time.perf_counter()
        results = call()
        seconds = time.perf_counter() - start
        return results

    if TELLS_MEMORY:
        result.extra[who] = peak_memory(timed, results=found)
    else:
        found += timed()
    judge(result, who, found, truth)
    return seconds


def run_on_gpu(benchmark, result: Result, rounds: int) -> None:
    """The memory of each contestant, then their times in turn; one that has no room has no time."""
    case, extra = result.case, result.extra
    case.build(*(64 for _ in case.shape), ())["ours"]()  # loads libraries, which keep some memory
    contestants = case.build(*case.shape, case.peers)
    for who, call in contestants.items():
        try:
            if who != "ours":  # of ours the first call counts: it might keep what it allocates
                call()
            extra[who] = peak_memory(call, case.device)
        except torch.cuda.OutOfMemoryError:
            if who == "ours":
                raise
    contestants = {"ours": contestants["ours"], "ours again": contestants["ours"], **contestants}
    result.seconds.update({who: [] for who in contestants})
    order = deque(who for who in contestants if who in extra or who == "ours again")
    for _ in range(rounds):
        order.rotate()
        for who in order:
            result.seconds[who].append(seconds_on_gpu(contestants[who]))
    # The wall's clock, for what pytest-benchmark prints.
    benchmark.pedantic(lambda: seconds_on_gpu(contestants["ours"]), rounds=1)


def times(
    benchmark, contestants: Contestants, rounds: int, quick: Collection[str]
) -> dict[str, list[float]]:
    """pytest-benchmark times ours; the others run in the `setup` that it calls before every round.

    Its own statistics, comparisons and JSON are thus those of ours. Who is quick finds the caches
    emptied.
    """
    ours = contestants["ours"]
    # The same call twice a round: ratios of others are no more exact than the ratio of these two.
    others = {"ours again": ours, **contestants}
    del others["ours"]
    seconds: dict[str, list[float]] = {who: [] for who in others}
    order = deque(others)

    results = []  # of one call at a time, given back before the next: freeing is nobody's time

    def prepare(who: str) -> None:
        results.clear()
        if who.removesuffix(" again") in quick:
            empty_caches()

    def play_others() -> None:
        # Who runs after a big allocator finds memory that the system has at hand: all take turns.
        order.rotate()
        for who in order:
            prepare(who)
            start = time.perf_counter()
            results.append(others[who]())
            seconds[who].append(time.perf_counter() - start)
        prepare("ours")

    benchmark.pedantic(lambda: results.append(ours()), setup=play_others, rounds=rounds)
    return {"ours": list(benchmark.stats.stats.data), **seconds}


@cache
def fresh_processes() -> BaseContext:
    """Starts processes in which nothing of ours has run, and PyTorch need not be imported again."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "idml_fast"])
    return context


def first_call_memory(case: Case) -> int:
    """`peak_memory` of ours where it never ran before: a workspace kept between calls counts.

    Of peers it is that of a later call where torch.compile compiles in the first.
    """
    case.build(*(64 for _ in case.shape), ())["ours"]()  # loads code, starts threads
    return peak_memory(case.build(*case.shape, ())["ours"])
