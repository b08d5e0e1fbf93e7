"""The presets: the settings that each must have, written out by hand from the publication and the authors' scripts, and
steps of training with each, against the definition in plain float64 PyTorch.
"""

import copy
import functools
import itertools
import json
import math
import pathlib
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

pytest.importorskip("jsonargparse")
pytest.importorskip("torchvision")

from test_data import write_cifar, write_images

import armor
from armor import cli, reference
from armor.attacks import Transport
from armor.ops.transport import Linf, NormPower, SoftBall, draw_seeds
from armor.reference import transport as oracle
from armor.training import TrainConfig
from armor.training.config import training_attack
from armor.training.options import parse
from armor.training.resolve import resolve
from armor.training.schedule import make_optimizer, make_schedule
from armor.training.step import make_state, train_step, transport

FOLDER = pathlib.Path(armor.__file__).parent / "presets"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# ---- what each must say --------------------------------------------------------------------------------------------

MNIST = {
    "data": "mnist",
    "model": "mnist-cnn",
    "epochs": 10,
    "batch_size": 100,
    "augment": False,
    "normalize": False,
    "attack.warmup": 0.0,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.momentum": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip": None,
    "evaluate.eps": "0.1",
    "evaluate.steps": 40,
    "evaluate.step_size": 0.01,
}
CIFAR = {
    "model": "resnet18",
    "epochs": 200,
    "batch_size": 128,
    "augment": True,
    "attack.warmup": 0.0,
    "attack.batchnorm": "eval",
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "evaluate.steps": 200,
}
CIFAR10 = {**CIFAR, "data": "cifar10", "evaluate.eps": "8/255", "evaluate.step_size": "2/255"}
CIFAR100 = {**CIFAR, "data": "cifar100", "evaluate.eps": "0.01", "evaluate.step_size": 0.001}
LATE = {"normalize": False, "optimizer.lr": 0.01, "optimizer.weight_decay": 3.5e-3}
FASHION = {
    "data": "fashion-mnist",
    "model": "small-cnn",
    "train_size": 10_000,
    "test_size": 5_000,
    "control": True,
    "seeds": 3,
    "epochs": 12,
    "batch_size": 100,
    "natural_mix": 0.0,
    "attack.warmup": 0.3,
    "optimizer.lr": 0.1,
    "optimizer.warmup": 0.1,
    "optimizer.schedule": "linear",
    "evaluate.eps": "0.1",
    "evaluate.steps": 40,
}


def learned(divergence, alpha, radius, nu, optimizer, lr):
    return {
        "dual.solve": "learned",
        "dual.divergence": divergence,
        "dual.alpha": alpha,
        "dual.radius": radius,
        "dual.kappa": 0.0,
        "dual.lam": 1.0,
        "dual.nu": nu,
        "dual.optimizer": optimizer,
        "dual.lr": lr,
    }


def exact(divergence, alpha, radius, kappa):
    return {
        "dual.solve": "exact",
        "dual.divergence": divergence,
        "dual.alpha": alpha,
        "dual.radius": radius,
        "dual.kappa": kappa,
    }


def trades(beta, mix):
    return {"method": "trades", "beta": beta, "natural_mix": mix, "attack.eps": "0.031"}


def mart(mix):
    return {"method": "mart", "beta": 6.0, "natural_mix": mix, "attack.eps": "0.031"}


