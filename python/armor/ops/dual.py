"""`dc_loss`: the worst expected loss over a ball of the optimal-transport-regularised divergence D^c around the batch,
solved exactly by `armor::dual` (docs/math.md, sections 1 to 3), and `dc_objective`, its dual objective at given duals.
Everything that trains with ARMOR_D calls one of the two.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

import armor.library  # noqa: F401  (registers torch.ops.armor)
from armor.ops import check
from armor.ops.function import differentiable, first_order

DIVERGENCES = {"kl": 0, "alpha": 1, "renyi": 2}


class Status(IntEnum):
    """How a row was answered."""

    CONVERGED = 0
    SATURATED = 1  # the radius allows all mass on the maximum: the value is the maximum and lam is 0
    MAX_DUAL = 2  # the transport alone overspends the radius: mu stopped at max_dual
    NONFINITE = 3  # the row holds NaN or inf; the value is what a mean would be
    NOT_CONVERGED = 4  # the iteration bound was met; the value is still an upper bound of the exact one


class DualResult(NamedTuple):
    """The solution behind a value of `dc_loss`; detached.

    lam: multiplier of the radius, >= 0, in units of the losses. mu = lam + kappa divides them: a = losses/mu - costs.
    nu: multiplier of "weights sum to one", in the units of a.
    weights: the worst-case distribution, shaped like `losses`; sums to one along `dim`.
    status: int32, a `Status` per value. passes: int32, how often the data were read.
    """

    lam: Tensor
    nu: Tensor
    weights: Tensor
    status: Tensor
    passes: Tensor


def dc_loss(
    losses: Tensor,
    costs: Tensor | None = None,
    *,
    clean_losses: Tensor | None = None,
    radius: float,
    divergence: str = "kl",
    alpha: float | None = None,
    kappa: float = 0.0,
    dim: int = -1,
    max_dual: float = 1e6,
    return_dual: bool = False,
) -> Any:
    """sup { E_Q[losses] - kappa * D^c(Q || P) : D^c(Q || P) <= radius }, P uniform over the samples along `dim`.

    Use it where `losses.mean(dim)` stood. It is solved through its dual, to about 1e-7 of the range of the losses for
    float32 and 1e-13 for float64; there is no iteration count to choose.

    Args:
        losses: any shape with at least one sample along `dim`; float16, bfloat16, float32 or float64.
        costs: transport cost c >= 0 of every sample, shaped like `losses`; None where the transport is free inside a
            hard ball. A cost of +inf bars its sample.
        clean_losses: losses of the samples before transport, shaped like `losses`. A sample then takes the better of
            moving, loss/mu - cost, and staying, clean_loss/mu, so that frozen transports can not overspend the radius.
        radius: size of the ball, >= 0; 0 gives the mean. Dimensionless (nats, for KL).
        divergence: "kl": KL(Q||P). "alpha": D_f(Q||P), f(t) = (t^alpha - 1) / (alpha (alpha - 1)). "renyi":
            R_alpha(P||Q) = log E_P[(dQ/dP)^(1-alpha)] / (alpha (alpha - 1)); mind the order, P comes first.
        alpha: order of the divergence: > 1 for "alpha"; > 0 and not 1 for "renyi"; None for "kl".
        kappa: weight of D^c in the objective, >= 0, in units of the losses; the dual variable mu is at least kappa.
        dim: the dimension that holds the samples; the others are independent problems.
        max_dual: with costs, the largest mu, > 0 (`Status.MAX_DUAL`). Without costs mu is not bounded.
        return_dual: also return the `DualResult`.

    Returns:
        The value(s), with the shape of `losses` without `dim`; float64 for float64 input, else float32. With
        `return_dual`, the pair (value, DualResult).

    The gradient is that of the envelope theorem: weights for losses, -mu * weights for costs (for clean_losses, the
    weights of the samples that stay). It is first order only: a second derivative raises RuntimeError.

    Raises:
        TypeError: a tensor that is not floating point or is a DTensor; a number that is not one.
        ValueError: a number out of its range, an empty row, or tensors that do not match.

    Source: Birrell and Ebrahimi, "Optimal Transport Regularized Divergences", arXiv:2309.03791.
    """
    kind, order = _family(divergence, alpha)
    radius, kappa = check.number("radius", radius, least=0.0), check.number("kappa", kappa, least=0.0)
    max_dual = check.number("max_dual", max_dual, above=0.0)
    losses, costs, clean_losses = _samples(losses, costs, clean_losses, dim)
    value, *dual = _dual(losses, costs, clean_losses, kind, order, radius, kappa, max_dual)
    if not return_dual:
        return value
    lam, nu, weights, status, passes = dual
    return value, DualResult(lam, nu, weights.movedim(-1, dim), status, passes)


def dc_objective(
    losses: Tensor,
    lam: Tensor | float,
    nu: Tensor | float | None = None,
    costs: Tensor | None = None,
    *,
    clean_losses: Tensor | None = None,
    radius: float,
    divergence: str = "kl",
    alpha: float | None = None,
    kappa: float = 0.0,
    dim: int = -1,
) -> Tensor:
    """mu * (radius + nu + mean f*(a - nu)) - kappa * radius, with mu = lam + kappa and a = losses/mu - costs.

    This dual objective is an upper bound of `dc_loss` for every lam >= 0 (mu > 0) and nu, tight at the duals that
    `dc_loss` returns. It is plain PyTorch, so it is differentiable in everything, to any order. Learned duals minimise
    it (`armor.LearnedDual`).

    Args:
        lam, nu: numbers or tensors that broadcast against the values. KL knows its best nu and takes none. For "renyi",
            nu must exceed max(a): at others the objective is +inf.
        losses, costs, clean_losses, radius, divergence, alpha, kappa, dim: as for `dc_loss`.

    Returns: the objective(s), with the shape of `losses` without `dim`.
    """
    kind, order = _family(divergence, alpha)
    radius, kappa = check.number("radius", radius, least=0.0), check.number("kappa", kappa, least=0.0)
    if (nu is None) != (kind == 0):
        raise ValueError(f"nu must be {'None' if kind == 0 else 'given'} for divergence={divergence!r}, got {nu!r}")
    losses, costs, clean_losses = _samples(losses, costs, clean_losses, dim)
    lam = torch.as_tensor(lam, dtype=losses.dtype, device=losses.device)
    mu = (lam + kappa).unsqueeze(-1)
    a = losses / mu
    if costs is not None:
        a = a - costs
    if clean_losses is not None:
        a = torch.maximum(a, clean_losses / mu)
    n = a.shape[-1]
    if kind == 0:
        potential = torch.logsumexp(a, -1) - math.log(n)
    else:
        nu = torch.as_tensor(nu, dtype=losses.dtype, device=losses.device)
        gap = a - nu.unsqueeze(-1)
        if kind == 1:
            power = order / (order - 1.0)
            conjugate = ((order - 1.0) * gap.clamp_min(0.0)).pow(power) / order
            potential = nu + conjugate.mean(-1) + 1.0 / (order * (order - 1.0))
        else:
            power = (order - 1.0) / order
            feasible = (gap < 0.0).all(-1)
            log_gap = (-gap).where(feasible.unsqueeze(-1), torch.ones_like(gap)).log()
            log_mean = torch.logsumexp(power * log_gap, -1) - math.log(n)
            potential = nu - (math.log(order) + 1.0) / order - log_mean / (order - 1.0)
            potential = potential.where(feasible, torch.full_like(potential, math.inf))
    return mu.squeeze(-1) * (radius + potential) - kappa * radius


def _solve(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.armor.dual.default(*args)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    losses, costs, clean_losses, _, _, _, kappa, _ = inputs
    _, lam, _, weights, _, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(lam, weights, losses, costs, clean_losses)
    ctx.kappa = kappa


def _backward(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradient of the envelope theorem."""
    if grad_value is None:
        return (None,) * 8
    lam, weights, losses, costs, clean_losses = ctx.saved_tensors
    mu = lam + ctx.kappa if ctx.kappa else lam
    to_losses, to_costs, to_clean = _dual_backward(grad_value, mu, weights, losses, costs, clean_losses)
    return (
        to_losses,
        None if costs is None else to_costs,
        None if clean_losses is None else to_clean,
        *(None,) * 5,
    )


