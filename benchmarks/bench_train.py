"""Times whole training steps, from a batch of images to the updated weights, for `python -m benchmarks train`, and
measures the memory that they need.

Images and labels are random, as time knows no difference; docs/benchmarks.md says what the providers compute. Before a
provider is timed, a step with a shorter attack is checked: its samples must be in their set and raise the objective as
much as those of the plain loop, its loss must be that of these samples in float64, and the gradient that the optimizer
gets that of this loss.
"""

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from armor import attacks, reference
from armor.library import IGNORE_NOTHING
from armor.reference.rowloss import MART, TRADES
from armor.training.allocator import keep_memory
from armor.training.config import AttackConfig, DualConfig, OptimizerConfig, SpeedConfig, TrainConfig
from armor.training.resolve import resolve
from armor.training.step import autocast, make_model, make_state, needs_natural, precision, stream_seed, train_step
from benchmarks import measure, naive
from benchmarks.measure import Case

ON_GPU = measure.DEVICE != "cpu"
CLASSES = 10
STEPS = 10  # of the attack
CHECKED = 2  # of the attack in the step that is checked and whose memory is measured
PROVIDERS = ["published", "eager", "armor", "passes"]
MODES = ["", " graph", " compile"]


class Net(NamedTuple):
    """model: as for `armor train`. rounds: that are timed in a turn."""

    model: str
    shape: tuple
    batch: int
    rounds: int


NETS = {
    "resnet18": Net("resnet18", (3, 32, 32), 128 if ON_GPU else 32, 10 if ON_GPU else 1),
    "mnist-cnn": Net("mnist-cnn", (1, 28, 28), 128, 3),
    "resnet8": Net("benchmarks.bench_attack:resnet", (3, 32, 32), 128, 10),
}
WARMUPS = 5 if ON_GPU else 1  # `armor train` captures its graph in the fourth step
TURNS = 1 if ON_GPU else 2  # the providers take turns, so that a slow minute of the machine falls on all of them

# The authors' settings (docs/presets.md), but for ten steps of every attack.
CIFAR_BALL = {"eps": "0.031", "step_size": 0.007}
METHODS = {
    "trades": TrainConfig(
        method="trades",
        beta=19.0,
        natural_mix=0.5,
        attack=AttackConfig(**CIFAR_BALL),
        dual=DualConfig(radius=0.02, kappa=0.1),
        optimizer=OptimizerConfig(clip=5.0),
    ),
    "mart": TrainConfig(
        method="mart",
        natural_mix=0.8,
        attack=AttackConfig(**CIFAR_BALL, loss="mart"),
        dual=DualConfig(radius=0.002, kappa=0.12),
        optimizer=OptimizerConfig(clip=5.0),
    ),
    "renyi": TrainConfig(
        attack=AttackConfig(eps="0.1", step_size=0.01),
        dual=DualConfig(divergence="renyi", alpha=1.25, radius=0.1, kappa=0.1),
    ),
    "penalised-ot": TrainConfig(
        method="penalised-ot",
        attack=AttackConfig(step_size=0.01, weight=0.1, power=1.5),
        dual=DualConfig(radius=5e-4, kappa=0.0, solve="learned", lr=2e-4),
    ),
}
PUBLISHED = {
    "trades": naive.trades_training_step,
    "mart": naive.mart_training_step,
    "renyi": functools.partial(naive.pgd_training_step, unused=True),
    "penalised-ot": functools.partial(naive.penalised_ot_training_step, unused=True),
}
# What the rounding of the net may cause: relative errors of the loss, and of the gradient, in which it moves ReLUs.
TOLERANCES = {"fp32": (1e-4, 5e-2), "tf32": (1e-2, 0.1), "bf16": (5e-2, 0.3)}


def cases():
    """Every case, the providers of one problem next to each other and what takes longest to prepare last."""
    if ON_GPU:
        return [
            _case(net, kind, f"trades{mode}", provider)
            for mode in MODES
            for net in ("resnet18", "resnet8")
            for kind in TOLERANCES
            for provider in PROVIDERS
            if _fits(net, mode, provider)
        ]
    return [
        _case(net, "fp32", method, provider)
        for net in ("resnet18", "mnist-cnn")
        for method in METHODS
        for provider in PROVIDERS
        # The scripts of penalised OT have a net for MNIST alone, and a step of ResNet-18 takes a quarter of a minute.
        if net == "mnist-cnn" or not (method == "penalised-ot" or provider == "eager")
    ]


