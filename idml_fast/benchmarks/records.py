"""Records of benchmark runs: one JSON file a run, and an index of those in a folder.

A record is what `pytest bench/ --benchmark-only --record` measured: the machine, the versions and
the commit, and of every case the seconds of every round. bench/results/README.md tells its keys.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from .._files import write_text

INDEX = "index.json"
# How the titles of cases begin in records that do not yet say of which operation they are.
OPS = {
    "pairwise": "pairwise",
    "nearest": "nearest",
    "paired": "paired",
    "retrieval": "evaluation",
    "NMI": "evaluation",
    "training step": "train_step",
    "reading": "train_step",
}


class RecordError(ValueError):
    """A file holds no record, or a record lacks what is asked for; the message names it."""


@dataclass(frozen=True)
class Case:
    """One operation at one size, with the times of ours and of its peers.

    Args:
        title: what is measured.
        op: the operation, such as ``pairwise``; what a page groups by.
        seconds: by contestant, a time a round; none of one that had no room.
        dtype: of its products, such as ``fp32``.
        flop: of one call, in the products that the definition asks for; 0: not counted.
        bytes: that one call must move, where this and not ``flop`` is counted.
        product_flop: of the contestant ``product``, a bare product of another size.
        extra: by contestant, the bytes that it holds at its peak beyond its inputs and results.
        errors: by contestant, the largest error against float64, as a fraction.
        agreement: by contestant, which share of the columns it finds float64 finds too.
    """

    title: str
    op: str
    seconds: dict[str, list[float]]
    dtype: str = "fp32"
    flop: float = 0
    bytes: float = 0
    product_flop: float | None = None
    extra: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)

    @property
    def peers(self) -> list[str]:
        """Who has times beside ours; ``ours again``, the same once more, is no peer."""
        return [
            who
            for who, seconds in self.seconds.items()
            if seconds and who not in ("ours", "ours again")
        ]

    def median(self, who: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[who])

    def count(self, who: str) -> float:
        """What a rate counts of one call: bytes, or else operations; 0: nothing."""
        return (self.product_flop if who == "product" else None) or self.bytes or self.flop

    def ratios(self, who: str) -> list[float]:
        """Ours as a fraction of ``who``, round by round: what slowed a round slowed both."""
        rounds = zip(self.seconds["ours"], self.seconds[who], strict=True)
        return [ours / other for ours, other in rounds]

    def ratio(self, who: str) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios(who))

    def middle_half(self, who: str) -> tuple[float, float]:
        """Where the middle half of `ratios` begins and ends; of one round there is but that one."""
        ratios = self.ratios(who)
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        name: of the file; the same run under another name is the same.
        date: as ``2026-11-22``.
        device: the processor, or the GPU.
        kind: ``cpu`` or ``cuda``.
        commit: of the code; ``-dirty``: with changes that were not committed.
        torch: the version.
        threads, instructions: of a CPU; None on a GPU.
        rates: what the machine reached in this run: FLOP/s of ``fp32 product`` and of ``bf16
            product``, bytes/s of ``copy``; empty where they were not measured.
        notes: sentences: that the machine was busy, that peers were not installed.
        cases: by title.
    """

    name: str = field(compare=False)
    date: str
    device: str
    kind: str
    commit: str
    torch: str
    threads: int | None
    instructions: str | None
    rates: dict[str, float]
    notes: tuple[str, ...]
    cases: dict[str, Case]

    @property
    def machine(self) -> tuple[str, str, int | None, str | None]:
        """Runs with the same one were on the same kind of device."""
        return self.device, self.kind, self.threads, self.instructions

    @property
    def place(self) -> str:
        """In words, what it was measured on."""
        plural = "s" if self.threads != 1 else ""
        threads = [] if self.threads is None else [f"{self.threads} thread{plural}"]
        return ", ".join([self.device, *threads, *filter(None, [self.instructions])])


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        RecordError: it cannot be read, or holds no record.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        return of(found, path.name)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise RecordError(f"{path} is no record of a benchmark run: it has no {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is no record of a benchmark run ({error})") from None


def of(found: dict[str, Any], name: str = "") -> Record:
    """The record that a file of this name holds; one without newer keys too."""
    cases = [
        Case(
            case["case"],
            case.get("op") or _op(case["case"]),
            case["seconds"],
            case.get("dtype") or ("bf16" if "bf16" in case["case"] else "fp32"),
            case["flop"],
            case.get("bytes", 0),
            case.get("product_flop"),
            case["extra_bytes"],
            case.get("errors", {}),
            case.get("agreement", {}),
        )
        for case in found["cases"]
    ]
    return Record(
        name=name,
        date=found.get("date") or name[:10],
        device=found["device"],
        kind=found.get("kind") or ("cuda" if "cuda" in found else "cpu"),
        commit=found["commit"],
        torch=found["torch"],
        threads=found.get("threads"),
        instructions=found.get("instructions"),
        rates=found.get("rates", {}),
        notes=tuple(found.get("notes", ())),
        cases={case.title: case for case in cases},
    )


def _op(title: str) -> str:
    for start, op in OPS.items():
        if title.startswith(start):
            return op
    return "losses" if "classes" in title else "rowstats"


def read_folder(folder: Path) -> list[Record]:
    """All records of a folder, by the time of recording.

    Raises:
        RecordError: there is no such folder, or one of its files holds no record.
    """
    if not folder.is_dir():
        raise RecordError(f"{folder} is no folder of recorded runs")
    return [read(path) for path in _in_order(folder)]


def write(record: dict[str, Any], folder: Path) -> Path:
    """Add a run to a folder, and to its index.

    Args:
        record: what the file shall hold; its ``date``, ``device`` and ``commit`` name the file.
        folder: made if it is not there. Nothing in it is overwritten: another run of the same name
            gets a number.

    Returns:
        The file.
    """
    device = re.sub(r"[^a-z0-9]+", "-", str(record["device"]).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record['date']}-{device}-{record['commit']}"
    stems = chain([stem], (f"{stem}-{number}" for number in count(2)))
    path = next(path for x in stems if not (path := folder / f"{x}.json").exists())
    _write_json(path, record)
    index(folder)
    return path


def index(folder: Path) -> Path:
    """Bring the index of a folder up to date: what its records are of, by the time of recording.

    That is the order of their dates; of one day those that the index has come first, in its order.

    Returns:
        The file.
    """
    found = [_described(read(path)) for path in _in_order(folder)]
    _write_json(folder / INDEX, found)
    return folder / INDEX


def _in_order(folder: Path) -> list[Path]:
    path = folder / INDEX
    try:
        listed = json.loads(path.read_text("utf-8")) if path.exists() else []
        places = {entry["name"]: place for place, entry in enumerate(listed)}
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is no index of records ({error}): it can be removed") from None
    # What else lies there, such as the errors that a GPU makes, has no date.
    paths = folder.glob("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-*.json")
    return sorted(paths, key=lambda x: (x.name[:10], places.get(x.name, len(places)), x.name))


def _described(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "date": record.date,
        "commit": record.commit,
        "device": record.device,
        "kind": record.kind,
        "threads": record.threads,
        "torch": record.torch,
        "cases": len(record.cases),
        "ops": sorted({case.op for case in record.cases.values()}),
    }


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
