"""armor::dual in Triton: one program solves one row, the whole iteration on the device (docs/math.md, section 2).

It is the twin of csrc/include/armor/{divergence,root,dual,row}.h, function by function and name by name; the reasons
stand there and in docs/solver.md. Everything is float64, as there. KIND is 0 for KL, 1 for alpha, 2 for Renyi.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from armor_kernels.launch import block_of, contiguous, device_guard

MAX_ROUNDS = tl.constexpr(400)
INF = tl.constexpr(float("inf"))
NO_DUAL = tl.constexpr(1e-13)  # with costs, mu = 1e-13 of the range stands for zero
TINY = tl.constexpr(1e-290)  # a smaller range counts as none
RADIUS, KAPPA, CEILING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what holds mu where it is
CONVERGED, SATURATED, MAX_DUAL, NONFINITE, NOT_CONVERGED = (tl.constexpr(i) for i in range(5))


def dual(
    losses: Tensor,
    costs: Tensor | None,
    clean_losses: Tensor | None,
    divergence: int,
    alpha: float,
    radius: float,
    kappa: float,
    max_dual: float,
) -> tuple[Tensor, ...]:
    """Launches one program per row of `losses` [..., n], float32 or float64."""
    losses = losses.contiguous()
    costs, clean_losses = contiguous(costs), contiguous(clean_losses)
    n = losses.shape[-1]
    value, lam, nu = (losses.new_empty(losses.shape[:-1]) for _ in range(3))
    status, passes = (losses.new_empty(losses.shape[:-1], dtype=torch.int32) for _ in range(2))
    weights = torch.empty_like(losses)
    block, warps = block_of(n)
    if value.numel():
        with device_guard(losses):
            _dual[(value.numel(),)](
                losses,
                losses if costs is None else costs,
                losses if clean_losses is None else clean_losses,
                value,
                lam,
                nu,
                weights,
                status,
                passes,
                n,
                {0: 0.0, 1: alpha - 1.0, 2: -alpha}[divergence],
                radius,
                kappa,
                max_dual,
                1e-6 if losses.dtype == torch.float32 else 1e-12,
                KIND=divergence,
                COSTS=costs is not None,
                CLEAN=clean_losses is not None,
                BLOCK=block,
                num_warps=warps,
            )
    return value, lam, nu, weights, status, passes


def dual_backward(
    grad_value: Tensor,
    mu: Tensor,
    weights: Tensor,
    losses: Tensor,
    costs: Tensor | None,
    clean_losses: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of `dual` in one launch: the weights, on the branch that each sample took."""
    losses, weights = losses.contiguous(), weights.contiguous()
    costs, clean_losses = contiguous(costs), contiguous(clean_losses)
    given = (losses, costs, clean_losses)
    grads = tuple(losses.new_empty(0) if t is None else torch.empty_like(t) for t in given)
    n = losses.shape[-1]
    block, warps = block_of(losses.numel())
    if losses.numel():
        with device_guard(losses):
            _dual_backward[(triton.cdiv(losses.numel(), block),)](
                grad_value.contiguous(),
                mu.contiguous(),
                weights,
                *(losses if t is None else t for t in given),
                *(grads[0] if g.numel() == 0 else g for g in grads),
                losses.numel(),
                n,
                COSTS=costs is not None,
                CLEAN=clean_losses is not None,
                BLOCK=block,
                num_warps=warps,
            )
    return grads


# ---- divergence.h --------------------------------------------------------------------------------------------------


@triton.jit
def _clamp(x, lo, hi):
    return tl.minimum(tl.maximum(x, lo), hi)


@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.where(u < INF, tl.log(u) + (x - (u - 1.0)) / u, u)


@triton.jit
def _expm1(x):
    u = tl.exp(x)
    near = (u - 1.0) * x / tl.log(u)
    return tl.where(u == 1.0, x, tl.where((u - 1.0 == -1.0) | (u == INF), u - 1.0, near))


@triton.jit
def _to_log_form(d, k, KIND: tl.constexpr):
    if KIND == 1:
        c = k * (1.0 + k)
        return tl.where(c > 0.0, _log1p(c * d) / c, d)
    else:
        return d


@triton.jit
def _from_log_form(r, k, KIND: tl.constexpr):
    if KIND == 1:
        c = k * (1.0 + k)
        return tl.where(c > 0.0, _expm1(c * r) / c, r)
    else:
        return r


@triton.jit
def _log_form(b, s0, m, k, KIND: tl.constexpr):
    if KIND == 0:
        return b * m - tl.log(s0)
    else:
        return (_log1p(k * b * m) / k - tl.log(s0)) / (1.0 + k)


@triton.jit
def _largest_log_form(n, ties, k):
    return tl.where(k <= -1.0, INF, tl.log(n / ties) / (1.0 + k))


