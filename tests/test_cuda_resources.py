"""The compiled CUDA kernels, as the module holds them: local memory and matrix instructions."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from idml_fast import backend

pytestmark = pytest.mark.skipif(backend.GPU_MISSING is not None, reason=str(backend.GPU_MISSING))

# Bytes of local memory that a thread may have, where the few tiles with near-duplicates are taken
# again; elsewhere none.
STACK = {"walk_again": 288}


@pytest.fixture(scope="module")
def rows():
    told = subprocess.run(
        [sys.executable, "-m", "idml_fast._cuda.resources", "--json"],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_every_kernel_is_there(rows):
    epilogues = "pairwise", "pairwise backward", "rowstats", "rowstats backward", "nearest"
    dtypes, forms = ("bfloat16", "float16", "float32"), ("distance", "cosine", "official")
    every = set(itertools.product(epilogues, dtypes, forms))
    from idml_fast import _gpu

    for architecture in _gpu.ARCHITECTURES:
        walk = "hopper" if architecture == "90a" else "ampere"
        for kernel in (f"{walk} walk_tiles", "ampere walk_again"):
            found = [
                (row["epilogue"], row["dtype"], row["form"])
                for row in rows
                if (row["architecture"], row["kernel"]) == (architecture, kernel)
            ]
            assert len(found) == len(every), kernel
            assert set(found) == every, kernel


def test_the_kernels_keep_to_the_registers(rows):
    for row in rows:
        assert row["stack"] <= STACK.get(row["kernel"].split()[1], 0), row


def test_products_are_taken_by_the_matrix_units(rows):
    for row in rows:
        assert (row["matrix_instructions"] > 0) == row["kernel"].endswith("walk_tiles"), row


def test_the_kernels_are_not_on_the_cpu():
    with pytest.raises(RuntimeError, match="it serves tensors on a GPU, not on cpu"):
        backend.choose("pairwise", torch.zeros(1), "cuda")
