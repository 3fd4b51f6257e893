"""The command line, and the configuration that it makes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

pytest.importorskip("jsonargparse", reason="the extra idml_fast[train] is not installed")

from test_benchmarks import made_up_run

from idml_fast import Metric, backend, cli
from idml_fast.benchmarks.records import write
from idml_fast.train import Config, load_config
from idml_fast.train.config import RECIPES

CUB = "--data.name", "cub", "--data-root", "birds"
EXTRA = {"accelerate", "jsonargparse", "yaml", "sklearn", "scipy", "matplotlib", "jinja2"}
EXTRA |= {"safetensors", "tqdm"}
# As if the extra were not installed: an import of any of it fails as it would then.
WITHOUT_EXTRA = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRA}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from idml_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_importing_the_library_loads_nothing_of_the_trainer():
    done = python("import sys, idml_fast, idml_fast.cli; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert "torch" in loaded, done.stderr
    assert loaded & EXTRA <= {"tqdm"}  # torch loads it where it is there


def test_doctor_needs_only_torch():
    done = python(WITHOUT_EXTRA, "doctor")
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout


def test_doctor_prints_the_backends(capsys):
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == backend.report() + "\n"


def test_doctor_takes_no_more_words(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "now"])
    assert "unrecognized arguments: now" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train"], ["train", "--help"]])
def test_train_without_the_extra_says_one_sentence(arguments):
    done = python(WITHOUT_EXTRA, *arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("idml-fast: idml-fast train needs ")
    assert done.stderr.endswith(": pip install 'idml_fast[train]'\n")


def test_a_missing_module_of_ours_is_no_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "idml_fast.train", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for command in ("train", "reproduce", "eval", "report", "bench", "doctor"):
        assert f"\n    {command}" in shown


def test_help_of_train_shows_what_it_would_do(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())  # however wide the terminal
    assert shown.startswith("usage: idml-fast train [--config RECIPE] [--name NAME]")
    assert "the name of a packaged recipe: digits" in shown
    for option in ("--name", "--optim.lr", "--metric.tau", "--run.overwrite", "--data.batch_size"):
        assert option in shown
    assert "default: 0.0005" in shown


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "COMMAND" in capsys.readouterr().err


def test_train_hands_its_configuration_on(monkeypatch):
    handed = []
    monkeypatch.setattr("idml_fast.train.run", handed.append)
    assert cli.main(["train", "--name", "demo", "--optim.lr", "1e-3", "--metric.tau=2"]) == 0
    (config,) = handed
    assert (config.name, config.optim.lr) == ("demo", 1e-3)
    assert config.metrics["introspective"] == Metric(2.0, 0.0, "cosine")


@pytest.mark.parametrize("error", [FileExistsError, FloatingPointError])
def test_train_says_in_a_sentence_why_it_stops(monkeypatch, capsys, error):
    def stop(config):
        raise error("because")

    monkeypatch.setattr("idml_fast.train.run", stop)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "idml-fast: because\n"


@pytest.mark.parametrize(
    ("title", "ours", "status", "told"),
    [
        ("a case", 1.0, 0, "1 ratio of 1 case compared, none lost\n"),
        ("a case", 2.0, 1, "1.000, at 0123abc 0.500, at most 0.575: LOST\n"),
        ("another", 1.0, 2, "has any of its cases\n"),
    ],
)
def test_bench_check_tells_by_its_status(tmp_path, capsys, title, ours, status, told):
    write(made_up_run(), tmp_path / "old")
    found = made_up_run({title: {"ours": [ours], "peer": [2.0]}}, commit="4567def")
    new = write(found, tmp_path / "new")
    assert cli.main(["bench", "check", str(new), f"--results={tmp_path / 'old'}"]) == status
    shown = capsys.readouterr()
    assert (shown.err if status == 2 else shown.out).endswith(told)
    assert shown.err.startswith("idml-fast: ") == (status == 2)


def test_bench_check_needs_only_torch():
    done = python(WITHOUT_EXTRA, "bench", "check", "nowhere.json")
    assert done.returncode == 2
    assert done.stderr.startswith("idml-fast: nowhere.json cannot be read: ")


def test_bench_report_names_what_it_has_written(tmp_path, capsys):
    write(made_up_run(), tmp_path / "results")
    given = [
        "bench",
        "report",
        f"--results={tmp_path / 'results'}",
        f"--output={tmp_path / 'x.md'}",
    ]
    assert cli.main(given) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x.md'}\n"
    assert cli.main([*given, f"--readme={tmp_path / 'README.md'}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("idml-fast: ") and told.count("\n") == 1


def test_bench_report_without_the_extra_says_one_sentence():
    done = python(WITHOUT_EXTRA, "bench", "report")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("idml-fast: idml-fast bench report needs ")
    assert done.stderr.endswith(": pip install 'idml_fast[train]'\n")


def test_bench_says_what_it_can_do(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench"])
    assert "WHAT" in capsys.readouterr().err


def test_the_recipe_digits_is_the_default():
    assert load_config() == load_config(["--config", "digits"]) == Config()


def test_the_recipe_leaves_nothing_out():
    recipe = yaml.safe_load((RECIPES / "digits.yaml").read_text("utf-8"))
    assert recipe == yaml.safe_load(Config().to_yaml())


def test_later_arguments_override_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\noptim:\n  lr: 0.1\n  epochs: 3\n")
    config = load_config(["--config", str(tmp_path / "mine.yaml"), "--optim.lr", "0.2"])
    assert (config.name, config.optim.lr, config.optim.epochs) == ("mine", 0.2, 3)
    assert config.optim.weight_decay == Config().optim.weight_decay


def test_a_file_beside_is_not_mistaken_for_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text("name: beside\n")
    assert load_config(["--config", "digits"]).name == "digits"
    assert load_config(["--config", "digits.yaml"]).name == "beside"


def test_a_saved_configuration_comes_back(tmp_path):
    words = "--name again --metric.gamma 0.5 --data.train_classes [1,2] --optim.lr 1e-7 "
    words += "--run.threads null --run.mixed_precision bf16"
    config = load_config(words.split())
    assert config.data.train_classes == [1, 2]
    assert config.run.threads is None
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_overwrite_is_not_saved():
    config = load_config(["--run.overwrite", "true"])
    assert config.run.overwrite
    assert "overwrite" not in config.to_yaml()


def test_short_options():
    config = load_config([*CUB, "--weights=x.pth", "--model.backbone", "resnet50.tv_in1k"])
    assert (config.data.name, config.data.root) == ("cub", "birds")
    assert (config.model.backbone, config.model.weights) == ("resnet50.tv_in1k", "x.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere"], "nowhere"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.lrr", "1"], "--optim.lrr"),
        (["--optim.lr", "0"], "optim.lr must be > 0, got 0.0"),
        (["--metric.tau", "-1"], "tau must be > 0, got -1"),
        (["--metric.tau", ".inf"], "metric.tau must be finite, got inf"),
        (["--metric.form", "distance"], "loss proxy_anchor: metric must be of form 'cosine'"),
        (["--metric.form", "angle"], "form must be one of 'distance', 'cosine', 'official'"),
        (["--loss.name", "arcface"], "loss.name must be one of proxy_anchor, proxy_nca"),
        (["--loss.name", "softmax"], "for data.task retrieval, got softmax"),
        (["--loss.options.alhpa", "2"], "loss.options of proxy_anchor must be one of alpha"),
        (["--loss.options.alpha", "-2"], "loss proxy_anchor: alpha must be > 0 and finite, got -2"),
        (
            ["--loss.name", "margin", "--loss.options.num_classes", "3"],
            "loss.options.num_classes must be null or 5, the number of classes that are learned",
        ),
        (["--loss.memory", "-1"], "loss.memory must be >= 0, got -1"),
        (["--loss.memory_epoch", "0"], "loss.memory_epoch must be > 0, got 0"),
        (["--data.name", "mnist"], "data.name must be one of digits, cub, cars, sop, inshop, "),
        (["--data.name", "cub"], "data.root must be the folder of cub, got null"),
        (["--data-root", "x"], "data.root must be null for digits, got x"),
        (["--data.source", "real"], "data.source must be null for digits, got real"),
        ([*CUB, "--data.target", "real"], "data.target must be null for cub, got real"),
        ([*CUB, "--data.name", "domains"], "data.source must be a domain of domains, got null"),
        ([*CUB, "--data.task", "classification"], "data.task must be retrieval for cub"),
        ([*CUB, "--data.blurred", "0.5"], "data.blurred is only for digits, got 0.5 for cub"),
        ([*CUB, "--data.train_classes", "[1,2]"], "data.train_classes is only for digits"),
        ([*CUB, "--data.resize", "200"], "data.resize must be >= data.image_size 224, got 200"),
        ([*CUB, "--data.image_size", "0"], "data.image_size must be > 0, got 0"),
        ([*CUB, "--data.workers", "-1"], "data.workers must be >= 0, got -1"),
        ([*CUB, "--model.pooling", "mean"], "model.pooling"),
        ([*CUB, "--weights=x.pth"], "model.weights must be null for small, got x.pth"),
        (["--model.backbone", "resnet50"], "model.backbone must be small for digits, got resnet50"),
        (["--data.task", "classification", "--loss.memory", "9"], "loss.memory must be 0"),
        (["--mix_alpha", "0"], "mix_alpha must be > 0, got 0"),
        (["--loss.proxy_unc", "some"], "proxy_unc"),
        (["--name", "../elsewhere"], "name must be the name of one folder, got '../elsewhere'"),
        (["--name", ""], "name must be the name of one folder, got ''"),
        (["--data.test_classes", "[4,5]"], "data.test_classes must be unseen, got [4]"),
        (["--data.train_classes", "[0,10]"], "data.train_classes must be two or more of 0 to 9"),
        (["--data.label_noise", "-0.1"], "data.label_noise must be in [0, 1], got -0.1"),
        (["--data.blurred", "1.5"], "data.blurred must be in [0, 1], got 1.5"),
        (["--data.mixed", ".nan"], "data.mixed must be in [0, 1], got nan"),
        (["--run.threads", "0"], "run.threads must be > 0, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        load_config(arguments)
    assert message in capsys.readouterr().err
