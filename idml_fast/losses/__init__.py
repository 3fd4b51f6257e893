"""Losses on introspective scores, each a function of a batch and a module with its settings.

Called ``loss(sem, unc, labels, sem2=None, unc2=None, labels2=None)``. Without ``sem2`` the batch is
compared with itself, a row never with its own column; with it, the rows are compared with those
columns, such as the ones of an `idml_fast.MemoryBank`. (The losses with proxies compare these items
with the proxies, like the batch itself.) All are small expressions of `idml_fast.rowstats`,
`idml_fast.paired` and `idml_fast.nearest`: nothing of N x M is allocated.

Names, arguments and definitions follow pytorch-metric-learning. ``metric`` gives the score: a
distance, or a similarity in the cosine forms. `Metric.plain` makes each the conventional loss.
Embeddings are taken as they come: normalise ``sem`` in the model, leave ``unc`` as it is. A batch
without a valid pair has loss 0 and zero gradients. The loss is float32 (float64 for float64), also
under autocast.

``torch.compile(fullgraph=True)`` takes each of them, except for those that list pairs whose number
per row depends on the labels: there the graph breaks (triplets but for ``mining="hard"``, N-pair,
and the margin loss with negatives that are drawn).
"""

from .classification import IntrospectiveSoftmax, introspective_softmax_loss
from .contrast import (
    NCALoss,
    NPairsLoss,
    NTXentLoss,
    SupConLoss,
    nca_loss,
    npairs_loss,
    ntxent_loss,
    supcon_loss,
)
from .pairs import (
    ContrastiveLoss,
    MultiSimilarityLoss,
    contrastive_loss,
    multi_similarity_loss,
)
from .proxies import ProxyAnchorLoss, ProxyNCALoss, proxy_anchor_loss, proxy_nca_loss
from .ranking import FastAPLoss, fast_ap_loss
from .triplets import MarginLoss, TripletMarginLoss, margin_loss, triplet_margin_loss

__all__ = [
    "ContrastiveLoss",
    "FastAPLoss",
    "IntrospectiveSoftmax",
    "MarginLoss",
    "MultiSimilarityLoss",
    "NCALoss",
    "NPairsLoss",
    "NTXentLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SupConLoss",
    "TripletMarginLoss",
    "contrastive_loss",
    "fast_ap_loss",
    "introspective_softmax_loss",
    "margin_loss",
    "multi_similarity_loss",
    "nca_loss",
    "npairs_loss",
    "ntxent_loss",
    "proxy_anchor_loss",
    "proxy_nca_loss",
    "supcon_loss",
    "triplet_margin_loss",
]
