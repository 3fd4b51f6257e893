"""Losses on idml_fast.rowstats beside their formulas in eager, torch.compile of them, the products.

Proxy-Anchor with certain proxies: three products are enough, one of `sem` forward and two backward.
Multi-Similarity of a batch against itself: no product less than four, two halves forward, two
halves again and two whole ones backward.
"""

from functools import partial

import pytest
import race
import torch
from torch.nn import functional as F

import idml_fast
from idml_fast.stats import LogSumExp

D = 512  # width of both embeddings
METRIC = idml_fast.Metric.paper("cosine")
CLASSES = 11318  # of Stanford Online Products, each with a proxy
BATCHES = (120, 1024)
PROXY_ANCHOR_BARS = {"compile": 0.7, "products": 1.4}  # ours to these, on two cores
MULTI_SIMILARITY = {"pull": LogSumExp(where="same", scale=-2.0, shift=0.5)} | {
    "push": LogSumExp(where="different", scale=50.0, shift=0.5)
}
ROWS, ROWS_BAR, ROWS_MEMORY = 16384, 0.15, 256  # of a large batch: ours to eager, MiB
MOST_ROWS, MOST_ROWS_BAR, MOST_ROWS_MEMORY = 65536, 1.2, 1024  # time a pair to that of `ROWS`


@pytest.mark.parametrize("batch", BATCHES)
def test_proxy_anchor(race_case, batch):
    race_case(
        race.Case(
            title=f"Proxy-Anchor, forward + backward, fp32, {batch} x {CLASSES}, D = {D}",
            build=proxy_anchor,
            shape=(batch, CLASSES),
            peers=("eager", "compile", "products"),
            flop=3 * 2.0 * batch * CLASSES * D,  # the products alone; the ~60 a pair left out
            bars=PROXY_ANCHOR_BARS,
        )
    )


def test_multi_similarity(race_case, rows):
    race_case(multi_similarity_case(rows, ("eager", "compile", "products")))


def test_multi_similarity_of_a_large_batch(race_case, full):
    if not full:
        pytest.skip(f"{ROWS} rows take eager about a minute a call and 17 GB: --full")
    bars = {"bars": {"eager": ROWS_BAR}, "memory_bar": ROWS_MEMORY}
    race_case(multi_similarity_case(ROWS, ("eager", "products"), rounds=0, **bars))


def test_multi_similarity_of_a_very_large_batch(race_case, full):
    if not full:
        pytest.skip(f"{MOST_ROWS} rows take minutes: --full")
    bars = {"bars": {AS_MANY_PAIRS: MOST_ROWS_BAR}, "memory_bar": MOST_ROWS_MEMORY}
    race_case(multi_similarity_case(MOST_ROWS, (AS_MANY_PAIRS,), rounds=0, **bars))


AS_MANY_PAIRS = f"{ROWS} rows"  # as often as gives the same number of pairs


def multi_similarity_case(rows, peers, **rest) -> race.Case:
    return race.Case(
        title=f"Multi-Similarity, forward + backward, fp32, {rows} x {rows}, D = {D}",
        build=multi_similarity,
        shape=(rows, rows),
        peers=peers,
        # Two Gram products forward and two gradients; a Gram product is counted whole though half
        # of it is enough.
        flop=4 * 2.0 * rows * rows * D,
        **rest,
    )


def formula(sem, unc, sem2, beta):
    """The scores as a user writes them; ``beta`` is what the uncertainties come to."""
    squares, squares2 = sem.square().sum(1), sem2.square().sum(1)
    dots = sem @ sem2.T
    alpha = (squares[:, None] + squares2 - 2 * dots).clamp(min=1e-12).sqrt()
    cosine = dots * squares.rsqrt()[:, None] * squares2.rsqrt()
    return 1 - (1 - cosine) * torch.exp(-(beta + METRIC.gamma) / (METRIC.tau * alpha))


