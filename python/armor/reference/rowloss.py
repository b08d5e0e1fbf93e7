"""Float64 oracle of the per-sample losses `armor::rowloss*` in plain torch: section 4 of docs/math.md, in log space,
with the gradients written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armor.library import IGNORE_NOTHING, real
from armor.reference.dual import dual

CE, TRADES, MART, KL = range(4)


def rowloss(
    logits: Tensor, target: Tensor, natural: Tensor | None, kind: int, beta: float, smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Losses [...] of logits [..., K] (adversarial, for the kinds that have natural ones), and what is needed to
    differentiate them: max z, log sum exp(z - max), the same two of the natural logits, KL, and for MART the strongest
    wrong class and S = sum p q / (q + 1e-12)."""
    row = _Row(logits, target, natural, kind, smoothing, ignore_index)
    if kind == CE:
        losses = (1.0 - smoothing) * -row.of_target(row.log_q)
        if smoothing > 0.0:  # else 0 times the -inf of an excluded class would be NaN
            losses = losses - smoothing * row.log_q.mean(-1)
        losses = losses.masked_fill(row.ignored, 0.0)
        stats = [row.max_z, row.log_sum_z]
    elif kind == MART:
        losses = -row.of_target(row.log_q) - row.margin.log() + beta * row.kl * row.doubt
        stats = [row.max_z, row.log_sum_z, row.max_w, row.log_sum_w, row.kl, row.wrong.double(), row.overlap]
    else:
        losses = row.kl if kind == KL else -row.of_target(row.log_p) + beta * row.kl
        stats = [row.max_z, row.log_sum_z, row.max_w, row.log_sum_w, row.kl]
    losses = losses.masked_fill(row.bad, float("nan"))
    return losses.to(real(logits)), torch.stack(stats, -1).to(real(logits))


def rowloss_backward(
    grad: Tensor,
    weights: Tensor | None,
    logits: Tensor,
    target: Tensor,
    natural: Tensor | None,
    stats: Tensor,
    kind: int,
    beta: float,
    smoothing: float,
    ignore_index: int,
    natural_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients in the logits and, if asked for, in the natural ones. With weights [..., n], `grad` is that of the
    dual's value, [...]. A sample of upstream 0 has gradient 0, whatever its loss."""
    row = _Row(logits, target, natural, kind, smoothing, ignore_index)
    one = row.one
    upstream = grad.double() if weights is None else grad.double()[..., None] * weights.double()
    to_natural = torch.zeros_like(row.q)
    if kind == CE:
        to_logits = row.q - (1.0 - smoothing) * one - smoothing / logits.shape[-1]
        to_logits = to_logits.masked_fill(row.ignored[..., None], 0.0)
    else:
        kl = row.kl[..., None]
        to_natural = torch.where(row.p > 0, row.p * (row.log_ratio - kl), 0.0)
        if kind == MART:
            p_y, doubt = row.of_target(row.p)[..., None], row.doubt[..., None]
            strongest = torch.zeros_like(row.q).scatter(-1, row.wrong[..., None], 1.0)
            pull = (strongest * row.q).sum(-1, keepdim=True) / row.margin[..., None]
            to_logits = row.q - one + pull * (strongest - row.q)
            to_logits = to_logits + beta * doubt * (row.q * row.overlap[..., None] - row.shared)
            to_natural = beta * (doubt * to_natural - kl * p_y * (one - row.p))
        else:
            to_logits = (1.0 if kind == KL else beta) * (row.q - row.p)
            if kind == TRADES:
                to_natural = row.p - one + beta * to_natural
    undefined = row.q.isnan().any(-1) & ~row.ignored
    if natural is not None:
        undefined |= row.p.isnan().any(-1)
    bad = (row.bad | undefined)[..., None]
    to_logits, to_natural = (
        torch.where(upstream[..., None] == 0, 0.0, upstream[..., None] * g.masked_fill(bad, float("nan")))
        for g in (to_logits, to_natural)
    )
    return to_logits.to(logits.dtype), to_natural.to(logits.dtype) if natural_grad else logits.new_empty(0)


def rowloss_dual(
    logits: Tensor,
    target: Tensor,
    natural: Tensor | None,
    costs: Tensor | None,
    kind: int,
    beta: float,
    smoothing: float,
    divergence: int,
    alpha: float,
    radius: float,
    kappa: float,
    max_dual: float,
) -> tuple[Tensor, ...]:
    """`rowloss` on logits [..., n, K], then `dual` on the losses [..., n]."""
    losses, stats = rowloss(logits, target, natural, kind, beta, smoothing, IGNORE_NOTHING)
    value, lam, nu, weights, status, passes = dual(losses, costs, None, divergence, alpha, radius, kappa, max_dual)
    return value, losses, stats, lam, nu, weights, status, passes


class _Row:
    """Probabilities and what the losses are made of, in float64, for every row at once."""

    def __init__(
        self, logits: Tensor, target: Tensor, natural: Tensor | None, kind: int, smoothing: float, ignore_index: int
    ) -> None:
        classes = logits.shape[-1]
        self.ignored = (target == ignore_index) & (kind == CE)
        self.bad = ((target < 0) | (target >= classes)) & ~self.ignored
        self.target = torch.where(self.ignored | self.bad, 0, target)[..., None]
        self.one = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter(-1, self.target, 1.0)
        self.max_z, self.log_sum_z, self.log_q = _log_softmax(logits)
        self.q = self.log_q.exp()
        if natural is None:
            return
        self.max_w, self.log_sum_w, self.log_p = _log_softmax(natural)
        self.p = self.log_p.exp()
        log_q = (self.q + 1e-12).log() if kind == MART else self.log_q
        self.log_ratio = torch.where(self.p > 0, self.log_p - log_q, torch.where(self.p.isnan(), self.p, 0.0))
        self.kl = torch.where(self.p > 0, self.p * self.log_ratio, self.log_ratio).sum(-1)
        if kind == MART:
            others = self.q.masked_fill(self.one == 1, -1.0)
            self.wrong = others.argmax(-1)
            # 1.0001 - q_m, with 1 - q_m as the sum of the others, which is exact where q_m is close to 1
            rest = self.q.scatter(-1, self.wrong[..., None], 0.0).sum(-1)
            self.margin = (1e-4 + rest) + 1e-12
            self.doubt = 1.0000001 - self.of_target(self.p)
            self.shared = self.p * (self.q / (self.q + 1e-12))
            self.overlap = self.shared.sum(-1)

    def of_target(self, entries: Tensor) -> Tensor:
        return entries.gather(-1, self.target).squeeze(-1)


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max, log sum exp(logits - max), and the difference of the logits to both."""
    logits = logits.double()
    largest = logits.amax(-1, keepdim=True)
    log_sum = (logits - largest).exp().sum(-1, keepdim=True).log()
    return largest.squeeze(-1), log_sum.squeeze(-1), logits - largest - log_sum
