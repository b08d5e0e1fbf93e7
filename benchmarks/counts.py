"""Launches, host syncs and bytes of whole training steps, by armor and by what it replaces, and the shortest time that
the bytes of each kernel allow: all counted, nothing is run and no GPU is needed.

`python -m benchmarks.counts` prints the tables, and `--write docs/counts.md` renews them there between the markers
`<!-- counts:NAME -->` and `<!-- /counts:NAME -->`. docs/counts.md says what the figures mean.
"""

import argparse
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from armor import attacks, ops
from armor.training.config import AttackConfig, DualConfig, TrainConfig, training_attack
from armor.training.models import mnist_cnn, resnet18
from armor.training.resolve import resolve
from armor.training.step import TrainState, train_step
from armor.training.view import AttackView
from benchmarks import markdown, naive
from benchmarks.counter import Counter, fake_cuda

BATCH, CLASSES = 128, 10
NETS = {"mnist_cnn": (mnist_cnn, (1, 28, 28)), "resnet18": (resnet18, (3, 32, 32))}
STEPS = 10  # of the attack
WEIGHTS = {
    "uniform": None,
    "KL": {"divergence": "kl", "radius": 0.2, "kappa": 0.12},
    "Rényi": {"divergence": "renyi", "alpha": 1.25, "radius": 0.1, "kappa": 0.1},
}
BANDWIDTH = {"A100-80": 2039e9, "H100 SXM": 3350e9}  # bytes per second, as the data sheets have it


class Counts(NamedTuple):
    launches: int
    syncs: int
    bytes: int
    forwards: int = 0  # of the model


class Method(NamedTuple):
    """A way of training: the step of the scripts, in benchmarks/naive.py, and armor's attack and loss."""

    naive: callable
    settings: dict
    attack: callable
    loss: str
    weights: tuple = tuple(WEIGHTS)


BALL = {"radius": 8 / 255, "step_size": 2 / 255}
PUBLISHED_BALL = {"beta": 6.0, "radius": 0.031, "step_size": 0.007}
METHODS = {
    "PGD": Method(naive.pgd_training_step, BALL, attacks.pgd, "cross_entropy"),
    "TRADES": Method(naive.trades_training_step, PUBLISHED_BALL, attacks.trades, "trades"),
    "MART": Method(naive.mart_training_step, PUBLISHED_BALL, partial(attacks.mart, loss="mart"), "mart"),
    "UDR": Method(naive.udr_training_step, BALL | {"tau": 0.1}, attacks.udr, "cross_entropy", ("uniform", "KL")),
    "penalised OT": Method(
        naive.penalised_ot_training_step,
        {"weight": 0.1, "power": 1.5, "step_size": 0.01},
        attacks.penalised_ot,
        "cross_entropy",
        ("uniform", "KL"),
    ),
}
LOSSES = {
    "cross_entropy": (ops.cross_entropy, ops.dc_cross_entropy),
    "trades": (ops.trades_loss, ops.dc_trades),
    "mart": (ops.mart_loss, ops.dc_mart),
}
NAIVE_LOSSES = {
    "cross_entropy": naive.cross_entropy,
    "trades": partial(naive.trades_loss, beta=6.0),
    "mart": partial(naive.mart_loss, beta=6.0),
}


# ---- steps ---------------------------------------------------------------------------------------------------------


def naive_step(method, dual, model, optimizer, steps, cuda):
    weigh = naive.mean if dual is None else partial(naive.host_dc_loss, **dual)
    settings = method.settings | {"steps": steps}
    if method.naive is naive.udr_training_step:
        settings["mean"], settings["std"] = _statistics(model, cuda)
    return lambda x, y: method.naive(model, optimizer, x, y, weigh, **settings)


