"""idml_fast.nearest beside the same search in eager PyTorch, the bare products, and faiss.

A search of the test half of Stanford Online Products for the 100 nearest of each query; the plain
metric also beside faiss' exact index, and rows against themselves as Recall@k needs them.
"""

from functools import partial

import pytest
import race
import torch

import idml_fast

D = 512  # width of both embeddings
K = 100
ITEMS = 60_502  # of the test half of Stanford Online Products
QUERIES, ALL_QUERIES = 2048, 20_000  # the latter with --full
METRICS = {"introspective": idml_fast.Metric.paper(), "plain": idml_fast.Metric.plain()}
BARS = {"introspective": {"products": 1.3}, "plain": {"products": 1.3, "faiss": 1.0}}
MEMORY_BAR = 64  # MiB beyond inputs and results: tiles, and candidates of the rows of one tile
CHUNK = 512  # rows that eager takes at a time: 124 MB a matrix


@pytest.mark.parametrize("metric", METRICS)
def test_nearest(race_case, metric):
    race_case(case(metric, QUERIES))


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_of_many(race_case, metric, full):
    if not full:
        pytest.skip(f"{ALL_QUERIES} queries take eager about a minute: --full")
    race_case(case(metric, ALL_QUERIES, rounds=0))


def case(metric, queries, **rest) -> race.Case:
    bars, peers = BARS[metric], ["products", "eager"]
    if metric == "plain":
        pytest.importorskip("faiss", reason="faiss is not installed; the extra `bench` has it")
        peers.append("faiss")
    return race.Case(
        title=f"nearest, {metric}, fp32, {queries} x {ITEMS}, D = {D}, k = {K}",
        build=partial(contestants, metric=metric),
        shape=(queries, ITEMS),
        peers=tuple(peers),
        # The products alone; about 30 operations a pair are left out.
        flop=(2 if metric == "introspective" else 1) * 2.0 * queries * ITEMS * D,
        bars=bars,
        memory_bar=MEMORY_BAR,
        **rest,
    )


def contestants(n, m, peers, *, metric) -> race.Contestants:
    torch.manual_seed(0)
    sem, sem2 = (torch.nn.functional.normalize(torch.randn(size, D)) for size in (n, m))
    unc, unc2 = (torch.randn(size, D) / D**0.5 for size in (n, m))
    k = min(K, m)
    chosen = METRICS[metric]
    both = [(sem, sem2), (unc, unc2)] if chosen.reads_unc else [(sem, sem2)]

    def eager():
        found = []
        for first in range(0, n, CHUNK):
            part = slice(first, first + CHUNK)
            scores = distances(sem[part], sem2, -1)
            if chosen.reads_unc:
                beta = distances(unc[part], unc2, 1)
                scores = scores * torch.exp(-(beta + chosen.gamma) / (chosen.tau * scores))
            found.append(scores.topk(k, largest=False))
        values, columns = zip(*found, strict=True)
        return torch.cat(values), torch.cat(columns)

    def products():
        """In blocks that stay in the cache, into memory that is already there."""
        for x, y in both:
            for rows in x.split(CHUNK):
                for cols in y.split(8 * CHUNK):
                    out = memory[: len(rows) * len(cols)].view(len(rows), len(cols))
                    torch.mm(rows, cols.T, out=out)
        return ()

    memory = torch.empty(8 * CHUNK * CHUNK)
    build = {
        "eager": lambda: eager,
        "products": lambda: products,
        "faiss": lambda: faiss(sem, sem2, k),
    }
    ours = partial(idml_fast.nearest, sem, unc, sem2, unc2, k=k, metric=chosen)
    return {"ours": ours} | {peer: build[peer]() for peer in peers}


def distances(x, y, sign):
    """||x_i + sign y_j|| as a user writes it."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) + 2 * sign * x @ y.T
    return squares.clamp(min=1e-12).sqrt()


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
