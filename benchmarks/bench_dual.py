"""Times every way to compute the D^c loss with pytest-benchmark, for `python -m benchmarks dual`.

Each case first compares its value with float64, so that a wrong result fails instead of being timed.
"""

import pytest
import torch

import armor
from benchmarks import cases


@pytest.mark.parametrize(
    ("divergence", "rows", "n", "mode", "provider"),
    [pytest.param(*case, id="{}-{}x{}-{}-{}".format(*case)) for case in cases.cases()],
)
def test_dual(benchmark, divergence, rows, n, mode, provider):
    settings = cases.SETTINGS[divergence]
    losses = cases.make_losses(rows, n).requires_grad_(mode != "forward")
    value_of = cases.PROVIDERS[provider]
    ones = torch.ones(losses.shape[:-1])

    def forward():
        return value_of(losses, divergence=divergence, **settings)

    def forward_backward():
        return torch.autograd.grad(forward(), losses, ones)

    value = forward().detach().reshape(ones.shape)
    error = None
    if provider != "mean":
        exact = cases.expected(divergence, rows, n)
        error = ((value - exact) / exact).abs().max().item()
        assert error < 1e-5, f"{provider} is off by {error:.1e}"

    benchmark.group = f"{divergence} {rows}x{n} {mode}"
    benchmark.extra_info = {
        "kernel": "dual",
        "divergence": divergence,
        "provider": provider,
        "mode": mode,
        "rows": rows,
        "n": n,
        "error": error,
        "config": settings | {"dtype": "float32"},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "armor": armor.__version__,
    }
    step = forward if mode == "forward" else forward_backward
    step()
    benchmark(step)
