"""How good embeddings are: retrieval, clustering, and whether the uncertainty is alive.

Needs the extra ``idml_fast[train]``: faiss, scikit-learn, scipy; ``import idml_fast`` loads none.
"""

from .baselines import mc_dropout, proxy_distance, semantic_norm, softmax_entropy
from .clustering import clustering
from .corruptions import CORRUPTIONS, corrupted, corrupted_norms, shuffled
from .pairs import (
    brier,
    ece,
    match_forecast,
    pair_auroc,
    pair_uncertainty,
    reliability,
    sampled_pairs,
)
from .retrieval import Retrieval, retrieval
from .table import Estimate, UncertaintyTable, bootstrap, uncertainty_table
from .uncertainty import (
    Verdict,
    alive_or_dead,
    aurc,
    error_auroc,
    ood_auroc,
    risk_coverage,
    severity_correlation,
    wrong_answers,
)

__all__ = [
    "CORRUPTIONS",
    "Estimate",
    "Retrieval",
    "UncertaintyTable",
    "Verdict",
    "alive_or_dead",
    "aurc",
    "bootstrap",
    "brier",
    "clustering",
    "corrupted",
    "corrupted_norms",
    "ece",
    "error_auroc",
    "match_forecast",
    "mc_dropout",
    "ood_auroc",
    "pair_auroc",
    "pair_uncertainty",
    "proxy_distance",
    "reliability",
    "retrieval",
    "risk_coverage",
    "sampled_pairs",
    "semantic_norm",
    "severity_correlation",
    "shuffled",
    "softmax_entropy",
    "uncertainty_table",
    "wrong_answers",
]
