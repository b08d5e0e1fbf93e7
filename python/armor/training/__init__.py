"""Adversarial training with and without the D^c loss: what `armor train` runs.

A run is a list of jobs (setting, seed, method); the two methods of a pair share everything but the
objective, so that their difference is the effect of the re-weighting alone. Read step.py first, then
loop.py; run.py puts the pieces together.
"""

from armor.training.config import AttackConfig, ConfigError, DualConfig, TrainConfig
from armor.training.run import run

__all__ = ["AttackConfig", "ConfigError", "DualConfig", "TrainConfig", "run"]
