"""Adversarial attacks: one loop of ascent, `Transport`, over the fused steps of `armor.ops.transport`, and constructors
that give it the field's names and published defaults (docs/attacks.md). Training and evaluation call them alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from armor.library import real
from armor.ops import check
from armor.ops.rowloss import CE, KL, MART, FixedLoss
from armor.ops.transport import (
    L1,
    L2,
    Binary,
    Cost,
    Linf,
    Normalize,
    NormPower,
    SoftBall,
    Start,
    Step,
    check_box,
    check_cost,
    check_start,
    draw_seeds,
    normalizer,
    price,
    stepper,
    transport_init,
)

Model = Callable[[Tensor], Tensor]
Loss = str | Callable[[Tensor, Tensor], Tensor]
LOSSES = ("ce", "kl", "mart", "margin")


class Result(NamedTuple):
    """x_adv like x. costs [B], for `NormPower` and `SoftBall`. losses [B] at x_adv, where restarts or `Binary` made the
    attack look at them. status [B], int32: `TransportStatus` bits met on the way."""

    x_adv: Tensor
    costs: Tensor | None
    losses: Tensor | None
    status: Tensor


@dataclass(frozen=True)
class Transport:
    """K steps of ascent on a model's loss within a set, or on loss - mu * cost: `x_adv = attack(model, x, y)`.

    The model is attacked in eval mode, so that BatchNorm keeps its statistics, and every module gets its own mode back.
    Only input gradients are computed: no parameter gets or loses a `.grad`. Nothing in the loop waits for the device,
    and every sample is attacked on its own: its result does not depend on the others in the batch.

    Args:
        cost: `Linf`, `L2`, `L1`, `NormPower`, `SoftBall` or `Binary`, of `armor.ops`.
        steps: >= 1. step_size: > 0, as for `transport_step`.
        start: "uniform" in the ball, "gaussian" (sigma) or "clean".
        sigma: > 0, standard deviation of the gaussian start.
        restarts: >= 1. Of several each sample keeps the worst: fooled before not fooled, then the largest loss (of a
            cost: the largest loss - mu * cost). More than one costs a forward pass each to find out.
        loss: "ce", cross-entropy; "kl", KL(natural || adversarial), of TRADES; "mart", of MART; "margin", the largest
            wrong logit minus the right one; or a function of (logits, y) that gives one loss per sample, [B].
        beta: of the "mart" loss, >= 0.
        targeted: y are the classes to reach: descend on the loss.
        early_stop: a sample that is fooled no longer moves.
        box: (lo, hi) of every entry.
        normalize: (mean, std) per channel: the model is fed (x_adv - mean) / std, written by the step itself.
        feed_dtype: dtype that the model is fed, e.g. torch.bfloat16; x_adv keeps that of x.
        eval_mode: False attacks every module in the mode it is in.

    Raises: TypeError, ValueError.
    """

    cost: Cost
    steps: int
    step_size: float
    start: str = "uniform"
    sigma: float = 0.001
    restarts: int = 1
    loss: Loss = "ce"
    beta: float = 6.0
    targeted: bool = False
    early_stop: bool = False
    box: tuple[float, float] = (0.0, 1.0)
    normalize: Normalize | None = None
    feed_dtype: torch.dtype | None = None
    eval_mode: bool = True

    def __post_init__(self) -> None:
        check_cost(self.cost)
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
            check.number(name, value, least=1)
        check.number("step_size", self.step_size, above=0.0)
        check.number("sigma", self.sigma, above=0.0)
        check.number("beta", self.beta, least=0.0)
        check_start(self.cost, self.start)
        if not callable(self.loss):
            check.choice("loss", self.loss, LOSSES)
        if self.targeted and self.loss in ("kl", "mart"):
            raise ValueError(f"targeted needs loss='ce', 'margin' or a function of your own, got loss={self.loss!r}")
        if self.loss == "kl" and self.start == "clean":
            raise ValueError("start must not be 'clean' for loss='kl', whose gradient is 0 there, got 'clean'")
        check_box(self.box)
        for name in ("targeted", "early_stop", "eval_mode"):
            check.flag(name, getattr(self, name))

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        mu: Tensor | float | None = None,
        generator: torch.Generator | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """x_adv, like x. Arguments as for `run`."""
        return self.run(model, x, y, mu=mu, generator=generator, seeds=seeds).x_adv

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        mu: Tensor | float | None = None,
        generator: torch.Generator | None = None,
        seeds: Tensor | None = None,
    ) -> Result:
        """Attacks the model on the samples x [B, ...] of classes y, int64 [B]; B may be 0.

        model: x -> logits [B, K], a module or any function. mu: price of the cost, a number or a tensor (lam + kappa of
        the current dual). generator draws the random numbers; seeds, int64 [B], stands for it where the noise of a
        sample must not depend on its place in the batch.
        """
        check.tensor("x", x)
        if x.dim() == 0:
            raise ValueError("x must have a batch dimension, got a scalar")
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"y must be a tensor with one entry per sample of x {tuple(x.shape)}, got {got}")
        x = x.detach()
        if seeds is None and self._is_random:
            seeds = draw_seeds(x, generator)
        normalize = None if self.normalize is None else normalizer(self.normalize, x)
        fixed: dict[str, Any] = {"box": self.box, "normalize": normalize, "feed_dtype": self.feed_dtype}
        step_size, targeted, mu = self.step_size, self.targeted, price(mu, self.cost, x)
        move = stepper(x, self.cost, step_size=step_size, mu=mu, targeted=targeted, **fixed)
        if x.numel() == 0:
            nothing = x.new_empty(x.shape[0], dtype=real(x))
            costs = nothing if self.cost.rule().is_cost else None
            return Result(x.clone(), costs, None, torch.zeros_like(nothing, dtype=torch.int32))

        with modes(model, self.eval_mode):
            objective, worst = self._objective(model, x, y, fixed), None
            if isinstance(self.cost, Binary):  # to flip nothing is allowed, too
                clean = transport_init(x, self.cost, start="clean", **fixed)
                worst = self._judged(model, objective, Step(clean.x_adv, clean.status, None, clean.feed), y, mu)
            for restart in range(self.restarts):
                own = seeds if seeds is None or restart == 0 else seeds + restart
                start = transport_init(x, self.cost, start=self.start, sigma=self.sigma, seeds=own, **fixed)
                found = self._ascend(model, objective, move, start, y, own)
                if self.restarts == 1 and worst is None:
                    return Result(found.x_adv, found.costs, None, found.status)
                judged = self._judged(model, objective, found, y, mu)
                worst = judged if worst is None else worst.or_worse(judged)
        assert worst is not None
        return worst.result

    @property
    def _is_random(self) -> bool:
        return self.start != "clean" or isinstance(self.cost, Binary)

    def _ascend(
        self,
        model: Model,
        objective: Objective,
        move: Callable[..., Step],
        start: Start,
        y: Tensor,
        seeds: Tensor | None,
    ) -> Step:
        """One ascent from one start; the step returned is the last, with the status of all."""
        now, active = Step(start.x_adv, start.status, None, start.feed), None
        for step in range(self.steps):
            eaten, status = _eaten(now).detach().requires_grad_(), now.status
            with torch.enable_grad():
                logits = model(eaten)
                if self.early_stop:
                    standing = ~self._fooled(logits.detach(), y)
                    active = standing if active is None else active & standing
                (grad,) = torch.autograd.grad(logits, eaten, objective.slope(logits.detach()))
            now = move(now.x_adv, grad, active, step == self.steps - 1, seeds)
            now = now._replace(status=now.status | status)
        return now

    def _objective(self, model: Model, x: Tensor, y: Tensor, fixed: dict[str, Any]) -> Objective:
        """The loss and its slope. What depends on the natural samples alone is computed here, once."""
        if self.loss == "ce":
            return FixedLoss(CE, y)
        if self.loss == "margin":
            return _OwnLoss(margin, y)
        if callable(self.loss):
            return _OwnLoss(self.loss, y)
        with torch.no_grad():
            natural = model(_eaten(transport_init(x, self.cost, start="clean", **fixed)))
        return FixedLoss(KL if self.loss == "kl" else MART, y, natural, self.beta)

    @torch.no_grad()
    def _judged(self, model: Model, objective: Objective, found: Step, y: Tensor, mu: Tensor | None) -> _Candidate:
        """What the model makes of the samples found."""
        logits = model(_eaten(found))
        losses = objective.losses(logits)
        score, fooled = -losses if self.targeted else losses, self._fooled(logits, y)
        if found.costs is not None:  # what is sought is the largest objective, not success
            score, fooled = score - (found.costs if mu is None else mu * found.costs), torch.zeros_like(fooled)
        return _Candidate(Result(found.x_adv, found.costs, losses, found.status), fooled, score)

    def _fooled(self, logits: Tensor, y: Tensor) -> Tensor:
        return (logits.argmax(1) == y) == self.targeted


class _OwnLoss:
    """A function of (logits, y) in the place of a `FixedLoss`."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> None:
        self.loss, self.y = loss, y

    def losses(self, logits: Tensor) -> Tensor:
        return self.loss(logits, self.y)

    def slope(self, logits: Tensor) -> Tensor:
        logits = logits.requires_grad_()
        losses = self.loss(logits, self.y)
        return torch.autograd.grad(losses, logits, torch.ones_like(losses))[0]


