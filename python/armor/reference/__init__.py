"""Every operator once more, in plain torch and float64, without tricks: the oracle of the tests, and the backend
"reference" on any device."""

from armor.reference.dual import ALPHA, KL, RENYI, dual, dual_backward
from armor.reference.rowloss import rowloss, rowloss_backward, rowloss_dual
from armor.reference.transport import transport_cost, transport_init, transport_step

__all__ = [
    "ALPHA",
    "KL",
    "RENYI",
    "dual",
    "dual_backward",
    "rowloss",
    "rowloss_backward",
    "rowloss_dual",
    "transport_cost",
    "transport_init",
    "transport_step",
]
