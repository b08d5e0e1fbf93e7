"""Times whole training steps, ARMOR_D on top of TRADES with PGD-10 and KL, for `python -m benchmarks train`.

The nets are those of CIFAR-10; images and labels are random, as time knows no difference. `published` is the step of
the published scripts, of which tests/test_counts.py makes sure; `eager` is the same written with care. Before `eager`
and `armor` are timed, their samples must be in the ball and raise the TRADES divergence as much as the plain loop's,
and their loss must be that of these samples in float64.
"""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from armor import attacks, ops, reference
from armor.library import IGNORE_NOTHING
from armor.reference.rowloss import TRADES
from armor.training.models import resnet18
from benchmarks import measure, naive
from benchmarks.bench_attack import CLASSES, resnet
from benchmarks.measure import Case

ON_GPU = measure.DEVICE != "cpu"
SHAPE = (3, 32, 32)
BATCH = 128 if ON_GPU else 32
ROUNDS = 10 if ON_GPU else 2
RADIUS, STEP_SIZE, STEPS, SIGMA = 8 / 255, 2 / 255, 10, 0.001
DUAL = {"beta": 6.0, "radius": 0.2, "kappa": 0.12}
# The error of the loss that the rounding of the net may cause.
PRECISIONS = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
MODES = ["step", "graph", "compile"]
NETS = {"resnet18": resnet18, "resnet8": resnet}


def cases():
    """Every case, the providers of one problem next to each other and what takes longest to prepare last."""
    return [
        Case(f"{net} {precision}", BATCH, torch.Size(SHAPE).numel(), mode, provider)
        for mode in (MODES if ON_GPU else MODES[:1])
        for net in NETS
        for precision in (PRECISIONS if ON_GPU else ["fp32"])
        for provider in ("published", "eager", "armor")
        if _timed(net, mode, provider)
    ]


def _timed(net, mode, provider):
    if provider == "published":  # waits for the host, which no graph can
        return mode == "step"
    return mode != "compile" or net == "resnet18"  # half a minute each


@measure.each(cases())
def test_train(benchmark, case):
    if case.case.startswith("resnet18"):
        pytest.importorskip("torchvision", reason="not installed: pip install torchvision")
    config = DUAL | {"eps": RADIUS, "step_size": STEP_SIZE, "steps": STEPS}
    with precision(case.case.split()[1]):
        run, model, x, y = build(case)
        run()
        before = copy.deepcopy(model)
        x_adv, loss = run()
        error = None if x_adv is None else check(case, before, x, y, x_adv, loss)
        measure.time(benchmark, "train", case, run, config=config, error=error, rounds=ROUNDS)


def build(case, device=measure.DEVICE):
    """The case as a function without arguments that trains and returns x_adv, if it can, and the loss; then the model,
    the images and the labels."""
    name, kind = case.case.split()
    model, x, y = problem(name, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    net = model
    if case.mode == "compile":
        torch._dynamo.reset()
        net = torch.compile(model)
    amp = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=kind == "bf16")

    def published_step():
        with amp():
            settings = {"beta": DUAL["beta"], "radius": RADIUS, "step_size": STEP_SIZE, "steps": STEPS}
            return None, naive.trades_training_step(net, optimizer, x, y, published_loss, **settings)

    def step():
        with amp():
            x_adv, loss = (armor_loss if case.provider == "armor" else naive_loss)(net, x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return x_adv, loss.detach()

    run = published_step if case.provider == "published" else step
    return measure.graphed(run) if case.mode == "graph" else run, model, x, y


def problem(net, device=measure.DEVICE):
    """The net, images of noise and labels."""
    torch.manual_seed(0)
    model = NETS[net]().to(device, memory_format=torch.channels_last).train()
    x = torch.rand(BATCH, *SHAPE).to(device).contiguous(memory_format=torch.channels_last)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # after one look they know the images, else nothing would reach the last layer in eval mode
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model, x, torch.randint(CLASSES, (BATCH,)).to(device)


attack = attacks.trades(RADIUS, STEPS, STEP_SIZE, sigma=SIGMA)


def armor_loss(model, x, y):
    x_adv = attack(model, x, y)
    return x_adv, ops.dc_trades(model(x), model(x_adv), y, **DUAL)


def naive_loss(model, x, y):
    x_adv = naive_attack(model, x)
    return x_adv, naive.dc_trades(model(x), model(x_adv), y, **DUAL)


def published_loss(losses):
    return naive.host_dc_loss(losses, divergence="kl", radius=DUAL["radius"], kappa=DUAL["kappa"])


def naive_attack(model, x):
    """The published loop with care: the natural prediction is computed once, and gradients in the images alone."""
    model.eval()
    with torch.no_grad():
        natural = F.softmax(model(x), 1)
    x_adv = naive.gaussian_start(x, sigma=SIGMA)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        divergence = F.kl_div(F.log_softmax(model(x_adv), 1), natural, reduction="sum")
        (grad,) = torch.autograd.grad(divergence, x_adv)
        x_adv = naive.linf_step(x_adv.detach(), grad, x, step_size=STEP_SIZE, radius=RADIUS)
    model.train()
    return x_adv


@contextlib.contextmanager
def precision(kind):
    """Of the products of float32 numbers: PyTorch's default is TF32 in convolutions, and not in others."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = kind != "fp32"
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def check(case, model, x, y, x_adv, loss):
    """Relative error of the loss that a step on `model` found with the samples x_adv."""
    assert (x_adv - x).abs().max() <= RADIUS + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    raised, plain = (divergence(model, x, images) for images in (x_adv, naive_attack(model, x)))
    assert raised > 0.75 * plain, f"{case.provider} raises the divergence to {raised:.3g}, not {plain:.3g}"
    with torch.no_grad():
        natural, adversarial = (model(images).double().cpu() for images in (x, x_adv))
    exact = expected(natural, adversarial, y.cpu())
    error = ((loss.cpu() - exact) / exact).abs().item()
    assert error < PRECISIONS[case.case.split()[1]], f"{case.provider} is off by {error:.1e}"
    return error


def expected(natural, adversarial, y):
    losses, _ = reference.rowloss(adversarial, y, natural, TRADES, DUAL["beta"], 0.0, IGNORE_NOTHING)
    scalars = (reference.KL, 1.0, DUAL["radius"], DUAL["kappa"], 1e6)
    return reference.dual(losses[None], None, None, *scalars)[0][0]


@torch.no_grad()
def divergence(model, x, x_adv):
    with attacks.modes(model):
        predictions = (model(images).log_softmax(1) for images in (x_adv, x))
        return F.kl_div(*predictions, log_target=True, reduction="batchmean").item()
