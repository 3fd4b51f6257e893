"""The paper's table: its recipes, ours beside theirs, runs that stop and go on, refusals."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")
pytest.importorskip("timm", reason="the extra idml_fast[vision] is not installed")

import test_datasets
from test_checkpoint import Cut, after, cut
from test_train_images import TINY, write_birds

from idml_fast import cli
from idml_fast.train import load_config, paper, reproduce_table, runs
from idml_fast.train.config import config_of
from idml_fast.train.datasets import DataError
from idml_fast.train.folder import flat
from idml_fast.train.paper import cells, merged, published, recipe
from idml_fast.train.reproduce import METRICS, Row
from idml_fast.train.runs import best_of
from idml_fast.train.table import SETS, Table, configurations

LOSSES = [
    *("proxy_anchor", "proxy_nca", "multi_similarity", "contrastive"),
    *("triplet_margin", "margin", "fast_ap"),
]
# A very small network in place of the paper's.
SMALL = (
    f"--model.backbone {TINY} --model.pretrained false --model.sem_dim 8 --model.unc_dim 4 "
    "--data.resize 36 --data.image_size 32 --data.workers 0 --data.batch_size 20 --run.cpu true "
    "--run.threads 1 --optim.warmup_epochs 0"
).split()


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Path:
    """Eight classes laid out as CUB-200-2011, of which four are learned."""
    return write_birds(tmp_path_factory.mktemp("birds"))


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A folder with miniatures of all three data sets."""
    root = tmp_path_factory.mktemp("archives")
    for make in (test_datasets.cub, test_datasets.cars, test_datasets.sop):
        make(root)
    return root


