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
import rivals
import torch
from bench_paired import formula as paired_formula
from bench_paired import numbers, operations
from bench_rowstats import METRIC, MULTI_SIMILARITY
from torch.nn import functional as F

import idml_fast
from idml_fast import backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEVICE = "cuda"
BF16 = torch.bfloat16
PART = 192  # rows and columns of the problem whose results are compared with float64's
PRODUCT = 8192  # rows and columns of the bare product
CHUNK = 2048  # rows that the chunked peer takes at a time
TILE = 8192  # rows and columns of the tiles of Inf-CL's way
PROXY_CHUNK = 13_348  # proxies at a time: a seventh of 93,431
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
# The CUDA kernels beside those of Triton: who is ours, and how many times as fast it has to be for
# a place in `idml_fast.backend.CUDA_IS_FASTER`.
BACKENDS = {"ours": "cuda", "triton": "triton"}
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


def embeddings(n, width, dtype, seed) -> tuple[torch.Tensor, torch.Tensor]:
    """sem, of length one, and unc, made where they stay."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    sem, unc = torch.randn(2, n, width, generator=generator, device=DEVICE)
    return F.normalize(sem).to(dtype), (unc / width**0.5).to(dtype)


def product():
    """One product, into memory that is already there."""
    x, y = embeddings(PRODUCT, PRODUCT, BF16, 0)
    out = torch.empty_like(x)
    return lambda: (torch.mm(x, y, out=out),)[1:]


def contestants(
    ours, dense, leaves, passes, peers, *, upstream=None, others=None
) -> race.Contestants:
    """Ours and the formula, which take the leaves: eager, compiled, and in the other ways given,
    each made if it is asked for."""

    def step(function, *leaves):
        if passes == "forward":
            with torch.no_grad():
                return (function(*leaves),)
        results = function(*leaves)
        gradient = None if upstream is None else upstream.to(results)
        return (results.detach(), *torch.autograd.grad(results, leaves, gradient))

    def run(function):
        return partial(step, function, *leaves)

    for leaf in leaves:
        leaf.requires_grad_(passes != "forward")
    build = {
        "truth": lambda: rivals.truth(partial(step, ours), leaves),
        "product": product,
        "eager": lambda: run(dense),
        "compile": lambda: run(rivals.compiled(dense)),
    }
    build |= {who: lambda make=make: run(make()) for who, make in (others or {}).items()}
    return {"ours": run(ours)} | {peer: build[peer]() for peer in peers if peer in build}


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


def multi_similarity(
    n, m, peers, *, width, sets, passes, dtype=BF16, backend=None
) -> race.Contestants:
    two_sets = sets == "two sets"
    labels = torch.arange(n, device=DEVICE) // 4
    labels2 = torch.arange(m, device=DEVICE) // 4 if two_sets else None
    places = torch.arange(n, device=DEVICE)

    def ours(*sides):
        given = {"labels": labels, "labels2": labels2, "metric": METRIC, "backend": backend}
        found = idml_fast.rowstats(*sides, **given, stats=MULTI_SIMILARITY)
        return (F.softplus(found["pull"]) / 2 + F.softplus(found["push"]) / 50).mean()

    def exponents(sem, unc, own, place, sem2, unc2, cols, places2):
        """Of some rows and columns; -inf of a pair that does not count. None is above 25, so that
        their sums need no maximum."""
        scores = rivals.cosine_form(sem, sem2, rivals.distances(unc, unc2, 1), METRIC)
        same = own[:, None] == cols
        positive = same if two_sets else same & (place[:, None] != places2)
        pull = (-2 * (scores - 0.5)).masked_fill(~positive, -torch.inf)
        return pull, (50 * (scores - 0.5)).masked_fill(same, -torch.inf)

    def terms(*sides):
        """Of some rows."""
        wide = torch.promote_types(dtype, torch.float32)
        pull, push = (x.exp().sum(1, dtype=wide) for x in exponents(*sides))
        return torch.log1p(pull) / 2 + torch.log1p(push) / 50

    def log_sums(*sides):
        """Of some rows and columns."""
        wide = torch.promote_types(dtype, torch.float32)
        return torch.stack([x.exp().sum(1, dtype=wide).log() for x in exponents(*sides)], 1)

    def split(sem, unc, sem2=None, unc2=None):
        """What belongs to rows, and what belongs to columns."""
        rows = sem, unc, labels, places
        return rows, (sem2, unc2, labels2, torch.arange(m, device=DEVICE)) if two_sets else rows

    def dense(*leaves):
        rows, columns = split(*leaves)
        return terms(*rows, *columns).mean()

    part = torch.compile(terms, dynamic=False)
    tile = torch.compile(log_sums, dynamic=False)

    def chunked(*leaves):
        return rivals.chunked(part, *split(*leaves), CHUNK).mean()

    def in_forward(*leaves):
        rows, columns = split(*leaves)
        return rivals.InForward.apply(part, CHUNK, len(rows), *rows, *columns) / n

    def tiled(*leaves):
        pull, push = rivals.tiled(tile, *split(*leaves), TILE).unbind(1)
        return (F.softplus(pull) / 2 + F.softplus(push) / 50).mean()

    leaves = [x for k in range(1 + two_sets) for x in embeddings((n, m)[k], width, dtype, k)]
    ways = {"chunked": chunked, "in forward": in_forward, "tiled": tiled}
    others = {who: lambda way=way: way for who, way in ways.items()}
    return contestants(ours, dense, leaves, passes, peers, others=others)


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


def in_float32(n, m, peers, *, width) -> race.Contestants:
    """Ours in IEEE float32, and ours in other ways to multiply it."""
    options = {"width": width, "sets": "two sets", "passes": "forward + backward"}
    options["dtype"] = torch.float32
    not_ours = [peer for peer in peers if peer in ("product", "truth")]
    found = multi_similarity(n, m, not_ours, **options)
    ours = found["ours"]

    def run(precision):
        before = backend.precision
        backend.precision = precision
        try:
            return ours()
        finally:
            backend.precision = before

    modes = [peer for peer in peers if peer not in not_ours]
    return found | {"ours": partial(run, "ieee")} | {mode: partial(run, mode) for mode in modes}


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


def proxy_anchor(n, m, peers, *, width, dtype=BF16) -> race.Contestants:
    (sem, unc), (proxies, _) = (embeddings(k, width, dtype, k) for k in (n, m))
    generator = torch.Generator(DEVICE).manual_seed(0)
    labels = torch.randint(m, (n,), generator=generator, device=DEVICE)
    classes = torch.arange(m, device=DEVICE)

    def ours(sem, unc, proxies):
        return idml_fast.losses.proxy_anchor_loss(sem, unc, labels, proxies=proxies, metric=METRIC)

    def terms(proxies, classes, sem, unc, labels, present):
        """Of some proxies."""
        scores = rivals.cosine_form(sem, proxies, unc.norm(dim=1)[:, None], METRIC)
        scores = scores.to(torch.promote_types(dtype, torch.float32))
        same = labels[:, None] == classes
        pull = torch.where(same, torch.exp(-32 * (scores - 0.1)), 0).sum(0)
        push = torch.where(same, 0, torch.exp(32 * (scores + 0.1))).sum(0)
        return torch.log1p(pull) / present + torch.log1p(push) / m

    def present():
        return torch.zeros(m, device=DEVICE).index_fill(0, labels, 1).sum()

    def dense(sem, unc, proxies):
        return terms(proxies, classes, sem, unc, labels, present()).sum()

    part = torch.compile(terms, dynamic=False)

    def in_forward(sem, unc, proxies):
        sides = proxies, classes, sem, unc, labels, present()
        return rivals.InForward.apply(part, PROXY_CHUNK, 2, *sides)

    leaves, others = [sem, unc, proxies], {"in forward": lambda: in_forward}
    return contestants(ours, dense, leaves, "forward + backward", peers, others=others)


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


def scores(n, m, peers, *, width, passes, dtype=BF16, backend=None) -> race.Contestants:
    def dense(sem, unc, sem2, unc2):
        return rivals.cosine_form(sem, sem2, rivals.distances(unc, unc2, 1), METRIC)

    ours = partial(idml_fast.pairwise, metric=METRIC, backend=backend)
    leaves = [*embeddings(n, width, dtype, 0), *embeddings(m, width, dtype, 1)]
    upstream = torch.ones(n, m, dtype=dtype, device=DEVICE)
    found = contestants(ours, dense, leaves, passes, peers, upstream=upstream)
    if "store" in peers:  # as many numbers, into memory that is already there
        found["store"] = lambda: (upstream.fill_(1),)[1:]
    return found


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


def listed(items, pairs, peers, *, width, passes, dtype=BF16) -> race.Contestants:
    generator = torch.Generator(DEVICE).manual_seed(2)
    index = torch.randint(items, (2, pairs), generator=generator, device=DEVICE).unbind()
    ours = partial(idml_fast.paired, index=index)  # the metric of `paired_formula` is the default

    def dense(sem, unc):
        return paired_formula(sem, unc, *index)

    leaves = [*embeddings(items, width, dtype, 0)]
    upstream = torch.ones(pairs, dtype=dtype, device=DEVICE)
    return contestants(ours, dense, leaves, passes, peers, upstream=upstream)


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


def search(n, m, peers, *, width, k, chunk, dtype=BF16, backend=None) -> race.Contestants:
    rows, columns = embeddings(n, width, dtype, 0), embeddings(m, width, dtype, 1)
    k, metric = min(k, m), idml_fast.Metric.paper()

    def scores(sem, unc):
        """As a user writes them, with the products of cuBLAS."""
        alpha, beta = (
            rivals.distances(x, y, sign)
            for x, y, sign in ((sem, columns[0], -1), (unc, columns[1], 1))
        )
        return rivals.distance_form(alpha, beta, metric)

    part = torch.compile(scores, dynamic=False)

    def chunked():
        parts = zip(*(x.split(chunk) for x in rows), strict=True)
        found = [part(*x).topk(k, largest=False) for x in parts]
        return torch.cat([x.values for x in found]), torch.cat([x.indices for x in found])

    ours = partial(idml_fast.nearest, k=k, metric=metric, backend=backend)
    sides = *rows, *columns
    build = {
        "truth": lambda: rivals.truth(ours, sides),
        "product": product,
        "chunked": lambda: chunked,
    }
    return {"ours": partial(ours, *sides)} | {peer: build[peer]() for peer in peers}


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


def by_backend(n, m, peers, *, build) -> race.Contestants:
    """Ours by the CUDA kernels, and by Triton's."""
    found = build(n, m, [peer for peer in peers if peer != "triton"], backend=BACKENDS["ours"])
    if "triton" in peers:
        found["triton"] = build(n, m, (), backend=BACKENDS["triton"])["ours"]
    return {who: found[who] for who in ("ours", *peers)}


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
