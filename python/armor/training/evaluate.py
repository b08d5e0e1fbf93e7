"""What a final model is judged by: clean accuracy, one-step, PGD and margin-loss PGD accuracy, and the worst class.

PGD on cross-entropy alone flatters re-weighted models, so `robust` asks a sample to survive both attacks. Called by
loop.py after training and by judge.py for models that are on disk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from armor.attacks import Transport, modes
from armor.ops.transport import draw_seeds
from armor.training.config import Norm, attack_in
from armor.training.data import Part

METRICS = ("clean", "fgsm", "pgd", "margin", "robust", "worst_class")
BATCH = 256


def evaluate(
    model: nn.Module,
    samples: Part,
    *,
    norm: Norm = "linf",
    eps: float,
    steps: int,
    step_size: float | None = None,
    generator: torch.Generator,
    progress: Callable[[int], object] = lambda images: None,
    batch_size: int = BATCH,
) -> dict[str, float]:
    """Share of the samples classified rightly, per metric of METRICS.

    samples: anything with a length whose slices have x and y; they are moved to the generator's device, on which the
    model is. norm: linf, l2, l1 or binary; the ball has radius eps, of binary only fgsm's step. fgsm is one step of eps
    from the sample itself; pgd and margin take `steps` steps of `step_size` (default: eps / 10), from a random start in
    the ball or, binary, from the sample. A sample is robust if it survives both; worst_class is the robust share of the
    worst class that occurs. The noise of a sample does not depend on batch_size. progress is told how many images went
    through the model, `image_passes` in all.

    Raises: ValueError if there are no samples.
    """
    if len(samples) == 0:
        raise ValueError("there are no samples to evaluate on")
    attacks = _attacks(norm, eps, steps, eps / 10 if step_size is None else step_size)
    random = [name for name, attack in attacks.items() if attack.start != "clean" or norm == "binary"]
    seeds = _seeds(len(samples), random, generator)
    labels: list[Tensor] = []
    right: dict[str, list[Tensor]] = {name: [] for name in ("clean", *attacks)}
    for start in range(0, len(samples), batch_size):
        part = slice(start, start + batch_size)
        batch = samples[part]
        x, y = batch.x.to(generator.device), batch.y.to(generator.device)
        labels.append(y)
        right["clean"].append(correct(model, x, y))
        progress(len(y))
        for name, attack in attacks.items():
            own = seeds[name][part] if name in seeds else None
            right[name].append(correct(model, attack(model, x, y, seeds=own), y))
            progress(len(y) * attack.steps)
    # Read here, once: until then nothing has waited for the device.
    survived = {name: torch.cat(parts).cpu() for name, parts in right.items()}
    survived["robust"] = survived["pgd"] & survived["margin"]
    accuracy = {name: flags.double().mean().item() for name, flags in survived.items()}

    _, members = torch.cat(labels).cpu().unique(return_inverse=True)
    robust = torch.bincount(members, weights=survived["robust"].double()) / torch.bincount(members)
    accuracy["worst_class"] = robust.min().item()
    return {name: accuracy[name] for name in METRICS}


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Bool [n]: which samples the model, in eval mode, classifies as y."""
    with modes(model):
        return model(x).argmax(1) == y


def image_passes(samples: int, steps: int) -> int:
    """What `evaluate` reports to `progress` in all."""
    return samples * (2 * steps + 2)


def _attacks(norm: Norm, eps: float, steps: int, step_size: float) -> dict[str, Transport]:
    return {
        "fgsm": attack_in(norm, eps, 1, eps, start="clean"),
        "pgd": attack_in(norm, eps, steps, step_size),
        "margin": attack_in(norm, eps, steps, step_size, loss="margin"),
    }


def _seeds(count: int, attacks: list[str], generator: torch.Generator) -> dict[str, Tensor]:
    """A seed per sample for each of the attacks: the noise of all batches, whatever their size."""
    drawn: dict[str, list[Tensor]] = {name: [] for name in attacks}
    # In blocks, which is the order in which they were always drawn.
    for block in torch.empty(count, device=generator.device).split(BATCH):
        for name in attacks:
            drawn[name].append(draw_seeds(block, generator))
    return {name: torch.cat(parts) for name, parts in drawn.items()}
