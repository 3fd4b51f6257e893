"""The trainer: what a run writes, that it is the same twice, and that nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from idml_fast import Metric, backend, losses
from idml_fast.train import Config, TwoHeaded, load, load_config, run
from idml_fast.train.config import LossConfig, ModelConfig, OptimConfig, RunConfig
from idml_fast.train.data import load_data
from idml_fast.train.folder import FILES, open_folder, to_json, write_text, written_whole
from idml_fast.train.loop import stays_on_cpu, train
from idml_fast.train.model import save
from idml_fast.train.optim import adamw

METRICS = ("conventional", "introspective")


def tiny(folder: Path, **changes) -> Config:
    """Two epochs of a very small network."""
    config = Config(
        name="tiny",
        model=ModelConfig(width=4, sem_dim=8, unc_dim=4),
        optim=OptimConfig(epochs=2, lr=1e-3),
        run=RunConfig(folder=str(folder), cpu=True),
    )
    return replace(config, **changes)


def trained(config: Config, metric: Metric) -> tuple[TwoHeaded, list[dict]]:
    """A network trained with one metric, and its epochs."""
    lines: list[dict] = []
    accelerator = Accelerator(cpu=True)
    data = load_data(config.data)
    return train(accelerator, config, data, "metric", metric, lines.append), lines


@pytest.fixture(autouse=True)
def one_thread():
    """What `run` does by default: sums do not depend on how many threads there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and its results."""
    config = tiny(tmp_path_factory.mktemp("runs"))
    return config, run(config)


@pytest.mark.parametrize(
    ("gpu", "serves", "asked", "stays"),
    [
        (None, False, False, False),  # accelerate then takes the CPU by itself
        ("cuda", False, False, True),
        ("cuda", False, True, True),
        ("cuda", True, False, False),
        ("cuda", True, True, True),
    ],
)
def test_stays_on_the_cpu_where_no_kernel_serves_the_gpu(
    monkeypatch, capsys, gpu, serves, asked, stays
):
    device = None if gpu is None else torch.device(gpu)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    monkeypatch.setattr(backend, "refusals", lambda *_: {"triton": None if serves else "no"})
    assert stays_on_cpu(Config(run=RunConfig(cpu=asked))) == stays
    assert ("no kernel serves cuda" in capsys.readouterr().out) == (stays and not asked)


def test_a_run_writes_its_files_and_nothing_else(finished):
    config, _ = finished
    assert sorted(path.name for path in config.folder.iterdir()) == sorted(FILES)


def test_metrics_have_a_line_an_epoch(finished):
    config, results = finished
    text = (config.folder / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [(line["metric"], line["epoch"]) for line in lines] == [
        (metric, epoch) for metric in METRICS for epoch in (1, 2)
    ]
    for line in lines:
        reads_unc = line["metric"] == "introspective"
        assert line["loss"] > 0
        assert line["sem_grad_norm"] > 0
        assert 0 < line["map_at_r"] <= line["r_precision"] <= 1
        assert line["recall_at_1"] <= line["recall_at_2"] <= line["recall_at_4"]
        for name in ("unc_grad_norm", "unc_norm_mean", "unc_norm_std"):
            assert (line[name] is not None) == reads_unc
    # The table is about the last epoch.
    for metric, last in zip(METRICS, lines[1::2], strict=True):
        assert results[metric]["recall_at_1"] == last["recall_at_1"]
    assert json.loads((config.folder / "results.json").read_text()) == results


def test_the_uncertainty_is_alive(finished):
    _, results = finished
    introspective = results["introspective"]
    assert introspective["unc_grad_norm"] > 1e-2
    assert introspective["unc_norm_std"] > 1e-3
    for name in ("blur", "noise", "occlusion"):
        assert -1 <= introspective[f"spearman_{name}"] <= 1
        assert results["conventional"][f"spearman_{name}"] is None


def test_training_goes_through_the_library(tmp_path, monkeypatch):
    seen = []
    rowstats = losses._loss.rowstats

    def watched(*arguments, **named):
        if len(arguments[2]):  # a loss checks its settings with no items
            seen.append(named["metric"])
        return rowstats(*arguments, **named)

    monkeypatch.setattr(losses._loss, "rowstats", watched)
    config = tiny(tmp_path)
    trained(config, config.metric)
    steps = -(-len(load_data(config.data).train_images) // config.data.batch_size)
    assert seen == [Metric(5.0, 0.0, "cosine")] * (2 * steps)


def test_the_loss_falls_and_training_classes_come_together(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=4, lr=2e-3))
    _, lines = trained(config, config.metric)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    config, results = finished
    again = replace(config, run=replace(config.run, folder=str(tmp_path)))
    assert run(again) == results
    for name in ("metrics.jsonl", "conventional.safetensors", "introspective.safetensors"):
        assert (again.folder / name).read_bytes() == (config.folder / name).read_bytes(), name


def test_a_run_gives_the_threads_back(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("idml_fast.train.loop._run", lambda _: seen.append(torch.get_num_threads()))
    torch.set_num_threads(3)
    config = tiny(tmp_path)
    for threads in (1, 2, None):
        run(replace(config, run=replace(config.run, threads=threads)))
    assert seen == [1, 2, 3]
    assert torch.get_num_threads() == 3


def test_another_seed_gives_another_run(tmp_path):
    config = tiny(tmp_path)
    other = replace(config, run=replace(config.run, seed=1))
    assert trained(config, config.metric)[1] != trained(other, config.metric)[1]


def test_both_metrics_start_from_the_same_weights_and_batches(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=1, lr=1e-12, proxy_lr=1.0))
    plain, plain_lines = trained(config, Metric.plain("cosine"))
    ours, _ = trained(config, config.metric)
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    # A metric that is as good as conventional learns the same from the same batches.
    _, near_lines = trained(config, Metric(1e9, 0.0, "cosine"))
    assert near_lines[0]["loss"] == pytest.approx(plain_lines[0]["loss"], rel=1e-5)


def test_the_conventional_metric_leaves_the_uncertainty_head_alone(tmp_path):
    config = tiny(tmp_path)
    plain, _ = trained(config, Metric.plain("cosine"))
    still, _ = trained(replace(config, optim=OptimConfig(lr=1e-12, epochs=1)), config.metric)
    assert torch.allclose(plain.unc.weight, still.unc.weight, atol=1e-9)
    assert not torch.allclose(plain.sem.weight, still.sem.weight, atol=1e-4)


def test_only_the_heads_learn_in_the_warm_up(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=1, warmup_epochs=1))
    model, _ = trained(config, config.metric)
    start, _ = trained(tiny(tmp_path, optim=OptimConfig(epochs=1, lr=1e-12)), config.metric)
    before, after = start.state_dict(), model.state_dict()
    for name in after:
        same = torch.allclose(before[name], after[name], atol=1e-9)
        assert same == name.startswith("trunk."), name


def test_learning_rates_by_epoch():
    config = OptimConfig(warmup_epochs=2, lr=0.1, proxy_lr=100, step=3, decay=0.5)
    model = TwoHeaded(ModelConfig(width=4, sem_dim=8, unc_dim=4), 1, (8, 8))
    optimizer, schedule = adamw(config, model, losses.ProxyAnchorLoss(5, 8))
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    assert rates == [
        pytest.approx(wanted)
        for wanted in ([0, 0.1, 10], [0, 0.1, 10], [0.1, 0.1, 10], [0.05, 0.05, 5])
    ]


def test_proxies_may_have_uncertainties_too(tmp_path):
    config = tiny(tmp_path, loss=LossConfig(proxy_unc="learned"))
    _, lines = trained(config, config.metric)
    _, fixed = trained(tiny(tmp_path), config.metric)
    assert lines[-1]["loss"] != fixed[-1]["loss"]


def test_the_released_form_trains(tmp_path):
    config = tiny(tmp_path, metric=Metric.official())
    _, lines = trained(config, config.metric)
    assert lines[-1]["loss"] > 0


def test_mixed_precision(tmp_path):
    config = tiny(tmp_path)
    AcceleratorState._reset_state()  # one process has one precision, but for this test
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    lines: list[dict] = []
    data = load_data(config.data)
    model = train(accelerator, config, data, "metric", config.metric, lines.append)
    sem, unc = model(data.test_images[:3])
    AcceleratorState._reset_state()
    assert sem.dtype == unc.dtype == torch.float32  # what the loss is given
    assert torch.equal(unc, unc.bfloat16().float())  # what the network computed in
    assert lines[-1]["loss"] > 0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=3, lr=1e30))
    with pytest.raises(FloatingPointError, match=r"the loss is \S+ in epoch \d; lower optim.lr"):
        trained(config, config.metric)


def test_the_model_normalises_sem_and_not_unc():
    model = TwoHeaded(ModelConfig(width=6, sem_dim=5, unc_dim=3), 3, (12, 9))
    sem, unc = model(torch.rand(7, 3, 12, 9))
    assert sem.shape == (7, 5)
    assert unc.shape == (7, 3)
    assert torch.allclose(sem.norm(dim=1), torch.ones(7))
    assert unc.norm(dim=1).std() > 0


def test_an_embedding_depends_on_its_own_image_alone():
    model = TwoHeaded(ModelConfig(width=4, sem_dim=5, unc_dim=3), 1, (8, 8)).train()
    images = torch.rand(6, 1, 8, 8)
    assert torch.allclose(model(images)[0][:1], model(images[:1])[0], atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_model_comes_back_bit_for_bit(finished, metric):
    config, _ = finished
    images = load_data(config.data).test_images
    model, learned = load(config.folder / f"{metric}.safetensors")
    assert learned == (config.metric if metric == "introspective" else Metric.plain("cosine"))
    assert not model.training
    again, _ = trained(config, learned)
    again.eval()
    for one, other in zip(model(images), again(images), strict=True):
        assert torch.equal(one, other)


def test_saving_and_loading_keeps_every_bit(tmp_path):
    model = TwoHeaded(ModelConfig(width=6, sem_dim=5, unc_dim=3), 3, (12, 9)).eval()
    images = torch.rand(4, 3, 12, 9)
    save(model, Metric(2.0, 0.5, "cosine"), tmp_path / "model.safetensors")
    again, metric = load(tmp_path / "model.safetensors")
    assert metric == Metric(2.0, 0.5, "cosine")
    for one, other in zip(model(images), again(images), strict=True):
        assert torch.equal(one, other)


def test_load_refuses_other_files(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="path must be a model that idml-fast train has written"):
        load(tmp_path / "other.safetensors")


def test_digits_are_split_by_class():
    data = load_data(Config().data)
    assert data.train_images.shape == (901, 1, 8, 8)
    assert data.test_images.shape == (896, 1, 8, 8)
    assert data.train_labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert data.test_labels.unique().tolist() == [5, 6, 7, 8, 9]
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)


def test_training_labels_count_from_zero():
    config = Config().data
    data = load_data(replace(config, train_classes=[9, 3], test_classes=[1, 2]))
    assert data.train_labels.unique().tolist() == [0, 1]
    assert data.test_labels.unique().tolist() == [1, 2]
    every = load_data(replace(config, train_classes=[3, 9]))
    assert torch.equal(every.train_images, data.train_images)


def test_the_same_configuration_runs_again(tmp_path):
    config = tiny(tmp_path)
    folder = open_folder(config)
    (folder / "introspective.safetensors").write_text("trained")
    assert open_folder(config) == folder
    # Nothing is removed before its successor is there.
    assert (folder / "introspective.safetensors").read_text() == "trained"


def test_another_configuration_is_refused_and_nothing_touched(tmp_path):
    folder = open_folder(tiny(tmp_path))
    (folder / "introspective.safetensors").write_text("trained")
    before = (folder / "config.yaml").read_text()
    other = tiny(tmp_path, optim=OptimConfig(epochs=2, lr=0.5))
    with pytest.raises(FileExistsError, match=r"optim\.lr 0\.001 there, 0\.5 here.*overwrite"):
        open_folder(other)
    assert (folder / "config.yaml").read_text() == before
    assert (folder / "introspective.safetensors").read_text() == "trained"


def test_overwrite_removes_the_other_run_and_only_it(tmp_path):
    config = tiny(tmp_path)
    folder = open_folder(config)
    (folder / "introspective.safetensors").write_text("trained")
    (folder / "notes.txt").write_text("mine")
    other = tiny(tmp_path, optim=OptimConfig(epochs=2, lr=0.5))
    open_folder(replace(other, run=replace(other.run, overwrite=True)))
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "notes.txt"]
    # The permission was for that one time.
    open_folder(other)
    with pytest.raises(FileExistsError):
        open_folder(config)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    config = tiny(tmp_path)
    config.folder.mkdir()
    (config.folder / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="tiny holds files that are no run"):
        open_folder(config)


def test_what_is_killed_while_writing_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_text(path, "before")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as partial:
        partial.write_text("hal")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_run_leaves_whole_files(tmp_path):
    arguments = ["--name", "killed", "--run.folder", str(tmp_path), "--optim.epochs", "100000"]
    arguments += ["--model.width", "4", "--model.sem_dim", "8", "--model.unc_dim", "4"]
    code = "import sys; from idml_fast.cli import main; main(sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-c", code, "train", *arguments]) as process:
        metrics = tmp_path / "killed" / "metrics.jsonl"
        patience = time.monotonic() + 120
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < patience, "the run has not come to its third epoch"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    lines = metrics.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    whole = {path.name for path in metrics.parent.iterdir() if not path.name.startswith(".")}
    assert whole == {"config.yaml", "metrics.jsonl"}
    load_config(["--config", str(metrics.parent / "config.yaml")])


def test_json_has_no_nan():
    assert json.loads(to_json({"a": float("nan"), "b": {"c": float("inf")}, "d": 0.5})) == {
        "a": None,
        "b": {"c": None},
        "d": 0.5,
    }
