"""One training step, top to bottom: attack, forward, objective, update (docs/math.md, section 6).

`make_state` builds what a step changes; loop.py calls `train_step` once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from armor.attacks import pgd
from armor.ops import cross_entropy, dc_loss
from armor.training import models
from armor.training.config import DualConfig, ResolvedConfig

# One independent stream of random numbers per use, so that the two methods of a pair, which differ in the
# objective alone, meet the same initial weights, batches and attack noise.
STREAMS = ("split", "setting", "weights", "batches", "noise", "evaluate", "samples")


@dataclass
class TrainState:
    """All that a step reads and changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    batches: torch.Generator
    noise: torch.Generator
    attack_warmup: int  # steps until the attack has its full radius


def train_step(state: TrainState, x: Tensor, y: Tensor, config: ResolvedConfig, dual: DualConfig | None) -> Tensor:
    """Updates the state on one batch; returns [objective, mean loss, lambda, effective sample share].

    dual None is the uniform-weight control, whose objective is the mean: lambda is NaN and the share 1.
    The result stays on the device, so that a step never waits for it.
    """
    strength = min(1.0, (state.schedule.last_epoch + 1) / max(1, state.attack_warmup))
    attack = pgd(strength * config.eps, config.attack.steps, strength * config.step_size)
    x_adv = attack(state.model, x, y, generator=state.noise)
    losses = cross_entropy(state.model(x_adv), y)
    if dual is None:
        objective = losses.mean()
        lam, share = losses.new_full((), float("nan")), losses.new_ones(())
    else:
        objective, result = dc_loss(losses, **vars(dual), return_dual=True)
        lam, share = result.lam, effective_share(result.weights)

    state.optimizer.zero_grad(set_to_none=True)
    objective.backward()
    state.optimizer.step()
    state.schedule.step()
    return torch.stack([objective.detach(), losses.detach().mean(), lam.to(losses.dtype), share])


def make_state(config: ResolvedConfig, seed: int, steps: int) -> TrainState:
    """Model, optimiser, schedule over `steps` and generators of a run with this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights"))
        model = models.build_default(config.data)
    model = model.to(config.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    warmup = max(1, round(config.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))
    )
    return TrainState(
        model,
        optimizer,
        schedule,
        batches=stream(seed, "batches"),
        noise=stream(seed, "noise", config.device),
        attack_warmup=round((config.attack.warmup or 0) * steps),
    )


def effective_share(weights: Tensor) -> Tensor:
    """Effective sample size 1 / sum(w^2) over n: 1 for uniform weights, 1/n if one sample has it all."""
    return 1 / (weights.square().sum() * weights.numel())


def stream(seed: int, use: str, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(stream_seed(seed, use))


def stream_seed(seed: int, use: str) -> int:
    return int(np.random.SeedSequence([seed, STREAMS.index(use)]).generate_state(1, np.uint64)[0] >> 1)
