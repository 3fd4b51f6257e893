"""idml_fast.pairwise beside the eager formula, torch.compile of it, and the bare matrix products.

Forward, and forward + backward for a fixed upstream gradient; two sets, and rows against
themselves; fp32 and bf16.
"""

from functools import partial
from pathlib import Path

import pytest
import race
import torch

import idml_fast

D = 512  # width of both embeddings
TAU, GAMMA = 5.0, 0.0
METRIC = idml_fast.Metric(tau=TAU, gamma=GAMMA, form="distance")

ROWS = 4096  # rows and columns that the bars stand for; at another size ratios have no bar
BARS = {  # (sets, passes): the largest ratio of ours to torch.compile, fp32 on two cores
    ("two sets", "forward"): 0.95,
    ("rows against themselves", "forward"): 0.65,
    ("two sets", "forward + backward"): 1.0,
    ("rows against themselves", "forward + backward"): 0.7,
}
BF16_BAR = 0.7  # ours in bf16 / ours in fp32, where the processor multiplies bf16 tiles
MEMORY_BAR = 64  # MiB beyond inputs, output and gradients, at twice ROWS

SETS = pytest.mark.parametrize("sets", ["two sets", "rows against themselves"])
PASSES = pytest.mark.parametrize("passes", ["forward", "forward + backward"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@SETS
@PASSES
@DTYPES
def test_pairwise(race_case, rows, sets, passes, dtype):
    bars = {}
    if rows == ROWS and dtype == torch.float32:
        bars = {"compile": BARS[sets, passes]}
    elif rows == ROWS and has_bf16_tiles():
        bars = {"ours fp32": BF16_BAR}
    race_case(case(rows, sets, passes, dtype, bars=bars))


@SETS
def test_pairwise_memory(race_case, rows, sets):
    """Twice the rows are four times the pairs: what grows with N M shows beside what does not."""
    size = (2 * rows, sets, "forward + backward", torch.float32)
    race_case(case(*size, peers=("eager",), memory_bar=MEMORY_BAR, rounds=1))


def case(rows, sets, passes, dtype, peers=("eager", "compile", "floor"), **rest) -> race.Case:
    # A product of [N, D] and [D, M] is 2 N M D floating-point operations. Forward takes two (the
    # Gram products); backward four more for two sets (a @ s2, a^T @ s, b @ u2, b^T @ u) and two for
    # rows against themselves ((a + a^T) @ s and the same of b). The ~20 operations a pair of the
    # scores are below 1 % of that and left out. Rows against themselves need only half of a Gram
    # product, by symmetry; all of it is counted, so a rate there can pass the machine's peak.
    products = 2 if passes == "forward" else 6 if sets == "two sets" else 4
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    if dtype != torch.float32:
        peers = ("ours fp32", *peers)
    return race.Case(
        title=f"pairwise, {sets}, {passes}, {name}, {rows} x {rows}, D = {D}",
        build=partial(contestants, sets=sets, passes=passes, dtype=dtype),
        shape=(rows, rows),
        peers=peers,
        flop=products * 2.0 * rows * rows * D,
        **rest,
    )


def formula(sem, unc, sem2, unc2):
    """What a user writes: squared distances from a Gram product, clamped, then every score."""
    alpha2 = sem.square().sum(1)[:, None] + sem2.square().sum(1) - 2 * sem @ sem2.T  # [N, M]
    beta2 = unc.square().sum(1)[:, None] + unc2.square().sum(1) + 2 * unc @ unc2.T  # [N, M]
    alpha, beta = alpha2.clamp(min=1e-12).sqrt(), beta2.clamp(min=1e-12).sqrt()
    return alpha * torch.exp(-(beta + GAMMA) / (TAU * alpha))


def contestants(n, m, peers, *, sets, passes, dtype) -> race.Contestants:
    torch.manual_seed(0)
    # Gaussian entries, scaled so that rows have norms near one like a network's embeddings.
    sem, unc = torch.randn(n, D) / D**0.5, torch.randn(n, D) / D**0.5
    sem2, unc2 = torch.randn(m, D) / D**0.5, torch.randn(m, D) / D**0.5
    upstream = torch.randn(n, m)
    two_sets, backward = sets == "two sets", passes == "forward + backward"
    inputs = [sem, unc, sem2, unc2] if two_sets else [sem, unc]

    def call(scores_of, dtype=dtype):
        tensors = [t.detach().to(dtype).requires_grad_(backward) for t in inputs]
        gradient = upstream.to(dtype)

        def forward():
            return (scores_of(*tensors),)

        def forward_and_backward():
            scores = scores_of(*tensors)
            return (scores, *torch.autograd.grad(scores, tensors, gradient))

        return forward_and_backward if backward else forward

    ours = partial(idml_fast.pairwise, metric=METRIC)
    dense = formula if two_sets else lambda sem, unc: formula(sem, unc, sem, unc)

    def compiled():
        torch.compiler.reset()  # or the limit on recompilations makes the later cases eager ones
        return call(torch.compile(dense, dynamic=False))

    build = {
        "ours fp32": lambda: call(ours, torch.float32),
        "eager": lambda: call(dense),
        "compile": compiled,
        "floor": lambda: floor(sem.to(dtype), sem2.to(dtype), two_sets, backward),
    }
    return {"ours": call(ours)} | {peer: build[peer]() for peer in peers}


def floor(rows, columns, two_sets, backward):
    """The matrix products and nothing else, into memory that is already there."""
    pairs = torch.empty(len(rows), len(columns), dtype=rows.dtype)
    row_gradient, column_gradient = torch.empty_like(rows), torch.empty_like(columns)

    def products():
        for _ in ("sem", "unc"):
            torch.mm(rows, columns.T, out=pairs)
            if backward:
                torch.mm(pairs, columns, out=row_gradient)
            if backward and two_sets:
                torch.mm(pairs.T, rows, out=column_gradient)
        return ()

    return products


def has_bf16_tiles() -> bool:
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.exists() and "amx_bf16" in cpu_info.read_text()