SETTINGS = {
    "mnist-kl": {**MNIST, "method": "penalised-ot", "natural_mix": 0.0, **learned("kl", None, 5e-4, 1.0, "adam", 2e-4)},
    "mnist-kl-nat": {
        **MNIST,
        "method": "penalised-ot",
        "natural_mix": 0.5,
        **learned("kl", None, 0.003, 1.0, "adam", 2e-3),
    },
    "mnist-alpha": {
        **MNIST,
        "method": "penalised-ot",
        "natural_mix": 0.0,
        **learned("alpha", 5.0, 5e-4, 1.0, "adam", 5e-4),
    },
    "mnist-alpha-nat": {
        **MNIST,
        "method": "penalised-ot",
        "natural_mix": 0.5,
        **learned("alpha", 3.0, 0.07, 1.0, "adam", 1.6e-3),
    },
    "mnist-renyi": {**MNIST, "method": "pgd", "natural_mix": 0.0, **exact("renyi", 1.25, 0.1, 0.1)},
    "mnist-renyi-nat": {**MNIST, "method": "pgd", "natural_mix": 0.4, **exact("renyi", 2.95, 0.2, 0.09)},
    "cifar10-udr": {
        **CIFAR10,
        "method": "udr",
        "natural_mix": 0.0,
        "normalize": True,
        "attack.eps": "8/255",
        **learned("alpha", 6.0, 0.5, -0.35, "adamw", 4e-6),
        "optimizer.lr": 0.1,
        "optimizer.weight_decay": 5e-4,
        "optimizer.clip": None,
    },
    "cifar100-udr": {
        **CIFAR100,
        "method": "udr",
        "natural_mix": 0.0,
        "normalize": True,
        "attack.eps": "0.01",
        **exact("kl", None, 0.2, 0.12),
        "optimizer.lr": 0.01,
        "optimizer.weight_decay": 3.5e-3,
        "optimizer.clip": None,
    },
    "cifar10-trades": {
        **CIFAR10,
        **LATE,
        **trades(19.0, 0.5),
        **learned("alpha", 6.0, 0.5, -0.35, "adamw", 4e-6),
        "optimizer.clip": None,
    },
    "cifar10-trades-kl": {
        **CIFAR10,
        **LATE,
        **trades(19.0, 0.5),
        **exact("kl", None, 0.02, 0.1),
        "optimizer.clip": 5.0,
    },
    "cifar100-trades-kl": {
        **CIFAR100,
        **LATE,
        **trades(19.0, 0.97),
        **exact("kl", None, 0.2, 0.12),
        "optimizer.clip": 5.0,
    },
    "cifar10-mart": {
        **CIFAR10,
        **LATE,
        **mart(0.0),
        **learned("alpha", 10.0, 0.5, 1.0, "adamw", 6e-6),
        "optimizer.clip": None,
    },
    "cifar100-mart-kl": {
        **CIFAR100,
        **LATE,
        **mart(0.8),
        **exact("kl", None, 0.002, 0.12),
        "optimizer.clip": 5.0,
    },
    "cifar10-fast": {
        **CIFAR10,
        "model": "preact-resnet18",
        "method": "pgd",
        "normalize": True,
        "epochs": 15,
        "monitor": True,
        "attack.eps": "8/255",
        "dual.divergence": "mean",
        "optimizer.lr": 0.2,
        "optimizer.weight_decay": 5e-4,
        "evaluate.steps": 50,
    },
    "cifar10-awp-trades": {
        **CIFAR10,
        "method": "trades",
        "beta": 6.0,
        "natural_mix": 0.0,
        "normalize": False,
        "attack.eps": "8/255",
        "dual.divergence": "mean",
        "awp.gamma": 0.005,
        "awp.start": 10,
        "optimizer.lr": 0.1,
        "optimizer.weight_decay": 5e-4,
        "evaluate.steps": 20,
    },
    "fashion-mnist-pgd": {**FASHION, "method": "pgd", **exact("kl", None, 0.02, 1.0)},
    "fashion-mnist-trades": {**FASHION, "method": "trades", "beta": 6.0, **exact("kl", None, 0.02, 1.0)},
    "fashion-mnist-mart": {**FASHION, "method": "mart", "beta": 6.0, **exact("kl", None, 0.02, 1.0)},
    "fashion-mnist-udr": {**FASHION, "method": "udr", **exact("kl", None, 0.02, 1.0), "dual.lam": 4.0},
    # What `armor train` did without arguments before there were presets; the README's table is of it.
    "demo": {
        "data": "digits",
        "model": "mlp",
        "settings": ["long-tail", "balanced", "label-noise"],
        "control": True,
        "seeds": 15,
        "first_seed": 0,
        "select": "last",
        "epochs": 30,
        "batch_size": 64,
        "long_tail_ratio": 20.0,
        "label_noise": 0.2,
        "method": "pgd",
        "natural_mix": 0.0,
        "attack.warmup": 0.0,
        **exact("kl", None, 0.2, 1.0),
        "optimizer.name": "sgd",
        "optimizer.lr": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 0.0,
        "optimizer.warmup": 0.1,
        "optimizer.schedule": "linear",
        "optimizer.clip": None,
        "awp.gamma": 0.0,
        "average.kind": "none",
        "evaluate.on": "test",
        "evaluate.steps": 40,
        "evaluate.step_size": None,
    },
}

