"""Is a run worse than the last one recorded? By its ratios to peers, which a slow moment spares.

A time belongs to a machine and to a moment, the ratio of ours to a peer much less: both were
measured in turns. With the median ratio of ours to a peer then and now, ours has lost if::

    ln(now / then)  >  ln 1.15 + sqrt(noise_then² + noise_now²)
    noise²          =  (1.57 IQR / sqrt(n))² + (ln again)²

where IQR is the width of the middle half of the n rounds' ln(ours / peer), so that
1.57 IQR / sqrt(n) is half the notch of a box plot (McGill, Tukey and Larsen, *Variations of Box
Plots*, 1978), and `again` is the median ratio of ours to the same measured once more in every
round. One round has no IQR: it is taken to scatter as its run's rounds usually do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from .records import INDEX, Case, Record, RecordError, read, read_folder

MARGIN = 1.15  # what a ratio may grow by, beyond noise
BLUNT = 1.5  # where noise lets a ratio grow by this, its comparison says little


@dataclass(frozen=True)
class Comparison:
    """A ratio of ours to a peer, then and now, and the most that it may be now."""

    case: str
    peer: str
    before: Record
    then: float
    now: float
    limit: float

    @property
    def is_loss(self) -> bool:
        return self.now > self.limit


@dataclass(frozen=True)
class Outcome:
    """What `compare` found.

    Args:
        compared: every ratio that both runs have.
        new: what no earlier run has: titles of cases, or a case with its peer.
        left_out: titles of cases that earlier runs have and this one has not.
    """

    compared: list[Comparison]
    new: list[str]
    left_out: list[str]

    @property
    def losses(self) -> list[Comparison]:
        return [comparison for comparison in self.compared if comparison.is_loss]


def check(paths: Iterable[Path], results: Path) -> tuple[str, bool]:
    """Compare new runs with recorded ones.

    Args:
        paths: of new records, or folders of them.
        results: the folder of recorded runs. Each ratio is compared with that of the last one on
            the same kind of device that has it.

    Returns:
        What there is to say, and whether nothing was lost. Of several new runs of one commit on
        one kind of device a ratio is lost if all that have it have lost it: a machine's bad moment
        may be longer than a case's rounds, but does not come back.

    Raises:
        RecordError: a file is no record, or there is nothing to compare a record with.
    """
    recorded = read_folder(results)
    texts: list[str] = []
    lost: dict[tuple[Any, ...], bool] = {}
    for record in _read_all(paths):
        # Of a record that has been added to the folder, those before it.
        earlier = list(takewhile(lambda x, new=record: x != new, recorded))
        earlier = [other for other in earlier if other.machine == record.machine]
        outcome = compare(record, earlier)
        if not outcome.compared:
            why = "has any of its cases" if earlier else f"is of {record.place}"
            raise RecordError(
                f"{record.name} can be compared with nothing: no earlier run in {results} {why}"
            )
        texts.append(_told(record, outcome))
        for x in outcome.compared:
            ratio = record.machine, record.commit, x.case, x.peer
            lost[ratio] = lost.get(ratio, True) and x.is_loss
    losses = [f"  {case}, {peer}" for (*_, case, peer), everywhere in lost.items() if everywhere]
    if len(texts) > 1:
        texts.append(
            "\n".join([f"in every run that has it lost: {len(losses) or 'none'}", *losses])
        )
    return "\n\n".join(texts), not losses


def compare(record: Record, earlier: Sequence[Record]) -> Outcome:
    """Every ratio of a run beside the last earlier one.

    Args:
        record: the new run.
        earlier: runs on the same kind of device, the last one last.
    """
    compared, new = [], []
    for case in record.cases.values():
        if not any(case.title in other.cases for other in earlier):
            new.append(case.title)
            continue
        for peer in case.peers:
            before = _last_with(earlier, case.title, peer)
            if before is None:
                new.append(f"{case.title}, {peer}")
                continue
            then, now = before.cases[case.title].ratio(peer), case.ratio(peer)
            allowed = math.hypot(_noise(before, case.title, peer), _noise(record, case.title, peer))
            limit = then * MARGIN * math.exp(allowed)
            compared.append(Comparison(case.title, peer, before, then, now, limit))
    known = dict.fromkeys(title for other in earlier for title in other.cases)
    return Outcome(compared, new, [title for title in known if title not in record.cases])


def _read_all(paths: Iterable[Path]) -> Iterator[Record]:
    for path in paths:
        if path.is_dir():
            found = read_folder(path)
            if not found:
                raise RecordError(f"{path} holds no record of a benchmark run")
            yield from found
        elif path.name == INDEX:
            raise RecordError(f"{path} is the index of records: give one of these, or their folder")
        else:
            yield read(path)


def _last_with(records: Sequence[Record], title: str, peer: str) -> Record | None:
    found = (x for x in reversed(records) if title in x.cases and peer in x.cases[title].peers)
    return next(found, None)


def _noise(record: Record, title: str, peer: str) -> float:
    """Of the logarithm of a ratio."""
    case = record.cases[title]
    rounds = len(case.seconds["ours"])
    scatter = _scatter(case, peer) if rounds > 1 else _usual_scatter(record)
    again = math.log(case.ratio("ours again")) if case.seconds.get("ours again") else 0.0
    return math.hypot(1.57 * scatter / math.sqrt(rounds), again)


def _scatter(case: Case, peer: str) -> float:
    low, high = case.middle_half(peer)
    return math.log(high / low)


def _usual_scatter(record: Record) -> float:
    several = [case for case in record.cases.values() if len(case.seconds["ours"]) > 1]
    found = [_scatter(case, peer) for case in several for peer in case.peers]
    return statistics.median(found or [0.0])


def _told(record: Record, outcome: Outcome) -> str:
    compared, losses = outcome.compared, outcome.losses
    cases = {comparison.case for comparison in compared}
    what = f"{_number(compared, 'ratio')} of {_number(cases, 'case')}"
    lines = [f"{record.name}, {record.place}: {what} compared, {len(losses) or 'none'} lost"]
    for title in dict.fromkeys(loss.case for loss in losses):
        lines.append(f"  {title}")
        # All its peers: where ours loses to one alone, it may be this peer that has changed.
        lines += [
            f"    {x.peer:11} {x.now:.3f}, at {x.before.commit} {x.then:.3f}, at most {x.limit:.3f}"
            f"{': LOST' if x.is_loss else ''}"
            for x in compared
            if x.case == title
        ]
    blunt = [x for x in compared if x.limit > BLUNT * x.then]
    if blunt:
        number = _number(blunt, "ratio")
        lines.append(f"  so noisy that less than {BLUNT:g} times as much is no loss: {number}")
    others = {x.before.torch for x in compared} - {record.torch}
    if others:
        lines.append(
            f"  peers may be others: torch {record.torch} now, {', '.join(sorted(others))} before"
        )
    lines += [f"  noted in this run: {note}" for note in record.notes]
    lines += [f"  not compared, no earlier run has it: {what}" for what in outcome.new]
    if outcome.left_out:
        lines.append(f"  not in this run: {_number(outcome.left_out, 'recorded case')}")
    return "\n".join(lines)


def _number(things: Sized, what: str) -> str:
    return f"{len(things)} {what}{'s' if len(things) != 1 else ''}"
