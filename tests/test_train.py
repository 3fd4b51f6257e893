"""The trainer: what a run writes, that it is the same twice, and that nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from idml_fast import Metric, backend, losses
from idml_fast._files import write_text, written_whole
from idml_fast.evaluation import CORRUPTIONS
from idml_fast.train import Config, TwoHeaded, load, load_config, load_loss, run
from idml_fast.train.config import (
    DataConfig,
    LossConfig,
    MetricConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from idml_fast.train.criterion import LOSSES, TASKS
from idml_fast.train.data import load_data
from idml_fast.train.folder import FILES, open_folder, to_json
from idml_fast.train.loop import batch_loss, train
from idml_fast.train.mixing import mix
from idml_fast.train.model import save
from idml_fast.train.optim import adamw
from idml_fast.train.outcome import uncertainties
from idml_fast.train.processes import Processes, stays_on_cpu

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
    processes = Processes(Accelerator(cpu=True))
    data = load_data(config.data)
    model, _ = train(processes, config, data, "metric", metric, lines.append)
    return model, lines


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
        (None, False, False, True),
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
    config = Config(run=RunConfig(cpu=asked))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    monkeypatch.setattr(backend, "refusals", lambda *_: {"triton": None if serves else "no"})
    assert stays_on_cpu(config) == stays
    assert ("no kernel serves cuda" in capsys.readouterr().out) == (
        gpu == "cuda" and stays and not asked
    )


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
    assert introspective["unc_alive"] == 1
    assert introspective["unc_variation"] > 0.01
    for name in CORRUPTIONS:
        assert -1 <= introspective[f"spearman_{name}"] <= 1
        assert results["conventional"][f"spearman_{name}"] is None
    for name in ("error_auroc", "aurc", "pair_auroc", "ece", "brier", "ood_auroc"):
        assert 0 <= introspective[name] <= 1
        assert results["conventional"][name] is None
    for result in results.values():
        assert 0 < result["brier_distance"] < 0.25


def test_candidates_are_written_with_their_intervals_beside_the_recall(finished):
    config, results = finished
    tables = json.loads((config.folder / "uncertainty.json").read_text())
    assert list(tables) == list(METRICS)
    baselines = ["sem_norm", "proxy_distance", "proxy_entropy", "mc_dropout"]
    assert list(tables["conventional"]["rows"]) == baselines
    assert list(tables["introspective"]["rows"]) == ["unc_norm", *baselines]
    for name, found in tables.items():
        assert found["right"]["value"] == results[name]["recall_at_1"]
        assert found["unmatched"] == 0
        for row in found["rows"].values():
            for number in row.values():
                assert number["low"] < number["high"]
    for name, number in tables["introspective"]["rows"]["unc_norm"].items():
        assert number["value"] == results["introspective"][name]


@pytest.mark.parametrize("name", ["proxy_anchor", "proxy_nca", "contrastive", "softmax"])
def test_candidates_of_every_kind_of_loss(tmp_path, name):
    task = "classification" if name == "softmax" else "retrieval"
    config = tiny(tmp_path, data=DataConfig(task=task), loss=LossConfig(name=name))
    metric = config.metrics["introspective"]
    model = TwoHeaded(config.model, 1, (8, 8)).eval()
    criterion, images = config.criterion(metric), torch.rand(50, 1, 8, 8)
    with torch.no_grad():
        found = uncertainties(model, criterion, images.split(20))
        sem, unc = model(images)
        raw = model.sem(model.features(images))
        assert torch.allclose(found["unc_norm"], unc.norm(dim=1))
        assert torch.allclose(found["sem_norm"], -raw.norm(dim=1))
        assert torch.allclose(raw / raw.norm(dim=1, keepdim=True), sem, atol=1e-6)
        if name == "contrastive":
            assert set(found) == {"unc_norm", "sem_norm", "mc_dropout"}
            return
        loss = criterion.loss.eval()
        proxies = loss.settings()["proxies"]
        scale = loss.alpha if name == "proxy_anchor" else loss.softmax_scale
        if name == "proxy_nca":
            logits = -scale * torch.cdist(sem, proxies) ** 2
        elif name == "softmax":
            logits = loss.logits(sem)
        else:
            logits = scale * sem @ proxies.T
        entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(found["proxy_entropy"], entropy, atol=1e-5)
    wanted = torch.cdist(sem, proxies).amin(dim=1)
    assert torch.allclose(found["proxy_distance"], wanted, atol=1e-5)
    metric = config.metrics["conventional"]
    assert "unc_norm" not in uncertainties(model, config.criterion(metric), images.split(20))


def test_training_goes_through_the_library(tmp_path, monkeypatch):
    seen = []
    rowstats = losses._loss.rowstats

    def watched(*arguments, **named):
        if len(arguments[2]):  # a loss checks its settings with no items
            seen.append(named["metric"])
        return rowstats(*arguments, **named)

    monkeypatch.setattr(losses._loss, "rowstats", watched)
    config = tiny(tmp_path)
    trained(config, config.metrics["introspective"])
    steps = -(-len(load_data(config.data).train.tensors[0]) // config.data.batch_size)
    assert seen == [Metric(5.0, 0.0, "cosine")] * (2 * steps)


def test_the_loss_falls_and_training_classes_come_together(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=4, lr=2e-3))
    _, lines = trained(config, config.metrics["introspective"])
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
    assert (
        trained(config, config.metrics["introspective"])[1]
        != trained(other, config.metrics["introspective"])[1]
    )


def test_both_metrics_start_from_the_same_weights_and_batches(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=1, lr=1e-12, proxy_lr=1.0))
    plain, plain_lines = trained(config, Metric.plain("cosine"))
    ours, _ = trained(config, config.metrics["introspective"])
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    # A metric that is as good as conventional learns the same from the same batches.
    _, near_lines = trained(config, Metric(1e9, 0.0, "cosine"))
    assert near_lines[0]["loss"] == pytest.approx(plain_lines[0]["loss"], rel=1e-5)


def test_the_conventional_metric_leaves_the_uncertainty_head_alone(tmp_path):
    config = tiny(tmp_path)
    plain, _ = trained(config, Metric.plain("cosine"))
    still, _ = trained(
        replace(config, optim=OptimConfig(lr=1e-12, epochs=1)), config.metrics["introspective"]
    )
    assert torch.allclose(plain.unc.weight, still.unc.weight, atol=1e-9)
    assert not torch.allclose(plain.sem.weight, still.sem.weight, atol=1e-4)


def test_only_the_heads_learn_in_the_warm_up(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=1, warmup_epochs=1))
    model, _ = trained(config, config.metrics["introspective"])
    start, _ = trained(
        tiny(tmp_path, optim=OptimConfig(epochs=1, lr=1e-12)), config.metrics["introspective"]
    )
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
    config = tiny(tmp_path, loss=LossConfig(options={"proxy_unc": "learned"}))
    _, lines = trained(config, config.metrics["introspective"])
    _, fixed = trained(tiny(tmp_path), config.metrics["introspective"])
    assert lines[-1]["loss"] != fixed[-1]["loss"]


def test_the_released_form_trains(tmp_path):
    config = tiny(tmp_path, metric=MetricConfig(5.0, 4.0, "official"))
    assert config.metrics["introspective"] == Metric.official()
    _, lines = trained(config, config.metrics["introspective"])
    assert lines[-1]["loss"] > 0


def test_mixed_precision(tmp_path):
    config = tiny(tmp_path)
    AcceleratorState._reset_state()  # one process has one precision, but for this test
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    lines: list[dict] = []
    data = load_data(config.data)
    processes, metric = Processes(accelerator), config.metrics["introspective"]
    model, _ = train(processes, config, data, "metric", metric, lines.append)
    sem, unc = model(data.test.tensors[0][:3])
    AcceleratorState._reset_state()
    assert sem.dtype == unc.dtype == torch.float32  # what the loss is given
    assert torch.equal(unc, unc.bfloat16().float())  # what the network computed in
    assert lines[-1]["loss"] > 0


def test_a_batch_in_parts_learns_the_same(tmp_path):
    config = tiny(tmp_path, loss=LossConfig(name="multi_similarity", memory=200), mix="mixup")
    whole, lines = trained(config, config.metrics["introspective"])
    in_parts = replace(config, optim=replace(config.optim, accumulation=4))
    model, told = trained(in_parts, config.metrics["introspective"])
    assert told[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-4)
    images = load_data(config.data).test.tensors[0]
    for one, other in zip(model(images), whole(images), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.01)


def test_a_compiled_backbone_learns_the_same(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=1, lr=1e-3))
    plain, lines = trained(config, config.metrics["introspective"])
    compiled = replace(config, run=replace(config.run, compile=True))
    torch._dynamo.reset()
    counters.clear()
    model, told = trained(compiled, config.metrics["introspective"])
    assert counters["stats"]["unique_graphs"] > 0
    assert told[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()  # its file is like any other
    images = load_data(config.data).test.tensors[0]
    for one, other in zip(model(images), plain(images), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.01)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny(tmp_path, optim=OptimConfig(epochs=3, lr=1e30))
    with pytest.raises(FloatingPointError, match=r"the loss is \S+ in epoch \d; lower optim.lr"):
        trained(config, config.metrics["introspective"])


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
    images = load_data(config.data).test.tensors[0]
    model, learned = load(config.folder / f"{metric}.safetensors")
    assert learned == (
        config.metrics["introspective"] if metric == "introspective" else Metric.plain("cosine")
    )
    assert not model.training
    again, _ = trained(config, learned)
    again.eval()
    for one, other in zip(model(images), again(images), strict=True):
        assert torch.equal(one, other)


def test_saving_and_loading_keeps_every_bit(tmp_path):
    model = TwoHeaded(ModelConfig(width=6, sem_dim=5, unc_dim=3), 3, (12, 9)).eval()
    images = torch.rand(4, 3, 12, 9)
    criterion = Config(metric=MetricConfig(2.0, 0.5)).criterion(Metric(2.0, 0.5, "cosine"))
    save(model, criterion, tmp_path / "model.safetensors")
    again, metric = load(tmp_path / "model.safetensors")
    assert metric == Metric(2.0, 0.5, "cosine")
    for one, other in zip(model(images), again(images), strict=True):
        assert torch.equal(one, other)


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    for function in (load, load_loss):
        with pytest.raises(
            ValueError, match="path must be a model that idml-fast train has written"
        ):
            function(tmp_path / "other.safetensors")


def test_digits_are_split_by_class():
    data = load_data(Config().data)
    assert data.train.tensors[0].shape == (901, 1, 8, 8)
    assert data.test.tensors[0].shape == (896, 1, 8, 8)
    assert data.train.tensors[1].unique().tolist() == [0, 1, 2, 3, 4]
    assert data.test_labels.unique().tolist() == [5, 6, 7, 8, 9]
    assert (data.train.tensors[0].min(), data.train.tensors[0].max()) == (0, 1)


def test_training_labels_count_from_zero():
    config = Config().data
    data = load_data(replace(config, train_classes=[9, 3], test_classes=[1, 2]))
    assert data.train.tensors[1].unique().tolist() == [0, 1]
    assert data.test_labels.unique().tolist() == [1, 2]
    every = load_data(replace(config, train_classes=[3, 9]))
    assert torch.equal(every.train.tensors[0], data.train.tensors[0])


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
    assert whole == {"config.yaml", "metrics.jsonl", "checkpoints"}
    load_config(["--config", str(metrics.parent / "config.yaml")])


def test_json_has_no_nan():
    assert json.loads(to_json({"a": float("nan"), "b": {"c": float("inf")}, "d": 0.5})) == {
        "a": None,
        "b": {"c": None},
        "d": 0.5,
    }


# -------------------------------------------------------------- losses, memory, tasks, mixing


RETRIEVAL = TASKS["retrieval"]


@pytest.mark.parametrize("name", RETRIEVAL)
@pytest.mark.parametrize("metric", METRICS)
def test_every_loss_trains(tmp_path, name, metric):
    config = tiny(tmp_path, loss=LossConfig(name=name))
    _, lines = trained(config, config.metrics[metric])
    assert len(lines) == 2
    assert 0 < lines[-1]["loss"] < 100
    assert lines[-1]["sem_grad_norm"] > 0
    assert (lines[-1]["unc_grad_norm"] is None) == (metric == "conventional")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_its_own_form_and_options(name):
    task = "classification" if name == "softmax" else "retrieval"
    config = Config(data=DataConfig(task=task), loss=LossConfig(name=name))
    metrics = config.metrics
    assert metrics["conventional"] == Metric.plain(metrics["introspective"].form)
    assert config.criterion(metrics["introspective"]).loss.metric == metrics["introspective"]


def test_options_reach_the_loss():
    options = {"mining": "semihard", "margin": 0.3}
    config = Config(loss=LossConfig(name="triplet_margin", options=options))
    loss = config.criterion(config.metrics["introspective"]).loss
    assert isinstance(loss, losses.TripletMarginLoss)
    assert (loss.mining, loss.margin) == ("semihard", 0.3)


def test_a_boundary_learns(tmp_path):
    options = {"learn_beta": True, "sampling": "distance_weighted"}
    config = tiny(tmp_path, loss=LossConfig(name="margin", options=options))
    data = load_data(config.data)
    processes, metric = Processes(Accelerator(cpu=True)), config.metrics["introspective"]
    _, criterion = train(processes, config, data, "metric", metric, [].append)
    assert criterion.loss.beta.item() != pytest.approx(1.2, abs=1e-4)


def test_every_class_may_have_a_boundary(tmp_path):
    options = {"learn_beta": True, "num_classes": 5}
    config = tiny(tmp_path, loss=LossConfig(name="margin", options=options))
    assert config.criterion(config.metrics["introspective"]).loss.beta.shape == (5,)
    _, lines = trained(config, config.metrics["introspective"])
    assert lines[-1]["loss"] > 0


def test_a_memory_bank_is_filled_used_and_saved(tmp_path):
    config = tiny(tmp_path, loss=LossConfig(name="contrastive", memory=200))
    data, metric, lines = load_data(config.data), config.metrics["introspective"], []
    processes = Processes(Accelerator(cpu=True))
    model, criterion = train(processes, config, data, "metric", metric, lines.append)
    assert len(criterion.bank) == 200
    _, without = trained(tiny(tmp_path, loss=LossConfig(name="contrastive")), metric)
    assert lines[0]["loss"] == without[0]["loss"]  # nothing is remembered before memory_epoch
    assert lines[1]["loss"] > without[1]["loss"]
    save(model, criterion, tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    again = config.criterion(metric)
    again.load_state_dict({k: state[k] for k in again.state_dict()})
    for one, other in zip(again.bank.columns, criterion.bank.columns, strict=True):
        assert torch.equal(one, other)
    assert load(tmp_path / "model.safetensors")[1] == metric


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A finished classification, and its results."""
    folder = tmp_path_factory.mktemp("classification")
    optim = OptimConfig(epochs=4, lr=5e-3, proxy_lr=10.0)
    task = {"data": DataConfig(task="classification"), "loss": LossConfig()}
    config = tiny(folder, **task, optim=optim)
    return config, run(config)