PUBLISHED = {"steps": 10, "step_size": 0.007, "start": "gaussian", "sigma": 0.001}
ATTACKS = {
    "mnist-kl": Transport(NormPower(0.1, 2.0, 1.5), 20, 0.01, start="clean"),
    "mnist-kl-nat": Transport(NormPower(0.01, 2.0, 1.0), 20, 0.01, start="clean"),
    "mnist-alpha": Transport(NormPower(0.1, 2.0, 2.5), 20, 0.01, start="clean"),
    "mnist-alpha-nat": Transport(NormPower(0.2, math.inf, 1.5), 40, 0.01, start="clean"),
    "mnist-renyi": Transport(Linf(0.1), 20, 0.01, start="clean"),
    "mnist-renyi-nat": Transport(Linf(0.1), 20, 0.01, start="clean"),
    "cifar10-udr": Transport(SoftBall(8 / 255, 2 / 255), 10, 2 / 255, start="uniform"),
    "cifar100-udr": Transport(SoftBall(0.01, 0.001), 10, 0.001, start="uniform"),
    "cifar10-trades": Transport(Linf(0.031), loss="kl", **PUBLISHED),
    "cifar10-trades-kl": Transport(Linf(0.031), loss="kl", **PUBLISHED),
    "cifar100-trades-kl": Transport(Linf(0.031), loss="kl", **PUBLISHED),
    "cifar10-mart": Transport(Linf(0.031), loss="mart", beta=6.0, **PUBLISHED),
    "cifar100-mart-kl": Transport(Linf(0.031), loss="mart", beta=6.0, **PUBLISHED),
    "cifar10-fast": Transport(Linf(8 / 255), 1, 10 / 255, start="uniform"),
    "cifar10-awp-trades": Transport(Linf(8 / 255), 10, 2 / 255, start="gaussian", sigma=0.001, loss="kl"),
    "fashion-mnist-pgd": Transport(Linf(0.1), 10, 0.025, start="uniform"),
    "fashion-mnist-trades": Transport(Linf(0.1), 10, 0.025, start="gaussian", sigma=0.001, loss="kl"),
    "fashion-mnist-mart": Transport(Linf(0.1), 10, 0.025, start="gaussian", sigma=0.001),
    "fashion-mnist-udr": Transport(SoftBall(0.1, 0.1), 10, 0.025, start="uniform"),
    "demo": Transport(Linf(0.1), 10, 0.025, start="uniform"),
}

