"""Adam on a network, and the average of its weights that is used."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.errors import InputError


class AveragedTrainer:
    """Minimize losses of a network by Adam and keep an exponential moving average of its weights.

    The average is overwritten instead of moved for the first `ema_start` updates, and touched every
    `ema_interval` updates only (paper, appendix A: decay 0.99, every 10, from 2000 on).

    Args:
        model: the network; its weights change in place.
        learning_rate, ema_decay, ema_interval, ema_start: as in `DenoiserConfig`.
        average_at_start: whether the average is touched after update 1, interval + 1, ..
            (PolyGRAD's released code) or after update interval, 2 interval, .. (that of
            policy-guided diffusion).

    Raises:
        InputError: the network cannot be copied.

    Attributes:
        model: the network being trained.
        ema_model: its averaged copy.
        num_updates: how often `minimize` has been called.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        ema_decay: float,
        ema_interval: int = 1,
        ema_start: int = 0,
        average_at_start: bool = True,
    ):
        self.model = model
        try:
            self.ema_model = copy.deepcopy(model).requires_grad_(False).eval()
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} cannot be copied for its average: {error}"
            ) from error
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self.num_updates = 0
        self._ema_decay, self._ema_interval, self._ema_start = ema_decay, ema_interval, ema_start
        self._ema_phase = 0 if average_at_start else ema_interval - 1

    def minimize(self, loss: Tensor) -> None:
        """Take one Adam step on a scalar loss of `model`, then move the average if it is due."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.num_updates % self._ema_interval == self._ema_phase:
            self._move_average()
        self.num_updates += 1

    @torch.no_grad()
    def _move_average(self) -> None:
        decay = self._ema_decay if self.num_updates >= self._ema_start else 0.0
        averages, weights = list(self.ema_model.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        # running statistics, for instance
        for copied, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            copied.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer state and counter; the weights are saved with the other weights."""
        return {"optimizer": self.optimizer.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates = state["num_updates"]
