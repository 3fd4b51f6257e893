"""What all operations have in common: their first arguments, how those get their gradients, and
what PyTorch is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import backend as backends
from .metric import Metric

# One for all operations: PyTorch would make one for each step of each, with a look at the stack.
_LIBRARY = torch.library.Library("idml_fast", "FRAGMENT")

# The arguments that every operation begins with. `learned` is tau and gamma as one tensor [2] in
# the place of the two numbers.
OPERANDS = (
    "Tensor sem, Tensor? unc, Tensor? sem2, Tensor? unc2, "
    "float tau, float gamma, Tensor? learned, str form"
)

# Which of them can have a gradient.
LEAVES = (0, 1, 2, 3, 6)


def autocast(*embeddings: Tensor | None) -> Iterator[Tensor | None]:
    """The embeddings in the autocast dtype where autocast is on, as for PyTorch's own products."""
    for x in embeddings:
        cast = (
            isinstance(x, Tensor)
            and x.is_floating_point()
            and x.dtype != torch.float64
            and torch.amp.is_autocast_available(x.device.type)
            and torch.is_autocast_enabled(x.device.type)
        )
        yield x.to(torch.get_autocast_dtype(x.device.type)) if cast else x


def operands(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du]
    sem2: Tensor | None,  # [M, Ds]
    unc2: Tensor | str | None,  # [M, Du]
    metric: Metric,
) -> tuple[Any, ...]:
    """Embeddings and metric as every operation takes them, see `OPERANDS`.

    An uncertainty that is zero or not read is None. With ``sem2``, one that is None beside another
    that is not stands for zeros.
    """
    if not metric.reads_unc:
        unc = unc2 = None
    unc, unc2 = (None if isinstance(x, str) else x for x in (unc, unc2))
    return sem, unc, sem2, unc2, *metric.operands()


def beyond_cuda(embeddings: dict[str, Any], metric: Metric) -> list[str]:
    """What is asked of a backend that the CUDA kernels do not have: these read 16 bytes at a time,
    and a metric's gradient is Triton's."""
    asked = []
    if metric.learned:
        asked.append("a tau or gamma that is a tensor")
    for name, x in embeddings.items():
        if not isinstance(x, Tensor):
            continue
        # torch.compile cannot trace where a tensor begins; the launcher sees to that once more.
        begin = 0 if torch.compiler.is_compiling() else x.storage_offset()
        if x.stride(1) != 1 or any(k * x.itemsize % 16 for k in (begin, x.stride(0))):
            asked.append(f"{name} whose rows do not begin at multiples of 16 bytes")
        elif x.stride(0) < x.shape[1]:
            asked.append(f"{name} whose rows overlap")
    return asked


def save(ctx: Any, inputs: tuple[Any, ...], *others: Tensor | None) -> None:
    """Keeps an operation's operands, its backend and other tensors for the backward."""
    *embeddings, tau, gamma, learned, form = inputs[:8]
    ctx.save_for_backward(*embeddings, learned, *others)
    ctx.backend = inputs[-1]
    ctx.metric = tau, gamma, form


def saved(ctx: Any) -> tuple[list[Any], list[Tensor | None], list[bool]]:
    """The operands and the other tensors that `save` kept, and which of `LEAVES` are wanted."""
    *embeddings, learned = ctx.saved_tensors[:5]
    tau, gamma, form = ctx.metric
    wanted = [ctx.needs_input_grad[k] for k in LEAVES]
    return [*embeddings, tau, gamma, learned, form], [*ctx.saved_tensors[5:]], wanted


def empty_gradients(arguments: tuple[Any, ...], wanted: list[bool]) -> list[Tensor]:
    """What a backward returns: the gradients of those of `LEAVES` that are wanted."""
    leaves = (arguments[k] for k in LEAVES)
    return [x.new_empty(x.shape) for x, w in zip(leaves, wanted, strict=True) if w]


def by_operand(gradients: list[Tensor], wanted: list[bool]) -> tuple[Tensor | None, ...]:
    """What a backward returned, one for each of `OPERANDS`."""
    placed: list[Tensor | None] = [None] * 8
    found = iter(gradients)
    for k, w in zip(LEAVES, wanted, strict=True):
        placed[k] = next(found) if w else None
    return tuple(placed)


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Tells PyTorch of an operation: what it takes, last of all a backend, whose launcher of this
    ``name`` runs it; the shapes it returns, for torch.compile and export; its gradient."""

    def launch(*arguments: Any) -> Any:
        *arguments, backend = arguments
        return backends.launcher(backend, name).forward(*arguments)

    _register(name, schema, launch, fake, backward, save)


def define_backward(name: str, schema: str, *, fake: Callable[..., list[Tensor]]) -> None:
    """The same of the operation that is its gradient, so that this can be traced as well. It takes
    a backend last, and by keyword which of `LEAVES` are ``wanted``; it has no gradient itself."""

    def launch(*arguments: Any, wanted: list[bool]) -> list[Tensor]:
        *arguments, backend = arguments
        return backends.launcher(backend, name).backward(*arguments, wanted=wanted)

    def refuse(ctx: Any, *upstream: Any) -> None:
        raise RuntimeError(
            f"idml_fast.{name} has no second derivative; backend='reference' has every derivative"
        )

    _register(f"{name}_backward", schema, launch, fake, refuse)


def _register(
    name: str,
    schema: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., None] | None = None,
) -> None:
    name = f"idml_fast::{name}"
    torch.library.define(name, schema, lib=_LIBRARY)
    torch.library.impl(name, backends.DEVICES, launch, lib=_LIBRARY)
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=save, lib=_LIBRARY)
