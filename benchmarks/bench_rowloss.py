"""Times the losses per sample and the re-weighted TRADES loss (section 4 of docs/math.md), for
`python -m benchmarks rowloss`.

Each case first compares its value with float64, so that a wrong result fails instead of being timed.
"""

import functools

import torch

from armor import ops, reference
from armor.library import IGNORE_NOTHING
from armor.reference.rowloss import CE, MART, TRADES
from benchmarks import measure, naive
from benchmarks.measure import Case

SHAPES = [(128, 10), (128, 100), (128, 1000)]
MODES = ["forward", "forward+backward"]
BETA = 6.0
# What each loss takes beside the logits and the target: the CIFAR-100 settings for the re-weighted one.
SETTINGS = {
    "cross_entropy": {},
    "trades_loss": {"beta": BETA},
    "mart_loss": {"beta": BETA},
    "dc_trades": {"beta": BETA, "radius": 0.2, "kappa": 0.12},
}
CODES = {"cross_entropy": CE, "trades_loss": TRADES, "mart_loss": MART, "dc_trades": TRADES}

compiled = {name: torch.compile(getattr(naive, name), fullgraph=True, dynamic=False) for name in SETTINGS}


def cases():
    """Every case, the providers of one problem next to each other."""
    return [
        Case(loss, *shape, mode, provider)
        for loss in SETTINGS
        for shape in SHAPES
        for mode in MODES
        for provider in ("eager", "compile", "armor")
        # Ten seconds of compilation each, and more for the dual.
        if provider != "compile" or (mode == "forward+backward" and shape != (128, 100))
    ]


@measure.each(cases())
def test_rowloss(benchmark, case):
    error = check(case)
    twin = None if case.provider == "compile" else measure.counts(build(case, "meta"))
    config = SETTINGS[case.case] | {"dtype": "float32"}
    measure.time(benchmark, "rowloss", case, build(case), config=config, error=error, counts=twin)


def build(case, device=measure.DEVICE):
    """The case as a function without arguments that returns the value, or the gradients in the logits."""
    logits, target = inputs(case, device)
    loss, settings = loss_of(case), SETTINGS[case.case]
    if case.mode == "forward":
        return lambda: loss(*logits, target, **settings)
    upstream = torch.ones((), device=device) if case.case == "dc_trades" else torch.ones(case.rows, device=device)
    return lambda: torch.autograd.grad(loss(*logits, target, **settings), logits, upstream)


def loss_of(case):
    if case.provider == "compile":
        return compiled[case.case]
    return getattr(ops if case.provider == "armor" else naive, case.case)


def inputs(case, device="cpu"):
    """The logits of a half-trained net, natural ones first where the loss has two, and the targets."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(case.n, (case.rows,), generator=generator)
    natural = 2 * torch.randn(case.rows, case.n, generator=generator)
    natural[torch.arange(case.rows), target] += 2
    logits = [natural]
    if case.case != "cross_entropy":
        logits.append(natural + torch.randn(natural.shape, generator=generator))
    return [t.to(device).requires_grad_(case.mode == "forward+backward") for t in logits], target.to(device)


@functools.lru_cache(maxsize=1)
def expected(loss, rows, n):
    """The value in float64, by the oracle."""
    logits, target = inputs(Case(loss, rows, n, "forward", "armor"))
    natural, adversarial = None if len(logits) == 1 else logits[0].double(), logits[-1].double()
    settings = SETTINGS[loss]
    losses, _ = reference.rowloss(adversarial, target, natural, CODES[loss], BETA, 0.0, IGNORE_NOTHING)
    if loss != "dc_trades":
        return losses
    scalars = (reference.KL, 1.0, settings["radius"], settings["kappa"], 1e6)
    return reference.dual(losses[None], None, None, *scalars)[0][0]


def check(case):
    """Largest error of the value, as a share of the mean loss."""
    logits, target = inputs(case, measure.DEVICE)
    exact = expected(case.case, case.rows, case.n)
    value = loss_of(case)(*logits, target, **SETTINGS[case.case]).detach().cpu()
    error = ((value - exact).abs().max() / exact.mean()).item()
    assert error < 1e-5, f"{case.provider} is off by {error:.1e}"
    return error