@triton.jit
def _optimal_mu(b, s0, m, k, KIND: tl.constexpr):
    if KIND == 0:
        return 1.0 / b
    elif KIND == 1:
        return tl.exp(k * tl.log(s0)) / b
    else:
        return (1.0 + k * b * m) / b


@triton.jit
def _objective(mu, b, radius, s0, power_mean, k, KIND: tl.constexpr):
    if KIND == 0:
        return mu * (radius + tl.log(s0))
    elif KIND == 1:
        alpha = 1.0 + k
        power = power_mean * tl.exp(-alpha / k * tl.log(b * mu))
        return mu * radius + (mu / alpha - 1.0 / b) / k + mu / alpha * power
    else:
        alpha = -k
        log_terms = (tl.log(b * mu) - 1.0) / alpha - tl.log(power_mean) / (alpha - 1.0)
        return mu * radius + 1.0 / (alpha * b) + mu * log_terms


# ---- root.h: a bracket is (lo, hi, f_lo, f_hi, last_f, last_side, stalled) -----------------------------------------


@triton.jit
def _new_bracket(zero):
    return (zero - INF, zero + INF, zero - INF, zero + INF, zero + INF, zero, zero)


@triton.jit
def _closed(bracket):
    return (bracket[0] > -INF) & (bracket[1] < INF)


@triton.jit
def _exhausted(bracket):
    scale = tl.where(_closed(bracket), tl.abs(bracket[1]), 0.0)
    return bracket[1] - bracket[0] <= 1e-15 * tl.maximum(scale, 1.0)


@triton.jit
def _tighten(bracket, x, f):
    lo, hi, f_lo, f_hi, last_f, last_side, stalled = bracket
    width = hi - lo
    up = f > 0.0
    f_lo = tl.where(up, tl.where(last_side > 0.0, 0.5 * f_lo, f_lo), f)
    f_hi = tl.where(up, f, tl.where(last_side < 0.0, 0.5 * f_hi, f_hi))
    lo = tl.where(up, lo, x)
    hi = tl.where(up, x, hi)
    slow = (hi - lo > 0.5 * width) & (lo > -INF) & (hi < INF) & (tl.abs(f) > 0.5 * last_f)
    return (lo, hi, f_lo, f_hi, tl.abs(f), tl.where(up, 1.0, -1.0).to(tl.float64), tl.where(slow, stalled + 1.0, 0.0))


@triton.jit
def _next(bracket, candidate):
    lo, hi, f_lo, f_hi, last_f, last_side, stalled = bracket
    inside = (lo < candidate) & (candidate < hi) & (stalled < 3.0)
    share = tl.where((f_lo > -INF) & (f_hi < INF), f_lo / (f_lo - f_hi), 0.5)
    halve = (stalled >= 3.0) | (share < 0.0) | (share > 1.0) | (share != share)
    share = _clamp(tl.where(halve, 0.5, share), 0.05, 0.95)
    opened = tl.where(lo > -INF, lo + 0.7, hi - 1.4)
    x = tl.where(inside, candidate, tl.where(_closed(bracket), lo + share * (hi - lo), opened))
    stalled = tl.where(halve & _closed(bracket) & (inside == 0), 0.0, stalled)
    return x, (lo, hi, f_lo, f_hi, last_f, last_side, stalled)


# ---- loops over the row --------------------------------------------------------------------------------------------


@triton.jit
def _sample(losses, costs, clean, cols, here, unit, max_unit, inverse, mu, COSTS: tl.constexpr, CLEAN: tl.constexpr):
    """(loss - mu cost in scaled units, cost paid) of a block of samples; absent ones are -inf."""
    loss = tl.load(losses + cols, mask=here, other=0.0).to(tl.float64)
    v = tl.where(here, (loss * unit - max_unit) * inverse, -INF)
    cost = tl.zeros_like(v)
    if COSTS:
        cost = tl.load(costs + cols, mask=here, other=0.0).to(tl.float64)
        v = tl.where(cost < INF, v - mu * cost, -INF)
    if CLEAN:
        kept = tl.load(clean + cols, mask=here, other=0.0).to(tl.float64)
        kept = tl.where(here, (kept * unit - max_unit) * inverse, -INF)
        moved = v >= kept
        v = tl.where(moved, v, kept)
        cost = tl.where(moved, cost, 0.0)
    return v, cost


@triton.jit
def _count(mask):
    return tl.sum(tl.where(mask, 1.0, 0.0).to(tl.float64), 0)


