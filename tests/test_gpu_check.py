"""`make gpu-check` where there is no GPU: its steps, the script for compute-sanitizer."""

import importlib
import os
import subprocess

import pytest
import test_gpu
import torch
from conftest import ROOT

STEPS = ("pip install", "-m gpu", "memcheck", "racecheck", "bench/bench_gpu.py")
# Stands for Python and for compute-sanitizer: says what it was called with, fails where it is told.
STAND_IN = """#!/bin/sh
case "$*" in *"$FAILING"*) echo "failing: $*"; exit 3;; esac
echo "called: $*"
"""

# Nothing of a make that runs the tests reaches this one.
OURS = ("MAKE", "MFLAGS", "IDML_FAST_CUDA_ARCHS")
ENVIRONMENT = {k: x for k, x in os.environ.items() if not k.startswith(OURS)}


def gpu_check(folder, failing="nothing", sanitizer=None, **environment):
    stand_in = folder / "stand-in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    command = ["make", "gpu-check", f"PYTHON={stand_in}", "RESULTS=elsewhere"]
    command.append(f"SANITIZER={sanitizer or stand_in}")
    environment = ENVIRONMENT | {"FAILING": failing} | environment
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def calls(ran):
    said = [line for line in ran.stdout.splitlines() if line.startswith(("called: ", "failing: "))]
    assert len(said) == len(STEPS), ran.stdout + ran.stderr
    return dict(zip(STEPS, said, strict=True))


def test_the_steps_in_order(tmp_path):
    ran = gpu_check(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for step, called in calls(ran).items():
        assert step in called
    assert "tests/test_gpu.py tests/test_gpu_cuda.py " in calls(ran)["-m gpu"]
    assert "--measured=elsewhere" in calls(ran)["-m gpu"]
    assert "--record=elsewhere" in calls(ran)["bench/bench_gpu.py"]


@pytest.mark.parametrize("failing", STEPS)
def test_a_failure_stops_no_later_step_and_is_told_at_the_end(failing, tmp_path):
    ran = gpu_check(tmp_path, failing)
    assert ran.returncode != 0
    assert [step for step, x in calls(ran).items() if x.startswith("failing: ")] == [failing]
    assert ran.stdout.splitlines()[-1].startswith("failed: ")


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [("9.0", "90a-real"), ("8.0\n8.0", "80-real"), ("9.0\n12.0", "120-real;90a-real")],
)
def test_it_compiles_for_the_gpus_that_are_there(capabilities, archs, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{capabilities}'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ran = gpu_check(tmp_path, PATH=path)
    assert f"==== install: env IDML_FAST_CUDA_ARCHS={archs} " in ran.stdout
    ran = gpu_check(tmp_path, PATH=path, IDML_FAST_CUDA_ARCHS="none")
    assert "==== install: env IDML_FAST_CUDA_ARCHS=none " in ran.stdout


def test_without_a_sanitizer_it_says_so(tmp_path):
    ran = gpu_check(tmp_path, sanitizer="no-such-tool")
    assert ran.returncode == 0
    assert "not done, there is no no-such-tool here" in ran.stdout


def test_all_of_it_takes_nine_minutes_at_most():
    command = ["make", "-n", "gpu-check"]
    shown = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in shown.stdout.splitlines()]
    limits = [words[2] for words in lines if words[0] == "step"]
    install, tests, each_tool, benchmarks = map(int, limits)
    assert install + tests + 2 * each_tool + benchmarks <= 540


def test_what_the_sanitizer_runs(monkeypatch):
    monkeypatch.setattr(test_gpu, "DEVICE", torch.device("cpu"))
    importlib.import_module("sanitized").main(kernels="cpu")
