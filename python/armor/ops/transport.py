"""Moving samples: `transport_init`, `transport_step` and `transport_cost` for hard balls, costs and binary features
(docs/transport.md), each one launch of `armor::transport_*`. `armor.attacks` loops over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, NamedTuple

import torch
from torch import Tensor

from armor.library import real
from armor.ops import check

LINF, L2_BALL, L1_BALL, NORM_POWER, SOFT_BALL, BINARY = range(6)
CLEAN, GAUSSIAN = 4, 3  # starts; the balls' kinds are the others
Normalize = tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]


class TransportStatus(IntFlag):
    """What is wrong with a sample; 0 if nothing is."""

    BAD_GRADIENT = 1  # NaN or inf in its gradient, or a NaN mu: the sample did not move
    OUTSIDE = 2  # x leaves the box or holds NaN


@dataclass(frozen=True)
class Linf:
    """The ball max |x_adv - x| <= radius; radius > 0, a number or one per sample, [B]. Steps follow sign(grad)."""

    radius: float | Tensor

    def __post_init__(self) -> None:
        _check_radius(self.radius)

    def rule(self) -> Rule:
        return Rule(LINF, self.radius)


@dataclass(frozen=True)
class L2:
    """The ball ||x_adv - x||_2 <= radius over all entries of a sample. Steps follow grad / ||grad||_2."""

    radius: float | Tensor

    def __post_init__(self) -> None:
        _check_radius(self.radius)

    def rule(self) -> Rule:
        return Rule(L2_BALL, self.radius)


@dataclass(frozen=True)
class L1:
    """The ball ||x_adv - x||_1 <= radius over all entries of a sample, projected on exactly and together with the box.

    top: share in [0, 1] of the entries, those of the largest gradients that the box still lets move, which share a
    step: SLIDE (Tramer and Boneh, 2019). 0 moves the largest alone, which is the steepest ascent. Ties all move.
    """

    radius: float | Tensor
    top: float = 0.01

    def __post_init__(self) -> None:
        _check_radius(self.radius)
        check.number("top", self.top, least=0.0, most=1.0)

    def rule(self) -> Rule:
        return Rule(L1_BALL, self.radius, weight=float(self.top))


@dataclass(frozen=True)
class NormPower:
    """The cost c = weight * ||x_adv - x||_p ** power; no ball, only the box.

    weight > 0; p: 1, 2 or math.inf; power >= 1. A step ascends loss - mu * c: along the sign of its gradient
    (step="sign", the authors') or along gradient / ||gradient||_2 (step="normalised").
    """

    weight: float
    p: float = 2
    power: float = 1.0
    step: str = "sign"

    def __post_init__(self) -> None:
        check.number("weight", self.weight, above=0.0)
        check.number("power", self.power, least=1.0)
        check.choice("p", self.p, (1, 2, math.inf))
        check.choice("step", self.step, ("sign", "normalised"))

    def rule(self) -> Rule:
        norm = 0 if self.p == math.inf else int(self.p)
        return Rule(NORM_POWER, 0.0, float(self.weight), float(self.power), norm, int(self.step == "normalised"))


@dataclass(frozen=True)
class SoftBall:
    """The cost c = sum_j max(|x_adv_j - x_j| - radius, 0)^2 / (2 tau) of UDR (Bui et al., 2022); tau > 0.

    A step follows sign(grad), then the gradient of mu * c: at the ascended point (order="after", as published) or at
    the one before (order="before", as in the ARMOR authors' script; it overshoots and needs mu * step / tau < 2).
    """

    radius: float | Tensor
    tau: float
    order: str = "after"

    def __post_init__(self) -> None:
        _check_radius(self.radius)
        check.number("tau", self.tau, above=0.0)
        check.choice("order", self.order, ("after", "before"))

    def rule(self) -> Rule:
        return Rule(SOFT_BALL, self.radius, weight=float(self.tau), variant=int(self.order == "before"))


@dataclass(frozen=True)
class Binary:
    """Features in {0, 1} of which only zeros may flip, as in malware detection (Al-Dujaili et al., 2018).

    Steps ascend in [0, 1]; the final one rounds each entry to 1 with the probability it then has (at 1/2 where no seeds
    are given) and restores the ones of x.
    """

    def rule(self) -> Rule:
        return Rule(BINARY, 0.0)


Cost = Linf | L2 | L1 | NormPower | SoftBall | Binary


class Rule(NamedTuple):
    """A set or cost as the operators take it."""

    kind: int
    radius: float | Tensor
    weight: float = 1.0
    power: float = 1.0
    norm: int = 2
    variant: int = 0

    @property
    def is_cost(self) -> bool:
        return self.kind in (NORM_POWER, SOFT_BALL)

    def radii(self, x: Tensor) -> tuple[float, Tensor | None]:
        """The radius as a number, or 0 and one per sample."""
        if not isinstance(self.radius, Tensor):
            return float(self.radius), None
        if self.radius.shape != x.shape[:1]:
            raise ValueError(
                f"radius must be a number or of shape {tuple(x.shape[:1])}, got {tuple(self.radius.shape)}"
            )
        return 0.0, self.radius.to(x.device, real(x))


class Start(NamedTuple):
    """x_adv like x; status [B], int32, a `TransportStatus` each; feed: x_adv normalised and cast, if asked for."""

    x_adv: Tensor
    status: Tensor
    feed: Tensor | None


class Step(NamedTuple):
    """x_adv like x; status [B], int32; costs [B] of a final step for `NormPower` and `SoftBall`; feed if asked for."""

    x_adv: Tensor
    status: Tensor
    costs: Tensor | None
    feed: Tensor | None


def transport_init(
    x: Tensor,
    cost: Cost,
    *,
    start: str = "uniform",
    sigma: float = 0.001,
    box: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    normalize: Normalize | None = None,
    feed_dtype: torch.dtype | None = None,
) -> Start:
    """Where an attack starts: clamp(x + noise, box), in one launch.

    Args:
        x: [B, ...], float16, bfloat16, float32 or float64, with values in `box`; contiguous or channels_last, which
            x_adv keeps. Dimension 1 is the channel.
        cost: the ball. `SoftBall` starts in its linf ball; `NormPower` and `Binary` have no uniform start.
        start: "uniform" in the ball; "gaussian", sigma times a standard normal number per entry (the TRADES start);
            "clean", x itself.
        sigma: > 0.
        box: (lo, hi), lo < hi.
        generator: draws the seeds, on the device of x; None is torch's default generator there.
        seeds: int64 [B], a seed per sample: its noise then depends on its seed and shape alone, on every device and in
            every layout.
        normalize: (mean, std) per channel: `feed` is (x_adv - mean) / std, what the model eats.
        feed_dtype: dtype of `feed`; None is that of x.

    Raises: TypeError, ValueError. x is held to the box on the CPU; on a GPU, where looking would make the host wait,
    the sample gets `TransportStatus.OUTSIDE`.
    """
    rule, (lo, hi) = _checked(x, cost, box)
    if rule.kind == BINARY and check.readable(x):
        odd = x.detach()[(x != 0) & (x != 1)]
        if odd.numel():
            raise ValueError(f"x must be 0 or 1 everywhere for Binary, got {odd[0].item():g}")
    check_start(cost, start)
    radius, radii = rule.radii(x)
    code = CLEAN
    if start == "gaussian":
        code, radius, radii = GAUSSIAN, check.number("sigma", sigma, above=0.0), None
    elif start == "uniform":
        code = LINF if rule.kind == SOFT_BALL else rule.kind
    if start != "clean":
        seeds = draw_seeds(x, generator) if seeds is None else seeds
        _check_per_sample("seeds", seeds, "an int64", x)
    mean, std = normalizer(normalize, x)
    _check_feed(feed_dtype)
    x_adv, status, feed = torch.ops.armor.transport_init.default(
        x.detach(), None if code == CLEAN else seeds, radii, mean, std, code, radius, lo, hi, feed_dtype
    )
    refuse_outside(x, box, status)
    return Start(x_adv, status, feed if _feeds(normalize, feed_dtype) else None)


def transport_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    cost: Cost,
    *,
    step_size: float,
    mu: Tensor | float | None = None,
    box: tuple[float, float] = (0.0, 1.0),
    targeted: bool = False,
    active: Tensor | None = None,
    final: bool = False,
    seeds: Tensor | None = None,
    normalize: Normalize | None = None,
    feed_dtype: torch.dtype | None = None,
) -> Step:
    """One step of ascent on the loss (minus mu times the cost), then back into the ball and the box, in one launch.

    A sample whose gradient holds NaN or inf does not move and is flagged `TransportStatus.BAD_GRADIENT`.

    Args:
        x_adv: where the samples are, like x. grad: gradient of the summed losses there, of any floating dtype; with
            `normalize`, the gradient in the feed.
        x, box, normalize, feed_dtype: as for `transport_init`. cost: the set or cost.
        step_size: > 0: the length of the step in the norm of the ball; per entry for sign steps.
        mu: price of the cost, >= 0: a number, a tensor or one per sample, [B]; stays on the device. None is 1. Only for
            `NormPower` and `SoftBall`.
        targeted: descend instead.
        active: bool [B]; the others stay where they are. None is all.
        final: also return the costs of the samples, and round `Binary`, by `seeds` if given.

    Raises: TypeError, ValueError, as `transport_init`.
    """
    step = stepper(
        x,
        cost,
        step_size=step_size,
        mu=mu,
        box=box,
        targeted=targeted,
        normalize=normalize,
        feed_dtype=feed_dtype,
    )
    check.like("x_adv", x_adv, "x", x)
    check.tensor("grad", grad)
    check.matches("grad", grad, "x", x)
    check.flag("final", final)
    if active is not None:
        _check_per_sample("active", active, "a bool", x)
    if seeds is not None:
        _check_per_sample("seeds", seeds, "an int64", x)
    moved = step(x_adv.detach(), grad.detach(), active, final, seeds)
    refuse_outside(x, box, moved.status)
    return moved


def stepper(
    x: Tensor,
    cost: Cost,
    *,
    step_size: float,
    mu: Tensor | float | None,
    box: tuple[float, float],
    targeted: bool,
    normalize: Normalize | None,
    feed_dtype: torch.dtype | None,
) -> Callable[[Tensor, Tensor, Tensor | None, bool, Tensor | None], Step]:
    """`transport_step` with all that stays the same in an attack checked and prepared once.

    What it returns, (x_adv, grad, active, final, seeds) -> Step, checks nothing and looks at no value.
    """
    rule, (lo, hi) = _checked(x, cost, box)
    radius, radii = rule.radii(x)
    mean, std = normalizer(normalize, x)
    _check_feed(feed_dtype)
    check.flag("targeted", targeted)
    size = check.number("step_size", step_size, above=0.0)
    numbers = (rule.kind, radius, size, rule.weight, rule.power, rule.norm, rule.variant, lo, hi, targeted)
    x, mu, feeds = x.detach(), price(mu, cost, x), _feeds(normalize, feed_dtype)

    def step(x_adv: Tensor, grad: Tensor, active: Tensor | None, final: bool, seeds: Tensor | None) -> Step:
        x_next, status, costs, feed = torch.ops.armor.transport_step.default(
            x_adv, grad, x, mu, radii, active, seeds, mean, std, *numbers, final, feed_dtype
        )
        return Step(x_next, status, costs if final and rule.is_cost else None, feed if feeds else None)

    return step


def transport_cost(x_adv: Tensor, x: Tensor, cost: Cost, *, box: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """c(x_adv, x) of every sample, [B]; float64 for float64 samples, else float32.

    A ball costs 0 inside it and the box and inf outside, with the rounding of x's dtype forgiven; `Binary` costs 0
    where zeros have become ones and nothing else has changed, else inf. Differentiable in x_adv and x, to first order,
    for `NormPower` and `SoftBall`.

    Raises: TypeError, ValueError, as `transport_init`.
    """
    rule, (lo, hi) = _checked(x, cost, box)
    check.like("x_adv", x_adv, "x", x)
    if rule.is_cost and torch.is_grad_enabled() and (x_adv.requires_grad or x.requires_grad):
        return _TransportCost.apply(x_adv, x, rule, lo, hi)
    return _cost(x_adv.detach(), x.detach(), rule, lo, hi)


def price(mu: Tensor | float | None, cost: Cost, x: Tensor) -> Tensor | None:
    """mu as the operators take it: a tensor, one number or one per sample, on the device of x."""
    if mu is None:
        return None
    if not cost.rule().is_cost:
        raise ValueError(f"mu must be None for {type(cost).__name__}, which is a set and has no price, got {mu!r}")
    if not isinstance(mu, Tensor):
        if mu == math.inf:
            return torch.full((), mu, dtype=real(x), device=x.device)
        return torch.full((), check.number("mu", mu, least=0.0), dtype=real(x), device=x.device)
    if mu.dim() and mu.shape != x.shape[:1]:
        raise ValueError(f"mu must be one number or of shape {tuple(x.shape[:1])}, got {tuple(mu.shape)}")
    return mu.detach().to(x.device, real(x))


def normalizer(normalize: Normalize | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """mean and std, [C] each, as the operators take them."""
    if normalize is None:
        return None, None
    if x.dim() < 2:
        raise ValueError(f"normalize needs a channel dimension, but x has shape {tuple(x.shape)}")
    if not isinstance(normalize, (tuple, list)) or len(normalize) != 2:
        raise TypeError(f"normalize must be a pair (mean, std), got {normalize!r}")
    mean, std = (torch.as_tensor(given, dtype=real(x)) for given in normalize)
    for name, t in (("mean", mean), ("std", std)):
        if t.shape != x.shape[1:2]:
            raise ValueError(f"normalize: {name} must have shape {tuple(x.shape[1:2])}, got {tuple(t.shape)}")
    _check_positive("normalize: std", std)
    return _beside(x, mean), _beside(x, std)


def _beside(x: Tensor, t: Tensor) -> Tensor:
    """t on the device of x. From the host, numbers go there in the fill of each: a copy would wait for the stream."""
    if t.device == x.device or t.device.type != "cpu":
        return t.to(x.device)
    return torch.stack([t.new_full((), number, device=x.device) for number in t.tolist()])


def draw_seeds(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random seed for every sample of x."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__} {generator!r}")
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(f"generator must be on the device of x ({x.device}), got one on {generator.device}")
    return torch.randint(2**63 - 1, x.shape[:1], dtype=torch.int64, device=x.device, generator=generator)


def refuse_outside(x: Tensor, box: tuple[float, float], status: Tensor) -> None:
    """ValueError for an x outside the box, where looking costs no synchronisation: on the CPU."""
    if not check.readable(x) or not status.any() or not (status & TransportStatus.OUTSIDE).any():
        return
    least, most = torch.aminmax(x.detach())
    raise ValueError(f"x must lie in box=({box[0]:g}, {box[1]:g}), got values from {least.item():g} to {most.item():g}")


class _TransportCost(torch.autograd.Function):
    """The cost with its first derivative; the second is refused."""

    @staticmethod
    def forward(ctx: Any, x_adv: Tensor, x: Tensor, rule: Rule, lo: float, hi: float) -> Tensor:
        costs = _cost(x_adv, x, rule, lo, hi)
        ctx.save_for_backward(x_adv, x)
        ctx.rule = rule
        return costs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_costs: Tensor) -> tuple[Tensor | None, ...]:
        x_adv, x = ctx.saved_tensors
        d = (x_adv.to(real(x)) - x).reshape(x.shape[0], math.prod(x.shape[1:]))
        slope = _cost_slope(d, x, ctx.rule) * grad_costs[:, None] if x.numel() else d
        slope = slope.view(x.shape).to(x.dtype)
        needs = ctx.needs_input_grad
        return slope if needs[0] else None, -slope if needs[1] else None, None, None, None


def _cost(x_adv: Tensor, x: Tensor, rule: Rule, lo: float, hi: float) -> Tensor:
    radius, radii = rule.radii(x)
    return torch.ops.armor.transport_cost.default(
        x_adv, x, radii, rule.kind, radius, rule.weight, rule.power, rule.norm, lo, hi
    )


def _cost_slope(d: Tensor, x: Tensor, rule: Rule) -> Tensor:
    """dc/dx_adv, for displacements d [B, n]; 0 where they are 0."""
    if rule.kind == SOFT_BALL:
        radius, radii = rule.radii(x)
        beyond = (d.abs() - (radius if radii is None else radii[:, None])).clamp_min(0.0)
        return d.sign() * beyond / rule.weight
    length = torch.linalg.vector_norm(d, ord=rule.norm or math.inf, dim=1, keepdim=True)
    if rule.norm == 2:
        direction = d / length
    else:
        direction = d.sign()
        if rule.norm == 0:
            peaks = d.abs() == length
            direction = direction * peaks / peaks.sum(1, keepdim=True)
    return torch.where(length > 0, rule.weight * rule.power * length ** (rule.power - 1.0) * direction, 0.0)


def _checked(x: Tensor, cost: Cost, box: tuple[float, float]) -> tuple[Rule, tuple[float, float]]:
    check.tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have a batch dimension, got a scalar")
    check_cost(cost)
    lo, hi = (_rounded(bound, x.dtype) for bound in check_box(box))
    if isinstance(cost, Binary) and (lo, hi) != (0.0, 1.0):
        raise ValueError(f"box must be (0, 1) for Binary, got {box!r}")
    return cost.rule(), (lo, hi)


def check_cost(cost: Any) -> None:
    """One of the sets and costs above."""
    if not isinstance(cost, (Linf, L2, L1, NormPower, SoftBall, Binary)):
        raise TypeError(f"cost must be one of Linf, L2, L1, NormPower, SoftBall, Binary, got {cost!r}")


def check_start(cost: Cost, start: Any) -> None:
    """A start that the set or cost has."""
    check.choice("start", start, ("uniform", "gaussian", "clean"))
    if start == "uniform" and isinstance(cost, (NormPower, Binary)):
        raise ValueError(f"start must be 'gaussian' or 'clean' for {type(cost).__name__}, got 'uniform'")


def check_box(box: tuple[float, float]) -> tuple[float, float]:
    """(lo, hi) as floats, lo < hi."""
    if not isinstance(box, Sequence) or len(box) != 2:
        raise TypeError(f"box must be a pair (lo, hi), got {box!r}")
    lo, hi = (check.number("box", bound) for bound in box)
    if lo >= hi:
        raise ValueError(f"box must be (lo, hi) with lo < hi, got {tuple(box)!r}")
    return lo, hi


def _rounded(bound: float, dtype: torch.dtype) -> float:
    """A bound as a value of the samples' dtype, so that a clamped sample is not outside by a rounding error."""
    bits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    fraction, exponent = math.frexp(bound)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)


def _check_radius(radius: Any) -> None:
    if not isinstance(radius, Tensor):
        check.number("radius", radius, above=0.0)
    elif not radius.is_floating_point() or radius.dim() != 1:
        raise ValueError(f"radius must be a number or a floating [B], got {radius.dtype} {tuple(radius.shape)}")
    else:
        _check_positive("radius", radius)


def _check_positive(name: str, values: Tensor) -> None:
    if check.readable(values) and not (values > 0).all():
        raise ValueError(f"{name} must be greater than 0, got {values.min().item():g}")


def _check_per_sample(name: str, value: Any, kind: str, x: Tensor) -> None:
    """One entry per sample of x; kind is the dtype with its article."""
    if not isinstance(value, Tensor) or value.dtype != getattr(torch, kind.split()[1]):
        raise TypeError(f"{name} must be {kind} tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != x.shape[:1] or value.device != x.device:
        shape, got = tuple(x.shape[:1]), tuple(value.shape)
        raise ValueError(f"{name} must have shape {shape} on {x.device}, got {got} on {value.device}")


def _feeds(normalize: Normalize | None, feed_dtype: torch.dtype | None) -> bool:
    return normalize is not None or feed_dtype is not None


def _check_feed(feed_dtype: Any) -> None:
    if feed_dtype is not None and feed_dtype not in check.DTYPES:
        raise TypeError(f"feed_dtype must be float16, bfloat16, float32 or float64, got {feed_dtype!r}")
