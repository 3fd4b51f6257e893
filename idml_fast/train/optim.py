"""The optimiser and its schedule."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from .config import OptimConfig
from .model import TwoHeaded


def adamw(config: OptimConfig, model: TwoHeaded, loss: nn.Module) -> tuple[AdamW, LambdaLR]:
    """AdamW and a schedule to be stepped once an epoch.

    Three groups learn: the trunk, the two heads, and what the loss learns at ``proxy_lr`` times
    the rate. All fall by ``decay`` every ``step`` epochs; during the warm-up the trunk's rate is 0.
    """
    heads = [*model.sem.parameters(), *model.unc.parameters()]
    groups = [
        {"params": model.trunk.parameters()},
        {"params": heads},
        {"params": loss.parameters(), "lr": config.lr * config.proxy_lr},
    ]

    def stepped(epoch: int) -> float:
        return config.decay ** (epoch // config.step)

    def warmed_up(epoch: int) -> float:
        return stepped(epoch) if epoch >= config.warmup_epochs else 0.0

    optimizer = AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer, LambdaLR(optimizer, [warmed_up, stepped, stepped])
