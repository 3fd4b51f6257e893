"""The run folder: whose it is, and files that are there whole or not at all."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from .._files import write_text
from .config import Config, config_of

FILES = (
    "config.yaml",
    "metrics.jsonl",
    "results.json",
    "uncertainty.json",
    "conventional.safetensors",
    "introspective.safetensors",
    "report.html",
)
CHECKPOINTS = "checkpoints"  # the folder of those of a run that is not finished
# What a tracker has written, if one was asked for.
CSV = "metrics.csv"
TENSORBOARD = "tensorboard"


class RunError(ValueError):
    """A folder is not the run that is asked for; the message names it."""


def to_json(value: dict, indent: int | None = None) -> str:
    """``value`` as JSON; what is not a finite number becomes null, since JSON has no NaN."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=indent)


def open_folder(config: Config) -> Path:
    """Make the run folder, or take over the one that is there, and write ``config.yaml``.

    A run of the same configuration that has checkpoints is not finished: it goes on from them. One
    without is trained again, each file staying until its successor is whole: the same seed gives
    the same run, so nothing is lost. A folder with anything else is refused, unless
    ``run.overwrite`` says that its run is to be removed.

    Raises:
        FileExistsError: the folder holds another run, or something that is no run.
    """
    folder = config.folder
    other = other_run(config)
    if other:
        if not config.run.overwrite:
            raise FileExistsError(
                f"{folder} holds {other}; "
                "choose another --name, or replace it with --run.overwrite true"
            )
        for name in (*FILES, CSV):
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, TENSORBOARD):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", config.to_yaml())
    return folder


def other_run(config: Config) -> str | None:
    """In words, what the run folder holds that is not of this configuration; None: nothing."""
    folder, there = config.folder, config.folder / "config.yaml"
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    before = yaml.safe_load(there.read_text("utf-8")) if there.is_file() else None
    now = yaml.safe_load(config.to_yaml())
    return None if before == now else difference(before, now)


def described(config: Config) -> dict[str, Any]:
    """What a run depends on: all but the folder, which may be moved."""
    values = yaml.safe_load(config.to_yaml())
    del values["run"]["folder"]
    return values


def difference(before: Any, now: dict) -> str:
    """In words, how the configuration of the run that is there differs from this one."""
    if not isinstance(before, dict):
        return "files that are no run"
    old, new = flat(before), flat(now)
    changed = [
        f"{key} {old.get(key, 'unset')} there, {new.get(key, 'unset')} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"a run of another configuration ({'; '.join(changed[:3])}{more})"


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A configuration by the names that the command line has for its values: ``optim.lr``."""
    found = {}
    for key, value in tree.items():
        found.update(
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def read_config(folder: Path) -> Config:
    """The configuration of the run in that folder.

    Raises:
        RunError: there is no run, or one of a version of idml_fast that had other settings.
    """
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder} is no run: it has no config.yaml") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise RunError(f"{folder} is no run: its config.yaml holds no configuration")
    try:
        return config_of(values)
    except (argparse.ArgumentError, AssertionError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise RunError(f"{folder} is a run of another version of idml_fast: {why}") from None
