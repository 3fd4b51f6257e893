"""What a trained network is worth: the numbers of the table, and what the report draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

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
from .data import Data, batches, in_memory
from .model import TwoHeaded
from .processes import Processes

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
# The ranks at which the literature gives the Recall of a data set; of others: 1, 2, 4, 8.
RANKS = {"sop": (1, 10, 100, 1000), "inshop": (1, 10, 20, 30)}
# What every network has, whatever its loss and its metric, to set its uncertainty against.
BASELINES = ("sem_norm", "mc_dropout")
# Of the bootstrap and of MC-dropout: fewer than by default, since a run is not to wait for them.
RESAMPLES, PASSES = 200, 10
BLOCK = 2**26  # bytes of images that are damaged together


@dataclass
class Outcome:
    """A trained network on images that it has not seen.

    Args:
        metric: it was trained with.
        epochs: what was recorded after every epoch, as in ``metrics.jsonl``.
        results: the numbers of the table; None for what a metric without uncertainty lacks.
        sem: ``[M, Ds]`` on the CPU.
        unc: ``[M, Du]`` on the CPU.
        norms: ``||u||`` by corruption, ``[6, K]`` each, of the images of ``data.sampled``; empty if
            the metric does not read ``unc``.
        uncertainties: ``[M]`` by candidate, see `uncertainties`.
        wrong: ``[M]`` bool, whether the nearest image (or the class) is wrong.
        table: what the uncertainties know.
        sem2: ``[G, Ds]`` on the CPU, of the gallery; None: there is none.
        unc2: ``[G, Du]`` on the CPU, likewise.
        matched: ``[M]`` bool, whether there is another image of its class; None: nothing is
            retrieved.
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
    sem2: Tensor | None = None
    unc2: Tensor | None = None
    matched: Tensor | None = None


class Embedded(NamedTuple):
    """The test images as a network has embedded them, on the CPU."""

    sem: Tensor  # [M, Ds]
    unc: Tensor  # [M, Du]
    sem2: Tensor | None = None  # [G, Ds], of the gallery
    unc2: Tensor | None = None  # [G, Du]


def embed_all(
    model: TwoHeaded, config: Config, data: Data, processes: Processes | None = None
) -> Embedded:
    """The test images, and those of the gallery if there is one; each process embeds its share."""
    parts = [x for x in (data.test, data.gallery) if x is not None]
    found = [sharded(partial(embed, model), part, config, processes) for part in parts]
    return Embedded(*(x for pair in found for x in pair.values()))


def sharded(
    measure: Callable[[Iterable[Tensor]], dict[str, Tensor]],
    images: Dataset,
    config: Config,
    processes: Processes | None,
) -> dict[str, Tensor]:
    """``[len(images), ...]`` each on the CPU: what is measured of all images, given in batches, of
    which each process measures its share."""
    if processes is None:
        return measure(batches(images, config.data))
    total = len(images)
    found = measure(batches(images, config.data, processes.share(total)))
    device = processes.device
    return {name: processes.together(x.to(device), total).cpu() for name, x in found.items()}


@torch.no_grad()
def embed(
    model: TwoHeaded,
    images: Iterable[Tensor],  # [n, channels, height, width] each
) -> dict[str, Tensor]:
    """``sem [M, Ds]`` and ``unc [M, Du]`` on the CPU of batches of images, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = [[x.cpu() for x in model(batch.to(device))] for batch in images]
    sem, unc = zip(*parts, strict=True)
    return {"sem": torch.cat(sem), "unc": torch.cat(unc)}


@torch.no_grad()
def uncertainties(
    model: TwoHeaded,
    criterion: Criterion,
    images: Iterable[Tensor],  # [n, channels, height, width] each
) -> dict[str, Tensor]:
    """``[M]`` on the CPU for each candidate, larger for a less certain image; of batches of images.

    ``unc_norm`` is ``||u||``, if the metric reads it; the others are its baselines. Those of a
    loss with proxies ask the proxies as that loss does, without uncertainties: scaled by its own
    ``softmax_scale``, or Proxy-Anchor's ``alpha``.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = [_uncertainties(model, criterion, batch.to(device)) for batch in images]
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


