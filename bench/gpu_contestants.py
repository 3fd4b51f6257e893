"""What bench_gpu.py measures: ours and its peers on embeddings that are made on the GPU."""

from functools import partial

import race
import rivals
import torch
from bench_paired import formula as paired_formula
from bench_rowstats import METRIC, MULTI_SIMILARITY
from torch.nn import functional as F

import idml_fast
from idml_fast import backend

DEVICE = "cuda"
BF16 = torch.bfloat16
PRODUCT = 8192  # rows and columns of the bare product
CHUNK = 2048  # rows that the chunked peer takes at a time
TILE = 8192  # rows and columns of the tiles of Inf-CL's way
PROXY_CHUNK = 13_348  # proxies at a time: a seventh of 93,431
# The CUDA kernels beside those of Triton: who is ours.
BACKENDS = {"ours": "cuda", "triton": "triton"}


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


def listed(items, pairs, peers, *, width, passes, dtype=BF16) -> race.Contestants:
    generator = torch.Generator(DEVICE).manual_seed(2)
    index = torch.randint(items, (2, pairs), generator=generator, device=DEVICE).unbind()
    ours = partial(idml_fast.paired, index=index)  # the metric of `paired_formula` is the default

    def dense(sem, unc):
        return paired_formula(sem, unc, *index)

    leaves = [*embeddings(items, width, dtype, 0)]
    upstream = torch.ones(pairs, dtype=dtype, device=DEVICE)
    return contestants(ours, dense, leaves, passes, peers, upstream=upstream)


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


def by_backend(n, m, peers, *, build) -> race.Contestants:
    """Ours by the CUDA kernels, and by Triton's."""
    found = build(n, m, [peer for peer in peers if peer != "triton"], backend=BACKENDS["ours"])
    if "triton" in peers:
        found["triton"] = build(n, m, (), backend=BACKENDS["triton"])["ours"]
    return {who: found[who] for who in ("ours", *peers)}
