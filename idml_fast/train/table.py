"""The paper's Table 1: ours beside theirs, for a cell, a row, a column or all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib import rc_context

from .._files import write_text
from ..evaluation.pictures import COLORS, STYLE, drawing, svg
from .config import Config, config_of
from .criterion import SettingsError
from .data import load_data
from .folder import flat
from .loop import check
from .paper import NAMES, cells, merged, published, recipe
from .processes import Processes, accelerator_of, is_main
from .report import render
from .reproduce import METRICS, Row, percent
from .runs import chosen, over, publish, results_of, seeded, written

SETS = {"cub": "CUB-200-2011", "cars": "Cars196", "sop": "Stanford Online Products"}
NUMBERS = {
    "recall_at_1": "R@1",
    "recall_at_2": "R@2",
    "recall_at_4": "R@4",
    "recall_at_10": "R@10",
    "nmi": "NMI",
    "r_precision": "RP",
    "map_at_r": "MAP@R",
}
PICKED = {"last": "", "best": "best_"}  # the epoch, and how its numbers begin in a run's results


@dataclass(frozen=True)
class Table:
    """Cells of the table, and how they are written.

    Args:
        seeds: of the runs.
        rows: by data set, one for each loss.
        configs: of each cell.
        remarks: sentences about data sets and settings that whoever reads the numbers should know.
    """

    seeds: tuple[int, ...]
    rows: dict[str, list[Row]]
    configs: dict[str, Config]
    remarks: tuple[str, ...] = ()

    def title(self, dataset: str) -> str:
        """As it is shown."""
        return SETS[dataset]

    def numbers(self, dataset: str) -> dict[str, str]:
        """Those that the paper has of a data set, with their short names."""
        data = NAMES[dataset]
        known = {name for key, theirs in published().items() if key[2] == data for name in theirs}
        return {name: short for name, short in NUMBERS.items() if name in known}

    def theirs(self, dataset: str, row: Row, metric: str) -> dict[str, str]:
        """The paper's numbers in percent, by name."""
        return published()[row.name, metric, NAMES[dataset]]

    def difference(self, dataset: str, row: Row, metric: str, picked: str, name: str) -> float:
        """Ours less the paper's, in points; NaN if either is not there."""
        theirs = float(self.theirs(dataset, row, metric).get(name, "nan"))
        return 100 * row.mean(metric, PICKED[picked] + name)[0] - theirs

    def table(self, dataset: str) -> list[list[str]]:
        """The head and the rows of a data set's table, as text, in percent."""
        numbers = self.numbers(dataset)
        table = [["loss", "metric", "", *numbers.values()]]
        for row in self.rows[dataset]:
            for metric in METRICS:
                theirs = self.theirs(dataset, row, metric)
                title = row.title if metric == METRICS[0] else ""
                shown = [theirs.get(name, "") for name in numbers]
                table.append([title, metric, "paper", *shown])
                for picked in PICKED:
                    shown = [self.cell(dataset, row, metric, picked, name) for name in numbers]
                    if any(shown):
                        table.append(["", "", self.epoch(row, metric, picked), *shown])
        return table

    def cell(self, dataset: str, row: Row, metric: str, picked: str, name: str) -> str:
        """Ours, and in brackets how much more than the paper's it is; empty if there is none."""
        middle, spread = row.mean(metric, PICKED[picked] + name)
        if np.isnan(middle):
            return ""
        less = self.difference(dataset, row, metric, picked, name)
        if np.isnan(less):
            return percent(middle, spread)
        return f"{percent(middle, spread)} ({round(less, 1) + 0.0:+.1f})"  # zero: without its sign

    def epoch(self, row: Row, metric: str, picked: str) -> str:
        """Which epoch the numbers are of."""
        if picked == "last":
            return picked
        epochs = row.values(metric, "best_epoch").astype(int)
        return f"best: epoch{'s' * (len(epochs) > 1)} {', '.join(map(str, epochs))}"

    def to_text(self) -> str:
        """The tables for a terminal."""
        lines = []
        for dataset in self.rows:
            table = self.table(dataset)
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines.append(SETS[dataset])
            for line in (table[0], ["─" * width for width in widths], *table[1:]):
                shown = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
                lines.append("  ".join(shown).rstrip())
            lines.append("")
        versions = ", ".join(f"{name} {version(name)}" for name in ("idml_fast", "torch"))
        return "\n".join([*lines, self.note, *(f"{x}." for x in self.remarks), versions])

    @property
    def note(self) -> str:
        """What the numbers of the tables are."""
        return (
            f"In percent, {over(self.seeds)}; in brackets, ours less the paper's, in points. last: "
            "after the last epoch, which is what a network is worth. best: the epoch with the "
            "highest Recall@1, picked on the test classes, as the paper's authors pick theirs: it "
            "looks better on them than it is, and has no NMI, which is computed at the end alone."
        )

    def to_csv(self) -> str:
        """A line for each number: ours of the last epoch and of the best one beside the paper's."""
        lines = [["dataset", "loss", "metric", "seeds", "epoch", "number"]]
        lines[0] += ["mean_percent", "std_percent", "paper_percent", "difference_points"]
        for dataset, row, metric, picked, name in self._all():
            middle, spread = row.mean(metric, PICKED[picked] + name)
            theirs = self.theirs(dataset, row, metric).get(name, "")
            less = self.difference(dataset, row, metric, picked, name)
            about = [dataset, row.name, metric, len(self.seeds), picked, name]
            shown = ["" if np.isnan(x) else round(x, 4) for x in (100 * middle, 100 * spread, less)]
            lines.append([*about, *shown[:2], theirs, shown[2]])
        return written(lines)

    def _all(self) -> Iterator[tuple[str, Row, str, str, str]]:
        for dataset, rows in self.rows.items():
            for row in rows:
                for metric in METRICS:
                    for picked in PICKED:
                        for name in self.numbers(dataset):
                            yield dataset, row, metric, picked, name

    def runs_to_csv(self) -> str:
        """Every number of every run: a line for each data set, loss, metric and seed."""
        runs = [
            ([dataset, row.name, metric, seed], result)
            for dataset, rows in self.rows.items()
            for row in rows
            for metric in METRICS
            for seed, result in zip(self.seeds, row.results[metric], strict=True)
        ]
        names = list(dict.fromkeys(name for _, result in runs for name in result))
        lines = [["dataset", "loss", "metric", "seed", *names]]
        lines += [[*about, *(result.get(name) for name in names)] for about, result in runs]
        return written(lines)


