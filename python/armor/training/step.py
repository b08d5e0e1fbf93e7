"""One training step, top to bottom: transport, predictions, re-weighting, update (docs/math.md, section 6).

`make_state` builds what a step changes; loop.py calls `train_step` once per batch. graph.py replays `update`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from armor import attacks
from armor.losses import LearnedDual
from armor.ops import cross_entropy, dc_loss, mart_loss, trades_loss
from armor.training import models
from armor.training.config import COST_METHODS, ResolvedConfig, beta, training_attack
from armor.training.graph import GraphedUpdate
from armor.training.schedule import ADAMS, make_optimizer, make_schedule
from armor.training.view import AttackView

# One independent stream of random numbers per use, so that the two models of a pair, which differ in the
# weighting alone, meet the same initial weights, batches and attack noise.
STREAMS = ("split", "setting", "weights", "batches", "noise", "evaluate", "samples")


@dataclass
class TrainState:
    """All that a step reads and changes."""

    config: ResolvedConfig
    weighting: str  # "mean" or "dc"
    model: nn.Module
    net: Callable[[Tensor], Tensor]  # the model, compiled if that was asked for
    view: AttackView  # the model as it is attacked
    attack: attacks.Transport  # with its full radius
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    attack_warmup: int  # steps until the attack has its full radius
    steps_per_epoch: int
    batches: torch.Generator
    noise: torch.Generator
    mu: Tensor  # price of the transport cost, of the step before; NaN without a dual and a cost
    dual: LearnedDual | None = None
    dual_optimizer: torch.optim.Optimizer | None = None
    average: AveragedModel | None = None
    graph: GraphedUpdate | None = field(default=None, repr=False)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.schedule.last_epoch

    @property
    def awp_warmup(self) -> int:
        """Steps until the weights are perturbed, if they ever are."""
        return (self.config.awp.start - 1) * self.steps_per_epoch

    @property
    def judged(self) -> nn.Module:
        """What is evaluated: the model, or the average of its weights once there is one."""
        if self.average is not None and self.average.n_averaged > 0:
            return self.average.module
        return self.model


def train_step(state: TrainState, x: Tensor, y: Tensor) -> Tensor:
    """Updates the state on one batch; returns [objective, mean loss, mu, effective sample share].

    With uniform weights the share is 1 and, without a transport cost, mu is NaN. The result stays on the device, so
    that a step never waits for it.
    """
    record = update(state, x, y) if state.graph is None else state.graph(state, x, y)
    state.schedule.step()
    if state.average is not None and state.config.average.kind == "ema":
        state.average.update_parameters(state.model)
    return record


def update(state: TrainState, x: Tensor, y: Tensor) -> Tensor:
    """What a step computes: the part that a CUDA graph holds."""
    x_adv, costs = transport(state, x, y)

    def objective() -> Objective:
        natural, adversarial = predict(state, x, x_adv)
        losses = sample_losses(state.config, natural, adversarial, y)
        clean = None if natural is None else cross_entropy(natural, y, label_smoothing=state.config.label_smoothing)
        value, mu, share = reweigh(state, losses, costs, clean)
        if state.config.natural_mix:
            assert clean is not None
            value = state.config.natural_mix * clean.mean() + (1 - state.config.natural_mix) * value
        return Objective(value, losses, mu, share)

    with weights_perturbed(state, objective):
        value, losses, mu, share = objective()
        state.optimizer.zero_grad(set_to_none=True)
        if state.dual_optimizer is not None:
            state.dual_optimizer.zero_grad(set_to_none=True)
        value.backward()
    if state.config.optimizer.clip is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), state.config.optimizer.clip)
    state.optimizer.step()
    if state.dual_optimizer is not None:
        state.dual_optimizer.step()
    state.mu.copy_(mu)
    return torch.stack([value.detach(), losses.detach().mean(), state.mu, share])


class Objective(NamedTuple):
    """value: what is minimised. losses: of the samples, [B]. mu, share: of the re-weighting, detached."""

    value: Tensor
    losses: Tensor
    mu: Tensor
    share: Tensor


def transport(state: TrainState, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """x_adv and, where the transport has a price instead of a boundary, what each sample's costs."""
    if state.config.method == "natural":
        return x, None
    attack = state.attack
    if state.step < state.attack_warmup:
        attack = _attack(state.config, state.view, (state.step + 1) / state.attack_warmup)
    mu = price(state) if state.config.method in COST_METHODS else None
    state.view.refresh()
    with autocast(state.config):
        result = attack.run(state.view, x, y, mu=mu, generator=state.noise)
    return result.x_adv, result.costs