def proxy_anchor(n, m, peers) -> race.Contestants:
    torch.manual_seed(0)
    sem, proxies = F.normalize(torch.randn(n, D)), F.normalize(torch.randn(m, D))
    unc = torch.randn(n, D) / D**0.5
    labels, classes = torch.randint(m, (n,)), torch.arange(m)
    leaves = [x.requires_grad_() for x in (sem, unc, proxies)]

    def dense(sem, unc, proxies):
        scores = formula(sem, unc, proxies, unc.norm(dim=1)[:, None])
        same = labels[:, None] == classes
        pull = torch.where(same, torch.exp(-32 * (scores - 0.1)), 0).sum(0)
        push = torch.where(same, 0, torch.exp(32 * (scores + 0.1))).sum(0)
        present = same.any(0).sum()
        return torch.log1p(pull).sum() / present + torch.log1p(push).sum() / m

    def ours(sem, unc, proxies):
        return idml_fast.losses.proxy_anchor_loss(sem, unc, labels, proxies=proxies, metric=METRIC)

    def products():
        scores = sem.detach() @ proxies.detach().T
        return scores @ proxies.detach(), scores.T @ sem.detach()

    return contestants(ours, dense, products, leaves, peers)


def multi_similarity(n, m, peers) -> race.Contestants:
    sem, unc, labels = batch(n)

    def dense(sem, unc):
        squares = unc.square().sum(1)
        beta = (squares[:, None] + squares + 2 * unc @ unc.T).clamp(min=1e-12).sqrt()
        scores = formula(sem, unc, sem, beta)
        same = labels[:, None] == labels
        positive = same & ~torch.eye(len(sem), dtype=torch.bool)
        pull = torch.where(positive, torch.exp(-2 * (scores - 0.5)), 0).sum(1)
        push = torch.where(same, 0, torch.exp(50 * (scores - 0.5))).sum(1)
        return (torch.log1p(pull) / 2 + torch.log1p(push) / 50).mean()

    def products():
        # In blocks of rows, into memory that is already there: N x M would not fit.
        for x in (sem.detach(), unc.detach()):
            gradient = torch.empty_like(x)
            for begin in range(0, n, 1024):
                rows = slice(begin, begin + 1024)
                torch.mm(x[rows] @ x.T, x, out=gradient[rows])
        return ()

    def as_many_pairs():
        smaller = batch(ROWS)
        for _ in range((n // ROWS) ** 2):
            step(partial(by_rowstats, labels=smaller[2]), smaller[:2])()
        return ()

    found = contestants(
        partial(by_rowstats, labels=labels),
        dense,
        products,
        [sem, unc],
        [peer for peer in peers if peer != AS_MANY_PAIRS],
    )
    return found | ({AS_MANY_PAIRS: as_many_pairs} if AS_MANY_PAIRS in peers else {})


def batch(n):
    """Embeddings of n items, four of each class, that learn; and their labels."""
    torch.manual_seed(0)
    sem, unc = F.normalize(torch.randn(n, D)), torch.randn(n, D) / D**0.5
    return sem.requires_grad_(), unc.requires_grad_(), torch.arange(n) // 4


def by_rowstats(sem, unc, labels):
    found = idml_fast.rowstats(sem, unc, labels=labels, metric=METRIC, stats=MULTI_SIMILARITY)
    return (F.softplus(found["pull"]) / 2 + F.softplus(found["push"]) / 50).mean()


def contestants(ours, dense, products, leaves, peers) -> race.Contestants:
    def compiled():
        torch.compiler.reset()  # or the limit on recompilations makes the later cases eager ones
        return step(torch.compile(dense, dynamic=False), leaves)

    build = {
        "eager": lambda: step(dense, leaves),
        "compile": compiled,
        "products": lambda: products,
    }
    return {"ours": step(ours, leaves)} | {peer: build[peer]() for peer in peers}


def step(loss, leaves):
    """Forward and backward of a loss."""
    return lambda: torch.autograd.grad(loss(*leaves), leaves)