def words(root: Path, folder: Path, *more: str, loss: str = "proxy_anchor") -> list[str]:
    """Of a command that trains a cell of CUB for two epochs."""
    told = ["reproduce", "--dataset", "cub", "--loss", loss, "--data-root", str(root)]
    return [*told, "--epochs", "2", "--folder", str(folder), *SMALL, *more]


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def results(folder: Path) -> dict[str, dict]:
    """What was written of each run of a cell."""
    return {path.stem: json.loads(path.read_text())["results"] for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def finished(birds, tmp_path_factory):
    """Where a cell was trained without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(words(birds, folder)) == 0
    return folder


# --------------------------------------------------------------------------------- the recipes


def test_the_cells_are_those_of_the_paper():
    assert list(SETS) == ["cub", "cars", "sop"]
    assert set(cells().values()) == {(dataset, loss) for dataset in SETS for loss in LOSSES}
    for dataset, loss in cells().values():
        for metric in METRICS:
            numbers = published()[loss, metric, paper.NAMES[dataset]]
            assert {"recall_at_1", "nmi", "r_precision", "map_at_r"} <= numbers.keys()
            assert ("recall_at_10" if dataset == "sop" else "recall_at_2") in numbers


def test_a_cell_by_hand():
    """The recipe of the paper, as its authors released it."""
    assert recipe("sop_proxy_anchor") == {
        "name": "sop_proxy_anchor",
        "data": {"name": "sop", "resize": 256, "image_size": 224, "batch_size": 120},
        "model": {
            "backbone": "resnet50.tv_in1k",
            "pooling": "avgmax",
            "freeze_norm": True,
            "sem_dim": 512,
            "unc_dim": 512,
        },
        "loss": {"name": "proxy_anchor", "options": {"alpha": 32.0, "margin": 0.1}},
        "mix": "mixup",
        "mix_alpha": 1.0,
        "optim": {
            "epochs": 60,
            "warmup_epochs": 5,
            "lr": 6e-4,
            "step": 10,
            "decay": 0.25,
            "proxy_lr": 100.0,
            "weight_decay": 1e-4,
            "clip": 10.0,
        },
        "run": {"threads": None},
    }


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("dataset", "schedule"),
    [("cub", (6e-4, 5, 0.5)), ("cars", (2.5e-4, 10, 0.5)), ("sop", (6e-4, 10, 0.25))],
)
def test_every_cell_is_a_configuration_of_its_own(dataset, loss, schedule):
    config = load_config(["--config", f"{dataset}_{loss}", "--data-root", "there"])
    assert (config.name, config.data.name) == (f"{dataset}_{loss}", dataset)
    assert (config.optim.lr, config.optim.step, config.optim.decay) == schedule
    assert config.loss.name == loss
    assert bool(config.data.per_class) == (not loss.startswith("proxy"))
    assert config.model.backbone == "resnet50.tv_in1k"
    assert config.run.threads is None
    values = merged(recipe(config.name), {"data": {"root": "there"}})
    assert config == config_of(values)
    assert flat(values).items() <= flat(yaml.safe_load(config.to_yaml())).items()


def test_no_layer_says_what_another_one_has_said():
    layers = {path.stem: yaml.safe_load(path.read_text()) for path in paper.RECIPES.iterdir()}
    assert set(layers) == {"common", *SETS, *LOSSES}
    common = flat(layers["common"])
    for name in layers.keys() - {"common"}:
        assert not flat(layers[name]).items() & common.items(), name
    for dataset, loss in cells().values():
        assert not flat(layers[dataset]).keys() & flat(layers[loss]).keys()


def test_a_cell_may_have_settings_of_its_own(tmp_path, monkeypatch):
    shutil.copytree(paper.RECIPES, tmp_path / "paper")
    (tmp_path / "paper" / "sop_margin.yaml").write_text("optim: {lr: 0.5}\n")
    monkeypatch.setattr(paper, "RECIPES", tmp_path / "paper")
    assert recipe("sop_margin")["optim"] == recipe("sop_fast_ap")["optim"] | {
        "lr": 0.5,
        "proxy_lr": 1.0,
    }
    assert recipe("cub_margin")["optim"]["lr"] == 6e-4


def test_the_settings_of_a_cell_can_be_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        load_config(["--config", "cars_fast_ap", "--optim.clip", "3", "--print_config"])
    printed = flat(yaml.safe_load(capsys.readouterr().out))
    wanted = flat(recipe("cars_fast_ap")) | {"optim.clip": 3.0}
    assert {name: printed[name] for name in wanted} == wanted


def test_a_cell_serves_another_data_set_too():
    told = "--config cub_proxy_anchor --name clipart --data-root there --data.name domainnet"
    config = load_config([*told.split(), "--data.source", "real", "--data.target", "clipart"])
    values = recipe("cub_proxy_anchor")
    values |= {"name": "clipart"}
    values["data"] |= {"name": "domainnet", "root": "there", "source": "real", "target": "clipart"}
    assert config == config_of(values)


# ------------------------------------------------------------------------- cells, rows, columns


def test_a_cell_is_what_the_train_command_learns(birds, finished, tmp_path):
    """Last and best, by the records and results of that command."""
    told = ["train", "--config", "cub_proxy_anchor", "--data-root", str(birds)]
    told += ["--optim.epochs", "2", "--run.folder", str(tmp_path), *SMALL]
    assert cli.main(told) == 0
    folder = tmp_path / "cub_proxy_anchor"
    last = json.loads((folder / "results.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ours = results(finished / "cub_proxy_anchor")
    assert ours.keys() == {f"{metric}-0" for metric in METRICS}
    for metric in METRICS:
        found = ours[f"{metric}-0"]
        assert {name: found[name] for name in last[metric]} == last[metric]
        epochs = [line for line in records if line["metric"] == metric]
        top = max(line["recall_at_1"] for line in epochs)
        first = next(line for line in epochs if line["recall_at_1"] == top)
        for name in ("epoch", "recall_at_1", "recall_at_2", "recall_at_4", "map_at_r"):
            assert found[f"best_{name}"] == first[name]
        assert "best_nmi" not in found


def test_a_row_is_a_loss_on_every_data_set(archives, tmp_path, capsys):
    told = ["reproduce", "--dataset", "sop", "cars", "cub", "--loss", "proxy_nca"]
    told += ["--data-root", str(archives), "--epochs", "1", "--folder", str(tmp_path), *SMALL]
    assert cli.main(told) == 0
    shown = capsys.readouterr().out
    lines = lines_of(tmp_path / "runs.csv")
    keys = [(line["dataset"], line["loss"], line["metric"]) for line in lines]
    assert keys == [(x, "proxy_nca", metric) for x in ("sop", "cars", "cub") for metric in METRICS]
    for line in lines:
        known = {name for name, value in line.items() if name.startswith("recall") and value}
        ks = (1, 10, 100, 1000) if line["dataset"] == "sop" else (1, 2, 4, 8)
        assert known == {f"recall_at_{k}" for k in ks}
        done = results(tmp_path / f"{line['dataset']}_proxy_nca")[f"{line['metric']}-0"]
        assert float(line["map_at_r"]) == done["map_at_r"]
    # What there is to say of the data is said once, and stays with the numbers.
    for name in SETS:
        remark = f"{name} in .* for train; published are"
        assert len(re.findall(f"idml-fast: {remark}", shown)) == 1
        for file in ("reproduce.txt", "report.html"):
            assert len(re.findall(remark, (tmp_path / file).read_text("utf-8"))) == 1
    text = (tmp_path / "reproduce.txt").read_text("utf-8")
    assert text in shown
    assert "optim.epochs 1 (60)" in text
    assert f"model.backbone {TINY} (resnet50.tv_in1k)" in text
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "Stanford Online Products" in page


def trained(monkeypatch) -> list[tuple[str, str, int, bool]]:
    """Which runs are asked for: cell, metric, seed, whether every epoch is watched."""
    asked = []

    def run_one(config, metric, name, watch):
        assert name == f"{metric}-{config.run.seed}"
        asked.append((config.name, metric, config.run.seed, watch))
        return {"recall_at_1": 0.5}

    monkeypatch.setattr(runs, "run_one", run_one)
    monkeypatch.setattr("idml_fast.train.table.looked_at", lambda _: [])
    return asked


def test_a_column_is_every_loss_and_a_larger_part_takes_it_over(monkeypatch, tmp_path):
    asked = trained(monkeypatch)
    options = {"data_root": "there", "folder": tmp_path, "best": False}
    reproduce_table(["cars"], **options)
    cars = [(f"cars_{loss}", metric, 0, False) for loss in LOSSES for metric in METRICS]
    assert sorted(asked) == sorted(cars)
    asked.clear()
    table = reproduce_table(seeds=(0, 3), **options)
    every = [
        (f"{dataset}_{loss}", metric, seed, False)
        for dataset in SETS
        for loss in LOSSES
        for metric in METRICS
        for seed in (0, 3)
    ]
    assert sorted(asked) == sorted(set(every) - set(cars))
    assert {name: len(rows) for name, rows in table.rows.items()} == dict.fromkeys(SETS, 7)
    assert len(lines_of(tmp_path / "runs.csv")) == 84


@pytest.mark.parametrize(("more", "best"), [([], True), (["--no-best"], False)])
def test_the_command_hands_its_arguments_on(monkeypatch, tmp_path, more, best):
    given = {}
    monkeypatch.setattr(
        "idml_fast.train.table.reproduce_table", lambda *x, **y: given.update(y, datasets=x)
    )
    told = "reproduce --dataset cub sop --loss margin --data-root there --weights x.pth --seeds 4 5"
    told += f" --epochs 3 --checkpoint-every 50 --optim.lr 1 --folder {tmp_path}"
    assert cli.main(told.split() + more) == 0
    assert given == {
        "datasets": (["cub", "sop"],),
        "losses": ["margin"],
        "data_root": "there",
        "seeds": [4, 5],
        "epochs": 3,
        "folder": str(tmp_path),
        "best": best,
        "settings": [
            *("--model.weights=x.pth", "--run.checkpoint_every=50"),
            *("--optim.lr", "1"),
        ],
    }


def test_settings_override_a_recipe(tmp_path):
    settings = ["--weights=x.pth", "--optim.lr", "0.25", "--loss.options.beta", "1", "--mix=none"]
    configs = configurations(["cub"], "there", ["margin"], [7], 3, tmp_path, settings)
    config = configs["cub_margin"][7]
    assert (config.model.weights, config.optim.lr, config.mix) == ("x.pth", 0.25, "none")
    assert config.loss.options == recipe("cub_margin")["loss"]["options"] | {"beta": 1}
    assert (config.run.seed, config.optim.epochs, config.data.root) == (7, 3, "there")


def test_the_digits_take_settings_too(monkeypatch, tmp_path):
    seen = []

    def run_one(config, *_):
        seen.append((config.optim.lr, config.run.checkpoint_every))
        return {"recall_at_1": 0.5}

    monkeypatch.setattr(runs, "run_one", run_one)
    told = f"reproduce --dataset digits --loss nca --seeds 0 --folder {tmp_path}"
    assert cli.main([*told.split(), "--checkpoint-every", "7", "--optim.lr", "0.25"]) == 0
    assert seen == [(0.25, 7)] * 2


# ---------------------------------------------------------------------------------- the numbers


def made_up(**numbers: list[float]) -> Row:
    """Multi-Similarity; the lists hold a number of the seeds, the same with both metrics."""
    count = len(next(iter(numbers.values())))
    found = [{name: values[seed] for name, values in numbers.items()} for seed in range(count)]
    return Row("multi_similarity", "retrieval", dict.fromkeys(METRICS, found))


def test_the_table_by_hand():
    """The paper has, with the introspective metric on CUB, 69.0 79.5 - 73.5 38.5 27.2."""
    row = made_up(
        recall_at_1=[0.68, 0.70],
        recall_at_2=[0.795, 0.795],
        recall_at_4=[0.5, 0.5],
        nmi=[0.7, 0.7],
        r_precision=[0.4, 0.4],
        map_at_r=[0.272, 0.272],
        best_epoch=[3, 40],
        best_recall_at_1=[0.71, 0.73],
    )
    head, *lines = Table((0, 1), {"cub": [row]}, {}).table("cub")
    assert head == ["loss", "metric", "", "R@1", "R@2", "R@4", "NMI", "RP", "MAP@R"]
    assert [line[:3] for line in lines] == [
        ["Multi-Similarity", "conventional", "paper"],
        ["", "", "last"],
        ["", "", "best: epochs 3, 40"],
        ["", "introspective", "paper"],
        ["", "", "last"],
        ["", "", "best: epochs 3, 40"],
    ]
    assert lines[3][3:] == ["69.0", "79.5", "", "73.5", "38.5", "27.2"]
    assert lines[4][3:] == [
        *("69.0 ± 1.4 (+0.0)", "79.5 ± 0.0 (+0.0)", "50.0 ± 0.0", "70.0 ± 0.0 (-3.5)"),
        *("40.0 ± 0.0 (+1.5)", "27.2 ± 0.0 (+0.0)"),
    ]
    assert lines[5][3:] == ["72.0 ± 1.4 (+3.0)", "", "", "", "", ""]
    assert lines[1][3:5] == ["69.0 ± 1.4 (+1.7)", "79.5 ± 0.0 (+1.3)"]  # theirs: 67.3 78.2


def test_the_csv_by_hand(tmp_path):
    """The paper has, with the introspective metric on SOP, 79.7 91.4 91.2 53.7 50.9."""
    row = made_up(recall_at_1=[0.78, 0.80], recall_at_10=[0.9, 0.91], best_recall_at_1=[0.85, 0.87])
    (tmp_path / "it.csv").write_text(Table((0, 1), {"sop": [row]}, {}).to_csv())
    lines = lines_of(tmp_path / "it.csv")
    assert len(lines) == 2 * 2 * 5
    keys = "metric", "epoch", "number"
    values = "mean_percent", "std_percent", "paper_percent", "difference_points"
    found = {tuple(x[key] for key in keys): [x[name] for name in values] for x in lines}
    last = found["introspective", "last", "recall_at_1"]
    assert [float(x) for x in last] == pytest.approx([79.0, math.sqrt(2), 79.7, -0.7], abs=1e-4)
    best = found["introspective", "best", "recall_at_1"]
    assert [float(x) for x in best] == pytest.approx([86.0, math.sqrt(2), 79.7, 6.3], abs=1e-4)
    ten = found["conventional", "last", "recall_at_10"]
    assert [float(x) for x in ten] == pytest.approx([90.5, math.sqrt(0.5), 90.0, 0.5], abs=1e-4)
    assert found["introspective", "last", "nmi"] == ["", "", "91.2", ""]
    assert {(x["dataset"], x["loss"], x["seeds"]) for x in lines} == {
        ("sop", "multi_similarity", "2")
    }


def test_every_number_of_the_paper_has_a_difference():
    names = ["recall_at_1", "recall_at_2", "recall_at_4", "recall_at_10"]
    names += ["nmi", "r_precision", "map_at_r"]
    ours = np.random.default_rng(0).random(len(names))
    found = dict(zip(names, ours, strict=True))
    rows = {
        dataset: [Row(loss, "retrieval", {x: [found] for x in METRICS}) for loss in LOSSES]
        for dataset in SETS
    }
    lines = csv.DictReader(Table((0,), rows, {}).to_csv().splitlines())
    told = {
        (x["loss"], x["metric"], x["dataset"], x["number"]): float(x["difference_points"])
        for x in lines
        if x["difference_points"]
    }
    wanted = {
        (loss, metric, dataset, name): 100 * found[name] - float(value)
        for dataset, data in paper.NAMES.items()
        for loss in LOSSES
        for metric in METRICS
        for name, value in published()[loss, metric, data].items()
    }
    assert len(wanted) == 3 * 7 * 2 * 5 + 2  # R@4 of IDML-PA twice
    assert told == pytest.approx(wanted, abs=1e-4)


def test_the_best_epoch_is_the_first_with_the_highest_recall():
    epochs = [
        {"metric": "introspective", "epoch": 1, "recall_at_1": 0.5, "map_at_r": 0.9},
        {"metric": "introspective", "epoch": 2, "recall_at_1": 0.7, "map_at_r": 0.3},
        {"metric": "introspective", "epoch": 3, "recall_at_1": 0.7, "map_at_r": 0.4},
        {"metric": "introspective", "epoch": 4, "recall_at_1": 0.6, "map_at_r": 0.8},
    ]
    assert best_of(epochs) == {"best_epoch": 2, "best_recall_at_1": 0.7, "best_map_at_r": 0.3}


def test_without_all_epochs_there_is_no_best_one():
    assert best_of([{"epoch": 1}, {"epoch": 2, "recall_at_1": 0.7}]) == {}


def test_without_watching_there_is_no_best(birds, tmp_path):
    assert cli.main(words(birds, tmp_path, "--no-best")) == 0
    for found in results(tmp_path / "cub_proxy_anchor").values():
        assert found["recall_at_1"] > 0
        assert not [name for name in found if name.startswith("best")]
    text = (tmp_path / "reproduce.txt").read_text("utf-8")
    assert "last" in text
    assert "best: epoch" not in text


# ------------------------------------------------------------------------------ stops and kills


def test_killed_within_a_run_it_ends_the_same(birds, finished, tmp_path, monkeypatch):
    """Cut off at every third step and epoch: in either metric, and between the two."""
    stops = 0
    while True:
        try:
            with monkeypatch.context() as patch:
                after(3, cut, patch.setattr)
                cli.main(words(birds, tmp_path, "--checkpoint-every", "1"))
            break
        except Cut:
            stops += 1
    assert stops >= 3
    cell = "cub_proxy_anchor"
    assert results(tmp_path / cell) == results(finished / cell)
    assert not (tmp_path / cell / "checkpoints").exists()
    for name in ("reproduce.txt", "reproduce.csv", "runs.csv"):
        assert (tmp_path / name).read_text("utf-8") == (finished / name).read_text("utf-8")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_75(birds, finished, tmp_path, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        after(3, lambda: os.kill(os.getpid(), number), patch.setattr)
        assert cli.main(words(birds, tmp_path)) == 75
    told = capsys.readouterr().err
    assert f"idml-fast: stopped by {number.name} after step 3 of conventional-0; " in told
    assert not (tmp_path / "reproduce.txt").exists()
    assert cli.main(words(birds, tmp_path)) == 0
    assert results(tmp_path / "cub_proxy_anchor") == results(finished / "cub_proxy_anchor")


def test_another_seed_keeps_its_checkpoints(birds, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after(2, cut, patch.setattr)
        with pytest.raises(Cut):
            cli.main(words(birds, tmp_path, "--seeds", "1", "--checkpoint-every", "1"))
    folder = tmp_path / "cub_proxy_anchor" / "checkpoints"
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(kept) == {"conventional-1-00000001.pt", "conventional-1-00000002.pt"}
    assert cli.main(words(birds, tmp_path)) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "mnist"],
            "dataset must be digits alone, or different ones of cub, cars",
        ),
        (["--dataset", "digits", "cub"], "different ones of cub, cars, sop, got digits"),
        (["--dataset", "cub", "cub"], "got ['cub', 'cub']"),
        (["--loss", "nca"], "loss must be different ones of triplet_margin, proxy_nca, fast_ap"),
        (["--loss", "margin", "margin"], "got ['margin', 'margin']"),
        (["--data-root", "nowhere"], "nowhere must be the folder of a data set, got nothing"),
        (["--seeds", "1", "1"], "seeds must be different numbers >= 0, got [1, 1]"),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
        (["--checkpoint-every", "-1"], "run.checkpoint_every must be >= 0, got -1"),
        (["--weights", "nowhere.pth"], "model.weights must be a file, got nowhere.pth"),
        (["--optim.lrr", "1"], "unrecognized arguments: --optim.lrr 1"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.lr", "0"], "optim.lr must be > 0, got 0.0"),
        (["--loss.options.alhpa", "2"], "loss.options of proxy_anchor must be one of alpha"),
        (["--data.name", "cars"], "data.name must be cub here, got cars"),
        (["--run.seed", "3"], "run.seed must be 0 here, got 3"),
        (["--model.backbone", "resnet51"], "model.backbone must be small or a network of timm"),
        (["--study"], "argument --study: not allowed with argument --loss/--losses"),
    ],
)
def test_what_does_not_fit_is_one_sentence(birds, capsys, tmp_path, arguments, message):
    try:
        status = cli.main(words(birds, tmp_path / "none", *arguments))
    except SystemExit as stopped:  # argparse shows the usage before its sentence
        status = stopped.code
    told = capsys.readouterr().err
    assert status in (1, 2)
    assert message in told
    assert status == 2 or told.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_a_root_must_be_given(capsys, tmp_path):
    told = ["reproduce", "--dataset", "cub", "sop", "--folder", str(tmp_path / "none")]
    assert cli.main(told) == 1
    wanted = "idml-fast: --data-root must be a folder with cub, sop, got none\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-root", "there"], "data.root must be null for digits, got there"),
        (["--loss.name", "margin"], "loss.name must be npairs here, got margin"),
    ],
)
def test_the_digits_refuse_what_is_not_theirs(capsys, tmp_path, arguments, message):
    told = ["reproduce", "--dataset", "digits", "--loss", "npairs", "--folder"]
    assert cli.main([*told, str(tmp_path / "none"), *arguments]) == 1
    assert capsys.readouterr().err == f"idml-fast: {message}\n"
    assert not (tmp_path / "none").exists()


def test_the_study_takes_no_settings(capsys):
    assert cli.main(["reproduce", "--dataset", "digits", "--study", "--optim.lr", "1"]) == 1
    told = capsys.readouterr().err
    assert told == "idml-fast: --study takes no settings of idml-fast train, got --optim.lr 1\n"


def test_one_data_set_that_is_missing_is_told_before_anything_is_trained(birds, tmp_path):
    options = {"data_root": birds, "losses": ["proxy_nca"], "folder": tmp_path / "none"}
    with pytest.raises(DataError, match=r"must hold cars196/cars_annos\.mat or cars_annos\.mat"):
        reproduce_table(["cub", "cars"], settings=SMALL, **options)
    assert not (tmp_path / "none").exists()


def test_a_run_of_another_configuration_is_refused(birds, finished, capsys):
    assert cli.main(words(birds, finished, "--optim.clip", "3")) == 1
    assert "optim.clip 10.0 there, 3.0 here" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_told(birds, tmp_path, capsys):
    folder = tmp_path / "cub_proxy_anchor" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "conventional-0-00000001.pt").write_bytes(b"\0" * 100)
    assert cli.main(words(birds, tmp_path)) == 1
    told = capsys.readouterr().err
    assert "conventional-0-00000001.pt is damaged, or no checkpoint; remove it to go on" in told


def test_a_broken_image_is_named_without_a_traceback(tmp_path, capsys):
    test_datasets.cub(tmp_path)
    broken = tmp_path / "CUB_200_2011" / "images" / "001.Albatross" / "Albatross_1.jpg"
    broken.write_bytes(b"nothing")
    assert cli.main(words(tmp_path, tmp_path / "out", "--data.workers", "1")) == 1
    told = capsys.readouterr().err
    assert f"idml-fast: {broken} must be an image, got something else\n" in told
    assert "Traceback" not in told
