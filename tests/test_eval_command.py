"""Embeddings from files: what `idml-fast eval` says of them, and which files it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the extra idml_fast[train] is not installed")

from safetensors.torch import save_file
from test_cli import WITHOUT_EXTRA, python

from idml_fast import Metric, cli
from idml_fast.evaluation import clustering, files, retrieval, uncertainty_table
from idml_fast.evaluation.files import FileError, numbered, read_items
from idml_fast.train import Config, load, run
from idml_fast.train import evaluate as command
from idml_fast.train.config import ModelConfig, OptimConfig, RunConfig
from idml_fast.train.data import load_data

ITEMS, CLASSES = 60, 5


@pytest.fixture
def there(tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    """Embeddings in a folder of their own, as ``.npy`` files; the last item is alone in its class.

    The file ``<name>.npy`` has the array of that name; ``gallery.npz`` three of them.
    """
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    labels = np.arange(ITEMS) % CLASSES
    labels[-1] = 99
    centres = draw.normal(size=(100, 6))
    arrays = {
        "sem": (centres[labels] + draw.normal(size=(ITEMS, 6))).astype(np.float32),
        "unc": draw.normal(size=(ITEMS, 3)).astype(np.float32),
        "labels": labels,
    }
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    np.savez("gallery.npz", **{name: array[:40] for name, array in arrays.items()})
    return arrays


def told(*arguments: str, status: int = 0) -> dict:
    """The numbers that the command writes."""
    assert cli.main(["eval", *arguments, "--json", "told.json"]) == status
    return json.loads(Path("told.json").read_text())


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The sentence with which the command refuses."""
    assert cli.main(["eval", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("idml-fast: ")
    assert err.count("\n") == 1
    return err.removeprefix("idml-fast: ").rstrip("\n")


def test_the_numbers_are_those_of_the_functions(there):
    sem, unc, labels = (torch.from_numpy(there[name]) for name in ("sem", "unc", "labels"))
    found = told("sem.npy", "unc.npy", "--labels", "labels.npy", "--ks", "1", "3", "--seed", "2")
    assert found["retrieval"] == retrieval(sem, labels, ks=(1, 3)).values
    assert found["clustering"] == clustering(sem, labels, seed=2)
    table = uncertainty_table({"unc": unc}, sem, labels, seed=2)
    assert found["uncertainty"]["right"]["value"] == table.right.value
    assert found["uncertainty"]["aurc"]["high"] == table.rows["unc"]["aurc"].high
    assert found["uncertainty"]["ece_without_unc"]["value"] == table.distance["ece"].value
    assert found["unmatched"] == {"rows": [ITEMS - 1], "classes": [99]}
    assert found["queries"] == {
        "files": {"sem": "sem.npy", "unc": "unc.npy", "labels": "labels.npy"},
        "items": ITEMS,
        "classes": CLASSES + 1,
        "sem": 6,
        "unc": 3,
    }
    assert found["gallery"] is None
    assert found["metric"] == {"name": "plain"}


def test_a_gallery_and_the_introspective_metric(there):
    sem, unc, labels = (torch.from_numpy(there[name]) for name in ("sem", "unc", "labels"))
    arguments = ["sem.npy", "unc.npy", "--labels", "labels.npy", "--gallery", "gallery.npz"]
    arguments += ["--no-clustering", "--metric", "introspective", "--tau", "0.5", "--gamma", "0.25"]
    found = told(*arguments, "--form", "cosine")
    metric = Metric(0.5, 0.25, "cosine")
    wanted = retrieval(sem, labels, sem[:40], labels[:40], unc=unc, unc2=unc[:40], metric=metric)
    assert found["retrieval"] == wanted.values
    assert found["retrieval"] != retrieval(sem, labels, sem[:40], labels[:40]).values
    assert found["metric"] == {
        "name": "introspective",
        "tau": 0.5,
        "gamma": 0.25,
        "form": "cosine",
    }
    assert "clustering" not in found
    assert found["gallery"]["items"] == 40
    assert found["unmatched"] == {"rows": [ITEMS - 1], "classes": [99]}
    given = ["--gallery", "sem.npy", "unc.npy", "--gallery-labels", "labels.npy"]
    assert told(*arguments[:4], *given)["unmatched"]["rows"] == []


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_one_file_with_all_arrays(there, kind):
    wanted = told("sem.npy", "unc.npy", "--labels", "labels.npy")
    if kind == "npz":
        np.savez_compressed("all.npz", **there)
    else:
        save_file({name: torch.from_numpy(x) for name, x in there.items()}, "all.safetensors")
    found = told(f"all.{kind}")
    for section in ("retrieval", "clustering", "uncertainty", "unmatched"):
        assert found[section] == wanted[section]
    np.save("other.npy", there["labels"] % 2)
    assert told(f"all.{kind}", "--labels", "other.npy")["queries"]["classes"] == 2


def test_uncertainties_need_not_be_there(there):
    np.savez("some.npz", sem=there["sem"], labels=there["labels"])
    for arguments in (["some.npz"], ["sem.npy", "--labels", "labels.npy"]):
        found = told(*arguments)
        assert "uncertainty" not in found
        assert found["queries"]["unc"] is None
    one = {name: array[:1] for name, array in there.items()}
    np.savez("one.npz", **one)  # one query makes no calibration
    assert "uncertainty" not in told("one.npz", "--gallery", "gallery.npz", "--no-clustering")


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: labels.astype(np.uint8),
        lambda labels: labels.astype(np.uint64) + np.uint64(2**64 - 100),
        lambda labels: -labels.astype(np.int16),
        lambda labels: np.array([f"class {label}" for label in labels]),
    ],
    ids=["uint8", "uint64", "int16", "strings"],
)
def test_labels_of_any_kind(there, change):
    wanted = told("sem.npy", "--labels", "labels.npy", "--no-clustering")
    labels = change(there["labels"])
    np.save("labels.npy", labels)
    found = told("sem.npy", "--labels", "labels.npy", "--no-clustering")
    assert found["retrieval"] == wanted["retrieval"]
    assert found["unmatched"]["classes"] == [labels[-1].item()]


