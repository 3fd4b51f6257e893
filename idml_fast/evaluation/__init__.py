"""How good embeddings are: retrieval, clustering, and whether the uncertainty is alive.

Needs the extra ``idml_fast[train]`` (scikit-learn, scipy); ``import idml_fast`` does not load it.
"""

from .baselines import mc_dropout, proxy_distance, semantic_norm, softmax_entropy
from .clustering import nmi
from .corruptions import CORRUPTIONS, corrupted, corrupted_norms, shuffled
from .retrieval import map_at_r, r_precision, recall_at_k, retrieval
from .uncertainty import (
    Estimate,
    UncertaintyTable,
    Verdict,
    alive_or_dead,
    aurc,
    bootstrap,
    brier,
    ece,
    error_auroc,
    match_forecast,
    ood_auroc,
    pair_auroc,
    pair_uncertainty,
    reliability,
    risk_coverage,
    sampled_pairs,
    severity_correlation,
    uncertainty_table,
    wrong_answers,
)

__all__ = [
    "CORRUPTIONS",
    "Estimate",
    "UncertaintyTable",
    "Verdict",
    "alive_or_dead",
    "aurc",
    "bootstrap",
    "brier",
    "corrupted",
    "corrupted_norms",
    "ece",
    "error_auroc",
    "map_at_r",
    "match_forecast",
    "mc_dropout",
    "nmi",
    "ood_auroc",
    "pair_auroc",
    "pair_uncertainty",
    "proxy_distance",
    "r_precision",
    "recall_at_k",
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
