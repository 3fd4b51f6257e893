"""What all losses have in common: what is compared, and the module that holds the settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from .._operands import autocast
from ..metric import Metric
from ..paired import paired
from ..rowstats import rowstats
from ..stats import Extremum, Statistic


class Pairs(NamedTuple):
    """The rows and columns whose pairs a loss looks at: what every loss is called with."""

    sem: Tensor  # [N, Ds]
    unc: Tensor | None  # [N, Du]
    labels: Tensor  # [N]
    sem2: Tensor | None = None  # [M, Ds]; None: the rows against themselves
    unc2: Tensor | None = None  # [M, Du]
    labels2: Tensor | None = None  # [M]

    def checked(self, metric: Metric) -> Pairs:
        """These, in the autocast dtype where autocast is on, if all fit together."""
        sem, unc, sem2, unc2 = autocast(self.sem, self.unc, self.sem2, self.unc2)
        found = Pairs(sem, unc, self.labels, sem2, unc2, self.labels2)
        _checks.batch(*found, metric)
        return found

    def rowstats(
        self, metric: Metric, stats: Mapping[Any, Statistic]
    ) -> dict[Any, Tensor | Extremum]:
        """`idml_fast.rowstats` of the rows."""
        labels = {"labels": self.labels, "labels2": self.labels2}
        sides = self.sem, self.unc, self.sem2, self.unc2
        return rowstats(*sides, **labels, metric=metric, stats=stats)

    def paired(
        self,
        metric: Metric,
        index: tuple[Tensor, Tensor],  # [T], [T]
    ) -> Tensor:  # [T]
        """`idml_fast.paired`, in the dtype of the row statistics: float32 at the least."""
        sides = self.sem, self.unc, self.sem2, self.unc2
        scores = paired(*sides, index=index, metric=metric)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def loss_function(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes ``compute(pairs, **settings)`` a function of what `Pairs` holds, then the settings."""

    @functools.wraps(compute)
    def function(
        sem: Tensor,
        unc: Tensor | None,
        labels: Tensor,
        sem2: Tensor | None = None,
        unc2: Tensor | None = None,
        labels2: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        return compute(Pairs(sem, unc, labels, sem2, unc2, labels2), **settings)

    own = inspect.signature(function, follow_wrapped=False).parameters.values()
    arguments = [p for p in own if p.kind is not p.VAR_KEYWORD]
    # What help() and an editor show.
    function.__signature__ = inspect.Signature([*arguments, *_settings(compute)])
    return function


class Loss(nn.Module):
    """A loss function with its settings: the function's keyword arguments, under the same names.

    A subclass names its function, ``class NCALoss(Loss, function=nca_loss)``, so that settings and
    their defaults are written once. They are checked when the module is made.
    """

    metric: Metric
    _function: ClassVar[Callable[..., Tensor]]
    _own: ClassVar[tuple[str, ...]] = ()  # arguments of the function that no user sets

    def __init_subclass__(cls, function: Callable[..., Tensor] | None = None) -> None:
        super().__init_subclass__()
        if function is None:
            return
        cls._function = staticmethod(function)
        _, *own = inspect.signature(cls.__init__).parameters.values()
        shown = [p for p in own if p.kind is not p.VAR_KEYWORD]
        known = {*cls._own, *(p.name for p in shown)}
        settings = [p for p in _settings(function) if p.name not in known]
        cls.__signature__ = inspect.Signature([*shown, *settings])

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        try:
            given = inspect.Signature(_settings(self._function)).bind(**settings)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__} {error}") from None
        given.apply_defaults()
        self._names = tuple(given.arguments)
        for name, value in given.arguments.items():
            setattr(self, name, value)
        # A batch without items is cheap, and its settings are checked like any other's.
        none = torch.empty(0, 1, device="cpu")
        labels = torch.empty(0, dtype=torch.int64, device="cpu")
        self._function(none, none, labels, **given.arguments)

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that the function is called with."""
        return {name: getattr(self, name) for name in self._names}

    def forward(
        self,
        sem: Tensor,  # [N, Ds]
        unc: Tensor | None,  # [N, Du]
        labels: Tensor,  # [N]
        sem2: Tensor | None = None,  # [M, Ds]
        unc2: Tensor | None = None,  # [M, Du]
        labels2: Tensor | None = None,  # [M]
    ) -> Tensor:  # []
        """The loss of a batch; 0 with zero gradients where there is nothing to compare."""
        return self._function(sem, unc, labels, sem2, unc2, labels2, **self.settings())

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        shown = (name for name in self._names if name not in self._own)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``: of a log-sum-exp, the logarithm of 1 and the sum; 0 for no columns.

    Above its threshold PyTorch leaves out ``exp(-x)``, which at its own 20 is far more than float64
    rounds.
    """
    return F.softplus(x, threshold=40.0)


def _settings(function: Callable[..., Tensor]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind is p.KEYWORD_ONLY]
