"""What a trained network is worth: the numbers of the table, and what the report draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation import clustering, corrupted_norms, retrieval, severity_correlation
from ..metric import Metric
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
    """

    metric: Metric
    epochs: list[dict]
    results: dict[str, float | None]
    sem: Tensor
    unc: Tensor
    norms: dict[str, Tensor]


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


def record(model: TwoHeaded, criterion: Criterion, config: Config, data: Data) -> dict:
    """What is worth a line after every epoch: how good unseen images come out, and ``||u||``."""
    sem, unc = embed(model, data.test_images, config.data.batch_size)
    if config.data.task == "classification":
        right = criterion.predict(sem) == data.test_labels
        quality = {"top_1": right.double().mean().item()}
    else:
        quality = retrieval(sem, data.test_labels).values
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
    metric = criterion.loss.metric
    sem, unc = embed(model, data.test_images, config.data.batch_size)
    norms = {}
    if metric.reads_unc:
        norms = corrupted_norms(
            lambda images: embed(model, images, config.data.batch_size), data.test_images
        )
    results = record(model, criterion, config, data)
    if config.data.task == "retrieval":
        results |= clustering(sem, data.test_labels, seed=config.run.seed, starts=4)
    # The mean over all epochs: once the loss is small, any gradient is.
    grads = [epoch["unc_grad_norm"] for epoch in epochs if metric.reads_unc]
    results |= {
        "unc_grad_norm": sum(grads) / len(grads) if grads else None,
        **{
            f"spearman_{name}": severity_correlation(norms[name]) if norms else None
            for name in ("blur", "noise", "occlusion")
        },
    }
    return Outcome(metric, epochs, results, sem, unc, norms)