def _fits(net, mode, provider):
    if provider == "published":  # waits for the host, which no graph can
        return mode == ""
    return mode != " compile" or net == "resnet18"  # half a minute each


def _case(net, kind, mode, provider):
    return Case(f"{net} {kind}", NETS[net].batch, torch.Size(NETS[net].shape).numel(), mode, provider)


@measure.each(cases())
@pytest.mark.parametrize("turn", range(TURNS), ids="turn{}".format)
def test_train(benchmark, case, turn):
    if case.case.startswith("resnet18"):
        pytest.importorskip("torchvision", reason="not installed: pip install torchvision")
    error, memory = judged(case) if turn == 0 else (None, {})
    step = prepared(case)
    settings = published_settings(case.mode.split()[0], configured(case))
    rounds = NETS[case.case.split()[0]].rounds
    with precision(configured(case)):
        measure.time(benchmark, "train", case, step, config=settings, error=error, counts=memory, rounds=rounds)


def judged(case):
    """The relative error of the loss of a step with a short attack, and the most memory that such a step needs."""
    found = []

    def twice():  # only from the second step on does the optimizer have all its state
        training = build(ungraphed, CHECKED)
        found.extend(watched(training))
        training.run()

    if case.provider == "passes":
        return None, {}
    # What is captured by hand has no first step that could be watched.
    ungraphed = case._replace(mode=case.mode.removesuffix(" graph")) if case.provider == "eager" else case
    with precision(configured(case)):
        peak = measure.peak(twice)
        return check(case, *found), {"peak": peak}


def watched(training):
    """The samples that a step finds, its loss and the gradient of all weights, in numpy's memory, which is not
    measured."""
    seen = []
    hook = training.net.register_forward_pre_hook(lambda net, given: seen.append(given[0].detach().cpu()))
    loss = float(training.run())
    hook.remove()
    x = training.x.cpu()
    x_adv = next(x_adv for x_adv in reversed(seen) if not torch.equal(x_adv, x))
    return x_adv, loss, [p.grad.cpu().numpy().copy() for p in training.model.parameters()]


def prepared(case):
    """The step to be timed, after some that warm up, on the CPU with a short attack."""
    if not ON_GPU and case.provider in ("armor", "passes"):  # as loop.py does
        keep_memory()
    with precision(configured(case)):
        run = build(case).run
        warm_up = run if ON_GPU else build(case, CHECKED).run
        for _ in range(WARMUPS):
            warm_up()
    return run


class Training(NamedTuple):
    """run: trains one step and returns the loss. net: what it calls in train mode, with the samples that it found
    last."""

    run: Callable
    net: nn.Module
    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor


def build(case, steps=STEPS, device=measure.DEVICE):
    """The training of the case, at its first step."""
    mode = case.mode.partition(" ")[2]
    config = configured(case, steps, device)
    if case.provider == "published":  # in PyTorch's own layout
        config.speed.channels_last = False
    problem = SimpleNamespace(shape=NETS[case.case.split()[0]].shape, classes=CLASSES)
    torch.manual_seed(0)
    x, y = torch.rand(case.rows, *problem.shape).to(device), torch.randint(CLASSES, (case.rows,)).to(device)
    if config.speed.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if case.provider in ("armor", "passes"):
        state = make_state(config, 0, "dc", problem, 1)
        net, model = state.net, state.model
        slope = torch.ones(case.rows, CLASSES, device=device) / case.rows
        run = {"armor": lambda: train_step(state, x, y)[0], "passes": lambda: passes(state, x, slope)}[case.provider]
        if case.provider == "passes" and mode == "graph":
            run = measure.graphed(run)
    else:
        torch.manual_seed(stream_seed(0, "weights"))  # those of make_state
        model = make_model(config, problem).to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=config.optimizer.lr, momentum=config.optimizer.momentum)
        net = torch.compile(model) if mode == "compile" else model
        run = functools.partial(plain_step, case, config, net, optimizer, x, y, make_dual(case, config))
        if mode == "graph":
            run = measure.graphed(run)
    _look_at(model, x)
    return Training(run, net, model, x, y)


