"""armor: distributionally robust losses with optimal-transport regularised divergences, as PyTorch operators.

`dc_loss` replaces the mean over per-sample losses; `DCLoss` and `LearnedDual` are its `nn.Module` faces.
`python -m armor` tells which compiled modules and backends this install has.
"""

from armor.losses import DCLoss, LearnedDual
from armor.ops import DualResult, Status, dc_loss, dc_objective

__all__ = ["DCLoss", "DualResult", "LearnedDual", "Status", "dc_loss", "dc_objective"]
__version__ = "0.1.0"
