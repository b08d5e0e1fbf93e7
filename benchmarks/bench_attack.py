"""Times whole attacks, PGD-10 in the linf ball on two small nets, for `python -m benchmarks attack`.

Each attack is first held to what the plain loop attains: it must stay in the ball and raise the loss as much.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from armor import attacks
from armor.training.models import mnist_cnn
from benchmarks import measure, naive
from benchmarks.measure import Case

BATCH, CLASSES = 128, 10
SETTINGS = {"radius": 8 / 255, "step_size": 2 / 255, "steps": 10}
SHAPES = {"mnist_cnn": (1, 28, 28), "resnet": (3, 32, 32)}
PROVIDERS = ["torchattacks", "backward", "autograd", "armor"]
TURNS = 5  # of one round each: the providers take turns, so that a slow second of the machine falls on all of them


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.skip(x))


def resnet(channels=16):
    """The first convolution, a block at each of three resolutions, and the mean over what is left: a tiny ResNet."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        Block(channels, channels, 1),
        Block(channels, 2 * channels, 2),
        Block(2 * channels, 4 * channels, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * channels, CLASSES),
    )


def cases():
    """Every case, the providers of one net next to each other."""
    return [
        Case(model, BATCH, torch.Size(shape).numel(), "pgd-10", provider)
        for model, shape in SHAPES.items()
        for provider in PROVIDERS
    ]


@measure.each(cases())
@pytest.mark.parametrize("turn", range(TURNS), ids="turn{}".format)
def test_attack(benchmark, case, turn):
    if case.provider == "torchattacks":
        pytest.importorskip("torchattacks", reason="not installed: pip install --no-deps torchattacks")
    error, counts = judged(case)
    step = build(case)
    measure.time(benchmark, "attack", case, step, config=SETTINGS, error=error, counts=counts, rounds=1)


def build(case, device=measure.DEVICE):
    """The case as a function without arguments that returns the adversarial samples."""
    model, x, y = problem(case.case, device)
    radius, step_size, steps = SETTINGS["radius"], SETTINGS["step_size"], SETTINGS["steps"]
    if case.provider == "armor":
        attack = attacks.pgd(eps=radius, steps=steps, step_size=step_size)
        return lambda: attack(model, x, y)
    if case.provider == "torchattacks":
        import torchattacks

        attack = torchattacks.PGD(model, eps=radius, alpha=step_size, steps=steps)
        return lambda: attack(x, y)
    gradient = {"backward": naive.by_backward, "autograd": naive.by_autograd}[case.provider]
    return lambda: naive.pgd(model, x, y, gradient, **SETTINGS)


def problem(name, device=measure.DEVICE):
    """The net, images of noise and labels. The weights are random, as are the images: time knows no difference."""
    torch.manual_seed(0)
    model = (mnist_cnn() if name == "mnist_cnn" else resnet()).eval().to(device)
    return model, torch.rand(BATCH, *SHAPES[name]).to(device), torch.randint(CLASSES, (BATCH,)).to(device)


@functools.lru_cache
def attained(name):
    """Mean losses before an attack and after the plain loop's."""
    model, x, y = problem(name)
    x_adv = naive.pgd(model, x, y, naive.by_autograd, **SETTINGS)
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item(), F.cross_entropy(model(x_adv), y).item()


@functools.lru_cache
def judged(case):
    """How far the loss is from the plain loop's, relative to what that gains; and the counts of the attack."""
    return check(case, build(case)()), measure.counts(build(case, "meta"))


def check(case, x_adv):
    model, x, y = problem(case.case)
    assert (x_adv - x).abs().max() <= SETTINGS["radius"] + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    clean, plain = attained(case.case)
    with torch.no_grad():
        loss = F.cross_entropy(model(x_adv), y).item()
    error = abs(loss - plain) / (plain - clean)
    assert error < 0.05, f"{case.provider} raises the loss from {clean:.3g} to {loss:.3g}, not {plain:.3g}"
    return error
