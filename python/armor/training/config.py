"""The typed configuration of a training run, its defaults per data set and its checks.

`armor train` builds a `TrainConfig` from the command line and YAML; `resolve` fills in what depends on
the data set and refuses what cannot work with one sentence, before anything is loaded or trained.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
import re
import time
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import torch

from armor.losses import DCLoss

DataName = Literal["digits", "mnist", "fashion-mnist"]
Setting = Literal["long-tail", "balanced", "label-noise"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)

# Share of the steps in which the attack grows. Against the full attack from the first step on, the CNN tends
# to fall into the constant prediction and to stay there; the digits MLP does not.
ATTACK_WARMUP = {"digits": 0.0, "mnist": 0.3, "fashion-mnist": 0.3}
# What a field left at None means. The images have one seed and one setting: a full run of the published
# CNN takes about an hour on two cores.
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"settings": list(SETTINGS), "seeds": 15, "epochs": 30, "batch_size": 64, "lr": 0.1},
    "mnist": {"settings": ["balanced"], "seeds": 1, "epochs": 10, "batch_size": 100, "lr": 0.02},
    "fashion-mnist": {"settings": ["balanced"], "seeds": 1, "epochs": 10, "batch_size": 100, "lr": 0.02},
}


class ConfigError(ValueError):
    """The run cannot start; the message says in one sentence what is wrong and what would be right."""


@dataclass
class AttackConfig:
    """The attack on the training batches: projected gradient ascent in the linf ball, random start.

    Args:
        eps: radius of the ball for pixels in [0, 1], a number or a fraction such as 8/255
        steps: number of gradient steps
        warmup: share of the training steps in which the radius rises linearly to eps (default: digits 0,
            images 0.3)
        step_size: length of a step, a number or a fraction (default: 2.5 * eps / steps)
    """

    eps: str | float = "0.1"
    steps: int = 10
    warmup: float | None = None
    step_size: str | float | None = None


@dataclass
class DualConfig:
    """The re-weighting: the arguments of `armor.losses.DCLoss`.

    Args:
        radius: radius of the divergence ball around uniform weights
        kappa: weight of the divergence penalty; weights are never sharper than exp(loss / kappa)
        divergence: the divergence
        alpha: its order (alpha and renyi only)
    """

    radius: float = 0.2
    kappa: float = 1.0
    divergence: Literal["kl", "alpha", "renyi"] = "kl"
    alpha: float | None = None


@dataclass
class TrainConfig:
    """Adversarial training with uniform weights and with the D^c loss, several seeds, one table.

    Args:
        data: the data set; digits comes with scikit-learn, the others are read from --data-dir
        data_dir: folder with the four idx or idx.gz files of MNIST or FashionMNIST
        settings: one of long-tail, balanced, label-noise or a list [long-tail,balanced]
            (default: digits all three, images balanced)
        train_size: use this many training samples, in the class proportions of the set (default: all)
        test_size: evaluate on this many samples (default: all)
        long_tail_ratio: largest over smallest class of the long-tail setting
        label_noise: share of the training labels replaced by random ones in the label-noise setting
        evaluate_on: judge the final models on the test part or on the validation part (for tuning)
        seeds: number of seeds (default: digits 15, images 1)
        first_seed: the first seed
        epochs: passes over the training part (default: digits 30, images 10)
        batch_size: samples per step, and so per dual problem (default: digits 64, images 100)
        lr: peak learning rate of SGD (default: digits 0.1, images 0.02)
        momentum: momentum of SGD
        warmup: share of the steps in which the learning rate rises linearly; it then falls linearly to 0
        attack: the attack on the training batches
        dual: the re-weighting
        eval_steps: steps of the two PGD attacks of the evaluation (step eps/10, random start)
        device: auto, cpu, cuda or cuda:N
        workers: processes that share the jobs (default: the usable cores, at most 8)
        threads: torch threads of each worker
        runs_dir: folder of all runs
        name: folder of this run inside runs_dir (default: data set and time)
        recorded: facts of an earlier run in its config.yaml (versions, seeds); ignored as input
    """

    data: DataName = "digits"
    data_dir: str | None = None
    settings: list[Setting] | Setting | None = None
    train_size: int | None = None
    test_size: int | None = None
    long_tail_ratio: float = 20.0
    label_noise: float = 0.2
    evaluate_on: Literal["test", "validation"] = "test"
    seeds: int | None = None
    first_seed: int = 0
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float = 0.9
    warmup: float = 0.1
    attack: AttackConfig = field(default_factory=AttackConfig)
    dual: DualConfig = field(default_factory=DualConfig)
    eval_steps: int = 40
    device: str = "auto"
    workers: int | None = None
    threads: int = 1
    runs_dir: str = "runs"
    name: str | None = None
    recorded: dict | None = None


@dataclass
class ResolvedConfig(TrainConfig):
    """A `TrainConfig` that `resolve` has checked and that leaves nothing open."""

    settings: list[Setting] = field(default_factory=list)
    seeds: int = 0
    epochs: int = 0
    batch_size: int = 0
    lr: float = 0.0
    workers: int = 1
    name: str = ""

    @functools.cached_property
    def eps(self) -> float:
        """Radius of the attack's ball."""
        return parse_number(self.attack.eps, "attack.eps")

    @functools.cached_property
    def step_size(self) -> float:
        """Length of a step of the training attack."""
        if self.attack.step_size is None:
            return 2.5 * self.eps / self.attack.steps
        return parse_number(self.attack.step_size, "attack.step_size")

    @property
    def folder(self) -> pathlib.Path:
        """Where the run's files go."""
        return pathlib.Path(self.runs_dir) / self.name


