"""The newest number of every case, in the words of a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .records import Case, Record, RecordError

MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """A case as one run measured it. Cells are texts, empty where there is no such number."""

    record: Record
    case: Case

    def of(self, who: str) -> Contestant:
        """One of its contestants.

        Raises:
            RecordError: it was not measured, or had no room.
        """
        if not self.case.seconds.get(who):
            raise RecordError(f"{self.record.name} has no time of {who} in {self.case.title!r}")
        return Contestant(self.record, self.case, who)

    @property
    def ratios(self) -> dict[str, float]:
        """By peer, the median ratio of ours to it."""
        return {peer: self.case.ratio(peer) for peer in self.case.peers}

    @property
    def memory_ratios(self) -> dict[str, float]:
        """By peer, what ours holds as a fraction of what it holds."""
        extra = self.case.extra
        peers = [peer for peer in self.case.peers if extra.get(peer)] if "ours" in extra else []
        return {peer: extra["ours"] / extra[peer] for peer in peers}

    @property
    def contestants(self) -> list[Contestant]:
        """All of them, also those that had no room."""
        return [Contestant(self.record, self.case, who) for who in self.case.seconds]


@dataclass(frozen=True)
class Contestant:
    """Ours, or a peer, in a case of a run."""

    record: Record
    case: Case
    who: str

    @property
    def seconds(self) -> list[float]:
        """A time a round; none if it had no room."""
        return self.case.seconds[self.who]

    @property
    def time(self) -> str:
        """The median."""
        return duration(self.case.median(self.who)) if self.seconds else "no room"

    @property
    def spread(self) -> str:
        """The width of the middle half of its times, as a share of the median."""
        if len(self.seconds) < 2:
            return ""
        low, median, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return percent((high - low) / median)

    @property
    def rate(self) -> str:
        """What it computes, or moves, in a second."""
        return per_second(self._rate, "B" if self.case.bytes else "FLOP") if self._rate else ""

    @property
    def share(self) -> str:
        """Its rate as a share of what the machine reached in the same run: in the bare product of
        that dtype, or in a copy."""
        what = "copy" if self.case.bytes else f"{self.case.dtype} product"
        reached = self.record.rates.get(what)
        return percent(self._rate / reached) if self._rate and reached else ""

    @property
    def _rate(self) -> float | None:
        count = self.case.count(self.who)
        return count / self.case.median(self.who) if count and self.seconds else None

    @property
    def memory(self) -> str:
        """What it holds at its peak beyond its inputs and results."""
        extra = self.case.extra.get(self.who)
        if extra is None:
            return ""
        mib = extra / MIB
        return f"{mib:,.0f} MiB" if mib >= 1e4 else f"{mib:.0f} MiB"

    @property
    def ratio(self) -> str:
        """Ours as a fraction of it."""
        compared = self.who != "ours" and self.seconds
        return f"{self.case.ratio(self.who):.2f}" if compared else ""

    @property
    def error(self) -> str:
        """The largest one against float64."""
        error = self.case.errors.get(self.who)
        return "" if error is None else f"{error:.1e}"

    @property
    def agreement(self) -> str:
        """Which share of the columns that it finds float64 finds too."""
        share = self.case.agreement.get(self.who)
        return "" if share is None else percent(share, decimals=2)


def duration(seconds: float) -> str:
    """As a table shows it."""
    return f"{_three_digits(seconds)} s" if seconds >= 1 else f"{_three_digits(1e3 * seconds)} ms"


def percent(share: float, decimals: int = 0) -> str:
    """As a table shows it."""
    return f"{100 * share:.{decimals}f} %"


def per_second(rate: float, what: str) -> str:
    """A rate of ``FLOP`` or of ``B``, bytes, as a table shows it."""
    if what == "FLOP" and rate >= 1e12:
        return f"{_three_digits(rate / 1e12)} TFLOP/s"
    return f"{_three_digits(rate / 1e9)} G{what}/s"


def _three_digits(number: float) -> str:
    """Or as many as are before the point."""
    decimals = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{decimals}f}"


def newest(records: Sequence[Record]) -> dict[str, Measured]:
    """By title, every case as the newest run measured it; the cases of the newest run first."""
    found: dict[str, Measured] = {}
    for record in reversed(records):
        for case in record.cases.values():
            found.setdefault(case.title, Measured(record, case))
    return found


def of_machines(records: Iterable[Record]) -> list[list[Record]]:
    """The runs of each kind of device, the kind of the newest run first."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(record.machine, []).append(record)
    return sorted(found.values(), key=lambda runs: runs[-1].date, reverse=True)
