"""Differentiable operators, each one call on tensors of any device; `armor.library` decides which kernel serves it."""

from armor.ops.dual import DualResult, Status, dc_loss, dc_objective

__all__ = ["DualResult", "Status", "dc_loss", "dc_objective"]