@triton.jit
def _entry(losses, costs, clean, cols, here, COSTS: tl.constexpr, CLEAN: tl.constexpr):
    """The entries by which a row with NaN or inf is answered (deciding_entry in row.h)."""
    entry = tl.load(losses + cols, mask=here, other=0.0).to(tl.float64)
    if COSTS:
        cost = tl.load(costs + cols, mask=here, other=0.0).to(tl.float64)
        entry = tl.where(entry != entry, entry, tl.where(cost == INF, -INF, entry))
        entry = tl.where(cost > -INF, entry, float("nan"))
    if CLEAN:
        kept = tl.load(clean + cols, mask=here, other=0.0).to(tl.float64)
        entry = tl.where((entry != entry) | (kept != kept), float("nan"), tl.maximum(entry, kept))
    return entry


@triton.jit
def _tilt(z, b, k, KIND: tl.constexpr):
    """The family's weight at b z, and slope = d log w / d(b z). Where z is not finite both are zero."""
    usable = z > -1e300
    z = tl.where(usable, z, 0.0)
    if KIND == 0:
        return tl.where(usable, tl.exp(b * z), 0.0), tl.where(usable, 1.0, 0.0).to(tl.float64)
    else:
        ky = k * (b * z)
        active = usable & (1.0 + ky > 0.0)
        ky = tl.where(active, ky, 0.0)
        return tl.where(active, tl.exp(_log1p(ky) / k), 0.0), tl.where(active, 1.0 / (1.0 + ky), 0.0)


@triton.jit
def _top(losses, costs, clean, n, unit, max_unit, inverse, mu, CLEAN: tl.constexpr, BLOCK: tl.constexpr):
    """(v, cost) of the sample with the largest v = loss - mu cost."""
    best = mu - INF
    paid = mu * 0.0
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        v, cost = _sample(losses, costs, clean, cols, cols < n, unit, max_unit, inverse, mu, True, CLEAN)
        here = tl.max(v, 0)
        # of samples that tie, the one with the smallest cost: any will do, but always the same
        cheapest = tl.min(tl.where(v == here, cost, INF), 0)
        paid = tl.where(here > best, cheapest, paid)
        best = tl.maximum(best, here)
    return best, paid


