"""Tuning of the guidance scale delta (equation 10 and the released code's rule)."""

from __future__ import annotations

import math

from torch import Tensor

from polygrad_fast.config import GuidanceConfig
from polygrad_fast.errors import InputError


def spread(standardized_actions: Tensor, statistic: str) -> Tensor:
    """Return the spread of standardized actions (a - mu) / sigma, [..., A], which is 1 for
    on-policy actions.

    "std": mean over action dimensions of the standard deviation (equation 9, as released);
    "mean_abs": E|z| / sqrt(2 / pi).
    """
    if statistic == "mean_abs":
        return standardized_actions.abs().mean() / math.sqrt(2 / math.pi)
    if statistic != "std":
        raise InputError(f"statistic must be 'std' or 'mean_abs', got {statistic!r}")
    return standardized_actions.flatten(0, -2).std(dim=0).mean()


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
