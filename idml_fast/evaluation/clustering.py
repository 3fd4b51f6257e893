"""Clustering: whether the classes are found again without labels."""

from __future__ import annotations

import faiss
import numpy as np
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix
from torch import Tensor
from tqdm import tqdm

from .. import _checks


def clustering(
    sem: Tensor,  # [N, Ds]
    labels: Tensor,  # [N]
    *,
    seed: int = 0,
    starts: int = 1,
    iterations: int = 25,
    progress: bool = False,
) -> dict[str, float]:
    """NMI, AMI and F1 between the labels and k-means clusters.

    k-means (faiss, Euclidean, k-means++) with as many clusters as there are labels. NMI divides the
    mutual information by the arithmetic mean of the two entropies; AMI also takes off what clusters
    by chance would have; F1 is of pairs of items, which should share a cluster if they share a
    label.

    Args:
        sem: ``[N, Ds]`` float, on any device; clustered as float32 on the CPU.
        labels: ``[N]`` integer.
        seed: of k-means; the same seed gives the same clusters.
        starts: how often k-means starts; the tightest clustering is taken.
        iterations: of k-means, at the most; it ends earlier where nothing changes any more.
        progress: show a bar that counts iterations.

    Returns:
        ``nmi``, ``ami`` and ``f1``, at most 1.

    Raises:
        TypeError, ValueError: ``labels`` does not match ``sem``, there is no item, or an embedding
            is not finite.

    Source: Oh Song et al., *Deep Metric Learning via Lifted Structured Feature Embedding*, CVPR
    2016, for NMI and F1; Vinh et al., JMLR 2010, for AMI.
    """
    _checks.labels("labels", labels, sem, "sem")
    if not len(sem):
        raise ValueError("sem must hold at least one item, got none")
    _checks.finite_rows("sem", sem)
    classes = labels.unique(return_inverse=True)[1].cpu().numpy()
    points = np.ascontiguousarray(sem.detach().float().cpu().numpy())
    with tqdm(
        total=starts * iterations, desc="k-means", unit=" iterations", disable=not progress
    ) as bar:
        found = [
            _k_means(points, int(classes.max()) + 1, seed + start, iterations, bar)
            for start in range(starts)
        ]
    clusters = min(found, key=lambda clusters: clusters[0])[1]
    return {
        "nmi": float(normalized_mutual_info_score(classes, clusters)),
        "ami": float(adjusted_mutual_info_score(classes, clusters)),
        "f1": _f1(classes, clusters),
    }


def _k_means(
    points: np.ndarray,  # [N, D] float32
    count: int,
    seed: int,
    iterations: int,
    bar: tqdm,
) -> tuple[float, np.ndarray]:
    """The sum of squared distances to the centres, and the cluster of each point."""
    settings = {
        "niter": 1,
        "seed": seed,
        "init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        # Every point counts, however few or many a cluster has.
        "min_points_per_centroid": 1,
        "max_points_per_centroid": len(points),
    }
    k_means = faiss.Kmeans(points.shape[1], count, **settings)
    centres, before = None, np.inf
    for _ in range(iterations):
        k_means.train(points, init_centroids=centres)
        centres, cost = k_means.centroids, float(k_means.obj[-1])
        bar.update()
        if cost >= before:
            break
        before = cost
    squares, clusters = k_means.index.search(points, 1)
    return float(squares.sum(dtype=np.float64)), clusters[:, 0]


def _f1(classes: np.ndarray, clusters: np.ndarray) -> float:
    """The harmonic mean of precision and recall over pairs of items; 0 if no pair is right."""
    (_, wrong), (missed, right) = pair_confusion_matrix(classes, clusters).astype(float)
    return 0.0 if right == 0 else float(2 * right / (2 * right + wrong + missed))
