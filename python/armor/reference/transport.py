"""Float64 oracle of `armor::transport_*` in plain torch: section 5 of docs/math.md, with the random numbers and the l1
projection computed in the plainest way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from armor.library import dense_like, forgiven, real

LINF, L2, L1, NORM_POWER, SOFT_BALL, BINARY = range(6)
GAUSSIAN, CLEAN = 3, 4  # starts; 0 to 2 are uniform in the linf, l2 and l1 ball
NOISE, ROUNDING, EXTRA = range(3)  # streams of random numbers
BAD_GRADIENT, OUTSIDE = 1, 2  # bits of the status


def transport_init(
    x: Tensor,
    seeds: Tensor | None,
    radii: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    start: int,
    radius: float,
    lo: float,
    hi: float,
    feed_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x plus noise, clamped to the box; which samples leave it (status); and what the model is fed."""
    clean, r = _flat(x), _per_sample(radius if radii is None else radii, x)
    n = clean.shape[1]
    if start == CLEAN or x.numel() == 0:
        moved = clean
    else:
        assert seeds is not None
        words = random_words(seeds, n, NOISE)
        extra = -uniform(random_words(seeds, 1, EXTRA)).log()
        if start == LINF:
            noise = (2.0 * uniform(words) - 1.0) * r
        elif start == L1:
            size = -uniform(words).log()
            noise = r * torch.where(words % 2 == 1, -size, size) / (size.sum(1, keepdim=True) + extra)
        else:
            z = gaussian(seeds, n)
            noise = r * z if start == GAUSSIAN else r * z / (z.square().sum(1, keepdim=True) + 2.0 * extra).sqrt()
        moved = (clean + noise).clamp(lo, hi)
    x_adv = dense_like(x).copy_(moved.view(x.shape))
    return x_adv, _outside(x, lo, hi), _feed(x_adv, mean, std, feed_dtype)


def transport_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    mu: Tensor | None,
    radii: Tensor | None,
    active: Tensor | None,
    seeds: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    kind: int,
    radius: float,
    step_size: float,
    weight: float,
    power: float,
    norm: int,
    variant: int,
    lo: float,
    hi: float,
    targeted: bool,
    final: bool,
    feed_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One ascent-and-project step of every sample: the next x_adv, status, costs (final, of a cost) and feed."""
    g, here, clean = _flat(grad), _flat(x_adv), _flat(x)
    if std is not None:
        g = _flat(grad.double() / std.double().view(-1, *(1,) * (x.dim() - 2)))
    toll = _per_sample(1.0 if mu is None else mu, x)
    bad = ~g.isfinite().all(1, keepdim=True) | toll.isnan()
    g = torch.where(bad, 0.0, -g if targeted else g)
    toll = toll.nan_to_num(0.0).clamp(max=1e30)
    r = _per_sample(radius if radii is None else radii, x)

    if kind == LINF:
        moved = torch.minimum(torch.maximum(here + step_size * g.sign(), clean - r), clean + r)
    elif kind == L2:
        d = here + step_size * _unit(g) - clean
        length = torch.linalg.vector_norm(d, dim=1, keepdim=True)
        moved = clean + torch.where(length > r, d * (r / length), d)
    elif kind == L1:
        moved = project_l1(_l1_ascent(here, g, step_size, weight, lo, hi), clean, r, lo, hi)
    elif kind == NORM_POWER:
        v = g - toll * _norm_power_gradient(here - clean, weight, power, norm)
        moved = here + step_size * (v.sign() if variant == 0 else _unit(v))
    elif kind == SOFT_BALL:
        d = here - clean
        ascended = d + step_size * g.sign()
        moved = clean + ascended - step_size * toll / weight * _beyond(ascended if variant == 0 else d, r)
    else:
        moved = here + step_size * g.sign()
    moved = moved.clamp(lo, hi)

    stays = bad if active is None else bad | ~active[:, None]
    moved = torch.where(stays, here, moved)
    if kind == BINARY and final:
        u = 0.5 if seeds is None else uniform(random_words(seeds, moved.shape[1], ROUNDING))
        moved = torch.maximum(clean, (moved > u).double())
    x_next = dense_like(x, x_adv, grad).copy_(moved.view(x.shape))
    if active is not None:
        bad = bad & active[:, None]
    status = BAD_GRADIENT * bad.squeeze(1) + _outside(x, lo, hi)
    costs = transport_cost(x_next, x, radii, kind, radius, weight, power, norm, lo, hi)
    if not (final and kind in (NORM_POWER, SOFT_BALL)):
        costs = costs.new_empty(0)
    return x_next, status.int(), costs, _feed(x_next, mean, std, feed_dtype)


def transport_cost(
    x_adv: Tensor,
    x: Tensor,
    radii: Tensor | None,
    kind: int,
    radius: float,
    weight: float,
    power: float,
    norm: int,
    lo: float,
    hi: float,
) -> Tensor:
    """c(x_adv, x) of every sample, [B]; sets cost 0 inside and inf outside, rounding to the dtype of x forgiven."""
    moved, clean = _flat(x_adv), _flat(x)
    d, r = moved - clean, _per_sample(radius if radii is None else radii, x).squeeze(1)
    n = d.shape[1]
    if kind == NORM_POWER:
        costs = weight * _norm(d, norm).pow(power)
    elif kind == SOFT_BALL:
        costs = (d.abs() - r[:, None]).clamp_min(0.0).square().sum(1) / (2.0 * weight)
    else:
        outside = (moved < lo) | (moved > hi)
        if kind == BINARY:
            outside = ((moved != 0) & (moved != 1)) | (moved < clean)
            far = torch.zeros_like(r, dtype=torch.bool)
        else:
            largest = torch.maximum(moved.abs(), clean.abs()).amax(1) if n else r.new_zeros(r.shape)
            slack = forgiven(x.dtype) * largest * {LINF: 1.0, L2: math.sqrt(n), L1: n}[kind]
            far = _norm(d, {LINF: 0, L2: 2, L1: 1}[kind]) > r + slack
        costs = torch.where(far | outside.any(1), math.inf, 0.0).double()
        costs = costs.masked_fill(d.isnan().any(1), math.nan)
    return costs.to(real(x))


def project_l1(y: Tensor, x: Tensor, r: Tensor, lo: float, hi: float) -> Tensor:
    """The point of {||z - x||_1 <= r} and the box that is closest to y, for rows [B, n]: d is shrunk by a threshold
    theta and cut at the box, and theta is found between two neighbours of the kinks of the l1 norm."""
    if y.numel() == 0:
        return y
    d = y - x
    cap = torch.where(d > 0, hi - x, x - lo)

    def shrunk(theta: Tensor) -> Tensor:
        return torch.minimum((d.abs() - theta).clamp_min(0.0), cap)

    low, high = torch.zeros_like(r), d.abs().amax(1, keepdim=True)
    for _ in range(200):
        middle = 0.5 * (low + high)
        above = shrunk(middle).sum(1, keepdim=True) > r
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    theta = torch.where(shrunk(torch.zeros_like(r)).sum(1, keepdim=True) <= r, 0.0, high)
    return x + d.sign() * shrunk(theta)


def random_words(seeds: Tensor, n: int, stream: int) -> Tensor:
    """32-bit words [B, n] of Philox4x32-10 (Salmon et al., 2011) keyed by the seeds, as int64."""
    low = 0xFFFFFFFF
    j = torch.arange(n, device=seeds.device)
    counter = (j >> 2).expand(len(seeds), n)
    c = [counter & low, counter >> 32, torch.full_like(counter, stream), torch.zeros_like(counter)]
    k0, k1 = (seeds & low)[:, None], (seeds >> 32 & low)[:, None]
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(0xD2511F53, c[0]), _multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack(c).gather(0, (j & 3).expand(1, len(seeds), n))[0]


def uniform(words: Tensor) -> Tensor:
    """The words' upper 23 bits as the middle of one of 2^23 intervals of (0, 1)."""
    return ((words >> 9).double() + 0.5) * 2.0**-23


