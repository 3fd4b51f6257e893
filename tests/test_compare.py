"""Runs side by side: what the page says of them, and which folders it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="the extra idml_fast[train] is not installed")

from test_report import Page

from idml_fast import cli
from idml_fast.train import Config, run
from idml_fast.train.compare import METRICS, Run, compare, differences, read_run, table
from idml_fast.train.config import DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from idml_fast.train.folder import RunError

EPOCHS = 3


def written(folder: Path, recall: float = 0.5, name: str | None = None, **settings: object) -> Path:
    """A finished run with made-up numbers."""
    config = Config(name=name or folder.name, optim=OptimConfig(epochs=EPOCHS), **settings)
    quality = "recall_at_1" if config.data.task == "retrieval" else "top_1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    results = {
        "conventional": {quality: recall, "spearman_blur": None},
        "introspective": {quality: recall + 0.1, "spearman_blur": 0.25},
    }
    (folder / "results.json").write_text(json.dumps(results))
    lines = [
        {"metric": metric, "epoch": epoch, "loss": 1 / epoch, quality: recall}
        for metric in METRICS
        for epoch in range(1, EPOCHS + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def page_of(*folders: Path) -> Page:
    return Page(compare(folders, folders[0].parent / "page.html").read_text("utf-8"))


def test_a_run_is_read_as_it_was_trained(tmp_path):
    small = ModelConfig(width=4, sem_dim=8, unc_dim=4)
    config = Config(
        name="a", model=small, optim=OptimConfig(epochs=1), run=RunConfig(folder=str(tmp_path))
    )
    results = run(config)
    found = read_run(tmp_path / "a")
    assert found.config == config
    assert found.results == results
    assert [len(found.epochs[metric]) for metric in METRICS] == [1, 1]
    assert compare([tmp_path / "a"]) == tmp_path / "comparison.html"


def test_the_table_has_every_number_of_every_run():
    results = [
        {
            "conventional": {"recall_at_1": 0.5, "spearman_blur": None, "new_number": 2.0},
            "introspective": {"recall_at_1": 0.75, "spearman_blur": 0.25},
        },
        {"conventional": {"top_1": 0.875}, "introspective": {"top_1": 1.0}},
    ]
    runs = [Run(Path(), Config(), result, {}) for result in results]
    assert table(runs) == {
        "Classification": [["Top-1", "–", "–", "87.5 %", "100.0 %"]],
        "Retrieval": [["Recall@1", "50.0 %", "75.0 %", "–", "–"]],
        "Uncertainty": [["Spearman with blur", "–", "+0.25", "–", "–"]],
        "Other": [["new_number", "2", "–", "–", "–"]],
    }


def test_only_what_differs_is_listed():
    first = Config(name="a", run=RunConfig(folder="here"))
    second = Config(
        name="b",
        run=RunConfig(folder="there", seed=3),
        loss=LossConfig(options={"alpha": 16}),
        data=replace(first.data, test_classes=[5, 6]),
    )
    runs = [Run(Path(), config, {}, {}) for config in (first, second, first)]
    assert differences(runs) == [
        ["data.test_classes", "[5, 6, 7, 8, 9]", "[5, 6]", "[5, 6, 7, 8, 9]"],
        ["run.seed", "0", "3", "0"],
        ["loss.options.alpha", "unset", "16", "unset"],
    ]
    assert differences(runs[::2]) == []


def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    page = page_of(written(tmp_path / "a"), written(tmp_path / "b", 0.3, run=RunConfig(seed=1)))
    assert page.open == []
    assert not page.of("script")
    assert not page.of("iframe")
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert [image["alt"].split(" over")[0] for image in page.of("img")] == [
        "Training loss",
        "Recall@1",
    ]
    words = " ".join(page.words)
    assert "2 runs side by side" in words
    for shown in ("50.0 %", "60.0 %", "30.0 %", "40.0 %", "+0.25", "run.seed"):
        assert shown in page.words


def test_names_and_settings_are_escaped(tmp_path):
    names = ["<script>alert(1)", "$x_1$ & <b>", "_hidden"]
    folders = [
        written(tmp_path / str(number), name=name, loss=LossConfig(options={"margin": number / 4}))
        for number, name in enumerate(names)
    ]
    page = page_of(*folders)
    assert not page.of("script")
    assert not page.of("b")
    for name in names:
        assert page.words.count(name) == 3  # above both tables, and beside the curves


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [written(tmp_path / place / "same") for place in ("x", "y")]
    words = page_of(*folders).words
    assert [str(folder) in words for folder in folders] == [True, True]
    assert "same" not in words


def test_runs_of_both_tasks(tmp_path):
    page = page_of(
        written(tmp_path / "a"),
        written(tmp_path / "b", data=DataConfig(task="classification")),
    )
    assert len(page.of("img")) == 3
    assert "different questions" in " ".join(page.words)


def test_one_run_has_nothing_to_differ_from(tmp_path):
    words = " ".join(page_of(written(tmp_path / "a")).words)
    assert "1 run side by side" in words
    assert "What differs" not in words


def test_an_epoch_without_a_number_is_left_out(tmp_path):
    folder = written(tmp_path / "a")
    lines = (
        (folder / "metrics.jsonl").read_text().replace('"recall_at_1": 0.5', '"recall_at_1": null')
    )
    (folder / "metrics.jsonl").write_text(lines)
    assert len(page_of(folder).of("img")) == 2


def unlink(name):
    return lambda folder: (folder / name).unlink()


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


def replace_in(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unlink("config.yaml"), "FOLDER is no run: it has no config.yaml"),
        (rewrite("config.yaml", "- 1"), "FOLDER is no run: its config.yaml holds no configuration"),
        (
            rewrite("config.yaml", "a: ["),
            "FOLDER is no run: its config.yaml holds no configuration",
        ),
        (
            replace_in("config.yaml", "weight_decay", "decay_of_weights"),
            "FOLDER is a run of another version of idml_fast: Group 'optim' does not accept option "
            "'decay_of_weights'",
        ),
        (unlink("results.json"), "FOLDER is not finished: it has no results.json"),
        (unlink("metrics.jsonl"), "FOLDER is not finished: it has no metrics.jsonl"),
        (
            replace_in("config.yaml", "epochs: 3", "epochs: 4"),
            "FOLDER is not finished: its metrics.jsonl has 3 of 4 epochs of the conventional",
        ),
        (rewrite("results.json", "{"), "FOLDER is a run of another version of idml_fast: its resu"),
        (
            rewrite("results.json", '{"conventional": {}}'),
            "FOLDER is a run of another version of idml_fast: its results.json must have numbers "
            "for conventional and introspective",
        ),
        (
            replace_in("results.json", "0.25", '"high"'),
            "FOLDER is a run of another version of idml_fast: its results.json must have numbers",
        ),
        (
            replace_in("metrics.jsonl", "loss", "cost"),
            "FOLDER is a run of another version of idml_fast: each line of its metrics.jsonl must",
        ),
        (
            replace_in("metrics.jsonl", '"loss": 1.0', '"loss": "low"'),
            "FOLDER is a run of another version of idml_fast: each line of its metrics.jsonl must",
        ),
    ],
)
def test_what_is_no_finished_run_is_refused_in_a_sentence(tmp_path, capsys, change, message):
    good, bad = written(tmp_path / "good"), written(tmp_path / "bad")
    change(bad)
    assert cli.main(["report", str(good), str(bad)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"idml-fast: {message.replace('FOLDER', str(bad))}")
    assert told.count("\n") == 1
    assert not (tmp_path / "comparison.html").exists()


def test_a_folder_that_is_not_there_and_one_given_twice(tmp_path):
    folder = written(tmp_path / "a")
    with pytest.raises(RunError, match="nowhere is no run: it has no config"):
        compare([folder, tmp_path / "nowhere"])
    with pytest.raises(RunError, match="a is given twice"):
        compare([folder, folder / ".." / "a"])


def test_the_command_says_where_the_page_is(tmp_path, capsys, monkeypatch):
    folder = written(tmp_path / "runs" / "a")
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'runs' / 'comparison.html'}\n"
    monkeypatch.chdir(folder)
    assert cli.main(["report", ".", "--output", str(tmp_path / "here.html")]) == 0
    assert (tmp_path / "here.html").is_file()
    assert cli.main(["report", ".", "--output", str(tmp_path / "nowhere" / "here.html")]) == 1
    assert "nowhere" in capsys.readouterr().err
