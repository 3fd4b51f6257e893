"""The training loop: two metrics, one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from .. import backend
from ..metric import Metric
from .checkpoint import Checkpoints, Training, remove_checkpoints, signals
from .config import Config
from .criterion import Criterion
from .data import Data, load_data, loader
from .folder import open_folder, to_json, write_text
from .images import Images
from .mixing import mix
from .model import TwoHeaded, save
from .optim import adamw
from .outcome import Outcome, evaluate, record
from .report import text_table, uncertainty_text, write_report


def run(config: Config) -> dict[str, dict[str, float | None]]:
    """Train with the conventional and with the introspective metric, evaluate, and write it all.

    ``<folder>/<name>/`` then holds ``config.yaml``, ``metrics.jsonl`` (a line an epoch and metric),
    ``results.json`` (the table), ``uncertainty.json`` (that of ``||u||`` and its baselines, with
    intervals), a ``.safetensors`` model for either metric and ``report.html``.
    What is evaluated and saved is the network after its last epoch, never the best on test classes.

    A run that is stopped, by SIGTERM or SIGINT after the step at hand, or killed at any time, goes
    on from its newest checkpoint when it is called again, and ends as if nothing had happened.

    Returns:
        The results of ``conventional`` and ``introspective`` (in the main process); None for what a
        metric without uncertainty lacks.

    Raises:
        FileExistsError: the folder holds another run.
        FloatingPointError: the loss is no longer finite.
        Interrupted: SIGTERM or SIGINT has come.
        RunError: the newest checkpoint is damaged, or of another run.
        idml_fast.train.datasets.DataError: the data set, or an image, is not as it should be.
        SettingsError: the network, or its weights, cannot be had.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.run.threads or threads)
    try:
        return _run(config)
    finally:
        torch.set_num_threads(threads)


def _run(config: Config) -> dict[str, dict[str, float | None]]:
    start = time.perf_counter()
    accelerator = Accelerator(mixed_precision=config.run.mixed_precision, cpu=stays_on_cpu(config))
    data = load_data(config.data, config.run.seed)
    build(config, data, config.metrics["introspective"])  # or a refusal, and nothing is written
    if accelerator.is_main_process:
        open_folder(config)
        for remark in data.remarks:
            print(f"idml-fast: {remark}")
    lines: list[dict] = []
    outcomes: dict[str, Outcome] = {}

    def on_epoch(line: dict) -> None:
        lines.append(line)
        write_text(config.folder / "metrics.jsonl", "".join(f"{to_json(x)}\n" for x in lines))

    for name, metric in config.metrics.items():
        # Of several processes each has random numbers and a memory bank of its own.
        alone = accelerator.num_processes == 1
        checkpoints = Checkpoints(config, data, name) if alone else None
        model, criterion = train(
            accelerator, config, data, name, metric, on_epoch, checkpoints=checkpoints
        )
        if accelerator.is_main_process:
            epochs = [line for line in lines if line["metric"] == name]
            outcomes[name] = evaluate(model, criterion, config, data, epochs)
            save(model, criterion, config.folder / f"{name}.safetensors")
        accelerator.free_memory()

    results = {name: outcome.results for name, outcome in outcomes.items()}
    if accelerator.is_main_process:
        write_text(config.folder / "results.json", to_json(results, indent=2) + "\n")
        tables = {name: asdict(outcome.table) for name, outcome in outcomes.items()}
        write_text(config.folder / "uncertainty.json", to_json(tables, indent=2) + "\n")
        seconds = time.perf_counter() - start
        write_report(config.folder / "report.html", config, data, outcomes, seconds)
        remove_checkpoints(config)
        print(f"\n{text_table(results)}\n\n{uncertainty_text(outcomes)}")
        print(f"\n{config.folder / 'report.html'}")
    return results


