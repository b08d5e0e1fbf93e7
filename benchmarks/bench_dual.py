"""Times every way to compute the D^c loss (sections 1 and 2 of docs/math.md) for `python -m benchmarks dual`.

Rows of losses, the divergences at the authors' published settings, and who solves them. Each case first compares its
value with float64, so that a wrong result fails instead of being timed.
"""

import functools

import torch

from armor import reference
from armor.ops import dc_loss
from benchmarks import measure, naive
from benchmarks.measure import Case

# One row from a small batch to a million samples, and the many small problems of [B, K] losses.
SHAPES = [(1, 32), (1, 128), (1, 1024), (1, 8192), (1, 65536), (1, 262144), (1, 1048576), (1024, 128)]
MODES = ["forward", "forward+backward"]

SETTINGS = {
    "kl": {"radius": 0.2, "kappa": 0.12},  # CIFAR-100 UDR and TRADES
    "alpha": {"radius": 0.5, "alpha": 6.0},  # CIFAR-10 UDR and TRADES
    "renyi": {"radius": 0.1, "alpha": 1.25, "kappa": 0.1},  # MNIST
}
CODES = {"kl": reference.KL, "alpha": reference.ALPHA, "renyi": reference.RENYI}
MAX_DUAL = 1e6

compiled_dc_loss = torch.compile(naive.eager_dc_loss, fullgraph=True, dynamic=False)


def armor_op(losses, *, divergence, radius, alpha=1.0, kappa=0.0):
    """The value from the raw operator: what is left of `dc_loss` without its checks and autograd."""
    rows = losses if losses.dim() == 2 else losses[None]
    return torch.ops.armor.dual(rows, None, None, CODES[divergence], alpha, radius, kappa, MAX_DUAL)[0]


PROVIDERS = {
    "scipy": naive.scipy_dc_loss,
    "brent": lambda losses, divergence, **settings: naive.brent_dc_loss(losses, **settings),
    "eager": lambda losses, divergence, **settings: naive.eager_dc_loss(losses, **settings),
    "compile": lambda losses, divergence, **settings: compiled_dc_loss(losses, **settings),
    "mean": lambda losses, **settings: losses.mean(-1),
    "armor": dc_loss,
    "armor_op": armor_op,
}
KL_ONLY = {"brent", "eager", "compile"}
# Ten seconds of compilation each; dynamic=True saves none, since a reduction is compiled anew as it grows.
COMPILED_SHAPES = {(1, 128), (1, 262144), (1024, 128)}


def cases():
    """Every case, the providers of one problem next to each other."""
    return [
        Case(divergence, rows, n, mode, provider)
        for divergence in SETTINGS
        for rows, n in SHAPES
        for mode in MODES
        for provider in PROVIDERS
        if _timed(divergence, (rows, n), mode, provider)
    ]


def _timed(divergence, shape, mode, provider):
    if provider in KL_ONLY and divergence != "kl":
        return False
    if provider == "armor_op" and mode == "forward+backward":
        return False
    if provider == "compile" and shape not in COMPILED_SHAPES:
        return False
    # Seconds a case, which forward+backward shows as well.
    return not (shape[0] > 1 and mode == "forward" and provider in ("scipy", "compile"))


@measure.each(cases())
def test_dual(benchmark, case):
    settings = SETTINGS[case.case]
    losses = make_losses(case.rows, case.n).to(measure.DEVICE).requires_grad_(case.mode != "forward")
    value_of = PROVIDERS[case.provider]
    ones = torch.ones(losses.shape[:-1], device=measure.DEVICE)

    def forward():
        return value_of(losses, divergence=case.case, **settings)

    def forward_backward():
        return torch.autograd.grad(forward(), losses, ones)

    value = forward().detach().cpu().reshape(ones.shape)
    error = None
    if case.provider != "mean":
        exact = expected(case.case, case.rows, case.n)
        error = ((value - exact) / exact).abs().max().item()
        assert error < 1e-5, f"{case.provider} is off by {error:.1e}"

    step = forward if case.mode == "forward" else forward_backward
    measure.time(benchmark, "dual", case, step, config=settings | {"dtype": "float32"}, error=error)


def make_losses(rows, n, seed=0):
    """[n] or [rows, n] float32 losses, positive and skewed as cross-entropies under attack, mean 1.1."""
    shape = (n,) if rows == 1 else (rows, n)
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.softplus(2 * torch.randn(shape, generator=generator))


@functools.lru_cache
def expected(divergence, rows, n):
    """The value in float64: by the oracle, or by SciPy where the oracle's bisections would take minutes."""
    losses = make_losses(rows, n).double()
    if losses.numel() > 8192:
        return naive.scipy_dc_loss(losses, divergence=divergence, **SETTINGS[divergence])
    settings = {"alpha": 1.0, "kappa": 0.0} | SETTINGS[divergence]
    scalars = (CODES[divergence], settings["alpha"], settings["radius"], settings["kappa"], MAX_DUAL)
    return reference.dual(losses.view(rows, n), None, None, *scalars)[0].view(losses.shape[:-1])
