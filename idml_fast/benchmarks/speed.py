"""The README's section of measured numbers: every one of them from a recorded run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from .newest import Measured, newest
from .records import Record, RecordError

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


class Recorded:
    """The newest numbers of runs on one kind of device, for a template.

    Args:
        records: by the time of recording.
        wanted: what they must be of, such as ``device="AMD EPYC"`` and ``threads=2``.

    Raises:
        RecordError: there are none.
    """

    def __init__(self, records: Sequence[Record], **wanted: Any) -> None:
        def fits(record: Record) -> bool:
            return all(getattr(record, name) == value for name, value in wanted.items())

        self.records = [record for record in records if fits(record)]
        self.told = ", ".join(f"{name} {value}" for name, value in wanted.items())
        if not self.records:
            raise RecordError(f"there is no record of {self.told}")
        self.cases = newest(self.records)
        self.used: list[Record] = []

    @property
    def torch(self) -> str:
        """The versions that the cases so far asked for were measured with, such as ``2.13.0``."""
        return " and ".join(sorted({record.torch.partition("+")[0] for record in self.used}))

    def case(self, title: str) -> Measured:
        """The newest number of a case.

        Raises:
            RecordError: no run has it.
        """
        if title not in self.cases:
            raise RecordError(f"no record of {self.told} has the case {title!r}")
        self.used.append(self.cases[title].record)
        return self.cases[title]


def environment(folder: Path) -> jinja2.Environment:
    """For the Markdown templates of a folder: what is put into them is not escaped."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["median"] = statistics.median
    found.filters["by_record"] = by_record
    return found


def by_record(rows: dict[str, Measured]) -> list[tuple[Record, list[str]]]:
    """Each run that rows of a table come from, with the names of these rows."""
    found: dict[str, tuple[Record, list[str]]] = {}
    for name, measured in rows.items():
        found.setdefault(measured.record.name, (measured.record, []))[1].append(name)
    return list(found.values())


def section(template: Path, records: Sequence[Record], results: str) -> str:
    """The section that a template makes of recorded runs.

    Args:
        template: it asks ``recorded(device=..., threads=...)`` for a `Recorded`.
        records: by the time of recording.
        results: their folder, as a link from the README calls it.

    Raises:
        RecordError: no run has a case, or a contestant, that the template names.
    """

    def recorded(**wanted: Any) -> Recorded:
        return Recorded(records, **wanted)

    try:
        made = environment(template.parent).get_template(template.name)
        return made.render(recorded=recorded, results=results)
    except jinja2.TemplateNotFound:
        raise RecordError(f"{template} is not there: it makes the section of the README") from None


def with_section(readme: str, made: str) -> str:
    """The README's text with another section between its two markers.

    Raises:
        RecordError: it does not have both of them, once, in this order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise RecordError(f"the README must have {BEGIN} and then {END}, each of them once")
    return f"{before}{BEGIN}\n{made.strip()}\n{END}{after}"
