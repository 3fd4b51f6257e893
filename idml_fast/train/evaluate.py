"""What embeddings are worth, wherever they are from: files, or a network that a run has trained."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .._files import write_text
from ..evaluation import clustering, retrieval, uncertainty_table
from ..evaluation.files import FileError, Items, check_gallery, metadata, numbered, read_items
from ..metric import Metric
from .criterion import SettingsError
from .data import load_data
from .folder import read_config, to_json
from .model import METADATA, load
from .outcome import embed_all

NAMED = 5  # rows and classes that are left out, as far as the table names them
TITLES = {
    "r_precision": "R-precision",
    "map_at_r": "MAP@R",
    "mrr": "MRR",
    "map": "mAP",
    "nmi": "NMI",
    "ami": "AMI",
    "f1": "F1",
    "right": "Recall@1 by sem alone",
    "error_auroc": "R-AUROC",
    "aurc": "AURC",
    "pair_auroc": "AUROC of pairs",
    "ece": "ECE of P(match | D, β)",
    "brier": "Brier of P(match | D, β)",
    "ece_without_unc": "ECE of P(match | D)",
    "brier_without_unc": "Brier of P(match | D)",
}


@dataclass(frozen=True)
class Settings:
    """How embeddings are judged.

    Args:
        ks: the ``k`` of Recall@k and Precision@k.
        metric: ``plain`` or ``introspective``: which neighbours are the nearest.
        tau, gamma, form: of the introspective metric; None: what the network has learned with, or
            else the default of `idml_fast.Metric`.
        clustering: whether to cluster, which may take the longest.
        seed: of the clusters, and of the draws that the uncertainty is judged by.

    Raises:
        SettingsError: a value is out of its range.
    """

    ks: Sequence[int] = (1, 2, 4, 8)
    metric: str = "plain"
    tau: float | None = None
    gamma: float | None = None
    form: str | None = None
    clustering: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            for k in self.ks:
                _checks.integer("ks", k, ">= 1", lambda k: k >= 1)
            _checks.integer("seed", self.seed, "in [0, 2**31)", lambda seed: 0 <= seed < 2**31)
            _checks.one_of("metric", self.metric, ("plain", "introspective"))
            Metric(**self._given)
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from None
        if self.metric == "plain" and self._given:
            raise SettingsError(f"{next(iter(self._given))} is only for --metric introspective")

    def choose(self, learned: Metric) -> Metric:
        """The metric of the neighbours, for embeddings of a network that learned with this one."""
        return Metric.plain() if self.metric == "plain" else replace(learned, **self._given)

    @property
    def _given(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("tau", "gamma", "form")}
        return {name: value for name, value in values.items() if value is not None}


def evaluate_files(
    files: Sequence[Path],
    labels: Path | None = None,
    gallery: Sequence[Path] = (),
    gallery_labels: Path | None = None,
    settings: Settings = Settings(),
    json: Path | None = None,
) -> dict[str, Any]:
    """Judge embeddings by retrieval, clustering and their uncertainty, and print a table.

    Args:
        files: the queries: ``sem`` and perhaps ``unc``, as for
            `idml_fast.evaluation.files.read_items`; or the network of a run, which then embeds the
            images that the run kept for its test, and its gallery if it has one.
        labels: of the queries; None: in the file.
        gallery: what is found, likewise; none: the queries among themselves, each without itself.
        gallery_labels: of the gallery; None: in its file.
        settings: how they are judged.
        json: where all numbers are written; None: nowhere.

    Returns:
        The numbers, as they are written.

    Raises:
        FileError, SettingsError, idml_fast.train.folder.RunError: what is given cannot be judged;
            the message says why.
        idml_fast.train.datasets.DataError: the images of a run are not there any more.
    """
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise SettingsError(f"json must be a file in a folder that is there, got {json}")
    if gallery_labels is not None and not gallery:
        raise SettingsError("gallery_labels must go with gallery")
    if METADATA in metadata(files[0]):
        if len(files) > 1 or labels is not None or gallery:
            raise SettingsError(
                f"{files[0]} is a network, which brings its own test images, labels and gallery"
            )
        queries, found_in, learned = _embedded(files[0])
    else:
        queries, found_in, learned = read_items(files, labels), None, Metric()
    if gallery:
        found_in = read_items(gallery, gallery_labels)
        check_gallery(queries, found_in)
    result = judge(queries, found_in, settings, settings.choose(learned))
    print(text_table(result))
    if json is not None:
        write_text(json, to_json(result, indent=2) + "\n")
    return result


def judge(
    queries: Items, gallery: Items | None, settings: Settings, metric: Metric
) -> dict[str, Any]:
    """The numbers of these embeddings; the gallery is as for `evaluate_files`.

    Raises:
        FileError: no query has a match, or the metric reads uncertainties that are not there.
    """
    sides = [queries] if gallery is None else [queries, gallery]
    for items in sides:
        if settings.metric == "introspective" and items.unc is None:
            raise FileError(
                f"the introspective metric needs uncertainties, but {items.paths['sem']} comes "
                "without any"
            )
    classes, numbers = numbered(*(items.labels for items in sides))
    _check_matches(sides, numbers)
    labels, sem2, labels2, unc2 = numbers[0], None, None, None
    if gallery is not None:
        sem2, labels2, unc2 = gallery.sem, numbers[1], gallery.unc
    progress = sys.stderr.isatty()
    found = retrieval(
        queries.sem,
        labels,
        sem2,
        labels2,
        unc=queries.unc if metric.reads_unc else None,
        unc2=unc2 if metric.reads_unc else None,
        metric=metric,
        ks=settings.ks,
        progress=progress,
    )
    result = {
        "queries": _described(queries),
        "gallery": None if gallery is None else _described(gallery),
        "metric": {"name": settings.metric}
        | ({} if settings.metric == "plain" else asdict(metric)),
        "retrieval": found.values,
        "unmatched": {
            "rows": found.unmatched.tolist(),
            "classes": [classes[label] for label in labels[found.unmatched].unique().tolist()],
        },
    }
    if settings.clustering:
        result["clustering"] = clustering(
            queries.sem, labels, seed=settings.seed, progress=progress
        )
    if all(items.unc is not None for items in sides) and len(queries) > 1:
        result["uncertainty"] = _uncertainty(queries, labels, sem2, labels2, unc2, settings.seed)
    return result | {"versions": {name: version(name) for name in ("idml_fast", "torch")}}


def text_table(result: dict[str, Any]) -> str:
    """The numbers for a terminal."""
    queries, gallery = result["queries"], result["gallery"]
    among = "among themselves" if gallery is None else f"in a gallery of {gallery['items']}"
    widths = [f"{name} {queries[name]} wide" for name in ("sem", "unc") if queries.get(name)]
    told = ", ".join(f"{key} {value}" for key, value in result["metric"].items() if key != "name")
    lines = [
        f"{queries['items']} queries of {queries['classes']} classes {among}; {', '.join(widths)}",
        f"nearest by the {result['metric']['name']} metric" + (f" ({told})" if told else ""),
    ]
    sections = [name for name in ("retrieval", "clustering", "uncertainty") if name in result]
    width = max(len(_title(name)) for section in sections for name in result[section])
    for section in sections:
        lines += ["", section.capitalize(), "─" * (width + 11)]
        for name, value in result[section].items():
            lines.append(f"{_title(name):<{width}}   {_shown(value)}")
    rows, classes = result["unmatched"]["rows"], result["unmatched"]["classes"]
    if rows:
        why = "alone in their class" if gallery is None else "without a match in the gallery"
        lines += ["", f"Left out, {why}: {len(rows)} of {queries['items']} queries"]
        lines += [f"  rows {_first(rows)}", f"  classes {_first(classes)}"]
    return "\n".join(lines)


def _embedded(path: Path) -> tuple[Items, Items | None, Metric]:
    """The test images of a run, embedded by a network of it; likewise its gallery, if it has one;
    and the metric that the network learned."""
    config = read_config(path.parent)
    try:
        model, metric = load(path)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise FileError(f"{path} is a network of another version of idml_fast: {why}") from None
    data = load_data(config.data, config.run.seed)
    for remark in data.remarks:
        print(f"idml-fast: {remark}")
    embedded = embed_all(model, config, data)

    def items(sem: Tensor, unc: Tensor, labels: Tensor) -> Items:
        names = labels.numpy() if data.classes is None else np.array(data.names(labels))
        unc = unc if metric.reads_unc else None  # else nothing has taught it
        return Items(sem, unc, names, dict.fromkeys(("sem", "unc", "labels"), path))

    queries = items(embedded.sem, embedded.unc, data.test_labels)
    if data.gallery is None:
        return queries, None, metric
    return queries, items(embedded.sem2, embedded.unc2, data.gallery_labels), metric


def _check_matches(sides: list[Items], numbers: list[Tensor]) -> None:
    """Some query has something to be found."""
    names = [items.called("labels") for items in sides]
    if len(sides) == 2 and not torch.isin(*numbers).any():
        raise FileError(f"no query has a match: {names[0]} and {names[1]} have no class in common")
    if len(sides) == 1 and len(numbers[0].unique()) == len(numbers[0]):
        raise FileError(f"no query has a match: in {names[0]} every class has one member")


def _uncertainty(
    queries: Items,
    labels: Tensor,  # [N]
    sem2: Tensor | None,  # [M, Ds]
    labels2: Tensor | None,  # [M]
    unc2: Tensor | None,  # [M, Du]
    seed: int,
) -> dict[str, dict[str, float]]:
    """What the uncertainty is worth: each number, and the interval that it is in."""
    others = None if unc2 is None else {"unc": unc2}
    table = uncertainty_table(
        {"unc": queries.unc}, queries.sem, labels, sem2, labels2, others, seed=seed
    )
    without = {f"{name}_without_unc": number for name, number in table.distance.items()}
    found = {"right": table.right, **table.rows["unc"], **without}
    return {name: asdict(number) for name, number in found.items()}


def _described(items: Items) -> dict[str, Any]:
    return {
        "files": {name: str(path) for name, path in items.paths.items()},
        "items": len(items),
        "classes": len(set(items.labels.tolist())),
        "sem": items.sem.shape[1],
        "unc": None if items.unc is None else items.unc.shape[1],
    }


def _shown(value: float | dict[str, float]) -> str:
    if not isinstance(value, dict):
        return f"{100 * value:6.2f} %"
    if math.isnan(value["value"]):
        return "undefined"
    return "{value:8.3f}   {low:.3f} to {high:.3f}".format(**value)


def _title(name: str) -> str:
    kind, _, k = name.rpartition("_at_")
    return f"{kind.capitalize()}@{k}" if k.isdigit() else TITLES.get(name, name)


def _first(values: list[Any]) -> str:
    """The first few; strings as Python writes them, without control characters."""
    more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
    return ", ".join(map(repr, values[:NAMED])) + more
