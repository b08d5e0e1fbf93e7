"""From what a user gives to a configuration that leaves nothing open: defaults per data set, and all checks.

`resolve` refuses what cannot work with one sentence, before anything is loaded or trained; run.py and judge.py call it.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch

from armor.losses import DCLoss, LearnedDual
from armor.training.config import (
    COST_METHODS,
    SETTINGS,
    ConfigError,
    DataName,
    DualConfig,
    MethodName,
    ResolvedConfig,
    TrainConfig,
    beta,
    training_attack,
)

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


def resolve(given: TrainConfig) -> ResolvedConfig:
    """Fills in every None that depends on the data set or the machine and checks all. Raises ConfigError."""
    _check_choice("data", given.data, get_args(DataName))
    _check_choice("method", given.method, get_args(MethodName))
    defaults = DATA_DEFAULTS[given.data]
    attack = replace(
        given.attack,
        eps=_or(given.attack.eps, "1" if given.attack.norm == "binary" else defaults["eps"]),
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
        "speed": replace(given.speed, fold=given.speed.fold and attack.batchnorm == "eval"),
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
    _check_at_least("awp.gamma", config.awp.gamma, 0)
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
    _check_positive("dual.lam", dual.lam)
    _check_positive("dual.lr", dual.lr)


def _check_attack(config: ResolvedConfig) -> None:
    given, method = config.attack, config.method
    _check_at_least("attack.steps", given.steps, 1)
    _check_at_least("evaluate.steps", config.evaluate.steps, 1)
    for name, eps, text, norm in (
        ("attack.eps", config.eps, given.eps, given.norm),
        ("evaluate.eps", config.evaluate_eps, config.evaluate.eps, config.evaluate.norm),
    ):
        if norm in ("linf", "binary") and not 0 < eps <= 1:
            raise ConfigError(f"{name} must lie in (0, 1] because pixels lie in [0, 1], got {text!r}")
        _check_positive(name, eps, repr(text))
    _check_positive("attack.step_size", config.step_size)
    _check_positive("evaluate.step_size", config.evaluate_step_size)
    _check_share("attack.warmup", given.warmup or 0.0)
    if given.norm != "linf" and method in COST_METHODS:
        raise ConfigError(f"attack.norm has no use with method {method}, whose cost has its own; got {given.norm}")
    if given.norm == "binary" and method not in ("pgd", "natural"):
        raise ConfigError(f"attack.norm binary needs method pgd, got {method}")
    if config.monitor and (given.steps > 1 or method == "natural"):
        raise ConfigError(f"monitor is for attacks of one step, got {given.steps} steps with method {method}")
    attack = _ask("attack", lambda: training_attack(config))
    if attack.loss in ("kl", "mart") and method not in ("trades", "mart"):
        raise ConfigError(f"attack.loss {attack.loss} belongs to trades and mart, got it with method {method}")
    if given.norm == "binary" and given.loss not in (None, "ce"):
        raise ConfigError(f"attack.norm binary maximises ce, got attack.loss {given.loss}")


def _check_training(config: ResolvedConfig) -> None:
    optimizer, speed = config.optimizer, config.speed
    for name in ("seeds", "epochs", "batch_size"):
        _check_at_least(name, getattr(config, name), 1)
    _check_at_least("first_seed", config.first_seed, 0)
    _check_positive("optimizer.lr", optimizer.lr or 0.0)
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


def _check_positive(name: str, value: float, given: object = None) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name} must be positive and finite, got {value if given is None else given}")


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