@triton.jit
def _sums(
    losses,
    costs,
    clean,
    n,
    unit,
    max_unit,
    inverse,
    b,
    mu,
    top_v,
    top_cost,
    k,
    KIND: tl.constexpr,
    COSTS: tl.constexpr,
    CLEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of w, wz, wzg, wzzg, wd, wdg, wzdg, wddg; the least z with weight, its d; the largest z without weight."""
    w_ = tl.zeros((BLOCK,), tl.float64)
    wz = tl.zeros((BLOCK,), tl.float64)
    wzg = tl.zeros((BLOCK,), tl.float64)
    wzzg = tl.zeros((BLOCK,), tl.float64)
    wd = tl.zeros((BLOCK,), tl.float64)
    wdg = tl.zeros((BLOCK,), tl.float64)
    wzdg = tl.zeros((BLOCK,), tl.float64)
    wddg = tl.zeros((BLOCK,), tl.float64)
    z_min = tl.zeros((BLOCK,), tl.float64)
    d_min = tl.zeros((BLOCK,), tl.float64)
    z_out = tl.zeros((BLOCK,), tl.float64) - INF
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        v, cost = _sample(losses, costs, clean, cols, cols < n, unit, max_unit, inverse, mu, COSTS, CLEAN)
        w, g = _tilt(v - top_v, b, k, KIND)
        z_out = tl.where(w > 0.0, z_out, tl.maximum(z_out, v - top_v))
        z = tl.where(w > 0.0, v - top_v, 0.0)
        w_ += w
        wz += w * z
        wzg += w * z * g
        wzzg += w * z * (z * g)
        d = tl.where(w > 0.0, cost - top_cost, 0.0)
        if COSTS:
            wd += w * d
            wdg += w * (d * g)
            wzdg += w * z * (d * g)
            wddg += w * d * (d * g)
        lower = z < z_min
        z_min = tl.where(lower, z, z_min)
        d_min = tl.where(lower, d, d_min)
    least = tl.min(z_min, 0)
    return (
        tl.sum(w_, 0),
        tl.sum(wz, 0),
        tl.sum(wzg, 0),
        tl.sum(wzzg, 0),
        tl.sum(wd, 0),
        tl.sum(wdg, 0),
        tl.sum(wzdg, 0),
        tl.sum(wddg, 0),
        least,
        tl.min(tl.where(z_min == least, d_min, INF), 0),
        tl.max(z_out, 0),
    )


# ---- dual.h --------------------------------------------------------------------------------------------------------


@triton.jit
def _pace(k):
    return tl.where(k < 0.0, 2.0 * tl.maximum(k * k, 1.0), 2.0 * (1.0 + k))


@triton.jit
def _straight(r, pace):
    scaled = pace * r
    return tl.where(scaled > 600.0, 0.5 * scaled, 0.5 * tl.log(_expm1(tl.minimum(scaled, 600.0))))


@triton.jit
def _towards_truncation(x, t, b, mu, y, y_next, z_min, d_min, k):
    u = 1.0 + k * b * z_min
    factor = 1.0 + b * (z_min * t - mu * d_min * (y_next - y)) / u
    z_next = z_min - tl.where(d_min == 0.0, 0.0, (tl.exp(y_next) - mu) * d_min)
    u_next = tl.where(factor > 0.0, u * tl.exp(k * tl.log(tl.maximum(factor, 1e-300))), 0.0)
    mapped = tl.log(tl.maximum((u_next - 1.0) / (k * z_next), 1e-300))
    cusp = (k > 1.0) & (u > 0.0) & (u < 1.0) & (u_next > 0.0) & (u_next < 1.0) & (z_next < 0.0)
    return tl.where(cusp, mapped, x + t)


@triton.jit
def _across_truncation(without, x, r, slope, target, count, s0, z_out, k):
    at = -tl.log(tl.maximum(-k * z_out, 1e-300))
    weight = (r + slope * (at - x) - target) * count * k * s0
    back = at + _log1p(-tl.exp(k * tl.log(_clamp(weight, 1e-300, 0.9999999999))))
    crosses = (k > 1.0) & (z_out > -INF) & (without <= at) & (weight < 1.0)
    return tl.where(crosses, tl.where(weight > 0.0, back, at), without)


@triton.jit
def _tangents_meet(left, right):
    return (right[1] - left[1] + left[2] * left[0] - right[2] * right[0]) / (left[2] - right[2])


@triton.jit
def _kink_resolved(left, right, value, tolerance, CLEAN: tl.constexpr):
    least = left[1] + left[2] * (_tangents_meet(left, right) - left[0])
    known = (left[0] > 0.0) & (right[0] > 0.0)
    return CLEAN & known & (value - least <= tl.maximum(1e-3 * tolerance, 1e-15))


@triton.jit
def _dual(
    losses_ptr,
    costs_ptr,
    clean_ptr,
    value_ptr,
    lam_ptr,
    nu_ptr,
    weights_ptr,
    status_ptr,
    passes_ptr,
    n,
    k: tl.float64,
    radius: tl.float64,
    kappa: tl.float64,
    max_dual: tl.float64,
    tolerance: tl.float64,
    KIND: tl.constexpr,
    COSTS: tl.constexpr,
    CLEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    losses = losses_ptr + row * n
    costs = costs_ptr + row * n
    clean = clean_ptr + row * n
    weights = weights_ptr + row * n
    zero = tl.full((), 0.0, tl.float64)
    k += zero
    radius += zero
    kappa += zero
    max_dual += zero
    count = zero + n

    # The first look (struct Scan): extremes, moments, and entries that are not finite.
    origin = tl.load(losses).to(tl.float64)
    origin = tl.where(tl.abs(origin) < INF, origin, 0.0)
    max_loss = zero - INF
    min_loss = zero + INF
    usable = zero
    ties = zero
    total = zero
    squares = zero
    cubes = zero
    cost_sum = zero
    nans = zero
    pluses = zero
    minuses = zero
    odd = zero
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        here = cols < n
        inside = here
        loss = tl.load(losses + cols, mask=here, other=0.0).to(tl.float64)
        low = loss
        bad = (loss != loss) | (tl.abs(loss) == INF)
        if COSTS:
            cost = tl.load(costs + cols, mask=here, other=0.0).to(tl.float64)
            barred = (cost == INF) & (loss == loss)
            bad = (barred == 0) & (bad | (cost != cost) | (tl.abs(cost) == INF))
            cost_sum += tl.sum(tl.where(here & (barred == 0), cost, 0.0), 0)
            if CLEAN:
                kept = tl.load(clean + cols, mask=here, other=0.0).to(tl.float64)
                loss = tl.where(barred, kept, loss)
                bad = bad | (kept != kept) | (tl.abs(kept) == INF)
                low = tl.minimum(loss, kept)
                loss = tl.maximum(loss, kept)
            else:
                here = here & (barred == 0)
        entry = _entry(losses, costs, clean, cols, inside, COSTS, CLEAN)
        odd += _count(inside & bad)
        nans += _count(inside & (entry != entry))
        pluses += _count(inside & (entry == INF))
        minuses += _count(inside & (entry == -INF))
        top = tl.max(tl.where(here, loss, -INF), 0)
        at_top = _count(here & (loss == top))
        ties = tl.where(top > max_loss, at_top, tl.where(top == max_loss, ties + at_top, ties))
        max_loss = tl.maximum(max_loss, top)
        min_loss = tl.minimum(min_loss, tl.min(tl.where(here, low, INF), 0))
        usable += _count(here)
        centred = tl.where(here, loss - origin, 0.0)
        total += tl.sum(centred, 0)
        squares += tl.sum(centred * centred, 0)
        cubes += tl.sum(centred * centred * centred, 0)
    finite = (odd == 0.0) & (usable > 0.0)

    # Scaling and moments (class RowSolver)
    unit = tl.where(max_loss - min_loss < INF, 1.0, 0.5).to(tl.float64)
    max_unit = max_loss * unit
    spread = max_unit - min_loss * unit
    equal = spread < TINY
    inverse = tl.where(equal, 1.0, 1.0 / spread)
    spread = tl.where(equal, 1.0, spread)
    mean_loss = total / usable
    scaled_mean = ((mean_loss + origin) * unit - max_unit) * inverse
    variance = tl.maximum(squares / usable - mean_loss * mean_loss, 0.0)
    deviation = tl.sqrt(variance) * unit * inverse
    least_std = zero + 1e-3 if COSTS else 0.5 / tl.sqrt(count)
    std = _clamp(deviation, least_std, 0.5)
    kappa_s = kappa * unit * inverse
    # DualSolver's constructor
    target = _to_log_form(radius, k, KIND)
    pace = _pace(k)
    largest = _largest_log_form(count, ties, k)
    binds = (target < largest - 1e-14 * tl.minimum(largest, 1e300)) | COSTS
    y_min = tl.log(tl.maximum(kappa_s, NO_DUAL)) if COSTS else tl.log(kappa_s)
    y_max = tl.maximum(tl.log(max_dual * unit * inverse), y_min) if COSTS else zero + INF
    mean_cost = zero + INF if CLEAN else cost_sum / usable
    budget0 = _to_log_form(radius - tl.minimum(mean_cost, 0.7 * radius), k, KIND) if COSTS else target
    start_b = tl.sqrt(2.0 * budget0) / std
    if KIND == 2:
        start_b = tl.exp(_straight(budget0, pace)) * tl.sqrt(2.0 / pace) / std
    if KIND == 1:
        start_b = -_expm1(-k * start_b) / k
    start_b = tl.where(binds, start_b, INF)
    start_b = tl.where(kappa_s > 0.0, tl.minimum(start_b, 1.0 / kappa_s), start_b)
    start_mu = std / tl.sqrt(2.0 * budget0) if KIND == 1 else 1.0 / start_b
    y = _clamp(tl.log(start_mu), tl.maximum(y_min, -230.0), tl.minimum(y_max, 230.0))
    x = -y if KIND == 0 else tl.log(_clamp(start_b, 1e-100, 1e100))
    b = tl.exp(x)
    mu = tl.exp(y)

    trivial = (binds == 0) & (kappa_s == 0.0)
    # RowSolver::nearly_uniform
    b_radius = tl.sqrt(2.0 * radius) / deviation
    b_small = tl.minimum(b_radius, 1.0 / kappa_s)
    near = (b_small < 3e-5) & (deviation < INF) & (radius > 0.0) & (equal == 0)
    third = cubes / count - mean_loss * (3.0 * variance + mean_loss * mean_loss)
    skew = third / variance / tl.sqrt(variance)
    asymmetry = tl.where(skew == skew, (1.0 - k) * skew / 6.0, 0.0)
    bent = b_small * deviation
    near_value = scaled_mean + 0.5 * bent * deviation + asymmetry * bent * bent * deviation
    near_value += tl.where(b_small == b_radius, (1.0 / b_small - kappa_s) * radius, 0.0)
    second = deviation * deviation + scaled_mean * scaled_mean
    near_mass = count * (1.0 + b_small * scaled_mean + 0.5 * (1.0 - k) * b_small * b_small * second)
    searching = ((radius == 0.0) | equal | near) == 0 if not COSTS else count > 0.0
    done = (finite == 0) | (searching == 0) | trivial
    converged = trivial
    s0 = zero + 1.0
    mean = zero
    divergence = zero
    top_v = zero
    top_loss = zero
    top_cost = zero
    step = zero
    off = zero
    off_x = zero - 1.0
    off_y = zero - 1.0
    rounds = 0
    passes = 1
    nested_rounds = 0
    nested = count < 0.0
    active = zero  # RADIUS, KAPPA or CEILING
    bracket = _new_bracket(zero)
    outer = _new_bracket(zero)
    left = (zero, zero, zero)
    right = (zero, zero, zero)

    while (done == 0) & (rounds < MAX_ROUNDS):
        if COSTS:
            top_v, top_cost = _top(losses, costs, clean, n, unit, max_unit, inverse, mu, CLEAN, BLOCK)
            passes += 1
        w, wz, wzg, wzzg, wd, wdg, wzdg, wddg, z_min, d_min, z_out = _sums(
            losses, costs, clean, n, unit, max_unit, inverse, b, mu, top_v, top_cost, k, KIND, COSTS, CLEAN, BLOCK
        )
        passes += 1
        rounds += 1

        # DualSolver::update
        s0 = w / count
        mean = wz / w
        divergence = _from_log_form(_log_form(b, s0, mean, k, KIND), k, KIND)
        mean_d = wd / w
        mean_zg = wzg / w
        mean_dg = wdg / w
        optimal = _optimal_mu(b, s0, mean, k, KIND)
        top_loss = top_v + mu * top_cost
        if not COSTS:
            mu = optimal
            y = tl.log(mu)
        zx = b * (wzzg / w - mean * mean_zg)
        zy = -b * mu * (wzdg / w - mean * mean_dg)
        dx = b * (wzdg / w - mean_d * mean_zg)
        dy = -b * mu * (wddg / w - mean_d * mean_dg)
        off = zero if KIND == 0 else tl.log(optimal / mu)
        off_x = zero - 1.0
        off_y = zero - 1.0
        if KIND == 1:
            off_x += k * b * mean_zg
            off_y -= k * b * mu * mean_dg
        if KIND == 2:
            off_x = (k * zx - 1.0 / b) / optimal
            off_y += k * (zy - mu * mean_d) / optimal
        budget = divergence + top_cost + mean_d
        budget_x = zx / optimal + dx
        budget_y = zy / optimal + dy

        moved = count < 0.0
        if COSTS:
            switch = (nested == 0) & (CLEAN | (k > 1.0) | (rounds > 20) | ((off_y < -0.2) == 0))
            nested = nested | switch
            outside = (y < y_min) | (y > y_max)
            moved = switch & outside
        x_next = x
        y_next = y
        if moved:
            y_next = _clamp(y, y_min, y_max)
        elif nested:
            # DualSolver::update_nested
            slope = budget_y - budget_x * off_y / off_x
            spent = budget - budget_x * off / off_x
            excess = spent - radius
            if nested_rounds == 0:
                bracket = _new_bracket(zero)
            nested_rounds += 1
            bracket = _tighten(bracket, x, -off)
            met = (tl.abs(off) <= tolerance) | ((KIND != 0) & _exhausted(bracket))
            at_floor = met & (excess < 0.0) & (y <= y_min)
            at_ceiling = met & (excess > 0.0) & (y >= y_max)
            balanced = met & (tl.abs(excess) <= tl.maximum(tolerance * radius, 1e-15))
            active = tl.where(balanced, RADIUS, tl.where(at_floor, KAPPA, tl.where(at_ceiling, CEILING, RADIUS))) + zero
            converged = balanced | at_floor | at_ceiling
            if (converged == 0) & (met | ((nested_rounds < 40) & (tl.abs(off) <= 0.3))):
                ratio = tl.abs(tl.log(tl.maximum(spent, 1e-300) / radius))
                sure = (CLEAN == 0) & (spent > 0.0) & (tl.abs(off) <= 0.1) & (off * off <= 0.1 * ratio)
                if met | sure:
                    outer = _tighten(outer, y, tl.sqrt(radius) - tl.sqrt(tl.maximum(spent, 0.0)))
                if met:
                    here = top_v + _objective(mu, b, radius, s0, s0 * (1.0 + k * b * mean), k, KIND)
                    if excess > 0.0:
                        left = (mu, here, radius - budget)
                    else:
                        right = (mu, here, radius - budget)
                    resolved = _exhausted(outer) | _kink_resolved(left, right, here, tolerance, CLEAN)
                    converged = _closed(outer) & resolved
                dy = tl.where(excess > 0.0, 3.0, -3.0).to(tl.float64)
                newton_dy = 2.0 * (tl.sqrt(tl.maximum(radius * spent, 0.0)) - spent) / slope
                dy = tl.where((slope < 0.0) & (spent > 0.0), _clamp(newton_dy, -3.0, 3.0), dy)
                newton = _clamp(y + dy, y_min, y_max)
                inside = (outer[0] < newton) & (newton < outer[1])
                meet = tl.log(tl.maximum(_tangents_meet(left, right), 0.0))
                known = (left[0] > 0.0) & (right[0] > 0.0)
                candidate = tl.where(inside | (known == 0), newton, meet)
                y_next, outer = _next(outer, candidate)
                y_next = _clamp(y_next, y_min, y_max)
            if nested_rounds == 40:
                outer = _new_bracket(zero)
            dy = y_next - y
            x_next = _towards_truncation(x, -(off + off_y * dy) / off_x, b, mu, y, y_next, z_min, d_min, k)
            if KIND != 0:
                if dy == 0.0:
                    x_next, bracket = _next(bracket, _clamp(x_next, x - 3.0, x + 3.0))
                else:
                    bracket = _new_bracket(zero)
                    x_next = _clamp(x_next, x - 6.0, x + 6.0)
        else:
            # DualSolver::update_joint
            dy_dx = -off_x / off_y
            y_curve = y - off / off_y
            spent = budget - budget_y * off / off_y
            r = _to_log_form(spent, k, KIND)
            slope = budget_x + budget_y * dy_dx
            if KIND == 1:
                slope = slope / (1.0 + k * (1.0 + k) * spent)
            settled = binds & (tl.abs(r - target) <= tl.maximum(tolerance * target, 4e-15))
            over = _straight(r, pace) - _straight(target, pace)
            excess = tl.where(binds & (r > 0.0), over, -INF)
            if KIND == 0:
                gain = 2.0 * (tl.sqrt(tl.maximum(target * r, 0.0)) - r) / slope
                newton = tl.log(tl.maximum(1.0 + gain, 1e-3))
            else:
                newton = excess * _expm1(-pace * r) / (0.5 * pace * slope)
            step = tl.where(binds, newton, INF)
            to_kappa = (y_min - y_curve) / dy_dx
            to_ceiling = (y_max - y_curve) / dy_dx
            by_kappa = (step <= to_kappa) == 0
            step = tl.where(by_kappa, to_kappa, step)
            settled = tl.where(by_kappa, tl.abs(y_min - y_curve) <= tolerance, settled)
            by_ceiling = step < to_ceiling
            step = tl.where(by_ceiling, to_ceiling, step)
            settled = tl.where(by_ceiling, tl.abs(y_max - y_curve) <= tolerance, settled)
            active = tl.where(by_ceiling, CEILING, tl.where(by_kappa, KAPPA, RADIUS)) + zero
            excess = tl.minimum(tl.maximum(excess, y_min - y_curve), y_max - y_curve)
            on_curve = tl.abs(off) <= tolerance
            at_floor = COSTS & (y <= y_min) & (r < target)
            at_ceiling = COSTS & (y >= y_max) & (r > target)
            if at_floor | at_ceiling:
                converged = on_curve
                active = tl.where(at_floor, KAPPA, CEILING) + zero
                x_next = x - _clamp(off / off_x, -3.0, 3.0)
            else:
                converged = settled & on_curve
                sure = (tl.abs(off) <= 0.1) & (off * off <= 0.1 * tl.abs(excess))
                if (converged == 0) & (on_curve | sure):
                    bracket = _tighten(bracket, x, excess)
                    converged = _exhausted(bracket)
                if (converged == 0) & (tl.abs(off) <= 0.3):
                    t = _clamp(step, -5.0, 5.0)
                    candidate = _towards_truncation(x, t, b, mu, y, y_curve + dy_dx * t, z_min, d_min, k)
                    if not COSTS:
                        crossed = _across_truncation(candidate, x, r, slope, target, count, s0, z_out, k)
                        candidate = tl.where(t < 0.0, crossed, candidate)
                    x_next, bracket = _next(bracket, candidate)
                y_next = _clamp(y_curve + dy_dx * (x_next - x), tl.maximum(y_min, y - 6.0), tl.minimum(y_max, y + 6.0))
        done = converged
        if (converged == 0) & (rounds < MAX_ROUNDS):  # DualSolver::go
            x = -y_next if KIND == 0 else x_next
            y = y_next
            b = tl.exp(x)
            mu = tl.exp(y)

    # DualSolver::answer
    power_mean = s0 * (1.0 + k * b * mean)
    m = mu
    by_kappa = active == KAPPA
    cusps = (KIND == 1) & (k > 1.0)
    if COSTS:
        m = tl.where(by_kappa, tl.maximum(kappa_s, NO_DUAL), m)
    else:
        if KIND == 1:
            closed_form = tl.exp(k / (1.0 + k) * (tl.log(power_mean) - _log1p(k * (1.0 + k) * radius))) / b
            m = tl.where(cusps, closed_form, m)
        corrected = m * tl.exp(_clamp(-off_x / off_y * step, -0.1, 0.1))
        m = tl.where(converged & (cusps == 0), corrected, m)
        m = tl.where(by_kappa, kappa_s, m)
    sharp = (cusps == 0) & converged & (tl.abs(off) <= 1e-6)
    penalised = tl.where(sharp, mean - m * divergence, _objective(m, b, zero, s0, power_mean, k, KIND))
    scaled_value = top_v + penalised + tl.where(m > kappa_s, (m - kappa_s) * radius, 0.0)
    saturated = by_kappa & (kappa_s == 0.0)
    status = tl.where(active == CEILING, MAX_DUAL, tl.where(saturated, SATURATED, CONVERGED))
    status = tl.where(converged, status, NOT_CONVERGED)
    m = tl.where(converged & saturated, 0.0, m)
    scaled_value = tl.where(converged & saturated, top_loss, scaled_value)
    mass = s0 * count

    # RowSolver: rows without a search
    uniform = searching == 0
    flat_value = tl.where(equal, 0.0, tl.where(near, near_value, scaled_mean))
    flat_m = tl.where(equal, kappa_s, tl.where(near, 1.0 / b_small, INF))
    scaled_value = tl.where(uniform, flat_value, tl.where(trivial, 0.0, scaled_value))
    m = tl.where(uniform, flat_m, tl.where(trivial, 0.0, m))
    flat_status = tl.where(equal & (kappa == 0.0), SATURATED, CONVERGED)
    status = tl.where(uniform, flat_status, tl.where(trivial, SATURATED, status))
    b = tl.where(uniform, tl.where(near, b_small, 0.0), b)
    on_top = trivial & (uniform == 0)
    flat_mass = tl.where(near, near_mass, count)
    mass = tl.where(uniform, flat_mass, tl.where(on_top, ties, mass))
    raw_mu = m * spread / unit
    top = (max_unit + top_v * spread) / unit
    potential = tl.where(raw_mu < INF, top / raw_mu, 0.0)
    if KIND == 0:
        nu = potential + tl.where(on_top, 0.0, tl.log(mass / count))
    else:
        flat = (raw_mu == INF) | (b == 0.0)
        nu = tl.where(flat, potential - 1.0 / k, (top - spread / (unit * k * b)) / raw_mu)
    nu = tl.where(raw_mu == 0.0, tl.where(top > 0.0, INF, tl.where(top < 0.0, -INF, 0.0)), nu)
    value = (max_unit + scaled_value * spread) / unit
    lam = tl.maximum(raw_mu - kappa, 0.0)

    # Rows that are not finite: NaN wins over +inf, and +inf over -inf
    odd_row = finite == 0
    worst = tl.where(nans > 0.0, float("nan"), tl.where(pluses > 0.0, INF, -INF))
    value = tl.where(odd_row, worst, value)
    nu = tl.where(odd_row, worst, nu)
    lam = tl.where(odd_row, tl.where(nans > 0.0, worst, 0.0), lam)
    status = tl.where(odd_row, NONFINITE, status)
    tl.store(value_ptr + row, value.to(value_ptr.dtype.element_ty))
    tl.store(lam_ptr + row, lam.to(value_ptr.dtype.element_ty))
    tl.store(nu_ptr + row, nu.to(value_ptr.dtype.element_ty))
    tl.store(status_ptr + row, status.to(tl.int32))
    tl.store(passes_ptr + row, tl.where(odd_row, 1, passes + 1).to(tl.int32))

    deciding = tl.where(pluses > 0.0, pluses, minuses)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        here = cols < n
        if odd_row:
            entry = _entry(losses, costs, clean, cols, here, COSTS, CLEAN)
            w = tl.where(nans > 0.0, float("nan"), tl.where(entry == worst, 1.0 / deciding, 0.0))
        else:
            v, _ = _sample(losses, costs, clean, cols, here, unit, max_unit, inverse, mu, COSTS, CLEAN)
            z = v - top_v
            w, _ = _tilt(z, b, k, KIND)
            w = tl.where(on_top, tl.where(z == 0.0, 1.0, 0.0), w) / mass
        tl.store(weights + cols, w.to(weights_ptr.dtype.element_ty), mask=here)


@triton.jit
def _dual_backward(
    grad_ptr,
    mu_ptr,
    weights_ptr,
    losses_ptr,
    costs_ptr,
    clean_ptr,
    to_losses_ptr,
    to_costs_ptr,
    to_clean_ptr,
    total,
    n,
    COSTS: tl.constexpr,
    CLEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < total
    grad = tl.load(grad_ptr + i // n, mask=here, other=0.0)
    weight = tl.load(weights_ptr + i, mask=here, other=0.0)
    to_losses = grad * weight
    if COSTS:
        mu = tl.load(mu_ptr + i // n, mask=here, other=0.0)
        moved = here
        if CLEAN:
            loss = tl.load(losses_ptr + i, mask=here, other=0.0).to(tl.float64)
            cost = tl.load(costs_ptr + i, mask=here, other=0.0).to(tl.float64)
            kept = tl.load(clean_ptr + i, mask=here, other=0.0).to(tl.float64)
            moved = loss - mu.to(tl.float64) * cost >= kept
            tl.store(to_clean_ptr + i, tl.where(moved, 0.0, to_losses), mask=here)
        to_costs = tl.where(moved & (weight != 0.0), -mu * to_losses, 0.0)
        tl.store(to_costs_ptr + i, to_costs, mask=here)
        to_losses = tl.where(moved, to_losses, 0.0)
    tl.store(to_losses_ptr + i, to_losses, mask=here)
