"""The words of every input error: the argument, what was wanted, what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .metric import Metric

# What stands for the uncertainty embeddings of items that are certain.
ZERO = "zero"

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def number(
    name: str, value: Any, wanted: str, holds: Callable[[Any], bool], kind: str = "a number"
) -> None:
    """``value`` is a real number that ``holds``; ``kind`` says what else it might have been."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {kind}, got {_kind(value)}")
    if not holds(value):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def parameter(name: str, value: Any, wanted: str, holds: Callable[[Any], bool]) -> None:
    """``value`` is a real number or a tensor of one, and ``holds``.

    Looking into a tensor costs a synchronisation on a GPU and breaks a compiled graph, so only CPU
    tensors outside of ``torch.compile`` are looked at.
    """
    kind = "a number or a tensor without dimensions"
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be {kind}, got shape {_shape(value)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {_name(value.dtype)}")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = value.item()
    number(name, value, wanted, holds, kind)


def finite(name: str, value: Any, kind: str = "a number") -> None:
    """``value`` is a finite real number; ``kind`` as for `number`."""
    number(name, value, "finite", math.isfinite, kind)


def positive(name: str, value: Any) -> None:
    """``value`` is a positive, finite number."""
    number(name, value, "> 0 and finite", lambda value: 0 < value < math.inf)


def integer(name: str, value: Any, wanted: str, holds: Callable[[Any], bool]) -> None:
    """``value`` is an integer that ``holds``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {_kind(value)}")
    if not holds(value):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def pairs(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | str | None,  # [M, Du] or "zero"
    metric: Metric,
    columns: tuple[str, str, str] = ("sem2", "unc2", "M"),
) -> None:
    """The embeddings are given together, fit together and suit the metric.

    ``columns`` is what the caller's arguments call ``sem2``, ``unc2`` and M.
    """
    if sem2 is None and unc2 is not None:
        raise TypeError("sem2 must be given together with unc2, got None")
    if sem2 is not None and (unc2 is None) != (unc is None):
        missing, other = (columns[1], "unc") if unc2 is None else ("unc", columns[1])
        raise TypeError(f"{missing} must be given together with {other}, got None")
    embeddings(sem, unc, sem2, unc2, metric, columns)


def embeddings(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | str | None,  # [M, Du] or "zero"
    metric: Metric,
    columns: tuple[str, str, str] = ("sem2", "unc2", "M"),
) -> None:
    """The embeddings that are given fit together and suit the metric; ``columns``: see `pairs`."""
    instance("metric", metric, _metric(), "an idml_fast.Metric")
    tensor("sem", sem)
    if unc is None and metric.reads_unc:
        raise TypeError("unc must be a tensor because metric.tau is finite, got None")
    sem2_name, unc2_name, m = columns
    uncertainties = {"unc": unc, unc2_name: unc2}
    for name, x in uncertainties.items():
        if isinstance(x, str) and x != ZERO:
            raise ValueError(f"{name} must be a torch.Tensor or {ZERO!r}, got {x!r}")
    unc, unc2 = (None if isinstance(x, str) else x for x in uncertainties.values())
    sides = {"sem": sem, "unc": unc, sem2_name: sem2, unc2_name: unc2}
    given = {name: x for name, x in sides.items() if x is not None}
    for name, x in given.items():
        tensor(name, x)
    for name, x in given.items():
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape [items, width], got {_shape(x)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have a width of at least 1, got {_shape(x)}")
    if unc is not None:
        _shape_like("unc", unc, "sem", sem, [sem.shape[0], "Du"])
    if sem2 is not None:
        _shape_like(sem2_name, sem2, "sem", sem, [m, sem.shape[1]])
    if sem2 is not None and unc2 is not None:
        wanted = [sem2.shape[0], "Du" if unc is None else unc.shape[1]]
        like = sem2_name if unc is None else f"{sem2_name} and unc"
        _shape_like(unc2_name, unc2, like, sem2, wanted)
    if sem.dtype not in FLOATS:
        raise TypeError(f"sem must be {_names(FLOATS)}, got {_name(sem.dtype)}")
    for name, x in given.items():
        if x.dtype != sem.dtype:
            raise TypeError(f"{name} must be {_name(sem.dtype)} like sem, got {_name(x.dtype)}")
        _device_like(name, x, sem, "sem")
    for name, x in [("metric.tau", metric.tau), ("metric.gamma", metric.gamma)]:
        if isinstance(x, Tensor):
            _device_like(name, x, sem, "sem")


def labels(name: str, value: Tensor, items: Tensor, items_name: str) -> None:
    """``value`` holds one integer label for each row of ``items``."""
    tensor(name, value)
    _one_each(name, value, items, items_name)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be of an integer dtype, got {_name(value.dtype)}")
    _device_like(name, value, items, items_name)


def labels_below(name: str, value: Tensor, count: int) -> None:
    """Every label is in ``[0, count)``.

    Looking costs a synchronisation on a GPU and breaks a compiled graph, so only CPU labels outside
    of ``torch.compile`` are looked at.
    """
    if torch.compiler.is_compiling() or value.device.type != "cpu" or value.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < 0 or high >= count:
        raise ValueError(f"{name} must be in [0, {count}), got values from {low} to {high}")


def column_labels(labels2: Any, sem2: Tensor | None) -> None:
    """``labels2`` comes with ``sem2``, and fits it."""
    if sem2 is not None:
        labels("labels2", labels2, sem2, "sem2")
    elif labels2 is not None:
        raise TypeError("sem2 must be given together with labels2, got None")


def batch(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    labels_: Tensor,  # [N]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | str | None,  # [M, Du] or "zero"
    labels2: Tensor | None,  # [M]
    metric: Metric,
) -> None:
    """Rows and columns with their labels fit together and suit the metric."""
    pairs(sem, unc, sem2, unc2, metric)
    labels("labels", labels_, sem, "sem")
    column_labels(labels2, sem2)


def remembered(
    sem: Any,
    unc: Any,
    labels_: Any,
    own_sem: Tensor,  # [size, Ds]
    own_unc: Tensor | None,  # [size, Du]
) -> None:
    """Items fit the memory bank with these buffers."""
    items = {"sem": (sem, own_sem)} | ({} if own_unc is None else {"unc": (unc, own_unc)})
    for name, (x, own) in items.items():
        tensor(name, x)
        wanted = f"[{'N' if name == 'sem' else len(sem)}, {own.shape[1]}] like the bank's"
        if x.dim() != 2 or x.shape[1] != own.shape[1] or len(x) != len(sem):
            raise ValueError(f"{name} must have shape {wanted}, got {_shape(x)}")
        _device_like(name, x, own, "the bank")
    labels("labels", labels_, sem, "sem")


def same_kind(name: str, value: Any, other: str, like: Any) -> None:
    """Both are tensors, or neither is."""
    if isinstance(value, Tensor) != isinstance(like, Tensor):
        wanted = "a torch.Tensor" if isinstance(like, Tensor) else repr(like)
        got = _kind(value) if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be {wanted} like {other}, got {got}")


def boundary(name: str, value: Any, labels: Tensor) -> None:
    """``value`` is a finite number, a tensor of one, or a vector of one for each class."""
    if not isinstance(value, Tensor):
        finite(name, value, "a number or a tensor")
        return
    if value.dim() > 1 or value.numel() == 0:
        raise ValueError(f"{name} must have shape [], [1] or [classes], got {_shape(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {_name(value.dtype)}")
    _device_like(name, value, labels, "labels")
    if value.numel() > 1:
        labels_below("labels", labels, len(value))


def vector(name: str, value: Tensor, items: Tensor, items_name: str) -> None:
    """``value`` holds one number for each row of ``items``."""
    tensor(name, value)
    _one_each(name, value, items, items_name)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be of a real dtype, got {_name(value.dtype)}")
    _device_like(name, value, items, items_name)


def index(value: Any, rows: Tensor, cols: Tensor) -> None:
    """``value`` is a pair of int64 vectors of one length, positions in ``rows`` and ``cols``."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"index must be a pair (rows, cols) of tensors, got {_kind(value)}")
    for name, positions, items in zip(("rows", "cols"), value, (rows, cols), strict=True):
        tensor(f"index {name}", positions)
        if positions.shape != value[0].shape or positions.dim() != 1:
            raise ValueError(
                f"index {name} must have shape [T], the same for both, got {_shape(positions)}"
            )
        if positions.dtype != torch.int64:
            raise TypeError(f"index {name} must be int64, got {_name(positions.dtype)}")
        _device_like(f"index {name}", positions, items, "sem")
        labels_below(f"index {name}", positions, len(items))


def same_length(sem: Tensor, sem2: Tensor | None) -> None:
    """Row t can be paired with column t."""
    if sem2 is None:
        raise TypeError("sem2 must be given when index is None, got None")
    if len(sem) != len(sem2):
        raise ValueError(
            f"sem2 must have {len(sem)} rows like sem when index is None, got {len(sem2)}"
        )


def columns_for(k: int, count: int, exclude_self: bool) -> None:
    """A row has k columns to choose from among ``count``."""
    most = count - int(exclude_self)
    if k > most:
        whose = "number of columns besides the row's own" if exclude_self else "number of columns"
        raise ValueError(f"k must be at most {most}, the {whose}, got {k}")


def draws(seed: Any, largest: bool | None, metric: Metric) -> None:
    """The other arguments suit columns that are drawn by their distance."""
    if seed is not None:
        integer("seed", seed, ">= 0 and below 2**63", lambda seed: 0 <= seed < 2**63)
    if largest is not None:
        raise ValueError(f"largest must be None with sample, got {largest}")
    if metric.form != "distance":
        raise ValueError(f"metric must be of form 'distance' with sample, got {metric.form!r}")


def apart_from_blocks(unc2: Any, labels2: Any) -> None:
    """Nothing is given beside blocks of columns that they must bring themselves."""
    if unc2 is not None and not isinstance(unc2, str):
        raise TypeError(f"unc2 must be part of the blocks of sem2, or {ZERO!r}, got {_kind(unc2)}")
    if labels2 is not None:
        raise TypeError(f"labels2 must be part of the blocks of sem2, got {_kind(labels2)}")


def block(number: int, value: Any) -> None:
    """``value`` is a block of columns."""
    if isinstance(value, Tensor):
        return
    parts = "(sem2, unc2) or (sem2, unc2, labels2)"
    instance(f"block {number} of sem2", value, (tuple, list), f"a torch.Tensor or a tuple {parts}")
    if not 1 <= len(value) <= 3:
        raise ValueError(f"block {number} of sem2 must be a tuple {parts}, got {len(value)} items")


def without_gradient(**embeddings: Any) -> None:
    """None of the tensors asks for a gradient that values found in blocks would not have."""
    for name, x in embeddings.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient with columns in blocks, whose values have "
                "none: search under torch.no_grad(), then compare with what was found by paired()"
            )


