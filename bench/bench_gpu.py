"""On an NVIDIA GPU: every operation beside its peers, in bfloat16 where a case says nothing else.

Among the contestants is one bare product of square matrices: the share of its rate that ours reach
is that of the machine as it is in this run. What is counted are the products that the definition
asks for: two forward, four more backward for two sets, two for rows against themselves. Beside one
case each are the ways of others to bound the memory: some rows at a time and again in the backward
(chunked), gradients in the forward (Liger), tiles of a log-sum-exp (Inf-CL).
"""

from functools import partial

import pytest
import race
import torch
from bench_paired import numbers, operations
from gpu_contestants import (
    PRODUCT,
    by_backend,
    in_float32,
    listed,
    multi_similarity,
    proxy_anchor,
    scores,
    search,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

PART = 192  # rows and columns of the problem whose results are compared with float64's
# What runs the formula. To compile it takes longer than all the rounds of a case.
FORMULAS = {"forward": ("eager",), "forward + backward": ("compile", "eager")}
SETS = pytest.mark.parametrize("sets", ["two sets", "self"])
PASSES = pytest.mark.parametrize("passes", ["forward", "forward + backward"])

# The share of the bare product's rate that row statistics must reach, by width.
SHARES = {
    512: {"forward": 0.70, "forward + backward": 0.60},
    128: {"forward": 0.45, "forward + backward": 0.45},
    64: {"forward": 0.25, "forward + backward": 0.25},
}
# Of rowstats at 32,768 x 32,768, forward and backward: ours to the peers.
BARS = {"chunked": 1 / 1.3, "compile": 1 / 3, "eager": 1 / 8}
MEMORY_BAR = 300  # MiB, of the same
MILLION, MILLION_BAR = 1_000_000, 25  # rows and columns, and the seconds that they may take
CLASSES = {  # of a batch, with a proxy each
    120: 11_318,  # Stanford Online Products
    1024: 60_000,
    4096: 93_431,  # MS1M's faces
}
MANY_CLASSES, NARROW = 2_060_000, 256  # faces with a proxy each; the width of their embeddings
IN_BOUNDS = ("chunked", "in forward", "tiled")  # peers whose memory does not grow with N x M
# How many times as fast as Triton's the CUDA kernels have to be for a place in
# `idml_fast.backend.CUDA_IS_FASTER`.
FASTER = 1.05
# The share of the bare product's rate that their row statistics must reach, by pass and width; and
# how much longer than its products or its stores, the slower ones, a matrix of scores may take.
CUDA_SHARES = {("forward", 512): 0.75}
CUDA_FLOORS = {("forward", 512): 1.15}
# Rows, columns, width, k, and the rows that the chunked peer takes at a time, which divide them.
SEARCHES = [
    (60_502, 60_502, 512, 1000, 2327),
    (60_502, 60_502, 512, 10, 2327),
    (10_000, 1_000_000, 128, 100, 250),
]


def gpu_case(title, build, shape, flop, peers=("product",), **rest) -> race.Case:
    return race.Case(
        title=title,
        build=build,
        shape=shape,
        peers=peers,
        flop=flop,
        device="cuda",
        product_flop=2.0 * PRODUCT**3,
        **{"dtype": "bf16", "truth": (PART,) * len(shape), **rest},
    )


# ----------------------------------------------------------------------------------------- rowstats


@SETS
@PASSES
@pytest.mark.parametrize("rows", [16_384, 32_768])
@pytest.mark.parametrize("width", SHARES)
def test_rowstats(race_case, width, rows, passes, sets):
    backward = passes != "forward"
    beside = (width, rows, sets, passes) == (512, 32_768, "two sets", "forward + backward")
    products = 6 if sets == "two sets" and backward else 4 if backward else 2
    race_case(
        gpu_case(
            f"rowstats, {sets}, {passes}, {rows} x {rows}, D = {width}",
            partial(multi_similarity, width=width, sets=sets, passes=passes),
            (rows, rows),
            products * 2.0 * rows * rows * width,
            share_bar=SHARES[width][passes],
            peers=("product", *BARS, *IN_BOUNDS[1:]) if beside else ("product",),
            bars=BARS if beside else {},
            memory_bar=MEMORY_BAR,
        )
    )


def test_rowstats_of_a_large_batch(race_case, rows=65_536, width=128):
    race_case(
        gpu_case(
            f"rowstats, two sets, forward + backward, {rows} x {rows}, D = {width}",
            partial(multi_similarity, width=width, sets="two sets", passes="forward + backward"),
            (rows, rows),
            6 * 2.0 * rows * rows * width,
            memory_bar=MEMORY_BAR,
        )
    )


def test_rowstats_of_a_million(race_case, full):
    if not full:
        pytest.skip("a million times a million pairs take half a minute: --full")
    race_case(
        gpu_case(
            f"rowstats, two sets, forward + backward, {MILLION} x {MILLION}, D = 512",
            partial(multi_similarity, width=512, sets="two sets", passes="forward + backward"),
            (MILLION, MILLION),
            6 * 2.0 * MILLION**2 * 512,
            seconds_bar=MILLION_BAR,
            rounds=0,
        )
    )


def test_rowstats_in_float32(race_case, rows=16_384, width=512):
    race_case(
        gpu_case(
            f"rowstats, two sets, forward + backward, fp32, {rows} x {rows}, D = {width}",
            partial(in_float32, width=width),
            (rows, rows),
            6 * 2.0 * rows * rows * width,
            peers=("product", "tf32x3", "tf32"),
            dtype="fp32",
        )
    )


# ------------------------------------------------------------------------------------- Proxy-Anchor


@pytest.mark.parametrize("batch", CLASSES)
def test_proxy_anchor(race_case, batch, width=512):
    classes = CLASSES[batch]
    race_case(
        gpu_case(
            f"Proxy-Anchor, forward + backward, {batch} x {classes}, D = {width}",
            partial(proxy_anchor, width=width),
            (batch, classes),
            3 * 2.0 * batch * classes * width,  # the proxies are certain
            # Where the classes are many, in Liger's way too.
            peers=("product", "compile", "eager", *(["in forward"] if batch == 4096 else [])),
        )
    )


def test_proxy_anchor_of_many_classes(race_case, batch=4096):
    race_case(
        gpu_case(
            f"Proxy-Anchor, forward + backward, {batch} x {MANY_CLASSES}, D = {NARROW}",
            partial(proxy_anchor, width=NARROW),
            (batch, MANY_CLASSES),
            3 * 2.0 * batch * MANY_CLASSES * NARROW,
            rounds=3,
        )
    )


# --------------------------------------------------------------------------------- pairwise, paired


@PASSES
def test_pairwise(race_case, passes, rows=16_384, width=512):
    race_case(
        gpu_case(
            f"pairwise, two sets, {passes}, {rows} x {rows}, D = {width}",
            partial(scores, width=width, passes=passes),
            (rows, rows),
            (2 if passes == "forward" else 6) * 2.0 * rows * rows * width,
            peers=("product", *FORMULAS[passes]),
        )
    )


@PASSES
def test_paired(race_case, passes, items=60_502, pairs=1_000_000, width=512):
    # As bench_paired.py counts: these are no products.
    race_case(
        gpu_case(
            f"paired, {passes}, {pairs} pairs of {items} items, D = {width}",
            partial(listed, width=width, passes=passes),
            (items, pairs),
            operations(passes, width) * pairs,
            bytes=2.0 * numbers(passes, width) * pairs,
            peers=FORMULAS[passes],
        )
    )


# ------------------------------------------------------------------------------------------ nearest


@pytest.mark.parametrize(("n", "m", "width", "k", "chunk"), SEARCHES)
def test_nearest(race_case, n, m, width, k, chunk):
    race_case(
        gpu_case(
            f"nearest, {n} x {m}, D = {width}, k = {k}",
            partial(search, width=width, k=k, chunk=chunk),
            (n, m),
            2 * 2.0 * n * m * width,
            peers=("product", "chunked"),
            rounds=3,
        )
    )


# --------------------------------------------------------------------------------- the CUDA kernels


def cuda_case(op, title, width, build, shape, flop, peers=(), **rest) -> race.Case:
    return gpu_case(
        f"CUDA kernels: {title}",
        partial(by_backend, build=partial(build, width=width)),
        shape,
        flop,
        peers=("product", "triton", *peers),
        choice=race.Choice(op, "bf16", width, "triton", FASTER),
        **rest,
    )


@SETS
@PASSES
@pytest.mark.parametrize("width", SHARES)
def test_rowstats_by_cuda(race_case, width, passes, sets, rows=16_384):
    backward = passes != "forward"
    products = 6 if sets == "two sets" and backward else 4 if backward else 2
    race_case(
        cuda_case(
            "rowstats",
            f"rowstats, {sets}, {passes}, {rows} x {rows}, D = {width}",
            width,
            partial(multi_similarity, sets=sets, passes=passes),
            (rows, rows),
            products * 2.0 * rows * rows * width,
            share_bar=CUDA_SHARES.get((passes, width)) if sets == "two sets" else None,
            memory_bar=MEMORY_BAR,
        )
    )


@PASSES
@pytest.mark.parametrize("width", [512, 128])
def test_pairwise_by_cuda(race_case, width, passes, rows=16_384):
    race_case(
        cuda_case(
            "pairwise",
            f"pairwise, two sets, {passes}, {rows} x {rows}, D = {width}",
            width,
            partial(scores, passes=passes),
            (rows, rows),
            (2 if passes == "forward" else 6) * 2.0 * rows * rows * width,
            peers=("store",) if passes == "forward" else (),
            floor_bar=CUDA_FLOORS.get((passes, width)),
        )
    )


@pytest.mark.parametrize(("n", "m", "width", "k", "chunk"), SEARCHES[1:])
def test_nearest_by_cuda(race_case, n, m, width, k, chunk):
    race_case(
        cuda_case(
            "nearest",
            f"nearest, {n} x {m}, D = {width}, k = {k}",
            width,
            partial(search, k=k, chunk=chunk),
            (n, m),
            2 * 2.0 * n * m * width,
            rounds=3,
        )
    )
