"""Samples, rules and oracles of armor::transport_*: test_transport.py runs them on the installed kernel and on
armor.reference, the tests of the other backends on theirs. The rules are those of the papers, written out once more in
plain torch, as people write them; the random numbers are Random123's Philox in Python integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from armor import ops, reference

inf = math.inf
CODES = {"linf": 0, "l2": 1, "l1": 2, "norm_power": 3, "soft_ball": 4, "binary": 5}
STARTS = {"linf": 0, "l2": 1, "l1": 2, "gaussian": 3, "clean": 4}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NOISE, ROUNDING, EXTRA = range(3)
PRICE_LIMIT = 1e30  # a larger mu counts as this one


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the operators compute."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------------
# rules and samples


@dataclass(frozen=True)
class Rule:
    """A set or cost with its step. `weight` is `top` of an l1 ball and `tau` of a soft one."""

    kind: str
    radius: float = 0.08
    step: float = 0.05
    weight: float = 1.0
    power: float = 1.0
    norm: float = 2
    variant: int = 0

    def __str__(self) -> str:
        detail = {
            "l1": f"-top{self.weight:g}",
            "norm_power": f"-p{self.norm:g}-power{self.power:g}-{['sign', 'normalised'][self.variant]}",
            "soft_ball": f"-{['after', 'before'][self.variant]}",
        }
        return self.kind + detail.get(self.kind, "")

    @property
    def code(self) -> int:
        return CODES[self.kind]

    @property
    def is_set(self) -> bool:
        return self.kind in ("linf", "l2", "l1")

    @property
    def is_cost(self) -> bool:
        return self.kind in ("norm_power", "soft_ball")

    @property
    def raw_norm(self) -> int:
        return 0 if self.norm == inf else int(self.norm)

    def on(self, n: int) -> Rule:
        """The same rule with radius, step and price that matter for displacements of 0.1 in each of n entries."""
        n = max(n, 1)
        size = {"l2": math.sqrt(n), "l1": n}.get(self.kind, 1.0)
        step, weight = self.step * size, self.weight
        if self.kind == "norm_power":
            # no round number, so that no gradient and price cancel exactly
            length = 0.1137 * {1: n, 2: math.sqrt(n), inf: 1.0}[self.norm]
            weight = (math.sqrt(n) if self.norm == 2 else 1.0) / (self.power * length ** (self.power - 1))
            step = self.step * (math.sqrt(n) if self.variant else 1.0)
        return replace(self, radius=self.radius * size, step=step, weight=weight)

    def public(self, radius: float | Tensor | None = None):
        """The set or cost as armor.ops takes it."""
        radius = self.radius if radius is None else radius
        return {
            "linf": lambda: ops.Linf(radius),
            "l2": lambda: ops.L2(radius),
            "l1": lambda: ops.L1(radius, top=self.weight),
            "norm_power": lambda: ops.NormPower(
                self.weight, p=self.norm, power=self.power, step="normalised" if self.variant else "sign"
            ),
            "soft_ball": lambda: ops.SoftBall(radius, tau=self.weight, order="before" if self.variant else "after"),
            "binary": ops.Binary,
        }[self.kind]()


# Powers of one, where the gradient of the cost does not depend on the distance, and above. A share of 1% of an l1 step
# is one entry of a small sample and 30 of a CIFAR image.
RULES = [
    Rule("linf"),
    Rule("l2"),
    Rule("l1", weight=0.0),
    Rule("l1", weight=0.01),
    Rule("l1", weight=0.3),
    *(
        Rule("norm_power", power=power, norm=p, variant=variant)
        for p, power in [(2, 1.0), (2, 2.0), (1, 1.0), (1, 2.0), (inf, 1.0), (inf, 1.5)]
        for variant in (0, 1)
    ),
    Rule("soft_ball", radius=0.04, weight=0.1),
    Rule("soft_ball", radius=0.04, weight=0.1, variant=1),
    Rule("binary", step=0.3),
]


@dataclass(frozen=True)
class Step:
    """The arguments of a raw `transport_step`."""

    rule: Rule
    x_adv: Tensor
    grad: Tensor
    x: Tensor
    mu: Tensor | None = None
    radii: Tensor | None = None
    active: Tensor | None = None
    seeds: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    lo: float = 0.0
    hi: float = 1.0
    targeted: bool = False
    final: bool = False
    feed_dtype: torch.dtype | None = None

    def raw(self):
        tensors = (self.x_adv, self.grad, self.x, self.mu, self.radii, self.active, self.seeds, self.mean, self.std)
        rule = self.rule
        numbers = (rule.code, rule.radius, rule.step, rule.weight, rule.power, rule.raw_norm, rule.variant)
        return (*tensors, *numbers, self.lo, self.hi, self.targeted, self.final, self.feed_dtype)

    def cost(self, x_adv: Tensor):
        """The arguments of `transport_cost` at another x_adv."""
        rule = self.rule
        numbers = (rule.code, rule.radius, rule.weight, rule.power, rule.raw_norm, self.lo, self.hi)
        return (x_adv, self.x, self.radii, *numbers)

    def sample(self, i: int) -> Step:
        """Sample i alone."""
        picked = {
            name: t[i : i + 1]
            for name in ("x_adv", "grad", "x", "mu", "radii", "active", "seeds")
            if (t := getattr(self, name)) is not None and t.dim()
        }
        return replace(self, **picked)

    def wide(self) -> Step:
        """The same numbers, exactly, in float64."""
        wide = {name: t.double() for name, t in vars(self).items() if isinstance(t, Tensor) and t.is_floating_point()}
        return replace(self, **wide)


class Moved(NamedTuple):
    """What a raw `transport_step` returns, in its order."""

    x_adv: Tensor
    status: Tensor
    costs: Tensor
    feed: Tensor


class Start(NamedTuple):
    """What a raw `transport_init` returns, in its order."""

    x_adv: Tensor
    status: Tensor
    feed: Tensor


def random_step(rule, shape, dtype=torch.float64, *, seed=0, per_sample=False, grad_dtype=None, **changes) -> Step:
    """A rule at its size for samples of that shape: x at the bounds of the box in a tenth of the entries, x_adv up to
    0.15 away and so partly outside the balls; some gradients 0. `per_sample` radii (and prices) are around the rule's.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*size, generator=generator, dtype=torch.float64)

    n = math.prod(shape[1:])
    rule = rule.on(n)
    if rule.kind == "binary":
        x = (uniform(shape) < 0.3).double()
        x_adv = uniform(shape)
    else:
        x = uniform(shape, low=-0.05, high=1.05).clamp(0, 1)
        x_adv = x + uniform(shape, low=-0.15, high=0.15)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad[uniform(shape) < 0.05] = 0
    radii = mu = None
    if per_sample:
        radii = (rule.radius * uniform(shape[0], low=0.3, high=1.5)).to(real(dtype))
        mu = uniform(shape[0], low=0.2, high=1.8).to(real(dtype)) if rule.is_cost else None
    tensors = {"x_adv": x_adv.to(dtype).clamp(0, 1), "grad": grad.to(grad_dtype or dtype), "x": x.to(dtype)}
    return replace(Step(rule=rule, radii=radii, mu=mu, **tensors), **changes)


