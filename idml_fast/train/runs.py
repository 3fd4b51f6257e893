"""Runs that are compared: each is trained once, and written as soon as it is done."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .._files import write_text
from .checkpoint import Checkpoints
from .config import Config, config_of
from .criterion import SettingsError
from .data import load_data
from .folder import CHECKPOINTS, described, difference, flat, to_json
from .loop import train
from .outcome import evaluate
from .paper import merged
from .processes import Processes, accelerator_of, is_main
from .tracking import tracked

# What a run is called by: no argument of the command line may change it.
OWN = ("name", "data.name", "loss.name", "run.seed", "run.folder")
Run = tuple[str, str, int]  # the row, with which metric, the seed
Results = dict[str, float | None]  # the numbers of a run; None for what its metric lacks


def chosen(wanted: str, names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those of the known names that were asked for; None: all.

    Args:
        wanted: begins the message about those that are not: "losses must be".

    Raises:
        SettingsError: one is not known, is there twice, or there is none.
    """
    names = list(known if names is None else names)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        got = unknown[0] if unknown else names
        raise SettingsError(f"{wanted} different ones of {', '.join(known)}, got {got}")
    return names


def seeded(
    values: dict[str, Any],
    seeds: Sequence[int],
    epochs: int | None,
    folder: Path,
    settings: Sequence[str] = (),
) -> dict[int, Config]:
    """The configuration of nested values for every seed; errors are those of `reproduce`."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise SettingsError(f"seeds must be different numbers >= 0, got {list(seeds)}")
    if epochs is not None and epochs < 1:
        raise SettingsError(f"epochs must be >= 1, got {epochs}")
    if epochs is not None:
        values = merged(values, {"optim": {"epochs": epochs}})
    runs = {seed: {"seed": int(seed), "folder": str(folder)} for seed in seeds}
    return {seed: configured(merged(values, {"run": run}), settings) for seed, run in runs.items()}


def configured(values: dict[str, Any], settings: Sequence[str]) -> Config:
    """The configuration of nested values, and of settings that override them.

    Raises:
        SettingsError: one does not fit, or is what the run is called by.
    """
    try:
        config = config_of(values, settings)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise SettingsError(" ".join(str(error).split())) from None
    wanted, got = flat(values), flat(asdict(config))
    for name in OWN:
        if name in wanted and got[name] != wanted[name]:
            raise SettingsError(f"{name} must be {wanted[name]} here, got {got[name]}")
    return config


def results_of(
    runs: dict[Run, tuple[Config, str]], folder: Path, watch: bool = False
) -> dict[Run, Results]:
    """The results of all runs; those that are not in the folder are trained, and written each as
    soon as it is done.

    Args:
        runs: the configuration of each, and which of its metrics is trained.
        folder: of the comparison.
        watch: see `run_one`.

    Raises:
        FileExistsError: the folder holds a run of another configuration.
        Interrupted: SIGTERM or SIGINT has come.
        RunError: a checkpoint is damaged, or of another run.
    """
    # All are looked at before the first is trained.
    found = {run: read(path_of(folder, *run), config) for run, (config, _) in runs.items()}
    missing = [run for run, results in found.items() if results is None]
    with tqdm(missing, unit="run", disable=None if is_main() else True) as progress:
        for run in progress:
            progress.set_description("{}, {}, seed {}".format(*run))
            config, metric = runs[run]
            path = path_of(folder, *run)
            path.parent.mkdir(parents=True, exist_ok=True)
            found[run] = run_one(config, metric, path.stem, watch)
            if is_main():
                done = {"config": described(config), "results": found[run]}
                write_text(path, to_json(done, indent=1) + "\n")
                remove_checkpoints(path)
    return found


def run_one(config: Config, metric: str, name: str, watch: bool = False) -> Results:
    """Train one network, and what it is worth after its last epoch, in all processes.

    Args:
        metric: of the configuration.
        name: of the run: in its progress bar, for a tracker, and of its checkpoints, from the
            newest of which it goes on.
        watch: also what it is worth in its best epoch, see `best_of`: all test images are judged
            after every epoch.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.run.threads or threads)
    try:
        processes = Processes(accelerator_of(config))
        data = load_data(config.data, config.run.seed)
        lines: list[dict[str, Any]] = []
        arguments = processes, config, data, name, config.metrics[metric], lines.append, watch
        with tracked(processes.accelerator, config, name):
            trained = train(*arguments, Checkpoints(config, data, name, processes))
        outcome = evaluate(*trained, config, data, lines, processes)
        processes.accelerator.free_memory()
        found = outcome and outcome.results | (best_of(lines) if watch else {})
        return processes.of_main(found)
    finally:
        torch.set_num_threads(threads)


def best_of(epochs: Sequence[dict[str, Any]]) -> Results:
    """The numbers of the epoch whose Recall@1 on the test classes is the highest, the first of
    several; their names begin with ``best_``. What is picked on the test classes looks better on
    them than it is.

    None, if not all epochs were judged: a run may have begun without being watched.

    >>> best_of([{"epoch": 1, "recall_at_1": 0.7}, {"epoch": 2, "recall_at_1": 0.6}])
    {'best_epoch': 1, 'best_recall_at_1': 0.7}
    """
    if not all("recall_at_1" in line for line in epochs):
        return {}
    best = max(epochs, key=lambda line: line["recall_at_1"])
    return {f"best_{name}": value for name, value in best.items() if name != "metric"}


def remove_checkpoints(path: Path) -> None:
    """Those of the run whose results are in that file; other runs keep theirs."""
    folder = path.parent / CHECKPOINTS
    for checkpoint in folder.glob(f"{path.stem}-*.pt"):
        checkpoint.unlink()
    with suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


def path_of(folder: Path, name: str, metric: str, seed: int) -> Path:
    """The file of one run."""
    return folder / name / f"{metric}-{seed}.json"


def read(path: Path, config: Config) -> Results | None:
    """The results of a run that is done; None if it is not.

    Raises:
        FileExistsError: the file is of another configuration.
    """
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text("utf-8"))
        before, results = done["config"], done["results"]
    except (ValueError, KeyError, TypeError):
        raise FileExistsError(f"{path} is no result of a run; remove it or its folder") from None
    if before != described(config):
        told = difference(before, described(config))
        raise FileExistsError(f"{path} holds {told}; choose another --folder, or remove that one")
    return results


def publish(found: Any, folder: Path, write_page: Callable[[Path, Any], None]) -> None:
    """Write what runs have come to as text, as CSV and as a page, and every run; the main process
    does.

    Args:
        found: has ``to_text``, ``to_csv`` and ``runs_to_csv``.
        folder: where all is written.
        write_page: takes a path, and ``found``.
    """
    if not is_main():
        return
    write_text(folder / "reproduce.txt", found.to_text() + "\n")
    write_text(folder / "reproduce.csv", found.to_csv())
    write_text(folder / "runs.csv", found.runs_to_csv())
    write_page(folder / "report.html", found)
    print(f"\n{found.to_text()}\n\n{folder / 'report.html'}")


def over(seeds: Sequence[int]) -> str:
    """In words, what a cell of a table is."""
    return f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "of one seed"


def written(lines: list[list[Any]]) -> str:
    """Lines as CSV; None is an empty cell."""
    buffer = StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()
