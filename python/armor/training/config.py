"""The typed configuration of a training run.

`armor train` builds a `TrainConfig` from a preset, YAML and the command line; resolve.py makes a `ResolvedConfig` of
it, which all else reads.
"""

from __future__ import annotations

import functools
import pathlib
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

from armor import attacks

DataName = Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "image-folder", "npz"]
MethodName = Literal["pgd", "trades", "mart", "udr", "penalised-ot", "natural"]
Setting = Literal["balanced", "long-tail", "label-noise"]
Norm = Literal["linf", "l2", "l1", "binary"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
COST_METHODS = ("udr", "penalised-ot")  # whose transport has a price instead of a boundary


class ConfigError(ValueError):
    """The run cannot start; the message says in one sentence what is wrong and what would be right."""


@dataclass
class AttackConfig:
    """The attack on the training batches; `armor.attacks` has the details.

    Args:
        norm: of the ball that confines pgd, trades and mart; binary: features that may only change from 0 to 1
        eps: radius of the ball for pixels in [0, 1], a number or a fraction such as 8/255 (default: CIFAR and SVHN
            8/255, folders 4/255, others 0.1; binary 1)
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
    if config.method == "udr":
        tau = step_size if given.tau is None else strength * parse_number(given.tau, "attack.tau")
        return attacks.udr(eps, tau, steps, step_size, **options)
    if config.method == "penalised-ot":
        return attacks.penalised_ot(given.weight, float(given.p), given.power, steps, step_size, **options)
    if config.method == "trades":
        options = {"start": "gaussian", "loss": "kl", **options}
    elif config.method == "mart":
        options = {"start": "gaussian", "beta": beta(config), **options}
    return attack_in(given.norm, eps, steps, step_size, sigma=given.sigma, **options)


def attack_in(norm: Norm, eps: float, steps: int, step_size: float, **options: Any) -> attacks.Transport:
    """PGD in the ball or, of binary features, which have none, rFGSM^k; options are those of `Transport`."""
    if norm == "binary":
        return attacks.rfgsm_k(steps, step_size, **options)
    return attacks.pgd(eps, steps, step_size, norm, **options)


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
