"""What a final model is judged by: clean, FGSM, PGD and margin-loss PGD accuracy, and the worst class.

PGD on cross-entropy alone flatters re-weighted models, so `robust` asks a sample to survive both attacks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from armor.attacks import fgsm, modes, pgd
from armor.training.data import CLASSES, Samples

METRICS = ("clean", "fgsm", "pgd", "margin", "robust", "worst_class")
BATCH = 256


def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    eps: float,
    steps: int,
    generator: torch.Generator,
    progress: Callable[[int], object] = lambda images: None,
) -> dict[str, float]:
    """Share of the samples classified rightly, per metric of METRICS.

    pgd and margin take `steps` sign steps of eps/10 from a random start in the ball; a sample is robust if
    it survives both; worst_class is the robust share of the worst class that occurs.
    """
    attacks = {
        "fgsm": fgsm(eps),
        "pgd": pgd(eps, steps, eps / 10),
        "margin": pgd(eps, steps, eps / 10, loss="margin"),
    }
    right: dict[str, list[Tensor]] = {name: [] for name in ("clean", *attacks)}
    for start in range(0, len(samples), BATCH):
        batch = samples[slice(start, start + BATCH)]
        right["clean"].append(correct(model, batch.x, batch.y))
        progress(len(batch))
        for name, attack in attacks.items():
            x_adv = attack(model, batch.x, batch.y, generator=generator)
            right[name].append(correct(model, x_adv, batch.y))
            progress(len(batch) * attack.steps)
    survived = {name: torch.cat(parts).cpu() for name, parts in right.items()}
    survived["robust"] = survived["pgd"] & survived["margin"]
    accuracy = {name: flags.double().mean().item() for name, flags in survived.items()}

    y = samples.y.cpu()
    accuracy["worst_class"] = min(
        survived["robust"][y == label].double().mean().item() for label in range(CLASSES) if (y == label).any()
    )
    return {name: accuracy[name] for name in METRICS}


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Bool [n]: which samples the model, in eval mode, classifies as y."""
    with modes(model):
        return model(x).argmax(1) == y


def image_passes(samples: int, steps: int) -> int:
    """What `evaluate` reports to `progress` in all."""
    return samples * (2 * steps + 2)
