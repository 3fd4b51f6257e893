"""Which of a case's peers, and how many rounds, there are time and memory for on this machine.

An estimate is made of the case's operations, the machine's rate and what `rivals.COSTS` knows of a
contestant. It tells seconds from minutes, no more; the rate is rounded down to a power of two, so
that the same machine runs the same cases every time.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import rivals
from race import Case

CASES = 52  # a case may take one part in so many of a run's time
SPARE = 0.8  # of the free memory that a case may take
LEAST_ROUNDS = 2  # beside the first call; where fewer fit, every contestant is called once


@dataclass(frozen=True)
class Budget:
    seconds: float  # of the run
    rates: dict[str, float]  # of the machine: `machine.rates`
    memory: float  # free bytes
    full: bool = False  # time is no reason to leave anything out

    def fit(self, case: Case, rounds: int, spent: float) -> tuple[Case | None, list[str]]:
        """The case with the peers and the rounds that there is room for, when so many seconds of
        the run are over; None if there is none. And in words what is left out, and why."""
        missing = {peer: lack for peer in case.peers if (lack := rivals.missing(peer))}
        told = [f"no {peer}: {lack}" for peer, lack in missing.items()]
        case = without(case, missing)
        if case.device != "cpu":  # a GPU is quick, and says itself when its memory is out
            return case, told
        if lack := self.lack_of_memory(case, "ours"):
            return None, [lack]
        lacks = {peer: lack for peer in case.peers if (lack := self.lack_of_memory(case, peer))}
        whole = without(case, lacks)
        share = self.seconds / CASES
        if not self.full:
            lacks |= self.lacks_of_time(whole, share)
        fitted = without(case, lacks)
        told += [f"{case.title}: no {peer}: {lack}" for peer, lack in lacks.items()]
        alone = self.seconds_of(fitted, fitted.peers)
        if not self.full and (alone > share or (whole.peers and not fitted.peers)):
            takes = duration(self.seconds_of(whole, whole.peers))
            return None, [f"one round would take about {takes}: --full"]
        if not self.full and spent + alone > self.seconds:
            return None, [f"the {self.seconds:.0f} seconds of this run are over: --budget"]
        return replace(fitted, rounds=self.rounds(fitted, rounds, share)), told

    def lack_of_memory(self, case: Case, who: str) -> str | None:
        itemsize = 2 if case.dtype == "bf16" else 4
        needed = case.held + rivals.cost(case, who).matrices * case.pairs * itemsize
        if needed <= SPARE * self.memory:
            return None
        return f"it would take about {needed / 1e9:.0f} GB, {self.memory / 1e9:.0f} GB are free"

    def lacks_of_time(self, case: Case, share: float) -> dict[str, str]:
        """The slowest peers give way until the others can be called once."""
        peers, lacks = list(case.peers), {}
        while peers and self.seconds_of(case, peers) > share:
            slowest = max(peers, key=lambda peer: self.seconds_of(case, [peer]))
            takes = self.seconds_of(case, [slowest]) - self.seconds_of(case, [])
            lacks[slowest] = f"a call would take about {duration(takes)}: --full"
            peers.remove(slowest)
        return lacks

    def rounds(self, case: Case, asked: int, share: float) -> int:
        """As many as are asked for and fit, beside the first call; 0: every contestant once."""
        asked = asked if case.rounds is None else case.rounds
        once = self.seconds_of(case, case.peers)
        fitting = asked if once == 0 else min(asked, math.floor(share / once) - 1)
        return fitting if fitting >= min(LEAST_ROUNDS, asked) else 0

    def seconds_of(self, case: Case, peers: list[str] | tuple[str, ...]) -> float:
        """Of one call of these, and two of ours. In bf16 they take half as long as in fp32, not
        less: what is not a product is no faster than memory."""
        rate = self.rates["fp32 product"] * (2 if case.dtype == "bf16" else 1)
        rate = 2.0 ** math.floor(math.log2(rate))
        times = [rivals.cost(case, who).time for who in ("ours", "ours", *peers)]
        return sum(times) * case.flop / rate


def without(case: Case, peers: Collection[str]) -> Case:
    return replace(case, peers=tuple(peer for peer in case.peers if peer not in peers))


def duration(seconds: float) -> str:
    """As exact as the estimates are."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.0f} hours"