# Learning rate in the epochs named, counted from 1, and in those around a drop.
RATES = {
    **{
        name: {1: 0.1, 5: 0.1, 6: 0.01, 10: 0.01}
        for name in ("mnist-kl", "mnist-kl-nat", "mnist-alpha", "mnist-alpha-nat")
    },
    **{name: {1: 0.1, 3: 0.1, 4: 0.01, 10: 0.01} for name in ("mnist-renyi", "mnist-renyi-nat")},
    "cifar10-udr": {1: 0.1, 100: 0.1, 101: 0.01, 150: 0.01, 151: 1e-3, 200: 1e-3},
    "cifar100-udr": {1: 0.01, 75: 0.01, 76: 1e-3, 90: 1e-3, 91: 1e-4, 100: 1e-4, 101: 1e-5, 200: 1e-5},
    **{
        name: {1: 0.01, 74: 0.01, 75: 1e-3, 89: 1e-3, 90: 1e-4, 99: 1e-4, 100: 1e-5, 200: 1e-5}
        for name in ("cifar10-trades", "cifar10-trades-kl", "cifar100-trades-kl", "cifar10-mart", "cifar100-mart-kl")
    },
    "cifar10-awp-trades": {1: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 1e-3, 200: 1e-3},
}


@functools.cache
def parsed(name: str) -> TrainConfig:
    """What the command line makes of the preset."""
    return parse(["train", "--preset", name, "--device", "cpu"])[1]["config"]


def given(name: str, **changes) -> TrainConfig:
    return replace(parsed(name), **changes)


def setting(config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_there_is_one_preset_for_every_row_of_the_table_and_none_without():
    assert set(NAMES) == set(SETTINGS) == set(ATTACKS)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_published_ones(name):
    config = resolve(given(name))
    assert {key: setting(config, key) for key in SETTINGS[name]} == SETTINGS[name]
    assert training_attack(config) == ATTACKS[name]
    assert config.extra is None
    assert config.label_smoothing == 0
    assert config.average.kind == "none"
    # Models are selected on held-out training data, and the test part is only ever judged on.
    assert config.evaluate.on == "test"
    assert config.select == ("last" if name == "demo" else "best")


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_falls_when_the_script_lets_it_fall(name):
    config, steps_per_epoch = resolve(given(name)), 2
    optimizer = make_optimizer(config, nn.Linear(1, 1))
    schedule, rates = make_schedule(config, optimizer, steps_per_epoch), {}
    for epoch in range(1, config.epochs + 1):
        for _ in range(steps_per_epoch):
            rates.setdefault(epoch, set()).add(round(optimizer.param_groups[0]["lr"], 12))
            optimizer.step()
            schedule.step()
    assert {epoch: rates[epoch] for epoch in RATES[name]} == {epoch: {rate} for epoch, rate in RATES[name].items()}


def test_the_fast_learning_rate_rises_to_the_middle_and_falls_to_zero():
    config = resolve(given("cifar10-fast"))
    optimizer = make_optimizer(config, nn.Linear(1, 1))
    schedule, rates = make_schedule(config, optimizer, 100), []
    for _ in range(1500):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.2, rel=1e-3)
    assert rates.index(max(rates)) in range(745, 755)
    assert rates[374] == pytest.approx(0.1, rel=1e-2)
    assert rates[1125] == pytest.approx(0.1, rel=1e-2)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_file_opens_with_what_it_is_its_source_and_its_traps(name):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    marks = [line.split()[1] for line in comments if line.startswith(("# Source: ", "# Traps: "))]
    assert marks == ["Source:", "Traps:"]
    assert not comments[0].startswith("# Source: ")
    assert max(map(len, lines)) <= 120


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_is_the_preset_and_can_be_given_back(name, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--preset", name, "--device", "cpu", "--print-config"])
    assert end.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert yaml.safe_load(printed.read_text())["preset"] == name
    assert parse(["train", "--config", str(printed)])[1]["config"] == parsed(name)


def test_options_override_the_preset_wherever_they_stand():
    arguments = ["--dual.solve", "exact", "--preset", "cifar10-trades", "--attack.steps", "7", "--seeds", "2"]
    config = parse(["train", *arguments])[1]["config"]
    assert (config.dual.solve, config.attack.steps, config.seeds) == ("exact", 7, 2)
    assert (config.dual.radius, config.attack.step_size, config.beta) == (0.5, 0.007, 19.0)


def test_an_unknown_preset_is_answered_with_the_nearest(capsys):
    assert cli.main(["train", "--preset", "cifar10-trade-kl"]) == 2
    sentence = capsys.readouterr().err
    assert "there is no preset 'cifar10-trade-kl' (do you mean cifar10-trades-kl" in sentence
    assert sentence.count("\n") == 1


# A data set, a transport and a dual of its own each; batches of 16 give two steps.
@pytest.mark.parametrize("name", ["mnist-alpha", "fashion-mnist-udr", "cifar10-udr", "cifar100-mart-kl"])
def test_a_run_from_the_command_line(name, tmp_path, monkeypatch, capsys):
    config = given(name)
    if config.data.startswith("cifar"):
        classes = int(config.data.removeprefix("cifar"))
        write_cifar(monkeypatch, tmp_path, classes=classes, per_class={10: 30, 100: 4}[classes])
    else:
        write_images(tmp_path, ".gz")
    model = "wrn-10-1" if config.model == "resnet18" else "small-cnn"
    size = {"--train-size": 32, "--test-size": 20, "--batch-size": 16, "--epochs": 1, "--evaluate.steps": 1}
    short = {"--seeds": 1, "--attack.steps": 2, "--workers": 1, "--threads": 1, "--runs-dir": tmp_path, "--name": "run"}
    where = {"--data-dir": tmp_path, "--model": model, "--device": "cpu"}
    options = [str(part) for pair in (size | short | where).items() for part in pair]
    assert cli.main(["train", "--preset", name, *options]) == 0, capsys.readouterr().err
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["preset"] == name
    assert stored["attack"]["eps"] == config.attack.eps or config.attack.eps is None
    runs = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert len(runs) == (2 if config.control else 1)
    for entry in runs:
        assert all(math.isfinite(number) for number in entry["history"]["objective"])
        assert 0 <= entry["final"]["robust"] <= entry["final"]["clean"] <= 1


# ---- steps of training, against the definition ---------------------------------------------------------------------

SHAPES = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}
STATISTICS = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])

