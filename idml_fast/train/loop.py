"""The training loop: two metrics, one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from .._files import write_text
from ..metric import Metric
from .checkpoint import Checkpoints, Training, remove_checkpoints, signals
from .config import Config
from .criterion import Criterion, SettingsError
from .data import BatchSampler, Data, load_data, loader
from .folder import open_folder, to_json
from .images import Images, to_float
from .mixing import mix
from .model import TwoHeaded, save
from .optim import adamw
from .outcome import Outcome, evaluate, record
from .processes import Processes, accelerator_of, learning_norms
from .report import text_table, uncertainty_text, write_report
from .tracking import Progress, log, tracked


def run(config: Config) -> dict[str, dict[str, float | None]]:
    """Train with the conventional and with the introspective metric, evaluate, and write it all.

    ``<folder>/<name>/`` then holds ``config.yaml``, ``metrics.jsonl`` (a line an epoch and metric),
    ``results.json`` (the table), ``uncertainty.json`` (that of ``||u||`` and its baselines, with
    intervals), a ``.safetensors`` model for either metric and ``report.html``.
    What is evaluated and saved is the network after its last epoch, never the best on test classes.

    A run that is stopped, by SIGTERM or SIGINT after the step at hand, or killed at any time, goes
    on from its newest checkpoint when it is called again, and ends as if nothing had happened.

    Several processes, of ``torchrun`` or ``accelerate launch``, learn together what one would; the
    main one writes.

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
    processes = Processes(accelerator_of(config))
    data = load_data(config.data, config.run.seed)
    check(config, data, processes)  # or a refusal, and nothing is written
    if processes.is_main:
        open_folder(config)
        for remark in data.remarks:
            print(f"idml-fast: {remark}")
    processes.wait()  # for the folder
    lines: list[dict] = []
    outcomes: dict[str, Outcome] = {}

    def on_epoch(line: dict) -> None:
        lines.append(line)
        write_text(config.folder / "metrics.jsonl", "".join(f"{to_json(x)}\n" for x in lines))

    for name, metric in config.metrics.items():
        checkpoints = Checkpoints(config, data, name, processes)
        with tracked(processes.accelerator, config, name):
            trained = train(
                processes, config, data, name, metric, on_epoch, checkpoints=checkpoints
            )
        epochs = [line for line in lines if line["metric"] == name]
        outcome = evaluate(*trained, config, data, epochs, processes)
        if outcome is not None:
            outcomes[name] = outcome
            save(*trained, config.folder / f"{name}.safetensors")
        processes.accelerator.free_memory()

    results = {name: outcome.results for name, outcome in outcomes.items()}
    if processes.is_main:
        write_text(config.folder / "results.json", to_json(results, indent=2) + "\n")
        tables = {name: asdict(outcome.table) for name, outcome in outcomes.items()}
        write_text(config.folder / "uncertainty.json", to_json(tables, indent=2) + "\n")
        seconds = time.perf_counter() - start
        write_report(config.folder / "report.html", config, data, outcomes, seconds)
        remove_checkpoints(config)
        print(f"\n{text_table(results)}\n\n{uncertainty_text(outcomes)}")
        print(f"\n{config.folder / 'report.html'}")
    processes.wait()  # for what is written
    return results


