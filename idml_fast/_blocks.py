"""Columns that come in blocks: handed over one by one, or cut from tensors and arrays."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._operands import autocast

if TYPE_CHECKING:
    from .metric import Metric

# What a block's embeddings take at the most, so that memory is bounded and a block is read from a
# disk at its full speed; and what its columns are a multiple of, as tiles are.
BYTES = 2**26
MULTIPLE = 1024


class Block(NamedTuple):
    """Some columns; without ``sem2`` they are the rows themselves."""

    sem2: Tensor | None  # [m, Ds]
    unc2: Tensor | str | None  # [m, Du] or "zero"
    labels2: Tensor | None  # [m]


def are_handed_over(sem2: Any) -> bool:
    """Whether ``sem2`` is an iterable of blocks."""
    return isinstance(sem2, Iterable) and not isinstance(sem2, (Tensor, str)) and not is_array(sem2)


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array that is no tensor: of NumPy, or one that is sliced like it."""
    return not isinstance(x, Tensor) and hasattr(x, "shape") and hasattr(x, "dtype")


def stand_in(name: str, x: Any, sem: Any) -> Any:
    """For an array a tensor of its shape and dtype without memory, to be checked in its place."""
    if not is_array(x):
        return x
    device = sem.device if isinstance(sem, Tensor) else None
    (element,) = autocast(torch.empty((), dtype=_checks.array_dtype(name, x), device=device))
    return element.expand(x.shape)


def cut(
    sem2: Any,  # [M, Ds], a tensor or an array
    unc2: Any,  # [M, Du], likewise, or "zero" or None
    labels2: Any,  # [M], likewise, or None
    device: torch.device,
) -> Iterator[Block]:
    """The columns in blocks of at most `BYTES`; those of an array are copied, each once."""
    widths = [x.shape[1] * x.dtype.itemsize for x in (sem2, unc2) if hasattr(x, "shape")]
    size = max(1, BYTES // sum(widths) // MULTIPLE) * MULTIPLE
    readers = [_reader(x, size, device) for x in (sem2, unc2, labels2)]
    for start in range(0, len(sem2), size):
        part = slice(start, min(start + size, len(sem2)))
        own_sem2, own_unc2, own_labels2 = (read(part) for read in readers)
        yield Block(*autocast(own_sem2, own_unc2), own_labels2)


def _reader(x: Any, size: int, device: torch.device) -> Callable[[slice], Any]:
    """A function from some columns to their share of ``x``."""
    if not is_array(x):
        return lambda part: x[part] if isinstance(x, Tensor) else x
    # All blocks share this memory: new pages for each would take longer than the copy.
    shape = (min(size, len(x)), *x.shape[1:])
    memory = torch.empty(shape, dtype=_checks.array_dtype("", x))
    file = _mapped_file(x)

    def read(part: slice) -> Tensor:
        block = memory[: part.stop - part.start]
        block.numpy()[...] = x[part]
        if file is not None:
            file.madvise(mmap.MADV_DONTNEED)
        return block.to(device)

    return read


def _mapped_file(x: Any) -> mmap.mmap | None:
    """What is behind a memory map that can only be read.

    Pages of it that were read count as memory of this process until it gives them back, which loses
    nothing.
    """
    if getattr(x, "mode", None) != "r" or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    while x is not None and not isinstance(x, mmap.mmap):
        x = getattr(x, "base", None)
    return x


def checked(
    blocks: Iterable[Any],
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    unc2: str | None,  # "zero" or None, for blocks without uncertainties
    metric: Metric,
    where: str,
) -> Iterator[Block]:
    """The blocks that a caller hands over: tensors, or tuples (sem2, unc2, labels2)."""
    for number, block in enumerate(blocks):
        _checks.block(number, block)
        given = block if isinstance(block, (tuple, list)) else (block,)
        own_sem2, own_unc2, labels2 = *given, *[None] * (3 - len(given))
        own_sem2, own_unc2 = autocast(own_sem2, unc2 if own_unc2 is None else own_unc2)
        names = f"sem2 of block {number}", f"unc2 of block {number}"
        _checks.pairs(sem, unc, own_sem2, own_unc2, metric, columns=(*names, "M"))
        _checks.without_gradient(**dict(zip(names, (own_sem2, own_unc2), strict=True)))
        if where != "any":
            _checks.labels(f"labels2 of block {number}", labels2, own_sem2, names[0])
        yield Block(own_sem2, own_unc2, labels2)


def joined(blocks: Iterable[Block]) -> Block:
    """All columns as one block."""
    # A block's memory may be that of the next one.
    parts = [[x.clone() if isinstance(x, Tensor) else x for x in block] for block in blocks]
    return Block(
        *(torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in zip(*parts, strict=True))
    )


def progress_bar(count: int | None) -> Any:
    """A bar that counts columns."""
    try:
        from tqdm.auto import tqdm
    except ImportError as missing:
        raise ImportError(
            "progress=True needs tqdm; `pip install 'idml_fast[train]'` installs it"
        ) from missing
    return tqdm(total=count, unit=" columns", unit_scale=True)
