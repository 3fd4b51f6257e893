"""`make demo-images`: image files, a run that is stopped, and the same command that goes on."""

import json
import re
import subprocess
import sys

import any_torchvision
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")
pytest.importorskip("timm", reason="the extra idml_fast[vision] is not installed")

from idml_fast.train.datasets import read

SCRIPT = ROOT / "examples" / "demo_images.py"
SMALL = "--most", "9", "--optim.epochs", "4", "--data.batch_size", "15", "--run.cpu", "true"


def test_it_is_stopped_and_goes_on(tmp_path):
    command = sys.executable, any_torchvision.__file__, SCRIPT, *SMALL, "--folder", tmp_path
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    first, second = re.findall(r"^\$ (idml-fast train .*)$", ran.stdout, flags=re.MULTILINE)
    assert first == second
    assert "stopped by SIGTERM after step" in ran.stderr
    assert "exit status 75" in ran.stdout
    assert "going on from" in ran.stdout
    folder = tmp_path / "demo-images"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] * 2
    results = json.loads((folder / "results.json").read_text())
    assert all(result["recall_at_1"] > 0.3 for result in results.values())  # by chance 0.18
    page = (folder / "report.html").read_text("utf-8")
    assert "cub in" in page and "has 45 images of 5 classes for test" in page
    assert not (folder / "checkpoints").exists()


def test_the_files_are_of_several_modes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import demo_images

    demo_images.write_digits(tmp_path, 4)
    splits = read("cub", tmp_path)
    assert splits.train.classes == ("zero", "one", "two", "three", "four")
    assert splits.test.classes == ("five", "six", "seven", "eight", "nine")
    paths = [splits.root / path for path in splits.test.paths]
    assert len(paths) == 20
    modes = set()
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", (demo_images.SIDE,) * 2)
            modes.add(image.mode)
    assert modes == {"L", "P", "RGB"}
