"""Data sets on disk: what is learned and retrieved of each layout, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from PIL import Image
from scipy.io import savemat

from idml_fast.train.datasets import PUBLISHED, Count, DataError, Listing, Splits, read, splits
from idml_fast.train.images import Images

EBAY = "image_id class_id super_class_id path"
PARTITION = "image_name item_id evaluation_status"


def put(root: Path, *paths: str) -> None:
    """Small images with these names, no two of the same colour; JPEG or PNG, as they are called."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(list(os.fsencode(path))).integers(0, 256, 3).tolist()
        Image.new("RGB", (4, 3), tuple(colour)).save(file)


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    file.write_text(text, encoding="utf-8", errors="surrogateescape")


def cub(root: Path) -> Path:
    images = root / "CUB_200_2011" / "images"
    for number, bird in ((1, "Albatross"), (100, "Pelican"), (101, "Owl"), (200, "Wren")):
        put(images, *(f"{number:03}.{bird}/{bird}_{i}.jpg" for i in range(3)))
    (images / "001.Albatross" / "._Albatross_0.jpg").write_bytes(b"\0\5\x16\7")
    (images / ".DS_Store").write_bytes(b"")
    return root


def cars(root: Path) -> Path:
    numbers = [1, 2, 98, 99, 196, 98, 99]
    paths = [f"car_ims/{i + 1:06}.jpg" for i in range(len(numbers))]
    put(root / "cars196", *paths)
    fields = [("relative_im_path", object), ("bbox_x1", object), ("class", object)]
    annotations = np.empty((1, len(numbers)), dtype=fields)
    for i, (path, number) in enumerate(zip(paths, numbers, strict=True)):
        annotations[0, i] = path, np.array([[1]]), np.array([[number]], dtype=np.uint8)
    names = np.array([f"Car {i + 1}" for i in range(196)], dtype=object)[None]
    savemat(root / "cars196" / "cars_annos.mat", {"annotations": annotations, "class_names": names})
    return root


def sop(root: Path) -> Path:
    place = root / "Stanford_Online_Products"
    parts = {"train": [9, 9, 10, 10, 10], "test": [11, 11, 12]}
    for part, classes in parts.items():
        paths = [f"bicycle_final/{part}{x}_{i}.JPG" for i, x in enumerate(classes)]
        put(place, *paths)
        lines = (f"{i + 1} {x} 1 {paths[i]}" for i, x in enumerate(classes))
        write(place / f"Ebay_{part}.txt", EBAY, *lines)
    return root


def inshop(root: Path) -> Path:
    lines = []
    for item, part, count in (
        (1, "train", 2),
        (7, "train", 1),
        (2, "query", 2),
        (2, "gallery", 1),
        (3, "query", 1),
        (3, "gallery", 2),
        (4, "gallery", 1),
    ):
        for i in range(count):
            path = f"img/WOMEN/Blouses_Shirts/id_{item:08}/{part}_{i}_front.jpg"
            put(root, path)
            lines.append(f"{path}              id_{item:08}   {part}")
    write(root / "list_eval_partition.txt", str(len(lines)), PARTITION, *lines)
    return root


def domainnet(root: Path) -> Path:
    kinds = {0: "aircraft", 171: "lion", 172: "mouse", 344: "zigzag"}
    for domain in ("real", "sketch"):
        for part in ("train", "test"):
            lines = []
            for label, kind in kinds.items():
                path = f"{domain}/{kind}/{domain}_{part}.jpg"
                put(root / "DomainNet", path)
                lines.append(f"{path} {label}")
            write(root / "DomainNet" / f"{domain}_{part}.txt", *lines)
    return root


def pacs(root: Path) -> Path:
    """Five classes, of which one domain lacks one."""
    for domain in ("photo", "sketch"):
        for kind in ("dog", "elephant", "giraffe", "guitar", "horse"):
            if (domain, kind) != ("photo", "dog"):
                put(root, f"{domain}/{kind}/pic_1.jpg", f"{domain}/{kind}/pic_2.png")
    return root


def plain(root: Path, classes: str = "abcde") -> Path:
    for name in classes:
        put(root, f"{name}/1.jpg", f"{name}/2.PNG")
    return root


LAYOUTS = {
    "cub": (cub, {}),
    "cars": (cars, {}),
    "sop": (sop, {}),
    "inshop": (inshop, {}),
    "domainnet": (domainnet, {"source": "real", "target": "sketch"}),
    "domains": (pacs, {"source": "sketch", "target": "photo"}),
    "folder": (plain, {}),
}


