"""The guidance scale delta, tuned while training (equation 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from polygrad_fast.config import GuidanceConfig
from polygrad_fast.errors import InputError


class GuidanceTuner:
    """Hold delta and move it so that the spread of standardized actions tends to 1.

    Args:
        config: start, rule and bounds.
        device: where delta is, a float64 scalar, and is tuned without being read on the host.
    """

    def __init__(self, config: GuidanceConfig, device: torch.device | str = "cpu"):
        self.config, self._device = config.resolved(), torch.device(device)
        self.value = config.initial

    @property
    def value(self) -> Tensor:
        """Delta; set by a number or a scalar."""
        return self._value

    @value.setter
    def value(self, value: Tensor | float) -> None:
        self._value = self._scalar(value)

    def update(self, measured_spread: Tensor | float) -> Tensor:
        """Apply one step of the configured rule and return the new delta.

        Where the spread is not finite, delta stays.
        """
        config, value = self.config, self._value
        spread = self._scalar(measured_spread)
        step = config.learning_rate * (spread - 1.0)
        if config.rule == "log":
            moved = value * step.clamp(max=1.0).exp()
        elif config.rule == "linear":
            moved = value + step
        elif config.rule == "none":
            moved = value
        else:
            raise InputError(
                f"GuidanceConfig.rule must be 'log', 'linear' or 'none', got {config.rule!r}"
            )
        moved = moved.clamp(config.minimum, config.maximum)
        self._value = torch.where(spread.isfinite(), moved, value)
        return self._value

    def _scalar(self, value: Tensor | float) -> Tensor:
        if torch.is_tensor(value):
            return value.to(self._device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self._device)  # without a copy
