"""The examples in the documentation run, and print what they say they print."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import any_torchvision
import pytest
import torch
from conftest import ROOT

import idml_fast

MODULES = [
    module.name
    for module in pkgutil.walk_packages(idml_fast.__path__, "idml_fast.")
    if not any(part.startswith("_") for part in module.name.split("."))
]
FUNCTIONS = [
    *(name for name in idml_fast.__all__ if callable(getattr(idml_fast, name))),
    *(f"losses.{name}" for name in idml_fast.losses.__all__ if name[0].isupper()),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_user_calls_has_an_example(name):
    found = idml_fast
    for part in name.split("."):
        found = getattr(found, part)
    assert doctest.DocTestParser().get_examples(inspect.getdoc(found))


def test_the_python_blocks_of_the_readme_run_in_order(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("train_*.py")), ids=lambda path: path.stem
)
def test_an_example_learns_to_find_unseen_digits(path, tmp_path):
    assert len(path.read_text().splitlines()) < 40
    command = sys.executable, any_torchvision.__file__, path  # Lightning imports torchvision
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"Recall@1 among unseen digits: ([0-9.]+)%", ran.stdout)
    assert float(found[1]) > 75  # by chance 20, before training about 70
