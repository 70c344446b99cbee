"""Mean and standard deviation of rows that come in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMoments:
    """Mean and population standard deviation of all rows ever merged, per column.

    Count, mean and sum of squared deviations are merged with those of each part (Chan, Golub,
    LeVeque 1979), on the host in float64 and of values relative to the first row: a constant column
    then has a deviation of exactly zero, which a normalizer can recognize.

    Args:
        width: number of columns.

    Attributes:
        count: rows merged so far.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._origin = torch.zeros(width, dtype=torch.float64)
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._m2 = torch.zeros(width, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """The mean, float64 [width]; needs at least one row, as `std` does."""
        return self._mean + self._origin

    @property
    def std(self) -> Tensor:
        """The population standard deviation, float64 [width]."""
        return (self._m2 / self.count).sqrt()

    def merge(self, rows: Tensor) -> None:
        """Take in further rows, float64 [n, width] on the CPU, at least one."""
        if self.count == 0:
            self._origin = rows[0].clone()
        values = rows - self._origin
        mean = values.mean(dim=0)
        m2 = (values - mean).square().sum(dim=0)
        delta = mean - self._mean
        new, total = len(rows), self.count + len(rows)
        self._mean = self._mean + delta * (new / total)
        self._m2 = self._m2 + m2 + delta.square() * (self.count * new / total)
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Return count and tensors under names that start with "moment_"."""
        return {
            "moment_steps": self.count,
            "moment_origin": self._origin.clone(),
            "moment_mean": self._mean.clone(),
            "moment_m2": self._m2.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; other entries are not read."""
        self.count = state["moment_steps"]
        self._origin, self._mean, self._m2 = (
            state[f"moment_{name}"].cpu().clone() for name in ("origin", "mean", "m2")
        )
