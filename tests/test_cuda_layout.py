"""The layouts of the CUDA kernels and their arithmetic, gone through by tests/cuda/layout.cpp: it
needs a C++ compiler and neither nvcc nor a GPU."""

import os
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT

CHECKS = (
    "pieces_lie_as_tma_puts_them",
    "pieces_have_no_bank_twice",
    "numbers_have_their_places",
    "numbers_have_no_bank_twice",
    "threads_share_all_pairs",
    "threads_share_both_halves",
    "diagonals_have_all_pairs",
    "parts_copy_a_strip",
    "programs_take_all_tiles",
    "nobody_is_a_phase_ahead",
    "exponential_is_that_in_double",
    "scores_are_those_in_double",
    "half_types_round_to_the_nearest",
)
# The kernels' `#pragma unroll` is nvcc's.
OPTIONS = "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"
INCLUDED = "csrc", "kernels/cuda", "tests/cuda"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason="there is no C++ compiler"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    program = tmp_path_factory.mktemp("layout") / "layout"
    folders = [f"-I{ROOT / folder}" for folder in INCLUDED]
    source = ROOT / "tests" / "cuda" / "layout.cpp"
    done = run(*COMPILER, *OPTIONS, *folders, "-o", program, source)
    assert done.returncode == 0, done.stderr
    return program


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("check", CHECKS)
def test_layout(check, program):
    done = run(program, check)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_check_is_run(program):
    assert run(program).stdout.split() == list(CHECKS)
