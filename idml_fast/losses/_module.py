"""The module that holds the settings of a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..metric import Metric


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
        # What help() and an editor show.
        _, *own = inspect.signature(cls.__init__).parameters.values()
        shown = {p.name: p for p in own if p.kind is not p.VAR_KEYWORD}
        settings = {p.name: p for p in _settings(function) if p.name not in cls._own}
        cls.__signature__ = inspect.Signature([*(shown | settings).values()])

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        signature = inspect.Signature(_settings(self._function))
        try:
            given = signature.bind(**settings)
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


def _settings(function: Callable[..., Tensor]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind is p.KEYWORD_ONLY]
