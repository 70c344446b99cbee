"""The guidance scale delta, tuned while training (equation 10)."""

from __future__ import annotations

import math

from polygrad_fast.config import GuidanceConfig
from polygrad_fast.errors import InputError


class GuidanceTuner:
    """Hold delta and move it so that the spread of standardized actions tends to 1."""

    def __init__(self, config: GuidanceConfig):
        self.config = config.resolved()
        self.value = config.initial

    def update(self, measured_spread: float) -> float:
        """Apply one step of the configured rule and return the new delta."""
        error = measured_spread - 1.0
        if self.config.rule == "log":
            self.value *= math.exp(min(self.config.learning_rate * error, 1.0))
        elif self.config.rule == "linear":
            self.value += self.config.learning_rate * error
        elif self.config.rule != "none":
            raise InputError(
                f"GuidanceConfig.rule must be 'log', 'linear' or 'none', got {self.config.rule!r}"
            )
        self.value = min(max(self.value, self.config.minimum), self.config.maximum)
        return self.value
