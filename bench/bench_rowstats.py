"""Losses on idml_fast.rowstats beside their formulas in eager, torch.compile of them, the products.

Proxy-Anchor with certain proxies: three products are enough, one of `sem` forward and two backward;
also in the form that its authors released, beside their expression. Multi-Similarity of a batch
against itself: no product less than four, two halves forward, two halves again and two whole ones
backward.
"""

from functools import partial

import pytest
import race
import rivals
import torch
from torch.nn import functional as F

import idml_fast
from idml_fast.stats import LogSumExp

D = 512  # width of both embeddings
METRIC = idml_fast.Metric.paper("cosine")
CLASSES = 11318  # of Stanford Online Products, each with a proxy
BATCHES = (120, 1024)
PROXIES = [  # batch, classes and width: MS1M's faces among others
    *((batch, CLASSES, D) for batch in BATCHES),
    (1024, 60_000, D),
    (4096, 93_431, D),
    (4096, 2_060_000, 256),
]
PROXY_ANCHOR_BARS = {"compile": 0.7, "products": 1.4}  # ours to these, at `CLASSES`, on two cores
PROXY_CHUNKS, CHUNK = 4, 512  # parts of the proxies, or rows, that the chunked peer takes at a time
MULTI_SIMILARITY = {"pull": LogSumExp(where="same", scale=-2.0, shift=0.5)} | {
    "push": LogSumExp(where="different", scale=50.0, shift=0.5)
}
ROWS, ROWS_BAR, ROWS_MEMORY = 16384, 0.15, 256  # of a large batch: ours to eager, MiB
MOST_ROWS, MOST_ROWS_BAR, MOST_ROWS_MEMORY = 65536, 1.2, 1024  # time a pair to that of `ROWS`


@pytest.mark.parametrize(("batch", "classes", "width"), PROXIES)
def test_proxy_anchor(race_case, batch, classes, width):
    peers = "eager", "compile", "products", "chunked"
    bars = PROXY_ANCHOR_BARS if classes == CLASSES else {}
    race_case(proxy_anchor_case(batch, classes, width, peers, METRIC, bars=bars))


@pytest.mark.parametrize("batch", BATCHES)
def test_proxy_anchor_as_released(race_case, batch):
    peers = "released", "products"
    race_case(proxy_anchor_case(batch, CLASSES, D, peers, idml_fast.Metric.official()))


def proxy_anchor_case(batch, classes, width, peers, metric, **rest) -> race.Case:
    released = ", as released" if metric.form == "official" else ""
    return race.Case(
        title=f"Proxy-Anchor{released}, forward + backward, fp32, {batch} x {classes}, D = {width}",
        build=partial(proxy_anchor, metric=metric, width=width),
        shape=(batch, classes),
        peers=peers,
        flop=3 * 2.0 * batch * classes * width,  # the products alone; the ~60 a pair left out
        pairs=batch * classes,
        held=4.0 * width * (2 * classes + 4 * batch),  # and their gradients
        costs={"products": rivals.Cost(1.2, 1)},
        truth=(batch, classes) if batch * classes <= 2**21 else (64, CLASSES),
        **rest,
    )


def test_multi_similarity(race_case, rows):
    peers = "eager", "compile", "products", "chunked", "keops"
    race_case(multi_similarity_case(rows, D, peers))


@pytest.mark.parametrize(("rows", "width"), [(ROWS, D), (32_768, D), (MOST_ROWS, D), (65_536, 128)])
def test_multi_similarity_of_a_large_batch(race_case, rows, width):
    peers, bars = ("eager", "products"), {}
    if (rows, width) == (ROWS, D):
        bars = {"bars": {"eager": ROWS_BAR}, "memory_bar": ROWS_MEMORY}
    if (rows, width) == (MOST_ROWS, D):
        peers = (AS_MANY_PAIRS,)
        bars = {"bars": {AS_MANY_PAIRS: MOST_ROWS_BAR}, "memory_bar": MOST_ROWS_MEMORY}
    race_case(multi_similarity_case(rows, width, peers, rounds=0, **bars))


AS_MANY_PAIRS = f"{ROWS} rows"  # as often as gives the same number of pairs


def multi_similarity_case(rows, width, peers, **rest) -> race.Case:
    return race.Case(
        title=f"Multi-Similarity, forward + backward, fp32, {rows} x {rows}, D = {width}",
        build=partial(multi_similarity, width=width),
        shape=(rows, rows),
        peers=peers,
        # Two Gram products forward and two gradients; a Gram product is counted whole though half
        # of it is enough.
        flop=4 * 2.0 * rows * rows * width,
        pairs=rows * rows,
        held=4.0 * rows * 4 * width,
        costs={"eager": rivals.Cost(9, 15)},  # with two exponentials more a pair
        truth=(rows, rows) if rows <= 1024 else (512, 512),
        **rest,
    )