# A grid of 4 dimensions or 5, or samples of one row; every layout is one that images or gradients really have.
def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=last)
    if layout == "sliced":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.contiguous()


# ----------------------------------------------------------------------------------------------------
# oracles


def truth(step: Step) -> Moved:
    """The exact result, not yet rounded to the dtype of x."""
    return Moved(*reference.transport_step(*step.wide().raw()))


def naive_step(step: Step) -> Tensor:
    """x_next of a step without masks and feed by the expressions of the papers, all in the dtype of x; not rounded to
    bits where the rule is `binary`."""
    rule, dtype, shape = step.rule, step.x.dtype, step.x.shape
    x_adv, grad, x = (t.to(dtype).flatten(1) for t in (step.x_adv, step.grad, step.x))
    radius = rule.radius if step.radii is None else step.radii.to(dtype)[:, None]
    mu = 1.0 if step.mu is None else step.mu.clamp(max=PRICE_LIMIT).to(dtype).view(-1, 1)
    if x.numel() == 0:
        return step.x
    if rule.kind == "linf":
        moved = torch.min(torch.max(x_adv + rule.step * grad.sign(), x - radius), x + radius)
    elif rule.kind == "l2":
        d = x_adv + rule.step * _unit(grad) - x
        moved = x + d * (radius / d.norm(dim=1, keepdim=True)).clamp(max=1)
    elif rule.kind == "l1":
        moved = x + project_by_sorting(l1_ascent(x_adv, grad, rule, step.lo, step.hi) - x, x, radius, step.lo, step.hi)
    elif rule.kind == "norm_power":
        v = grad - mu * cost_gradient(rule, x_adv, x)
        moved = x_adv + rule.step * (_unit(v) if rule.variant else v.sign())
    elif rule.kind == "soft_ball":
        d = x_adv - x
        ascended = d + rule.step * grad.sign()
        penalised = d if rule.variant else ascended
        beyond = (penalised - penalised.sign() * radius) * (penalised.abs() > radius)
        moved = x + ascended - mu * rule.step / rule.weight * beyond
    else:
        moved = x_adv + rule.step * grad.sign()
    return moved.clamp(step.lo, step.hi).view(shape)


