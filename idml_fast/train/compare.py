"""Finished runs side by side: one HTML file, like the report of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from .._files import write_text
from ..evaluation.pictures import STYLE, colors, drawing, in_percent, in_powers, svg
from .config import Config
from .folder import RunError, flat, read_config
from .outcome import JUDGED
from .report import NORM, ROWS, cell, render

METRICS = {
    "conventional": (0, (3, 1.5)),
    "introspective": "solid",
}  # and how their curves are drawn
TITLES = {name: title for rows in ROWS.values() for title, name, _ in rows}
OWN = ("name", "run.folder", "run.overwrite")  # a run is the same under another name


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: as it was given.
        config: of the run.
        results: the numbers of the table, by metric.
        epochs: the lines of ``metrics.jsonl``, by metric.
    """

    folder: Path
    config: Config
    results: dict[str, dict[str, float | None]]
    epochs: dict[str, list[dict[str, Any]]]


def compare(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page with the numbers of finished runs, how their configurations differ, and how they
    learned.

    Args:
        folders: of the runs, such as ``runs/digits``.
        output: the HTML file; None: ``comparison.html`` beside the first run.

    Returns:
        Where it was written.

    Raises:
        RunError: a folder holds no finished run of this version, or is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise RunError(f"{folders[place]} is given twice")
    runs = [read_run(folder) for folder in folders]
    output = resolved[0].parent / "comparison.html" if output is None else output
    names = [run.config.name for run in runs]
    tasks = [task for task in JUDGED if any(run.config.data.task == task for run in runs)]
    with rc_context(STYLE):
        page = render(
            "compare.html.j2",
            # One name may have been given to several runs, in different folders.
            titles=names if len(set(names)) == len(names) else [str(x) for x in folders],
            colors=colors(len(runs)),
            metrics=list(METRICS),
            tasks=tasks,
            sections=table(runs),
            differences=differences(runs),
            figures={
                "Training loss": _curves(runs, "loss"),
                **{TITLES[JUDGED[task][0]]: _curves(runs, JUDGED[task][0]) for task in tasks},
            },
        )
    write_text(output, page)
    return output


def read_run(folder: Path) -> Run:
    """The run in that folder.

    Raises:
        RunError: there is none, it is not finished, or it is of another version of idml_fast.
    """
    config = read_config(folder)
    other = f"{folder} is a run of another version of idml_fast"
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        text = (folder / "metrics.jsonl").read_text("utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise RunError(f"{folder} is not finished: it has no {missing}") from None
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{other}: its results are no JSON ({error})") from None
    by_metric = isinstance(results, dict) and set(results) == set(METRICS)
    if not by_metric or not all(map(_are_numbers, results.values())):
        wanted = " and ".join(METRICS)
        raise RunError(f"{other}: its results.json must have numbers for {wanted}")
    epochs: dict[str, list[dict[str, Any]]] = {name: [] for name in METRICS}
    for line in lines:
        name = line.pop("metric", None) if isinstance(line, dict) else None
        if name not in tuple(METRICS) or "loss" not in line or not _are_numbers(line):
            raise RunError(f"{other}: each line of its metrics.jsonl must have a metric and a loss")
        epochs[name].append(line)
    for name, found in epochs.items():
        if len(found) != config.optim.epochs:
            raise RunError(
                f"{folder} is not finished: its metrics.jsonl has {len(found)} of "
                f"{config.optim.epochs} epochs of the {name} metric"
            )
    return Run(folder, config, results, epochs)


def table(runs: Sequence[Run]) -> dict[str, list[list[str]]]:
    """Under each heading rows of a title and the cells of every run, metric by metric."""
    found = {name for run in runs for result in run.results.values() for name in result}
    other = {"Other": tuple((name, name, NORM) for name in sorted(found - TITLES.keys()))}
    sections = {
        heading: [
            [title, *(cell(run.results[x].get(name), form) for run in runs for x in METRICS)]
            for title, name, form in rows
            if name in found
        ]
        for heading, rows in {**ROWS, **other}.items()
    }
    return {heading: rows for heading, rows in sections.items() if rows}


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of a setting and its value in every run, if it is not the same in all of them."""
    values = [flat(asdict(run.config)) for run in runs]
    keys = dict.fromkeys(key for settings in values for key in settings if key not in OWN)
    shown = {key: [_shown(settings, key) for settings in values] for key in keys}
    return [[key, *row] for key, row in shown.items() if len(set(row)) > 1]


def _shown(settings: dict[str, Any], key: str) -> str:
    if key not in settings:
        return "unset"
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _are_numbers(values: Any) -> bool:
    """Whether these are numbers, or None, by name."""
    return isinstance(values, dict) and all(
        value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        for value in values.values()
    )


def _curves(runs: Sequence[Run], name: str) -> str:
    """A number of every epoch, where there is one; who is who is said beside the drawing."""
    figure, axes = drawing(height=3.4)
    for run, color in zip(runs, colors(len(runs)), strict=True):
        for metric, style in METRICS.items():
            values = [line.get(name) for line in run.epochs[metric]]
            epochs = [epoch for epoch, value in enumerate(values, 1) if value is not None]
            values = [value for value in values if value is not None]
            marker = "o" if len(values) == 1 else None  # which makes no line
            axes.plot(epochs, values, color=color, linestyle=style, linewidth=1.6, marker=marker)
    if name == "loss":
        in_powers(axes)
    else:
        in_percent(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", title=TITLES.get(name, "Training loss"))
    axes.grid(axis="y")
    return svg(figure)
