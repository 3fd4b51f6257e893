"""Lists of images and folders of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"
HIDDEN = ".", "__MACOSX"  # with these begins the name of what is not the data set's
SHOWN = 3  # of the names in a message


class DataError(ValueError):
    """A data set is not as it should be; the message names the path."""


def first(root: Path, *candidates: str) -> Path:
    """The first of the candidates in ``root`` that is there.

    Raises:
        DataError: none is.
    """
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise DataError(f"{root} must hold {' or '.join(candidates)}, got none of them")


def folders(place: Path) -> list[str]:
    """The names of the folders in it, in order."""
    with os.scandir(place) as entries:
        return sorted(x.name for x in entries if not x.name.startswith(HIDDEN) and x.is_dir())


def image_files(root: Path, folder: str) -> list[str]:
    """The images in a folder of ``root`` and in the folders in it, relative to ``root``, in order.

    An image is what has the name of one.
    """
    with os.scandir(root / folder) as entries:
        kept = sorted((x for x in entries if not x.name.startswith(HIDDEN)), key=lambda x: x.name)
    found = []
    for entry in kept:
        path = f"{folder}/{entry.name}"
        if entry.is_dir():
            found += image_files(root, path)
        elif path.lower().endswith(SUFFIXES):
            found.append(path)
    return found


def rows(path: Path, line: re.Pattern[str], head: int = 0) -> Iterator[re.Match[str]]:
    """The lines of a list; empty ones are passed over.

    Args:
        path: of the list.
        line: what every line is, with a named group for each column.
        head: how many lines come before; the last of them has the names of the columns.

    Raises:
        DataError: a line is something else; the message has its number.
    """
    columns = " ".join(line.groupindex)
    # A name need not be UTF-8: the file system gets the bytes that are in the list.
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, text in enumerate(file, start=1):
            if number < head or text.isspace():
                continue
            if number == head:
                if text.split() != columns.split():
                    raise _wrong(path, number, f"the head {columns}", text)
                continue
            row = line.fullmatch(text)
            if row is None:
                raise _wrong(path, number, f"a line of {columns}", text)
            yield row


def _wrong(path: Path, number: int, wanted: str, text: str) -> DataError:
    return DataError(f"{path}, line {number}, must be {wanted}, got {text.rstrip()!r}")


def check_files(file: Path, root: Path, paths: Sequence[str]) -> None:
    """What a list names is there. Each folder is looked into once, and no file is looked at.

    Raises:
        DataError: some of it is not.
    """
    there: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        parent, _, name = path.rpartition("/")
        if parent not in there:
            place = root / parent
            there[parent] = set(os.listdir(place)) if place.is_dir() else set()
        if name not in there[parent]:
            missing.append(path)
    if missing:
        raise DataError(
            f"{file} names {len(missing):,} of {len(paths):,} images that are not in {root}: "
            f"{some(missing)}"
        )


def some(names: Sequence[str]) -> str:
    """The first few of the names.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
