"""idml_fast.evaluation beside faiss and numpy, on the test half of Stanford Online Products.

All measures of retrieval, MRR and mAP over the whole ranking among them. The peer does less: faiss'
exact search finds as many neighbours as the largest class has, and numpy makes Recall@k,
precision@k, R-precision and MAP@R of them. Clustering is beside k-means of faiss as it is called.
"""

from functools import partial

import numpy as np
import pytest
import race
import rivals
import torch

D = 512  # width of the embedding
ITEMS, CLASSES = 60_502, 11_316  # of the test half of Stanford Online Products
SOME = 8  # the default run takes one class in so many
KS = (1, 10, 100)
MEMORY_BAR = 2048  # MiB
TRUTH = 2048  # items, of which the results are compared
SECONDS_BAR = 90.0
CLUSTERING_SECONDS_BAR = 300.0


def test_retrieval(race_case):
    race_case(retrieval_case(ITEMS // SOME))


def test_retrieval_of_all(race_case):
    race_case(retrieval_case(ITEMS, rounds=0, seconds_bar=SECONDS_BAR))


def test_clustering(race_case):
    pytest.importorskip("faiss", reason="faiss, whose k-means ours calls, is not installed")
    race_case(
        race.Case(
            title=f"NMI, AMI and F1, {ITEMS} items, {CLASSES} classes, D = {D}",
            build=clusterers,
            shape=(ITEMS,),
            peers=("faiss",),
            flop=25 * 2.0 * ITEMS * CLASSES * D,
            costs=dict.fromkeys(("ours", "faiss"), rivals.Cost(1.3)),
            rounds=0,
            seconds_bar=CLUSTERING_SECONDS_BAR,
        )
    )


def retrieval_case(items, **rest) -> race.Case:
    return race.Case(
        title=f"retrieval, {items} items, {classes_of(items)} classes, D = {D}",
        build=retrievers,
        shape=(items,),
        peers=("faiss + numpy",),
        flop=2.0 * items * items * D,
        held=4.0 * items * D,
        truth=(TRUTH,),
        compared=torch.mean,  # what is reported: one item in the other order is no error of 100 %
        bars={"faiss + numpy": 1.0},
        memory_bar=MEMORY_BAR,
        **rest,
    )


def classes_of(items):
    return items * CLASSES // ITEMS


def problem(items):
    """Items around the centres of their classes: at least two each, and up to about fifteen."""
    classes = classes_of(items)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(classes, (items - 2 * classes,), generator=generator)
    labels = torch.cat([torch.arange(classes).repeat(2), drawn])
    centres = torch.randn(classes, D, generator=generator)
    sem = centres[labels] + 1.5 * torch.randn(items, D, generator=generator)
    return torch.nn.functional.normalize(sem), labels


def retrievers(items, peers) -> race.Contestants:
    from idml_fast.evaluation import retrieval

    sem, labels = problem(items)

    def ours(sem):
        return tuple(x.double() for x in retrieval(sem, labels, ks=KS).per_query.values())

    build = {
        "truth": lambda: rivals.truth(ours, [sem]),
        "faiss + numpy": lambda: partial(with_faiss, sem, labels),
    }
    return {"ours": partial(ours, sem)} | {peer: build[peer]() for peer in peers}


def with_faiss(sem, labels):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    points, classes = sem.numpy(), labels.numpy()
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    total = np.bincount(classes)[classes] - 1
    k = max(*KS, total.max())
    _, columns = index.search(points, k + 1)
    # The item itself is left out wherever it is; where duplicates have pushed it out, the last.
    own = columns == np.arange(len(points))[:, None]
    own[~own.any(axis=1), -1] = True
    columns = columns[~own].reshape(len(points), k)
    hits = classes[columns] == classes[:, None]
    rank = np.arange(1, k + 1)
    within = hits & (rank <= total[:, None])
    there = total > 0
    found = [hits[:, :k].any(axis=1) for k in KS]
    found += [hits[:, :k].mean(axis=1) for k in KS]
    found.append(within[there].sum(axis=1) / total[there])
    precision = hits.cumsum(axis=1) / rank
    found.append((precision * within)[there].sum(axis=1) / total[there])
    return tuple(torch.from_numpy(x).double() for x in found)


def clusterers(items, peers) -> race.Contestants:
    from idml_fast.evaluation import clustering

    sem, labels = problem(items)

    def ours():
        return tuple(map(torch.tensor, clustering(sem, labels).values()))

    def faiss_k_means():
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        k_means = faiss.Kmeans(D, classes_of(items), niter=25, min_points_per_centroid=1)
        k_means.train(sem.numpy())
        return (torch.from_numpy(k_means.index.search(sem.numpy(), 1)[1]),)

    return {"ours": ours} | dict.fromkeys(peers, faiss_k_means)
