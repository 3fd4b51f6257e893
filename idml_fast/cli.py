"""The command ``idml-fast``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# sysexits.h's EX_TEMPFAIL: try again. A run that a signal has ended before its end has this status.
STOPPED = 75
# A check of benchmarks that has found nothing to compare: neither success nor a loss.
NOTHING_COMPARED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status, or exits with usage help.

    Args:
        arguments: absent: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="idml-fast", description="Introspective deep metric learning.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "train",
        help="train the conventional and the introspective metric on digits or on image files, "
        "compare them, write a report",
        add_help=False,  # its own parser knows its options
    )
    _add_reproduce(commands)
    _add_evaluate(commands)
    report = commands.add_parser(
        "report",
        help="compare finished runs side by side, in one page",
        description="Compare finished runs of idml-fast train: their numbers, how their "
        "configurations differ, and how they learned, in one HTML file.",
        allow_abbrev=False,
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="(comparison.html beside the first run)"
    )
    _add_bench(commands)
    commands.add_parser("doctor", help="say which backends work here, and why others do not")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "train":
        return _train(rest)
    if chosen.command == "reproduce":
        return _reproduce(chosen, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command == "eval":
        return _evaluate(chosen)
    if chosen.command == "report":
        return _report(chosen)
    if chosen.command == "bench":
        return _check(chosen) if chosen.what == "check" else _tell(chosen)
    return _doctor()


def _add_reproduce(commands: Any) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="train many losses with both metrics, and write the table beside the paper's numbers",
        description="Train losses with the conventional and with the introspective metric, beside "
        "the paper's numbers: one cell of its Table 1, a row, a column or all of it; or every loss "
        "on the digits. A second call goes on where the first one stopped. Further options are "
        "those of idml-fast train and hold for every run, such as --data.batch_size 60.",
        usage="%(prog)s --dataset DATASET [DATASET ...] [--loss LOSS [LOSS ...]] [--data-root DIR] "
        "[OPTION ...] [--GROUP.OPTION VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset",
        required=True,
        nargs="+",
        metavar="DATASET",
        help="digits; or one or more of cub, cars and sop",
    )
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        "--loss",
        "--losses",
        dest="losses",
        nargs="+",
        metavar="LOSS",
        help="rows of the table (all)",
    )
    rows.add_argument(
        "--study",
        action="store_true",
        help="one loss instead, on training data with wrong labels, blurred and mixed images, also "
        "with the metric as the paper's authors released it; of the digits",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="the folder with the data sets, as unpacked",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="of the backbone (those of timm, fetched once)"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="(of cub, cars and sop 0, of the digits 0 1 2; with --study 0 1 2 3 4)",
    )
    parser.add_argument("--epochs", type=int, help="of every run (as the recipe says)")
    parser.add_argument(
        "--no-best",
        dest="best",
        action="store_false",
        help="judge the test images of cub, cars and sop after the last epoch alone",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="write a checkpoint so often, besides those after every epoch and at a signal",
    )
    parser.add_argument(
        "--folder",
        help="where it is written (runs/paper; of the digits runs/reproduce, with --study "
        "runs/study)",
    )


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="judge embeddings from files, or those of a trained network",
        description="Judge embeddings by retrieval, clustering and their uncertainty. They are "
        ".npy files (SEM, perhaps UNC, with --labels), or one .npz or .safetensors file with "
        "arrays called sem, unc and labels, or the network of a run, such as "
        "runs/digits/introspective.safetensors, which embeds the test images of that run. Labels "
        "are integers or strings.",
        usage="%(prog)s SEM [UNC] --labels LABELS [--gallery SEM2 [UNC2] --gallery-labels LABELS2] "
        "[OPTION ...]\n       %(prog)s FILE [--gallery FILE2] [OPTION ...]",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="SEM", help="the queries")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="of the queries")
    parser.add_argument(
        "--gallery",
        nargs="+",
        default=(),
        type=Path,
        metavar="SEM2",
        help="where the nearest are looked for (the other queries)",
    )
    parser.add_argument("--gallery-labels", type=Path, metavar="FILE", help="of the gallery")
    parser.add_argument(
        "--ks", nargs="+", type=int, default=[1, 2, 4, 8], metavar="K", help="of Recall@k (1 2 4 8)"
    )
    parser.add_argument(
        "--metric",
        choices=("plain", "introspective"),
        default="plain",
        help="what is nearest; introspective needs UNC (%(default)s)",
    )
    parser.add_argument("--tau", type=float, help="of the introspective metric (5)")
    parser.add_argument("--gamma", type=float, help="of the introspective metric (0)")
    parser.add_argument("--form", help="distance, cosine or official (distance)")
    parser.add_argument(
        "--no-clustering", dest="clustering", action="store_false", help="no k-means of the queries"
    )
    parser.add_argument("--seed", type=int, default=0, help="of clusters and samples (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def _add_bench(commands: Any) -> None:
    about = "recorded benchmark runs: compare a new one with them, or tell what they measured"
    parser = commands.add_parser("bench", help=about, description=about.capitalize() + ".")
    whats = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    check = whats.add_parser(
        "check",
        help="fail where ours has become slower beside its peers",
        description="Compare the ratios of ours to its peers with those of the last recorded run "
        "on the same kind of device. Exits with 1 if one is more than 15 % above it, beyond noise, "
        "and with 2 if there is nothing to compare.",
        allow_abbrev=False,
    )
    check.add_argument(
        "records", nargs="+", type=Path, metavar="RECORD", help="of a new run, or a folder of them"
    )
    report = whats.add_parser(
        "report",
        help="write the newest numbers of every case, and how they came about, in pages",
        description="Write benchmarks.html, the newest number of every case beside its peers and "
        "the trend from commit to commit; benchmarks.md, the same numbers; and bring the index of "
        "the records up to date.",
        allow_abbrev=False,
    )
    report.add_argument(
        "--output",
        type=Path,
        default=Path("docs"),
        metavar="PATH",
        help="their folder, or a file.html or file.md, which is written alone (%(default)s)",
    )
    report.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="write the section between its markers too, by the template beside RESULTS: "
        "speed.md.j2",
    )
    for parser in (check, report):
        parser.add_argument(
            "--results",
            type=Path,
            default=Path("bench", "results"),
            metavar="RESULTS",
            help="the folder of recorded runs (%(default)s)",
        )


def _train(arguments: list[str]) -> int:
    try:
        from .train import load_config, run
        from .train.checkpoint import Interrupted
        from .train.criterion import SettingsError
        from .train.datasets import DataError
        from .train.folder import RunError
    except ModuleNotFoundError as error:
        return _missing("train", error)
    config = load_config(arguments)
    try:
        run(config)
    except ModuleNotFoundError as error:
        return _missing("train", error)
    except DataError as error:
        return _fail(_without_traceback(error))
    except (FileExistsError, FloatingPointError, RunError, SettingsError) as error:
        return _fail(str(error))
    except Interrupted as stopped:
        _fail(str(stopped))
        return STOPPED
    return 0


def _reproduce(chosen: argparse.Namespace, settings: list[str]) -> int:
    try:
        from .train.checkpoint import Interrupted
        from .train.datasets import DataError
        from .train.folder import RunError
        from .train.reproduce import SettingsError, reproduce
        from .train.study import study
        from .train.table import reproduce_table
    except ModuleNotFoundError as error:
        return _missing("reproduce", error)
    given = {name: getattr(chosen, name) for name in ("losses", "seeds", "epochs", "folder")}
    options = {name: value for name, value in given.items() if value is not None}
    short = {"--model.weights": chosen.weights, "--run.checkpoint_every": chosen.checkpoint_every}
    settings = [f"{name}={x}" for name, x in short.items() if x is not None] + settings
    root = [] if chosen.data_root is None else [f"--data.root={chosen.data_root}"]
    if chosen.study and root + settings:
        told = " ".join(root + settings)
        return _fail(f"--study takes no settings of idml-fast train, got {told}")
    try:
        if chosen.study:
            study(" ".join(chosen.dataset), **options)
        elif chosen.dataset == ["digits"]:
            reproduce("digits", **options, settings=root + settings)
        else:
            options |= {"data_root": chosen.data_root, "best": chosen.best}
            reproduce_table(chosen.dataset, **options, settings=settings)
    except ModuleNotFoundError as error:
        return _missing("reproduce", error)
    except DataError as error:
        return _fail(_without_traceback(error))
    except (FileExistsError, FloatingPointError, RunError, SettingsError) as error:
        return _fail(str(error))
    except Interrupted as stopped:
        _fail(str(stopped))
        return STOPPED
    return 0


def _evaluate(chosen: argparse.Namespace) -> int:
    try:
        from .evaluation.files import FileError
        from .train.datasets import DataError
        from .train.evaluate import Settings, SettingsError, evaluate_files
        from .train.folder import RunError
    except ModuleNotFoundError as error:
        return _missing("eval", error)
    names = ("ks", "metric", "tau", "gamma", "form", "clustering", "seed")
    try:
        evaluate_files(
            chosen.files,
            chosen.labels,
            chosen.gallery,
            chosen.gallery_labels,
            Settings(**{name: getattr(chosen, name) for name in names}),
            chosen.json,
        )
    except ModuleNotFoundError as error:
        return _missing("eval", error)
    except DataError as error:
        return _fail(_without_traceback(error))
    except (FileError, RunError, SettingsError, OSError) as error:
        return _fail(str(error))
    return 0


def _report(chosen: argparse.Namespace) -> int:
    try:
        from .train.compare import compare
        from .train.folder import RunError
    except ModuleNotFoundError as error:
        return _missing("report", error)
    try:
        print(compare(chosen.runs, chosen.output))
    except (RunError, OSError) as error:
        return _fail(str(error))
    return 0


def _check(chosen: argparse.Namespace) -> int:
    from .benchmarks.check import check
    from .benchmarks.records import RecordError

    try:
        told, kept = check(chosen.records, chosen.results)
    except RecordError as error:
        _fail(str(error))
        return NOTHING_COMPARED
    print(told)
    return 0 if kept else 1


def _tell(chosen: argparse.Namespace) -> int:
    try:
        from .benchmarks.records import RecordError
        from .benchmarks.report import report
    except ModuleNotFoundError as error:
        return _missing("bench report", error)
    try:
        for path in report(chosen.results, chosen.output, chosen.readme):
            print(path)
    except (RecordError, OSError) as error:
        return _fail(str(error))
    return 0


def _without_traceback(error: ValueError) -> str:
    """The sentence of a ``DataError``; one that a worker has raised has its traceback before it."""
    return str(error).rstrip().rpartition("DataError: ")[2]


def _missing(command: str, error: ModuleNotFoundError) -> int:
    name = (error.name or "idml_fast").split(".")[0]
    if name == "idml_fast":
        raise error  # a fault of ours, which no installation mends
    extra = "vision" if name in ("timm", "torchvision") else "train"
    return _fail(f"idml-fast {command} needs {name}: pip install 'idml_fast[{extra}]'")


def _doctor() -> int:
    from . import backend

    print(backend.report())
    return 0


def _fail(sentence: str) -> int:
    print(f"idml-fast: {sentence}", file=sys.stderr)
    return 1
