"""How each data set is laid out, and which of its classes are learned."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from ... import _checks
from .files import DataError, check_files, first, folders, image_files, rows, some

DOMAINNET = "clipart", "infograph", "painting", "quickdraw", "real", "sketch"
# Lines of lists. A path may have spaces; those before the next column are not part of it.
EBAY = re.compile(
    r"(?P<image_id>\d+)\s+(?P<class_id>\d+)\s+(?P<super_class_id>\d+)\s+(?P<path>\S.*?)\s*",
    re.ASCII,
)
PARTITION = re.compile(
    r"(?P<image_name>\S.*?)\s+(?P<item_id>id_\d+)\s+"
    r"(?P<evaluation_status>train|query|gallery)\s*",
    re.ASCII,
)
LABELLED = re.compile(r"(?P<path>\S.*?)\s+(?P<label>\d+)\s*", re.ASCII)

Key = str | int  # tells a class; the order of the keys is that of the classes
Items = list[tuple[str, Key]]  # the images' paths with their classes
# What loadmat and its reader raise where a file holds something else, or only half of it.
BROKEN = LookupError, MatReadError, NotImplementedError, OSError, TypeError, ValueError, zlib.error


class Found(NamedTuple):
    """What is in a folder.

    Args:
        root: where all paths begin.
        train: what is learned from.
        test: what is retrieved, or retrieved with.
        gallery: what is retrieved; None: ``test``.
        names: of the classes whose key is not their name.
    """

    root: Path
    train: Items
    test: Items
    gallery: Items | None = None
    names: Mapping[Key, str] = {}


def cub(root: Path) -> Found:
    """CUB-200-2011: ``images/<number>.<class>/<image>``; classes 1 to 100 are learned."""
    images = first(root, "CUB_200_2011/images", "images")
    learned, retrieved = [], []
    names: dict[Key, str] = {}
    for name in folders(images):
        number = re.match(r"(\d+)\.", name)
        if number is None:
            raise DataError(
                f"{images / name} must begin with the number of its class, as 001.Albatross does"
            )
        (learned if int(number[1]) <= 100 else retrieved).append(name)
        names[name] = name[number.end() :].replace("_", " ")
    parts = (classes_in(images, "", classes) for classes in (learned, retrieved))
    return Found(images, *parts, names=names)


def cars(root: Path) -> Found:
    """Cars196: ``cars_annos.mat`` and the images in ``car_ims``; classes 1 to 98 are learned."""
    path = first(root, "cars196/cars_annos.mat", "cars_annos.mat")
    file = BytesIO(path.read_bytes())  # what loadmat raises is then of what is in it
    try:
        content = loadmat(file, variable_names=("annotations", "class_names"))
        annotations = content["annotations"].ravel()
        images = [str(image.item()) for image in annotations["relative_im_path"]]
        numbers = [int(number.item()) for number in annotations["class"]]
        names = [str(name.item()) for name in content["class_names"].ravel()]
    except BROKEN:
        raise DataError(
            f"{path} must be a MATLAB file, older than 7.3, with class_names and with annotations "
            "that have relative_im_path and class"
        ) from None
    check_files(path, path.parent, images)
    items: Items = list(zip(images, numbers, strict=True))
    return Found(
        path.parent,
        [item for item in items if item[1] <= 98],
        [item for item in items if item[1] > 98],
        names=dict(enumerate(names, start=1)),
    )


def sop(root: Path) -> Found:
    """Stanford Online Products: ``Ebay_train.txt`` and ``Ebay_test.txt``."""
    place = first(root, "Stanford_Online_Products/Ebay_train.txt", "Ebay_train.txt").parent
    parts = []
    for file in (place / "Ebay_train.txt", place / "Ebay_test.txt"):
        items: Items = [(row["path"], int(row["class_id"])) for row in rows(file, EBAY, head=1)]
        check_files(file, place, [path for path, _ in items])
        parts.append(items)
    return Found(place, *parts)


def inshop(root: Path) -> Found:
    """In-shop Clothes Retrieval: ``list_eval_partition.txt``, in ``Eval`` or not, and ``img``,
    in ``Img`` or not."""
    places = "In-shop Clothes Retrieval Benchmark/", ""
    lists = "Eval/list_eval_partition.txt", "list_eval_partition.txt"
    file = first(root, *(place + name for place in places for name in lists))
    place = file.parent.parent if file.parent.name == "Eval" else file.parent
    images = first(place, "img", "Img/img").parent
    parts: dict[str, Items] = {"train": [], "query": [], "gallery": []}
    for row in rows(file, PARTITION, head=2):
        parts[row["evaluation_status"]].append((row["image_name"], row["item_id"]))
    check_files(file, images, [path for items in parts.values() for path, _ in items])
    return Found(images, *parts.values())


def domainnet(root: Path, source: str | None, target: str | None) -> Found:
    """DomainNet: ``<domain>_train.txt`` of ``source`` and ``<domain>_test.txt`` of ``target``.

    Of its 345 classes those with labels below 172 are learned, and the others retrieved: half of
    them, as elsewhere. Which of them were learned for the numbers in the literature is not
    published, as far as could be found.
    """
    _checks.one_of("source", source, DOMAINNET)
    _checks.one_of("target", target, DOMAINNET)
    place = first(root, f"DomainNet/{source}_train.txt", f"{source}_train.txt").parent
    parts = []
    names: dict[Key, str] = {}
    for file in (place / f"{source}_train.txt", place / f"{target}_test.txt"):
        items: Items = [(row["path"], int(row["label"])) for row in rows(file, LABELLED)]
        check_files(file, place, [path for path, _ in items])
        names.update((label, Path(path).parent.name) for path, label in items)
        parts.append(items)
    learned = [item for item in parts[0] if item[1] < 172]
    retrieved = [item for item in parts[1] if item[1] >= 172]
    return Found(place, learned, retrieved, names=names)


def domains(root: Path, source: str | None, target: str | None) -> Found:
    """``<domain>/<class>/<image>``: half of the classes are learned from ``source``, the other half
    is retrieved in ``target``.

    These are halves of all classes that any domain has: the same, whatever the two domains.
    """
    classes = {domain: folders(root / domain) for domain in folders(root)}
    _checks.one_of("source", source, tuple(classes))
    _checks.one_of("target", target, tuple(classes))
    learned, retrieved = halves(root, sorted(set().union(*classes.values())))
    return Found(
        root,
        classes_in(root, f"{source}/", [x for x in classes[source] if x in learned]),
        classes_in(root, f"{target}/", [x for x in classes[target] if x in retrieved]),
    )


def folder(root: Path) -> Found:
    """``<class>/<image>``, of which half of the classes is learned and the other half retrieved; or
    ``train`` and ``test`` with classes in them; or ``train``, ``query`` and ``gallery``."""
    parts = [part for part in ("train", "test", "query", "gallery") if (root / part).is_dir()]
    if parts in (["train", "test"], ["train", "query", "gallery"]):
        return Found(root, *(classes_in(root, f"{x}/", folders(root / x)) for x in parts))
    if parts:
        raise DataError(
            f"{root} must hold train and test, or train, query and gallery, or classes alone, "
            f"got {' and '.join(parts)}"
        )
    items = classes_in(root, "", folders(root))
    learned, retrieved = halves(root, sorted({name for _, name in items}))
    return Found(
        root,
        [item for item in items if item[1] in learned],
        [item for item in items if item[1] in retrieved],
    )


def classes_in(root: Path, place: str, classes: Iterable[str]) -> Items:
    """The images in the folders of these classes; ``place`` is what comes before their names."""
    return [(path, name) for name in classes for path in image_files(root, place + name)]


def halves(root: Path, classes: list[str]) -> tuple[set[str], set[str]]:
    """The first half of the classes and the other one, which may have one more.

    Raises:
        DataError: they are not two each.
    """
    if len(classes) < 4:
        got = f"{len(classes)}: {some(classes)}" if classes else "no image"
        raise DataError(
            f"{root} must hold images of four classes or more, a folder each, two to learn and two "
            f"to retrieve, got {got}"
        )
    middle = len(classes) // 2
    return set(classes[:middle]), set(classes[middle:])


READERS: dict[str, Callable[[Path], Found]] = {
    "cub": cub,
    "cars": cars,
    "sop": sop,
    "inshop": inshop,
    "folder": folder,
}
READERS_OF_DOMAINS: dict[str, Callable[[Path, str | None, str | None], Found]] = {
    "domainnet": domainnet,
    "domains": domains,
}
