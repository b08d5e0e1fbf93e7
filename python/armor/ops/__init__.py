"""Differentiable operators, each one call on tensors of any device; `armor.library` decides which kernel serves it."""

from armor.ops.dual import DualResult, Status, dc_loss, dc_objective
from armor.ops.rowloss import (
    cross_entropy,
    dc_cross_entropy,
    dc_mart,
    dc_trades,
    kl_loss,
    mart_loss,
    trades_loss,
)
from armor.ops.transport import (
    L1,
    L2,
    Binary,
    Linf,
    NormPower,
    SoftBall,
    TransportStatus,
    transport_cost,
    transport_init,
    transport_step,
)

__all__ = [
    "L1",
    "L2",
    "Binary",
    "DualResult",
    "Linf",
    "NormPower",
    "SoftBall",
    "Status",
    "TransportStatus",
    "cross_entropy",
    "dc_cross_entropy",
    "dc_loss",
    "dc_mart",
    "dc_objective",
    "dc_trades",
    "kl_loss",
    "mart_loss",
    "trades_loss",
    "transport_cost",
    "transport_init",
    "transport_step",
]
