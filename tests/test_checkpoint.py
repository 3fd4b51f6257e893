"""Checkpoints: what is killed at any step ends in the same bits; signals; refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import zipfile
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from idml_fast import cli
from idml_fast.train import Config, run
from idml_fast.train import checkpoint as checkpoint_module
from idml_fast.train.checkpoint import Checkpoints, Interrupted, signals
from idml_fast.train.config import DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from idml_fast.train.data import load_data
from idml_fast.train.folder import FILES, RunError, open_folder
from idml_fast.train.images import Images
from idml_fast.train.loop import train
from idml_fast.train.processes import Processes

METRIC = "introspective"
STEPS, EPOCHS = 4, 3  # of the runs below: steps an epoch, epochs of a metric
CHECKS = EPOCHS * (STEPS + 1)  # times that a metric asks for a checkpoint: every step and epoch

# A process that trains one metric, or both and their report, and gets a signal after so many
# checks. Its arguments: the configuration, what to train, the signal, how many checks.
STOPPED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import any_torchvision
any_torchvision.define_missing_operators()

import test_checkpoint, yaml
from idml_fast import cli
from idml_fast.train.config import config_of

path, what, number, checks = sys.argv[2:]
test_checkpoint.after(int(checks), lambda: os.killpg(0, int(number)))
if what == "run":
    sys.exit(cli.main(["train", "--config", path]))
test_checkpoint.trained(config_of(yaml.safe_load(open(path))))
"""


class Cut(Exception):
    """Ends a training at once."""


def after(checks: int, act, patch=setattr) -> None:
    """Act when training has asked so many times whether a checkpoint is due."""
    left, keep_up = checks, Checkpoints.keep_up

    def counted(*arguments, **options):
        nonlocal left
        left -= 1
        keep_up(*arguments, **options)
        if left == 0:
            act()

    patch(Checkpoints, "keep_up", counted)


def cut() -> None:
    raise Cut


def digits(folder: Path, **changes) -> Config:
    """A small run with all that a checkpoint has to hold: images are mixed, a bank remembers, a
    boundary learns, rates fall."""
    config = Config(
        name="small",
        data=DataConfig(batch_size=230),
        model=ModelConfig(width=4, sem_dim=8, unc_dim=4),
        loss=LossConfig(name="margin", memory=300),
        mix="mixup",
        optim=OptimConfig(epochs=EPOCHS, lr=1e-3, step=1),
        run=RunConfig(folder=str(folder), cpu=True, checkpoint_every=3),
    )
    return replace(config, **changes)


def photographs(folder: Path, root: Path, workers: int = 0) -> Config:
    """The same of image files, with a network that has batch norms, and drops features out."""
    return digits(
        folder,
        data=DataConfig(
            name="folder", root=str(root), resize=36, image_size=32, workers=workers, batch_size=6
        ),
        model=ModelConfig("test_efficientnet.r160_in1k", pretrained=False, sem_dim=8, unc_dim=4),
        loss=LossConfig(name="proxy_anchor", memory=20),
    )


