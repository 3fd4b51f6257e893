"""The report: one HTML file that needs nothing else, and the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.image import imsave
from torch import Tensor

from .._files import write_text
from ..evaluation import (
    CORRUPTIONS,
    Estimate,
    match_forecast,
    pair_uncertainty,
    pictures,
    reliability,
    retrieval,
    risk_coverage,
    sampled_pairs,
)
from ..evaluation.pictures import COLORS, STYLE, data_uri, drawing, in_percent, in_powers, svg
from ..metric import Metric
from ..nearest import nearest
from .config import Config
from .data import Data, in_memory
from .outcome import Outcome

TEMPLATES = Path(__file__).parent
THUMBNAIL = 96  # pixels of a side, at most: some 150 images are shown
DRAWN = 1000  # points of a curve, at most

Form = Callable[[float], str]
PERCENT, NORM, RANK = "{:.1%}".format, "{:.3g}".format, "{:+.2f}".format
AUROC, SMALL = "{:.2f}".format, "{:.3f}".format


def yes_or_no(value: float) -> str:
    return "yes" if value else "no"


ROWS = {
    "Classification": (("Top-1", "top_1", PERCENT),),
    "Retrieval": (
        ("Recall@1", "recall_at_1", PERCENT),
        ("Recall@2", "recall_at_2", PERCENT),
        ("Recall@4", "recall_at_4", PERCENT),
        ("Recall@8", "recall_at_8", PERCENT),
        ("Recall@10", "recall_at_10", PERCENT),
        ("Recall@20", "recall_at_20", PERCENT),
        ("Recall@30", "recall_at_30", PERCENT),
        ("Recall@100", "recall_at_100", PERCENT),
        ("Recall@1000", "recall_at_1000", PERCENT),
        ("R-precision", "r_precision", PERCENT),
        ("MAP@R", "map_at_r", PERCENT),
        ("mAP", "map", PERCENT),
        ("MRR", "mrr", PERCENT),
        ("NMI", "nmi", PERCENT),
        ("AMI", "ami", PERCENT),
        ("F1 of pairs", "f1", PERCENT),
    ),
    "Uncertainty": (
        ("Gradient norm at its head", "unc_grad_norm", NORM),
        ("‖u‖, mean", "unc_norm_mean", NORM),
        ("‖u‖, standard deviation", "unc_norm_std", NORM),
        ("‖u‖, variation", "unc_variation", PERCENT),
        ("Alive", "unc_alive", yes_or_no),
        ("R-AUROC", "error_auroc", AUROC),
        ("R-AUROC of −‖s‖", "error_auroc_sem_norm", AUROC),
        ("R-AUROC of MC-dropout", "error_auroc_mc_dropout", AUROC),
        ("AURC", "aurc", SMALL),
        ("Pair AUROC", "pair_auroc", AUROC),
        ("ECE by D and β", "ece", SMALL),
        ("ECE by D alone", "ece_distance", SMALL),
        ("Brier score by D and β", "brier", SMALL),
        ("Brier score by D alone", "brier_distance", SMALL),
        *((f"Spearman with {name}", f"spearman_{name}", RANK) for name in CORRUPTIONS),
        ("OOD AUROC", "ood_auroc", AUROC),
    ),
}
TITLES = {name: title for rows in ROWS.values() for title, name, _ in rows}
# What says how certain an image is, and how that is measured: short title, what is better, form.
CANDIDATES = {
    "unc_norm": "‖u‖",
    "sem_norm": "−‖s‖",
    "proxy_distance": "proxy distance",
    "proxy_entropy": "proxy entropy",
    "mc_dropout": "MC-dropout",
}
MEASURES = {
    "error_auroc": ("R-AUROC", "↑", AUROC),
    "aurc": ("AURC", "↓", SMALL),
    "pair_auroc": ("pairs", "↑", AUROC),
    "ece": ("ECE", "↓", SMALL),
    "brier": ("Brier", "↓", SMALL),
    **{f"spearman_{name}": (name, "↑", RANK) for name in CORRUPTIONS},
    "ood_auroc": ("OOD", "↑", AUROC),
}


def table(results: dict[str, dict[str, float | None]]) -> dict[str, list[list[str]]]:
    """The table: under each heading, rows of a title and a cell for every metric.

    Args:
        results: by metric, then by name; None, what the metric lacks, becomes an en dash.
    """
    known = next(iter(results.values()))
    return {
        heading: [
            [title, *(cell(result[name], form) for result in results.values())]
            for title, name, form in rows
            if name in known
        ]
        for heading, rows in ROWS.items()
        if rows[0][1] in known
    }


def text_table(results: dict[str, dict[str, float | None]]) -> str:
    """The table for a terminal."""
    sections = table(results)
    cells = [row for rows in sections.values() for row in rows]
    first = max(len(title) for title, *_ in cells)
    width = max(len(name) for name in results)
    lines = []
    for heading, rows in sections.items():
        names = results if not lines else [""] * len(results)
        lines += ["", heading.ljust(first) + "".join(f"   {name:>{width}}" for name in names)]
        lines += ["─" * (first + len(results) * (width + 3))]
        for title, *values in rows:
            lines += [title.ljust(first) + "".join(f"   {value:>{width}}" for value in values)]
    return "\n".join(line.rstrip() for line in lines[1:])


def uncertainty_rows(outcome: Outcome) -> dict[str, list[tuple[str, str]]]:
    """By candidate, and for the distance alone: value and interval of every measure, as text."""
    rows = {CANDIDATES[name]: row for name, row in outcome.table.rows.items()}
    return {
        title: [
            (cell(None, form), "") if name not in row else _interval(row[name], form)
            for name, (_, _, form) in MEASURES.items()
        ]
        for title, row in (rows | {"distance alone": outcome.table.distance}).items()
    }


def answered(outcome: Outcome) -> str:
    """How many answers are right, with the interval: no uncertainty is read without it."""
    name = "Recall@1" if "recall_at_1" in outcome.results else "top-1"
    return "{} {} ({})".format(name, *_interval(outcome.table.right, PERCENT))


def uncertainty_text(outcomes: dict[str, Outcome]) -> str:
    """``‖u‖`` beside its baselines, for a terminal; the intervals are in the report."""
    less = ", ".join(title for title, sign, _ in MEASURES.values() if sign == "↓")
    lines = [f"Which uncertainty knows its errors (less is better: {less})"]
    for metric, outcome in outcomes.items():
        lines += ["", f"{metric}, {answered(outcome)}"]
        rows = [["", *(title for title, _, _ in MEASURES.values())]]
        for title, cells in uncertainty_rows(outcome).items():
            rows.append([title, *(value for value, _ in cells)])
        first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for title, *values in rows:
            shown = zip(values, widths, strict=True)
            lines.append(title.ljust(first) + "".join(f"  {x:>{width}}" for x, width in shown))
    return "\n".join(lines)


def write_report(
    path: Path, config: Config, data: Data, outcomes: dict[str, Outcome], seconds: float
) -> None:
    """Write the report of a run: no script, no request, every figure and image within the file.

    Args:
        path: of the HTML file.
        config: of the run.
        data: the images it was trained on and tested with.
        outcomes: by metric, ``conventional`` and ``introspective``.
        seconds: that the run took.
    """
    shown = outcomes["introspective"]
    quality, title, pixels = "top_1", "Top-1 accuracy of unseen images", None
    if config.data.task == "retrieval":
        quality = "recall_at_1"
        title = "Recall@1 among unseen classes" if data.unseen else "Recall@1"
        if data.gallery is None and len(data.sampled) == len(data.test_labels):
            images = in_memory(data.test, config.data, data.sampled)  # of fewer it would be easier
            pixels = retrieval(images.flatten(1), data.test_labels).values["recall_at_1"]
    with rc_context(STYLE):
        page = render(
            "report.html.j2",
            config=config,
            metric=shown.metric,
            data=data,
            seconds=seconds,
            metrics=list(outcomes),
            table=table({name: outcome.results for name, outcome in outcomes.items()}),
            uncertainties={name: uncertainty_rows(outcome) for name, outcome in outcomes.items()},
            answered={name: answered(outcome) for name, outcome in outcomes.items()},
            measures=[f"{TITLES[name]} {sign}" for name, (_, sign, _) in MEASURES.items()],
            pixels=pixels,
            loss_figure=_curves(outcomes, "loss", "Training loss"),
            quality=title,
            quality_figure=_curves(outcomes, quality, title),
            risk_figure=_risks(shown),
            reliability_figure=_reliability(shown, data, config.run.seed),
            queries=_queries(shown, data),
            map_figure=pictures.embedding_map(
                shown.sem, data.names(data.test_labels), shown.unc.norm(dim=1), config.run.seed
            ),
            extremes=_extremes(shown, data),
            corruptions=_corruptions(shown, data),
            distance_figure=_surface(
                shown, _distance, "D(α, β)", "YlGnBu", np.arange(0.25, 2, 0.25)
            ),
            gradient_figure=_surface(
                shown,
                _adaptive_gradient,
                "H(α, β) = ∂D/∂α",
                "YlGnBu_r",
                (0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
            ),
        )
    write_text(path, page)


def render(template: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """A page of a template in this folder, or another; whatever is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    versions = {name: version(name) for name in ("idml_fast", "torch")}
    return environment.get_template(template).render(versions=versions, **values)