Objective = FixedLoss | _OwnLoss


class _Candidate(NamedTuple):
    result: Result
    fooled: Tensor
    score: Tensor

    def or_worse(self, other: _Candidate) -> _Candidate:
        """Sample by sample the worse of the two."""
        larger = (other.score > self.score) | self.score.isnan()
        worse = (other.fooled & ~self.fooled) | ((other.fooled == self.fooled) & larger)

        def pick(new: Any, old: Any) -> Any:
            return None if old is None else torch.where(worse.view(-1, *(1,) * (old.dim() - 1)), new, old)

        parts = [pick(new, old) for new, old in zip(other.result[:3], self.result[:3], strict=True)]
        result = Result(parts[0], parts[1], parts[2], self.result.status | other.result.status)
        return _Candidate(result, pick(other.fooled, self.fooled), pick(other.score, self.score))


# ---- the field's names ---------------------------------------------------------------------------------------------


def pgd(
    eps: float | Tensor = 8 / 255,
    steps: int = 10,
    step_size: float = 2 / 255,
    norm: str = "linf",
    **options: Any,
) -> Transport:
    """Projected gradient descent from a uniform start in the ball (Madry et al., 2018), for norm "linf", "l2" or "l1".

    eps: radius of the ball, > 0. The defaults are customary for linf on CIFAR; for l2 they are about eps=0.5,
    step_size=0.1, for l1, which is SLIDE here, eps=12, step_size=3. Options are those of `Transport`.
    """
    check.choice("norm", norm, _BALLS)
    return Transport(_BALLS[norm](eps), steps, step_size, **options)


