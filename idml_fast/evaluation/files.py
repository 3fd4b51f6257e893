"""Embeddings and labels from files: ``.npy``, ``.npz`` and ``.safetensors``, nothing unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import safe_open
from torch import Tensor

from .. import _checks

SUFFIXES = ".npy", ".npz", ".safetensors"
BLOCK = 2**24  # bytes of embeddings that are looked at together


class FileError(ValueError):
    """A file does not hold what it should; the message names it, what was wanted, what came."""


@dataclass(frozen=True)
class Items:
    """Embeddings and labels, and where each of them is from.

    Args:
        sem: ``[N, Ds]`` float, finite.
        unc: ``[N, Du]`` float, finite; None: there is no uncertainty.
        labels: ``[N]`` integers of any dtype, or strings.
        paths: of the files that ``sem``, ``unc`` and ``labels`` are from.
    """

    sem: Tensor
    unc: Tensor | None
    labels: np.ndarray
    paths: dict[str, Path]

    def called(self, name: str) -> str:
        """What messages call ``sem``, ``unc`` or ``labels``."""
        return f"{name} of {self.paths[name]}"

    def __len__(self) -> int:
        return len(self.sem)


def read_items(files: Sequence[Path], labels: Path | None = None) -> Items:
    """The items of one file, or of one for each of their parts.

    A ``.npy`` file is one array, mapped into memory: it may be larger than that. A ``.npz`` or
    ``.safetensors`` file holds arrays by name, of which ``sem``, ``unc`` and ``labels`` are read.

    Args:
        files: with ``sem`` and, if there are two, with ``unc``. One file of named arrays may hold
            ``unc`` and ``labels`` as well.
        labels: the file with the labels; None: they are in the one file.

    Raises:
        FileError: a file cannot be read, an array is missing or of another shape or dtype, or an
            embedding is not finite; the message names the file and the first bad row.
    """
    if len(files) > 2:
        raise FileError(f"embeddings must be one file or two, sem and unc, got {len(files)}")
    first = files[0]
    sources = {"sem": first, "unc": files[-1], "labels": labels or first}
    if first.suffix.lower() == ".npy":
        if labels is None:
            raise FileError(
                f"{first} holds one array alone: a file with the labels must be given too"
            )
        if len(files) == 1:
            del sources["unc"]
    found = {name: _read(path, name) for name, path in sources.items()}
    if len(files) == 1 and found.get("unc", 0) is None:
        del sources["unc"]  # it need not be there
    for name, path in sources.items():
        if found[name] is None:
            raise FileError(f"{path} must hold an array that is called {name}, got none")
    names = {name: f"{name} of {path}" for name, path in sources.items()}
    sem = _embeddings(names["sem"], found["sem"])
    unc = None
    if "unc" in sources:
        unc = _embeddings(names["unc"], found["unc"])
        _same(names["unc"], unc, names["sem"], sem)
    return Items(sem, unc, _labels(names, found["labels"], sem), sources)


def check_gallery(queries: Items, gallery: Items) -> None:
    """Queries can be compared with the gallery.

    Raises:
        FileError: their embeddings differ in width or dtype, or their labels in kind.
    """
    for name in ("sem", "unc"):
        own, other = getattr(queries, name), getattr(gallery, name)
        if own is None or other is None:
            continue
        if own.shape[1] != other.shape[1]:
            raise FileError(
                f"{gallery.called(name)} must be {own.shape[1]} wide like {queries.called(name)}, "
                f"got {other.shape[1]}"
            )
        if own.dtype != other.dtype:
            raise FileError(
                f"{gallery.called(name)} must be {_name(own.dtype)} like {queries.called(name)}, "
                f"got {_name(other.dtype)}"
            )
    kinds = [_kind_of_labels(items.labels) for items in (queries, gallery)]
    if kinds[0] != kinds[1]:
        raise FileError(
            f"{gallery.called('labels')} must be {kinds[0]} like {queries.called('labels')}, "
            f"got {kinds[1]}"
        )


def numbered(*labels: np.ndarray) -> tuple[list[int] | list[str], list[Tensor]]:
    """The classes in order, and the labels of each set of items as places in that order.

    So labels may be strings, or integers that int64 does not hold.

    >>> numbered(np.array(["cat", "ant", "cat"]), np.array(["bee"]))
    (['ant', 'bee', 'cat'], [tensor([2, 0, 2]), tensor([1])])
    """
    found = [np.unique(values, return_inverse=True) for values in labels]
    # As Python's numbers: together, int64 and uint64 would become floating point.
    classes = sorted({label for unique, _ in found for label in unique.tolist()})
    place = {label: number for number, label in enumerate(classes)}
    return classes, [
        torch.tensor([place[label] for label in unique.tolist()])[torch.from_numpy(inverse)]
        for unique, inverse in found
    ]


def metadata(path: Path) -> dict[str, str]:
    """What a ``.safetensors`` file says of itself; nothing for other files.

    Raises:
        FileError: the file cannot be read.
    """
    if path.suffix.lower() != ".safetensors":
        return {}
    with _readable(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


def _read(path: Path, name: str) -> np.ndarray | Tensor | None:
    """The array of that name, or the only one of a ``.npy``; None: the file has none."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise FileError(f"{path} must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    with _readable(path):
        if suffix == ".npy":
            return npy.open_memmap(path, mode="c")  # written to by nobody, but PyTorch warns of "r"
        if suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                if f"{name}.npy" not in archive.namelist():
                    return None
                with archive.open(f"{name}.npy") as member:
                    return npy.read_array(member, allow_pickle=False)
        with safe_open(path, "pt") as file:
            return file.get_tensor(name) if name in set(file.keys()) else None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says of which file an error is that a reader raises."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # there is no end to what readers raise on foreign bytes
        why = " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"{path} is no whole {path.suffix.lower()} file: {why}") from None


