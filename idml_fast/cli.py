"""The command ``idml-fast``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


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
        help="train the conventional and the introspective metric, compare them, write a report",
        add_help=False,  # its own parser knows its options
    )
    reproduce = commands.add_parser(
        "reproduce",
        help="train every loss with both metrics and several seeds, and write the table",
        description="Train every loss with the conventional and with the introspective metric, "
        "beside the paper's numbers. A second call goes on where the first one stopped.",
        allow_abbrev=False,
    )
    reproduce.add_argument("--dataset", required=True, help="digits")
    reproduce.add_argument("--losses", nargs="+", metavar="LOSS", help="rows of the table (all)")
    reproduce.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="(0 1 2)"
    )
    reproduce.add_argument("--epochs", type=int, help="of every run (as the recipe says)")
    reproduce.add_argument("--folder", default="runs/reproduce", help="(%(default)s)")
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
    commands.add_parser("doctor", help="say which backends work here, and why others do not")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "train":
        return _train(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command == "reproduce":
        return _reproduce(chosen)
    if chosen.command == "report":
        return _report(chosen)
    return _doctor()


def _train(arguments: list[str]) -> int:
    try:
        from .train import load_config, run
    except ModuleNotFoundError as error:
        return _missing("train", error)
    config = load_config(arguments)
    try:
        run(config)
    except (FileExistsError, FloatingPointError) as error:
        return _fail(str(error))
    return 0


def _reproduce(chosen: argparse.Namespace) -> int:
    try:
        from .train.reproduce import SettingsError, reproduce
    except ModuleNotFoundError as error:
        return _missing("reproduce", error)
    options = {name: getattr(chosen, name) for name in ("losses", "seeds", "epochs", "folder")}
    try:
        reproduce(chosen.dataset, **options)
    except (SettingsError, FileExistsError, FloatingPointError) as error:
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


def _missing(command: str, error: ModuleNotFoundError) -> int:
    if (error.name or "idml_fast").split(".")[0] == "idml_fast":
        raise error  # a fault of ours, which no installation mends
    return _fail(f"idml-fast {command} needs {error.name}: pip install 'idml_fast[train]'")


def _doctor() -> int:
    from . import backend

    print(backend.report())
    return 0


def _fail(sentence: str) -> int:
    print(f"idml-fast: {sentence}", file=sys.stderr)
    return 1
