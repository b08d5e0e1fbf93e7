"""The typed configuration of a training run, its defaults per data set and its checks.

`armor train` builds a `TrainConfig` from a preset, YAML and the command line; `resolve` fills in what depends on
the data set and refuses what cannot work with one sentence, before anything is loaded or trained.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

import torch

from armor import attacks
from armor.losses import DCLoss, LearnedDual
from armor.ops import Binary

DataName = Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "image-folder", "npz"]
MethodName = Literal["pgd", "trades", "mart", "udr", "penalised-ot", "natural"]
Setting = Literal["balanced", "long-tail", "label-noise"]
Norm = Literal["linf", "l2", "l1", "binary"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
COST_METHODS = ("udr", "penalised-ot")  # whose transport has a price instead of a boundary
Value = TypeVar("Value")

# What a field left at None means. Attack warm-up: against the full attack from the first step on, the CNN tends to fall
# into the constant prediction and to stay there; the digits MLP does not.
_DEFAULTS: dict[str, Any] = {"model": "resnet18", "epochs": 100, "batch_size": 128, "lr": 0.1, "eps": "8/255"}
_IMAGES = {"model": "mnist-cnn", "epochs": 10, "batch_size": 100, "lr": 0.02, "eps": "0.1", "attack_warmup": 0.3}
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"model": "mlp", "epochs": 30, "batch_size": 64, "lr": 0.1, "eps": "0.1"},
    "mnist": _IMAGES,
    "fashion-mnist": _IMAGES,
    "cifar10": {**_DEFAULTS, "augment": True},
    "cifar100": {**_DEFAULTS, "augment": True},
    "svhn": {**_DEFAULTS, "lr": 0.01},
    "image-folder": {**_DEFAULTS, "augment": True, "eps": "4/255"},
    "npz": {"model": "mlp-300", "epochs": 30, "batch_size": 128, "lr": 0.05, "eps": "0.1"},
}


class ConfigError(ValueError):
    """The run cannot start; the message says in one sentence what is wrong and what would be right."""


@dataclass
class AttackConfig:
    """The attack on the training batches; `armor.attacks` has the details.

    Args:
        norm: of the ball that confines pgd, trades and mart; binary: features that may only change from 0 to 1
        eps: radius of the ball for pixels in [0, 1], a number or a fraction such as 8/255 (default: CIFAR and SVHN
            8/255, folders 4/255, others 0.1)
        steps: number of gradient steps; 1 is the fast FGSM training of Wong et al. (2020), for which see monitor
        step_size: length of a step, a number or a fraction (default: 2.5 * eps / steps; 1.25 * eps for one step)
        warmup: share of the training steps in which the radius rises linearly to eps (default: MNIST and FashionMNIST
            with their CNN 0.3, others 0)
        start: uniform in the ball, gaussian with sigma, or clean (default: that of the method)
        sigma: standard deviation of the gaussian start
        loss: what is maximised: ce, kl (from the natural prediction), mart or margin (default: kl for trades, else ce)
        tau: of udr, how soft the boundary of its ball is, a number or a fraction (default: step_size, as published:
            at mu = 1 a step then ends on the ball)
        weight: of penalised-ot, the factor of its cost weight * ||x_adv - x||_p^power
        p: of penalised-ot, 2 or inf
        power: of penalised-ot, at least 1
        batchnorm: mode of BatchNorm in the attack: eval leaves its statistics alone; train is what some published
            scripts do
    """

    norm: Norm = "linf"
    eps: str | float | None = None
    steps: int = 10
    step_size: str | float | None = None
    warmup: float | None = None
    start: Literal["uniform", "gaussian", "clean"] | None = None
    sigma: float = 0.001
    loss: Literal["ce", "kl", "mart", "margin"] | None = None
    tau: str | float | None = None
    weight: float = 0.1
    p: Literal[2, "inf"] = 2
    power: float = 1.5
    batchnorm: Literal["eval", "train"] = "eval"


@dataclass
class DualConfig:
    """The re-weighting of the samples of a batch; docs/dc_loss.md has the details.

    Args:
        divergence: kl, alpha or renyi; mean: uniform weights
        radius: radius of the divergence ball around uniform weights
        kappa: weight of the divergence penalty; weights are never sharper than exp(loss / kappa)
        alpha: order of the divergence (alpha and renyi only)
        solve: exact: solved for every batch; learned: lambda and nu are trained with the model; frozen: they stay
        lam: lambda at the start of learned and frozen duals; with divergence mean, the price of the transport cost
        nu: nu at the start of learned and frozen duals (not for kl; renyi: the logarithm of its distance from the
            largest loss)
        optimizer: adam or adamw, of learned duals
        lr: learning rate of learned duals
    """

    divergence: Literal["mean", "kl", "alpha", "renyi"] = "kl"
    radius: float = 0.2
    kappa: float = 1.0
    alpha: float | None = None
    solve: Literal["exact", "learned", "frozen"] = "exact"
    lam: float = 1.0
    nu: float = 1.0
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3

    @property
    def ball(self) -> dict[str, Any]:
        """The arguments of `dc_loss`, `DCLoss` and `LearnedDual`."""
        return {"radius": self.radius, "kappa": self.kappa, "divergence": self.divergence, "alpha": self.alpha}


@dataclass
class OptimizerConfig:
    """The optimiser of the model and its learning rate over time.

    Args:
        name: sgd, adam or adamw
        lr: peak learning rate (default: digits, CIFAR and folders 0.1, npz 0.05, MNIST and FashionMNIST 0.02, SVHN
            0.01)
        momentum: of sgd
        nesterov: of sgd
        weight_decay: of all parameters
        warmup: share of the steps in which the learning rate rises linearly to its peak
        schedule: what follows: linear falls to 0 with the last step, cosine likewise, constant stays, piecewise is told
            by drops
        drops: of piecewise, epoch: factor of the peak from that epoch on, counted from 1, such as {75: 0.1, 90: 0.01}
        clip: largest norm of the whole gradient (default: not clipped)
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant", "piecewise"] = "linear"
    drops: dict[int, float] = field(default_factory=dict)
    clip: float | None = None