def test_classification_learns_and_reports(classified):
    config, results = classified
    tables = json.loads((config.folder / "uncertainty.json").read_text())
    for name, result in results.items():
        assert tables[name]["right"]["value"] == pytest.approx(result["top_1"])
        assert result["top_1"] > 0.6  # by chance 0.1
        assert "recall_at_1" not in result
    assert results["introspective"]["unc_grad_norm"] > 1e-3
    assert sorted(path.name for path in config.folder.iterdir()) == sorted(FILES)
    page = (config.folder / "report.html").read_text("utf-8")
    assert "Top-1" in page
    assert "Recall@1" not in page
    assert (
        f"introspective, top-1 {results['introspective']['top_1']:.1%}".replace("%", " %") in page
    )


@pytest.mark.parametrize("metric", METRICS)
def test_a_trained_classifier_comes_back(classified, metric):
    config, results = classified
    path = config.folder / f"{metric}.safetensors"
    (model, learned), head = load(path), load_loss(path)
    assert isinstance(head, losses.IntrospectiveSoftmax)
    assert not head.training
    assert head.metric == learned == config.metrics[metric]
    data = load_data(config.data, config.run.seed)
    with torch.no_grad():
        right = head.logits(model(data.test.tensors[0])[0]).argmax(1) == data.test_labels
    assert right.double().mean().item() == results[metric]["top_1"]


