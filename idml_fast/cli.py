"""The command ``idml-fast``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


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
    rows = reproduce.add_mutually_exclusive_group()
    rows.add_argument("--losses", nargs="+", metavar="LOSS", help="rows of the table (all)")
    rows.add_argument(
        "--study",
        action="store_true",
        help="one loss instead, on training data with wrong labels, blurred and mixed images, also "
        "with the metric as the paper's authors released it",
    )
    reproduce.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="(0 1 2; with --study 0 1 2 3 4)"
    )
    reproduce.add_argument("--epochs", type=int, help="of every run (as the recipe says)")
    reproduce.add_argument("--folder", help="(runs/reproduce; with --study runs/study)")
    commands.add_parser("doctor", help="say which backends work here, and why others do not")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "train":
        return _train(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command == "reproduce":
        return _reproduce(chosen)
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
        from .train.study import study
    except ModuleNotFoundError as error:
        return _missing("reproduce", error)
    given = {name: getattr(chosen, name) for name in ("losses", "seeds", "epochs", "folder")}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        (study if chosen.study else reproduce)(chosen.dataset, **options)
    except (SettingsError, FileExistsError, FloatingPointError) as error:
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
