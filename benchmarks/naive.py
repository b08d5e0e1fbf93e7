"""How the D^c dual is solved without armor: SciPy on the host, or a fixed number of Newton steps in torch.

All solve sections 1 and 2 of docs/math.md without transport costs and evaluate the dual at the mu they find,
so that autograd returns the worst-case weights. bench_dual.py times them and tests/test_benchmarks.py holds
them to the float64 oracle: a ratio to a baseline that is fast and wrong would say nothing.
"""

import math

import numpy as np
import torch
from scipy import optimize

LAM_MAX = 100.0  # the published scripts give up above this lambda
RHO_GAP = 1e-6  # and keep rho this far above the largest loss


def scipy_dc_loss(losses, *, radius, divergence, alpha=None, kappa=0.0):
    """D^c loss of `losses` [..., n] as the published scripts compute it: duals on the host, value in torch.

    KL bisects the derivative in lambda; Rényi minimises over (lambda, rho) with L-BFGS-B. No published script
    solves the alpha divergence exactly; it gets Brent's root search on its one-root form, for kappa = 0 only.
    """
    solve = {"kl": _bisect_kl, "alpha": _solve_alpha, "renyi": _solve_renyi}[divergence]
    mu, rho = _solve_rows(solve, losses, radius, alpha, kappa)
    return _dual(losses, mu, rho, radius, divergence, alpha, kappa)


def brent_dc_loss(losses, *, radius, kappa=0.0):
    """KL D^c loss of `losses` [..., n] by a tuned host solve: Brent's search, one exponential a step."""
    mu, rho = _solve_rows(_brent_kl, losses, radius, None, kappa)
    return _dual(losses, mu, rho, radius, "kl", None, kappa)


def eager_dc_loss(losses, *, radius, kappa=0.0, iterations=12):
    """KL D^c loss of `losses` [..., n] by a fixed number of Newton steps, without a device-to-host copy."""
    with torch.no_grad():
        mu = _newton_kl(losses, radius, iterations).clamp(min=kappa)
    return _dual(losses, mu, None, radius, "kl", None, kappa)


def _dual(losses, mu, rho, radius, divergence, alpha, kappa):
    """mu * (radius + Phi(losses / mu)) - kappa * radius at rho = mu * nu, in the units of a loss."""
    if divergence == "kl":
        inner = mu * (torch.logsumexp(losses / mu[..., None], -1) - math.log(losses.shape[-1]))
    elif divergence == "alpha":
        power = alpha / (alpha - 1)
        excess = torch.relu(losses - rho[..., None]) / mu[..., None]
        conjugate = (alpha - 1) ** power / alpha * excess**power + 1 / (alpha * (alpha - 1))
        inner = rho + mu * conjugate.mean(-1)
    else:
        mean = ((rho[..., None] - losses) ** ((alpha - 1) / alpha)).mean(-1)
        inner = rho - mu * ((math.log(alpha) + 1 - mu.log()) / alpha + mean.log() / (alpha - 1))
    return mu * radius + inner - kappa * radius


def _solve_rows(solve, losses, radius, alpha, kappa):
    rows = losses.detach().cpu().numpy().reshape(-1, losses.shape[-1])
    duals = np.array([solve(row, radius, alpha, kappa) for row in rows])
    return torch.from_numpy(duals).to(losses).reshape(*losses.shape[:-1], 2).unbind(-1)


def _bisect_kl(row, radius, alpha, kappa):
    top = row.max()

    def slope(lam):
        # Every term evaluates its own exponentials, as published: the formula of section 1 written out once.
        mu = lam + kappa
        phi = np.log(np.average(np.exp((row - top) / mu))) + top / mu
        mean = np.average(row * np.exp((row - top) / mu)) / np.average(np.exp((row - top) / mu))
        return radius + phi - mean / mu

    low = 0.0 if kappa > 0 else 1e-6 * (top - row.min())
    if slope(low) >= 0:
        return low + kappa, 0.0
    high = 10.0
    while slope(high) <= 0:
        high *= 2
        if high >= LAM_MAX:
            return LAM_MAX + kappa, 0.0
    return optimize.bisect(slope, low, high) + kappa, 0.0


