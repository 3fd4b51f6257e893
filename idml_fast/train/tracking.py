"""What is told while a run goes on: a progress bar, and a tracker of experiments."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import (
    is_mlflow_available,
    is_tensorboard_available,
    is_wandb_available,
)
from torch import Tensor
from tqdm import tqdm

from .._files import write_text
from .config import Config
from .criterion import SettingsError
from .folder import CSV, described, flat

TRACKERS = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
}
PROJECT = "idml_fast"  # in W&B and MLflow


def log_with(config: Config) -> str | None:
    """The tracker, as accelerate calls it; None: there is none, or it is a file of ours.

    Raises:
        SettingsError: its package is not installed.
    """
    name = config.run.tracker
    if name not in TRACKERS:
        return None
    if not TRACKERS[name]():
        raise SettingsError(f"run.tracker {name} needs {name}: pip install {name}")
    return name


@contextmanager
def tracked(accelerator: Accelerator, config: Config, metric: str) -> Iterator[None]:
    """Within the block a run of the tracker, if there is one: of this metric, told the settings.

    TensorBoard's files are in ``<folder>/<name>/tensorboard/<metric>``.
    """
    name = f"{config.name}, {metric}"
    options = {
        "wandb": {"name": name, "group": config.name, "dir": str(config.folder)},
        "mlflow": {"run_name": name},
    }
    settings = {key: str(value) for key, value in flat(described(config)).items()}
    project = metric if config.run.tracker == "tensorboard" else PROJECT
    accelerator.init_trackers(project, settings | {"metric": metric}, options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def log(accelerator: Accelerator, config: Config, line: dict[str, Any]) -> None:
    """The record of an epoch, to the tracker if there is one."""
    numbers = {name: x for name, x in line.items() if isinstance(x, float)}
    accelerator.log(numbers, step=line["epoch"])
    if config.run.tracker == "csv":
        add_row(config.folder / CSV, line)


def add_row(path: Path, line: dict[str, Any]) -> None:
    """Write the record into the table, instead of one of the same metric and epoch; None as an
    empty cell."""
    kept = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            key = line["metric"], str(line["epoch"])
            kept = [row for row in csv.DictReader(file) if (row["metric"], row["epoch"]) != key]
    buffer = StringIO()
    writer = csv.DictWriter(buffer, line, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, line])
    write_text(path, buffer.getvalue())


class Progress:
    """A bar of the images that are learned, their rate, and the share of time spent waiting.

    The trainer waits when the next batch is not ready as it asks for it. On a GPU, which works on
    by itself, that is more than the time in which nothing is done.

    Args:
        name: of the metric.
        epochs: of the run.
        images: of an epoch.
        done: images that are learned already.
        shown: whether there is a bar, if there is a terminal.
    """

    def __init__(self, name: str, epochs: int, images: int, done: int, shown: bool) -> None:
        self.name, self.epochs = name, epochs
        self.told: dict[str, str] = {}
        self.bar = tqdm(
            desc=name,
            total=epochs * images,
            initial=done,
            unit=" images",
            unit_scale=True,
            disable=None if shown else True,
        )
        self.refreshed = time.monotonic()

    def epoch(self, number: int, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of an epoch, which begins."""
        self.bar.set_description(f"{self.name} {number}/{self.epochs}")
        self.images, self.waited, self.began = 0, 0.0, time.perf_counter()
        asked = self.began
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def step(self, images: int, loss: Tensor) -> None:
        """So many more images are learned. The loss is read once a second: a GPU is waited for."""
        self.images += images
        self.bar.update(images)
        if not self.bar.disable and time.monotonic() > self.refreshed + 1:
            self.tell(loss=f"{loss.item():.3f}", wait=f"{self.rates()['data_wait']:.0%}")
            self.refreshed = time.monotonic()

    def rates(self) -> dict[str, float]:
        """Of the epoch so far: images per second, and the share of time spent waiting for them."""
        seconds = time.perf_counter() - self.began
        return {"images_per_second": self.images / seconds, "data_wait": self.waited / seconds}

    def tell(self, **numbers: str) -> None:
        """Show these beside the bar."""
        self.told |= numbers
        self.bar.set_postfix(self.told)