def train(
    processes: Processes,
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
    seed alone, so that two metrics start from the same place. Several processes share each batch,
    and every one computes the loss of the whole: they learn what one process would. Only the main
    one calls ``on_epoch``.

    Args:
        name: of the metric.
        watch: evaluate after every epoch, and show a progress bar.
        checkpoints: go on from the newest of them, and write more; None: neither, and signals are
            not waited for. ``on_epoch`` gets the records of earlier epochs again.

    Raises:
        FloatingPointError: the loss is no longer finite.
        Interrupted: SIGTERM or SIGINT has come.
        RunError: the newest checkpoint is damaged, or of another run.
    """
    accelerator, run = processes.accelerator, config.run
    set_seed(run.seed)
    model, criterion = build(config, data, metric)
    criterion.to(processes.device)
    optimizer, schedule = adamw(config.optim, model, criterion)
    order = torch.Generator().manual_seed(run.seed)
    sampler = BatchSampler(data.train_labels, config.data, order, processes)
    batches = loader(data.train, config.data, batch_sampler=sampler, persistent=True)
    draws = np.random.default_rng(run.seed)
    # The loss is not among them: every process computes the same one, of the whole batch.
    network, optimizer = processes.prepare(model, optimizer)
    training = Training(model, criterion, optimizer, schedule, accelerator.scaler, order, draws)
    found = checkpoints and checkpoints.resume(training)
    shown = processes.is_main and watch
    if processes.is_main:
        for line in training.records:
            on_epoch(line)
    if found and shown and training.epoch <= config.optim.epochs:
        print(f"idml-fast: going on from {found}")
    done = (training.epoch - 1) * sampler.total + training.step * config.data.batch_size
    progress = Progress(name, config.optim.epochs, sampler.total, done, shown)
    with progress.bar, nullcontext([]) if checkpoints is None else signals() as came:
        for epoch in range(training.epoch, config.optim.epochs + 1):
            network.train()
            if isinstance(data.train, Images):
                data.train.reseed(run.seed, epoch)
            sampler.done = training.step
            for images, labels, *_ in progress.epoch(epoch, batches):
                total = sampler.size_of(training.step)
                batch = [x.to(processes.device, non_blocking=True) for x in (images, labels)]
                told = learn(network, *batch, total, config, training, processes)
                training.end_step(told)
                progress.step(total, told[0])
                if checkpoints is not None:
                    checkpoints.keep_up(training, came)
            schedule.step()
            mean, sem_grad, *unc_grad = torch.stack(training.steps).mean(dim=0).tolist()
            rates = progress.rates()
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} in epoch {epoch}; lower optim.lr")
            processes.check_same("the loss' parameters", criterion)
            values = record(model, criterion, config, data, processes) if watch else {}
            if processes.is_main:
                line = {
                    "metric": name,
                    "epoch": epoch,
                    "loss": mean,
                    "sem_grad_norm": sem_grad,
                    "unc_grad_norm": unc_grad[0] if unc_grad else None,
                    **values,
                }
                training.records.append(line)
                on_epoch(line)
                log(accelerator, config, line | rates)
                short = {"recall_at_1": "R@1", "top_1": "top-1"}
                quality = {short[key]: f"{values[key]:.1%}" for key in short if key in values}
                progress.tell(loss=f"{mean:.3f}", wait=f"{rates['data_wait']:.0%}", **quality)
            training.end_epoch()
            if checkpoints is not None:
                checkpoints.keep_up(training, came, due=True)
    return model, criterion


def build(config: Config, data: Data, metric: Metric) -> tuple[TwoHeaded, Criterion]:
    """The network and its loss with that metric, as they are before they learn anything.

    Raises:
        SettingsError: the network, its weights or the loss does not fit the data set.
    """
    channels, *size = data.shape
    model = TwoHeaded(config.model, channels, size)
    model.unc.requires_grad_(metric.reads_unc)
    model.parts = config.optim.accumulation
    if config.run.compile:
        # Not Module.compile(), which leaves a network alone whose class is one of PyTorch's.
        model.trunk.forward = torch.compile(model.trunk.forward)
    return model, config.criterion(metric, data.num_classes)


def check(config: Config, data: Data, processes: Processes) -> None:
    """Build a network as a trial.

    Raises:
        SettingsError: the network, its weights, its batch norms or the loss does not fit the data
            set, or how the batch is cut up.
    """
    model, _ = build(config, data, config.metrics["introspective"])
    if config.data.batch_size < processes.count:
        raise SettingsError(
            f"data.batch_size must be at least the number of processes, {processes.count}, "
            f"got {config.data.batch_size}"
        )
    if not any(learning_norms(model)):
        return
    learn = f"the batch norms of {config.model.backbone} learn (model.freeze_norm false)"
    if config.optim.accumulation > 1:
        raise SettingsError(
            f"optim.accumulation must be 1 where {learn}: they would see the parts of a batch "
            f"instead of the batch, got {config.optim.accumulation}"
        )
    if processes.count > 1 and processes.device.type == "cpu":
        raise SettingsError(
            f"there must be one process on the CPU where {learn}: they would see the share of a "
            f"process instead of the batch, got {processes.count}"
        )


def learn(
    network: nn.Module,
    images: Tensor,  # [share, channels, height, width]
    labels: Tensor,  # [share]
    total: int,
    config: Config,
    training: Training,
    processes: Processes,
) -> Tensor:  # [2] or [3]
    """A step: the loss of a batch, see `batch_loss`, and the length of its gradient at the weights
    of each head that learns."""
    model, criterion, accelerator = training.model, training.criterion, processes.accelerator
    value, seen = batch_loss(network, images, labels, total, config, training, processes)
    accelerator.backward(value)
    parameters = [*model.parameters(), *criterion.parameters()]
    accelerator.clip_grad_value_(parameters, config.optim.clip)
    # The conventional metric gives the uncertainty head nothing to learn from.
    heads = (model.sem, model.unc) if criterion.loss.metric.reads_unc else (model.sem,)
    grads = [head.weight.grad.norm() for head in heads]
    training.optimizer.step()
    training.optimizer.zero_grad()
    if criterion.bank is not None and training.epoch >= config.loss.memory_epoch:
        criterion.bank.add(*seen)
    return torch.stack([value.detach(), *grads])


def batch_loss(
    network: nn.Module,
    images: Tensor,  # [share, channels, height, width]
    labels: Tensor,  # [share]
    total: int,
    config: Config,
    training: Training,
    processes: Processes,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss of a batch of ``total`` images, of which this process has its share, mixed if the
    configuration says so, and what a memory bank keeps of it: ``(sem, unc, labels)`` of all.

    Of mixed images ``L(mixed) = lam L(mixed, y_a) + (1 - lam) L(mixed, y_b)``. Classifying, that is
    the loss (and the embeddings are those of the mixed images); retrieving it is ``L(images, y) +
    L(mixed)``, as the paper trains.
    """
    loss = training.criterion
    labels = processes.together(labels, total)

    def embed(share: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        with processes.own_draws(config.run.seed, training.total, passes):
            embedded = network(to_float(share))
        return tuple(processes.together(x, total) for x in embedded)

    if config.mix == "none":
        embedded = embed(images, 0)
        return loss(*embedded, labels), (*embedded, labels)
    whole = to_float(processes.together(images, total))
    mixed = mix(config.mix, whole, labels, config.mix_alpha, training.draws)
    embedded = embed(processes.of(mixed.images), 0)
    a, b = loss(*embedded, mixed.labels_a), loss(*embedded, mixed.labels_b)
    value = mixed.lam * a + (1 - mixed.lam) * b
    if config.data.task == "retrieval":
        embedded = embed(images, 1)
        value = value + loss(*embedded, labels)
    return value, (*embedded, labels)