@dataclass
class AWPConfig:
    """Adversarial weight perturbation (Wu et al., 2020).

    Args:
        gamma: size of the perturbation relative to the norm of each weight; 0 is none, 0.005 customary for trades,
            0.01 for pgd
        start: first epoch with it, counted from 1
    """

    gamma: float = 0.0
    start: int = 1


@dataclass
class AverageConfig:
    """An average of the weights over time, which is then what is judged and selected.

    Args:
        kind: none, ema (exponential, after every step) or swa (equal, after every epoch)
        decay: of ema, per step
        start: of swa, the share of the epochs after which it begins
    """

    kind: Literal["none", "ema", "swa"] = "none"
    decay: float = 0.999
    start: float = 0.5


@dataclass
class SpeedConfig:
    """How a step is computed; docs/training.md has what each costs and gains.

    Args:
        channels_last: lay images and convolutions out with the channels last
        fold: attack a copy of the model with BatchNorm folded into the convolutions (needs attack.batchnorm eval)
        precision: fp32, tf32 (CUDA: products of float32 in TensorFloat-32) or bf16 (autocast; weights stay float32)
        compile: torch.compile of the attacked and of the trained model, apart
        cuda_graph: one CUDA graph of the whole step
    """

    channels_last: bool = True
    fold: bool = True
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False
    cuda_graph: bool = False


@dataclass
class EvaluateConfig:
    """What models are judged by, and by a shorter attack of the same ball, selected on the validation part.

    Args:
        on: judge the final models on the test part or on the validation part (for tuning)
        norm: of the ball; binary as for the attack
        eps: radius of the ball, a number or a fraction (default: attack.eps)
        steps: of the two PGD attacks, one on cross-entropy and one on the margin loss
        step_size: of both (default: eps / 10)
    """

    on: Literal["test", "validation"] = "test"
    norm: Norm | None = None
    eps: str | float | None = None
    steps: int = 40
    step_size: str | float | None = None


