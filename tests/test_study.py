"""The study: training data damaged on purpose, its runs, its tables, and the findings in docs/."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from conftest import ROOT
from scipy.stats import t as student_t
from scipy.stats import ttest_rel
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from idml_fast import Metric, cli
from idml_fast.evaluation import CORRUPTIONS
from idml_fast.train import runs
from idml_fast.train.config import DataConfig
from idml_fast.train.data import load_data
from idml_fast.train.reproduce import Row, load_recipe
from idml_fast.train.runs import path_of
from idml_fast.train.study import CONTESTANTS, MEASURES, NUMBERS, PREFIX, RIVALS, Study, study

# ------------------------------------------------------------------------------ damaged data


def changed(data, clean) -> np.ndarray:
    """Which training images differ."""
    return (data.train.tensors[0] != clean.train.tensors[0]).flatten(1).any(dim=1).numpy()


def at_severity(data, clean) -> torch.Tensor:  # [5, N]
    """Which training images are those of the other data, blurred at each severity."""
    # A convolution may round otherwise in another batch.
    blurred = [CORRUPTIONS["blur"](clean.train.tensors[0], severity) for severity in range(1, 6)]
    return ((torch.stack(blurred) - data.train.tensors[0]).abs() < 1e-5).flatten(2).all(dim=2)


@pytest.mark.parametrize("task", ["retrieval", "classification"])
def test_without_damage_the_data_is_that_of_the_data_set(task):
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    if task == "retrieval":
        train, test = np.flatnonzero(digits.target < 5), np.flatnonzero(digits.target >= 5)
    else:
        train, test = train_test_split(
            np.arange(len(images)), test_size=0.25, stratify=digits.target, random_state=7
        )
    data = load_data(DataConfig(task=task), seed=7)
    wanted = images[train], digits.target[train], images[test], digits.target[test]
    assert torch.equal(data.test_labels, data.test.tensors[1])
    for ours, theirs in zip((*data.train.tensors, *data.test.tensors), wanted, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("task", ["retrieval", "classification"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.4, 1.0])
def test_the_shares_are_exact_and_the_test_data_is_spared(task, share):
    clean = load_data(DataConfig(task=task), seed=1)
    wanted = round(share * len(clean.train.tensors[1]))
    for kind in ("label_noise", "blurred", "mixed"):
        data = load_data(DataConfig(task=task, **{kind: share}), seed=1)
        labels = (data.train.tensors[1] != clean.train.tensors[1]).sum()
        assert labels == (wanted if kind == "label_noise" else 0)
        assert changed(data, clean).sum() == (0 if kind == "label_noise" else wanted)
        assert torch.equal(data.test.tensors[0], clean.test.tensors[0])
        assert torch.equal(data.test_labels, clean.test_labels)


def test_a_wrong_label_is_any_other_class():
    config = DataConfig(label_noise=1.0, train_classes=[1, 4, 7], test_classes=[0, 2])
    clean = load_data(DataConfig(train_classes=[1, 4, 7], test_classes=[0, 2]))
    data = load_data(config)
    for label in range(3):
        count = data.train.tensors[1][clean.train.tensors[1] == label].bincount(minlength=3)
        assert count[label] == 0
        others = count[count > 0].double()
        assert len(others) == 2
        # Four deviations of a fair coin.
        assert abs(others[0] - others[1]) < 4 * count.sum() ** 0.5


def test_as_many_images_are_blurred_at_each_severity():
    clean, data = load_data(DataConfig()), load_data(DataConfig(blurred=0.3))
    blurred = changed(data, clean)
    counts = at_severity(data, clean)[:, blurred].sum(dim=1).tolist()
    assert sum(counts) == blurred.sum() == 270
    assert max(counts) - min(counts) <= 1


def test_a_mixed_image_is_the_mean_of_two_classes_under_the_label_of_the_first():
    clean, data = load_data(DataConfig(), 3), load_data(DataConfig(mixed=0.3), 3)
    assert torch.equal(data.train.tensors[1], clean.train.tensors[1])
    for i in np.flatnonzero(changed(data, clean)):
        # Grey levels are sixteenths: twice the mean is exact.
        other = 2 * data.train.tensors[0][i] - clean.train.tensors[0][i]
        same = (clean.train.tensors[0] == other).flatten(1).all(dim=1)
        assert same.any()
        assert (clean.train.tensors[1][same] != clean.train.tensors[1][i]).all()


def test_mixed_images_are_blurred_afterwards():
    mixed, both = load_data(DataConfig(mixed=1.0)), load_data(DataConfig(mixed=1.0, blurred=1.0))
    assert (at_severity(both, mixed).sum(dim=0) == 1).all()


def test_the_damage_is_that_of_the_seed_and_each_kind_has_its_own():
    config = DataConfig(label_noise=0.4, blurred=0.3, mixed=0.3)
    data, again, other = load_data(config, 0), load_data(config, 0), load_data(config, 1)
    for ours, same in ((data.train, again.train), (data.test, again.test)):
        assert all(map(torch.equal, ours.tensors, same.tensors))
    assert not torch.equal(data.train.tensors[1], other.train.tensors[1])
    assert not torch.equal(data.train.tensors[0], other.train.tensors[0])
    assert torch.equal(
        data.train.tensors[1], load_data(DataConfig(label_noise=0.4)).train.tensors[1]
    )
    clean = load_data(DataConfig())
    one = [changed(load_data(DataConfig(**{kind: 0.3})), clean) for kind in ("blurred", "mixed")]
    assert (changed(data, clean) == one[0] | one[1]).all()


# ---------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def tiny():
    """The recipe with one kind of damage and a very small network."""
    recipe = load_recipe("digits", PREFIX)
    model = {"width": 4, "sem_dim": 8, "unc_dim": 4}
    conditions = {"label_noise_20": recipe["conditions"]["label_noise_20"]}
    return {"common": recipe["common"] | {"model": model}, "conditions": conditions}


@pytest.fixture(scope="module")
def studied(tiny, tmp_path_factory):
    """A small study with two seeds, one epoch each, and where it was written."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("idml_fast.train.study.load_recipe", lambda *_: tiny)
        return study("digits", seeds=(0, 1), epochs=1, folder=folder), folder


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_runs(path: Path) -> Study:
    """The study whose runs were written there."""
    lines, results = lines_of(path), {}
    for line in lines:
        cells = {name: line.get(name) for name in NUMBERS}
        numbers = {name: float(cell) if cell else None for name, cell in cells.items()}
        results.setdefault((line["condition"], line["contestant"]), []).append(numbers)
    seeds = dict.fromkeys(int(line["seed"]) for line in lines)
    return Study(lines[0]["dataset"], tuple(seeds), results)


