"""One job: train one model on one setting and seed, select its best epoch, judge it, write its checkpoint.

Called by run.py, in a worker process or in the caller's; everything random comes from the job's seed.
"""

from __future__ import annotations

import copy
import pathlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from armor import attacks
from armor.attacks import modes
from armor.ops import cross_entropy, dc_loss
from armor.training import checkpoint, data, evaluate
from armor.training.allocator import keep_memory
from armor.training.config import COST_METHODS, ResolvedConfig, attack_in, training_attack
from armor.training.step import TrainState, autocast, make_state, precision, sample_losses, stream, train_step

CURVE_SAMPLES = 1000  # of the validation part, for the accuracy curves and the selection
CURVE_STEPS = 10  # of the attack on them
CURVE_CHUNK = 250
SHOWN_SAMPLES = 1000  # of the training part, in the one dual problem whose weights the report shows
SHOWN_EACH = 10  # most and least weighted
COLLAPSE = 0.2  # robust accuracy lost since the best epoch that `monitor` takes for catastrophic overfitting


@dataclass(frozen=True)
class Job:
    """weighting: "mean", uniform weights, or "dc", as config.dual says."""

    setting: str
    seed: int
    weighting: str

    def __str__(self) -> str:
        return f"{self.setting}-seed{self.seed}-{self.weighting}"


def run_job(job: Job, progress: Callable[[int], object], config: ResolvedConfig) -> dict:
    """Trains and judges one model; returns the job's entry of metrics.json. `config` must be resolved."""
    started = time.perf_counter()
    if config.device == "cpu":
        keep_memory()
    with precision(config):
        splits = data.load(config, stream(job.seed, "split"))
        train = data.apply_setting(splits.train, job.setting, config, stream(job.seed, "setting")).to(config.device)
        validation = splits.validation[:CURVE_SAMPLES].to(config.device)
        judged = getattr(splits, config.evaluate.on).to(config.device)

        steps_per_epoch = data.steps_per_epoch(len(train), config)
        state = make_state(config, job.seed, job.weighting, splits, steps_per_epoch)
        extra = None if splits.extra is None else splits.extra.to(config.device)
        history, selected, weights = fit(state, train, extra, validation, job, progress)

        model = state.judged
        model.load_state_dict(weights)
        noise = stream(job.seed, "evaluate", config.device)
        final = evaluate.evaluate(model, judged, **judging(config), generator=noise, progress=progress)
        content = {
            "model": model.state_dict(),
            "input_shape": list(splits.shape),
            "classes": splits.classes,
            "job": asdict(job),
            "config": asdict(config),
            "final": final,
        }
        if job.weighting == "dc":
            content["samples"] = weighted_samples(state, model, train, job.seed)
    checkpoint.save(content, checkpoint_path(config, job))
    return {
        **asdict(job),
        "train_size": len(train),
        "final": final,
        "history": history,
        "selected_epoch": selected,
        "seconds": round(time.perf_counter() - started, 3),
    }


def fit(
    state: TrainState,
    train: data.Part,
    extra: data.Samples | None,
    validation: data.Part,
    job: Job,
    progress: Callable[[int], object],
) -> tuple[dict[str, list[float]], int, dict[str, Tensor]]:
    """All epochs: the history of each, and number (from 1) and weights of the selected one."""
    config = state.config
    names = ("objective", "mean_loss", "mu", "effective_share", "clean", "robust")
    history: dict[str, list[float]] = {name: [] for name in names}
    best, selected, weights = -1.0, 0, {}
    for epoch in range(1, config.epochs + 1):
        record = train_epoch(state, train, extra, progress)
        if not (record[0].isfinite() and record[1].isfinite()):
            raise FloatingPointError(
                f"the loss is {record[1].item()} in epoch {epoch}; a smaller learning rate may help"
            )
        if record[3] == 0:
            raise FloatingPointError(f"no sample of epoch {epoch} has any weight; another dual.nu or dual.lam may help")
        average_epoch(state, train, extra, epoch)
        curve = validation_accuracy(state.judged, validation, config, job.seed)
        progress(len(validation) * (CURVE_STEPS + 1))
        for name, value in zip(names, [*record.tolist(), *curve], strict=True):
            history[name].append(value)
        if curve[1] > best or config.select == "last":
            best, selected = max(best, curve[1]), epoch
            weights = copy.deepcopy(state.judged.state_dict())
        if config.monitor and curve[1] < best - COLLAPSE:
            note = f"robust accuracy fell from {best:.1%} to {curve[1]:.1%}: catastrophic overfitting"
            print(f"{job}: stopped after epoch {epoch} of {config.epochs}, {note}", file=sys.stderr, flush=True)
            break
    return history, selected, weights


def train_epoch(
    state: TrainState, train: data.Part, extra: data.Samples | None, progress: Callable[[int], object]
) -> Tensor:
    """Every sample once, in random batches; the epoch's mean of what `train_step` returns, on the CPU."""
    total = torch.zeros(4, device=state.config.device)
    for x, y in data.batches(train, state.config, state.batches, extra):
        total += train_step(state, x, y)
        progress(len(y) * (state.config.attack.steps + 1))
    return (total / state.steps_per_epoch).cpu()


