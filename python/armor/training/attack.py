"""Projected gradient ascent in the linf ball, for training and evaluation.

Section 6 of docs/math.md, step 1. Called by step.py and evaluate.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    loss: str = "ce",
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x_adv of x's shape, |x_adv - x| <= eps and 0 <= x_adv <= 1 in every pixel, that raises the loss.

    x: float [n, ...] in [0, 1]; y: int64 [n]; n may be 0. loss: "ce" (cross-entropy) or "margin" (the
    largest other logit minus the label's). The start is uniform in the ball and the box, or x itself. The
    model is attacked in eval mode and left as it was; its parameters get no gradients.
    """
    if loss not in ("ce", "margin"):
        raise ValueError(f'loss must be "ce" or "margin", got {loss!r}')
    x = x.detach()
    low, high = (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
    x_adv = x
    if random_start:
        noise = torch.empty_like(x).uniform_(-eps, eps, generator=generator)
        x_adv = torch.clamp(x + noise, low, high)
    if x.numel() == 0:
        return x_adv
    with eval_mode(model), torch.enable_grad():
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv)
            # The sum, not the mean: sign steps ignore the scale, and no gradient underflows in a large batch.
            objective = F.cross_entropy(logits, y, reduction="sum") if loss == "ce" else margin(logits, y).sum()
            (gradient,) = torch.autograd.grad(objective, x_adv)
            x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), low, high)
    return x_adv


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest logit of another class minus the label's, [n]; positive where the model is wrong."""
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - own.squeeze(1)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and each one's own flag back afterwards.

    `model.train()` afterwards would wake up layers that the user froze on purpose.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
