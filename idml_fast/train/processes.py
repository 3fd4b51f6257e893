"""Several processes that learn together what one would: the shares of a whole, and the whole."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .. import backend
from .config import Config
from .criterion import SettingsError
from .folder import TENSORBOARD
from .tracking import log_with

if TYPE_CHECKING:
    from .model import TwoHeaded

# For which processes wait for the main one, which clusters and writes a report.
PATIENCE = timedelta(hours=12)


def accelerator_of(config: Config) -> Accelerator:
    """The device, the precision, the processes and the tracker of a run.

    Raises:
        SettingsError: there is no such precision on the device, or no such tracker.
    """
    cpu = stays_on_cpu(config)
    if cpu and config.run.mixed_precision == "fp16":
        raise SettingsError("run.mixed_precision must be no or bf16 on the CPU, got fp16")
    return Accelerator(
        mixed_precision=config.run.mixed_precision,
        cpu=cpu,
        log_with=log_with(config),
        project_dir=config.folder / TENSORBOARD,
        kwargs_handlers=[
            # Batch norms are frozen, or the same in all processes: there is nothing to broadcast.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


def stays_on_cpu(config: Config) -> bool:
    """Whether to train on the CPU: one says so, there is no GPU, or no kernel of ours serves it."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if config.run.cpu or device is None:
        return True
    if None in backend.refusals("pairwise", device).values():
        return False
    print(f"idml-fast: no kernel serves {device.type} here (see idml-fast doctor): using the CPU")
    return True


class Processes:
    """This process, or those that ``torchrun`` or ``accelerate launch`` has started.

    Of a whole, a batch or all images of the test, process ``r`` of ``n`` has the rows ``r, r + n,
    r + 2n, ...``: its share.

    Args:
        accelerator: of the run; it knows them.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main, self.device = accelerator.is_main_process, accelerator.device

    def prepare(
        self, model: TwoHeaded, optimizer: Optimizer
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        """The network as it learns in these processes, and its optimiser."""
        if self.count > 1 and any(learning_norms(model)):
            model.trunk.synchronise_norms()
        with warnings.catch_warnings():
            # torch 2.13 has another name for it, which accelerate does not know.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            return self.accelerator.prepare(model, optimizer)

    def share(self, total: int) -> Tensor:  # [ceil(total / count)]
        """The numbers of this process' rows of ``total``.

        All processes have as many: where there are too few, one of the first rows stands in for one
        that is missing, and `together` drops it again.
        """
        most = -(-total // self.count)
        return torch.arange(self.rank, most * self.count, self.count) % total

    def of(self, whole: Tensor) -> Tensor:
        """The rows of this process' `share`."""
        return whole[self.share(len(whole)).to(whole.device)]

    def together(
        self,
        share: Tensor,  # [ceil(total / count), ...]
        total: int,
    ) -> Tensor:  # [total, ...]
        """All rows, in order and the same in every process, of every one's share.

        The gradient of a share is that of its rows times the number of processes. If every process
        computes the same loss of the whole, the mean over the processes, which
        ``DistributedDataParallel`` takes of their parameters' gradients, is then the gradient of
        this loss.
        """
        if self.count == 1:
            return share
        return _Together.apply(share, total, self.rank, self.count)

    def any(self, told: bool) -> bool:
        """Whether any process is told so."""
        if self.count == 1:
            return told
        flag = torch.tensor(told, dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, on_cpu())
        return bool(flag)

    def of_main(self, value: Any) -> Any:
        """The main process' value, in every process."""
        return broadcast_object_list([value])[0] if self.count > 1 else value

    def wait(self) -> None:
        """For all processes to come here."""
        if self.count > 1:
            dist.barrier(on_cpu())

    @contextmanager
    def own_draws(self, *numbers: int) -> Iterator[None]:
        """Several processes draw other random numbers each, seeded by these, and afterwards again
        the same; one alone goes on as it would."""
        if self.count == 1:
            yield
            return
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type):
            seed = np.random.SeedSequence((*numbers, self.rank)).generate_state(1, np.uint64)
            torch.manual_seed(seed.item())
            yield

    def check_same(self, what: str, module: nn.Module) -> None:
        """What every process computes for itself is the same in all, to the last bit.

        Raises:
            RuntimeError: it is not.
        """
        if self.count == 1:
            return
        tensors = [x for x in module.state_dict().values() if x.numel()]
        tensors.append(torch.get_rng_state().to(self.device))
        found = torch.stack([torch.hash_tensor(x).view(torch.int64) for x in tensors])
        least, most = found.clone(), found
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise RuntimeError(
                f"{what} must be the same in all processes, got others: they run on different "
                "hardware or versions"
            )


@cache
def on_cpu() -> dist.ProcessGroup:
    """All processes, for what is decided on the CPU: a GPU need not catch up for it."""
    atexit.register(leave)
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def is_main() -> bool:
    """Whether this is the process that writes, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def leave() -> None:
    """The processes part: one that ends without it may abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def learning_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    """The batch norms that take their statistics from what they are given in training."""
    model.train()
    return (part for part in model.modules() if isinstance(part, _BatchNorm) and part.training)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share: Tensor, total: int, rank: int, count: int) -> Tensor:
        ctx.rank, ctx.count = rank, count
        parts = share.new_empty(count, *share.shape)
        dist.all_gather(list(parts), share.contiguous())
        return parts.transpose(0, 1).flatten(0, 1)[:total]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        missing = gradient.new_zeros(-len(gradient) % ctx.count, *gradient.shape[1:])
        return torch.cat([gradient, missing])[ctx.rank :: ctx.count] * ctx.count, None, None, None