@dataclass
class TrainConfig:
    """Adversarial training with ARMOR_D: one model, or several seeds with and without the re-weighting and a table.

    Args:
        data: the data set; digits comes with scikit-learn, the others are read from --data-dir
        data_dir: folder of the data set; of npz, the file
        settings: one of balanced, long-tail, label-noise or a list [long-tail,balanced]
        train_size: use this many training samples, in the class proportions of the set (default: all)
        test_size: evaluate on this many samples (default: all)
        long_tail_ratio: largest over smallest class of the long-tail setting
        label_noise: share of the training labels replaced by random ones in the label-noise setting
        augment: random crops with padding 4 and horizontal flips (default: CIFAR and folders true, others false)
        normalize: subtract the mean and divide by the standard deviation of the data set in front of the model
        image_size: of image-folder, height and width that its images are scaled to
        extra: .npz file of further training samples, image [n, height, width, channels] uint8 and label [n]
        extra_share: share of every batch that is drawn from extra
        model: mlp, mlp-300, mnist-cnn, small-cnn, resnet18, preact-resnet18, wrn-34-10, torchvision:NAME, timm:NAME or
            module:callable (default: digits mlp, MNIST and FashionMNIST mnist-cnn, npz mlp-300, others resnet18)
        model_options: further arguments of the model
        method: pgd, trades, mart, udr, penalised-ot or natural (no attack)
        beta: of trades and mart, the weight of the divergence of predictions (default: 6)
        natural_mix: t in t * mean natural cross-entropy + (1 - t) * robust loss
        label_smoothing: of the cross-entropy of pgd, udr, penalised-ot and natural
        control: also train each model with uniform weights and compare
        seeds: number of seeds
        first_seed: the first seed
        epochs: passes over the training part (default: digits and npz 30, MNIST and FashionMNIST 10, others 100)
        batch_size: samples per step, and so per dual problem (default: digits 64, MNIST and FashionMNIST 100, others
            128)
        select: best: keep the epoch of the highest robust accuracy on the validation part; last: the last
        monitor: stop when the robust accuracy on the validation part collapses, as it may with one attack step
        attack: the attack on the training batches
        dual: the re-weighting
        optimizer: the optimiser and its schedule
        awp: adversarial weight perturbation
        average: an average of the weights over time
        evaluate: how models are judged
        speed: how a step is computed
        device: auto, cpu, cuda or cuda:N
        workers: processes that share the models to be trained (default: the usable cores, at most 8; on a GPU 1)
        threads: torch threads of each worker (default: the usable cores over the workers)
        runs_dir: folder of all runs
        name: folder of this run inside runs_dir (default: data set, method and time)
        preset: start from the options of this preset, which all others override wherever they stand; `--preset help`
            lists them
        recorded: facts of an earlier run in its config.yaml (versions, seeds); ignored as input
    """

    data: DataName = "digits"
    data_dir: str | None = None
    settings: list[Setting] | Setting = "balanced"
    train_size: int | None = None
    test_size: int | None = None
    long_tail_ratio: float = 20.0
    label_noise: float = 0.2
    augment: bool | None = None
    normalize: bool = False
    image_size: int = 64
    extra: str | None = None
    extra_share: float = 0.5
    model: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    method: MethodName = "pgd"
    beta: float | None = None
    natural_mix: float = 0.0
    label_smoothing: float = 0.0
    control: bool = False
    seeds: int = 1
    first_seed: int = 0
    epochs: int | None = None
    batch_size: int | None = None
    select: Literal["best", "last"] = "best"
    monitor: bool = False
    attack: AttackConfig = field(default_factory=AttackConfig)
    dual: DualConfig = field(default_factory=DualConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    awp: AWPConfig = field(default_factory=AWPConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    runs_dir: str = "runs"
    name: str | None = None
    preset: str | None = None
    recorded: dict | None = None


@dataclass
class ResolvedConfig(TrainConfig):
    """A `TrainConfig` that `resolve` has checked and that leaves nothing open."""

    settings: list[Setting] = field(default_factory=list)
    augment: bool = False
    model: str = ""
    epochs: int = 0
    batch_size: int = 0
    workers: int = 1
    threads: int = 1
    name: str = ""

    @functools.cached_property
    def eps(self) -> float:
        """Radius of the training attack's ball."""
        return parse_number(self.attack.eps, "attack.eps")

    @functools.cached_property
    def step_size(self) -> float:
        """Length of a step of the training attack."""
        if self.attack.step_size is None:
            return self.eps * (1.25 if self.attack.steps == 1 else 2.5 / self.attack.steps)
        return parse_number(self.attack.step_size, "attack.step_size")

    @functools.cached_property
    def evaluate_eps(self) -> float:
        """Radius of the ball that models are judged in."""
        return parse_number(self.evaluate.eps, "evaluate.eps")

    @functools.cached_property
    def evaluate_step_size(self) -> float:
        """Length of a step of the attacks that models are judged by."""
        if self.evaluate.step_size is None:
            return self.evaluate_eps / 10
        return parse_number(self.evaluate.step_size, "evaluate.step_size")

    @property
    def weightings(self) -> tuple[str, ...]:
        """What is trained of each setting and seed: with uniform weights (mean), re-weighted (dc), or both."""
        if self.dual.divergence == "mean":
            return ("mean",)
        return ("mean", "dc") if self.control else ("dc",)

    @property
    def folder(self) -> pathlib.Path:
        """Where the run's files go."""
        return pathlib.Path(self.runs_dir) / self.name


def training_attack(config: ResolvedConfig, strength: float = 1.0, **options: Any) -> attacks.Transport:
    """The attack of the method at this share of its full radius; further options are those of `Transport`."""
    given = config.attack
    options = {"start": given.start, "loss": given.loss, "eval_mode": given.batchnorm == "eval", **options}
    options = {name: value for name, value in options.items() if value is not None}
    eps, steps, step_size = strength * config.eps, given.steps, strength * config.step_size
    if given.norm == "binary":
        return attacks.rfgsm_k(steps, step_size, **options)
    if config.method == "udr":
        tau = step_size if given.tau is None else strength * parse_number(given.tau, "attack.tau")
        return attacks.udr(eps, tau, steps, step_size, **options)
    if config.method == "penalised-ot":
        return attacks.penalised_ot(given.weight, float(given.p), given.power, steps, step_size, **options)
    if config.method == "trades":
        options = {"start": "gaussian", "loss": "kl", **options}
    elif config.method == "mart":
        options = {"start": "gaussian", "beta": beta(config), **options}
    return attacks.pgd(eps, steps, step_size, given.norm, sigma=given.sigma, **options)


def beta(config: TrainConfig) -> float:
    """Weight of the divergence of predictions in TRADES and MART."""
    return 6.0 if config.beta is None else config.beta


def parse_number(value: str | float | None, name: str) -> float:
    """The float of "0.1", 0.1 or "8/255"; ConfigError with the argument's name otherwise."""
    try:
        number = float(Fraction(value))  # type: ignore[arg-type]
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        raise ConfigError(f"{name} must be a number such as 0.1 or a fraction such as 8/255, got {value!r}") from None
    return number


def resolve(given: TrainConfig) -> ResolvedConfig:
    """Fills in every None that depends on the data set or the machine and checks all. Raises ConfigError."""
    _check_choice("data", given.data, get_args(DataName))
    _check_choice("method", given.method, get_args(MethodName))
    defaults = DATA_DEFAULTS[given.data]
    attack = replace(
        given.attack,
        eps=_or(given.attack.eps, defaults["eps"]),
        # The trap is the CNN's alone.
        warmup=_or(given.attack.warmup, defaults.get("attack_warmup", 0.0) if given.model is None else 0.0),
    )
    device = _resolve_device(given.device)
    values = {name: getattr(given, name) for name in vars(given)} | {
        "settings": [given.settings] if isinstance(given.settings, str) else given.settings,
        "augment": _or(given.augment, defaults.get("augment", False)),
        "model": _or(given.model, defaults["model"]),
        "epochs": _or(given.epochs, defaults["epochs"]),
        "batch_size": _or(given.batch_size, defaults["batch_size"]),
        "attack": attack,
        "optimizer": replace(given.optimizer, lr=_or(given.optimizer.lr, defaults["lr"])),
        "evaluate": replace(
            given.evaluate, norm=_or(given.evaluate.norm, attack.norm), eps=_or(given.evaluate.eps, attack.eps)
        ),
        "device": device,
        "name": _or(given.name, f"{given.data}-{given.method}-{time.strftime('%Y%m%d-%H%M%S')}"),
        "workers": 1,
        "threads": 1,
        "recorded": None,
    }
    config = ResolvedConfig(**values)
    _check_data(config)
    _check_method(config)
    _check_attack(config)
    _check_training(config)

    jobs = len(config.settings) * config.seeds * len(config.weightings)
    cores = usable_cores()
    config.workers = _or(given.workers, 1 if device != "cpu" else min(8, cores, jobs))
    _check_at_least("workers", config.workers, 1)
    config.threads = _or(given.threads, max(1, cores // config.workers))
    _check_at_least("threads", config.threads, 1)
    return config


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_data(config: ResolvedConfig) -> None:
    if not config.settings:
        raise ConfigError(f"settings must name at least one of {', '.join(SETTINGS)}, got {config.settings!r}")
    for setting in config.settings:
        _check_choice("settings", setting, SETTINGS)
    if len(set(config.settings)) < len(config.settings):
        raise ConfigError(f"settings must name each setting once, got {', '.join(config.settings)}")
    if config.data == "digits" and config.data_dir is not None:
        raise ConfigError(
            f"data_dir has no use with data digits, which comes with scikit-learn; got {config.data_dir!r}"
        )
    for name in ("train_size", "test_size"):
        if getattr(config, name) is not None:
            _check_at_least(name, getattr(config, name), 1)
    _check_at_least("image_size", config.image_size, 8)
    _check_at_least("long_tail_ratio", config.long_tail_ratio, 1)
    _check_share("label_noise", config.label_noise)
    if config.extra is not None and not 0 < config.extra_share < 1:
        raise ConfigError(f"extra_share must lie in (0, 1), got {config.extra_share}")
    if config.augment and config.data in ("digits", "npz"):
        raise ConfigError(f"augment needs images larger than digits, got data {config.data}")
    if config.normalize and config.data == "npz":
        raise ConfigError("normalize is for images, got data npz")


def _check_method(config: ResolvedConfig) -> None:
    method, dual = config.method, config.dual
    if config.beta is not None and method not in ("trades", "mart"):
        raise ConfigError(f"beta belongs to trades and mart, got {config.beta} with method {method}")
    _check_at_least("beta", beta(config), 0)
    if not 0 <= config.natural_mix < 1:
        raise ConfigError(f"natural_mix must lie in [0, 1), got {config.natural_mix}")
    if config.natural_mix and method == "natural":
        raise ConfigError(f"natural_mix has no use with method natural, got {config.natural_mix}")
    _check_share("label_smoothing", config.label_smoothing)
    if config.label_smoothing and method in ("trades", "mart"):
        raise ConfigError(f"label_smoothing belongs to cross-entropy, got {config.label_smoothing} with {method}")
    _check_dual(dual)
    if dual.divergence == "mean":
        if dual.solve != "exact":
            raise ConfigError(f"dual.solve {dual.solve} has no use with dual.divergence mean, which has no dual")
        if config.control:
            raise ConfigError("control has no use with dual.divergence mean, which is the control itself")
    if not (config.awp.gamma >= 0 and math.isfinite(config.awp.gamma)):
        raise ConfigError(f"awp.gamma must be at least 0, got {config.awp.gamma}")
    _check_at_least("awp.start", config.awp.start, 1)


def _check_dual(dual: DualConfig) -> None:
    # The op owns the rules for its arguments, so it is asked rather than repeated here.
    if dual.divergence == "mean":
        if dual.alpha is not None:
            raise ConfigError(f"dual: alpha must be None for divergence='mean', got {dual.alpha}")
    elif dual.solve == "exact":
        _ask("dual", lambda: DCLoss(**dual.ball))
    else:
        _ask("dual", lambda: LearnedDual(**dual.ball, lam=dual.lam, nu=dual.nu))
    if not (dual.lam > 0 and math.isfinite(dual.lam)):
        raise ConfigError(f"dual.lam must be positive and finite, got {dual.lam}")
    if not (dual.lr > 0 and math.isfinite(dual.lr)):
        raise ConfigError(f"dual.lr must be positive and finite, got {dual.lr}")


def _check_attack(config: ResolvedConfig) -> None:
    given, method = config.attack, config.method
    _check_at_least("attack.steps", given.steps, 1)
    _check_at_least("evaluate.steps", config.evaluate.steps, 1)
    for name, eps, text in (
        ("attack.eps", config.eps, given.eps),
        ("evaluate.eps", config.evaluate_eps, config.evaluate.eps),
    ):
        norm = given.norm if name == "attack.eps" else config.evaluate.norm
        if norm in ("linf", "binary") and not 0 < eps <= 1:
            raise ConfigError(f"{name} must lie in (0, 1] because pixels lie in [0, 1], got {text!r}")
        if not (eps > 0 and math.isfinite(eps)):
            raise ConfigError(f"{name} must be positive and finite, got {text!r}")
    for name, number in (("attack.step_size", config.step_size), ("evaluate.step_size", config.evaluate_step_size)):
        if not (number > 0 and math.isfinite(number)):
            raise ConfigError(f"{name} must be positive and finite, got {number}")
    if given.warmup is None or not 0 <= given.warmup <= 1:
        raise ConfigError(f"attack.warmup must lie in [0, 1], got {given.warmup}")
    if given.norm != "linf" and method in COST_METHODS:
        raise ConfigError(f"attack.norm has no use with method {method}, whose cost has its own; got {given.norm}")
    if given.norm == "binary" and method not in ("pgd", "natural"):
        raise ConfigError(f"attack.norm binary needs method pgd, got {method}")
    if config.monitor and (given.steps > 1 or method == "natural"):
        raise ConfigError(f"monitor is for attacks of one step, got {given.steps} steps with method {method}")
    if config.speed.fold and given.batchnorm == "train":
        config.speed = replace(config.speed, fold=False)
    attack = _ask("attack", lambda: training_attack(config))
    if attack.loss in ("kl", "mart") and method not in ("trades", "mart"):
        raise ConfigError(f"attack.loss {attack.loss} belongs to trades and mart, got it with method {method}")
    if given.loss is not None and isinstance(attack.cost, Binary) and given.loss != "ce":
        raise ConfigError(f"attack.norm binary maximises ce, got attack.loss {given.loss}")


def _check_training(config: ResolvedConfig) -> None:
    optimizer, speed = config.optimizer, config.speed
    for name in ("seeds", "epochs", "batch_size"):
        _check_at_least(name, getattr(config, name), 1)
    _check_at_least("first_seed", config.first_seed, 0)
    if optimizer.lr is None or not (optimizer.lr > 0 and math.isfinite(optimizer.lr)):
        raise ConfigError(f"optimizer.lr must be positive and finite, got {optimizer.lr}")
    for name in ("momentum", "warmup"):
        _check_share(f"optimizer.{name}", getattr(optimizer, name))
    _check_at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    if optimizer.clip is not None and not optimizer.clip > 0:
        raise ConfigError(f"optimizer.clip must be positive, got {optimizer.clip}")
    if (optimizer.schedule == "piecewise") != bool(optimizer.drops):
        raise ConfigError(
            f"optimizer.drops and schedule piecewise need each other, got schedule {optimizer.schedule} and drops "
            f"{optimizer.drops}"
        )
    for epoch, factor in optimizer.drops.items():
        if epoch < 1 or not factor > 0:
            raise ConfigError(f"optimizer.drops must map epochs from 1 on to positive factors, got {optimizer.drops}")
    if optimizer.nesterov and (optimizer.name != "sgd" or optimizer.momentum == 0):
        raise ConfigError(f"optimizer.nesterov needs sgd with momentum, got {optimizer.name}")
    if not 0 < config.average.decay < 1:
        raise ConfigError(f"average.decay must lie in (0, 1), got {config.average.decay}")
    if not 0 <= config.average.start < 1:
        raise ConfigError(f"average.start must lie in [0, 1), got {config.average.start}")
    if config.device == "cpu" and (speed.cuda_graph or speed.precision == "tf32"):
        wrong = "speed.cuda_graph" if speed.cuda_graph else "speed.precision tf32"
        raise ConfigError(f"{wrong} needs a CUDA device, got device cpu")
    if speed.cuda_graph and config.extra is None and config.data == "image-folder":
        raise ConfigError("speed.cuda_graph needs data that live on the device, got image-folder")
    if not re.fullmatch(r"\w[\w.+-]*", config.name):
        raise ConfigError(f"name must be one folder name of letters, digits and . + - _, got {config.name!r}")


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _ask(name: str, make: Callable[[], Value]) -> Value:
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from None


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_at_least(name: str, value: float, least: float) -> None:
    if not value >= least or math.isinf(value):
        raise ConfigError(f"{name} must be at least {least}, got {value}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must lie in [0, 1], got {value}")


def _resolve_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= count:
            raise ConfigError(f"device {name} asked for, but torch sees {count} CUDA devices; use --device cpu or auto")
    return name
