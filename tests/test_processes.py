"""Several processes learn what one does: the same batches, losses, parameters and results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from accelerate import Accelerator
from test_checkpoint import write_noise

from idml_fast.train import Config, TwoHeaded, run
from idml_fast.train.config import DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from idml_fast.train.criterion import SettingsError
from idml_fast.train.data import load_data
from idml_fast.train.folder import FILES
from idml_fast.train.loop import check
from idml_fast.train.processes import Processes

HERE = Path(__file__).parent
METRICS = "conventional", "introspective"

# What each process does: trains, in float64, both metrics of every configuration, and writes what
# they have learned. Its arguments: a file of configurations, the folder to write to.
TRAINING = """
import sys
sys.path.insert(0, sys.argv[1])
import any_torchvision
any_torchvision.define_missing_operators()

import torch, yaml
from torch.utils.data import TensorDataset
from idml_fast.train import loop
from idml_fast.train.config import config_of
from idml_fast.train.data import load_data
from idml_fast.train.processes import Processes, accelerator_of

torch.set_default_dtype(torch.float64)
configs = yaml.safe_load(open(sys.argv[2]))
for case, values in configs.items():
    config = config_of(values)
    processes = Processes(accelerator_of(config))
    data = load_data(config.data)
    if isinstance(data.train, TensorDataset):
        data.train.tensors = data.train.tensors[0].double(), data.train.tensors[1]
        data.test.tensors = data.test.tensors[0].double(), data.test.tensors[1]
    for name, metric in config.metrics.items():
        lines = []
        model, criterion = loop.train(processes, config, data, name, metric, lines.append)
        if processes.is_main:
            state = {**model.state_dict(), **criterion.state_dict(), "lines": lines}
            torch.save(state, f"{sys.argv[3]}/{case}-{name}.pt")
"""

# What each process does: trains, is cut off after so many steps, and goes on.
CUT_OFF = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import pytest
from test_checkpoint import Cut, after, assert_same, cut, digits, trained

folder, checks = Path(sys.argv[2]), int(sys.argv[3])
whole, lines = trained(digits(folder / "whole"))
config = digits(folder / "cut")
with pytest.MonkeyPatch.context() as patch:
    after(checks, cut, patch.setattr)
    with pytest.raises(Cut):
        trained(config)
state, again = trained(config)
assert_same(state, whole)
assert again == lines
"""

# The command; the last process gets a signal after its third step.
STOPPED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_checkpoint
from idml_fast import cli

if os.environ["RANK"] == "1":
    test_checkpoint.after(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
sys.exit(cli.main(["train", "--config", sys.argv[2]]))
"""

# The command with these arguments.
COMMAND = """
import sys
from idml_fast import cli

sys.exit(cli.main(sys.argv[2:]))
"""


def launched(count: int, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """So many processes that run this script."""
    command = [sys.executable, "-c", script, str(HERE), *map(str, arguments)]
    if count > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        command = [*torchrun, "--nproc-per-node", str(count), *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six classes of noise in a folder each, of which half are learned."""
    return write_noise(tmp_path_factory.mktemp("images"), classes=6, images=7)


def configs(folder: Path, root: Path) -> dict[str, Config]:
    """What is trained; of no batch size is the number of processes a divisor, nor of what is left
    for the last batch of an epoch."""
    small = Config(
        name="small",
        data=DataConfig(batch_size=179),
        model=ModelConfig(width=6, sem_dim=8, unc_dim=4),
        optim=OptimConfig(epochs=2, lr=1e-3, step=1),
        run=RunConfig(folder=str(folder), cpu=True),
    )
    drawn = {"sampling": "distance_weighted", "learn_beta": True}
    return {
        "proxies": small,
        "mixed": replace(
            small, loss=LossConfig("margin", drawn, memory=300, memory_epoch=1), mix="mixup"
        ),
        "groups": replace(
            small,
            data=DataConfig(batch_size=175, per_class=5),
            loss=LossConfig("multi_similarity"),
            optim=replace(small.optim, accumulation=3),
        ),
        "classes": replace(
            small,
            data=DataConfig(task="classification", batch_size=700),
            loss=LossConfig("softmax"),
            mix="cutmix",
        ),
        "images": replace(
            small,
            data=DataConfig("folder", str(root), resize=36, image_size=32, workers=2, batch_size=7),
            model=ModelConfig("test_resnet.r160_in1k", pretrained=False, sem_dim=8, unc_dim=4),
            mix="mixup",
        ),
    }


@pytest.fixture(scope="module")
def learned(root, tmp_path_factory):
    """By the number of processes: the folder with what they have learned."""
    folders = {}
    for count in (1, 2, 3):
        folder = folders[count] = tmp_path_factory.mktemp(f"of_{count}")
        told = folder / "told.yaml"
        values = {name: asdict(config) for name, config in configs(folder, root).items()}
        told.write_text(yaml.safe_dump(values if count < 3 else {"mixed": values["mixed"]}))
        done = launched(count, TRAINING, told, folder)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("case", "count"),
    [("proxies", 2), ("mixed", 2), ("mixed", 3), ("groups", 2), ("classes", 2), ("images", 2)],
)
def test_several_processes_learn_what_one_does(learned, case, count, metric):
    alone, together = (
        torch.load(learned[n] / f"{case}-{metric}.pt", weights_only=True) for n in (1, count)
    )
    lines, theirs = alone.pop("lines"), together.pop("lines")
    assert alone.keys() == together.keys()
    for name, x in alone.items():
        torch.testing.assert_close(together[name], x, rtol=1e-8, atol=1e-10)
    for line, other in zip(lines, theirs, strict=True):
        assert line.keys() == other.keys()
        for name in ("loss", "sem_grad_norm", "map_at_r", "recall_at_1", "top_1", "unc_norm_mean"):
            found, expected = (np.array(x.get(name), dtype=float) for x in (other, line))
            np.testing.assert_allclose(found, expected, rtol=1e-8, err_msg=name)


