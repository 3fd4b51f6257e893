"""The comparison: every loss with the conventional and the introspective metric, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import rc_context
from scipy.stats import t as student_t

from .._files import write_text
from ..evaluation.pictures import COLORS, STYLE, drawing, svg
from .config import RECIPES, Config
from .criterion import SettingsError
from .outcome import JUDGED, QUALITIES
from .paper import NAMES, merged, published
from .report import render
from .runs import Results, chosen, over, publish, results_of, seeded, written

PREFIX = "reproduce_"  # of a recipe's file
METRICS = ("conventional", "introspective")
TITLES = {
    "proxy_anchor": "Proxy-Anchor",
    "proxy_nca": "Proxy-NCA",
    "multi_similarity": "Multi-Similarity",
    "contrastive": "Contrastive",
    "triplet_margin": "Triplet, semi-hard",
    "margin": "Margin, distance-weighted",
    "fast_ap": "FastAP",
    "npairs": "N-pair",
    "nca": "NCA",
    "ntxent": "NT-Xent",
    "supcon": "SupCon",
    "softmax": "Softmax",
    "softmax_mixup": "Softmax, Mixup",
    "softmax_cutmix": "Softmax, CutMix",
}
UNCERTAINTIES = {
    "spearman_blur": "blur",
    "spearman_noise": "noise",
    "spearman_occlusion": "occlusion",
}
NUMBERS = (
    *(name for qualities in QUALITIES.values() for name in qualities),
    *("unc_norm_mean", "unc_norm_std", "unc_grad_norm"),
    *UNCERTAINTIES,
)


@dataclass(frozen=True)
class Row:
    """A loss of the comparison.

    Args:
        name: in the recipe.
        task: ``retrieval`` or ``classification``.
        results: by metric, one mapping of numbers for each seed, in the order of the seeds.
    """

    name: str
    task: str
    results: dict[str, list[Results]]

    @property
    def title(self) -> str:
        """As it is shown."""
        return TITLES[self.name]

    def values(self, metric: str, name: str) -> np.ndarray:  # [seeds]
        """A number of every seed; NaN where there is none."""
        found = [result.get(name) for result in self.results[metric]]
        return np.array([np.nan if value is None else value for value in found], dtype=float)

    def mean(self, metric: str, name: str) -> tuple[float, float]:
        """Mean and standard deviation (of a sample) over the seeds."""
        values = self.values(metric, name)
        return values.mean(), values.std(ddof=1) if len(values) > 1 else np.nan

    def difference(self, name: str) -> tuple[float, float]:
        """Introspective less conventional with the same seed: the mean, and half the width of its
        95 % interval by Student's t; NaN with one seed."""
        differences = self.values("introspective", name) - self.values("conventional", name)
        count = len(differences)
        if count < 2:
            return differences.mean(), np.nan
        error = differences.std(ddof=1) / count**0.5
        return differences.mean(), student_t.ppf(0.975, count - 1) * error


