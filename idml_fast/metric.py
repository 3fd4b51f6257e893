"""How a pair of items is compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks

FORMS = ("distance", "cosine", "official")


@dataclass(frozen=True)
class Metric:
    """The introspective metric: semantic distance, weakened by the pair's uncertainty.

    With ``alpha = ||s_i - s_j||``, ``beta = ||u_i + u_j||``, ``r = (beta + gamma) / (tau alpha)``::

        form="distance"   D = alpha exp(-r)                    0 for identical items
        form="cosine"     C = 1 - (1 - cos(s_i, s_j)) exp(-r)  1 for identical items
        form="official"   C with r = (beta^2 + gamma) / (tau alpha^2)

    Args:
        tau: temperature, > 0; a larger one weakens the effect of the uncertainty. ``math.inf``
            gives the conventional metric (``alpha``, or the plain cosine), which does not read
            ``unc``.
        gamma: offset of the uncertainty, >= 0.
        form: one of the three above.

    ``tau`` and ``gamma`` may each be a tensor without dimensions on the embeddings' device: every
    operation then gives it its gradient. Make the metric anew in each step, from a parametrisation
    that keeps them in range, such as ``Metric(tau=log_tau.exp())``.

    Raises:
        TypeError, ValueError: an argument is of another type or out of its range.

    Source: Wang et al., *Introspective Deep Metric Learning*, TPAMI 2023, arXiv 2309.09982
    (eq. 6 of arXiv 2205.04449).

    >>> Metric(tau=2.0).form
    'distance'
    >>> Metric.plain("cosine").reads_unc
    False
    """

    tau: float | Tensor = 5.0
    gamma: float | Tensor = 0.0
    form: str = "distance"

    def __post_init__(self) -> None:
        _checks.parameter("tau", self.tau, "> 0", lambda tau: tau > 0)
        _checks.parameter(
            "gamma", self.gamma, ">= 0 and finite", lambda gamma: 0 <= gamma < math.inf
        )
        _checks.one_of("form", self.form, FORMS)
        for name in ("tau", "gamma"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                object.__setattr__(self, name, float(value))

    @classmethod
    def paper(cls, form: str = "distance") -> Metric:
        """The paper's metric, at its released code's temperature: ``tau = 5``, ``gamma = 0``."""
        return cls(5.0, 0.0, form)

    @classmethod
    def plain(cls, form: str = "distance") -> Metric:
        """The conventional metric: Euclidean distance or cosine similarity; ``unc`` is not read."""
        return cls(math.inf, 0.0, form)

    @classmethod
    def official(cls) -> Metric:
        """The expression of the authors' released code, for comparison with it only.

        ``C = 1 - (1 - cos(s_i, p_j)) exp(-(||u_i||^2 + 4) / (5 ||s_i - p_j||^2))``: it squares both
        norms where the paper does not, and the proxy ``p_j`` has no uncertainty (pass zeros). The
        released network also normalises ``u``, so that ``||u_i||`` is constant and learns nothing.
        """
        return cls(5.0, 4.0, "official")

    @property
    def reads_unc(self) -> bool:
        """Whether the uncertainty embeddings matter at all: ``tau`` is finite, or a tensor."""
        return isinstance(self.tau, Tensor) or self.tau < math.inf

    @property
    def larger_is_closer(self) -> bool:
        """Whether the score is a similarity (the cosine forms) and not a distance."""
        return self.form != "distance"

    @property
    def sign(self) -> int:
        """1 for a distance, -1 for a similarity: ``sign * score`` grows as items move apart."""
        return -1 if self.larger_is_closer else 1

    @property
    def learned(self) -> list[Tensor]:
        """Those of ``tau`` and ``gamma`` that are tensors."""
        return [x for x in (self.tau, self.gamma) if isinstance(x, Tensor)]

    def operands(self) -> tuple[float, float, Tensor | None, str]:
        """What the operations take: ``tau``, ``gamma``, both as one tensor ``[2]`` in the place of
        the two numbers if either is a tensor, and ``form``."""
        tensors = self.learned
        if not tensors:
            return self.tau, self.gamma, None, self.form
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
        learned = [
            torch.as_tensor(x, dtype=dtype, device=tensors[0].device)
            for x in (self.tau, self.gamma)
        ]
        return math.nan, math.nan, torch.stack(learned), self.form
