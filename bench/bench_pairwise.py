"""idml_fast.pairwise beside the eager formula, torch.compile of it, and the bare matrix products.

Forward, and forward + backward for a fixed upstream gradient; two sets, and rows against
themselves; fp32 and bf16. Two sets, forward, in fp32 also beside torch.cdist, and beside products
of some rows at a time with one compiled epilogue.
"""

from functools import partial
from pathlib import Path

import pytest
import race
import rivals
import torch

import idml_fast

D = 512  # width of both embeddings
METRIC = idml_fast.Metric(tau=5.0, gamma=0.0, form="distance")
CHUNK = 512  # rows that the chunked peer takes at a time

ROWS = 4096  # rows and columns that the bars stand for; at another size ratios have no bar
BARS = {  # (sets, passes): the largest ratio of ours to torch.compile, fp32 on two cores
    ("two sets", "forward"): 0.95,
    ("rows against themselves", "forward"): 0.65,
    ("two sets", "forward + backward"): 1.0,
    ("rows against themselves", "forward + backward"): 0.7,
}
BF16_BAR = 0.7  # ours in bf16 / ours in fp32, where the processor multiplies bf16 tiles
MEMORY_BAR = 64  # MiB beyond inputs, output and gradients, at twice ROWS

# The most pairs that are compared with float64, which takes longer than all that is measured; of
# more, a part.
JUDGED = {"forward": ROWS**2, "forward + backward": 2**21}

# Rows, columns and width of batches beside the proxies of Stanford Online Products, of 60,000
# classes and of MS1M's faces; and of large batches.
SHAPES = [
    (120, 11_318, 512),
    (1024, 60_000, 512),
    (4096, 93_431, 512),
    (32_768, 32_768, 512),
    (65_536, 65_536, 128),
]

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
    race_case(case(rows, rows, sets, passes, dtype, bars=bars))


@pytest.mark.parametrize(("n", "m", "width"), SHAPES)
def test_pairwise_of_a_shape(race_case, n, m, width):
    size = (n, m, "two sets", "forward + backward", torch.float32, width)
    race_case(case(*size, peers=("eager", "compile", "floor")))


@SETS
def test_pairwise_memory(race_case, rows, sets):
    """Twice the rows are four times the pairs: what grows with N M shows beside what does not."""
    size = (2 * rows, 2 * rows, sets, "forward + backward", torch.float32)
    race_case(case(*size, peers=("eager",), memory_bar=MEMORY_BAR, rounds=1))


def case(n, m, sets, passes, dtype, width=D, peers=None, **rest) -> race.Case:
    # A product of [N, D] and [D, M] is 2 N M D floating-point operations. Forward takes two (the
    # Gram products); backward four more for two sets (a @ s2, a^T @ s, b @ u2, b^T @ u) and two for
    # rows against themselves ((a + a^T) @ s and the same of b). The ~20 operations a pair of the
    # scores are below 1 % of that and left out. Rows against themselves need only half of a Gram
    # product, by symmetry; all of it is counted, so a rate there can pass the machine's peak.
    products = 2 if passes == "forward" else 6 if sets == "two sets" else 4
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    if peers is None:
        peers = ("eager", "compile", "floor")
        if dtype != torch.float32:
            peers = ("ours fp32", *peers)
        elif sets == "two sets" and passes == "forward":
            peers = (*peers, "chunked", "cdist")
    return race.Case(
        title=f"pairwise, {sets}, {passes}, {name}, {n} x {m}, D = {width}",
        build=partial(contestants, sets=sets, passes=passes, dtype=dtype, width=width),
        shape=(n, m),
        peers=peers,
        flop=products * 2.0 * n * m * width,
        dtype=name,
        pairs=n * m,
        held=3.0 * n * m * dtype.itemsize,  # scores, their upstream gradient, and it in float32
        truth=(n, m) if n * m <= JUDGED[passes] else (256, 256 if sets != "two sets" else m),
        **rest,
    )


def formula(sem, unc, sem2, unc2):
    """What a user writes."""
    alpha, beta = rivals.distances(sem, sem2, -1), rivals.distances(unc, unc2, 1)
    return rivals.distance_form(alpha, beta, METRIC)


def contestants(n, m, peers, *, sets, passes, dtype, width=D) -> race.Contestants:
    torch.manual_seed(0)
    # Gaussian entries, scaled so that rows have norms near one like a network's embeddings.
    sem, unc, sem2, unc2 = (torch.randn(k, width) / width**0.5 for k in (n, n, m, m))
    rounded = torch.randn(n, m).to(dtype)  # the upstream gradient
    two_sets, backward = sets == "two sets", passes == "forward + backward"
    inputs = [sem, unc, sem2, unc2] if two_sets else [sem, unc]

    def leaves(as_dtype):
        """The same numbers for all, rounded to the dtype of the case."""
        return [t.detach().to(dtype).to(as_dtype).requires_grad_(backward) for t in inputs]

    def step(scores_of, gradient, *tensors):
        scores = scores_of(*tensors)
        return (scores, *(torch.autograd.grad(scores, tensors, gradient) if backward else ()))

    def call(scores_of, dtype=dtype):
        return partial(step, scores_of, rounded.to(dtype), *leaves(dtype))

    ours = partial(idml_fast.pairwise, metric=METRIC)
    dense = formula if two_sets else lambda sem, unc: formula(sem, unc, sem, unc)

    def chunked():
        part = rivals.compiled(formula)
        return call(lambda s, u, s2, u2: rivals.chunked(part, (s, u), (s2, u2), CHUNK))

    build = {
        "truth": lambda: rivals.truth(partial(step, ours), [rounded, *leaves(dtype)]),
        "ours fp32": lambda: call(ours, torch.float32),
        "eager": lambda: call(dense),
        "compile": lambda: call(rivals.compiled(dense)),
        "chunked": chunked,
        "cdist": lambda: call(partial(rivals.by_cdist, metric=METRIC)),
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