def parse_number(value: str | float, name: str) -> float:
    """The float of "0.1", 0.1 or "8/255"; ConfigError with the argument's name otherwise."""
    try:
        number = float(Fraction(value))
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        raise ConfigError(f"{name} must be a number such as 0.1 or a fraction such as 8/255, got {value!r}") from None
    return number


def resolve(given: TrainConfig) -> ResolvedConfig:
    """Fills in every None that depends on the data set or the machine and checks all. Raises ConfigError."""
    _check_choice("data", given.data, get_args(DataName))
    values = {name: getattr(given, name) for name in vars(given)}
    values |= {name: value for name, value in DATA_DEFAULTS[given.data].items() if values[name] is None}
    if isinstance(given.settings, str):
        values["settings"] = [given.settings]
    if given.attack.warmup is None:
        values["attack"] = replace(given.attack, warmup=ATTACK_WARMUP[given.data])
    if given.workers is None:
        values["workers"] = min(8, _usable_cores())
    if given.name is None:
        values["name"] = f"{given.data}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = ResolvedConfig(**{**values, "device": _resolve_device(given.device), "recorded": None})

    if not config.settings:
        raise ConfigError(f"settings must name at least one of {', '.join(SETTINGS)}, got {config.settings!r}")
    for setting in config.settings:
        _check_choice("settings", setting, SETTINGS)
    if len(set(config.settings)) < len(config.settings):
        raise ConfigError(f"settings must name each setting once, got {', '.join(config.settings)}")
    _check_choice("evaluate_on", config.evaluate_on, ("test", "validation"))

    for name in ("seeds", "epochs", "batch_size", "eval_steps", "threads", "workers"):
        _check_at_least(name, getattr(config, name), 1)
    for name in ("train_size", "test_size"):
        if getattr(config, name) is not None:
            _check_at_least(name, getattr(config, name), 1)
    _check_at_least("first_seed", config.first_seed, 0)
    _check_at_least("attack.steps", config.attack.steps, 1)
    _check_at_least("long_tail_ratio", config.long_tail_ratio, 1)
    for name in ("label_noise", "momentum", "warmup"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} must lie in [0, 1], got {getattr(config, name)}")
    if config.attack.warmup is None or not 0 <= config.attack.warmup <= 1:
        raise ConfigError(f"attack.warmup must lie in [0, 1], got {config.attack.warmup}")
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise ConfigError(f"lr must be positive and finite, got {config.lr}")
    if not 0 < config.eps <= 1:
        raise ConfigError(f"attack.eps must lie in (0, 1] because pixels lie in [0, 1], got {config.attack.eps!r}")
    if not (config.step_size > 0 and math.isfinite(config.step_size)):
        raise ConfigError(f"attack.step_size must be positive, got {config.attack.step_size!r}")
    _check_dual(config.dual)
    if not re.fullmatch(r"\w[\w.+-]*", config.name):
        raise ConfigError(f"name must be one folder name of letters, digits and . + - _, got {config.name!r}")
    if config.data == "digits" and config.data_dir is not None:
        raise ConfigError(
            f"data_dir has no use with data digits, which comes with scikit-learn; got {config.data_dir!r}"
        )
    return config


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_at_least(name: str, value: float, least: float) -> None:
    if not value >= least or math.isinf(value):
        raise ConfigError(f"{name} must be at least {least}, got {value}")


def _check_dual(dual: DualConfig) -> None:
    # The op owns the rules for its arguments, so it is asked rather than repeated here.
    try:
        DCLoss(**asdict(dual))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"dual: {error}") from None


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


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
