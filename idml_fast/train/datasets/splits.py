"""The parts of a data set, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ... import _checks
from .files import DataError, some
from .readers import READERS, READERS_OF_DOMAINS, Found, Items, Key


class Count(NamedTuple):
    """How much there is in a part of a data set."""

    images: int
    classes: int

    def __str__(self) -> str:
        return f"{self.images:,} images of {self.classes:,} classes"


# What is trained and tested with, as the papers have it.
PUBLISHED = {
    "cub": {"train": Count(5_864, 100), "test": Count(5_924, 100)},
    "cars": {"train": Count(8_054, 98), "test": Count(8_131, 98)},
    "sop": {"train": Count(59_551, 11_318), "test": Count(60_502, 11_316)},
    "inshop": {
        "train": Count(25_882, 3_997),
        "test": Count(14_218, 3_985),
        "gallery": Count(12_612, 3_985),
    },
}


@dataclass(frozen=True, eq=False)
class Listing:
    """Images by their paths, and the class of each.

    Args:
        paths: relative to the root of the `Splits`, with ``/`` between folders.
        labels: ``[N]`` int64, from 0 to the number of classes - 1.
        classes: their names, in the order of the labels.
    """

    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def count(self) -> Count:
        """Its images, and the classes that they are of."""
        return Count(len(self), len(np.unique(self.labels)))


@dataclass(frozen=True, eq=False)
class Splits:
    """The parts of a data set.

    Args:
        root: the folder in which the paths of all parts begin.
        train: the images to learn from.
        test: the images to retrieve, or to retrieve with if there is a gallery.
        gallery: where those of ``test`` are looked for, its classes numbered like theirs; None:
            among the other images of ``test``.
        remarks: a sentence for everything that whoever reads the results should know: numbers of
            images or classes that are not the published ones, retrieved classes that are learned.
    """

    root: Path
    train: Listing
    test: Listing
    gallery: Listing | None = None
    remarks: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Listing]:
        """The parts that there are, by their names."""
        parts = {"train": self.train, "test": self.test, "gallery": self.gallery}
        return {name: listing for name, listing in parts.items() if listing is not None}


def read(
    name: str, root: str | Path, *, source: str | None = None, target: str | None = None
) -> Splits:
    """The images of a data set, in the parts that are trained and tested with.

    Their order is always the same: that of the data set's own lists, or of the names of folders and
    files. Names that begin with a dot are passed over.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as root:
    ...     for bird in ("crow", "dove", "gull", "wren"):
    ...         Path(root, bird).mkdir()
    ...         Path(root, bird, "1.jpg").touch()
    ...     splits = read("folder", root)
    >>> splits.train.paths, splits.test.paths, splits.test.labels
    (('crow/1.jpg', 'dove/1.jpg'), ('gull/1.jpg', 'wren/1.jpg'), array([0, 1]))

    Args:
        name: ``cub``, ``cars``, ``sop``, ``inshop`` or ``domainnet``: as their archives are laid
            out. ``domains``: a folder for each domain, with one for each class in it, such as PACS,
            Office-Home and sets whose style was transferred. ``folder``: one for each class; or
            ``train`` and ``test`` (or ``query`` and ``gallery``) with these in them. What is
            learned of each is told in `idml_fast.train.datasets.readers`.
        root: the data set's folder, or the one in which its archive was unpacked.
        source: the domain to learn from, of ``domainnet`` and ``domains``.
        target: the domain to test with; None: ``source``.

    Raises:
        ValueError: ``name``, ``source`` or ``target`` is none of those that there are.
        DataError: a folder, a list or an image is missing, a list is not as it should be, or there
            is nothing to tell apart: no image, or one class alone.
    """
    _checks.one_of("name", name, (*READERS, *READERS_OF_DOMAINS))
    root = Path(root).expanduser()
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing"
        raise DataError(f"{root} must be the folder of a data set, got {got}")
    if name in READERS and (source, target) != (None, None):
        raise DataError(
            f"{name} has no domains, source and target must be None, got {source!r} and {target!r}"
        )
    try:
        if name in READERS:
            found = READERS[name](root)
        else:
            found = READERS_OF_DOMAINS[name](root, source, source if target is None else target)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    return checked(name, found)


def checked(name: str, found: Found) -> Splits:
    """The parts, and what there is to say of them.

    Raises:
        DataError: a part has no image, or one class alone.
    """
    tested = [found.test] if found.gallery is None else [found.test, found.gallery]
    splits = Splits(
        found.root, *numbered([found.train], found.names), *numbered(tested, found.names)
    )
    for part, listing in splits.parts.items():
        if listing.count.classes < 2:
            got = f"{listing.classes[listing.labels[0]]} alone" if listing.paths else "no image"
            raise DataError(
                f"{found.root} must hold images of two classes or more for {part}, got {got}"
            )
    return replace(splits, remarks=tuple(remarks(name, splits)))


def numbered(parts: Sequence[Items], names: Mapping[Key, str]) -> list[Listing]:
    """The parts with one numbering of their classes, in the order of the keys.

    >>> one, other = numbered([[("a.jpg", 7)], [("b.jpg", 5), ("c.jpg", 7)]], {7: "seven"})
    >>> one.classes, one.labels, other.labels
    (('5', 'seven'), array([1]), array([0, 1]))
    """
    keys = sorted({key for items in parts for _, key in items})
    place = {key: label for label, key in enumerate(keys)}
    classes = tuple(names.get(key, str(key)) for key in keys)
    return [
        Listing(
            tuple(path for path, _ in items),
            np.array([place[key] for _, key in items], dtype=np.int64),
            classes,
        )
        for items in parts
    ]


def remarks(name: str, splits: Splits) -> Iterator[str]:
    """See `Splits`."""
    for part, published in PUBLISHED.get(name, {}).items():
        count = splits.parts[part].count
        if count != published:
            yield f"{name} in {splits.root} has {count} for {part}; published are {published}"
    learned = set(splits.train.classes)
    known = [x for x in splits.test.classes if x in learned]
    if known:
        yield (
            f"{len(known):,} of the {len(splits.test.classes):,} classes to be retrieved in "
            f"{splits.root} are learned: {some(known)}"
        )