def test_who_is_trained_on_what(monkeypatch, tmp_path):
    seen = {}

    def run_one(config, metric, *_):
        key = config.name, config.metrics[metric]
        damage = config.data.label_noise, config.data.blurred, config.data.mixed
        assert key not in seen or seen[key] == damage
        seen[key] = damage
        assert (config.loss.name, config.optim.epochs) == ("proxy_anchor", 15)
        return {"recall_at_1": 0.5}

    monkeypatch.setattr(runs, "run_one", run_one)
    study("digits", seeds=(3, 4), folder=tmp_path)
    metrics = Metric.plain("cosine"), Metric.paper("cosine"), Metric.official()
    damages = {
        "clean": (0, 0, 0),
        "label_noise_20": (0.2, 0, 0),
        "label_noise_40": (0.4, 0, 0),
        "blurred_30": (0, 0.3, 0),
        "mixed_30": (0, 0, 0.3),
    }
    assert seen == {(name, x): damage for name, damage in damages.items() for x in metrics}


def test_every_run_is_written(studied):
    outcome, folder = studied
    lines = lines_of(folder / "study_runs.csv")
    assert len(lines) == 6
    for line in lines:
        key = line["condition"], line["contestant"]
        done = json.loads(path_of(folder, *key, int(line["seed"])).read_text())
        assert done["config"]["run"]["seed"] == int(line["seed"])
        assert done["config"]["data"]["label_noise"] == 0.2
        assert done["results"] == outcome.results[key][int(line["seed"])]
        for name in outcome.numbers:
            value = done["results"][name]
            assert line[name] == ("" if value is None else str(value))
        assert (line["unc_norm_mean"] == "") == (line["contestant"] == "conventional")
    assert {"recall_at_1", "map_at_r", "nmi", "spearman_blur"} < set(outcome.numbers)
    numbers = {tuple(line[name] for name in outcome.numbers) for line in lines}
    assert len(numbers) == 6  # no two networks are the same
    assert read_runs(folder / "study_runs.csv").to_csv() == outcome.to_csv()


