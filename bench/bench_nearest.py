"""idml_fast.nearest beside the same search in eager PyTorch, the bare products, faiss and KeOps.

A search of the test half of Stanford Online Products for the 100 nearest of each query, of all of
it for 1000, and of ten million items; the plain metric also beside faiss' exact index and
torch.cdist.
"""

from functools import partial

import pytest
import race
import rivals
import torch

import idml_fast

D = 512  # width of both embeddings
K = 100
ITEMS = 60_502  # of the test half of Stanford Online Products
# Queries, items, width and k.
SEARCHES = [
    (2048, ITEMS, D, K),
    (20_000, ITEMS, D, K),
    (ITEMS, ITEMS, D, 1000),
    (10_000, 10_000_000, 128, K),
]
METRICS = {"introspective": idml_fast.Metric.paper(), "plain": idml_fast.Metric.plain()}
BARS = {"introspective": {"products": 1.3}, "plain": {"products": 1.3, "faiss": 1.0}}
MEMORY_BAR = 64  # MiB beyond inputs and results: tiles, and candidates of the rows of one tile
CHUNK = 512  # rows that eager takes at a time: 124 MB a matrix


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "width", "k"), SEARCHES)
def test_nearest(race_case, n, m, width, k, metric):
    # faiss alone is asked for what a plain search is, and torch.cdist gives no other distance.
    peers = ("products", "eager", *(("cdist", "faiss") if metric == "plain" else ()), "keops")
    race_case(
        race.Case(
            title=f"nearest, {metric}, fp32, {n} x {m}, D = {width}, k = {k}",
            build=partial(contestants, metric=metric, width=width, most=k),
            shape=(n, m),
            peers=peers,
            # The products alone; about 30 operations a pair are left out.
            flop=(2 if metric == "introspective" else 1) * 2.0 * n * m * width,
            held=4.0 * (n + m) * 2 * width + 12.0 * n * k,
            costs=dict.fromkeys(("eager", "cdist"), rivals.Cost(3)),  # some rows at a time
            truth=(min(n, 64), min(m, ITEMS)),
            # Both stand for k = 100: more candidates take more.
            bars=BARS[metric] if k == K else {},
            memory_bar=MEMORY_BAR if k == K else None,
        )
    )


def contestants(n, m, peers, *, metric, width=D, most=K) -> race.Contestants:
    torch.manual_seed(0)
    sem, sem2 = (torch.nn.functional.normalize(torch.randn(size, width)) for size in (n, m))
    unc, unc2 = (torch.randn(size, width) / width**0.5 for size in (n, m))
    k = min(most, m)
    chosen = METRICS[metric]
    both = [(sem, sem2), (unc, unc2)] if chosen.reads_unc else [(sem, sem2)]

    def search(scores_of):
        """Of some rows at a time: N x M would not fit."""
        found = [
            scores_of(*rows).topk(k, largest=False)
            for rows in zip(sem.split(CHUNK), unc.split(CHUNK), strict=True)
        ]
        values, columns = zip(*found, strict=True)
        return torch.cat(values), torch.cat(columns)

    def dense(sem, unc):
        alpha = rivals.distances(sem, sem2, -1)
        if not chosen.reads_unc:
            return alpha
        return rivals.distance_form(alpha, rivals.distances(unc, unc2, 1), chosen)

    def products():
        """In blocks that stay in the cache, into memory that is already there."""
        for x, y in both:
            for rows in x.split(CHUNK):
                for cols in y.split(8 * CHUNK):
                    out = memory[: len(rows) * len(cols)].view(len(rows), len(cols))
                    torch.mm(rows, cols.T, out=out)
        return ()

    memory = torch.empty(8 * CHUNK * CHUNK)
    find = partial(idml_fast.nearest, k=k, metric=chosen)
    sides = sem, unc, sem2, unc2
    build = {
        "truth": lambda: rivals.truth(find, sides),
        "eager": lambda: partial(search, dense),
        "cdist": lambda: partial(search, lambda sem, unc: torch.cdist(sem, sem2)),
        "keops": lambda: partial(rivals.keops_nearest, *sides, k, chosen),
        "products": lambda: products,
        "faiss": lambda: faiss(sem, sem2, k),
    }
    return {"ours": partial(find, *sides)} | {peer: build[peer]() for peer in peers}


def faiss(rows, columns, k):
    """The exact search of its flat index, which holds the columns; it returns squared distances."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(columns.shape[1])
    index.add(columns.numpy())

    def search():
        squares, found = index.search(rows.numpy(), k)
        return torch.from_numpy(squares).sqrt(), torch.from_numpy(found)

    return search
