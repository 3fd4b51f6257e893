"""What a trained network is worth: the numbers of the table, and what the report draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation import (
    UncertaintyTable,
    alive_or_dead,
    clustering,
    corrupted,
    mc_dropout,
    proxy_distance,
    retrieval,
    semantic_norm,
    shuffled,
    softmax_entropy,
    uncertainty_table,
    wrong_answers,
)
from ..losses.proxies import ProxyLoss
from ..metric import Metric
from ..pairwise import pairwise
from .config import Config
from .criterion import Criterion
from .data import Data
from .model import TwoHeaded

# The numbers of a task, and their short names.
QUALITIES = {
    "retrieval": {
        "recall_at_1": "R@1",
        "recall_at_2": "R@2",
        "nmi": "NMI",
        "r_precision": "RP",
        "map_at_r": "MAP@R",
    },
    "classification": {"top_1": "top-1"},
}
# By which of them the metrics are told apart.
JUDGED = {"retrieval": ("recall_at_1", "map_at_r"), "classification": ("top_1",)}
# What every network has, whatever its loss and its metric, to set its uncertainty against.
BASELINES = ("sem_norm", "mc_dropout")
# Of the bootstrap and of MC-dropout: fewer than by default, since a run is not to wait for them.
RESAMPLES, PASSES = 200, 10


@dataclass
class Outcome:
    """A trained network on images that it has not seen.

    Args:
        metric: it was trained with.
        epochs: what was recorded after every epoch, as in ``metrics.jsonl``.
        results: the numbers of the table; None for what a metric without uncertainty lacks.
        sem: ``[M, Ds]`` on the CPU.
        unc: ``[M, Du]`` on the CPU.
        norms: ``||u||`` by corruption, ``[6, M]`` each; empty if the metric does not read ``unc``.
        uncertainties: ``[M]`` by candidate, see `uncertainties`.
        wrong: ``[M]`` bool, whether the nearest image (or the class) is wrong.
        table: what the uncertainties know.
    """

    metric: Metric
    epochs: list[dict]
    results: dict[str, float | None]
    sem: Tensor
    unc: Tensor
    norms: dict[str, Tensor]
    uncertainties: dict[str, Tensor]
    wrong: Tensor
    table: UncertaintyTable


@torch.no_grad()
def embed(
    model: TwoHeaded,
    images: Tensor,  # [M, channels, height, width]
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """``(sem [M, Ds], unc [M, Du])`` on the CPU, computed batch by batch in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = [model(batch.to(device)) for batch in images.split(batch_size)]
    sem, unc = zip(*parts, strict=True)
    return torch.cat(sem).cpu(), torch.cat(unc).cpu()