def write_noise(root: Path, classes: int, images: int) -> Path:
    """Classes of noise in a folder each, of which half are learned."""
    for label in range(classes):
        (root / f"class_{label}").mkdir()
        for number in range(images):
            draws = np.random.default_rng([label, number])
            pixels = draws.integers(0, 256, (40, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class_{label}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight classes of noise in a folder each, of which half are learned."""
    return write_noise(tmp_path_factory.mktemp("images"), classes=8, images=6)


def trained(config: Config) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """All that a metric has learned, with its loss and bank, and the records of its epochs."""
    processes = Processes(Accelerator(cpu=True))
    if processes.is_main:
        open_folder(config)
    processes.wait()
    data, lines = load_data(config.data, config.run.seed), []
    model, criterion = train(
        processes,
        config,
        data,
        METRIC,
        config.metrics[METRIC],
        lines.append,
        watch=False,
        checkpoints=Checkpoints(config, data, METRIC, processes),
    )
    return {**model.state_dict(), **criterion.state_dict()}, lines


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


def names(config: Config) -> list[str]:
    """Of the checkpoints that are there."""
    return sorted(path.name for path in (config.folder / "checkpoints").iterdir())


def in_a_process(
    config: Config, what: str, number: signal.Signals, checks: int
) -> subprocess.CompletedProcess[str]:
    """A process and its workers get a signal after so many checks."""
    path = Path(config.run.folder) / "told.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    arguments = Path(__file__).parent, path, what, int(number), checks
    command = [sys.executable, "-c", STOPPED, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, start_new_session=True, timeout=120
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the digits' run learns if nothing stops it."""
    return trained(digits(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def whole_photographs(root, tmp_path_factory):
    """What the image files' run learns if nothing stops it."""
    return trained(photographs(tmp_path_factory.mktemp("whole"), root))


# ------------------------------------------------------------------------------ going on


def test_checkpoints_do_not_change_what_is_learned(whole, tmp_path):
    config = digits(tmp_path)
    other = replace(config, run=replace(config.run, checkpoint_every=0))
    assert_same(trained(other)[0], whole[0])


@pytest.mark.parametrize("every", [0, 3])
def test_cut_off_after_any_step_it_ends_in_the_same_bits(whole, tmp_path, monkeypatch, every):
    for checks in range(1, CHECKS + 1):
        config = digits(tmp_path / str(checks))
        config.run.checkpoint_every = every
        with monkeypatch.context() as patch:
            after(checks, cut, patch.setattr)
            with pytest.raises(Cut):
                trained(config)
        state, lines = trained(config)
        assert_same(state, whole[0])
        assert lines == whole[1]


def test_cut_off_again_and_again_it_ends_in_the_same_bits(root, whole_photographs, tmp_path):
    config, times = photographs(tmp_path, root), 0
    config.run.checkpoint_every = 1
    while True:
        with pytest.MonkeyPatch.context() as patch:
            after(2, cut, patch.setattr)
            try:
                state, lines = trained(config)
                break
            except Cut:
                times += 1
    assert times >= CHECKS // 2
    assert_same(state, whole_photographs[0])
    assert lines == whole_photographs[1]


@pytest.mark.parametrize("checks", [2, 9])
def test_killed_it_ends_in_the_same_bits(whole, tmp_path, checks):
    config = digits(tmp_path)
    killed = in_a_process(config, "metric", signal.SIGKILL, checks)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_same(trained(config)[0], whole[0])


@pytest.mark.parametrize(("workers", "checks"), [(0, 7), (2, 4), (2, 13)])
def test_killed_with_its_workers_it_ends_in_the_same_bits(
    root, whole_photographs, tmp_path, workers, checks
):
    config = photographs(tmp_path, root, workers)
    killed = in_a_process(config, "metric", signal.SIGKILL, checks)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state, lines = trained(config)
    assert_same(state, whole_photographs[0])
    assert lines == whole_photographs[1]


def test_batches_that_were_seen_are_not_read_again(root, tmp_path, monkeypatch):
    config = photographs(tmp_path, root)
    config.run.checkpoint_every = 1
    after(3, cut, monkeypatch.setattr)
    with pytest.raises(Cut):
        trained(config)
    read, load_image = [], Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda x, i: read.append(i) or load_image(x, i))
    trained(config)
    assert len(read) == 1 + (EPOCHS - 1) * 24 + 6  # one to see how large an image is


def test_a_whole_run_goes_on_and_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    small = digits(tmp_path)
    small.optim.epochs = 1
    whole, config = replace(small, name="whole"), replace(small, name="cut")
    run(whole)
    for checks in (2, STEPS + 1 + 4):  # in the first metric, in the second one
        with monkeypatch.context() as patch:
            after(checks, cut, patch.setattr)
            with pytest.raises(Cut):
                run(config)
    capsys.readouterr()
    run(config)
    assert "going on from" in capsys.readouterr().out
    for name in FILES:
        ours, theirs = config.folder / name, whole.folder / name
        if name.endswith(".safetensors"):
            assert_same(load_file(ours), load_file(theirs))
        elif name not in ("config.yaml", "report.html"):
            assert ours.read_text() == theirs.read_text()
    assert sorted(path.name for path in config.folder.iterdir()) == sorted(FILES)


# ------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step(whole, tmp_path, monkeypatch, number):
    config = digits(tmp_path)
    config.run.checkpoint_every = 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        after(1, lambda: os.kill(os.getpid(), number), patch.setattr)
        message = f"stopped by {number.name} after step 2 of introspective; the same command goes"
        with pytest.raises(Interrupted, match=message):
            trained(config)
    assert names(config) == ["introspective-00000002.pt"]
    assert signal.getsignal(number) is before
    assert_same(trained(config)[0], whole[0])


def test_interrupted_with_its_workers_the_command_says_so(root, tmp_path):
    config = photographs(tmp_path, root, workers=2)
    stopped = in_a_process(config, "run", signal.SIGINT, 2)
    assert stopped.returncode == cli.STOPPED == 75
    assert stopped.stderr.endswith(
        "idml-fast: stopped by SIGINT after step 3 of conventional; "
        "the same command goes on from there\n"
    )
    assert "Traceback" not in stopped.stderr


def test_a_second_signal_does_not_wait():
    with signals() as came:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert came == [signal.SIGINT]


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def wait():
        with signals() as came:
            seen.extend([came, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert seen == [[], before]


# ------------------------------------------------------------------------------ the files


@pytest.mark.parametrize(("every", "keep"), [(1, 1), (1, 3), (0, 2), (5, 9)])
def test_as_many_are_kept_as_asked_for(tmp_path, every, keep):
    config = digits(tmp_path)
    config.run.checkpoint_every, config.run.keep_checkpoints = every, keep
    trained(config)
    written = [n for n in range(1, 13) if n % STEPS == 0 or (every and n % every == 0)]
    assert names(config) == [f"introspective-{n:08}.pt" for n in written[-keep:]]


def test_what_a_kill_has_left_half_written_is_removed(tmp_path):
    config = digits(tmp_path)
    folder = open_folder(config) / "checkpoints"
    folder.mkdir()
    (folder / ".introspective-00000003.pt.partial").write_text("half")
    (folder / ".conventional-00000003.pt.partial").write_text("another one's")
    trained(config)
    assert names(config) == [
        ".conventional-00000003.pt.partial",
        "introspective-00000009.pt",
        "introspective-00000012.pt",
    ]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with checkpoints, and the bytes of the newest one."""
    config = digits(tmp_path_factory.mktemp("kept"))
    trained(config)
    path = config.folder / "checkpoints" / "introspective-00000012.pt"
    return config, path, path.read_bytes()


def flip(content: bytes) -> bytes:
    """One bit of a learned weight is another one."""
    state = torch.load(BytesIO(content), weights_only=True)["training"]["model"]
    place = content.index(state["sem.weight"].numpy().tobytes()) + 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda x: b"", lambda x: x[: len(x) // 2], lambda x: x[:-1], lambda x: b"no archive", flip],
    ids=["empty", "cut off", "without its end", "foreign", "a bit flipped"],
)
def test_a_damaged_checkpoint_is_refused(kept, damage, capsys):
    config, path, content = kept
    path.write_bytes(damage(content))
    with pytest.raises(RunError, match=f"{path} is damaged, or no checkpoint; remove it to go on"):
        trained(config)
    # The one before serves.
    path.unlink()
    trained(config)


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(kept, monkeypatch):
    config, path, content = kept
    path.write_bytes(content)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.zipfile, "ZipFile", refuse)
        with pytest.raises(RunError, match=f"{path} cannot be read: Permission denied$"):
            trained(config)
        patch.setattr(checkpoint_module.zipfile, "ZipFile", exhaust)
        with pytest.raises(MemoryError):
            trained(config)
    trained(config)  # it was left alone
    path.unlink()


def exhaust(*_):
    raise MemoryError


def test_any_damage_is_refused_or_harmless(kept):
    """Bytes flipped, cut off or exchanged anywhere, in the pickle of an intact archive too."""
    config, path, content = kept
    data = load_data(config.data, config.run.seed)
    checkpoints = Checkpoints(config, data, METRIC, Processes(Accelerator(cpu=True)))
    draws, refused = np.random.default_rng(0), 0
    for turn in range(300):
        place = int(draws.integers(len(content)))
        if turn % 3 == 0:
            damaged = content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
        elif turn % 3 == 1:
            damaged = content[:place]
        else:
            damaged = exchanged(content, draws)
        path.write_bytes(damaged)
        try:
            checkpoints._read(path)
        except RunError as error:
            assert "remove it to go on" in str(error)
            refused += 1
    assert refused > 200
    path.unlink()


def exchanged(content: bytes, draws: np.random.Generator) -> bytes:
    """The archive with a byte of its pickle exchanged, and checksums that fit."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        files = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    pickled = next(x for name, x in files.items() if name.endswith("data.pkl"))
    pickled[draws.integers(len(pickled))] = draws.integers(256)
    written = BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, x in files.items():
            archive.writestr(name, bytes(x))
    return written.getvalue()


class Malice:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return pytest.fail, ("code in a checkpoint was run",)


@pytest.mark.parametrize("content", [{"of": Malice(), "training": 1}, {"model": 1}, [1]])
def test_another_archive_is_refused_and_its_code_not_run(kept, content):
    config, path, _ = kept
    torch.save(content, path)
    with pytest.raises(RunError, match="is damaged, or no checkpoint"):
        trained(config)
    path.unlink()


def test_a_foreign_checkpoint_is_refused(kept, tmp_path, monkeypatch):
    _, path, content = kept
    path.write_bytes(content)
    other = digits(tmp_path, optim=OptimConfig(epochs=EPOCHS, lr=0.5))
    folder = open_folder(other) / "checkpoints"
    folder.mkdir()
    (folder / path.name).write_bytes(content)
    with pytest.raises(RunError, match=r"checkpoint of .*config\.optim\.lr 0\.001 there, 0\.5 her"):
        trained(other)
    monkeypatch.setattr(checkpoint_module, "__version__", "9.9")
    with pytest.raises(RunError, match=r"version .* there, 9\.9 here"):
        trained(kept[0])


def test_a_damaged_checkpoint_is_told_by_the_command(kept, capsys):
    config, path, _ = kept
    path.write_text("")
    path.with_name("conventional-00000012.pt").write_text("")
    arguments = ["--config", str(config.folder / "config.yaml")]
    assert cli.main(["train", *arguments]) == 1
    assert "conventional-00000012.pt is damaged" in capsys.readouterr().err


def test_a_moved_run_goes_on(whole, tmp_path, monkeypatch):
    config = digits(tmp_path / "here")
    after(7, cut, monkeypatch.setattr)
    with pytest.raises(Cut):
        trained(config)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = digits(tmp_path / "there")
    (moved.folder / "config.yaml").write_text(moved.to_yaml())
    assert_same(trained(moved)[0], whole[0])


def test_overwrite_removes_checkpoints_too(tmp_path):
    config = digits(tmp_path)
    trained(config)
    other = digits(tmp_path, optim=OptimConfig(epochs=1))
    other.run.overwrite = True
    open_folder(other)
    assert not (config.folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"checkpoint_every": -1}, "run.checkpoint_every must be >= 0, got -1"),
        ({"keep_checkpoints": 0}, "run.keep_checkpoints must be > 0, got 0"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        Config(run=RunConfig(**setting))