def _embeddings(name: str, array: np.ndarray | Tensor) -> Tensor:
    """A matrix of finite numbers."""
    if isinstance(array, np.ndarray):
        try:
            _checks.array_dtype(name, array)
        except TypeError as error:
            raise FileError(str(error)) from None
        array = torch.from_numpy(array)
    if array.dtype not in _checks.FLOATS:
        wanted = ", ".join(map(_name, _checks.FLOATS))
        raise FileError(f"{name} must be one of {wanted}, got {_name(array.dtype)}")
    if array.dim() != 2 or not array.numel():
        raise FileError(
            f"{name} must have shape [items, width], neither of them 0, got {list(array.shape)}"
        )
    rows = max(1, BLOCK // (array.shape[1] * array.element_size()))
    for first in range(0, len(array), rows):
        try:
            _checks.finite_rows(name, array[first : first + rows], first)
        except ValueError as error:
            raise FileError(str(error)) from None
    return array


def _same(name: str, x: Tensor, other: str, like: Tensor) -> None:
    """As many rows, and of the same dtype."""
    if len(x) != len(like):
        raise FileError(f"{name} must have {len(like)} rows like {other}, got {len(x)}")
    if x.dtype != like.dtype:
        raise FileError(f"{name} must be {_name(like.dtype)} like {other}, got {_name(x.dtype)}")


def _labels(names: dict[str, str], array: np.ndarray | Tensor, sem: Tensor) -> np.ndarray:
    """One integer or string for each item."""
    name = names["labels"]
    if isinstance(array, Tensor):
        if array.is_floating_point() or array.is_complex():
            raise FileError(f"{name} must be integers or strings, got {_name(array.dtype)}")
        array = array.numpy()
    if array.shape != (len(sem),):
        raise FileError(
            f"{name} must have shape [{len(sem)}] like {names['sem']} {list(sem.shape)}, "
            f"got {list(array.shape)}"
        )
    if array.dtype.kind not in "iuU":
        raise FileError(f"{name} must be integers or strings, got {array.dtype}")
    return array


def _kind_of_labels(labels: np.ndarray) -> str:
    return "strings" if labels.dtype.kind == "U" else "integers"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