def test_the_tables_are_written_and_shown(tiny, studied, monkeypatch, capsys):
    outcome, folder = studied
    monkeypatch.setattr("idml_fast.train.study.load_recipe", lambda *_: tiny)
    monkeypatch.setattr(runs, "run_one", lambda *_: pytest.fail("a run was trained again"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = f"reproduce --dataset digits --study --seeds 0 1 --epochs 1 --folder {folder}"
    assert cli.main(words.split()) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    text = (folder / "study.md").read_text("utf-8")
    assert text.startswith(outcome.to_markdown())
    assert f"torch {torch.__version__}" in text
    assert text in capsys.readouterr().out


KILLED = """
import os, signal, sys
from idml_fast.train import runs
done = []
def run_one(config, metric, *_):
    if len(done) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(metric)
    return {"recall_at_1": 0.25}
runs.run_one = run_one
from idml_fast.train.study import study
study("digits", seeds=(0, 1), folder=sys.argv[1])
"""


def test_after_a_kill_it_trains_what_is_left(monkeypatch, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    first = path_of(tmp_path, "clean", "conventional", 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [first]
    trained = []

    def run_one(config, metric, *_):
        trained.append((config.name, metric, config.run.seed))
        return {"recall_at_1": 0.75}

    monkeypatch.setattr(runs, "run_one", run_one)
    outcome = study("digits", seeds=(0, 1), folder=tmp_path)
    assert len(trained) == 5 * 3 * 2 - 1
    assert trained[0] == ("clean", "conventional", 1)
    assert outcome.values("recall_at_1", "clean", "conventional").tolist() == [0.25, 0.75]


def test_runs_of_another_configuration_are_refused(studied, tiny, monkeypatch):
    monkeypatch.setattr("idml_fast.train.study.load_recipe", lambda *_: tiny)
    with pytest.raises(FileExistsError, match=r"optim.epochs 1 there, 2 here.*another --folder"):
        study("digits", seeds=(0, 1), epochs=2, folder=studied[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cub"], "dataset must be one of digits, got cub"),
        (["--seeds", "1", "1"], "seeds must be different numbers >= 0, got [1, 1]"),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(capsys, tmp_path, arguments, message):
    folder = tmp_path / "none"
    given = ["reproduce", "--dataset", "digits", "--study", "--folder", str(folder), *arguments]
    assert cli.main(given) == 1
    assert capsys.readouterr().err == f"idml-fast: {message}\n"
    assert not folder.exists()


def test_a_study_has_no_losses_to_choose(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reproduce", "--dataset", "digits", "--study", "--losses", "nca"])
    assert "not allowed with argument --study" in capsys.readouterr().err


# --------------------------------------------------------------------------------- the tables


def made_up(**numbers: list[float | None]) -> Study:
    """A study of clean data; the lists hold a number of each contestant in turn, seed by seed."""
    count = len(next(iter(numbers.values()))) // len(CONTESTANTS)
    results = {
        ("clean", contestant): [
            {name: values[place * count + seed] for name, values in numbers.items()}
            for seed in range(count)
        ]
        for place, contestant in enumerate(CONTESTANTS)
    }
    return Study("digits", tuple(range(count)), results)


def test_the_table_by_hand():
    """Differences 0.1 and 0.2: t = 0.15 / 0.05 = 3 with one degree of freedom, whose interval is
    ± tan(0.475 pi) 0.05 and whose p is 1 - 2 atan(3) / pi; corrected it is the larger of two."""
    outcome = made_up(recall_at_1=[0.4, 0.5, 0.5, 0.7, 0.5, 0.3])
    head, cells = outcome.table("recall_at_1")
    compared = ["less conventional", "p (corrected)", "less released", "p (corrected)"]
    assert head[1:] == [*CONTESTANTS, *compared]
    assert math.tan(0.475 * math.pi) * 0.05 == pytest.approx(0.635, abs=5e-4)
    assert 1 - 2 * math.atan(3) / math.pi == pytest.approx(0.205, abs=5e-4)
    assert cells == [
        "clean",
        *("0.450 ± 0.071", "0.600 ± 0.141", "0.400 ± 0.141"),
        *("+0.150 ± 0.635", "0.2 (0.41)"),
        *("+0.200 ± 2.541", "0.5 (0.5)"),
    ]
    rows = [line for line in outcome.to_markdown().splitlines() if line.startswith("| clean")]
    assert rows == [f"| {' | '.join(cells)} |"]


def test_the_csv_by_hand(tmp_path):
    outcome = made_up(recall_at_1=[0.4, 0.5, 0.5, 0.7, 0.5, 0.3])
    (tmp_path / "study.csv").write_text(outcome.to_csv(), "utf-8")
    lines = lines_of(tmp_path / "study.csv")
    conventional, introspective, _ = lines  # what no run has is left out
    wanted = {"mean": 0.45, "std": 0.5**0.5 / 10, "difference": 0.15, "interval": 0.6353}
    wanted |= {"p": 0.20483, "p_corrected": 0.40967}
    assert {name: float(conventional[name]) for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert [introspective[name] for name in ("difference", "interval", "p")] == ["", "", ""]


def random_study() -> Study:
    draw = np.random.default_rng(0)
    results = {
        (condition, contestant): [{name: draw.random() for name in NUMBERS} for _ in range(5)]
        for condition in ("clean", "mixed_30")
        for contestant in CONTESTANTS
    }
    return Study("digits", tuple(range(5)), results)


def test_the_differences_are_those_of_the_paired_t_test():
    outcome = random_study()
    assert len(outcome.differences) == len(MEASURES) * 2 * len(RIVALS)
    for (name, condition, rival), difference in outcome.differences.items():
        ours, theirs = (outcome.values(name, condition, x) for x in ("introspective", rival))
        assert difference.p == pytest.approx(ttest_rel(ours, theirs).pvalue)
        error = (ours - theirs).std(ddof=1) / 5**0.5
        assert difference.mean == pytest.approx((ours - theirs).mean())
        assert difference.half == pytest.approx(student_t.ppf(0.975, 4) * error)
        results = {"conventional": [{name: x} for x in theirs]}
        results["introspective"] = [{name: x} for x in ours]
        row = Row("contrastive", "retrieval", results)
        assert (difference.mean, difference.half) == pytest.approx(row.difference(name))


def test_p_is_corrected_for_all_comparisons():
    """Benjamini and Hochberg: the least of ``p count / rank`` at this rank or a later one."""
    outcome = random_study()
    found = sorted(outcome.differences.values(), key=lambda difference: difference.p)
    scaled = [x.p * len(found) / rank for rank, x in enumerate(found, start=1)]
    for place, difference in enumerate(found):
        assert difference.corrected == pytest.approx(min(1, *scaled[place:], 1))


def test_the_verdict_counts_the_comparisons_and_names_those_that_stand():
    draw = np.random.default_rng(0)
    base = draw.random(6)
    nmi = [*base, *(base + 0.3 + 1e-3 * draw.random(6)), *draw.random(6)]
    outcome = made_up(recall_at_1=list(draw.random(18)), nmi=nmi)
    first, *others = outcome.verdicts()
    assert first.startswith("Of 4 comparisons 1 have an interval that leaves out zero; ")
    assert "1 stand the correction" in first
    (told,) = others
    assert told.startswith("NMI, clean: introspective less conventional +0.30")
    assert outcome.to_markdown().endswith(told)


def test_what_cannot_be_compared_is_not():
    nothing = [None, None]
    outcome = made_up(
        recall_at_1=[0.5, 0.6, 0.5, 0.6, 0.7, 0.8],  # by the same, but for their rounding
        spearman_blur=[*nothing, 0.1, 0.3, 0.4, None],
        nmi=[0.1, 0.2, 0.3, 0.5, 0.2, 0.1],
        unc_norm_mean=[*nothing, 0.1, 0.2, 0.3, 0.5],
    )
    assert {name for name, _, _ in outcome.differences} == {"nmi"}
    assert outcome.table("spearman_blur")[1] == ["clean", "", "0.200 ± 0.141", ""]
    assert outcome.table("unc_norm_mean")[1][-1] == "0.400 ± 0.141"
    assert outcome.verdicts()[0].startswith("Of 2 comparisons")


def test_one_seed_says_nothing():
    outcome = made_up(recall_at_1=[0.5, 0.6, 0.7])
    assert outcome.verdicts() == ["One seed cannot tell the metrics apart."]
    assert outcome.table("recall_at_1")[1] == ["clean", "0.500", "0.600", "0.700"]
    assert "of one seed" in outcome.note


# ------------------------------------------------------------------------------- the findings


def test_the_findings_are_those_of_their_runs():
    docs = ROOT / "docs"
    outcome = read_runs(docs / "findings_runs.csv")
    assert outcome.seeds == (0, 1, 2, 3, 4)
    assert set(outcome.conditions) == set(load_recipe("digits", PREFIX)["conditions"])
    _, tables = (docs / "findings.md").read_text("utf-8").split("## The tables\n\n")
    *ours, versions = tables.rstrip().split("\n\n")
    assert "\n\n".join(ours) == outcome.to_markdown()
    assert versions.startswith("idml_fast ")
    lines = lines_of(docs / "findings.csv")
    assert len(lines) == len(outcome.numbers) * len(outcome.results)
    for line in lines:
        key = line["number"], line["condition"], line["contestant"]
        shown = [line["mean"], line["std"], *(line[name] for name in ("difference", "interval"))]
        difference = outcome.differences.get(key)
        compared = (difference.mean, difference.half) if difference else (np.nan, np.nan)
        wanted = [*outcome.mean(*key), *compared]
        assert [float(x or "nan") for x in shown] == pytest.approx(wanted, nan_ok=True)
