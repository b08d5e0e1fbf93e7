"""Float64 oracle of `armor::dual` in plain torch: section 1 of docs/math.md, solved by bisection in log(mu)
around a bisection on the normaliser of the weights. It is slow, bounded and independent of the kernels: tests
judge every kernel by it, and `armor.library` registers it as the backend "reference", on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from armor.library import real

KL, ALPHA, RENYI = 0, 1, 2
CONVERGED, SATURATED, MAX_DUAL, NONFINITE = 0, 1, 2, 3

# log(mu / range of the losses) is sought in +-LOG_LIMIT, where exp() and its inverse are normal float64.
LOG_LIMIT = 700.0
# Bits gained on a bracket: 64 exhaust float64 on brackets as wide as these.
BITS = 64


def dual(
    losses: Tensor,
    costs: Tensor | None,
    clean_losses: Tensor | None,
    divergence: int,
    alpha: float,
    radius: float,
    kappa: float,
    max_dual: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The value sup { E_Q[losses] - kappa * D^c : D^c(Q || P_n) <= radius } of every row, with its duals.

    losses, costs, clean_losses: [..., n], n >= 1. divergence: 0 KL, 1 alpha, 2 Rényi; only the last two use
    `alpha`. Returns value, lam, nu [...] and weights [..., n] in float64 for float64 losses and float32 for
    other dtypes, then status and passes [...] in int32. The edges are those of section 3 of docs/math.md.
    """
    front, rows = losses.shape[:-1], (math.prod(losses.shape[:-1]), losses.shape[-1])
    loss = losses.double().reshape(rows)
    cost = torch.zeros_like(loss) if costs is None else costs.double().reshape(rows)
    kept = torch.full_like(loss, -math.inf) if clean_losses is None else clean_losses.double().reshape(rows)

    nan = loss.isnan() | cost.isnan() | (cost == -math.inf)
    if clean_losses is not None:
        nan |= kept.isnan()
    # A sample of infinite cost cannot be transported, so its transported loss is never seen.
    barred = cost == math.inf
    loss, cost = loss.masked_fill(barred, -math.inf), cost.masked_fill(barred, 0.0)
    best = torch.maximum(loss, kept)
    unusable = barred if clean_losses is None else torch.zeros_like(barred)
    plus = best == math.inf
    minus = (best == -math.inf) & (~unusable | unusable.all(1, keepdim=True))
    nan_row, plus_row = nan.any(1, keepdim=True), plus.any(1, keepdim=True)
    odd = nan_row | plus_row | minus.any(1, keepdim=True)

    loss, cost, kept = (entry.masked_fill(odd, 0.0) for entry in (loss, cost, kept))
    cap = math.inf if costs is None else max(max_dual, kappa)
    value, lam, nu, weights, status = _solve(loss, cost, kept, divergence, alpha, radius, kappa, cap)

    limit = torch.where(nan_row, math.nan, torch.where(plus_row, math.inf, -math.inf)).double()
    share = torch.where(plus_row, plus, minus).double()
    value, nu = torch.where(odd, limit, value), torch.where(odd, limit, nu)
    lam = torch.where(odd, torch.where(nan_row, math.nan, 0.0).double(), lam)
    weights = torch.where(odd, share / share.sum(1, keepdim=True), weights).masked_fill(nan_row, math.nan)
    status = status.masked_fill(odd, NONFINITE)

    dtype = real(losses)
    value, lam, nu = (entry.to(dtype).view(front) for entry in (value, lam, nu))
    passes = torch.full_like(value, BITS if divergence == KL else BITS * BITS, dtype=torch.int32)
    return value, lam, nu, weights.to(dtype).view(losses.shape), status.view(front), passes