def test_the_proxies_of_a_run_come_back(finished):
    config, _ = finished
    path = config.folder / "introspective.safetensors"
    loss = load_loss(path)
    assert isinstance(loss, losses.ProxyAnchorLoss)
    assert torch.equal(loss.proxies, load_file(path)["loss.proxies"])


def test_digits_are_split_within_the_classes_by_seed():
    config = DataConfig(task="classification")
    data, again, other = load_data(config, 0), load_data(config, 0), load_data(config, 1)
    assert (len(data.train.tensors[0]), len(data.test.tensors[0])) == (1347, 450)
    assert torch.equal(data.test.tensors[0], again.test.tensors[0])
    assert not torch.equal(data.test.tensors[0], other.test.tensors[0])
    counts = data.test_labels.bincount()
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 3


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize("task", TASKS)
def test_mixing_trains_and_repeats(tmp_path, task, mix):
    config = tiny(tmp_path, data=DataConfig(task=task), loss=LossConfig(), mix=mix)
    metric = config.metrics["introspective"]
    first, lines = trained(config, metric)
    again, _ = trained(config, metric)
    plain, _ = trained(replace(config, mix="none"), metric)
    assert lines[-1]["loss"] > 0
    for x, y, z in zip(first.parameters(), again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(x, y)
        assert not torch.equal(x, z)


def test_the_loss_of_mixed_images_is_the_papers():
    """L(x, y) + lam L(mixed, y_a) + (1 - lam) L(mixed, y_b), and without L(x, y) to classify."""
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(sem, unc, labels):
        return (sem[:, 0] * labels).sum() + unc.sum()

    def network(images):
        return images.flatten(1), images.flatten(1).square()

    for task in TASKS:
        config = Config(data=DataConfig(task=task), mix="mixup")
        training = SimpleNamespace(criterion=loss, draws=np.random.default_rng(3), total=0)
        alone = Processes(Accelerator(cpu=True))
        value, seen = batch_loss(network, images, labels, 6, config, training, alone)
        mixed = mix("mixup", images, labels, 1.0, np.random.default_rng(3))
        parts = [loss(*network(mixed.images), y) for y in (mixed.labels_a, mixed.labels_b)]
        expected = mixed.lam * parts[0] + (1 - mixed.lam) * parts[1]
        if task == "retrieval":
            expected = expected + loss(*network(images), labels)
        torch.testing.assert_close(value, expected)
        kept = images if task == "retrieval" else mixed.images
        assert torch.equal(seen[0], kept.flatten(1))
        assert torch.equal(seen[2], labels)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_pixels_come_from_both_images(kind):
    images = torch.rand(9, 2, 6, 5)
    labels = torch.arange(9)
    before = images.clone()
    shares = []
    for seed in range(60):
        found = mix(kind, images, labels, 1.0, np.random.default_rng(seed))
        assert 0 <= found.lam <= 1
        assert torch.equal(found.labels_a, labels)
        assert torch.equal(found.labels_b.sort().values, labels)
        others = images[found.labels_b]
        if kind == "mixup":
            expected = found.lam * images + (1 - found.lam) * others
            torch.testing.assert_close(found.images, expected)
        else:
            own = (found.images == images).all(1)
            assert ((found.images == others).all(1) | own).all()
            moved = found.labels_b != labels
            share = own[moved].float().mean(dim=(1, 2))  # random pixels are never equal
            torch.testing.assert_close(share, torch.full_like(share, found.lam))
        shares.append(found.lam)
    assert torch.equal(images, before)
    # Beta(1, 1) is even over [0, 1]; a rectangle beyond the edge keeps more of the image.
    mean = sum(shares) / len(shares)
    assert 0.4 < mean < (0.6 if kind == "mixup" else 0.8)
    assert min(shares) < 0.2
    assert max(shares) > 0.8