def test_classes_are_numbered_together():
    small, large = np.array([5, -1], dtype=np.int8), np.array([2**64 - 1, 5], dtype=np.uint64)
    classes, (first, second) = numbered(small, large)
    assert classes == [-1, 5, 2**64 - 1]
    assert first.tolist() == [1, 0]
    assert second.tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_embeddings_of_other_dtypes(there, dtype):
    arrays = {name: torch.from_numpy(array) for name, array in there.items()}
    rounded = {name: arrays[name].to(dtype) for name in ("sem", "unc")}
    save_file({**arrays, **rounded}, "all.safetensors")
    found = told("all.safetensors", "--metric", "introspective")
    metric = Metric()
    wanted = retrieval(rounded["sem"], arrays["labels"], unc=rounded["unc"], metric=metric)
    assert found["retrieval"] == wanted.values


def test_a_npy_file_is_mapped_not_read(there):
    assert isinstance(files._read(Path("sem.npy"), "sem"), np.memmap)
    items = read_items([Path("sem.npy"), Path("unc.npy")], Path("labels.npy"))
    assert np.array_equal(items.sem.numpy(), there["sem"])
    # What is done to the embeddings is not done to the file.
    items.sem.zero_()
    assert np.array_equal(np.load("sem.npy"), there["sem"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("runs")
    small = ModelConfig(width=4, sem_dim=8, unc_dim=4)
    run(
        Config(
            name="a", model=small, optim=OptimConfig(epochs=1), run=RunConfig(folder=str(folder))
        )
    )
    return folder / "a"


def test_a_network_embeds_the_test_images_of_its_run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = told(str(trained / "introspective.safetensors"), "--ks", "1", "--no-clustering")
    results = json.loads((trained / "results.json").read_text())
    assert found["retrieval"]["recall_at_1"] == results["introspective"]["recall_at_1"]
    assert found["queries"]["classes"] == 5
    assert found["queries"]["unc"] == 4
    conventional = told(str(trained / "conventional.safetensors"), "--no-clustering")
    assert "uncertainty" not in conventional  # nothing has taught it


def test_a_network_is_judged_by_the_metric_it_learned(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = trained / "introspective.safetensors"
    arguments = [str(path), "--metric", "introspective", "--no-clustering"]
    model, metric = load(path)
    data = load_data(Config().data)
    with torch.no_grad():
        sem, unc = model(data.test.tensors[0])
    found = told(*arguments)
    assert found["metric"]["form"] == metric.form == "cosine"
    wanted = retrieval(sem, data.test_labels, unc=unc, metric=metric).values
    assert found["retrieval"] == pytest.approx(wanted, abs=1e-3)
    assert told(*arguments, "--tau", "1")["metric"]["tau"] == 1


def test_networks_that_are_refused(trained, there, capsys, tmp_path):
    path = trained / "conventional.safetensors"
    sentence = refusal(capsys, str(path), "--metric", "introspective")
    assert sentence.endswith(f"needs uncertainties, but {path} comes without any")
    assert "brings its own test images" in refusal(capsys, str(path), "--labels", "labels.npy")
    alone = tmp_path / "introspective.safetensors"
    alone.write_bytes(path.read_bytes())
    assert refusal(capsys, str(alone)) == f"{tmp_path} is no run: it has no config.yaml"
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    save_file({"a": torch.ones(1)}, alone, {"idml_fast": '{"model": {"config": {"depth": 3}}}'})
    assert "is a network of another version of idml_fast" in refusal(capsys, str(alone))


def test_the_table(there, capsys):
    assert cli.main(["eval", "sem.npy", "unc.npy", "--labels", "labels.npy"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bar where there is no terminal
    lines = out.splitlines()
    assert lines[0] == "60 queries of 6 classes among themselves; sem 6 wide, unc 3 wide"
    assert lines[1] == "nearest by the plain metric"
    shown = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines if "  " in line}
    values = retrieval(*(torch.from_numpy(there[name]) for name in ("sem", "labels"))).values
    assert shown["Recall@1"] == f"{100 * values['recall_at_1']:.2f} %"
    assert shown["mAP"] == f"{100 * values['map']:.2f} %"
    assert {"Precision@8", "MRR", "MAP@R", "NMI", "AMI", "F1", "R-AUROC", "AURC"} <= shown.keys()
    assert lines[-3:] == [
        "Left out, alone in their class: 1 of 60 queries",
        "  rows 59",
        "  classes 99",
    ]


def test_only_the_first_few_without_a_match_are_named(there, capsys):
    labels = np.array(["a", "b"] * 20 + [f"\x1b[31m{place}" for place in range(20)])
    np.save("labels.npy", labels)
    np.savez("gallery.npz", sem=there["sem"][:2], labels=labels[:2])
    arguments = ["sem.npy", "--labels", "labels.npy", "--gallery", "gallery.npz"]
    assert cli.main(["eval", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "60 queries of 22 classes in a gallery of 2; sem 6 wide"
    assert lines[-3] == "Left out, without a match in the gallery: 20 of 60 queries"
    assert lines[-2] == "  rows 40, 41, 42, 43, 44 and 15 more"
    assert lines[-1].startswith(r"  classes '\x1b[31m0', '\x1b[31m1'")  # nothing for a terminal
    assert told(*arguments)["unmatched"]["rows"] == list(range(40, 60))


def test_bars_on_a_terminal(there, monkeypatch):
    asked = []

    def spy(function):
        def call(*arguments, progress, **options):
            asked.append(progress)
            return function(*arguments, **options)

        return call

    for name in ("retrieval", "clustering"):
        monkeypatch.setattr(command, name, spy(getattr(command, name)))
    told("sem.npy", "--labels", "labels.npy")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    told("sem.npy", "--labels", "labels.npy")
    assert asked == [False, False, True, True]


def test_what_was_written_stays_until_its_successor_is_whole(there, capsys, monkeypatch):
    before = told("sem.npy", "--labels", "labels.npy")

    def write_half(path, text, *_):
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", write_half)
    assert cli.main(["eval", "sem.npy", "--labels", "labels.npy", "--json", "told.json"]) == 1
    assert capsys.readouterr().err == "idml-fast: disk full\n"
    assert json.loads(Path("told.json").read_text()) == before
    assert not [path for path in Path().iterdir() if "partial" in path.name]


ARGUMENTS = ["sem.npy", "unc.npy", "--labels", "labels.npy"]
INTROSPECTIVE = ["--metric", "introspective"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["nowhere.npy"],
            "nowhere.npy holds one array alone: a file with the labels must be given",
        ),
        (
            ["nowhere.npy", "--labels", "labels.npy"],
            "nowhere.npy cannot be read: No such file or directory",
        ),
        (["nowhere.npz"], "nowhere.npz cannot be read: No such file or directory"),
        (["nowhere.safetensors"], "nowhere.safetensors cannot be read: No such file or directory"),
        (["words.txt"], "words.txt must be a .npy, .npz or .safetensors file"),
        (["."], ". must be a .npy, .npz or .safetensors file"),
        ([*ARGUMENTS, "--gallery", "words.txt"], "words.txt must be a .npy, .npz or .safeten"),
        (["a.npy", "b.npy", "c.npy"], "embeddings must be one file or two, sem and unc, got 3"),
        (["labels.npz"], "labels.npz must hold an array that is called sem, got none"),
        (["sem.npz"], "sem.npz must hold an array that is called labels, got none"),
        (
            ["gallery.npz", "labels.npz"],
            "labels.npz must hold an array that is called unc, got none",
        ),
        ([*ARGUMENTS, "--gallery-labels", "labels.npy"], "gallery_labels must go with gallery"),
        ([*ARGUMENTS, "--gallery", "sem.npy"], "sem.npy holds one array alone: a file with"),
        ([*ARGUMENTS, "--ks", "1", "0"], "ks must be >= 1, got 0"),
        ([*ARGUMENTS, "--seed", "-1"], "seed must be in [0, 2**31), got -1"),
        ([*ARGUMENTS, "--tau", "2"], "tau is only for --metric introspective"),
        ([*ARGUMENTS, *INTROSPECTIVE, "--tau", "0"], "tau must be > 0, got 0.0"),
        ([*ARGUMENTS, *INTROSPECTIVE, "--form", "angle"], "form must be one of 'distance', 'cos"),
        (
            ["sem.npy", "--labels", "labels.npy", *INTROSPECTIVE],
            "the introspective metric needs uncertainties, but sem.npy comes without any",
        ),
        (
            [*ARGUMENTS, "--json", "nowhere/a.json"],
            "json must be a file in a folder that is there, got nowhere/a.json",
        ),
        ([*ARGUMENTS, "--json", "."], "json must be a file in a folder that is there, got ."),
    ],
)
def test_arguments_that_do_not_fit(there, capsys, arguments, sentence):
    Path("words.txt").write_text("words")
    for name in ("sem", "labels"):
        np.savez(f"{name}.npz", **{name: there[name]})
    assert refusal(capsys, *arguments).startswith(sentence)


def nan_in(row: int):
    def change(array):
        array[row:, 1] = (np.nan, np.inf)[row % 2]
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("sem", nan_in(16), "sem of sem.npy must be finite, got nan in row 16"),
        ("unc", nan_in(17), "unc of unc.npy must be finite, got inf in row 17"),
        ("sem", lambda x: x[0], "sem of sem.npy must have shape [items, width], neither of them 0"),
        ("sem", lambda x: x[:0], "sem of sem.npy must have shape [items, width], neither of them"),
        ("sem", lambda x: x[:, :0], "sem of sem.npy must have shape [items, width], neither of"),
        (
            "sem",
            lambda x: x.astype(int),
            "sem of sem.npy must be one of float32, float64, bfloat16",
        ),
        ("sem", lambda x: x.astype(complex), "sem of sem.npy must be one of float32, float64, bfl"),
        ("sem", lambda x: x.astype(">f4"), "sem of sem.npy must be of a dtype that PyTorch has"),
        ("unc", lambda x: x[1:], "unc of unc.npy must have 60 rows like sem of sem.npy, got 59"),
        (
            "unc",
            lambda x: x.astype(float),
            "unc of unc.npy must be float32 like sem of sem.npy, go",
        ),
        (
            "labels",
            lambda x: x[1:],
            "labels of labels.npy must have shape [60] like sem of sem.npy",
        ),
        (
            "labels",
            lambda x: x[:, None],
            "labels of labels.npy must have shape [60] like sem of se",
        ),
        (
            "labels",
            lambda x: x / 2,
            "labels of labels.npy must be integers or strings, got float64",
        ),
        ("labels", lambda x: x > 2, "labels of labels.npy must be integers or strings, got bool"),
        (
            "labels",
            lambda x: np.arange(len(x)),
            "no query has a match: in labels of labels.npy every class has one member",
        ),
    ],
)
def test_arrays_that_do_not_fit(there, capsys, monkeypatch, name, change, sentence):
    monkeypatch.setattr(files, "BLOCK", 240)  # ten rows of sem, so that rows are counted on
    np.save(f"{name}.npy", change(there[name]))
    assert refusal(capsys, *ARGUMENTS).startswith(sentence)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("sem", lambda x: x[:, 1:], "sem of gallery.npz must be 6 wide like sem of sem.npy, got 5"),
        ("unc", lambda x: x[:, 1:], "unc of gallery.npz must be 3 wide like unc of unc.npy, got 2"),
        (
            "sem",
            lambda x: x.astype(np.float16),
            "unc of gallery.npz must be float16 like sem of gallery.npz, got float32",
        ),
        (
            "labels",
            lambda x: x.astype(str),
            "labels of gallery.npz must be integers like labels of labels.npy, got strings",
        ),
        (
            "labels",
            lambda x: x + 100,
            "no query has a match: labels of labels.npy and labels of gallery.npz have no class",
        ),
    ],
)
def test_galleries_that_do_not_fit(there, capsys, name, change, sentence):
    np.savez("gallery.npz", **{**there, name: change(there[name])})
    assert refusal(capsys, *ARGUMENTS, "--gallery", "gallery.npz").startswith(sentence)
    doubles = {name: there[name].astype(float) for name in ("sem", "unc")}
    np.savez("gallery.npz", **doubles, labels=there["labels"])
    sentence = refusal(capsys, *ARGUMENTS, "--gallery", "gallery.npz")
    assert sentence == "sem of gallery.npz must be float32 like sem of sem.npy, got float64"


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(there, suffix):
    path = Path(f"cut{suffix}")
    if suffix == ".npy":
        np.save(path, there["sem"])
    elif suffix == ".npz":
        np.savez_compressed(path, **there)
    else:
        save_file({name: torch.from_numpy(array) for name, array in there.items()}, path)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 37), *range(140), len(whole) - 1}:
        path.unlink()
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=rf"^cut\{suffix} is no whole \{suffix} file: .+"):
            read_items([path], Path("labels.npy"))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_a_file_of_another_kind_is_refused(there, suffix):
    for other in ("sem.npy", "gallery.npz"):
        if not other.endswith(suffix):
            path = Path(f"other{suffix}")
            path.write_bytes(Path(other).read_bytes())
            with pytest.raises(FileError, match=rf"^other\{suffix} is no whole \{suffix} file: "):
                read_items([path], Path("labels.npy"))