def test_cut_off_they_end_in_the_same_bits(tmp_path):
    done = launched(2, CUT_OFF, tmp_path, 7)
    assert done.returncode == 0, done.stderr


def test_a_signal_to_one_stops_all_and_the_command_goes_on(root, tmp_path):
    config = configs(tmp_path, root)["proxies"]
    told = tmp_path / "told.yaml"
    told.write_text(yaml.safe_dump(asdict(config)))
    stopped = launched(2, STOPPED, told)
    assert stopped.returncode != 0
    assert stopped.stderr.count("after step 3 of conventional; the same command goes on") == 2
    assert "stopped by SIGTERM" in stopped.stderr
    assert "stopped by a signal to another process" in stopped.stderr
    assert 'Traceback (most recent call last):\n  File "<string>"' not in stopped.stderr
    again = launched(2, STOPPED.replace('"1"', '"none"'), told)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("idml-fast: going on from") == 1
    assert again.stdout.count("report.html") == 1
    assert sorted(path.name for path in config.folder.iterdir()) == sorted(FILES)
    alone = replace(config, name="alone")
    expected = run(alone)
    results = json.loads((config.folder / "results.json").read_text())
    for metric, numbers in expected.items():
        for name in ("recall_at_1", "map_at_r", "mrr"):
            assert results[metric][name] == pytest.approx(numbers[name], abs=0.01), name


def test_they_compare_losses(tmp_path):
    asked = ["--dataset", "digits", "--loss", "contrastive", "--seeds", "0", "--epochs", "1"]
    words = ["reproduce", *asked, "--folder"]
    done = launched(2, COMMAND, *words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Contrastive") == 1  # the table is printed once
    results = [tmp_path / "contrastive" / f"{metric}-0.json" for metric in METRICS]
    assert all(json.loads(path.read_text())["results"]["recall_at_1"] > 0.3 for path in results)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["contrastive", "report.html", "reproduce.csv", "reproduce.txt", "runs.csv"]


# ------------------------------------------------------------------------------ shares


def shares(total: int, count: int) -> list[list[int]]:
    """Of each process."""
    found = []
    for rank in range(count):
        alone = Processes(Accelerator(cpu=True))
        alone.rank, alone.count = rank, count
        found.append(alone.share(total).tolist())
    return found


@pytest.mark.parametrize(("total", "count"), [(7, 1), (8, 2), (7, 3), (2, 3), (1, 4)])
def test_shares_make_up_the_whole(total, count):
    found = shares(total, count)
    assert len({len(share) for share in found}) == 1  # all take part in every exchange
    together = [number for step in zip(*found, strict=True) for number in step]
    assert together[:total] == list(range(total))
    assert len(together) < total + count


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_resnet"])
def test_norms_that_are_synchronised_compute_the_same(backbone):
    """With the activation that some of timm's have in them."""
    config = ModelConfig(backbone, pretrained=False, freeze_norm=False, sem_dim=8, unc_dim=4)
    model = TwoHeaded(config, 3, (32, 32))
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        sem, unc = model.eval()(images)
        model.trunk.synchronise_norms()
        found = model.eval()(images)
    assert any(isinstance(part, torch.nn.SyncBatchNorm) for part in model.modules())
    assert torch.equal(found[0], sem)
    assert torch.equal(found[1], unc)


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        (
            {},
            8,
            "data.batch_size must be at least the number of processes, 8, got 7",
        ),
        (
            {"optim": OptimConfig(accumulation=2)},
            1,
            r"optim.accumulation must be 1 where the batch norms of test_resnet.r160_in1k learn "
            r"\(model.freeze_norm false\): they would see the parts of a batch instead of the "
            "batch, got 2",
        ),
        ({}, 2, "there must be one process on the CPU where the batch norms of .* got 2"),
    ],
)
def test_what_cannot_be_cut_up_is_refused(root, tmp_path, changes, count, message):
    config = configs(tmp_path, root)["images"]
    config = replace(config, model=replace(config.model, freeze_norm=False), mix="none")
    data = load_data(config.data)
    processes = SimpleNamespace(count=count, device=torch.device("cpu"))
    with pytest.raises(SettingsError, match=message):
        check(replace(config, **changes), data, processes)