def record(
    model: TwoHeaded, criterion: Criterion, config: Config, data: Data, processes: Processes
) -> dict:
    """What is worth a line after every epoch: see `quality`; the main process has it."""
    embedded = embed_all(model, config, data, processes)
    return quality(embedded, criterion, config, data) if processes.is_main else {}


def quality(embedded: Embedded, criterion: Criterion, config: Config, data: Data) -> dict:
    """How good unseen images come out, and ``||u||``."""
    sem, unc, sem2, _ = embedded
    if config.data.task == "classification":
        right = criterion.predict(sem) == data.test_labels
        found = {"top_1": right.double().mean().item()}
    else:
        ks = RANKS.get(config.data.name, (1, 2, 4, 8))
        values = retrieval(sem, data.test_labels, sem2, data.gallery_labels, ks=ks).values
        found = {name: x for name, x in values.items() if not name.startswith("precision")}
    norm = unc.norm(dim=1) if criterion.loss.metric.reads_unc else None
    return {
        **found,
        "unc_norm_mean": None if norm is None else norm.mean().item(),
        "unc_norm_std": None if norm is None else norm.std().item(),
    }


def evaluate(
    model: TwoHeaded,
    criterion: Criterion,
    config: Config,
    data: Data,
    epochs: list[dict],
    processes: Processes,
) -> Outcome | None:
    """The trained network's outcome: its last epoch, clustering, and its uncertainty if it has one.

    Retrieval, clustering and classification use the semantic embedding alone, as the paper does.
    What becomes of damaged and of foreign images is measured with those of ``data.sampled``. All
    processes embed the images; what is left is the main process' to do, and its to have.
    """
    metric, labels, labels2 = criterion.loss.metric, data.test_labels, data.gallery_labels
    embedded = embed_all(model, config, data, processes)
    found, others = (
        None
        if part is None
        else sharded(partial(uncertainties, model, criterion), part, config, processes)
        for part in (data.test, data.gallery)
    )
    if not processes.is_main:
        return None
    sem, unc, sem2, unc2 = embedded
    results = quality(embedded, criterion, config, data)
    if config.data.task == "retrieval":
        results |= clustering(sem, labels, seed=config.run.seed, starts=4)
        wrong, matched = wrong_answers(sem, labels, sem2, labels2)
    else:
        wrong, matched = criterion.predict(sem) != labels, None
    damaged, foreign = made_worse(model, criterion, config, data)
    # Of a pair both embeddings count, not only how long they are.
    whole = {"unc_norm": unc} if metric.reads_unc else {}
    whole2 = {"unc_norm": unc2} if metric.reads_unc else {}
    table = uncertainty_table(
        found | whole,
        sem,
        labels,
        sem2,
        labels2,
        None if others is None else others | whole2,
        wrong=None if matched is not None else wrong,
        corrupted=damaged,
        outside=foreign,
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
    shown = sem, unc, norms, found, wrong, table
    return Outcome(metric, epochs, results, *shown, sem2=sem2, unc2=unc2, matched=matched)


def made_worse(
    model: TwoHeaded, criterion: Criterion, config: Config, data: Data
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """`uncertainties` of the images of ``data.sampled``: ``[6, K]`` by candidate and corruption, as
    `corrupted` gives them, and ``[K]`` by candidate once they are `shuffled`.

    A block of images at a time; what a corruption draws at random is the same in each.
    """
    device = next(model.parameters()).device  # a GPU damages images faster, too
    size = max(1, BLOCK // (4 * math.prod(data.shape)))
    parts, foreign = [], []

    def measure(images: Tensor) -> dict[str, Tensor]:
        return uncertainties(model, criterion, images.split(config.data.batch_size))

    for places in data.sampled.split(size):
        images = in_memory(data.test, config.data, places).to(device)
        parts.append(corrupted(measure, images))
        foreign.append(measure(shuffled(images)))
    damaged = {
        name: {kind: torch.cat([part[name][kind] for part in parts], dim=1) for kind in kinds}
        for name, kinds in parts[0].items()
    }
    return damaged, {name: torch.cat([part[name] for part in foreign]) for name in foreign[0]}