def proxy_anchor(n, m, peers, *, metric=METRIC, width=D) -> race.Contestants:
    torch.manual_seed(0)
    sem, proxies = (F.normalize(torch.randn(k, width)) for k in (n, m))
    unc = torch.randn(n, width) / width**0.5
    labels, classes = torch.randint(m, (n,)), torch.arange(m)
    leaves = [x.requires_grad_() for x in (sem, unc, proxies)]
    present = len(labels.unique())

    def terms(proxies, classes, sem, unc, labels):
        """Of some proxies."""
        scores = rivals.cosine_form(sem, proxies, unc.norm(dim=1)[:, None], metric)
        same = labels[:, None] == classes
        pull = torch.where(same, torch.exp(-32 * (scores - 0.1)), 0).sum(0)
        push = torch.where(same, 0, torch.exp(32 * (scores + 0.1))).sum(0)
        return torch.log1p(pull) / present + torch.log1p(push) / m

    def dense(sem, unc, proxies):
        return terms(proxies, classes, sem, unc, labels).sum()

    def chunked():
        part, size = rivals.compiled(terms), -(-m // PROXY_CHUNKS)

        def loss(sem, unc, proxies):
            return rivals.chunked(part, (proxies, classes), (sem, unc, labels), size).sum()

        return step(loss, leaves)

    def ours(sem, unc, proxies):
        return idml_fast.losses.proxy_anchor_loss(sem, unc, labels, proxies=proxies, metric=metric)

    def products():
        scores = sem.detach() @ proxies.detach().T
        torch.mm(scores, proxies.detach())
        torch.mm(scores.T, sem.detach())
        return ()

    def released(sem, unc, proxies):
        return rivals.released(sem, unc, labels, proxies)

    others = {
        "products": lambda: products,
        "chunked": chunked,
        "released": lambda: step(released, leaves),
    }
    return contestants(ours, dense, leaves, peers, others)


def multi_similarity(n, m, peers, *, width=D) -> race.Contestants:
    sem, unc, labels = batch(n, width)
    places = torch.arange(n)

    def terms(sem, unc, labels, places, all_sem, all_unc, all_labels, all_places):
        """Of some rows."""
        beta = rivals.distances(unc, all_unc, 1)
        scores = rivals.cosine_form(sem, all_sem, beta, METRIC)
        same = labels[:, None] == all_labels
        positive = same & (places[:, None] != all_places)
        pull = torch.where(positive, torch.exp(-2 * (scores - 0.5)), 0).sum(1)
        push = torch.where(same, 0, torch.exp(50 * (scores - 0.5))).sum(1)
        return torch.log1p(pull) / 2 + torch.log1p(push) / 50

    def dense(sem, unc):
        sides = sem, unc, labels, places
        return terms(*sides, *sides).mean()

    def chunked():
        part = rivals.compiled(terms)

        def loss(sem, unc):
            sides = sem, unc, labels, places
            return rivals.chunked(part, sides, sides, CHUNK).mean()

        return step(loss, [sem, unc])

    def products():
        # In blocks of rows, into memory that is already there: N x M would not fit.
        for x in (sem.detach(), unc.detach()):
            gradient = torch.empty_like(x)
            for begin in range(0, n, 1024):
                rows = slice(begin, begin + 1024)
                torch.mm(x[rows] @ x.T, x, out=gradient[rows])
        return ()

    def by_keops(sem, unc):
        return rivals.keops_multi_similarity(sem, unc, labels, METRIC)

    def as_many_pairs():
        smaller = batch(ROWS, width)
        for _ in range((n // ROWS) ** 2):
            step(partial(by_rowstats, labels=smaller[2]), smaller[:2])()
        return ()

    others = {
        "products": lambda: products,
        "chunked": chunked,
        "keops": lambda: step(by_keops, [sem, unc]),
        AS_MANY_PAIRS: lambda: as_many_pairs,
    }
    return contestants(partial(by_rowstats, labels=labels), dense, [sem, unc], peers, others)


def batch(n, width=D):
    """Embeddings of n items, four of each class, that learn; and their labels."""
    torch.manual_seed(0)
    sem, unc = F.normalize(torch.randn(n, width)), torch.randn(n, width) / width**0.5
    return sem.requires_grad_(), unc.requires_grad_(), torch.arange(n) // 4


def by_rowstats(sem, unc, labels):
    found = idml_fast.rowstats(sem, unc, labels=labels, metric=METRIC, stats=MULTI_SIMILARITY)
    return (F.softplus(found["pull"]) / 2 + F.softplus(found["push"]) / 50).mean()


def contestants(ours, dense, leaves, peers, others) -> race.Contestants:
    """Ours, the formula in two ways, and others of the peers."""
    build = others | {
        "truth": lambda: rivals.truth(partial(forward_and_backward, ours), leaves),
        "eager": lambda: step(dense, leaves),
        "compile": lambda: step(rivals.compiled(dense), leaves),
    }
    return {"ours": step(ours, leaves)} | {peer: build[peer]() for peer in peers}


def step(loss, leaves):
    return partial(forward_and_backward, loss, *leaves)


def forward_and_backward(loss, *leaves):
    value = loss(*leaves)
    return (value.detach(), *torch.autograd.grad(value, leaves))