def predict(state: TrainState, x: Tensor, x_adv: Tensor) -> tuple[Tensor | None, Tensor]:
    """Logits of the natural samples, if anything needs them, and of the transported ones, in train mode.

    One pass each and the natural one first, as published: BatchNorm normalises each by its own statistics.
    """
    with autocast(state.config):
        natural = state.net(x) if needs_natural(state) else None
        adversarial = state.net(x_adv)
    return natural, adversarial


def needs_natural(state: TrainState) -> bool:
    """TRADES and MART compare predictions, the mix has a natural part, and under an exact dual with costs a sample may
    stay where it is (docs/math.md, section 3)."""
    config = state.config
    stays = config.method in COST_METHODS and state.weighting == "dc" and config.dual.solve == "exact"
    return config.method in ("trades", "mart") or config.natural_mix > 0 or stays


def sample_losses(config: ResolvedConfig, natural: Tensor | None, adversarial: Tensor, y: Tensor) -> Tensor:
    """The method's loss of every sample, [B]."""
    if config.method == "trades":
        assert natural is not None
        return trades_loss(natural, adversarial, y, beta=beta(config))
    if config.method == "mart":
        assert natural is not None
        return mart_loss(natural, adversarial, y, beta=beta(config))
    return cross_entropy(adversarial, y, label_smoothing=config.label_smoothing)


