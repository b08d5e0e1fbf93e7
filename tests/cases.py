"""Problems with known solutions and the oracles that judge them: test_dual.py runs them on the installed
kernel and on armor.reference, the tests of the other backends on theirs. A raw `dual` takes `Problem.raw()`.
The formulas are those of docs/math.md, written out once more so that no solver of the package judges itself.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from scipy import optimize, special

CODES = {"kl": 0, "alpha": 1, "renyi": 2}

# One member of each family on both sides of every change of formula: f* is a polynomial at alpha = 2 and
# steepens above; the Rényi exponent (alpha - 1)/alpha changes sign at 1, where the divergence is reverse KL.
FAMILIES = [
    ("kl", None),
    ("alpha", 1.5),
    ("alpha", 2.0),
    ("alpha", 6.0),
    ("renyi", 0.5),
    ("renyi", 1.25),
    ("renyi", 2.95),
]


@dataclass(frozen=True)
class Problem:
    """One row. `value`, `lam` and `weights` are the known solution, where there is one."""

    losses: list[float]
    costs: list[float] | None = None
    clean_losses: list[float] | None = None
    divergence: str = "kl"
    alpha: float | None = None
    radius: float = 0.1
    kappa: float = 0.0
    max_dual: float = 1e6
    value: float | None = None
    lam: float | None = None
    weights: list[float] | None = None

    def __str__(self) -> str:
        kind = "" if self.alpha is None else f"-{self.alpha:g}"
        extra = ("" if self.costs is None else "-costs") + ("" if self.clean_losses is None else "-clean")
        return f"{self.divergence}{kind}-eps{self.radius:g}-kappa{self.kappa:g}-n{len(self.losses)}{extra}"

    def tensors(self, dtype=torch.float64, device="cpu"):
        """losses, costs, clean_losses as one-row tensors, None where there are none."""
        given = (self.losses, self.costs, self.clean_losses)
        return tuple(None if v is None else torch.tensor([v], dtype=dtype, device=device) for v in given)

    def numbers(self):
        """The non-tensor arguments of a raw `dual`."""
        return CODES[self.divergence], self.alpha or 0.0, self.radius, self.kappa, self.max_dual

    def raw(self, dtype=torch.float64, device="cpu"):
        return (*self.tensors(dtype, device), *self.numbers())

    def options(self):
        """The keyword arguments of `dc_loss`."""
        return {name: getattr(self, name) for name in ("radius", "divergence", "alpha", "kappa", "max_dual")}


class Solution(NamedTuple):
    """What a raw `dual` returns, in its order."""

    value: torch.Tensor
    lam: torch.Tensor
    nu: torch.Tensor
    weights: torch.Tensor
    status: torch.Tensor
    passes: torch.Tensor


def solve(backend, problem, dtype=torch.float64, device="cpu") -> Solution:
    """The solution of a one-row problem by a raw `dual`, as tensors without the row dimension."""
    return Solution(*(entry[0] for entry in backend(*problem.raw(dtype, device))))


def assert_golden(problem, solution, dtype):
    """Value, lam and weights against the known solution; the value is held to the tolerances of section 3."""
    tight = dtype == torch.float64
    spread = max(problem.losses) - min(problem.losses)
    assert solution.value.item() == pytest.approx(problem.value, rel=1e-12 if tight else 1e-6, abs=0)
    # The value is flat at the optimum, so the multiplier and the weights carry about half of its digits.
    assert solution.lam.item() == pytest.approx(problem.lam, rel=1e-6 if tight else 1e-5, abs=1e-9 * spread)
    known = torch.tensor(problem.weights, dtype=torch.float64)
    torch.testing.assert_close(solution.weights.cpu().double(), known, rtol=0, atol=1e-7 if tight else 1e-6)
    assert solution.weights.double().sum().item() == pytest.approx(1, abs=1e-12 if tight else 1e-6)


def golden() -> list[Problem]:
    """The 34-digit solutions of data/dual.json. Inputs are exact in float32."""

    def floats(texts):
        return None if texts is None else [float(text) for text in texts]

    cases = json.loads((Path(__file__).parent / "data" / "dual.json").read_text())["cases"]
    return [
        Problem(
            losses=floats(case["losses"]),
            costs=floats(case["costs"]),
            divergence=case["divergence"],
            alpha=case["alpha"],
            radius=case["radius"],
            kappa=case["kappa"],
            value=float(case["value"]),
            lam=float(case["lam"]),
            weights=floats(case["weights"]),
        )
        for case in cases
    ]


def over_families(problem: Problem, families=None) -> list[Problem]:
    """The same row under every divergence."""
    return [replace(problem, divergence=name, alpha=alpha) for name, alpha in families or FAMILIES]


def random_problem(
    n, family, *, seed=0, radius=0.1, kappa=0.0, costs=False, clean=False, scale=1.0, shift=0.0, kind="normal"
) -> Problem:
    """A row of `n` losses. Costs are such that the transport alone spends about half of the budget."""
    rng = np.random.default_rng(seed)
    draw = {
        "normal": lambda: rng.standard_normal(n),
        "exponential": lambda: rng.exponential(size=n),
        "lognormal": lambda: rng.lognormal(sigma=2.0, size=n),
        "ties": lambda: rng.integers(0, 3, size=n).astype(float),
        "outlier": lambda: np.where(np.arange(n) == n // 2, 1e4, rng.standard_normal(n)),
    }
    losses = scale * draw[kind]() + shift
    spent = radius * rng.uniform(size=n) if costs else None
    below = losses - scale * rng.uniform(size=n) if clean else None
    return Problem(
        losses=losses.tolist(),
        costs=None if spent is None else spent.tolist(),
        clean_losses=None if below is None else below.tolist(),
        divergence=family[0],
        alpha=family[1],
        radius=radius,
        kappa=kappa,
    )


def divergence_of(weights, divergence, alpha) -> float:
    """D of the weights (a vector that sums to one) as the table of section 2 defines it."""
    q = np.asarray(weights, dtype=np.float64) * len(weights)
    if divergence == "kl":
        return float(special.xlogy(q, q).mean())
    if divergence == "alpha":
        return float((q**alpha).mean() - 1) / (alpha * (alpha - 1))
    if alpha > 1 and (q == 0).any():
        return math.inf
    return float(special.logsumexp((1 - alpha) * np.log(q[q > 0])) - math.log(len(q))) / (alpha * (alpha - 1))


def scipy_value(problem: Problem) -> float:
    """The dual of section 1 minimised by SciPy: Brent in log mu over Brent's root of the normaliser."""
    losses = np.asarray(problem.losses)
    costs = np.zeros_like(losses) if problem.costs is None else np.asarray(problem.costs)
    spread = max(np.ptp(losses), 1e-30)

    def objective(log_mu):
        mu = math.exp(log_mu)
        a = losses / mu - costs
        if problem.clean_losses is not None:
            a = np.maximum(a, np.asarray(problem.clean_losses) / mu)
        return mu * (problem.radius + cumulant(a, problem.divergence, problem.alpha)) - problem.kappa * problem.radius

    low = math.log(max(problem.kappa, 1e-6 * spread))
    high = math.log(spread) + 12
    # The slope is increasing in mu, so that the objective has one basin; Brent's bracket is the whole of it.
    best = optimize.minimize_scalar(objective, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    return float(min(best.fun, objective(low)))


def cumulant(a, divergence, alpha) -> float:
    """Phi(a), by the conjugate and the normaliser bracket of the table of section 2."""
    if divergence == "kl":
        return float(special.logsumexp(a) - math.log(len(a)))
    if divergence == "alpha":
        power = alpha / (alpha - 1)

        def normaliser(nu):
            return (((alpha - 1) * np.maximum(a - nu, 0)) ** (1 / (alpha - 1))).mean() - 1

        nu = _root(normaliser, a.min() - 1 / (alpha - 1), a.max() - 1 / (alpha - 1))
        conjugate = ((alpha - 1) * np.maximum(a - nu, 0)) ** power / alpha + 1 / (alpha * (alpha - 1))
        return float(nu + conjugate.mean())
    with np.errstate(divide="ignore"):
        log_depth = np.log(a.max() - a)

    def log_mean(log_gap, exponent):
        return special.logsumexp(exponent * np.logaddexp(log_gap, log_depth)) - math.log(len(a))

    def normaliser(log_gap):
        return log_mean(log_gap, -1 / alpha) - math.log(alpha) - log_mean(log_gap, (alpha - 1) / alpha)

    log_gap = _root(normaliser, -1000.0, -math.log(alpha))
    tail = log_mean(log_gap, (alpha - 1) / alpha) / (alpha - 1)
    return float(a.max() + math.exp(log_gap) - (math.log(alpha) + 1) / alpha - tail)


def _root(function, low, high) -> float:
    if function(low) * function(high) >= 0:  # rounding at the end of the bracket: all scores equal
        return low if abs(function(low)) < abs(function(high)) else high
    return optimize.brentq(function, low, high, xtol=1e-15, rtol=1e-14)


def renyi_in_many_digits(losses, alpha, radius, digits=60):
    """Value and gap rho* - max(losses) of the cost-free Rényi form of section 2: bisection in log(gap)."""
    with mpmath.workdps(digits):
        alpha, radius = mpmath.mpf(alpha), mpmath.mpf(radius)
        top = max(losses)
        depth = [mpmath.mpf(top) - mpmath.mpf(loss) for loss in losses]
        power = (alpha - 1) / alpha
        shrink = mpmath.exp(-alpha * radius)

        def mean(gap, exponent):
            return mpmath.fsum((gap + d) ** exponent for d in depth) / len(depth)

        def slope(gap):
            return 1 - shrink * mean(gap, power) ** (1 / power - 1) * mean(gap, power - 1)

        low, high = mpmath.mpf(-200), mpmath.log(max(depth)) + 10
        for _ in range(4 * digits):
            middle = (low + high) / 2
            low, high = (low, middle) if slope(mpmath.exp(middle)) > 0 else (middle, high)
        gap = mpmath.exp(low)
        return float(mpmath.mpf(top) + gap - shrink * mean(gap, power) ** (1 / power)), float(gap)