def cell(value: float | None, form: Form) -> str:
    """A number as a table shows it; what there is not is an en dash."""
    if value is None:
        return "–"
    return "undefined" if math.isnan(value) else form(value).replace("%", " %")


def _interval(number: Estimate, form: Form) -> tuple[str, str]:
    value, low, high = (cell(x, form) for x in (number.value, number.low, number.high))
    return value, "" if math.isnan(number.value) else f"{low} to {high}"


def _curves(outcomes: dict[str, Outcome], name: str, label: str) -> str:
    figure, axes = drawing()
    for metric, outcome in outcomes.items():
        epochs = [epoch["epoch"] for epoch in outcome.epochs]
        values = [epoch[name] for epoch in outcome.epochs]
        axes.plot(epochs, values, color=COLORS[metric], label=metric, marker="o", markersize=3.5)
    if name == "loss":
        in_powers(axes)
    else:
        in_percent(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", title=label)
    axes.grid(axis="y")
    axes.legend()
    return svg(figure)


def _risks(outcome: Outcome) -> str:
    """How many answers are wrong among the most certain, by every candidate of the run."""
    matched = slice(None) if outcome.matched is None else outcome.matched
    wrong = outcome.wrong[matched]
    step = -(-len(wrong) // DRAWN)
    curves = {
        CANDIDATES[name]: [x[::step] for x in risk_coverage(uncertainty[matched], wrong)]
        for name, uncertainty in outcome.uncertainties.items()
    }
    coverage, _ = next(iter(curves.values()))
    return pictures.risk_coverage(coverage, {name: risk for name, (_, risk) in curves.items()})


def _reliability(outcome: Outcome, data: Data, seed: int) -> str:
    """The forecasts that the table judges: of the same pairs, by the same models."""
    gallery = outcome.sem2, data.gallery_labels
    pairs = sampled_pairs(outcome.sem, data.test_labels, *gallery, seed=seed)
    features = {
        "by D and β": (pairs.distance, pair_uncertainty(pairs, outcome.unc, outcome.unc2)),
        "by D alone": (pairs.distance,),
    }
    return pictures.reliability(
        {
            name: reliability(
                match_forecast(torch.stack(told, dim=1), pairs.match, pairs.rows, seed=seed),
                pairs.match,
            )
            for name, told in features.items()
        }
    )


def _queries(outcome: Outcome, data: Data) -> list[dict[str, list[dict]]]:
    """Queries with their five nearest, from most to least certain: of all the first and the last,
    and of those that are answered wrongly the first."""
    itself = data.gallery is None
    labels2 = data.test_labels if itself else data.gallery_labels
    k = min(5, len(labels2) - int(itself))
    _, columns = nearest(
        outcome.sem, None, outcome.sem2, k=k, metric=Metric.plain(), exclude_self=itself
    )
    right = labels2[columns] == data.test_labels[:, None]
    order = outcome.unc.norm(dim=1).argsort().tolist()
    hopeless = torch.zeros_like(outcome.wrong) if outcome.matched is None else ~outcome.matched
    wrong = [query for query in order if outcome.wrong[query] and not hopeless[query]]

    def row(query: int) -> dict:
        found = zip(columns[query].tolist(), right[query].tolist(), strict=True)
        return {
            "query": _item(outcome, data, query),
            "found": [
                _item(outcome, data, column, gallery=not itself) | {"right": ok}
                for column, ok in found
            ],
        }

    mistakes = f"{len(wrong[:8])} of {len(wrong)}" if wrong else "none"
    return [
        {
            "Most certain queries": [row(query) for query in order[:4]],
            "Least certain queries": [row(query) for query in order[-4:]],
        },
        {f"Wrong, the most certain first: {mistakes}": [row(query) for query in wrong[:8]]},
    ]


def _extremes(outcome: Outcome, data: Data) -> dict[str, list[dict]]:
    """The images with the shortest and with the longest ``u``."""
    order = outcome.unc.norm(dim=1).argsort().tolist()
    return {
        "Most certain images": [_item(outcome, data, i) for i in order[:10]],
        "Least certain images": [_item(outcome, data, i) for i in order[:-11:-1]],
    }


def _item(outcome: Outcome, data: Data, index: int, gallery: bool = False) -> dict:
    images, labels, unc = data.test, data.test_labels, outcome.unc
    if gallery:
        images, labels, unc = data.gallery, data.gallery_labels, outcome.unc2
    return {
        "src": _picture(images[index][0]),
        "label": data.names(labels[index : index + 1])[0],
        "norm": unc[index].norm().item(),
    }


def _corruptions(outcome: Outcome, data: Data) -> list[dict]:
    """For every corruption: ``||u||`` over severity, and what it does to one image, alone: what it
    draws at random is drawn for this image anew."""
    norm = outcome.unc[data.sampled].norm(dim=1)
    typical = data.sampled[norm.sort().indices[len(norm) // 2]].item()
    image = data.test[typical][0][None]
    found = []
    for name, norms in outcome.norms.items():
        figure, axes = drawing(3.6, 2.6)
        low, median, high = np.quantile(norms.numpy(), (0.25, 0.5, 0.75), axis=1)
        severity = np.arange(len(norms))
        color = COLORS["introspective"]
        axes.fill_between(severity, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(severity, median, color=color, marker="o", markersize=4)
        axes.set(xlabel="severity", ylabel="‖u‖")
        axes.grid(axis="y")
        damaged = [CORRUPTIONS[name](image, step)[0] for step in severity]
        found.append(
            {
                "name": name,
                "spearman": cell(outcome.results[f"spearman_{name}"], RANK),
                "figure": svg(figure),
                "strip": [_picture(image) for image in damaged],
            }
        )
    return found


def _distance(metric: Metric, alpha: Tensor, beta: Tensor) -> Tensor:
    power = 2 if metric.form == "official" else 1  # the released form squares both norms
    return alpha * torch.exp(-(beta**power + metric.gamma) / (metric.tau * alpha**power))


def _adaptive_gradient(metric: Metric, alpha: Tensor, beta: Tensor) -> Tensor:
    alpha = alpha.clone().requires_grad_()
    return torch.autograd.grad(_distance(metric, alpha, beta).sum(), alpha)[0]


def _surface(
    outcome: Outcome,
    function: Callable[[Metric, Tensor, Tensor], Tensor],
    title: str,
    colors: str,
    levels: Sequence[float],
) -> str:
    """A function of ``alpha`` and ``beta`` as a map, with pairs of test images on it."""
    pair = torch.randint(len(outcome.sem), (2, 400), generator=torch.Generator().manual_seed(0))
    pair = pair[:, pair[0] != pair[1]]
    alphas = (outcome.sem[pair[0]] - outcome.sem[pair[1]]).norm(dim=1)
    betas = (outcome.unc[pair[0]] + outcome.unc[pair[1]]).norm(dim=1)

    alpha = torch.linspace(0.005, 2, 200)  # the largest distance of two unit vectors
    beta = torch.linspace(0, max(2.0, 1.1 * betas.max().item()), 200)
    values = function(outcome.metric, *torch.meshgrid(alpha, beta, indexing="xy")).numpy()

    figure, axes = drawing(height=3.4)
    extent = (0, alpha[-1].item(), 0, beta[-1].item())
    axes.imshow(
        values, colors, aspect="auto", interpolation="bicubic", origin="lower", extent=extent
    )
    lines = axes.contour(alpha, beta, values, levels=levels, colors="#2a3342", linewidths=0.6)
    axes.clabel(lines, fontsize=9)
    axes.scatter(alphas, betas, s=4, color="#c2410c", alpha=0.6, linewidths=0)
    axes.set(xlabel="α = ‖sᵢ − sⱼ‖", ylabel="β = ‖uᵢ + uⱼ‖", title=title)
    axes.locator_params(nbins=5)
    return svg(figure)


def _picture(
    image: Tensor,  # [channels, height, width] in [0, 1]
) -> str:
    """A small image as it is, a larger one as a small photograph."""
    buffer = BytesIO()
    larger = max(image.shape[1:]) / THUMBNAIL
    if larger > 1:
        side = [round(x / larger) for x in image.shape[1:]]
        image = F.interpolate(image[None], side, mode="bilinear", antialias=True)[0].clamp(0, 1)
    pixels = (image[0] if len(image) == 1 else image.movedim(0, 2)).numpy()
    if larger > 1:
        imsave(buffer, pixels, cmap="gray", vmin=0, vmax=1, format="jpeg")
        return data_uri("image/jpeg", buffer.getvalue())
    imsave(buffer, pixels, cmap="gray", vmin=0, vmax=1, metadata={"Software": None})
    return data_uri("image/png", buffer.getvalue())
