"""Trackers of experiments, and the progress bar."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from idml_fast import cli
from idml_fast.train import Config, run, tracking
from idml_fast.train.checkpoint import Interrupted
from idml_fast.train.config import ModelConfig, OptimConfig, RunConfig
from idml_fast.train.criterion import SettingsError
from idml_fast.train.processes import accelerator_of
from idml_fast.train.tracking import Progress, add_row, log_with

METRICS = "conventional", "introspective"


@pytest.fixture
def small(tmp_path):
    """Two epochs of a very small network."""
    return Config(
        name="small",
        model=ModelConfig(width=4, sem_dim=8, unc_dim=4),
        optim=OptimConfig(epochs=2, lr=1e-3),
        run=RunConfig(folder=str(tmp_path), cpu=True),
    )


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv(small):
    small.run.tracker = "csv"
    run(small)
    table = rows(small.folder / "metrics.csv")
    assert [(row["metric"], row["epoch"]) for row in table] == [
        (metric, str(epoch)) for metric in METRICS for epoch in (1, 2)
    ]
    for row in table:
        assert 0 < float(row["recall_at_1"]) <= 1
        assert float(row["images_per_second"]) > 0
        assert 0 <= float(row["data_wait"]) < 1
        assert (row["unc_grad_norm"] == "") == (row["metric"] == "conventional")


def test_a_row_replaces_that_of_the_same_epoch(tmp_path):
    path = tmp_path / "metrics.csv"
    for epoch, loss in [(1, 3.0), (2, 2.0), (3, 1.0), (2, 9.0)]:
        add_row(path, {"metric": "one", "epoch": epoch, "loss": loss, "unc_norm": None})
    add_row(path, {"metric": "other", "epoch": 2, "loss": 4.0, "unc_norm": 0.5})
    table = [(row["metric"], row["epoch"], row["loss"], row["unc_norm"]) for row in rows(path)]
    assert table == [
        ("one", "1", "3.0", ""),
        ("one", "3", "1.0", ""),
        ("one", "2", "9.0", ""),
        ("other", "2", "4.0", "0.5"),
    ]


def test_tensorboard(small):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    small.run.tracker = "tensorboard"
    results = run(small)
    for metric in METRICS:
        told = reader.EventAccumulator(str(small.folder / "tensorboard" / metric)).Reload()
        recall = told.Scalars("recall_at_1")
        assert [event.step for event in recall] == [1, 2]
        assert recall[-1].value == pytest.approx(results[metric]["recall_at_1"])
        assert len(told.Scalars("images_per_second")) == 2
        assert ("unc_grad_norm" in told.Tags()["scalars"]) == (metric == "introspective")


def test_a_run_that_replaces_another_leaves_none_of_its_numbers(small):
    small.run.tracker = "csv"
    run(small)
    (small.folder / "tensorboard").mkdir()
    other = replace(small, optim=OptimConfig(epochs=1, lr=1e-3))
    other.run.overwrite = True
    run(other)
    assert len(rows(small.folder / "metrics.csv")) == 2
    assert not (small.folder / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(small, monkeypatch, name):
    monkeypatch.setitem(tracking.TRACKERS, name, lambda: False)
    small.run.tracker = name
    with pytest.raises(
        SettingsError, match=rf"run\.tracker {name} needs {name}: pip install {name}"
    ):
        run(small)
    assert not small.folder.exists()
    monkeypatch.setitem(tracking.TRACKERS, name, lambda: True)
    assert log_with(small) == name


def test_a_tracker_that_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--tracker", "abacus"])
    assert "abacus" in capsys.readouterr().err


def test_the_tracker_is_ended_when_the_run_is_stopped(small, monkeypatch):
    ended = []

    class Tracker:
        def finish(self):
            ended.append(True)

    accelerator = accelerator_of(small)
    monkeypatch.setattr(
        accelerator, "init_trackers", lambda *_: accelerator.trackers.append(Tracker())
    )
    with pytest.raises(Interrupted), tracking.tracked(accelerator, small, "introspective"):
        raise Interrupted
    assert ended == [True]
    assert accelerator.trackers == []


def test_the_bar_tells_loss_rate_and_wait(monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(tracking, "tqdm", lambda **options: bar(told, **options))
    progress = Progress("introspective", epochs=3, images=4, done=4, shown=True)
    progress.refreshed = 0  # longer ago than a second

    def slow():
        for _ in range(2):
            time.sleep(0.05)
            yield None

    for _ in progress.epoch(2, slow()):
        time.sleep(0.05)
        progress.step(2, torch.tensor(1.25))
    rates = progress.rates()
    assert 0.3 < rates["data_wait"] < 0.7
    assert 4 / 0.4 < rates["images_per_second"] <= 4 / 0.2
    progress.tell(**{"R@1": "50.0%"})
    progress.bar.close()
    last = told.getvalue().rsplit("\r", 1)[-1]
    for part in ("introspective 2/3", "8.00/12.0", "images/s", "loss=1.250", "wait=", "R@1=50.0%"):
        assert part in last


def bar(told: io.StringIO, **options):
    """A bar that is written there as if there were a terminal."""
    return tracking_tqdm(**{**options, "disable": False, "file": told, "mininterval": 0})


tracking_tqdm = tracking.tqdm


def test_half_precision_needs_a_gpu(small):
    small.run.mixed_precision = "fp16"
    with pytest.raises(SettingsError, match="must be no or bf16 on the CPU, got fp16"):
        accelerator_of(small)
    assert not small.folder.exists()