_dual = differentiable(_solve, _remember, _backward)
_dual_backward = first_order(
    lambda *args: torch.ops.armor.dual_backward.default(*args),
    "dc_loss has first derivatives only: its gradient holds the dual variables fixed (envelope theorem). "
    "Use dc_objective for higher orders.",
)


def _family(divergence: str, alpha: float | None) -> tuple[int, float]:
    check.choice("divergence", divergence, DIVERGENCES)
    if divergence == "kl":
        if alpha is not None:
            raise ValueError(f"alpha must be None for divergence='kl', got {alpha!r}")
        return 0, 0.0
    if alpha is None:
        raise ValueError(f"alpha must be given for divergence={divergence!r}, got None")
    alpha = check.number("alpha", alpha, above=1.0 if divergence == "alpha" else 0.0)
    if alpha == 1.0:
        raise ValueError("alpha must not be 1 for divergence='renyi', got 1.0")
    return DIVERGENCES[divergence], alpha


def _samples(
    losses: Tensor, costs: Tensor | None, clean_losses: Tensor | None, dim: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The checked tensors, samples last, in the dtype of the computation."""
    given = {"losses": losses, "costs": costs, "clean_losses": clean_losses}
    for name, tensor in given.items():
        if tensor is not None:
            check.tensor(name, tensor)
            check.matches(name, tensor, "losses", losses)
    if clean_losses is not None and costs is None:
        raise ValueError("clean_losses needs costs: without a cost there is no reason to stay clean, got costs=None")
    if losses.dim() == 0:
        raise ValueError("losses must have at least one dimension, got a scalar")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__} {dim!r}")
    if not -losses.dim() <= dim < losses.dim():
        raise ValueError(f"dim must be in [{-losses.dim()}, {losses.dim() - 1}], got {dim}")
    if losses.shape[dim] == 0:
        raise ValueError(f"losses must hold at least one sample along dim={dim}, got shape {tuple(losses.shape)}")
    dtype = torch.float32
    if any(t is not None and t.dtype == torch.float64 for t in given.values()):
        dtype = torch.float64
    ready = [None if t is None else t.to(dtype) for t in given.values()]
    if dim not in (-1, losses.dim() - 1):
        ready = [None if t is None else t.movedim(dim, -1) for t in ready]
    return ready[0], ready[1], ready[2]  # type: ignore[return-value]