def fgsm(eps: float = 8 / 255, **options: Any) -> Transport:
    """One sign step of eps from x (Goodfellow et al., 2015). Options are those of `Transport`."""
    return Transport(Linf(eps), 1, eps, **{"start": "clean", **options})


def trades(eps: float | Tensor = 0.031, steps: int = 10, step_size: float = 0.007, **options: Any) -> Transport:
    """The attack of TRADES training (Zhang et al., 2019): KL from the natural prediction, start x + 0.001 N(0, 1).

    Options are those of `Transport`. The start is clamped to the box, which the published script does from the first
    step on.
    """
    return Transport(Linf(eps), steps, step_size, **{"start": "gaussian", "loss": "kl", **options})


def mart(eps: float | Tensor = 0.031, steps: int = 10, step_size: float = 0.007, **options: Any) -> Transport:
    """The attack of MART training (Wang et al., 2020): cross-entropy, start x + 0.001 N(0, 1).

    loss="mart" attacks the MART loss itself, as the ARMOR_D authors do. Options are those of `Transport`.
    """
    return Transport(Linf(eps), steps, step_size, **{"start": "gaussian", **options})


def udr(
    radius: float | Tensor = 8 / 255,
    tau: float | None = None,
    steps: int = 10,
    step_size: float = 2 / 255,
    order: str = "after",
    **options: Any,
) -> Transport:
    """The attack of UDR (Bui et al., 2022): sign steps with the price mu on what lies beyond a soft linf ball.

    The defaults are the published ones for CIFAR-10. tau None is step_size, as published: at mu = 1 a step then ends on
    the ball. Call it with mu=lam + kappa of the current dual; mu=None is 1. Options are those of `Transport`.
    """
    return Transport(SoftBall(radius, step_size if tau is None else tau, order), steps, step_size, **options)


def penalised_ot(
    weight: float = 0.1,
    p: float = 2,
    power: float = 1.5,
    steps: int = 20,
    step_size: float = 0.01,
    step: str = "sign",
    **options: Any,
) -> Transport:
    """Ascent on loss - mu * weight * ||x_adv - x||_p^power from x, without a ball.

    The defaults are those of the ARMOR_D authors on MNIST. Call it with mu=lam + kappa of the current dual. Options are
    those of `Transport`.
    """
    return Transport(NormPower(weight, p, power, step), steps, step_size, **{"start": "clean", **options})


def rfgsm_k(steps: int = 50, step_size: float = 0.02, **options: Any) -> Transport:
    """rFGSM^k (Al-Dujaili et al., 2018) on binary features: relaxed ascent, randomised rounding, no flip of a one, and
    the sample itself where that fools no less. Options are those of `Transport`."""
    return Transport(Binary(), steps, step_size, **{"start": "clean", **options})


_BALLS: dict[str, Callable[..., Cost]] = {"linf": Linf, "l2": L2, "l1": L1}


# ---- what attacks need besides -------------------------------------------------------------------------------------


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest logit of another class minus the label's, [B]; positive where the model is wrong."""
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - own.squeeze(1)


@contextlib.contextmanager
def modes(model: Any, eval_mode: bool = True) -> Iterator[None]:
    """Every module of the model in eval mode inside, and each one's own mode back afterwards.

    `model.train()` afterwards would wake up layers that the user froze on purpose. eval_mode False, or a model that is
    a plain function, changes nothing.
    """
    if not eval_mode or not isinstance(model, nn.Module):
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _eaten(at: Start | Step) -> Tensor:
    return at.x_adv if at.feed is None else at.feed