def stays_on_cpu(config: Config) -> bool:
    """Whether to train on the CPU: the configuration says so, or no kernel serves the GPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if config.run.cpu or device is None:
        return config.run.cpu
    if None in backend.refusals("pairwise", device).values():
        return False
    print(f"idml-fast: no kernel serves {device.type} here (see idml-fast doctor): using the CPU")
    return True


def train(
    accelerator: Accelerator,
    config: Config,
    data: Data,
    name: str,
    metric: Metric,
    on_epoch: Callable[[dict], None],
    watch: bool = True,
    checkpoints: Checkpoints | None = None,
) -> tuple[TwoHeaded, Criterion]:
    """Train one network with one metric; ``on_epoch`` gets the record of every epoch.

    The network, its first weights, the order of the images and how they are mixed depend on the
    seed alone, so that two metrics start from the same place. Only the main process evaluates and
    calls ``on_epoch``.

    Args:
        watch: evaluate after every epoch, and show a progress bar.
        checkpoints: go on from the newest of them, and write more; None: neither, and signals are
            not waited for. ``on_epoch`` gets the records of earlier epochs again.

    Raises:
        FloatingPointError: the loss is no longer finite.
        Interrupted: SIGTERM or SIGINT has come.
        RunError: the newest checkpoint is damaged, or of another run.
    """
    set_seed(config.run.seed)
    model, criterion = build(config, data, metric)
    optimizer, schedule = adamw(config.optim, model, criterion)
    order = torch.Generator().manual_seed(config.run.seed)
    batches = loader(data.train, config.data, order, shuffle=True)
    draws = np.random.default_rng(config.run.seed)
    network, loss, optimizer, batches = accelerator.prepare(model, criterion, optimizer, batches)
    # The conventional metric gives the uncertainty head nothing to learn from.
    heads = (model.sem, model.unc) if metric.reads_unc else (model.sem,)
    parameters = [*network.parameters(), *loss.parameters()]
    training = Training(model, criterion, optimizer, schedule, accelerator.scaler, order, draws)
    found = checkpoints and checkpoints.resume(training)
    for line in training.records:
        on_epoch(line)
    # One bar, and none where there is no terminal (None).
    hidden = None if accelerator.is_main_process and watch else True
    if found and not hidden and training.epoch <= config.optim.epochs:
        print(f"idml-fast: going on from {found}")
    progress = tqdm(
        range(training.epoch, config.optim.epochs + 1),
        name,
        total=config.optim.epochs,
        initial=training.epoch - 1,
        unit="epoch",
        disable=hidden,
    )
    with nullcontext([]) if checkpoints is None else signals() as came:
        for epoch in progress:
            network.train()
            if isinstance(data.train, Images):
                data.train.seed = config.run.seed, epoch
            for images, labels, *_ in skip_first_batches(batches, training.step):
                value, embedded = batch_loss(network, loss, images, labels, config, draws)
                accelerator.backward(value)
                accelerator.clip_grad_value_(parameters, config.optim.clip)
                grads = [head.weight.grad.norm() for head in heads]
                optimizer.step()
                optimizer.zero_grad()
                if criterion.bank is not None and epoch >= config.loss.memory_epoch:
                    criterion.bank.add(*embedded, labels)
                training.end_step(torch.stack([value.detach(), *grads]))
                if checkpoints is not None:
                    checkpoints.keep_up(training, came)
            schedule.step()
            mean, sem_grad, *unc_grad = torch.stack(training.steps).mean(dim=0).tolist()
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} in epoch {epoch}; lower optim.lr")
            if accelerator.is_main_process:
                seen = record(model, criterion, config, data) if watch else {}
                line = {
                    "metric": name,
                    "epoch": epoch,
                    "loss": mean,
                    "sem_grad_norm": sem_grad,
                    "unc_grad_norm": unc_grad[0] if unc_grad else None,
                    **seen,
                }
                training.records.append(line)
                on_epoch(line)
                shown = {"recall_at_1": "R@1", "top_1": "top-1"}
                quality = {shown[key]: f"{seen[key]:.1%}" for key in shown if key in seen}
                progress.set_postfix({"loss": f"{mean:.3f}", **quality})
            training.end_epoch()
            if checkpoints is not None:
                checkpoints.keep_up(training, came, due=True)
    return model, criterion


def build(config: Config, data: Data, metric: Metric) -> tuple[TwoHeaded, Criterion]:
    """The network and its loss, as they are before they learn anything.

    Raises:
        SettingsError: the network, its weights or the loss does not fit the data set.
    """
    channels, *size = data.shape
    model = TwoHeaded(config.model, channels, size)
    model.unc.requires_grad_(metric.reads_unc)
    return model, config.criterion(metric, data.num_classes)


def batch_loss(
    network: nn.Module,
    loss: nn.Module,
    images: Tensor,  # [N, channels, height, width]
    labels: Tensor,  # [N]
    config: Config,
    draws: np.random.Generator,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss of a batch, mixed if the configuration says so, and ``(sem, unc)`` of its images.

    Of mixed images ``L(mixed) = lam L(mixed, y_a) + (1 - lam) L(mixed, y_b)``. Classifying, that is
    the loss (and the embeddings are those of the mixed images); retrieving it is ``L(images, y) +
    L(mixed)``, as the paper trains.
    """
    if config.mix == "none":
        embedded = network(images)
        return loss(*embedded, labels), embedded
    mixed = mix(config.mix, images, labels, config.mix_alpha, draws)
    embedded = network(mixed.images)
    a, b = loss(*embedded, mixed.labels_a), loss(*embedded, mixed.labels_b)
    value = mixed.lam * a + (1 - mixed.lam) * b
    if config.data.task == "retrieval":
        embedded = network(images)
        value = value + loss(*embedded, labels)
    return value, embedded
