"""How good embeddings are: retrieval, clustering, and whether the uncertainty is alive.

Needs the extra ``idml_fast[train]``: faiss, scikit-learn, scipy; ``import idml_fast`` loads none.
"""

from .clustering import clustering
from .retrieval import Retrieval, retrieval
from .uncertainty import CORRUPTIONS, corrupted_norms, severity_correlation

__all__ = [
    "CORRUPTIONS",
    "Retrieval",
    "clustering",
    "corrupted_norms",
    "retrieval",
    "severity_correlation",
]