# What the folded, channels_last, fused path may differ by from the definition in float64, on one and the same attacked
# batch: the objective, relative; the updates of the weights and of BatchNorm's statistics, relative to their norm, and
# in float32 beyond one and a half times the difference of the definition computed in float32. A pixel whose gradient is
# next to 0 may step the other way, and others follow it, so attacks are compared by the share of pixels that end
# elsewhere, again beyond that of the definition in float32.
TOLERANCE = {torch.float64: (1e-9, 1e-7), torch.float32: (1e-5, 1e-3)}


def batch(data: str, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of the shape of the data, a blurred image per class with noise, and their labels."""
    shape, classes = SHAPES[data]
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(classes, shape[0], 4, 4, generator=generator, dtype=torch.float32)
    images = F.interpolate(coarse, shape[1:], mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (size,), generator=generator)
    noise = torch.randn(size, *shape, generator=generator, dtype=torch.float32)
    x = (images[y] + 0.1 * noise).clamp(0, 1)
    return x.to(torch.get_default_dtype(), memory_format=torch.channels_last), y


def small(name: str, **changes):
    """The preset with its model, where that is too slow here, exchanged for one of the same kind."""
    config = given(name, **changes)
    slow = config.model in ("resnet18", "preact-resnet18")
    return resolve(replace(config, model="wrn-10-1") if slow and "model" not in changes else config)


def state_of(config, weighting: str):
    """What a run starts with. The attack is past its warm-up, which other tests hold."""
    shape, classes = SHAPES[config.data]
    mean, std = (part.to(torch.get_default_dtype()) for part in STATISTICS)
    problem = types.SimpleNamespace(shape=shape, classes=classes, mean=mean, std=std)
    state = make_state(config, 0, weighting, problem, steps_per_epoch=50)
    state.attack_warmup = 0
    return state


def plain_losses(method: str, beta: float, natural, adversarial, y):
    """The loss of every sample as published."""
    ce = F.cross_entropy(adversarial, y, reduction="none")
    if method not in ("trades", "mart", "kl"):
        return ce
    log_p, log_q = F.log_softmax(natural, 1), F.log_softmax(adversarial, 1)
    if method == "kl":
        return (log_p.exp() * (log_p - log_q)).sum(1)
    if method == "trades":
        return F.cross_entropy(natural, y, reduction="none") + beta * (log_p.exp() * (log_p - log_q)).sum(1)
    p, q = log_p.exp(), log_q.exp()
    wrong = q.scatter(1, y[:, None], -1.0).amax(1)
    boosted = ce - torch.log(1.0001 - wrong + 1e-12)
    kl = (p * (p.log() - torch.log(q + 1e-12))).sum(1)
    return boosted + beta * kl * (1.0000001 - p.gather(1, y[:, None]).squeeze(1))


def plain_cost(method: str, attack, d):
    """The transport cost of displacements, and the set's or cost's part of a step is in `plain_attack`."""
    if method == "udr":
        return (d.abs() - attack.eps).clamp_min(0).square().flatten(1).sum(1) / (2 * attack.tau)
    return attack.weight * torch.linalg.vector_norm(d.flatten(1), ord=attack.p, dim=1) ** attack.power


class PlainAttack:
    """The numbers of an attack, by hand from the table above."""

    def __init__(self, name: str) -> None:
        transport = ATTACKS[name]
        self.steps, self.step, self.start, self.loss = (
            transport.steps,
            transport.step_size,
            transport.start,
            transport.loss,
        )
        self.beta, self.sigma = transport.beta, transport.sigma
        cost = transport.cost
        self.eps, self.tau = getattr(cost, "radius", None), getattr(cost, "tau", None)
        self.weight, self.p, self.power = (getattr(cost, part, None) for part in ("weight", "p", "power"))


def plain_attack(method: str, attack: PlainAttack, model, x, y, mu: float, seeds):
    """x_adv of the model in eval mode, by the definition of the method's attack."""
    model.eval()
    start = {"uniform": oracle.LINF, "gaussian": oracle.GAUSSIAN, "clean": oracle.CLEAN}[attack.start]
    scale = attack.sigma if attack.start == "gaussian" else attack.eps or 0.0
    x_adv, _, _ = reference.transport_init(x, seeds, None, None, None, start, scale, 0.0, 1.0, None)
    with torch.no_grad():
        natural = model(x)
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = plain_losses(attack.loss, attack.beta, natural, model(x_adv), y)
        if method == "penalised-ot" and (x_adv != x).any():
            loss = loss - mu * plain_cost(method, attack, x_adv - x)
        (gradient,) = torch.autograd.grad(loss.sum(), x_adv)
        x_adv = x_adv.detach() + attack.step * gradient.sign()
        if method == "udr":
            d = x_adv - x
            beyond = (d - attack.eps * d.sign()) * (d.abs() > attack.eps)
            x_adv = x + d - attack.step * mu / attack.tau * beyond
        elif method != "penalised-ot":
            x_adv = torch.minimum(torch.maximum(x_adv, x - attack.eps), x + attack.eps)
        x_adv = x_adv.clamp(0, 1)
    model.train()
    return x_adv.detach()


class PlainStep:
    """A step by the definition, in one dtype, from where `state` stands and on its attacked batch."""

    def __init__(self, state, weighting, attack, dtype) -> None:
        config = state.config
        self.config, self.weighting, self.attack, self.dtype = config, weighting, attack, dtype
        self.model = copy.deepcopy(state.model).to(dtype)
        self.start = parameters(self.model)
        self.start_statistics = statistics(self.model)
        self.mu = float(state.mu)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=state.optimizer.param_groups[0]["lr"],
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
        )
        for parameter, memory in zip(self.model.parameters(), memories(state.optimizer, dtype), strict=False):
            self.optimizer.state[parameter] = memory
        self.duals, self.dual_optimizer = {}, None
        if state.dual is not None:
            self.duals = {
                name: value.detach().clone().to(dtype).requires_grad_() for name, value in state.dual.named_parameters()
            }
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.dual.optimizer]
            self.dual_optimizer = kind(self.duals.values(), lr=config.dual.lr)
            for parameter, memory in zip(self.duals.values(), memories(state.dual_optimizer, dtype), strict=False):
                self.dual_optimizer.state[parameter] = memory
            self.mu = self.duals["log_lam"].exp().item() + config.dual.kappa

    def attacked(self, x, y, seeds):
        return plain_attack(self.config.method, self.attack, self.model, x.to(self.dtype), y, self.mu, seeds)

    def run(self, x, x_adv, y) -> None:
        """Moves the model and the duals; leaves `value` and `mu`."""
        x, x_adv = x.to(self.dtype), x_adv.to(self.dtype)
        if self.config.awp.gamma > 0:
            self.perturb(x, x_adv, y)
        surrogate, self.value, self.mu = self.objective(x, x_adv, y)
        surrogate.backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        if self.config.optimizer.clip is not None:
            length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
            for gradient in gradients:
                gradient *= min(1.0, self.config.optimizer.clip / (length + 1e-6))
        with torch.no_grad():
            for weight, value in zip(self.model.parameters(), self.start, strict=True):
                weight.copy_(value)
        self.optimizer.step()
        if self.dual_optimizer is not None:
            self.dual_optimizer.step()

    def perturb(self, x, x_adv, y) -> None:
        """AWP: every matrix and kernel goes up along its gradient by gamma of its norm; BatchNorm's statistics stay."""
        gradients = torch.autograd.grad(self.objective(x, x_adv, y)[0], list(self.model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(self.model.parameters(), gradients, strict=True):
                if weight.dim() > 1:
                    weight += self.config.awp.gamma * weight.norm() * gradient / gradient.norm()
            running = [buffer for name, buffer in self.model.named_buffers() if "running" in name]
            for buffer, value in zip(running, self.start_statistics, strict=True):
                buffer.copy_(value)

    def objective(self, x, x_adv, y):
        """(what is differentiated, its value, mu): losses, re-weighting and natural mix by their definitions."""
        config, dual, method, t = self.config, self.config.dual, self.config.method, self.config.natural_mix
        solved = self.weighting == "dc" and dual.solve == "exact"
        costs = plain_cost(method, self.attack, x_adv - x) if method in ("udr", "penalised-ot") else None
        needs_natural = method in ("trades", "mart") or t > 0 or (solved and costs is not None)
        natural = self.model(x) if needs_natural else None
        losses = plain_losses(method, config.beta or 6.0, natural, self.model(x_adv), y)
        clean = None if natural is None else F.cross_entropy(natural, y, reduction="none")
        if self.weighting == "mean":
            robust = value = losses.mean()
            mu = math.nan if costs is None else dual.lam
        elif solved:
            kind = ("kl", "alpha", "renyi").index(dual.divergence)
            stay = None if costs is None else clean.detach()
            numbers = (dual.alpha or 0.0, dual.radius, dual.kappa, 1e6)
            value, lam, _, weights, _, _ = reference.dual(losses.detach(), costs, stay, kind, *numbers)
            mu = (lam + dual.kappa).item()
            taken = losses if costs is None else torch.where(losses.detach() - mu * costs >= stay, losses, clean)
            robust = (weights * taken).sum()  # the envelope theorem: weights are held fixed
        else:
            lam = self.duals["log_lam"].exp()
            a = losses / lam if costs is None else losses / lam - costs
            if dual.divergence == "kl":
                potential = a.exp().mean().log()
            else:
                order, nu = dual.alpha, self.duals["nu"]
                power = order / (order - 1)
                conjugate = (order - 1) ** power / order * (a - nu).clamp_min(0) ** power + 1 / (order * (order - 1))
                potential = nu + conjugate.mean()
            robust = value = lam * (dual.radius + potential)
            mu = lam.item()
        if t == 0:
            return robust, value.item(), mu
        return t * clean.mean() + (1 - t) * robust, (t * clean.mean() + (1 - t) * value).item(), mu


def memories(optimizer, dtype):
    """What an optimiser remembers of each parameter, cast."""
    for memory in optimizer.state_dict()["state"].values():
        kept = {key: value.clone() for key, value in memory.items() if value is not None}
        yield {key: value if key == "step" else value.to(dtype) for key, value in kept.items()}


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def statistics(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


def norm(one, other):
    """Distance of two lists of tensors."""
    pairs = zip(one, other, strict=True)
    return math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in pairs))


def elsewhere(one, other):
    """The share of pixels that are not the same."""
    return ((one - other).abs() > 1e-5).double().mean().item()


def check_steps(name: str, config, weighting: str, size: int):
    dtype = torch.get_default_dtype()
    value, update = TOLERANCE[dtype]
    state, attack = state_of(config, weighting), PlainAttack(name)
    for step in range(2 if dtype == torch.float64 else 1):  # the second meets momentum and moved duals
        x, y = batch(config.data, size, seed=step)
        exact = PlainStep(state, weighting, attack, torch.float64)
        naive = PlainStep(state, weighting, attack, torch.float32) if dtype == torch.float32 else exact
        drawn = state.noise.get_state()
        x_adv, _ = transport(state, x, y)
        state.noise.set_state(drawn)
        seeds = draw_seeds(x, state.noise)
        state.noise.set_state(drawn)
        expected = exact.attacked(x, y, seeds)
        rounded = elsewhere(naive.attacked(x, y, seeds), expected) if naive is not exact else 0.0
        assert elsewhere(x_adv, expected) <= 1e-3 + 1.5 * rounded
        assert (x_adv - x).abs().amax() > 1e-3

        record = train_step(state, x, y)
        exact.run(x, x_adv, y)
        if naive is not exact:
            naive.run(x, x_adv, y)
        assert record[:2].isfinite().all()
        assert record[0].item() == pytest.approx(exact.value, rel=value)
        assert record[2].item() == pytest.approx(exact.mu, rel=10 * value, nan_ok=True)
        models = (state.model, exact.model, naive.model)
        for start, what in ((exact.start, parameters), (exact.start_statistics, statistics)):
            ours, theirs, rounded = (what(model) for model in models)
            allowed = update * norm(theirs, start) + (1.5 * norm(rounded, theirs) if naive is not exact else 0.0)
            assert norm(ours, theirs) <= allowed
            assert norm(ours, start) > 0 or not start
        if state.dual is not None:
            for ours, theirs in zip(state.dual.parameters(), exact.duals.values(), strict=True):
                assert ours.item() == pytest.approx(theirs.item(), abs=1e-7)


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("dtype")
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_definition(name):
    # AWP begins after nine epochs; here it is on from the first step. Gradients are about 2 long; here 1 is the limit.
    preset = given(name)
    clipped = replace(preset.optimizer, clip=None if preset.optimizer.clip is None else 1.0)
    config = small(name, awp=replace(preset.awp, start=1), optimizer=clipped)
    check_steps(name, config, "mean" if config.dual.divergence == "mean" else "dc", size=4)


@pytest.mark.usefixtures("dtype")
@pytest.mark.parametrize("name", ["demo", "fashion-mnist-trades", "fashion-mnist-mart", "fashion-mnist-udr"])
def test_steps_of_the_uniform_control_are_those_of_the_definition(name):
    check_steps(name, small(name), "mean", size=4)


def test_a_step_of_the_real_resnet18_is_that_of_the_definition():
    check_steps("cifar10-trades-kl", small("cifar10-trades-kl", model="resnet18"), "dc", size=2)
