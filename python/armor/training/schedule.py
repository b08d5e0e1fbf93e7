"""The optimiser of the model and its learning rate over the steps of a run. Called by step.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from armor.training.config import ResolvedConfig

ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(config: ResolvedConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of all parameters of the model."""
    given = config.optimizer
    lr: Any = given.lr
    fixed: dict[str, Any] = {"weight_decay": given.weight_decay, "fused": True}
    if config.speed.cuda_graph:
        lr = torch.tensor(given.lr, device=config.device)  # a number would be part of the graph for good
    if given.name == "sgd":
        return torch.optim.SGD(model.parameters(), lr, momentum=given.momentum, nesterov=given.nesterov, **fixed)
    return ADAMS[given.name](model.parameters(), lr, capturable=config.speed.cuda_graph, **fixed)


def make_schedule(
    config: ResolvedConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear warm-up, then what the configuration says; to be stepped once per batch."""
    steps = config.epochs * steps_per_epoch
    warmup = max(1, round(config.optimizer.warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, falling(step))

    def falling(step: int) -> float:
        left = (steps - step) / max(1, steps - warmup + 1)
        match config.optimizer.schedule:
            case "linear":
                return left
            case "cosine":
                return (1 - math.cos(math.pi * min(1.0, left))) / 2
            case "piecewise":
                reached = [epoch for epoch in config.optimizer.drops if epoch <= step // steps_per_epoch + 1]
                return config.optimizer.drops[max(reached)] if reached else 1.0
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