def reproduce_table(
    datasets: Sequence[str] = tuple(SETS),
    data_root: str | Path | None = None,
    *,
    losses: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    epochs: int | None = None,
    folder: str | Path = "runs/paper",
    best: bool = True,
    settings: Sequence[str] = (),
) -> Table:
    """Train losses on data sets as the paper does, with both metrics, and write ours beside theirs.

    A run is written as soon as it is done, to ``<folder>/<dataset>_<loss>/<metric>-<seed>.json``; a
    second call goes on where the first one stopped, also within a run, and one for more cells or
    seeds takes over what is there. At the end there are the table, ``reproduce.txt``,
    ``reproduce.csv`` and ``report.html``, and ``runs.csv`` with every number of every run.

    Args:
        datasets: ``cub``, ``cars``, ``sop``, or several of them.
        data_root: the folder in which their archives lie unpacked.
        losses: rows of the table; None: all.
        seeds: of the weights and the order of the images.
        epochs: of every run; None: as the recipe says.
        folder: where it is written.
        best: judge the test images after every epoch, for the numbers of the best one. To embed
            them takes about a sixth of the time of learning (with mixup); to rank SOP's 60,502 then
            takes seconds to a minute.
        settings: of ``idml-fast train``, for every run, such as ``["--data.batch_size", "60"]``.

    Raises:
        SettingsError: an argument does not fit; the message says which, and what would.
        FileExistsError: the folder holds a run of another configuration.
        FloatingPointError: a loss is no longer finite.
        Interrupted: SIGTERM or SIGINT has come.
        RunError: a checkpoint is damaged, or of another run.
        idml_fast.train.datasets.DataError: a data set, or an image, is not as it should be.
    """
    folder = Path(folder)
    configs = configurations(datasets, data_root, losses, seeds, epochs, folder, settings)
    first = {cell: by_seed[seeds[0]] for cell, by_seed in configs.items()}
    remarks = [*looked_at(first), *changes(first)]
    for remark in remarks if is_main() else ():
        print(f"idml-fast: {remark}")
    runs = {
        (cell, metric, seed): (config, metric)
        for cell, by_seed in configs.items()
        for seed, config in by_seed.items()
        for metric in METRICS
    }
    found = results_of(runs, folder, watch=best)
    rows: dict[str, list[Row]] = {}
    for cell in configs:
        dataset, loss = cells()[cell]
        results = {metric: [found[cell, metric, seed] for seed in seeds] for metric in METRICS}
        rows.setdefault(dataset, []).append(Row(loss, "retrieval", results))
    table = Table(tuple(seeds), rows, first, tuple(remarks))
    publish(table, folder, write_table)
    return table