def reweigh(
    state: TrainState, losses: Tensor, costs: Tensor | None, clean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The robust loss of the batch, mu and the effective sample share."""
    if state.weighting == "mean":
        return losses.mean(), state.mu, torch.ones_like(state.mu)
    if state.dual is None:
        clean = None if costs is None else clean
        value, result = dc_loss(losses, costs, clean_losses=clean, **state.config.dual.ball, return_dual=True)
        return value, result.lam + state.config.dual.kappa, effective_share(result.weights)
    value = state.dual(losses, costs)
    (weights,) = torch.autograd.grad(value, losses, retain_graph=True)
    return value, price(state), effective_share(weights)


def price(state: TrainState) -> Tensor:
    """mu, the price of the transport cost in the units of a loss."""
    return state.mu if state.dual is None else state.dual.lam.detach() + state.config.dual.kappa


@contextlib.contextmanager
def weights_perturbed(state: TrainState, objective: Callable[[], Objective]) -> Iterator[None]:
    """Inside, the weights are where the objective is larger, gamma of their norm away: AWP (Wu et al., 2020).

    As published the matrices and kernels alone move, each along its own gradient. The pass that finds the gradient does
    not count in BatchNorm's statistics.
    """
    gamma, model = state.config.awp.gamma, state.model
    if gamma == 0 or state.step < state.awp_warmup:
        yield
        return
    weights = [weight for weight in model.parameters() if weight.dim() > 1 and weight.requires_grad]
    buffers = list(model.buffers())
    with torch.no_grad():
        before, statistics = [w.clone() for w in weights], [b.clone() for b in buffers]
    gradients = torch.autograd.grad(objective().value, weights, materialize_grads=True)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(gradient * (gamma * weight.norm() / (gradient.norm() + 1e-20)))
        for buffer, kept in zip(buffers, statistics, strict=True):
            buffer.copy_(kept)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)


# ---- the state -----------------------------------------------------------------------------------------------------


class Problem(Protocol):
    """What a model must fit: the shape of a sample, the number of classes and, to normalise by, the mean and standard
    deviation of every channel. `data.Splits` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def classes(self) -> int: ...
    @property
    def mean(self) -> Tensor: ...
    @property
    def std(self) -> Tensor: ...


def make_state(config: ResolvedConfig, seed: int, weighting: str, problem: Problem, steps_per_epoch: int) -> TrainState:
    """Model, optimiser, schedule and generators of a run with this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights"))
        model = make_model(config, problem)
    model = model.to(config.device).train()
    optimizer = make_optimizer(config, model)
    steps = config.epochs * steps_per_epoch
    view = make_view(config, model)
    dual, dual_optimizer = _make_dual(config, weighting)
    # The price of the first step; one that is never used nor solved for is no number.
    priced = weighting == "dc" or config.method in COST_METHODS
    return TrainState(
        config=config,
        weighting=weighting,
        model=model,
        net=torch.compile(model) if config.speed.compile else model,
        view=view,
        attack=_attack(config, view),
        optimizer=optimizer,
        schedule=make_schedule(config, optimizer, steps_per_epoch),
        attack_warmup=round((config.attack.warmup or 0) * steps),
        steps_per_epoch=steps_per_epoch,
        batches=stream(seed, "batches"),
        noise=stream(seed, "noise", config.device),
        mu=torch.tensor(config.dual.lam if priced else float("nan"), device=config.device),
        dual=dual,
        dual_optimizer=dual_optimizer,
        average=_make_average(config, model),
        graph=GraphedUpdate(update) if config.speed.cuda_graph else None,
    )


def make_model(config: ResolvedConfig, problem: Problem) -> nn.Module:
    """The freshly initialised model, drawn from torch's global generator, for samples in [0, 1]."""
    model = models.build(config.model, problem.shape, problem.classes, **config.model_options)
    if not config.speed.channels_last:
        model = model.to(memory_format=torch.contiguous_format)
    return models.Normalized(problem.mean, problem.std, model) if config.normalize else model


def make_view(config: ResolvedConfig, model: nn.Module) -> AttackView:
    """The model as it is attacked."""
    eval_mode = config.attack.batchnorm == "eval"
    return AttackView(model, fold=config.speed.fold, compile=config.speed.compile, eval_mode=eval_mode)


def _attack(config: ResolvedConfig, view: AttackView, strength: float = 1.0) -> attacks.Transport:
    feed = torch.bfloat16 if config.speed.precision == "bf16" else None
    return training_attack(config, strength, normalize=view.normalize, feed_dtype=feed)


def _make_dual(config: ResolvedConfig, weighting: str) -> tuple[LearnedDual | None, torch.optim.Optimizer | None]:
    given = config.dual
    if weighting == "mean" or given.solve == "exact":
        return None, None
    dual = LearnedDual(**given.ball, lam=given.lam, nu=given.nu).to(config.device)
    if given.solve == "frozen":
        return dual.requires_grad_(False), None
    return dual, ADAMS[given.optimizer](dual.parameters(), lr=given.lr, capturable=config.speed.cuda_graph)


def _make_average(config: ResolvedConfig, model: nn.Module) -> AveragedModel | None:
    if config.average.kind == "none":
        return None
    if config.average.kind == "swa":
        return AveragedModel(model)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.average.decay), use_buffers=True)


# ---- small things --------------------------------------------------------------------------------------------------


def autocast(config: ResolvedConfig) -> torch.autocast:
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.speed.precision == "bf16")


@contextlib.contextmanager
def precision(config: ResolvedConfig) -> Iterator[None]:
    """Inside, products of float32 numbers on CUDA are in TensorFloat-32 or float32, as the configuration says."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = config.speed.precision == "tf32"
    try:
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def effective_share(weights: Tensor) -> Tensor:
    """Effective sample size sum(w)^2 / sum(w^2) over n: 1 for uniform weights, 1/n if one sample has it all; 0 if none
    has any, which learned and frozen duals may come to."""
    squares = weights.square().sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return weights.sum().square() / (squares * weights.numel())


def stream(seed: int, use: str, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(stream_seed(seed, use))


def stream_seed(seed: int, use: str) -> int:
    return int(np.random.SeedSequence([seed, STREAMS.index(use)]).generate_state(1, np.uint64)[0] >> 1)