def gaussian(seeds: Tensor, n: int) -> Tensor:
    """[B, n] by Box and Muller's pairs: words 2i and 2i + 1 make the numbers 2i and 2i + 1."""
    u = uniform(random_words(seeds, n + n % 2, NOISE)).unflatten(1, (-1, 2))
    length, angle = (-2.0 * u[..., 0].log()).sqrt(), 2.0 * math.pi * u[..., 1]
    return torch.stack([length * angle.cos(), length * angle.sin()], 2).flatten(1)[:, :n]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of 32-bit numbers, in int64 without overflow."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    low = (upper & 0xFFFF) * 65536 + lower
    return (upper >> 16) + (low >> 32), low & 0xFFFFFFFF


def _l1_ascent(here: Tensor, g: Tensor, step_size: float, top: float, lo: float, hi: float) -> Tensor:
    """SLIDE (Tramer and Boneh, 2019): the largest gradients that can still move share the step."""
    n = g.shape[1]
    if g.numel() == 0:
        return here
    size = torch.where(((g > 0) & (here < hi)) | ((g < 0) & (here > lo)), g.abs(), 0.0)
    least = size.topk(max(1, math.floor(top * n)), dim=1).values[:, -1:]
    chosen = (size >= least) & (size > 0)
    share = step_size / chosen.sum(1, keepdim=True).clamp(min=1).double()
    return torch.where(chosen, here + share * g.sign(), here)


def _norm(d: Tensor, norm: int) -> Tensor:
    if d.shape[1] == 0:
        return d.new_zeros(d.shape[0])
    return torch.linalg.vector_norm(d, ord=math.inf if norm == 0 else norm, dim=1)


def _norm_power_gradient(d: Tensor, weight: float, power: float, norm: int) -> Tensor:
    length = _norm(d, norm)[:, None]
    if norm == 2:
        direction = d / length
    elif norm == 1:
        direction = d.sign()
    else:
        peaks = d.abs() == length
        direction = d.sign() * peaks / peaks.sum(1, keepdim=True)
    return torch.where(length > 0, weight * power * length.pow(power - 1.0) * direction, 0.0)


def _beyond(d: Tensor, r: Tensor) -> Tensor:
    return torch.where(d.abs() > r, d - r * d.sign(), 0.0)


def _unit(v: Tensor) -> Tensor:
    if v.numel() == 0:
        return v
    v = v / v.abs().amax(1, keepdim=True).clamp_min(1e-300)
    return v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-300)


def _flat(t: Tensor) -> Tensor:
    return t.double().reshape(t.shape[0], math.prod(t.shape[1:]))


def _per_sample(value: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=x.device).expand(x.shape[0])[:, None]


def _outside(x: Tensor, lo: float, hi: float) -> Tensor:
    flat = _flat(x)
    return OUTSIDE * (~((flat >= lo) & (flat <= hi))).any(1).int()


def _feed(x: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    if mean is None and dtype is None:
        return x.new_empty(0)
    fed = x.double()
    if mean is not None and std is not None:
        shape = (-1, *(1,) * (x.dim() - 2))
        fed = (fed - mean.double().view(shape)) / std.double().view(shape)
    return torch.empty_like(x, dtype=dtype or x.dtype).copy_(fed)
