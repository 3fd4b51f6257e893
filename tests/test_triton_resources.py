"""The Triton kernels compiled ahead of time, for GPUs that need not be there."""

import itertools
import json
import os
import subprocess
import sys

import pytest

# Bytes of a thread's stack: of kernels that take every tile, and of those that take again the few
# tiles with near-duplicates. No other kernel spills at all.
SPILLED = {"walk flag": 256, "walk again": 3072}
# Bytes that a block may have on each architecture.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}

COUNT = """
import collections, json
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from idml_fast._triton import resources, rowstats
from idml_fast.rowstats import describe
from idml_fast.stats import LogSumExp

# What launches no kernel: memory, views of it, a question about dtypes.
FREE = {"empty", "empty_like", "new_empty", "slice", "view", "alias", "permute", "promote_types"}
operations = collections.Counter()

class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operations[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))

def tensor(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")

classes, batch = 11318, 120  # Proxy-Anchor of Stanford Online Products
sem, unc = tensor(batch, 512), tensor(batch, 512)
operands = tensor(classes, 512), None, sem, unc, 5.0, 0.0, None, "cosine"
labels = tensor(classes, dtype=torch.int64), tensor(batch, dtype=torch.int64)
statistics = [LogSumExp(where="same", scale=-32.0), LogSumExp(where="different", scale=32.0)]
described, _ = describe(statistics, operands[0])
with resources.recording(90, "tf32x3") as kernels, Counting():
    values, _, state, kept = rowstats.forward(*operands, *labels, *described, 0)
    wanted = [True, False, True, True, False]
    rowstats.backward(values, state, kept, *operands, *labels, *described, wanted=wanted)
launched = [resources.name_of(kernel) for kernel in kernels]
launched += [name for name, count in operations.items() if name not in FREE for _ in range(count)]
print(json.dumps(launched))
"""


def run(*arguments: str) -> str:
    """Python without the interpreter of Triton, whose kernels cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


def resources(*arguments: str) -> list[dict]:
    """Rows of the table."""
    told = run("-m", "idml_fast._triton.resources", "--json", *arguments)
    return [json.loads(line) for line in told.splitlines()]


def check(rows: list[dict]) -> None:
    """No kernel takes more than it may, and products are taken by the matrix units."""
    for row in rows:
        told = json.dumps(row)
        assert row["registers"] <= 255, told
        assert row["spilled"] <= SPILLED.get(row["kernel"], 0), told
        assert row["shared"] <= SHARED[row["architecture"]], told
        if row["kernel"] == "walk flag":
            assert (row["matrix_instructions"] > 0) == (row["kind"] != "ieee"), told


CASES = "rowstats, two sets, cosine", "rowstats, self, cosine"
KINDS = "half", "ieee", "tf32x3", "bf16x3", "tf32"
each_architecture = pytest.mark.parametrize("architecture", ["80", "90", "100"])


@each_architecture
def test_every_kernel_compiles_within_the_chip(architecture):
    """The row statistics have the largest epilogues: both passes, of two sets and of one."""
    rows = resources("--architectures", architecture, "--widths", "512", "--cases", *CASES)
    check(rows)
    assert {row["kind"] for row in rows} == set(KINDS)
    kernels = {"squared_norms", "walk flag", "walk again", "combine", "add_own"}
    assert {row["kernel"] for row in rows} == kernels


@each_architecture
def test_the_configurations_of_narrow_embeddings_do_too(architecture):
    """What differs from those of wide ones is how the products are taken."""
    rows = resources(
        *("--architectures", architecture, "--widths", "64", "128"),
        *("--kernels", "walk flag", "--cases", *CASES),
    )
    check(rows)
    assert {(row["kind"], row["width"]) for row in rows} == set(itertools.product(KINDS, (64, 128)))


@pytest.mark.parametrize("op", ["pairwise", "nearest", "paired"])
def test_every_operation_compiles(op):
    rows = resources(
        *("--architectures", "90", "--kinds", "half", "--widths", "512"),
        *("--cases", f"{op}, two sets, distance", f"{op}, self, cosine"),
    )
    check(rows)
    assert len(rows) > 2


def test_smaller_chips_have_room():
    check(
        resources(
            *("--architectures", "86", "--kinds", "half", "tf32x3", "--widths", "512"),
            *("--cases", "rowstats, self, cosine"),
        )
    )


def test_a_step_of_proxy_anchor_is_six_kernels():
    launched = json.loads(run("-c", COUNT))
    assert sorted(launched) == ["add_own", "combine", "mm", "mm", "walk here", "walk here"]


def test_the_package_does_not_import_triton():
    code = (
        "import sys, torch, idml_fast, idml_fast.losses\n"
        "idml_fast.pairwise(torch.eye(3), torch.eye(3))\n"
        "print('triton' in sys.modules)"
    )
    assert run("-c", code).strip() == "False"