class Planted:
    """What a file might hold that does something when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("planted"),)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_nothing_is_unpickled(there, suffix):
    planted = np.array([Planted(), Planted()], dtype=object)
    path = Path(f"bad{suffix}")
    if suffix == ".npy":
        np.save(path, planted, allow_pickle=True)
    else:
        np.savez(path, sem=planted, labels=there["labels"])
    with pytest.raises(FileError, match=rf"^bad\{suffix} is no whole \{suffix} file: .*bject"):
        read_items([path], Path("labels.npy"))
    assert not Path("planted").exists()
    np.load(path, allow_pickle=True)["sem" if suffix == ".npz" else ...]
    assert Path("planted").exists()  # it would have been


def test_usage_names_the_shapes_of_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: idml-fast eval SEM [UNC] --labels LABELS [--gallery SEM2 ")
    assert "idml-fast eval FILE [--gallery FILE2] [OPTION ...]" in shown


@pytest.mark.parametrize("command", ["eval", "report"])
def test_without_the_extra_it_says_one_sentence(command):
    done = python(WITHOUT_EXTRA, command, "a.npz")
    assert done.returncode == 1
    assert done.stderr.startswith(f"idml-fast: idml-fast {command} needs ")
    assert done.stderr.endswith(": pip install 'idml_fast[train]'\n")


def test_undefined_numbers_are_said(there, capsys):
    eye = np.eye(4, dtype=np.float32).repeat(3, axis=0)
    np.savez("clear.npz", sem=eye, unc=eye, labels=np.arange(4).repeat(3))
    found = told("clear.npz")
    assert found["uncertainty"]["error_auroc"]["value"] is None  # nothing is wrong
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("R-AUROC")]
    assert line.split() == ["R-AUROC", "undefined"]
    assert not math.isnan(found["uncertainty"]["right"]["value"])
