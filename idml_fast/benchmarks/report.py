"""Recorded runs as pages: the newest number of every case, and how its ratios came about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context

from .._files import write_text
from ..evaluation.pictures import STYLE, colors, drawing, in_powers, svg
from ..train.report import render
from .newest import Measured, newest, of_machines, per_second
from .records import Record, RecordError, index, read_folder
from .speed import environment, section, with_section

HERE = Path(__file__).parent
PAGES = {".html": "benchmarks.html", ".md": "benchmarks.md"}
TEMPLATE = "speed.md.j2"  # of the README's section, beside the folder of recorded runs
# How the columns of the tables are called, and what of a contestant is in them.
COLUMNS = {
    "median": "time",
    "spread": "spread",
    "rate": "rate",
    "share": "share",
    "extra memory": "memory",
    "ours / it": "ratio",
    "error": "error",
    "found alike": "agreement",
}
ORDER = ("pairwise", "rowstats", "paired", "nearest", "losses", "evaluation", "train_step", "gpu")


@dataclass(frozen=True)
class Device:
    """The runs on one kind of device.

    Args:
        records: by the time of recording.
    """

    records: list[Record]

    @property
    def title(self) -> str:
        return self.records[-1].place

    @property
    def ops(self) -> dict[str, list[Measured]]:
        """By operation, the newest number of every case."""
        found: dict[str, list[Measured]] = {}
        for measured in newest(self.records).values():
            found.setdefault(measured.case.op, []).append(measured)
        known = [op for op in ORDER if op in found]
        return {op: found[op] for op in [*known, *sorted(found.keys() - set(known))]}

    @property
    def noted(self) -> list[Record]:
        """The runs whose numbers are shown and of which something should be known, newest first."""
        shown = {x.record.name for x in newest(self.records).values()}
        return [x for x in reversed(self.records) if x.notes and x.name in shown]

    @property
    def rates(self) -> dict[str, str]:
        """What the machine reached when it was last measured."""
        rates = next((x.rates for x in reversed(self.records) if x.rates), {})
        return {
            what: per_second(rate, "B" if what == "copy" else "FLOP")
            for what, rate in rates.items()
        }

    def history(self, title: str) -> list[Measured]:
        """A case in all runs that have it."""
        return [Measured(x, x.cases[title]) for x in self.records if title in x.cases]


def report(results: Path, output: Path, readme: Path | None = None) -> list[Path]:
    """Write what recorded runs measured.

    Args:
        results: their folder, whose index is brought up to date.
        output: a folder, which gets ``benchmarks.html`` and ``benchmarks.md``; or a file with one
            of these endings, which is written alone.
        readme: between its markers it gets what the template ``speed.md.j2`` beside ``results``
            makes of them.

    Returns:
        The files that were written.

    Raises:
        RecordError: there are no records, the template names a case that none has, or the README
            has no markers.
    """
    if output.suffix and output.suffix not in PAGES:
        wanted = " or ".join(PAGES)
        raise RecordError(f"--output must be a folder or end with {wanted}, got {output}")
    records = read_folder(results)
    if not records:
        raise RecordError(f"{results} holds no record of a benchmark run")
    paths = [output] if output.suffix else [output / name for name in PAGES.values()]
    texts = {path: page(path, records, results) for path in paths}
    if readme is not None:
        made = section(results.parent / TEMPLATE, records, _link(results, readme))
        texts[readme] = with_section(readme.read_text("utf-8"), made)
    index(results)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return list(texts)


def page(path: Path, records: Sequence[Record], results: Path) -> str:
    """The text of a page, HTML or Markdown by the ending of its path.

    Args:
        path: where it is to lie.
        records: by the time of recording.
        results: their folder, which it links to.
    """
    devices, link = [Device(runs) for runs in of_machines(records)], _link(results, path)
    if path.suffix == ".md":
        template = environment(HERE).get_template("report.md.j2")
        return template.render(devices=devices, results=link, columns=columns)
    peers = dict.fromkeys(
        peer for record in records for case in record.cases.values() for peer in case.peers
    )
    painted = dict(zip(peers, colors(len(peers)), strict=True))
    return render(
        "report.html.j2",
        HERE,
        devices=devices,
        results=link,
        columns=columns,
        colors=painted,
        trend=lambda history: trend(history, painted),
    )


def columns(cases: Sequence[Measured]) -> dict[str, str]:
    """Those of `COLUMNS` in which these cases have something to say."""
    contestants = [who for x in cases for who in x.contestants]
    return {
        title: name
        for title, name in COLUMNS.items()
        if any(getattr(who, name) for who in contestants)
    }


@rc_context(STYLE)
def trend(history: Sequence[Measured], painted: dict[str, str]) -> str:
    """The ratios of ours to its peers from commit to commit, with the middle half of their rounds.

    Args:
        history: one case in several runs, the last one last.
        painted: the colour of each peer.

    Returns:
        The address of an image, as `idml_fast.evaluation.pictures.svg` gives it.
    """
    figure, axes = drawing(3.6, 2.6)
    axes.axhline(1, color="#98a1b0", linewidth=1, linestyle="dashed")
    for peer in dict.fromkeys(peer for x in history for peer in x.ratios):
        runs = {place: x.case for place, x in enumerate(history) if peer in x.ratios}
        middle = [case.ratio(peer) for case in runs.values()]
        bounds = [case.middle_half(peer) for case in runs.values()]
        ways = [
            [at - low for at, (low, _) in zip(middle, bounds, strict=True)],
            [high - at for at, (_, high) in zip(middle, bounds, strict=True)],
        ]
        style = {"color": painted[peer], "linewidth": 1.6, "marker": "o", "markersize": 4}
        axes.errorbar(list(runs), middle, yerr=ways, elinewidth=1, capsize=2, **style)
    step = -(-len(history) // 5)  # as many commits as there is room for, the last one among them
    shown = range((len(history) - 1) % step, len(history), step)
    axes.set_xticks(shown, [history[place].record.commit[:7] for place in shown])
    axes.margins(x=0.12)
    in_powers(axes)
    axes.set(ylabel="ours / peer")
    axes.grid(axis="y")
    return svg(figure)


def _link(results: Path, page: Path) -> str:
    """The folder as a link in a page calls it."""
    return Path(os.path.relpath(results.resolve(), page.resolve().parent)).as_posix()