def dual_backward(
    grad_value: Tensor,
    mu: Tensor,
    weights: Tensor,
    losses: Tensor,
    costs: Tensor | None,
    clean_losses: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Danskin: dV/dlosses = q and dV/dcosts = -mu * q on the transported branch, dV/dclean_losses = q off it.

    grad_value, mu: [...]; the others [..., n]. Each gradient has the dtype of its input; an input that was
    not given has an empty one.
    """
    mu, share = mu.double()[..., None], grad_value.double()[..., None] * weights.double()
    kept = torch.zeros_like(share, dtype=torch.bool)
    if clean_losses is not None:
        toll = 0.0 if costs is None else _price(mu, costs.double())
        kept = ~(losses.double() - toll >= clean_losses.double())
    moved = share.masked_fill(kept, 0.0)
    grad_losses = moved.to(losses.dtype).contiguous()
    grad_costs = losses.new_empty(0)
    grad_clean = losses.new_empty(0)
    if costs is not None:
        grad_costs = -_price(mu, moved).to(costs.dtype).contiguous()
    if clean_losses is not None:
        grad_clean = share.masked_fill(~kept, 0.0).to(clean_losses.dtype).contiguous()
    return grad_losses, grad_costs, grad_clean


def _price(mu: Tensor, amount: Tensor) -> Tensor:
    """mu * amount where nothing costs nothing and an infinite cost stays infinite, whatever mu is."""
    return (mu * amount).masked_fill(amount == 0, 0.0).masked_fill(amount == math.inf, math.inf)


def _solve(
    loss: Tensor,
    cost: Tensor,
    kept: Tensor,
    divergence: int,
    alpha: float,
    radius: float,
    kappa: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solves rows of finite best losses, apart from samples of no use (loss and kept are -inf)."""
    best = torch.maximum(loss, kept)
    unusable = best == -math.inf

    # Shift by the maximum and divide by the range; the power of two keeps that range from overflowing.
    largest = best.masked_fill(unusable, 0.0).abs().amax(1, keepdim=True)
    guard = torch.where(largest > 2.0**1000, 2.0**-10, 1.0).double()
    top = (best * guard).amax(1, keepdim=True)
    spread = (top - best * guard).masked_fill(unusable, 0.0).amax(1, keepdim=True)
    scale = torch.where(spread > 0, spread, 1.0)
    moved, kept = (loss * guard - top) / scale, (kept * guard - top) / scale

    def at(mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and cost of the branch taken, and a = loss / mu - cost; mu = 0 stands for its limit."""
        ahead = torch.where(mu > 0, moved - mu * cost >= kept, (moved > kept) | (moved == kept) & (cost <= 0))
        taken, paid = torch.where(ahead, moved, kept), cost.masked_fill(~ahead, 0.0)
        hopeless = torch.where(taken < 0, -math.inf, 0.0).double()
        return taken, paid, torch.where(mu > 0, taken / mu, hopeless) - paid

    def overspent(mu: Tensor) -> Tensor:
        """The sign of -dV/dmu, where dV/dmu = radius - D(q) - E_q[c]."""
        _, paid, score = at(mu)
        log_q, _ = _tilt(score, divergence, alpha)
        return _discrepancy(log_q, divergence, alpha) + _mean(log_q, paid) > radius

    floor, ceiling = math.exp(-LOG_LIMIT), math.exp(LOG_LIMIT)
    start, stop = (guard * kappa / scale).clamp(max=ceiling), (guard * cap / scale).clamp(floor, ceiling)
    at_start = ~overspent(start)
    at_stop = ~at_start & overspent(stop)
    bracket = start.clamp(min=floor).log(), stop.log()
    mu = _section(lambda log_mu: overspent(log_mu[:, 0].exp())[:, None], *bracket, 2**20).exp()
    mu = torch.where(at_start, start, torch.where(at_stop, stop, mu))
    lam = (mu - start).clamp(min=0.0)

    taken, paid, score = at(mu)
    log_q, nu = _tilt(score, divergence, alpha)
    spent = _discrepancy(log_q, divergence, alpha) + _mean(log_q, paid)
    weights = log_q.exp() / loss.shape[1]
    value = _mean(log_q, taken) + (radius * lam).masked_fill(lam == 0, 0.0) - mu * spent
    value = torch.maximum(value, (taken - mu * paid).mean(1, keepdim=True)).clamp(max=0.0)
    nu = torch.where(mu > 0, nu + top / (scale * mu), torch.where(top == 0, 0.0, top.sign() * math.inf))
    lam = lam * scale / guard
    if cap < math.inf:
        lam = torch.where(at_stop, cap - kappa, lam)
    status = torch.zeros_like(value, dtype=torch.int32)
    status = status.masked_fill(mu == 0, SATURATED).masked_fill(at_stop, MAX_DUAL)

    if divergence == RENYI and alpha > 1:
        # A weight of zero is infinitely far: no budget suffices. The weights are the limit of a growing cost.
        broke = unusable.any(1, keepdim=True)
        last = (score == score.amax(1, keepdim=True)).double()
        weights = torch.where(broke, last / last.sum(1, keepdim=True), weights)
        value = value.masked_fill(broke, -math.inf)
    if radius == 0 and cap == math.inf:
        # Nothing may move, at no finite price.
        still = spread > 0
        nu_at_rest = 0.0 if divergence == KL else -1 / (alpha - 1) if divergence == ALPHA else 1 / alpha
        value = torch.where(still, taken.mean(1, keepdim=True), value)
        lam, nu = lam.masked_fill(still, math.inf), nu.masked_fill(still, nu_at_rest)
        weights, status = weights.masked_fill(still, 1 / loss.shape[1]), status.masked_fill(still, CONVERGED)
    elif cap == math.inf:
        status = status.masked_fill(at_stop, CONVERGED)
    return (top + scale * value) / guard, lam, nu, weights, status


def _tilt(score: Tensor, divergence: int, alpha: float) -> tuple[Tensor, Tensor]:
    """log q of the maximiser of mean(q * score) - D(q) over mean(q) = 1, and nu, the multiplier of that mean.

    The normaliser is sought in a coordinate that keeps its digits however sharp or flat the weights are.
    """
    top = score.amax(1, keepdim=True)
    u = score - top
    if divergence == KL:
        nu = _log_mean_exp(u)
        return u - nu, top + nu
    if divergence == RENYI:
        log_q, nu = _tilt_renyi(u, alpha)
    else:
        log_q, nu = _tilt_alpha(u, alpha) if alpha <= 2 else _tilt_steep_alpha(u, alpha)
    return log_q - _log_mean_exp(log_q), top + nu


def _tilt_alpha(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Sought: the log of the largest weight."""
    power = alpha - 1

    def log_weight(peak: Tensor, u: Tensor) -> Tensor:
        rise = power * u.clamp(min=-1e300) * torch.exp(-power * peak)
        return (peak + torch.log1p(rise.clamp(min=-1.0)) / power).masked_fill(u == -math.inf, -math.inf)

    def light(peak: Tensor) -> Tensor:
        return log_weight(peak, u[:, None]).exp().mean(-1, keepdim=True) < 1

    low = torch.zeros_like(u[:, :1])
    peak = _section(light, low, low + math.log(u.shape[1]), u.shape[1])
    return log_weight(peak, u), -torch.exp(power * peak) / power


def _tilt_steep_alpha(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Sought: the log of the smallest weight that is not zero; weights leave zero with infinite slope."""
    power = alpha - 1
    last = _last_active(u, power)
    idle = u < last
    height = (u - last).log().masked_fill(idle, -math.inf)

    def log_weight(least: Tensor, height: Tensor) -> Tensor:
        return least + _log_ratio(height, power * least - math.log(power)) / power

    def light(least: Tensor) -> Tensor:
        weight = log_weight(least, height[:, None]).exp().masked_fill(idle[:, None], 0.0)
        return weight.mean(-1, keepdim=True) < 1

    bound = torch.full_like(last, math.log(u.shape[1]))
    least = _section(light, bound - 50.0, bound, u.shape[1])
    return log_weight(least, height).masked_fill(idle, -math.inf), last - torch.exp(power * least) / power


def _tilt_renyi(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Sought: the log of the gap nu - max(score)."""
    depth = (-u).log()

    def heavy(gap: Tensor) -> Tensor:
        ratio = _log_ratio(depth[:, None], gap)
        left = torch.logsumexp(-ratio / alpha, -1, keepdim=True)
        right = torch.logsumexp(ratio.clamp(max=1e300) * ((alpha - 1) / alpha), -1, keepdim=True)
        return left > math.log(alpha) + gap + right

    # The upper bound is that of docs/math.md; the lower ones follow from mean(q) = 1 for a single maximiser.
    n = u.shape[1]
    high = torch.full_like(u[:, :1], -math.log(alpha))
    if alpha > 1:
        reach = (-u).masked_fill(u == -math.inf, 0.0).amax(1, keepdim=True)
        low = -alpha * math.log(alpha * n) - (alpha - 1) * torch.log(1 / alpha + reach)
    else:
        low = high - alpha * math.log(2 * n) - math.log(2)
    gap = _section(heavy, low, high, n)
    return -_log_ratio(depth, gap) / alpha, gap.exp()


def _log_ratio(log_depth: Tensor, log_gap: Tensor) -> Tensor:
    """log((depth + gap) / gap)."""
    return torch.logaddexp(torch.zeros_like(log_depth), log_depth - log_gap)


def _last_active(u: Tensor, power: float) -> Tensor:
    """The smallest u above the multiplier nu: the last one, from the top, where nu = u gives mean(q) < 1."""
    n = u.shape[1]
    ranked = u.sort(1, descending=True).values
    low = torch.zeros_like(u[:, :1], dtype=torch.int64)
    high = torch.full_like(low, n)
    for _ in range(n.bit_length()):
        middle = (low + high) // 2
        rise = (u - ranked.gather(1, middle)).nan_to_num(0.0).clamp(min=0.0)
        light = (power * rise).pow(1 / power).mean(1, keepdim=True) < 1
        low, high = torch.where(light, middle, low), torch.where(light, high, middle)
    return ranked.gather(1, low)


def _discrepancy(log_q: Tensor, divergence: int, alpha: float) -> Tensor:
    """D(q) for mean(q) = 1. Terms whose mean cancels are dropped per sample: flat weights keep digits."""
    excess = torch.expm1(log_q)
    if divergence != RENYI:
        bend = log_q if divergence == KL else torch.expm1((alpha - 1) * log_q) / (alpha - 1)
        grown = torch.where(log_q == -math.inf, 0.0, log_q.exp() * bend)
        return (grown - excess).mean(1, keepdim=True) / (1.0 if divergence == KL else alpha)
    power = (1 - alpha) * log_q
    flat = torch.log1p((torch.expm1(power) - (1 - alpha) * excess).mean(1, keepdim=True))
    steep = torch.logsumexp(power, 1, keepdim=True) - math.log(log_q.shape[1])
    return torch.where(power.abs().amax(1, keepdim=True) < 0.1, flat, steep) / (alpha * (alpha - 1))


def _mean(log_q: Tensor, entry: Tensor) -> Tensor:
    """E_q[entry]; a sample without weight does not count, even at an infinite entry."""
    return torch.where(log_q == -math.inf, 0.0, log_q.exp() * entry).mean(1, keepdim=True)


def _log_mean_exp(y: Tensor) -> Tensor:
    top = y.amax(1, keepdim=True)
    mean = (y - top).exp().mean(1, keepdim=True)
    return top + torch.where(mean > 0.5, torch.log1p(torch.expm1(y - top).mean(1, keepdim=True)), mean.log())


def _section(below: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, n: int) -> Tensor:
    """The point of [low, high] ([rows, 1]) where below ([rows, points, 1] to bool) turns from true to false.

    Short rows test 15 points of the bracket at once, which bisects four times; long ones test its middle.
    """
    gained = 4 if low.shape[0] * n < 4096 else 1
    parts = torch.arange(2**gained + 1, dtype=low.dtype, device=low.device) / 2**gained
    for _ in range(BITS // gained):
        points = low + (high - low) * parts
        cell = below(points[:, 1:-1, None]).sum(1)
        low, high = points.gather(1, cell), points.gather(1, cell + 1)
    return (low + high) / 2