def average_epoch(state: TrainState, train: data.Part, extra: data.Samples | None, epoch: int) -> None:
    """Stochastic weight averaging: the epoch's weights join the average, whose BatchNorm meets the training samples."""
    average = state.config.average
    if state.average is None or average.kind != "swa" or epoch <= average.start * state.config.epochs:
        return
    state.average.update_parameters(state.model)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in state.average.modules()):
        seen = data.batches(train, state.config, torch.Generator().manual_seed(epoch), extra)
        update_bn((x for x, _ in seen), state.average)


def validation_accuracy(model: nn.Module, samples: data.Part, config: ResolvedConfig, seed: int) -> tuple[float, float]:
    """Clean accuracy, and robust accuracy under a short attack in the ball of the evaluation."""
    attack, noise = selecting_attack(config), stream(seed, "evaluate", config.device)
    right: list[list[Tensor]] = [[], []]
    for start in range(0, len(samples), CURVE_CHUNK):
        part = samples[slice(start, start + CURVE_CHUNK)]
        x_adv = attack(model, part.x, part.y, generator=noise)
        for found, x in zip(right, (part.x, x_adv), strict=True):
            found.append(evaluate.correct(model, x, part.y))
    clean, robust = (torch.cat(found).double().mean().item() for found in right)
    return clean, robust


def selecting_attack(config: ResolvedConfig) -> attacks.Transport:
    """CURVE_STEPS steps in the ball of the evaluation, long enough to cross it."""
    norm, eps = config.evaluate.norm or "linf", config.evaluate_eps
    way = 1.0 if norm == "binary" else 2.5 * eps
    return attack_in(norm, eps, CURVE_STEPS, way / CURVE_STEPS)


def judging(config: ResolvedConfig) -> dict:
    """The settings of `evaluate.evaluate`."""
    return {
        "norm": config.evaluate.norm,
        "eps": config.evaluate_eps,
        "steps": config.evaluate.steps,
        "step_size": config.evaluate_step_size,
    }


def weighted_samples(state: TrainState, model: nn.Module, train: data.Part, seed: int) -> dict[str, Tensor]:
    """The most and then the least weighted attacked training samples of the selected model.

    One exact dual problem over all (at most SHOWN_SAMPLES random) training samples; `weight` is relative to
    uniform, so 1 is an average sample.
    """
    config = state.config
    chosen = train[torch.randperm(len(train), generator=stream(seed, "samples"))[:SHOWN_SAMPLES].to(train.y.device)]
    noise, mu = stream(seed, "samples", config.device), state.mu if config.method in COST_METHODS else None
    attack = None if config.method == "natural" else training_attack(config)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("x_adv", "logits", "losses", "costs", "stays")}
    for start in range(0, len(chosen), CURVE_CHUNK):
        part = chosen[slice(start, start + CURVE_CHUNK)]
        moved = None if attack is None else attack.run(model, part.x, part.y, mu=mu, generator=noise)
        x_adv = part.x if moved is None else moved.x_adv
        with torch.no_grad(), modes(model), autocast(config):
            natural, logits = model(part.x), model(x_adv)
        losses, stays = sample_losses(config, natural, logits, part.y), cross_entropy(natural, part.y)
        found = {"x_adv": x_adv, "logits": logits, "losses": losses}
        if moved is not None and moved.costs is not None:
            found |= {"costs": moved.costs, "stays": stays}
        for name, tensor in found.items():
            parts[name].append(tensor)
    x_adv, logits, losses = (torch.cat(parts[name]) for name in ("x_adv", "logits", "losses"))
    priced: dict[str, Any] = {}
    if parts["costs"]:
        priced = {"costs": torch.cat(parts["costs"]), "clean_losses": torch.cat(parts["stays"])}
    _, result = dc_loss(losses, **priced, **config.dual.ball, return_dual=True)
    order = result.weights.argsort(descending=True, stable=True)
    shown = torch.cat([order[:SHOWN_EACH], order[-SHOWN_EACH:]])
    return {
        "x_adv": x_adv[shown].cpu().contiguous(),
        "weight": (result.weights[shown] * len(order)).cpu(),
        "loss": losses[shown].cpu(),
        "label": chosen.y[shown].cpu(),
        "true_label": chosen.true_y[shown].cpu(),
        "predicted": logits[shown].argmax(1).cpu(),
    }


def image_passes(train_size: int, validation_size: int, judged_size: int, config: ResolvedConfig) -> int:
    """What a job reports to `progress` in all: how often an image goes forward and backward."""
    extra = data.steps_per_epoch(train_size, config) * round(config.extra_share * config.batch_size)
    seen = train_size + (0 if config.extra is None else extra)
    per_epoch = seen * (config.attack.steps + 1) + min(validation_size, CURVE_SAMPLES) * (CURVE_STEPS + 1)
    return config.epochs * per_epoch + evaluate.image_passes(judged_size, config.evaluate.steps)


def checkpoint_path(config: ResolvedConfig, job: Job) -> pathlib.Path:
    return config.folder / "checkpoints" / f"{job}.pt"
