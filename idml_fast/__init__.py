"""Introspective (uncertainty-aware) deep metric learning for PyTorch, with fused kernels.

An item has a semantic embedding ``sem`` and an uncertainty embedding ``unc``; a pair is compared by
``D = alpha exp(-(beta + gamma) / (tau alpha))`` with ``alpha = ||s_i - s_j||`` and
``beta = ||u_i + u_j||`` (Wang et al., *Introspective Deep Metric Learning*, TPAMI 2023).
"""

from importlib.metadata import version

from . import backend, losses, reference, stats
from .memory import MemoryBank
from .metric import Metric
from .nearest import DistanceWeighted, nearest
from .paired import paired
from .pairwise import pairwise
from .rowstats import rowstats

__version__ = version("idml_fast")

__all__ = [
    "DistanceWeighted",
    "MemoryBank",
    "Metric",
    "backend",
    "losses",
    "nearest",
    "paired",
    "pairwise",
    "reference",
    "rowstats",
    "stats",
]
