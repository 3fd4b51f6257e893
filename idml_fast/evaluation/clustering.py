"""Clustering: whether the classes are found again without labels."""

from __future__ import annotations

from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from .. import _checks


def nmi(
    sem: Tensor,  # [N, Ds]
    labels: Tensor,  # [N]
    *,
    seed: int = 0,
    starts: int = 4,
) -> float:
    """Normalised mutual information between the labels and k-means clusters, in [0, 1].

    k-means (k-means++, Euclidean) with as many clusters as there are labels; the mutual information
    is divided by the arithmetic mean of the two entropies.

    Args:
        sem: ``[N, Ds]`` float, on any device.
        labels: ``[N]`` integer.
        seed: of k-means; the same seed gives the same clusters.
        starts: how often k-means starts; the tightest clustering is taken.

    Raises:
        TypeError, ValueError: ``labels`` does not match ``sem``.
    """
    _checks.labels("labels", labels, sem, "sem")
    labels = labels.cpu().numpy()
    kmeans = KMeans(len(set(labels.tolist())), n_init=starts, random_state=seed)
    clusters = kmeans.fit_predict(sem.detach().float().cpu().numpy())
    return float(normalized_mutual_info_score(labels, clusters))
