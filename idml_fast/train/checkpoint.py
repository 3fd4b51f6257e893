"""Checkpoints: a run that is stopped, or killed, goes on as if nothing had happened."""

from __future__ import annotations

import pickle
import shutil
import signal
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from .. import __version__
from .._files import written_whole
from .config import Config
from .criterion import Criterion
from .data import Data
from .folder import CHECKPOINTS, RunError, described, difference
from .model import TwoHeaded
from .processes import Processes

# What zipfile, pickle and PyTorch raise on bytes that are no checkpoint; not MemoryError.
FOREIGN = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(RuntimeError, TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error),
    pickle.UnpicklingError,
)


class Interrupted(Exception):
    """A signal has ended a run after a step, which is in a checkpoint; the message says so."""


@dataclass
class Training:
    """All that a step of training changes.

    What is random in training images is not here: it is drawn for every image anew, see `Images`.

    Args:
        scaler: of the gradients in float16; None: there is none.
        order: draws the order of the images, at the beginning of every epoch.
        draws: mixes images.
        epoch: the epoch that is at hand, from 1 on.
        step: how many of its batches are done.
        total: how many batches are done in all.
        steps: the loss and the gradients' lengths in these.
        records: of the epochs before.
    """

    model: TwoHeaded
    criterion: Criterion
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    scaler: GradScaler | None
    order: torch.Generator
    draws: np.random.Generator
    epoch: int = 1
    step: int = 0
    total: int = 0
    steps: list[Tensor] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begun = self.order.get_state()  # before the order of the epoch at hand is drawn

    def end_step(self, seen: Tensor) -> None:
        """A batch is done; the loss and the gradients' lengths in it."""
        self.step, self.total = self.step + 1, self.total + 1
        self.steps.append(seen)

    def end_epoch(self) -> None:
        """All of an epoch is done, and recorded."""
        self.epoch, self.step, self.steps = self.epoch + 1, 0, []
        self._begun = self.order.get_state()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, some of them the very tensors that learn."""
        device = next(self.model.parameters()).device
        on_device = None if device.type == "cpu" else torch.get_device_module(device)
        return {
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler and self.scaler.state_dict(),
            "order": self._begun,
            "draws": self.draws.bit_generator.state,
            "random": torch.get_rng_state(),
            "random_on_device": on_device and on_device.get_rng_state(device),
            "epoch": self.epoch,
            "step": self.step,
            "total": self.total,
            "steps": self.steps,
            "records": self.records,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the order of the epoch at hand is to be drawn again."""
        device = next(self.model.parameters()).device
        for name in ("model", "criterion", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self._begun = state["order"]
        self.order.set_state(self._begun)
        self.draws.bit_generator.state = state["draws"]
        torch.set_rng_state(state["random"])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(state["random_on_device"], device)
        for name in ("epoch", "step", "total", "records"):
            setattr(self, name, state[name])
        self.steps = [x.to(device) for x in state["steps"]]


class Checkpoints:
    """The checkpoints of one metric of a run, in files ``checkpoints/<metric>-<steps>.pt``.

    They are files of ``torch.save`` that hold tensors and plain values alone, read by
    ``weights_only``: no code in them is run.

    Args:
        config: of the run, whose folder is there.
        data: what is trained on.
        name: of the metric.
        processes: all go on from the same one, which the main process has written: of several
            machines each must see the folder.
    """

    def __init__(self, config: Config, data: Data, name: str, processes: Processes) -> None:
        self.processes = processes
        self.name, self.folder = name, config.folder / CHECKPOINTS
        self.every, self.keep = config.run.checkpoint_every, config.run.keep_checkpoints
        self.of = {
            "version": __version__,
            "metric": name,
            "images": len(data.train),
            "config": described(config),
        }

    def keep_up(self, training: Training, came: list[signal.Signals], due: bool = False) -> None:
        """After a step: write a checkpoint if one is due, and end the run if a signal has come.

        Args:
            came: as of `signals`.
            due: whatever the number of the step is.

        Raises:
            Interrupted: a signal has come.
        """
        stop = self.processes.any(bool(came))
        if due or stop or (self.every and training.total % self.every == 0):
            self.write(training)
        if stop:
            self.processes.wait()  # for what is written: the first to end ends the others
            why = came[0].name if came else "a signal to another process"
            raise Interrupted(
                f"stopped by {why} after step {training.total} of {self.name}; "
                "the same command goes on from there"
            )

    def write(self, training: Training) -> None:
        """Write a checkpoint, and remove those that are too old: the main process does."""
        if not self.processes.is_main:
            return
        self.folder.mkdir(exist_ok=True)
        for left_by_a_kill in self.folder.glob(f".{self.name}-*.partial"):
            left_by_a_kill.unlink()
        with written_whole(self.folder / f"{self.name}-{training.total:08}.pt") as partial:
            torch.save({"of": self.of, "training": training.state_dict()}, partial)
        for old in self.paths()[: -self.keep]:
            old.unlink()

    def resume(self, training: Training) -> Path | None:
        """Go back to the newest checkpoint, whose path is returned; None: there is none.

        Raises:
            RunError: it is damaged, or of another run or version.
        """
        path = self.processes.of_main(max(self.paths(), default=None))
        if path is not None:
            training.load_state_dict(self._read(path))
        return path

    def paths(self) -> list[Path]:
        """Those that are there, the oldest first."""
        return sorted(self.folder.glob(f"{self.name}-*.pt"))

    def _read(self, path: Path) -> dict[str, Any]:
        remedy = "remove it to go on from the one before, or from the start"
        try:
            # torch.load does not look at the checksums of the archive.
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            found = None if broken else torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:  # which says nothing of what is in it
            raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
        except FOREIGN:
            found = None
        if not isinstance(found, dict) or found.keys() != {"of", "training"}:
            raise RunError(f"{path} is damaged, or no checkpoint; {remedy}")
        if found["of"] != self.of:
            told = difference(found["of"], self.of)
            raise RunError(f"{path} is a checkpoint of {told}; {remedy}")
        return found["training"]


def remove_checkpoints(config: Config) -> None:
    """Those of a run that is finished: there is nothing to go on with."""
    shutil.rmtree(config.folder / CHECKPOINTS, ignore_errors=True)


@contextmanager
def signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGTERM or SIGINT is appended to when it comes, instead of ending the process.

    A second one does what it did before. Only the main thread may do this; in others nothing
    changes.
    """
    came: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, _: object) -> None:
        came.append(signal.Signals(number))
        restore()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield came
    finally:
        restore()
