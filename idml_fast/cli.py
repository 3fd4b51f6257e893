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
    commands.add_parser("doctor", help="say which backends work here, and why others do not")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "train":
        return _train(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _doctor()


def _train(arguments: list[str]) -> int:
    try:
        from .train import load_config, run
    except ModuleNotFoundError as error:
        if (error.name or "idml_fast").split(".")[0] == "idml_fast":
            raise  # a fault of ours, which no installation mends
        return _fail(f"idml-fast train needs {error.name}: pip install 'idml_fast[train]'")
    config = load_config(arguments)
    try:
        run(config)
    except (FileExistsError, FloatingPointError) as error:
        return _fail(str(error))
    return 0


def _doctor() -> int:
    from . import backend

    print(backend.report())
    return 0


def _fail(sentence: str) -> int:
    print(f"idml-fast: {sentence}", file=sys.stderr)
    return 1