@dataclass(frozen=True)
class Comparison:
    """All rows, and how they are written.

    Args:
        dataset: whose comparison it is.
        seeds: of the runs.
        rows: one for each loss.
        configs: of all runs; either metric was trained with each.
    """

    dataset: str
    seeds: tuple[int, ...]
    rows: list[Row]
    configs: list[Config]

    def of(self, task: str) -> list[Row]:
        """The rows of a task."""
        return [row for row in self.rows if row.task == task]

    def verdicts(self) -> list[str]:
        """In words, for each number that is judged: where the introspective metric helps, and where
        not."""
        if len(self.seeds) < 2:
            return ["One seed cannot tell the metrics apart."]
        told = []
        for task, names in JUDGED.items():
            for name in names if self.of(task) else ():
                groups: dict[str, list[str]] = {"higher": [], "lower": [], "open": []}
                for row in self.of(task):
                    middle, half = row.difference(name)
                    clear = abs(middle) > half
                    groups["open" if not clear else "higher" if middle > 0 else "lower"].append(
                        row.title
                    )
                parts = [
                    f"{which} with the introspective metric for {'; '.join(groups[which])}"
                    for which in ("higher", "lower")
                    if groups[which]
                ]
                if groups["open"]:
                    seeds = "the spread of the seeds"
                    parts.append(f"no difference beyond {seeds} for {'; '.join(groups['open'])}")
                first, *others = parts
                said = ". ".join([first, *(part[0].upper() + part[1:] for part in others)])
                told.append(f"{task.capitalize()}, {QUALITIES[task][name]}: {said}.")
        return told

    def to_text(self) -> str:
        """The tables for a terminal, beside the paper's numbers on other data, and the verdicts."""
        lines = []
        for task in QUALITIES:
            if self.of(task):
                head, *body = self.table(task)
                widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
                for row in (head, ["─" * width for width in widths], *body):
                    cells = zip(row, widths, strict=True)
                    first, *others = [cell.ljust(width) for cell, width in cells]
                    lines.append("  ".join([first, *others]).rstrip())
                lines.append("")
        versions = ", ".join(f"{name} {version(name)}" for name in ("idml_fast", "torch"))
        return "\n".join([*lines, self.note, *self.verdicts(), versions])

    @property
    def note(self) -> str:
        """What the numbers of the tables are."""
        return (
            f"In percent: {over(self.seeds)}; Δ: introspective "
            "less conventional, seed by seed, with its 95 % interval. ρ: Spearman's correlation of "
            "the uncertainty with the damage done to an image. The columns of the paper are its "
            "own Recall@1 (or top-1) on other, larger data: a reference, nothing to be reached "
            "here."
        )

    def table(self, task: str) -> list[list[str]]:
        """The head and the rows of a task's table, as text."""
        theirs = paper()
        sets = dict.fromkeys(data for (_, _, data), _ in theirs.items() if task_of(data) == task)
        first, *others = QUALITIES[task].items()
        head = ["loss", "metric", first[1], *(f"paper: {data}" for data in sets)]
        head += [short for _, short in others]
        head += [f"Δ {QUALITIES[task][name]}" for name in JUDGED[task]]
        table = [[*head, *(f"ρ {damage}" for damage in UNCERTAINTIES.values())]]
        for row in self.of(task):
            for metric in METRICS:
                cells = [percent(*row.mean(metric, first[0]))]
                cells += [theirs.get((row.name, metric, data), "") for data in sets]
                cells += [percent(*row.mean(metric, name)) for name, _ in others]
                if metric == "introspective":
                    cells += [percent(*row.difference(name), signed=True) for name in JUDGED[task]]
                    cells += [rank(*row.mean(metric, name)) for name in UNCERTAINTIES]
                title = row.title if metric == METRICS[0] else ""
                table.append([title, metric, *cells, *[""] * (len(table[0]) - 2 - len(cells))])
        return table

    def to_csv(self) -> str:
        """The tables as shares, not percent: a line for each loss and metric, with mean and
        standard deviation, the differences and half of their 95 % intervals, the paper's number."""
        theirs = paper()
        sets = list(dict.fromkeys(data for _, _, data in theirs))
        judged = [name for names in JUDGED.values() for name in names]
        head = ["dataset", "loss", "task", "metric", "seeds"]
        head += [f"{name}_{what}" for name in NUMBERS for what in ("mean", "std")]
        head += [f"{name}_{what}" for name in judged for what in ("difference", "interval")]
        lines = [[*head, *(f"paper_{data}" for data in sets)]]
        for row in self.rows:
            for metric in METRICS:
                cells = [x for name in NUMBERS for x in row.mean(metric, name)]
                for name in judged:
                    introspective = metric == "introspective"
                    cells += row.difference(name) if introspective else (np.nan, np.nan)
                shown = ["" if np.isnan(x) else float(x) for x in cells]
                about = [self.dataset, row.name, row.task, metric, len(self.seeds)]
                shares = [theirs.get((row.name, metric, data)) for data in sets]
                lines.append([*about, *shown, *(x and round(float(x) / 100, 6) for x in shares)])
        return written(lines)

    def runs_to_csv(self) -> str:
        """Every number of every run: a line for each loss, metric and seed."""
        lines = [["dataset", "loss", "task", "metric", "seed", *NUMBERS]]
        for row in self.rows:
            for metric in METRICS:
                for seed, result in zip(self.seeds, row.results[metric], strict=True):
                    values = [result.get(name) for name in NUMBERS]
                    lines.append([self.dataset, row.name, row.task, metric, seed, *values])
        return written(lines)


