"""Per-sample losses from logits, and the same fused with the dual: `cross_entropy`, `trades_loss`, `mart_loss` and
`kl_loss` give one loss per sample, `dc_cross_entropy`, `dc_trades` and `dc_mart` the worst expected loss around the
batch (docs/rowloss.md). All are `armor::rowloss` or `armor::rowloss_dual`, in log space, with classes last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from armor.library import IGNORE_NOTHING, real
from armor.ops import check
from armor.ops.dual import DualResult, _family
from armor.ops.function import differentiable, first_order

CE, TRADES, MART, KL = range(4)


def cross_entropy(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100) -> Tensor:
    """-log softmax(logits)[target] of every sample: `F.cross_entropy(..., reduction="none")` with classes last.

    Args:
        logits: [..., K], float16, bfloat16, float32 or float64; any finite values, and -inf for excluded classes.
        target: int64 [...], in [0, K), or `ignore_index`: such a sample has loss 0 and gradient 0.
        label_smoothing: s in [0, 1]; the target has probability 1 - s + s / K and every other class s / K.

    Returns: losses [...], float64 for float64 logits, else float32.

    Raises: TypeError, ValueError. A target out of range is one on the CPU; on a GPU, where looking would make the host
    wait, its loss is NaN.
    """
    smoothing = _smoothing(label_smoothing)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__} {ignore_index!r}")
    _check_logits({"logits": logits}, target, CE, ignore_index)
    return _rowloss(logits, None, target, CE, 0.0, smoothing, ignore_index)[0]


def trades_loss(natural_logits: Tensor, adv_logits: Tensor, target: Tensor, *, beta: float = 6.0) -> Tensor:
    """CE(natural_logits, target) + beta * KL(softmax(natural_logits) || softmax(adv_logits)) of every sample.

    The mean is the loss of TRADES (Zhang et al., 2019, arXiv:1901.08573); gradients flow into both logits, and are
    finite at every gap between them. Shapes, dtypes and errors as for `cross_entropy`; beta >= 0.
    """
    beta = check.number("beta", beta, least=0.0)
    _check_logits({"natural_logits": natural_logits, "adv_logits": adv_logits}, target, TRADES)
    return _rowloss(adv_logits, natural_logits, target, TRADES, beta, 0.0, IGNORE_NOTHING)[0]


def mart_loss(natural_logits: Tensor, adv_logits: Tensor, target: Tensor, *, beta: float = 6.0) -> Tensor:
    """Boosted cross-entropy plus beta times the KL divergence, weighted by the doubt about the natural sample.

    With p and q the softmax of natural_logits and adv_logits and y the target,
    -log q_y - log(1.0001 - max_{k != y} q_k + 1e-12) + beta * sum_k p_k log(p_k / (q_k + 1e-12)) * (1.0000001 - p_y).
    The mean is the loss of MART (Wang et al., 2020), with its published constants; gradients flow into both logits.
    Shapes, dtypes and errors as for `cross_entropy`; at least two classes; beta >= 0.
    """
    beta = check.number("beta", beta, least=0.0)
    _check_logits({"natural_logits": natural_logits, "adv_logits": adv_logits}, target, MART)
    return _rowloss(adv_logits, natural_logits, target, MART, beta, 0.0, IGNORE_NOTHING)[0]


def kl_loss(natural_logits: Tensor, adv_logits: Tensor) -> Tensor:
    """KL(softmax(natural_logits) || softmax(adv_logits)) of every sample: what the TRADES attack ascends.

    Shapes, dtypes and errors as for `trades_loss`.
    """
    _check_logits({"natural_logits": natural_logits, "adv_logits": adv_logits}, None, KL)
    target = torch.zeros(adv_logits.shape[:-1], dtype=torch.int64, device=adv_logits.device)
    return _rowloss(adv_logits, natural_logits, target, KL, 0.0, 0.0, IGNORE_NOTHING)[0]


def dc_cross_entropy(
    logits: Tensor,
    target: Tensor,
    costs: Tensor | None = None,
    *,
    radius: float,
    divergence: str = "kl",
    alpha: float | None = None,
    kappa: float = 0.0,
    max_dual: float = 1e6,
    label_smoothing: float = 0.0,
    return_dual: bool = False,
) -> Any:
    """`dc_loss(cross_entropy(logits, target), costs)` in one launch forward and one backward.

    Args:
        logits: [..., n, K]: n samples, K classes; the dimensions in front are independent problems.
        target, label_smoothing: as for `cross_entropy`; no target is ignored.
        costs: transport costs [..., n], or None.
        radius, divergence, alpha, kappa, max_dual, return_dual: as for `dc_loss`, and so are the results.
    """
    dual = (radius, divergence, alpha, kappa, max_dual, return_dual)
    return _dc(logits, None, target, costs, CE, 0.0, _smoothing(label_smoothing), *dual)


def dc_trades(
    natural_logits: Tensor,
    adv_logits: Tensor,
    target: Tensor,
    costs: Tensor | None = None,
    *,
    beta: float = 6.0,
    radius: float,
    divergence: str = "kl",
    alpha: float | None = None,
    kappa: float = 0.0,
    max_dual: float = 1e6,
    return_dual: bool = False,
) -> Any:
    """`dc_loss(trades_loss(natural_logits, adv_logits, target), costs)` in one launch forward and one backward.

    Logits are [..., n, K]; the arguments are those of `trades_loss` and `dc_cross_entropy`.
    """
    dual = (radius, divergence, alpha, kappa, max_dual, return_dual)
    return _dc(adv_logits, natural_logits, target, costs, TRADES, beta, 0.0, *dual)


def dc_mart(
    natural_logits: Tensor,
    adv_logits: Tensor,
    target: Tensor,
    costs: Tensor | None = None,
    *,
    beta: float = 6.0,
    radius: float,
    divergence: str = "kl",
    alpha: float | None = None,
    kappa: float = 0.0,
    max_dual: float = 1e6,
    return_dual: bool = False,
) -> Any:
    """`dc_loss(mart_loss(natural_logits, adv_logits, target), costs)` in one launch forward and one backward.

    Logits are [..., n, K]; the arguments are those of `mart_loss` and `dc_cross_entropy`.
    """
    dual = (radius, divergence, alpha, kappa, max_dual, return_dual)
    return _dc(adv_logits, natural_logits, target, costs, MART, beta, 0.0, *dual)


# ---- armor::rowloss ------------------------------------------------------------------------------------------------


def _solve(
    logits: Tensor,
    natural: Tensor | None,
    target: Tensor,
    kind: int,
    beta: float,
    smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    return torch.ops.armor.rowloss.default(logits, target, natural, kind, beta, smoothing, ignore_index)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, natural, target, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, natural, target, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    logits, natural, target, stats = ctx.saved_tensors
    both = natural is not None and ctx.needs_input_grad[1]
    to_logits, to_natural = _rowloss_backward(grad, None, logits, target, natural, stats, *ctx.settings, both)
    return to_logits, to_natural if both else None, *(None,) * 5


_rowloss = differentiable(_solve, _remember, _backward)
_rowloss_backward = first_order(
    lambda *args: torch.ops.armor.rowloss_backward.default(*args),
    "the losses of armor.ops have first derivatives only; use torch's own functions for higher orders",
)


class FixedLoss:
    """A loss of this file with everything but the adversarial logits fixed: `losses` of them, and `slope`, the gradient
    of the sum of the losses in them. Neither makes a graph: an attack has no use for one."""

    def __init__(self, kind: int, target: Tensor, natural: Tensor | None = None, beta: float = 0.0) -> None:
        self.target, self.natural, self.settings = target, natural, (kind, beta, 0.0, IGNORE_NOTHING)
        self.ones: Tensor | None = None

    def losses(self, logits: Tensor) -> Tensor:
        return self._evaluate(logits)[0]

    def slope(self, logits: Tensor) -> Tensor:
        losses, stats = self._evaluate(logits)
        if self.ones is None:
            self.ones = torch.ones_like(losses)
        return torch.ops.armor.rowloss_backward.default(
            self.ones, None, logits, self.target, self.natural, stats, *self.settings, False
        )[0]

    def _evaluate(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.ones is None:  # the first time
            given = {"logits": logits} if self.natural is None else {"natural logits": self.natural, "logits": logits}
            _check_logits(given, self.target, self.settings[0])
        return torch.ops.armor.rowloss.default(logits, self.target, self.natural, *self.settings)


# ---- armor::rowloss_dual -------------------------------------------------------------------------------------------


def _dc(
    logits: Tensor,
    natural: Tensor | None,
    target: Tensor,
    costs: Tensor | None,
    kind: int,
    beta: float,
    smoothing: float,
    radius: float,
    divergence: str,
    alpha: float | None,
    kappa: float,
    max_dual: float,
    return_dual: bool,
) -> Any:
    beta = check.number("beta", beta, least=0.0)
    name = "logits" if kind == CE else "adv_logits"
    _check_logits({name: logits} if kind == CE else {"natural_logits": natural, name: logits}, target, kind)
    family, order = _family(divergence, alpha)
    radius, kappa = check.number("radius", radius, least=0.0), check.number("kappa", kappa, least=0.0)
    max_dual = check.number("max_dual", max_dual, above=0.0)
    if logits.dim() < 2 or logits.shape[-2] == 0:
        raise ValueError(f"{name} must be [..., n, K] with at least one sample, got shape {tuple(logits.shape)}")
    if costs is not None:
        check.tensor("costs", costs)
        check.matches("costs", costs, "target", target)
        costs = costs.to(real(logits))
    value, _, _, lam, nu, weights, status, passes = _rowloss_dual(
        logits, natural, costs, target, kind, beta, smoothing, family, order, radius, kappa, max_dual
    )
    return (value, DualResult(lam, nu, weights, status, passes)) if return_dual else value


def _solve_dual(
    logits: Tensor, natural: Tensor | None, costs: Tensor | None, target: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    return torch.ops.armor.rowloss_dual.default(logits, target, natural, costs, *settings)


def _remember_dual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, natural, costs, target, kind, beta, smoothing, _, _, _, ctx.kappa, _ = inputs
    _, _, stats, lam, _, weights, _, _ = output
    ctx.settings = (kind, beta, smoothing, IGNORE_NOTHING)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, natural, costs, target, stats, lam, weights)


def _backward_dual(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The row losses' gradient at the weights; costs have -mu times the weights (envelope theorem)."""
    if grad is None:
        return (None,) * 12
    logits, natural, costs, target, stats, lam, weights = ctx.saved_tensors
    both = natural is not None and ctx.needs_input_grad[1]
    to_logits, to_natural = _rowloss_backward(grad, weights, logits, target, natural, stats, *ctx.settings, both)
    to_costs = None
    if costs is not None and ctx.needs_input_grad[2]:
        to_costs = -((lam + ctx.kappa) * grad).unsqueeze(-1) * weights
    return to_logits, to_natural if both else None, to_costs, *(None,) * 9


_rowloss_dual = differentiable(_solve_dual, _remember_dual, _backward_dual)


# ---- checks --------------------------------------------------------------------------------------------------------


def _smoothing(label_smoothing: Any) -> float:
    return check.number("label_smoothing", label_smoothing, least=0.0, most=1.0)


def _check_logits(given: dict[str, Any], target: Tensor | None, kind: int, ignore_index: int = IGNORE_NOTHING) -> None:
    least_classes = 2 if kind == MART else 1
    first, *rest = given
    logits = given[first]
    check.tensor(first, logits)
    for name in rest:
        check.like(name, given[name], first, logits)
    if logits.dim() == 0 or logits.shape[-1] < least_classes:
        raise ValueError(f"{first} must have at least {least_classes} classes last, got shape {tuple(logits.shape)}")
    if target is None:
        return
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(logits.shape[:-1])}, got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of {first} ({logits.device}), got {target.device}")
    if target.numel() and check.readable(target):
        _check_range(target, logits.shape[-1], ignore_index)


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    least, most = (bound.item() for bound in torch.aminmax(target))
    if least >= 0 and most < classes:
        return
    odd = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if odd.numel():
        raise ValueError(f"target must be in [0, {classes - 1}], got {odd[0].item()}")