def items(listing: Listing) -> list[tuple[str, str]]:
    """The last part of each path, and the name of its class."""
    names = [listing.classes[label] for label in listing.labels]
    return [
        (path.rpartition("/")[2], name) for path, name in zip(listing.paths, names, strict=True)
    ]


def same(one: Splits, other: Splits) -> bool:
    return one.root == other.root and all(
        a.paths == b.paths and a.classes == b.classes and np.array_equal(a.labels, b.labels)
        for a, b in zip(one.parts.values(), other.parts.values(), strict=True)
    )


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    """A small tree of every layout: the name, its root, the options."""
    build, options = LAYOUTS[request.param]
    return request.param, build(tmp_path), options


# ------------------------------------------------------------------------------ every layout


def test_every_path_is_that_of_an_image_of_its_class(layout):
    name, root, options = layout
    found = read(name, root, **options)
    for listing in found.parts.values():
        assert listing.labels.dtype == np.int64
        assert len(listing.labels) == len(listing.paths) == len(set(listing.paths))
        assert 0 <= listing.labels.min() <= listing.labels.max() < len(listing.classes)
        for (image, label, index), path in zip(
            Images(found.root, listing), listing.paths, strict=True
        ):
            assert listing.paths[index] == path and listing.labels[index] == label
            with Image.open(found.root / path) as there:
                assert np.array_equal(np.asarray(image), np.asarray(there.convert("RGB")))


def test_no_class_and_no_image_is_on_both_sides(layout):
    name, root, options = layout
    found = read(name, root, **options)
    assert not set(found.train.classes) & set(found.test.classes)
    paths = [path for listing in found.parts.values() for path in listing.paths]
    assert len(paths) == len(set(paths))


