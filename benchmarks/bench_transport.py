"""Times a step of an attack and its start (section 5 of docs/math.md) for `python -m benchmarks transport`.

The images have 256 grey levels, and four steps along much the same gradient have led to the edge of the ball.
Each case first compares its result with float64, so that a wrong result fails instead of being timed.
"""

import functools

import pytest
import torch

from armor import reference
from armor.ops import L1, L2, Binary, Linf, NormPower, SoftBall, transport_cost, transport_init, transport_step
from benchmarks import measure, naive
from benchmarks.measure import Case

# What each step is and how long: the usual settings of CIFAR, and of ImageNet for its larger images.
COSTS = {
    "linf": (Linf, {"radius": 8 / 255}, 2 / 255),
    "l2": (L2, {"radius": 0.5}, 0.125),
    "l1": (L1, {"radius": 12.0, "top": 0.01}, 3.0),
    "norm_power": (NormPower, {"weight": 1e-3, "power": 1.5}, 2 / 255),
    "soft_ball": (SoftBall, {"radius": 8 / 255, "tau": 0.1}, 2 / 255),
    "binary": (Binary, {}, 0.25),
}
STARTS = {"linf": {"radius": 8 / 255}, "l2": {"radius": 0.5}, "gaussian": {"sigma": 0.001}}
SHAPES = {(128, 3 * 32 * 32): (128, 3, 32, 32), (32, 3 * 224 * 224): (32, 3, 224, 224)}
CIFAR, IMAGENET = SHAPES
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10
LEVELS = torch.linspace(0, 1, 256)

compiled = {cost: torch.compile(step, fullgraph=True, dynamic=False) for cost, step in naive.STEPS.items()}
compiled_fed = torch.compile(naive.fed_step, fullgraph=True, dynamic=False)


def cases():
    """Every case, the providers of one problem next to each other."""
    problems = [(cost, *CIFAR, "step") for cost in COSTS]
    problems += [(cost, *IMAGENET, "step") for cost in ("linf", "l2")]
    problems += [(cost, *CIFAR, mode) for mode in ("step channels_last", "step and feed") for cost in ("linf", "l2")]
    problems += [(start, *CIFAR, "start") for start in STARTS]
    return [
        Case(*problem, provider)
        for problem in problems
        for provider in ("eager", "compile", "armor")
        # Ten seconds of compilation each, so only where something new is compiled.
        if provider != "compile" or (problem[3] in ("step", "step and feed") and problem[1:3] == CIFAR)
    ]


@measure.each(cases())
def test_transport(benchmark, case):
    step = build(case)
    error = check(case, *(None if t is None else t.cpu() for t in step()))
    counts = None if case.provider == "compile" else measure.counts(build(case, "meta"))
    settings = STARTS[case.case] if case.mode == "start" else COSTS[case.case][1] | {"step_size": COSTS[case.case][2]}
    config = settings | {"dtype": "float32"}
    measure.time(benchmark, "transport", case, step, config=config, error=error, counts=counts)


def build(case, device=measure.DEVICE):
    """The case as a function without arguments that returns the next samples and what the model is fed, or None."""
    x_adv, grad, x = (t.to(device) for t in inputs(*key(case)))
    if case.mode == "start":
        return _build_start(case, x)
    kind, settings, step_size = COSTS[case.case]
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    fed = case.mode == "step and feed"
    if case.provider == "armor":
        cost, feed = kind(**settings), {"normalize": (mean, std), "feed_dtype": grad.dtype} if fed else {}
        # x_adv and feed; the status and the costs are not compared
        return lambda: transport_step(x_adv, grad, x, cost, step_size=step_size, **feed)[::3]
    settings = settings | {"step_size": step_size}
    if fed:
        fed_step = compiled_fed if case.provider == "compile" else naive.fed_step
        return lambda: fed_step(naive.STEPS[case.case], x_adv, grad, x, mean, std, **settings)
    rule = (compiled if case.provider == "compile" else naive.STEPS)[case.case]
    return lambda: (rule(x_adv, grad, x, **settings), None)