def finite_rows(name: str, value: Tensor, first: int = 0) -> None:
    """Every row of ``value`` is finite; the first of them is row ``first`` of what was given."""
    bad = ~value.isfinite().all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        number = value[row][~value[row].isfinite()][0].item()
        raise ValueError(f"{name} must be finite, got {number} in row {first + row}")


def array_dtype(name: str, array: Any) -> torch.dtype:
    """The dtype of an array that is no tensor, as PyTorch calls it."""
    import numpy

    try:
        return torch.from_numpy(numpy.empty(0, array.dtype)).dtype
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be of a dtype that PyTorch has, got {array.dtype}") from None


def metric_of(loss: str, metric: Any, *forms: str) -> None:
    """``metric`` is a metric, of one of the ``forms`` that the loss is defined for."""
    instance("metric", metric, _metric(), "an idml_fast.Metric")
    if metric.form not in forms:
        wanted = " or ".join(map(repr, forms))
        raise ValueError(f"metric must be of form {wanted} for {loss}, got {metric.form!r}")


def lp(p: Any) -> None:
    """The exponent of a norm is that of `Metric`."""
    if p != 2:
        raise ValueError(f"p must be 2, since the metric's distances are Euclidean, got {p}")


def parts(sem: Any, unc: Any) -> None:
    """Both parts of joint embeddings are there, for the same items."""
    for name, x in {"sem": sem, "unc": unc}.items():
        tensor(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape [items, width], got {_shape(x)}")
    _shape_like("unc", unc, "sem", sem, [sem.shape[0], "Du"])


def joint(name: str, value: Any, sem_dim: int, dim: int = 1, *, has_unc: bool = False) -> None:
    """``value`` has the semantic part of joint embeddings along ``dim``, and perhaps the other."""
    tensor(name, value)
    if value.shape[dim] < sem_dim + has_unc:
        wanted = f"sem_dim = {sem_dim}"
        wanted = f"wider than {wanted}, [sem | unc]" if has_unc else f"at least as wide as {wanted}"
        raise ValueError(f"{name} must be {wanted}, got {_shape(value)}")


def instance(name: str, value: Any, kinds: Any, wanted: str) -> None:
    """``value`` is an instance of one of ``kinds``."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {wanted}, got {_kind(value)}")


def tensor(name: str, value: Any) -> None:
    """``value`` is a tensor."""
    instance(name, value, Tensor, "a torch.Tensor")


def _metric() -> type[Metric]:
    from .metric import Metric  # metric.py itself needs these checks

    return Metric


def _one_each(name: str, value: Tensor, items: Tensor, items_name: str) -> None:
    if value.dim() != 1 or value.shape[0] != items.shape[0]:
        raise ValueError(
            f"{name} must have shape [{items.shape[0]}] like {items_name} {_shape(items)}, "
            f"got {_shape(value)}"
        )


def _device_like(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {x.device}")


def _shape_like(name: str, x: Tensor, other: str, like: Tensor, wanted: list[int | str]) -> None:
    if all(isinstance(w, str) or w == n for w, n in zip(wanted, x.shape, strict=True)):
        return
    shape = ", ".join(map(str, wanted))
    raise ValueError(
        f"{name} must have shape [{shape}] like {other} {_shape(like)}, got {_shape(x)}"
    )


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(_name(d) for d in dtypes[:-1]) + f" or {_name(dtypes[-1])}"