@torch.no_grad()
def uncertainties(
    model: TwoHeaded,
    criterion: Criterion,
    images: Tensor,  # [M, channels, height, width]
    batch_size: int,
) -> dict[str, Tensor]:
    """``[M]`` on the CPU for each candidate, larger for a less certain image.

    ``unc_norm`` is ``||u||``, if the metric reads it; the others are its baselines. Those of a
    loss with proxies ask the proxies as that loss does, without uncertainties: scaled by its own
    ``softmax_scale``, or Proxy-Anchor's ``alpha``.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = [_uncertainties(model, criterion, x.to(device)) for x in images.split(batch_size)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _uncertainties(model: TwoHeaded, criterion: Criterion, images: Tensor) -> dict[str, Tensor]:
    loss, features = criterion.loss, model.features(images)
    raw = model.sem(features)
    sem = F.normalize(raw, dim=1)
    found = {}
    if loss.metric.reads_unc:
        found["unc_norm"] = model.unc(features).norm(dim=1)
    found["sem_norm"] = semantic_norm(raw)
    if isinstance(loss, ProxyLoss):
        proxies = loss.settings()["proxies"]
        found["proxy_distance"] = proxy_distance(sem, proxies)
        found["proxy_entropy"] = softmax_entropy(_logits(loss, sem, proxies))
    found["mc_dropout"] = mc_dropout(
        features, lambda kept: F.normalize(model.sem(kept), dim=1), passes=PASSES
    )
    return found


def _logits(loss: ProxyLoss, sem: Tensor, proxies: Tensor) -> Tensor:
    """``[N, C]``: how close each item is to each proxy, as far apart as the loss has them."""
    form = "distance" if loss.metric.form == "distance" else "cosine"
    metric = Metric.plain(form)
    scores = pairwise(sem, None, proxies, None, metric=metric)
    settings = loss.settings()
    scale = settings["softmax_scale"] if "softmax_scale" in settings else settings["alpha"]
    return -metric.sign * scale * scores ** settings.get("power", 1.0)


def record(model: TwoHeaded, criterion: Criterion, config: Config, data: Data) -> dict:
    """What is worth a line after every epoch: how good unseen images come out, and ``||u||``."""
    sem, unc = embed(model, data.test_images, config.data.batch_size)
    if config.data.task == "classification":
        right = criterion.predict(sem) == data.test_labels
        quality = {"top_1": right.double().mean().item()}
    else:
        values = retrieval(sem, data.test_labels).values
        quality = {name: x for name, x in values.items() if not name.startswith("precision")}
    norm = unc.norm(dim=1) if criterion.loss.metric.reads_unc else None
    return {
        **quality,
        "unc_norm_mean": None if norm is None else norm.mean().item(),
        "unc_norm_std": None if norm is None else norm.std().item(),
    }


def evaluate(
    model: TwoHeaded, criterion: Criterion, config: Config, data: Data, epochs: list[dict]
) -> Outcome:
    """The trained network's outcome: its last epoch, clustering, and its uncertainty if it has one.

    Retrieval, clustering and classification use the semantic embedding alone, as the paper does.
    """
    metric, batch_size = criterion.loss.metric, config.data.batch_size
    images, labels = data.test_images, data.test_labels
    sem, unc = embed(model, images, batch_size)

    def measure(images: Tensor) -> dict[str, Tensor]:
        return uncertainties(model, criterion, images, batch_size)

    damaged = corrupted(measure, images)
    results = record(model, criterion, config, data)
    retrieving = config.data.task == "retrieval"
    if retrieving:
        results |= clustering(sem, labels, seed=config.run.seed, starts=4)
        wrong, _ = wrong_answers(sem, labels)
    else:
        wrong = criterion.predict(sem) != labels
    found = {name: kinds["blur"][0] for name, kinds in damaged.items()}  # 0: the clean images
    table = uncertainty_table(
        found | ({"unc_norm": unc} if metric.reads_unc else {}),
        sem,
        labels,
        wrong=None if retrieving else wrong,
        corrupted=damaged,
        outside=measure(shuffled(images)),
        resamples=RESAMPLES,
        seed=config.run.seed,
    )
    norms = damaged.get("unc_norm", {})
    verdict = alive_or_dead(unc.norm(dim=1), norms) if metric.reads_unc else None
    measured = table.rows.get("unc_norm") or dict.fromkeys(table.rows["sem_norm"])
    # The mean over all epochs: once the loss is small, any gradient is.
    grads = [epoch["unc_grad_norm"] for epoch in epochs if metric.reads_unc]
    results |= {
        "unc_grad_norm": sum(grads) / len(grads) if grads else None,
        "unc_variation": None if verdict is None else verdict.variation,
        "unc_alive": None if verdict is None else float(verdict.alive),
        **{name: number and number.value for name, number in measured.items()},
        **{f"{name}_distance": number.value for name, number in table.distance.items()},
        **{f"error_auroc_{name}": table.rows[name]["error_auroc"].value for name in BASELINES},
    }
    return Outcome(metric, epochs, results, sem, unc, norms, found, wrong, table)