def reproduce(
    dataset: str = "digits",
    *,
    losses: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    folder: str | Path = "runs/reproduce",
    settings: Sequence[str] = (),
) -> Comparison:
    """Train every loss with both metrics and every seed, and write the table.

    A run is written as soon as it is done, to ``<folder>/<loss>/<metric>-<seed>.json``; a second
    call goes on where the first one stopped, also within a run. At the end there are the table,
    ``reproduce.txt``, ``reproduce.csv`` and ``report.html``, and ``runs.csv`` with every run.

    Args:
        dataset: which comparison: a recipe ``reproduce_<dataset>.yaml``.
        losses: rows of that recipe; None: all.
        seeds: of the weights, the order of the images and, in classification, their split.
        epochs: of every run; None: as the recipe says.
        folder: where it is written.
        settings: of ``idml-fast train``, for every run, such as ``["--optim.lr", "1e-3"]``.

    Raises:
        SettingsError: an argument does not fit; the message says which, and what would.
        FileExistsError: the folder holds a run of another configuration.
        Interrupted: SIGTERM or SIGINT has come.
        RunError: a checkpoint is damaged, or of another run.
    """
    folder = Path(folder)
    configs = configurations(dataset, losses, seeds, epochs, folder, settings)
    found = results_of(
        {
            (name, metric, seed): (config, metric)
            for (name, seed), config in configs.items()
            for metric in METRICS
        },
        folder,
    )
    rows = [
        Row(
            name,
            configs[name, seeds[0]].data.task,
            {metric: [found[name, metric, seed] for seed in seeds] for metric in METRICS},
        )
        for name in dict.fromkeys(name for name, _ in configs)
    ]
    comparison = Comparison(dataset, tuple(seeds), rows, list(configs.values()))
    publish(comparison, folder, write_comparison)
    return comparison


def load_recipe(dataset: str, prefix: str = PREFIX) -> dict[str, Any]:
    """The packaged comparison of that name: ``common`` settings, and those of each of its rows.

    Raises:
        SettingsError: there is none of that name.
    """
    packaged = {path.stem.removeprefix(prefix): path for path in RECIPES.glob(f"{prefix}*.yaml")}
    if dataset not in packaged:
        raise SettingsError(f"dataset must be one of {', '.join(sorted(packaged))}, got {dataset}")
    return yaml.safe_load(packaged[dataset].read_text("utf-8"))


def configurations(
    dataset: str,
    losses: Sequence[str] | None,
    seeds: Sequence[int],
    epochs: int | None,
    folder: Path,
    settings: Sequence[str] = (),
) -> dict[tuple[str, int], Config]:
    """The configuration of every row and seed; arguments and errors are those of `reproduce`."""
    recipe = load_recipe(dataset)
    rows = recipe["rows"]
    found = {}
    for name in chosen("losses must be", losses, list(rows)):
        values = merged(merged(recipe["common"], rows[name]), {"name": name})
        for seed, config in seeded(values, seeds, epochs, folder, settings).items():
            found[name, seed] = config
    return found


def paper() -> dict[tuple[str, str, str], str]:
    """The paper's Recall@1 (top-1 of a classification) in percent, by row, metric and data set."""
    return {
        key: numbers.get("recall_at_1") or numbers["top_1"] for key, numbers in published().items()
    }


def task_of(data: str) -> str:
    """What the paper does with a data set."""
    return "retrieval" if data in NAMES.values() else "classification"


def percent(middle: float, spread: float, signed: bool = False) -> str:
    """A share and its spread, in percent."""
    text = f"{100 * middle:+.1f}" if signed else f"{100 * middle:.1f}"
    return text if np.isnan(spread) else f"{text} ± {100 * spread:.1f}"


def rank(middle: float, spread: float) -> str:
    """A rank correlation and its spread."""
    if np.isnan(middle):
        return "undefined"
    return f"{middle:+.2f}" if np.isnan(spread) else f"{middle:+.2f} ± {spread:.2f}"


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page of the comparison, a file like the report of a run.

    Args:
        path: of the HTML file.
        comparison: of all losses.
    """
    tables = {task: comparison.table(task) for task in QUALITIES if comparison.of(task)}
    with rc_context(STYLE):
        page = render(
            "reproduce.html.j2",
            comparison=comparison,
            tables=tables,
            figures={
                (task, name): _differences(comparison, task, name)
                for task in tables
                for name in JUDGED[task]
            },
            count=len(comparison.rows) * len(comparison.seeds) * 2,
            epochs=sorted({config.optim.epochs for config in comparison.configs}),
        )
    write_text(path, page)


def _differences(comparison: Comparison, task: str, name: str) -> str:
    """The difference that the metric makes to a number of each loss, with its interval."""
    rows = comparison.of(task)[::-1]
    middles, halves = zip(*(row.difference(name) for row in rows), strict=True)
    figure, axes = drawing(height=1.1 + 0.3 * len(rows))
    axes.axvline(0, color="#98a1b0", linewidth=1)
    axes.errorbar(
        100 * np.array(middles),
        range(len(rows)),
        xerr=100 * np.nan_to_num(halves),
        fmt="o",
        color=COLORS["introspective"],
        markersize=5,
        linewidth=1.5,
        capsize=3,
    )
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set(xlabel="percentage points", title=f"Δ {QUALITIES[task][name]}")
    axes.grid(axis="x")
    return svg(figure)