def configurations(
    datasets: Sequence[str],
    data_root: str | Path | None,
    losses: Sequence[str] | None,
    seeds: Sequence[int],
    epochs: int | None,
    folder: Path,
    settings: Sequence[str],
) -> dict[str, dict[int, Config]]:
    """The configuration of every cell and seed; arguments and errors are those of
    `reproduce_table`."""
    datasets = chosen("dataset must be digits alone, or", datasets, list(SETS))
    known = list(dict.fromkeys(loss for _, loss in cells().values()))
    losses = chosen("loss must be", losses, known)
    if data_root is None:
        raise SettingsError(f"--data-root must be a folder with {', '.join(datasets)}, got none")
    found = {}
    for cell in (f"{dataset}_{loss}" for dataset in datasets for loss in losses):
        values = merged(recipe(cell), {"data": {"root": str(data_root)}})
        found[cell] = seeded(values, seeds, epochs, folder, settings)
    return found


def looked_at(configs: dict[str, Config]) -> list[str]:
    """The remarks on the data sets.

    Args:
        configs: of each cell.

    Raises:
        DataError: a data set is not as it should be.
        SettingsError: the network, its weights or a loss does not fit a data set.
    """
    remarks = []
    counts: dict[str, int] = {}
    for config in configs.values():
        metric = config.metrics["introspective"]
        if config.data.name not in counts:
            data = load_data(config.data, config.run.seed)
            check(config, data, Processes(accelerator_of(config)))
            counts[config.data.name] = data.num_classes
            remarks += data.remarks
        config.criterion(metric, counts[config.data.name])
    return remarks


def changes(configs: dict[str, Config]) -> list[str]:
    """In a sentence, if there are any, the settings that are not those of the recipes.

    Args:
        configs: of each cell.
    """
    told: dict[str, None] = {}  # each once, in their order
    for cell, config in configs.items():
        root = {"data": {"root": config.data.root}}
        theirs = flat(asdict(config_of(merged(recipe(cell), root))))
        for name, ours in flat(asdict(config)).items():
            # How often, where and by how many something is done changes no result.
            free = name == "data.workers" or name.startswith("run.")
            if ours != theirs.get(name) and (not free or name == "run.mixed_precision"):
                told[f"{name} {ours} ({theirs.get(name)})"] = None
    return [f"not as in the recipes (in brackets): {', '.join(told)}"] if told else []


def write_table(path: Path, table: Table) -> None:
    """Write the page of the table, a file like the report of a run.

    Args:
        path: of the HTML file.
        table: ours beside the paper's.
    """
    with rc_context(STYLE):
        page = render(
            "table.html.j2",
            table=table,
            figures={dataset: _beside_theirs(table, dataset) for dataset in table.rows},
            epochs=sorted({config.optim.epochs for config in table.configs.values()}),
        )
    write_text(path, page)


def _beside_theirs(table: Table, dataset: str) -> str:
    """Recall@1 of each loss after the last epoch, ours filled and the paper's hollow."""
    rows = table.rows[dataset][::-1]
    figure, axes = drawing(height=1.1 + 0.5 * len(rows))
    for place, row in enumerate(rows):
        for metric, up in (("conventional", 0.15), ("introspective", -0.15)):
            ours = 100 * row.mean(metric, "recall_at_1")[0]
            theirs = float(table.theirs(dataset, row, metric)["recall_at_1"])
            color = COLORS[metric]
            axes.plot([theirs, ours], [place + up] * 2, color=color, linewidth=1)
            axes.plot(theirs, place + up, "o", color=color, markerfacecolor="white", markersize=5)
            label = metric if place == 0 else None
            axes.plot(ours, place + up, "o", color=color, markersize=5, label=label)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("Recall@1 in percent")
    axes.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=2)  # there is no room within
    return svg(figure)
