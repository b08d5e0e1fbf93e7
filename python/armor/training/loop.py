"""One job: train one model with one method on one setting and seed, judge it, write its checkpoint.

Called by run.py, in a worker process or in the caller's; everything random comes from the job's seed.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from armor.attacks import modes, pgd
from armor.ops import cross_entropy, dc_loss
from armor.training import checkpoint, data, evaluate
from armor.training.config import DualConfig, ResolvedConfig
from armor.training.step import TrainState, make_state, stream, train_step

METHODS = ("mean", "dc")
CURVE_SAMPLES = 500  # of the validation part, for the accuracy curves
SHOWN_SAMPLES = 1000  # of the training part, in the one dual problem whose weights the report shows
SHOWN_EACH = 10  # most and least weighted


@dataclass(frozen=True)
class Job:
    setting: str
    seed: int
    method: str

    def __str__(self) -> str:
        return f"{self.setting}-seed{self.seed}-{self.method}"


def run_job(job: Job, progress: Callable[[int], object], config: ResolvedConfig) -> dict:
    """Trains and judges one model; returns the job's entry of metrics.json. `config` must be resolved."""
    started = time.perf_counter()
    splits = data.load(config, stream(job.seed, "split"))
    train = data.apply_setting(splits.train, job.setting, config, stream(job.seed, "setting")).to(config.device)
    validation = splits.validation[:CURVE_SAMPLES].to(config.device)
    judged = (splits.test if config.evaluate_on == "test" else splits.validation).to(config.device)
    dual = config.dual if job.method == "dc" else None

    steps_per_epoch = -(-len(train) // config.batch_size)
    state = make_state(config, job.seed, config.epochs * steps_per_epoch)
    history: dict[str, list[float]] = {
        name: [] for name in ("objective", "mean_loss", "lam", "effective_share", "clean", "pgd")
    }
    for epoch in range(config.epochs):
        record = train_epoch(state, train, config, dual, progress)
        if not (record[0].isfinite() and record[1].isfinite()):
            raise FloatingPointError(f"the loss is {record[1].item()} in epoch {epoch + 1}; a smaller --lr may help")
        curve = validation_accuracy(state.model, validation, config, job.seed)
        for name, value in zip(history, [*record.tolist(), *curve], strict=True):
            history[name].append(value)
        progress(len(validation) * (config.attack.steps + 1))

    final = evaluate.evaluate(
        state.model,
        judged,
        eps=config.eps,
        steps=config.eval_steps,
        generator=stream(job.seed, "evaluate", config.device),
        progress=progress,
    )
    content = {
        "model": state.model.state_dict(),
        "job": asdict(job),
        "config": asdict(config),
        "final": final,
    }
    if dual is not None:
        content["samples"] = weighted_samples(state.model, train, config, dual, job.seed)
    checkpoint.save(content, checkpoint_path(config, job))
    return {
        **asdict(job),
        "train_size": len(train),
        "final": final,
        "history": history,
        "seconds": round(time.perf_counter() - started, 3),
    }


def train_epoch(
    state: TrainState,
    train: data.Samples,
    config: ResolvedConfig,
    dual: DualConfig | None,
    progress: Callable[[int], object],
) -> Tensor:
    """Every sample once, in random batches; the epoch's mean of what `train_step` returns, on the CPU."""
    order = torch.randperm(len(train), generator=state.batches).to(train.y.device)
    records = []
    for index in order.split(config.batch_size):
        batch = train[index]
        records.append(train_step(state, batch.x, batch.y, config, dual))
        progress(len(index) * (config.attack.steps + 1))
    return torch.stack(records).mean(0).cpu()


def validation_accuracy(
    model: nn.Module, samples: data.Samples, config: ResolvedConfig, seed: int
) -> tuple[float, float]:
    """Clean accuracy and accuracy under the training attack, for the curves."""
    attack = pgd(config.eps, config.attack.steps, config.step_size)
    x_adv = attack(model, samples.x, samples.y, generator=stream(seed, "evaluate", config.device))
    shares = [evaluate.correct(model, x, samples.y).double().mean().item() for x in (samples.x, x_adv)]
    return shares[0], shares[1]


def weighted_samples(
    model: nn.Module, train: data.Samples, config: ResolvedConfig, dual: DualConfig, seed: int
) -> dict[str, Tensor]:
    """The most and then the least weighted attacked training samples of the final model.

    One dual problem over all (at most SHOWN_SAMPLES random) training samples; `weight` is relative to
    uniform, so 1 is an average sample.
    """
    generator = stream(seed, "samples")
    chosen = train[torch.randperm(len(train), generator=generator)[:SHOWN_SAMPLES].to(train.y.device)]
    attack = pgd(config.eps, config.attack.steps, config.step_size)
    x_adv = attack(model, chosen.x, chosen.y, generator=stream(seed, "samples", config.device))
    with torch.no_grad(), modes(model):
        logits = model(x_adv)
        losses = cross_entropy(logits, chosen.y)
        _, result = dc_loss(losses, **vars(dual), return_dual=True)
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
    per_epoch = (train_size + min(validation_size, CURVE_SAMPLES)) * (config.attack.steps + 1)
    return config.epochs * per_epoch + evaluate.image_passes(judged_size, config.eval_steps)


def checkpoint_path(config: ResolvedConfig, job: Job) -> pathlib.Path:
    return config.folder / "checkpoints" / f"{job}.pt"