def configured(case, steps=STEPS, device=measure.DEVICE):
    """What `armor train` would run."""
    method, _, mode = case.mode.partition(" ")
    net, kind = case.case.split()
    given = copy.deepcopy(METHODS[method])
    given.data, given.model = "mnist" if net == "mnist-cnn" else "cifar10", NETS[net].model
    given.device, given.batch_size, given.epochs = device, case.rows, 1
    given.attack.steps = steps
    given.optimizer.lr, given.optimizer.schedule, given.optimizer.warmup = 1e-4, "constant", 0.0
    given.speed = SpeedConfig(precision=kind, compile=mode == "compile", cuda_graph=mode == "graph")
    return resolve(given)


def _look_at(model, x):
    """BatchNorm knows the images after one look; else nothing would reach the last layer in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.momentum = 0.1


# ---- the steps -----------------------------------------------------------------------------------------------------


def plain_step(case, config, net, optimizer, x, y, weigh):
    """A step without armor."""
    method = case.mode.split()[0]
    with autocast(config):
        if case.provider == "published":
            loss = PUBLISHED[method](net, optimizer, x, y, weigh, **published_settings(method, config))
            return loss[0] if isinstance(loss, tuple) else loss.detach()
        mixed = {"natural_mix": config.natural_mix, "clip": config.optimizer.clip}
        return naive.careful_training_step(
            net, optimizer, x, y, weigh, config.method, **attack_settings(config), **mixed
        )


def attack_settings(config):
    """The settings of the attack, as benchmarks/naive.py calls them."""
    settings = {"steps": config.attack.steps, "step_size": config.step_size}
    if config.method == "penalised-ot":
        return settings | {"weight": config.attack.weight, "power": config.attack.power}
    settings["radius"] = config.eps
    return settings | ({"beta": config.beta or 6.0} if config.method in ("trades", "mart") else {})


def published_settings(method, config):
    settings = attack_settings(config)
    if method in ("trades", "mart"):
        settings |= {"natural_mix": config.natural_mix, "clip": config.optimizer.clip}
    return settings


def make_dual(case, config):
    """What a step without armor makes of the losses. No one writes Rényi's solve in torch, so that `eager` waits for
    the host there, too."""
    ball = config.dual.ball
    if config.dual.solve == "learned":
        return naive.LearnedKL(radius=ball["radius"], step_size=config.dual.lr, device=config.device)
    if case.provider == "published" or config.dual.divergence == "renyi":
        return functools.partial(naive.host_dc_loss, **ball)
    return functools.partial(naive.eager_dc_loss, radius=ball["radius"], kappa=ball["kappa"])


def passes(state, x, slope):
    """What of armor's step is the net's: the attack's passes of its view, the natural samples' among them, and those in
    train mode with their one backward pass. Nothing else: no loss, no step of attack or optimizer."""
    with autocast(state.config):
        for _ in range(state.config.attack.steps):
            eaten = x.detach().requires_grad_()
            logits = state.view(eaten)
            torch.autograd.grad(logits, eaten, slope.to(logits.dtype))
        if state.attack.loss in ("kl", "mart"):
            with torch.no_grad():
                state.view(x)
        logits = [state.net(x)] if needs_natural(state) else []
        logits.append(state.net(x))
    torch.autograd.backward(logits, [slope.to(each.dtype) for each in logits])
    state.model.zero_grad()
    return logits[0].detach()


# ---- what is checked -----------------------------------------------------------------------------------------------


def check(case, x_adv, loss, gradient, steps=CHECKED):
    """Relative error of the loss that the first step of the case found with the samples x_adv and whose gradient the
    optimizer got."""
    config = configured(case, steps)
    # In another layout sums are rounded in another way, which moves ReLUs of a deep net: 1 % of ResNet-18's gradient.
    plain = case._replace(mode=case.mode.split()[0], provider="published" if case.provider == "published" else "eager")
    _, _, model, x, y = build(plain, steps)
    x_adv, gradient = x_adv.to(x), [torch.from_numpy(each).to(x) for each in gradient]
    most = config.eps if config.method != "penalised-ot" else steps * config.step_size
    assert (x_adv - x).abs().max() <= most + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    plain_samples = naive.careful_attack(model, x, y, config.method, **attack_settings(config))
    clean, found, usual = (objective(config, model, x, y, images) for images in (x, x_adv, plain_samples))
    raised = (found - clean) / (usual - clean)
    assert usual > clean
    assert raised > 0.75, f"{case.provider} raises the objective {raised:.2g} times as much as the plain loop"

    loss_tolerance, gradient_tolerance = TOLERANCES[case.case.split()[1]]
    exact, exact_gradient = expected(config, model, x, y, x_adv)
    error = abs(loss / exact.item() - 1)
    assert error < loss_tolerance, f"{case.provider}'s loss is off by {error:.1e}"
    pairs = list(zip(gradient, exact_gradient, strict=True))
    off = (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()
    assert off < gradient_tolerance, f"{case.provider}'s gradient is off by {off:.1e}"
    return error


@torch.no_grad()
def objective(config, model, x, y, x_adv):
    """What the attack raises, the mean of the batch."""
    with attacks.modes(model):
        natural, adversarial = model(x), model(x_adv)
    if config.method == "trades":
        return F.kl_div(adversarial.log_softmax(1), natural.log_softmax(1), log_target=True, reduction="batchmean")
    if config.method == "mart":
        return naive.mart_loss(natural, adversarial, y, beta=6.0).mean()
    return (F.cross_entropy(adversarial, y, reduction="none") - costs_of(config, x, x_adv)).mean()


def costs_of(config, x, x_adv):
    if config.method != "penalised-ot":
        return torch.zeros(len(x), device=x.device)
    return config.attack.weight * (x_adv - x).flatten(1).norm(dim=1) ** config.attack.power


def expected(config, model, x, y, x_adv):
    """The loss, its dual in float64, and the gradient in all weights: by Danskin's theorem that of the weighted sum."""
    natural, adversarial = model(x), model(x_adv)
    clean = F.cross_entropy(natural, y)
    of_method = {"trades": naive.trades_loss, "mart": naive.mart_loss}
    if config.method in of_method:
        losses = of_method[config.method](natural, adversarial, y, beta=config.beta or 6.0)
    else:
        losses = F.cross_entropy(adversarial, y, reduction="none")
    value, weights = expected_dual(config, exact_losses(config, natural, adversarial, y), costs_of(config, x, x_adv))
    mix = config.natural_mix
    weighted = mix * clean + (1 - mix) * (weights.to(losses) * losses).sum()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(weighted, parameters)
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    clip = config.optimizer.clip
    if clip is not None and length > clip:
        gradients = [gradient * (clip / length) for gradient in gradients]
    return mix * clean.double().cpu() + (1 - mix) * value, gradients


def exact_losses(config, natural, adversarial, y):
    natural, adversarial, y = natural.detach().double().cpu(), adversarial.detach().double().cpu(), y.cpu()
    kinds = {"trades": TRADES, "mart": MART}
    if config.method not in kinds:
        return F.cross_entropy(adversarial, y, reduction="none")
    given = (adversarial, y, natural, kinds[config.method], config.beta or 6.0, 0.0, IGNORE_NOTHING)
    return reference.rowloss(*given)[0]


def expected_dual(config, losses, costs):
    """Value and weights; a learned dual is at its start."""
    dual, costs = config.dual, costs.double().cpu()
    if dual.solve == "learned":
        mu = dual.lam + dual.kappa
        a = losses / mu - costs
        return mu * (dual.radius + a.logsumexp(0) - torch.tensor(len(a)).log()) - dual.kappa * dual.radius, a.softmax(0)
    kind = {"kl": reference.KL, "renyi": reference.RENYI}[dual.divergence]
    scalars = (kind, dual.alpha or 1.0, dual.radius, dual.kappa, 1e6)
    value, _, _, weights, _, _ = reference.dual(losses[None], None, None, *scalars)
    return value[0], weights[0]
