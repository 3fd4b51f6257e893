"""The comparison of all losses: its runs, its numbers, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from idml_fast import cli
from idml_fast.train import runs
from idml_fast.train.criterion import LOSSES, TASKS
from idml_fast.train.outcome import JUDGED, QUALITIES
from idml_fast.train.reproduce import METRICS, TITLES, Comparison, Row, load_recipe, paper

# The package's attribute of that name is the function.
module = importlib.import_module("idml_fast.train.reproduce")

ROWS = ["contrastive", "softmax_mixup"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two losses, one epoch each, and where it was written."""
    folder = tmp_path_factory.mktemp("compared")
    return module.reproduce("digits", losses=ROWS, seeds=(0, 1), epochs=1, folder=folder), folder


def made_up(differences, task="retrieval", name="contrastive") -> Row:
    """A row whose introspective runs differ by this much from its conventional ones."""
    names = [*QUALITIES[task], "spearman_blur", "spearman_noise", "spearman_occlusion"]
    base = [0.5 + 0.1 * k for k in range(len(differences))]
    return Row(
        name,
        task,
        {
            "conventional": [dict.fromkeys(names, x) for x in base],
            "introspective": [
                dict.fromkeys(names, x + d) for x, d in zip(base, differences, strict=True)
            ],
        },
    )


def test_the_recipe_has_every_loss_and_every_row_of_the_paper():
    rows = load_recipe("digits")["rows"]
    assert {values["loss"]["name"] for values in rows.values()} == set(LOSSES)
    assert set(rows) == set(TITLES)
    assert set(TASKS["retrieval"]) < set(rows)
    assert {name for name, _, _ in paper()} <= set(rows)
    configs = module.configurations("digits", None, [3], None, Path("somewhere"))
    assert {config.run.seed for config in configs.values()} == {3}
    mixes = {name: config.mix for (name, _), config in configs.items() if config.mix != "none"}
    assert mixes == {"softmax_mixup": "mixup", "softmax_cutmix": "cutmix"}


def test_every_run_is_written(compared):
    comparison, folder = compared
    for row in comparison.rows:
        for metric in METRICS:
            for seed, result in zip((0, 1), row.results[metric], strict=True):
                done = json.loads((folder / row.name / f"{metric}-{seed}.json").read_text())
                assert done["results"] == result
                assert done["config"]["run"]["seed"] == seed
                assert (result["spearman_blur"] is None) == (metric == "conventional")
    assert [row.name for row in comparison.rows] == ROWS


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_of_the_runs_has_every_number(compared):
    comparison, folder = compared
    lines = lines_of(folder / "runs.csv")
    keys = [(x["loss"], x["metric"], x["seed"]) for x in lines]
    assert keys == [(name, metric, seed) for name in ROWS for metric in METRICS for seed in "01"]
    for line in lines:
        row = next(row for row in comparison.rows if row.name == line["loss"])
        result = row.results[line["metric"]][int(line["seed"])]
        for name in QUALITIES[row.task]:
            assert float(line[name]) == result[name]


def test_the_csv_has_means_deviations_differences_and_the_papers_numbers(compared):
    comparison, folder = compared
    lines = lines_of(folder / "reproduce.csv")
    assert [(x["loss"], x["metric"]) for x in lines] == [(n, m) for n in ROWS for m in METRICS]
    for line in lines:
        row = next(row for row in comparison.rows if row.name == line["loss"])
        for name in QUALITIES[row.task]:
            values = row.values(line["metric"], name)
            assert float(line[f"{name}_mean"]) == pytest.approx(values.mean())
            assert float(line[f"{name}_std"]) == pytest.approx(values.std(ddof=1))
        for name in JUDGED[row.task]:
            told = [line[f"{name}_difference"], line[f"{name}_interval"]]
            if line["metric"] == "conventional":
                assert told == ["", ""]
            else:
                assert [float(x) for x in told] == pytest.approx(row.difference(name))
        assert (line["spearman_blur_mean"] == "") == (line["metric"] == "conventional")
        other = "recall_at_1_mean" if row.task == "classification" else "top_1_mean"
        assert line[other] == ""
    assert [x["paper_CUB"] for x in lines] == ["0.656", "0.672", "", ""]
    assert [x["paper_ImageNet"] for x in lines][2:] == ["0.7742", "0.7795"]


def test_the_text_shows_means_deviations_and_the_papers_numbers(compared):
    comparison, folder = compared
    text = (folder / "reproduce.txt").read_text("utf-8")
    assert text == comparison.to_text() + "\n"
    row = comparison.rows[0]
    values = row.values("introspective", "map_at_r")
    wanted = f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1):.1f}"
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "65.6" in lines["Contrastive"]  # the paper's, on CUB
    assert "77.42" in lines["Softmax, Mixup"]  # on ImageNet
    assert wanted in text
    assert len(comparison.verdicts()) == 3


