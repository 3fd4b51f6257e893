"""How good embeddings are: retrieval, clustering, and whether the uncertainty is alive.

Needs the extra ``idml_fast[train]`` (scikit-learn, scipy); ``import idml_fast`` does not load it.
"""

from .clustering import nmi
from .retrieval import map_at_r, r_precision, recall_at_k, retrieval
from .uncertainty import CORRUPTIONS, corrupted_norms, severity_correlation

__all__ = [
    "CORRUPTIONS",
    "corrupted_norms",
    "map_at_r",
    "nmi",
    "r_precision",
    "recall_at_k",
    "retrieval",
    "severity_correlation",
]
