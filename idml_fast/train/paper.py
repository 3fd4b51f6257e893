"""The paper: its numbers, and what each cell of its Table 1 is trained with."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import yaml

NUMBERS = Path(__file__).parent / "paper.csv"
RECIPES = Path(__file__).parent / "recipes" / "paper"
NAMES = {"cub": "CUB", "cars": "Cars", "sop": "SOP"}  # of the data sets in Table 1, in paper.csv


@cache
def published() -> dict[tuple[str, str, str], dict[str, str]]:
    """The paper's numbers in percent, by row, metric and data set, and then by their names.

    >>> published()["margin", "introspective", "Cars"]["recall_at_1"]
    '86.1'
    """
    with NUMBERS.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    about = "row", "metric", "data", "method"
    return {
        (line["row"], line["metric"], line["data"]): {
            name: value for name, value in line.items() if value and name not in about
        }
        for line in lines
    }


@cache
def cells() -> dict[str, tuple[str, str]]:
    """The data set and the loss of each cell of Table 1, by the cell's name.

    >>> cells()["sop_fast_ap"]
    ('sop', 'fast_ap')
    """
    losses = dict.fromkeys(row for row, _, data in published() if data in NAMES.values())
    return {f"{dataset}_{loss}": (dataset, loss) for dataset in NAMES for loss in losses}


def recipe(cell: str) -> dict[str, Any]:
    """The settings of a cell, nested as in a YAML file; what is left out is the trainer's default.

    >>> recipe("cars_contrastive")["optim"]["lr"]
    0.00025

    Args:
        cell: one of `cells`.
    """
    values: dict[str, Any] = {"name": cell}
    for layer in ("common", *cells()[cell], cell):
        path = RECIPES / f"{layer}.yaml"
        if layer != cell or path.exists():
            values = merged(values, yaml.safe_load(path.read_text("utf-8")))
    return values


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both, the second where they differ.

    >>> merged({"optim": {"lr": 1, "clip": 2}}, {"optim": {"lr": 3}})
    {'optim': {'lr': 3, 'clip': 2}}
    """
    both = {**first, **second}
    for key in first.keys() & second.keys():
        if isinstance(first[key], dict) and isinstance(second[key], dict):
            both[key] = merged(first[key], second[key])
    return both