def armor_step(method, dual, model, optimizer, steps, cuda):
    """One mu prices the cost in the attack and in the loss, that of the step before, and stays on the device."""
    mean, std = _statistics(model, cuda) if method.attack is attacks.udr else (None, None)
    attack = method.attack(steps=steps, normalize=None if mean is None else (mean, std))
    losses_of, dc_loss_of = LOSSES[method.loss]
    is_cost = method.attack in (attacks.udr, attacks.penalised_ot)
    mu = torch.ones((), device=cuda)

    def step(x, y):
        nonlocal mu
        found = attack.run(model, x, y, mu=mu if is_cost else None)
        eaten = found.x_adv if mean is None else (found.x_adv - mean[:, None, None]) / std[:, None, None]
        logits = [model(eaten)] if method.loss == "cross_entropy" else [model(x), model(eaten)]
        if dual is None:
            loss = losses_of(*logits, y).mean()
        else:
            loss, solved = dc_loss_of(*logits, y, found.costs, **dual, return_dual=True)
            if is_cost:
                mu = solved.lam + dual["kappa"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def armor_train_step(method, dual, model, optimizer, steps, cuda):
    """The step that `armor train` takes, with PGD; it returns loss, mu and effective sample size as well."""
    dual = DualConfig(divergence="mean") if dual is None else DualConfig(**dual)
    config = resolve(TrainConfig(data="mnist", device="cpu", attack=AttackConfig(steps=steps), dual=dual))
    state = TrainState(
        config=config,
        weighting=config.weightings[0],
        model=model,
        net=model,
        view=AttackView(model),
        attack=training_attack(config),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        attack_warmup=0,
        steps_per_epoch=1,
        batches=None,
        noise=None,
        mu=torch.ones((), device=cuda),
    )
    return lambda x, y: train_step(state, x, y)


STEPS_OF = {"scripts": naive_step, "armor": armor_step, "armor train": armor_train_step}


def _statistics(model, cuda):
    """mean and std of the channels."""
    channels = next(model.parameters()).shape[1]
    return torch.full((channels,), 0.5, device=cuda), torch.full((channels,), 0.25, device=cuda)


def counted(provider, method, weights, net, steps=STEPS):
    """Counts of a step in the middle of a training, with an attack of so many steps."""
    one, two = with_one_and_two(provider, method, weights, net)
    return Counts(*(a + (steps - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def a_further_step(provider, method, net):
    """What one more step of the attack adds."""
    one, two = with_one_and_two(provider, method, "KL", net)
    return Counts(*(b - a for a, b in zip(one, two, strict=True)))


@cache
def with_one_and_two(provider, method, weights, net):
    """Counts with an attack of one step and with one of two: every further one asks for the same."""
    build, shape = NETS[net]
    with fake_cuda() as cuda:
        with cuda:
            model = build()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            x, y = torch.empty(BATCH, *shape), torch.empty(BATCH, dtype=torch.int64)
        make = partial(STEPS_OF[provider], METHODS[method], WEIGHTS[weights], model, optimizer)
        one, two = make(1, cuda), make(2, cuda)
        count(lambda: one(x, y))  # the first step of an optimizer is another one
        passes = []
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        return count(lambda: one(x, y), passes), count(lambda: two(x, y), passes)


def count(function, passes=()):
    """Counts of a call; `passes` grows by one with each pass of the model."""
    before = len(passes)
    with Counter() as counter:
        function()
    return Counts(len(counter.operators), counter.syncs, counter.bytes, len(passes) - before)


# ---- losses --------------------------------------------------------------------------------------------------------


def counted_loss(provider, loss, weights):
    """Counts of the forward and of the backward pass of a loss with its dual, from the logits."""
    with fake_cuda() as cuda:
        *logits, target = _logits_and_target(loss, CLASSES, cuda)
        dual, values = WEIGHTS[weights], []

        def forward():
            if provider == "armor":
                values.append(LOSSES[loss][1](*logits, target, **dual))
            else:
                values.append(naive.host_dc_loss(NAIVE_LOSSES[loss](*logits, target), **dual))

        upstream = torch.ones((), device=cuda)
        return count(forward), count(lambda: torch.autograd.grad(values[0], logits, upstream))


def _logits_and_target(loss, classes, cuda):
    both = 1 if loss == "cross_entropy" else 2
    logits = [torch.empty(BATCH, classes, device=cuda, requires_grad=True) for _ in range(both)]
    return *logits, torch.empty(BATCH, dtype=torch.int64, device=cuda)


# ---- kernels -------------------------------------------------------------------------------------------------------


def kernels():
    """(name, what and at which size, bytes) of armor's operators, at the sizes that trainings have."""
    found = []
    with fake_cuda() as cuda:
        for size, call in _calls(cuda):
            with Counter() as counter:
                call()
            ours = [(name, moved) for name, moved in counter.operators if name.startswith("armor::")]
            found += [(name.removeprefix("armor::"), size, moved) for name, moved in ours]
    return found


def _calls(cuda):
    for n in (BATCH, 262144):
        losses = torch.empty(n, device=cuda, requires_grad=True)
        yield f"KL, {n} losses", partial(_both_ways, ops.dc_loss, losses, radius=0.2)
    for loss, (losses_of, dc_loss_of) in LOSSES.items():
        for classes in (10, 100, 1000):
            tensors = _logits_and_target(loss, classes, cuda)
            size = f"{loss}, {BATCH} x {classes}"
            yield size, partial(losses_of, *tensors)
            yield size, partial(_both_ways, dc_loss_of, *tensors, radius=0.2)
    for shape in ((BATCH, 1, 28, 28), (BATCH, 3, 32, 32), (32, 3, 224, 224)):
        x, x_adv, grad = (torch.empty(shape, device=cuda) for _ in range(3))
        size = " x ".join(map(str, shape))
        yield f"linf, {size}", partial(ops.transport_init, x, ops.Linf(0.1))
        yield f"linf, {size}", partial(ops.transport_step, x_adv, grad, x, ops.Linf(0.1), step_size=0.01)
        yield f"norm_power, {size}", partial(ops.transport_cost, x_adv, x, ops.NormPower(0.1, 2, 1.5))


def _both_ways(loss, *tensors, **settings):
    loss(*tensors, **settings).backward()


# ---- tables --------------------------------------------------------------------------------------------------------


def steps_table():
    titles = ["net", "method", "weights", "launches: scripts", "armor", "ratio", "host syncs: scripts", "armor"]
    lines = markdown.head([*titles, "bytes: scripts", "armor", "ratio", "passes forward: scripts", "armor"])
    rows = [(net, name, weights) for net in NETS for name in METHODS for weights in METHODS[name].weights]
    for net, name, weights in rows:
        lines.append(markdown.line([net, name, weights, *_pair(counted, name, weights, net)]))
    for weights in WEIGHTS:
        cells = _pair(counted, "PGD", weights, "mnist_cnn", ours="armor train")
        lines.append(markdown.line(["mnist_cnn", "PGD, `armor train`", weights, *cells]))
    return "\n".join(lines)


def further_table():
    titles = ["net", "method", "launches: scripts", "armor", "ratio", "host syncs: scripts", "armor"]
    lines = markdown.head([*titles, "bytes: scripts", "armor", "ratio", "passes forward: scripts", "armor"])
    lines += [markdown.line([net, name, *_pair(a_further_step, name, net)]) for net in NETS for name in METHODS]
    return "\n".join(lines)


def _pair(counts, *what, ours="armor"):
    a, b = counts("scripts", *what), counts(ours, *what)
    return [
        *(str(a.launches), str(b.launches), f"{a.launches / b.launches:.3g}x", str(a.syncs), str(b.syncs)),
        *(
            markdown.size(a.bytes),
            markdown.size(b.bytes),
            f"{a.bytes / b.bytes:.3g}x",
            str(a.forwards),
            str(b.forwards),
        ),
    ]


def losses_table():
    titles = ["loss", "weights", "launches forward: scripts", "armor", "launches backward: scripts", "armor"]
    lines = markdown.head([*titles, "host syncs: scripts", "armor"])
    for loss in LOSSES:
        for weights in WEIGHTS:
            if WEIGHTS[weights] is not None:
                theirs, ours = (counted_loss(provider, loss, weights) for provider in ("scripts", "armor"))
                both = [str(passed.launches) for pair in zip(theirs, ours, strict=True) for passed in pair]
                syncs = [str(sum(passed.syncs for passed in passes)) for passes in (theirs, ours)]
                lines.append(markdown.line([loss, weights, *both, *syncs]))
    return "\n".join(lines)


def kernels_table():
    lines = markdown.head(["kernel", "of", "bytes", *(f"lower bound on {gpu}" for gpu in BANDWIDTH)])
    for name, size, moved in kernels():
        bounds = [f"{1e6 * moved / bandwidth:.2g} us" for bandwidth in BANDWIDTH.values()]
        lines.append(markdown.line([f"`{name}`", size, markdown.size(moved), *bounds]))
    return "\n".join(lines)


TABLES = {"steps": steps_table, "further": further_table, "losses": losses_table, "kernels": kernels_table}


def insert(text):
    """`text` with its marked tables renewed; ValueError where one is missing."""
    return markdown.renew(text, "counts", TABLES, every=True)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts", description="Counted launches, syncs and bytes."
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="renew the tables in FILE instead of printing them")
    file = parser.parse_args().write
    if file:
        file.write_text(insert(file.read_text()))
    else:
        print("\n\n".join(table() for table in TABLES.values()))


if __name__ == "__main__":
    main()
