"""nn.Module faces of `armor.ops`: `DCLoss` solves the dual exactly on every batch, `LearnedDual` keeps the duals as
parameters with an optimiser of their own, as the published scripts do (docs/math.md, section 6).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from armor.ops.check import number
from armor.ops.dual import DualResult, _family, dc_loss, dc_objective


class DCLoss(nn.Module):
    """`dc_loss` with its settings: `criterion = DCLoss(radius=0.02)`, then `criterion(losses)` for `losses.mean()`.

    Arguments and errors are those of `dc_loss`, and are checked here, before any training starts. After a call, `last`
    is its `DualResult`, detached.
    """

    last: DualResult | None

    def __init__(
        self,
        radius: float,
        divergence: str = "kl",
        alpha: float | None = None,
        kappa: float = 0.0,
        dim: int = -1,
        max_dual: float = 1e6,
    ) -> None:
        super().__init__()
        _family(divergence, alpha)
        self.radius = number("radius", radius, least=0.0)
        self.kappa = number("kappa", kappa, least=0.0)
        self.max_dual = number("max_dual", max_dual, above=0.0)
        self.divergence, self.alpha, self.dim = divergence, alpha, dim
        self.last = None

    def forward(self, losses: Tensor, costs: Tensor | None = None, clean_losses: Tensor | None = None) -> Tensor:
        value, self.last = dc_loss(
            losses,
            costs,
            clean_losses=clean_losses,
            radius=self.radius,
            divergence=self.divergence,
            alpha=self.alpha,
            kappa=self.kappa,
            dim=self.dim,
            max_dual=self.max_dual,
            return_dual=True,
        )
        return value

    def extra_repr(self) -> str:
        order = "" if self.alpha is None else f", alpha={self.alpha}"
        return f"radius={self.radius}, divergence={self.divergence!r}{order}, kappa={self.kappa}"


class LearnedDual(nn.Module):
    """The dual objective at learned duals: minimise it in its own parameters and the model's, with two optimisers.

    Parameters: `log_lam`, and `nu` (None for KL, whose best nu is known). For "renyi", nu must exceed every
    a = losses/mu - costs of the batch, so there `nu` is the logarithm of its distance from max(a).

    Args:
        radius, divergence, alpha, kappa: as for `dc_loss`.
        lam: starting value of lam, > 0; the published scripts start at 1.
        nu: starting value of nu: 1 in the published MNIST and MART scripts, -0.35 in the CIFAR-10 UDR and TRADES ones.
    """

    def __init__(
        self,
        radius: float,
        divergence: str = "kl",
        alpha: float | None = None,
        kappa: float = 0.0,
        lam: float = 1.0,
        nu: float = 1.0,
    ) -> None:
        super().__init__()
        _family(divergence, alpha)
        self.radius = number("radius", radius, least=0.0)
        self.kappa = number("kappa", kappa, least=0.0)
        self.divergence, self.alpha = divergence, alpha
        self.log_lam = nn.Parameter(torch.tensor(math.log(number("lam", lam, above=0.0))))
        self.nu = None if divergence == "kl" else nn.Parameter(torch.tensor(number("nu", nu)))

    @property
    def lam(self) -> Tensor:
        """The dual variable of the radius, > 0."""
        return self.log_lam.exp()

    def forward(self, losses: Tensor, costs: Tensor | None = None, clean_losses: Tensor | None = None) -> Tensor:
        """The objective on the samples along the last dimension of `losses`."""
        nu: Tensor | None = self.nu
        if nu is not None and self.divergence == "renyi":
            nu = self._largest(losses, costs, clean_losses) + nu.exp()
        return dc_objective(
            losses,
            self.lam,
            nu,
            costs,
            clean_losses=clean_losses,
            radius=self.radius,
            divergence=self.divergence,
            alpha=self.alpha,
            kappa=self.kappa,
        )

    def _largest(self, losses: Tensor, costs: Tensor | None, clean_losses: Tensor | None) -> Tensor:
        mu = self.lam + self.kappa
        a = losses / mu if costs is None else losses / mu - costs
        if clean_losses is not None:
            a = torch.maximum(a, clean_losses / mu)
        return a.amax(-1)

    def extra_repr(self) -> str:
        order = "" if self.alpha is None else f", alpha={self.alpha}"
        return f"radius={self.radius}, divergence={self.divergence!r}{order}, kappa={self.kappa}"