def _build_start(case, x):
    settings = STARTS[case.case]
    if case.provider == "eager":
        return lambda: (naive.STARTS[case.case](x, **settings), None)
    if case.case == "gaussian":
        return lambda: (transport_init(x, Linf(1.0), start="gaussian", **settings).x_adv, None)
    cost = COSTS[case.case][0](**settings)
    return lambda: (transport_init(x, cost).x_adv, None)


def key(case):
    """What all providers of a problem share."""
    return case.case, SHAPES[case.rows, case.n], case.mode


@functools.lru_cache(maxsize=1)
def inputs(cost, shape, mode):
    """x_adv, the gradient there and x; the gradient is that of the feed, in bfloat16, where one is asked for."""
    generator = torch.Generator().manual_seed(0)
    x = LEVELS[torch.randint(256, shape, generator=generator)]
    if cost == "binary":
        x = (x < 0.1).float()
    direction = torch.randn(shape, generator=generator)
    gradients = [1e-3 * (direction + 0.3 * torch.randn(shape, generator=generator)) for _ in range(5)]
    grad = gradients.pop()
    x_adv = x
    if mode != "start":
        _, settings, step_size = COSTS[cost]
        for g in gradients:
            x_adv = naive.STEPS[cost](x_adv, g, x, step_size=step_size, **settings)
    if mode == "step and feed":
        grad = grad.bfloat16()
    layout = torch.channels_last if mode == "step channels_last" else torch.contiguous_format
    return tuple(t.contiguous(memory_format=layout) for t in (x_adv, grad, x))


@functools.lru_cache(maxsize=1)
def _expected(cost, shape, mode):
    """The next samples in float64, by the oracle."""
    x_adv, grad, x = (t.double() for t in inputs(cost, shape, mode))
    if mode == "step and feed":
        grad = grad / torch.tensor(STD).double()[:, None, None]
    kind, settings, step_size = COSTS[cost]
    rule = kind(**settings).rule()
    return reference.transport_step(
        *(x_adv, grad, x, None, None, None, None, None, None, rule.kind, float(rule.radius), step_size),
        *(rule.weight, rule.power, rule.norm, rule.variant, 0.0, 1.0, False, False, None),
    )[0]


def check(case, x_next, feed):
    """Mean error of a step, as a share of its mean length; a start, which is random, must only be where it should."""
    x_adv, _, x = inputs(*key(case))
    assert x_next.min() >= 0
    assert x_next.max() <= 1
    if case.mode == "start":
        return _check_start(case, x_next - x)
    exact = _expected(*key(case))
    error = ((x_next - exact).abs().sum() / (exact - x_adv).abs().sum()).item()
    if case.case == "l1" and case.provider != "armor":
        # Another point of the same ball, see naive.l1_step; how far from the closest one is recorded, not judged.
        assert transport_cost(x_next, x, L1(12.0)).max() == 0
    else:
        # On a large image an l2 step is 3e-4 an entry, where float32 rounds by 3e-8.
        assert error < 1e-3, f"{case.provider} is off by {error:.1e}"
    if case.mode == "step and feed":
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(feed.float(), ((exact - mean) / std).float(), rtol=2**-7, atol=1e-3)
    return error


def _check_start(case, noise):
    size = {"linf": noise.abs().mean(), "l2": noise.flatten(1).norm(dim=1).mean(), "gaussian": noise.abs().mean()}
    # Half the radius and nearly all of it; sigma * sqrt(2 / pi). The box takes a little.
    expected = {"linf": 4 / 255, "l2": 0.5, "gaussian": 0.001 * (2 / torch.pi) ** 0.5}
    assert size[case.case].item() == pytest.approx(expected[case.case], rel=0.05)
    return None