def test_the_order_is_always_the_same(layout, monkeypatch):
    name, root, options = layout
    once = read(name, root, **options)
    scandir = os.scandir

    class Reversed:
        """A file system that lists the other way round."""

        def __init__(self, place):
            with scandir(place) as entries:
                self.entries = sorted(entries, key=lambda x: x.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert same(read(name, str(root), **options), once)


def test_no_image_is_opened(layout, monkeypatch):
    name, root, options = layout
    wanted = read(name, root, **options)
    for path in root.rglob("*.[jJpP][pPnN][gG]"):
        path.write_bytes(b"")
    assert same(read(name, root, **options), wanted)


def test_the_root_may_be_the_data_sets_own_folder(layout):
    name, root, options = layout
    inside = [x for x in root.iterdir() if x.is_dir()]
    if name in ("cub", "cars", "sop", "domainnet"):
        (own,) = inside
    elif name == "inshop":
        own = root / "In-shop Clothes Retrieval Benchmark"
        (root / "img").rename(own.parent / "kept")
        (own / "Img").mkdir(parents=True)
        (own / "Eval").mkdir()
        (root / "kept").rename(own / "Img" / "img")
        (root / "list_eval_partition.txt").rename(own / "Eval" / "list_eval_partition.txt")
    else:
        own = root
    assert same(read(name, root, **options), read(name, own, **options))


def test_a_root_below_the_home_folder(monkeypatch, tmp_path):
    plain(tmp_path / "sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("folder", "~/sets").root == tmp_path / "sets"


# ------------------------------------------------------------------------------ each layout


def test_cub(tmp_path):
    found = read("cub", cub(tmp_path))
    assert found.root == tmp_path / "CUB_200_2011" / "images"
    assert found.train.classes == ("Albatross", "Pelican")
    assert found.test.classes == ("Owl", "Wren")
    assert found.train.paths[:2] == (
        "001.Albatross/Albatross_0.jpg",
        "001.Albatross/Albatross_1.jpg",
    )
    assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.gallery is None


def test_cars(tmp_path):
    found = read("cars", cars(tmp_path))
    assert items(found.train) == [
        ("000001.jpg", "Car 1"),
        ("000002.jpg", "Car 2"),
        ("000003.jpg", "Car 98"),
        ("000006.jpg", "Car 98"),
    ]
    assert found.train.labels.tolist() == [0, 1, 2, 2]
    assert items(found.test) == [
        ("000004.jpg", "Car 99"),
        ("000005.jpg", "Car 196"),
        ("000007.jpg", "Car 99"),
    ]
    assert found.test.labels.tolist() == [0, 1, 0]


def test_sop_counts_its_classes_as_numbers(tmp_path):
    found = read("sop", sop(tmp_path))
    assert found.train.classes == ("9", "10")
    assert found.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert found.test.paths[2] == "bicycle_final/test12_2.JPG"
    assert found.test.labels.tolist() == [0, 0, 1]


def test_inshop_has_one_numbering_for_queries_and_gallery(tmp_path):
    found = read("inshop", inshop(tmp_path))
    assert found.train.classes == ("id_00000001", "id_00000007")
    assert found.test.classes == found.gallery.classes
    assert found.test.classes == ("id_00000002", "id_00000003", "id_00000004")
    assert found.test.labels.tolist() == [0, 0, 1]
    assert found.gallery.labels.tolist() == [0, 1, 1, 2]
    assert found.test.count == Count(3, 2)  # none asks for the third


@pytest.mark.parametrize("target", [None, "real", "sketch"])
def test_domainnet(tmp_path, target):
    found = read("domainnet", domainnet(tmp_path), source="real", target=target)
    domain = target or "real"
    assert found.train.paths == ("real/aircraft/real_train.jpg", "real/lion/real_train.jpg")
    assert found.train.classes == ("aircraft", "lion")
    assert found.test.paths == (
        f"{domain}/mouse/{domain}_test.jpg",
        f"{domain}/zigzag/{domain}_test.jpg",
    )
    assert found.test.classes == ("mouse", "zigzag")


def test_all_domains_share_one_half_of_the_classes(tmp_path):
    found = read("domains", pacs(tmp_path), source="sketch", target="photo")
    assert found.train.classes == ("dog", "elephant")
    assert found.test.classes == ("giraffe", "guitar", "horse")
    assert {path.split("/")[0] for path in found.train.paths} == {"sketch"}
    assert {path.split("/")[0] for path in found.test.paths} == {"photo"}
    assert all(list(listing.paths) == sorted(listing.paths) for listing in found.parts.values())
    # The photographs have no dog; the classes that are left stay on their sides.
    put(tmp_path, "photo/camel/1.jpg")
    other = read("domains", tmp_path, source="photo")
    assert other.train.classes == ("camel", "elephant")
    assert other.test.classes == ("giraffe", "guitar", "horse")


def test_a_folder_of_classes_is_halved(tmp_path):
    found = read("folder", plain(tmp_path))
    assert found.train.paths == ("a/1.jpg", "a/2.PNG", "b/1.jpg", "b/2.PNG")
    assert found.train.classes == ("a", "b")
    assert found.test.classes == ("c", "d", "e")
    assert found.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.remarks == ()


def test_only_images_count_and_hidden_files_do_not(tmp_path):
    plain(tmp_path, "abcd")
    wanted = read("folder", tmp_path)
    for path in ("a/._1.jpg", "a/.hidden.png", ".git/1.jpg", "__MACOSX/a/1.jpg", "a/notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    (tmp_path / "b0_without_images").mkdir()
    (tmp_path / "readme.md").write_text("")
    assert same(read("folder", tmp_path), wanted)
    put(tmp_path, "a/more/of it/3.jpg")
    assert read("folder", tmp_path).train.paths[2] == "a/more/of it/3.jpg"


def test_a_folder_with_parts(tmp_path):
    plain(tmp_path / "train", "ab")
    plain(tmp_path / "test", "cd")
    found = read("folder", tmp_path)
    assert found.train.paths[0] == "train/a/1.jpg"
    assert found.test.classes == ("c", "d")
    (tmp_path / "test").rename(tmp_path / "query")
    plain(tmp_path / "gallery", "bcde")
    found = read("folder", tmp_path)
    assert found.test.classes == found.gallery.classes == ("b", "c", "d", "e")
    assert found.test.labels.tolist() == [1, 1, 2, 2]
    assert found.gallery.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.remarks == (f"1 of the 4 classes to be retrieved in {tmp_path} are learned: b",)


NAMES = "a b", " c", "d, é ü", "鳥", "q'\"q", "x%20[y]*?", "emoji 🐦", "tab\there"


def test_names_with_odd_characters_survive_in_folders(tmp_path):
    odd = [*NAMES, os.fsdecode(b"not \xff UTF-8")]
    for name in odd:
        put(tmp_path, f"{name}/{name}.jpg")
    found = read("folder", tmp_path)
    assert {*found.train.classes, *found.test.classes} == set(odd)
    for listing in found.parts.values():
        for image, label, _ in Images(found.root, listing):
            name = listing.classes[label]
            with Image.open(tmp_path / name / f"{name}.jpg") as there:
                assert np.array_equal(np.asarray(image), np.asarray(there))


@pytest.mark.parametrize("name", [*NAMES[:1], *NAMES[2:], os.fsdecode(b"not \xff UTF-8")])
def test_names_with_odd_characters_survive_in_lists(tmp_path, name):
    path = f"{name}/{name}.jpg"
    sop(tmp_path / "sop")
    place = tmp_path / "sop" / "Stanford_Online_Products"
    put(place, path)
    with (place / "Ebay_test.txt").open("ab") as file:
        file.write(b"99 13 1 " + os.fsencode(path) + b"\r\n")
    assert read("sop", tmp_path / "sop").test.paths[-1] == path
    domainnet(tmp_path)
    put(tmp_path / "DomainNet", f"real/{path}")
    with (tmp_path / "DomainNet" / "real_train.txt").open("ab") as file:
        file.write(b"real/" + os.fsencode(path) + b"  3\n\n")
    found = read("domainnet", tmp_path, source="real")
    assert found.train.paths[-1] == f"real/{path}"
    assert found.train.classes == ("aircraft", name, "lion")


# ------------------------------------------------------------------------------ counts


def test_the_published_counts():
    """The numbers of images add up to those of the archives."""
    totals = {name: sum(x.images for x in parts.values()) for name, parts in PUBLISHED.items()}
    assert totals == {"cub": 11_788, "cars": 16_185, "sop": 120_053, "inshop": 52_712}
    assert PUBLISHED["cub"] == {"train": (5864, 100), "test": (5924, 100)}
    assert PUBLISHED["cars"] == {"train": (8054, 98), "test": (8131, 98)}
    assert PUBLISHED["sop"] == {"train": (59551, 11318), "test": (60502, 11316)}
    assert PUBLISHED["inshop"] == {
        "train": (25882, 3997),
        "test": (14218, 3985),
        "gallery": (12612, 3985),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_counts_than_published_are_told(tmp_path, monkeypatch, name):
    build, options = LAYOUTS[name]
    found = read(name, build(tmp_path), **options)
    assert len(found.remarks) == len(found.parts) == len(PUBLISHED[name])
    counts = {part: listing.count for part, listing in found.parts.items()}
    monkeypatch.setitem(splits.PUBLISHED, name, counts)
    assert read(name, tmp_path, **options).remarks == ()
    less = Count(counts["test"].images - 1, counts["test"].classes)
    more = Count(counts["train"].images, counts["train"].classes + 1_000)
    monkeypatch.setitem(splits.PUBLISHED, name, counts | {"test": less, "train": more})
    assert read(name, tmp_path, **options).remarks == tuple(
        f"{name} in {found.root} has {counts[part]} for {part}; published are {published}"
        for part, published in (("train", more), ("test", less))
    )


def test_a_remark_in_words(tmp_path):
    first, _ = read("cub", cub(tmp_path)).remarks
    assert first == (
        f"cub in {tmp_path}/CUB_200_2011/images has 6 images of 2 classes for train; "
        "published are 5,864 images of 100 classes"
    )


# ------------------------------------------------------------------------------ refusals


def refused(name: str, root: Path, sentence: str, **options) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        read(name, root, **options)


def test_a_root_that_is_no_folder(tmp_path):
    refused("cub", tmp_path / "x", f"{tmp_path}/x must be the folder of a data set, got nothing")
    (tmp_path / "x").write_text("")
    refused("cub", tmp_path / "x", f"{tmp_path}/x must be the folder of a data set, got a file")


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("cub", "CUB_200_2011/images or images"),
        ("cars", "cars196/cars_annos.mat or cars_annos.mat"),
        ("sop", "Stanford_Online_Products/Ebay_train.txt or Ebay_train.txt"),
        (
            "inshop",
            "In-shop Clothes Retrieval Benchmark/Eval/list_eval_partition.txt or "
            "In-shop Clothes Retrieval Benchmark/list_eval_partition.txt or "
            "Eval/list_eval_partition.txt or list_eval_partition.txt",
        ),
        ("domainnet", "DomainNet/real_train.txt or real_train.txt"),
    ],
)
def test_a_folder_of_something_else(tmp_path, name, wanted):
    options = {"source": "real"} if name == "domainnet" else {}
    refused(name, tmp_path, f"{tmp_path} must hold {wanted}, got none of them", **options)


def test_an_inshop_list_without_images(tmp_path):
    inshop(tmp_path)
    shutil.rmtree(tmp_path / "img")
    refused("inshop", tmp_path, f"{tmp_path} must hold img or Img/img, got none of them")


def test_a_list_that_is_missing(tmp_path):
    place = sop(tmp_path) / "Stanford_Online_Products"
    (place / "Ebay_test.txt").unlink()
    refused("sop", tmp_path, f"{place}/Ebay_test.txt cannot be read: No such file or directory")
    domainnet(tmp_path)
    refused(
        "domainnet",
        tmp_path,
        f"{tmp_path}/DomainNet/quickdraw_test.txt cannot be read: No such file or directory",
        source="real",
        target="quickdraw",
    )


@pytest.mark.parametrize("name", ["cars", "sop", "inshop", "domainnet"])
def test_files_that_a_list_names_but_are_not_there(tmp_path, name):
    build, options = LAYOUTS[name]
    found = read(name, build(tmp_path), **options)
    gone = list(found.train.paths)[-2:]
    for path in gone:
        (found.root / path).unlink()
    file, listed = {
        "cars": ("cars_annos.mat", 7),
        "sop": ("Ebay_train.txt", 5),
        "inshop": ("list_eval_partition.txt", 10),
        "domainnet": ("real_train.txt", 4),
    }[name]
    sentence = (
        f"{found.root}/{file} names 2 of {listed} images that are not in {found.root}: "
        f"{gone[0]}, {gone[1]}"
    )
    refused(name, tmp_path, sentence, **options)


def test_of_many_missing_files_a_few_are_named(tmp_path):
    place = sop(tmp_path) / "Stanford_Online_Products"
    shutil.rmtree(place / "bicycle_final")
    some = ", ".join(f"bicycle_final/train{x}" for x in ("9_0.JPG", "9_1.JPG", "10_2.JPG"))
    refused(
        "sop",
        tmp_path,
        f"{place}/Ebay_train.txt names 5 of 5 images that are not in {place}: {some} and 2 more",
    )


@pytest.mark.parametrize(
    "line", ["3 four 1 a.jpg", "3 4 a.jpg", "3 4 1", "bicycle_final/a.jpg", "3 4 1 \udcff"]
)
def test_a_line_of_sop_that_is_none(tmp_path, line):
    file = sop(tmp_path) / "Stanford_Online_Products" / "Ebay_test.txt"
    write(file, EBAY, "1 11 1 bicycle_final/test11_0.JPG", "", line)
    if line.endswith("\udcff"):  # a name that is not UTF-8 is a name
        with pytest.raises(DataError, match=r"Ebay_test.txt names 1 of 2 images"):
            read("sop", tmp_path)
    else:
        refused("sop", tmp_path, f"{file}, line 4, must be a line of {EBAY}, got {line!r}")


@pytest.mark.parametrize(
    "line", ["img/a.jpg id_1 val", "img/a.jpg 1 train", "id_1 train", "img/a.jpg id_1"]
)
def test_a_line_of_inshop_that_is_none(tmp_path, line):
    file = inshop(tmp_path) / "list_eval_partition.txt"
    with file.open("a") as lines:
        lines.write(line)
    refused("inshop", tmp_path, f"{file}, line 13, must be a line of {PARTITION}, got {line!r}")


@pytest.mark.parametrize("line", ["real/lion/a.jpg", "7", "real/lion/a.jpg -1", "a.jpg 1.5"])
def test_a_line_of_domainnet_that_is_none(tmp_path, line):
    file = domainnet(tmp_path) / "DomainNet" / "sketch_test.txt"
    with file.open("a") as lines:
        lines.write(line)
    sentence = f"{file}, line 5, must be a line of path label, got {line!r}"
    refused("domainnet", tmp_path, sentence, source="real", target="sketch")


def test_a_list_without_its_head(tmp_path):
    file = sop(tmp_path) / "Stanford_Online_Products" / "Ebay_train.txt"
    _, first, *others = file.read_text().splitlines()
    write(file, first, *others)
    refused("sop", tmp_path, f"{file}, line 1, must be the head {EBAY}, got {first!r}")
    file = inshop(tmp_path) / "list_eval_partition.txt"
    _, head, first, *others = file.read_text().splitlines()
    write(file, head, first, *others)
    refused("inshop", tmp_path, f"{file}, line 2, must be the head {PARTITION}, got {first!r}")


def test_a_cub_class_without_its_number(tmp_path):
    images = cub(tmp_path) / "CUB_200_2011" / "images"
    (images / "200.Wren").rename(images / "Wren")
    refused(
        "cub",
        tmp_path,
        f"{images}/Wren must begin with the number of its class, as 001.Albatross does",
    )


def test_annotations_of_cars_that_are_none(tmp_path):
    file = cars(tmp_path) / "cars196" / "cars_annos.mat"
    sentence = (
        f"{file} must be a MATLAB file, older than 7.3, with class_names and with annotations that "
        "have relative_im_path and class"
    )
    whole = file.read_bytes()
    for size in (0, 1, 100, 127, 128, 150, 300, len(whole) // 2, len(whole) - 8):
        file.write_bytes(whole[:size])
        refused("cars", tmp_path, sentence)
    file.write_bytes(b"relative_im_path,class\n" * 100)
    refused("cars", tmp_path, sentence)
    file.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF" * 100)
    refused("cars", tmp_path, sentence)
    for content in (
        {},
        {"annotations": np.zeros(3), "class_names": np.zeros(3)},
        {"annotations": np.zeros((1, 2), dtype=[("fname", object)])},
    ):
        savemat(file, content)
        refused("cars", tmp_path, sentence)


def test_no_image_at_all(tmp_path):
    wanted = "must hold images of two classes or more for"
    images = tmp_path / "CUB_200_2011" / "images"
    images.mkdir(parents=True)
    refused("cub", tmp_path, f"{images} {wanted} train, got no image")
    put(images, "001.A/1.jpg", "002.B/1.jpg")
    (images / "101.C").mkdir()
    refused("cub", tmp_path, f"{images} {wanted} test, got no image")
    (tmp_path / "own").mkdir()
    refused(
        "folder",
        tmp_path / "own",
        f"{tmp_path}/own must hold images of four classes or more, a folder each, two to learn and "
        "two to retrieve, got no image",
    )


def test_one_class_alone(tmp_path):
    wanted = "must hold images of two classes or more for"
    images = tmp_path / "CUB_200_2011" / "images"
    put(images, "001.A/1.jpg", "001.A/2.jpg", "101.B/1.jpg")
    refused("cub", tmp_path, f"{images} {wanted} train, got A alone")
    put(images, "002.B/1.jpg")
    refused("cub", tmp_path, f"{images} {wanted} test, got B alone")
    own = tmp_path / "own"
    for part, classes in (("train", "ab"), ("query", "ab"), ("gallery", "a")):
        plain(own / part, classes)
    refused("folder", own, f"{own} {wanted} gallery, got a alone")


@pytest.mark.parametrize("classes, got", [("a", "1: a"), ("abc", "3: a, b, c")])
def test_too_few_classes_for_two_halves(tmp_path, classes, got):
    sentence = (
        f"{tmp_path} must hold images of four classes or more, a folder each, two to learn and two "
        f"to retrieve, got {got}"
    )
    refused("folder", plain(tmp_path, classes), sentence)


@pytest.mark.parametrize(
    "parts",
    [["train"], ["test"], ["query", "gallery"], ["train", "query"], ["train", "test", "query"]],
)
def test_parts_that_do_not_make_a_data_set(tmp_path, parts):
    for part in parts:
        plain(tmp_path / part)
    refused(
        "folder",
        tmp_path,
        f"{tmp_path} must hold train and test, or train, query and gallery, or classes alone, "
        f"got {' and '.join(parts)}",
    )


def test_names_and_domains_that_there_are_not(tmp_path):
    with pytest.raises(ValueError, match=r"^name must be one of 'cub', .*, 'domains', got 'cubs'$"):
        read("cubs", tmp_path)
    pacs(tmp_path)
    for options, got in (({}, "None"), ({"source": "art"}, "'art'")):
        with pytest.raises(
            ValueError, match=f"^source must be one of 'photo', 'sketch', got {got}$"
        ):
            read("domains", tmp_path, **options)
    for name in ("domains", "domainnet"):
        source = {"domains": "photo", "domainnet": "real"}[name]
        with pytest.raises(ValueError, match=r"^target must be one of .*'sketch', got 'art'$"):
            read(name, tmp_path, source=source, target="art")
    refused(
        "folder",
        tmp_path,
        "folder has no domains, source and target must be None, got 'photo' and None",
        source="photo",
    )