def test_the_report_holds_the_tables_and_asks_for_nothing(compared):
    comparison, folder = compared
    page = (folder / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for task in TASKS:
        for row in comparison.table(task):
            for cell in row:
                assert cell.replace("'", "&#39;") in page
    for sentence in comparison.verdicts():
        assert sentence in page


def test_a_second_call_trains_nothing(compared, monkeypatch):
    comparison, folder = compared
    monkeypatch.setattr(runs, "run_one", lambda *_: pytest.fail("a run was trained again"))
    again = module.reproduce("digits", losses=ROWS, seeds=(0, 1), epochs=1, folder=folder)
    assert again.to_csv() == comparison.to_csv()
    assert again.to_text() == comparison.to_text()


def test_it_goes_on_where_it_stopped(compared, monkeypatch, tmp_path):
    """Stopped in the third of four runs, it trains that one and the last."""
    trained = []

    def run_one(config, metric, *_):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((metric, config.run.seed))
        return {"recall_at_1": 0.5}

    options = {"losses": ["contrastive"], "seeds": (0, 1), "epochs": 1, "folder": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "run_one", run_one)
        with pytest.raises(KeyboardInterrupt):
            module.reproduce("digits", **options)
    done = {path.stem: path.read_bytes() for path in (tmp_path / "contrastive").iterdir()}
    assert sorted(done) == sorted(f"{metric}-{seed}" for metric, seed in trained)
    assert not list(tmp_path.glob("**/.*"))
    for metric, seed in [(m, s) for s in (0, 1) for m in METRICS if (m, s) not in trained]:
        results = compared[0].rows[0].results[metric][seed]
        config = module.configurations("digits", ["contrastive"], [seed], 1, tmp_path)[
            "contrastive", seed
        ]
        again = runs.run_one(config, metric, f"{metric}-{seed}")
        assert again == pytest.approx(results, nan_ok=True)  # the same seed, the same run


def test_a_run_of_another_configuration_is_refused(compared):
    _, folder = compared
    with pytest.raises(FileExistsError, match=r"optim.epochs 1 there, 2 here.*another --folder"):
        module.reproduce("digits", losses=ROWS, seeds=(0, 1), epochs=2, folder=folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": 1}'])
def test_a_file_that_is_no_run_is_refused(tmp_path, text):
    path = tmp_path / "contrastive" / "conventional-0.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(FileExistsError, match="is no result of a run"):
        module.reproduce("digits", losses=["contrastive"], seeds=(0,), folder=tmp_path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "mnist"],
            "dataset must be digits alone, or different ones of cub, cars, sop, got mnist",
        ),
        (["--losses", "arcface"], "losses must be different ones of proxy_anchor, proxy_nca"),
        (["--losses", "nca", "nca"], "got ['nca', 'nca']"),
        (["--seeds", "1", "1"], "seeds must be different numbers >= 0, got [1, 1]"),
        (["--seeds", "-1"], "seeds must be different numbers >= 0, got [-1]"),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(capsys, tmp_path, arguments, message):
    given = ["reproduce", "--dataset", "digits", "--folder", str(tmp_path / "none"), *arguments]
    assert cli.main(given) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_the_command_hands_its_arguments_on(monkeypatch):
    given = {}

    def reproduce(dataset, **options):
        given.update(options, dataset=dataset)

    monkeypatch.setattr(module, "reproduce", reproduce)
    words = "reproduce --dataset digits --losses nca supcon --seeds 4 5 --epochs 3 --folder there"
    assert cli.main(words.split()) == 0
    assert given == {
        "dataset": "digits",
        "losses": ["nca", "supcon"],
        "seeds": [4, 5],
        "epochs": 3,
        "folder": "there",
        "settings": [],
    }


def test_the_interval_is_that_of_a_paired_t_test():
    row = made_up([0.01, 0.03, -0.02, 0.05])
    middle, half = row.difference("recall_at_1")
    theirs = ttest_rel(
        row.values("introspective", "recall_at_1"), row.values("conventional", "recall_at_1")
    ).confidence_interval(0.95)
    assert (middle - half, middle + half) == pytest.approx((theirs.low, theirs.high))


def test_mean_and_deviation():
    middle, spread = made_up([0.0, 0.0, 0.0]).mean("conventional", "nmi")
    assert (middle, spread) == pytest.approx((0.6, 0.1))
    assert math.isnan(made_up([0.0]).mean("conventional", "nmi")[1])


@pytest.mark.parametrize(
    ("differences", "told"),
    [
        ([0.02, 0.021, 0.019], "higher with the introspective metric for Contrastive."),
        ([-0.02, -0.021, -0.019], "lower with the introspective metric for Contrastive."),
        ([0.02, -0.01, 0.005], "no difference beyond the spread of the seeds for Contrastive."),
    ],
)
def test_the_verdict_follows_the_interval(differences, told):
    seeds = tuple(range(len(differences)))
    verdicts = Comparison("digits", seeds, [made_up(differences)], []).verdicts()
    assert verdicts == [
        f"Retrieval, {QUALITIES['retrieval'][x]}: {told}" for x in JUDGED["retrieval"]
    ]


def test_one_seed_says_nothing():
    comparison = Comparison("digits", (0,), [made_up([0.3])], [])
    assert comparison.verdicts() == ["One seed cannot tell the metrics apart."]
    assert comparison.note.startswith("In percent: of one seed;")


def test_verdicts_name_the_losses_apart():
    rows = [made_up([0.02, 0.021, 0.019], name="nca"), made_up([0.02, -0.01, 0.005], name="margin")]
    assert Comparison("digits", (0, 1, 2), rows, []).verdicts()[0] == (
        "Retrieval, R@1: higher with the introspective metric for NCA. "
        "No difference beyond the spread of the seeds for Margin, distance-weighted."
    )


def test_what_is_missing_is_not_invented():
    """One seed has no deviation, and a constant uncertainty no rank correlation."""
    row = made_up([0.1])
    row.results["introspective"][0]["spearman_blur"] = None
    head, _, introspective = Comparison("digits", (0,), [row], []).table("retrieval")
    cells = dict(zip(head, introspective, strict=True))
    assert cells["R@1"] == "60.0"
    assert cells["Δ R@1"] == "+10.0"
    assert cells["ρ blur"] == "undefined"
    assert np.isnan(row.values("introspective", "spearman_blur")).all()