def _brent_kl(row, radius, alpha, kappa):
    shifted = row - row.max()
    count = len(row)

    def gap(inverse):
        weights = np.exp(inverse * shifted)
        total = weights.sum()
        return inverse * (weights @ shifted) / total - math.log(total / count) - radius

    # mu <= (max - min) / sqrt(8 radius): section 2.
    low, high = math.sqrt(8 * radius) / -shifted.min(), 1 / kappa if kappa > 0 else 1e6 / -shifted.min()
    if low >= high or gap(high) <= 0:
        return 1 / high, 0.0
    return 1 / optimize.brentq(gap, low, high, rtol=1e-6), 0.0


def _solve_alpha(row, radius, alpha, kappa):
    if kappa:
        raise ValueError(f"kappa must be 0 for the one-root form of the alpha divergence, got {kappa}")
    power = alpha / (alpha - 1)
    growth = 1 + alpha * (alpha - 1) * radius
    top, spread = row.max(), row.max() - row.min()

    def slope(rho):
        excess = np.maximum(row - rho, 0)
        tilt = np.mean(excess ** (power - 1)) * np.mean(excess**power) ** (1 / power - 1)
        return 1 - growth ** (1 / alpha) * tilt

    low, high = top - spread, top - 1e-6 * spread
    while slope(low) >= 0:
        low = top - 2 * (top - low)
    rho = optimize.brentq(slope, low, high) if slope(high) > 0 else high
    mu = (alpha - 1) * (np.mean(np.maximum(row - rho, 0) ** power) / growth) ** (1 / power)
    return mu, rho


def _solve_renyi(row, radius, alpha, kappa):
    power = (alpha - 1) / alpha

    def value(x):
        mu, rho = x
        mean = np.average((rho - row) ** power)
        return mu * radius + rho - mu * ((np.log(alpha) + 1 - np.log(mu)) / alpha + np.log(mean) / (alpha - 1))

    def gradient(x):
        mu, rho = x
        mean = np.average((rho - row) ** power)
        by_mu = radius - (np.log(alpha) - np.log(mu)) / alpha - np.log(mean) / (alpha - 1)
        return by_mu, 1 - mu / alpha * np.average((rho - row) ** (-1 / alpha)) / mean

    mu_min, rho_min = max(kappa, 1e-6), row.max() + RHO_GAP
    bounds = [(mu_min, None), (rho_min, None)]
    return optimize.minimize(value, (mu_min, rho_min + 1), jac=gradient, bounds=bounds, tol=1e-7).x


def _newton_kl(losses, radius, iterations):
    """mu of each row by Newton on sqrt(KL) in 1/mu, nearly straight there (docs/math.md, section 2)."""
    shifted = losses - losses.amax(-1, keepdim=True)
    tiny = torch.finfo(losses.dtype).tiny
    inverse = math.sqrt(2 * radius) / shifted.std(-1, keepdim=True, correction=0).clamp(min=tiny)
    for _ in range(iterations):
        log_weights = torch.log_softmax(inverse * shifted, -1)
        weights = log_weights.exp()
        kl = (weights * log_weights).sum(-1, keepdim=True) + math.log(losses.shape[-1])
        mean = (weights * shifted).sum(-1, keepdim=True)
        slope = inverse * (weights * (shifted - mean) ** 2).sum(-1, keepdim=True)
        step = 2 * ((radius * kl).sqrt() - kl) / slope.clamp(min=tiny)
        # The slope all but vanishes near the largest divergence that n samples allow, and Newton would leap.
        inverse = torch.clamp(inverse + step, inverse / 4, inverse * 4)
    return 1 / inverse.squeeze(-1)