def l1_ascent(x_adv: Tensor, grad: Tensor, rule: Rule, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """Tramer and Boneh's step: equal shares for the largest gradients that can still move."""
    size = grad.abs() * torch.where(grad > 0, x_adv < hi, x_adv > lo)
    count = max(1, int(rule.weight * grad.shape[1]))
    chosen = ((size >= size.sort(descending=True).values[:, count - 1 : count]) & (size > 0)).to(grad.dtype)
    return x_adv + rule.step / chosen.sum(1, keepdim=True).clamp(min=1) * chosen * grad.sign()


def project_by_sorting(d: Tensor, x: Tensor, radius, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """Duchi et al.'s projection of the displacements d [B, n] with the box: |d_j| leaves its cap at one threshold and
    reaches 0 at another, the l1 norm is linear between these thresholds, and they are sorted."""
    size, cap = d.abs(), torch.where(d > 0, hi - x, x - lo)
    zeros = torch.zeros_like(size[:, :1])
    kinks, order = torch.cat([zeros, (size - cap).clamp(min=0), size], 1).sort(1)
    change = torch.cat([zeros, torch.ones_like(size), -torch.ones_like(size)], 1).gather(1, order)
    slope = change.cumsum(1)
    fall = torch.cat([zeros, (slope[:, :-1] * kinks.diff(dim=1)).cumsum(1)], 1)
    norms = size.minimum(cap).sum(1, keepdim=True) - fall
    last = ((norms > radius).sum(1, keepdim=True) - 1).clamp(min=0)
    theta = kinks.gather(1, last) + (norms.gather(1, last) - radius) / slope.gather(1, last).clamp(min=1)
    theta = torch.where(norms[:, :1] > radius, theta, 0)
    return d.sign() * (size - theta).clamp(min=0).minimum(cap)


def cost(rule: Rule, d: Tensor, radius) -> Tensor:
    """c of the displacements d [B, n], as section 5 defines it."""
    if rule.kind == "soft_ball":
        return (d.abs() - radius).clamp(min=0).square().sum(1) / (2 * rule.weight)
    return rule.weight * torch.linalg.vector_norm(d, ord=rule.norm, dim=1) ** rule.power


def cost_gradient(rule: Rule, x_adv: Tensor, x: Tensor, radius=0.0) -> Tensor:
    """dc/dx_adv by autograd."""
    leaf = x_adv.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = cost(rule, leaf - x, radius).sum()
    return torch.autograd.grad(total, leaf)[0]


def _unit(v: Tensor) -> Tensor:
    return torch.where(v == 0, 0, v / v.norm(dim=1, keepdim=True))


def assert_accurate(step: Step, x_next: Tensor) -> None:
    """x_next is within rounding of the exact result, and not further from it than the naive expressions are."""
    exact, dtype, n = truth(step).x_adv, step.x.dtype, math.prod(step.x.shape[1:])
    assert x_next.dtype == dtype
    assert x_next.shape == exact.shape
    if exact.numel() == 0:
        return
    eps = torch.finfo(real(dtype)).eps
    plain = naive_step(step)
    assert plain.dtype == dtype
    error, naive = ((t.double() - exact).abs().amax().item() for t in (x_next, plain))
    rounding = 0.5 * torch.finfo(dtype).eps if dtype != real(dtype) else 0.0
    tolerance = 4 * eps + rounding
    if step.rule.kind == "l1":  # a sum of n terms is known to 1e-6 or 1e-14 of the radius, and so is the threshold
        largest = step.rule.radius if step.radii is None else step.radii.amax().item()
        slack = (1e-6 if eps > 1e-10 else 1e-14) * largest / max(1, math.floor(step.rule.weight * n))
        tolerance, naive = tolerance + slack, naive + slack
    assert error <= tolerance
    assert error <= naive + 2 * eps or math.isnan(naive)


# ----------------------------------------------------------------------------------------------------
# random numbers


def philox(counter, key) -> tuple[int, ...]:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            right >> 32 ^ c[1] ^ k0,
            right & 0xFFFFFFFF,
            left >> 32 ^ c[3] ^ k1,
            left & 0xFFFFFFFF,
        ]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return tuple(c)


@lru_cache(maxsize=64)
def words(seed: int, n: int, stream: int) -> np.ndarray:
    """The words of entries 0 to n - 1 of the sample with that seed (a signed 64-bit integer)."""
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    blocks = [philox((block & 0xFFFFFFFF, block >> 32, stream, 0), key) for block in range((n + 3) // 4)]
    return np.array(blocks, dtype=np.uint32).reshape(-1)[:n]


def uniforms(seed: int, n: int, stream: int) -> np.ndarray:
    """The middles of 2^23 intervals of (0, 1)."""
    return ((words(seed, n, stream) >> 9) + 0.5) * 2.0**-23


def noise(start: str, seed: int, n: int) -> np.ndarray:
    """What a start adds at radius (or sigma) 1, [n]. Barthe, Guedon, Mendelson and Naor (2005) for l2 and l1."""
    u = uniforms(seed, n, NOISE)
    if start == "linf":
        return 2 * u - 1
    extra = -math.log(uniforms(seed, 1, EXTRA)[0])
    if start == "l1":
        sign = np.where(words(seed, n, NOISE) & 1, -1.0, 1.0)
        return sign * -np.log(u) / (-np.log(u).sum() + extra)
    pairs = uniforms(seed, n + n % 2, NOISE).reshape(-1, 2)
    length, angle = np.sqrt(-2 * np.log(pairs[:, 0])), 2 * np.pi * pairs[:, 1]
    z = np.stack([length * np.cos(angle), length * np.sin(angle)], 1).reshape(-1)[:n]
    return z if start == "gaussian" else z / math.sqrt((z**2).sum() + 2 * extra)
