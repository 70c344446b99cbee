"""How far the data reach, beyond which a network's answers are guesses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

UNKNOWN = torch.finfo(torch.float32).max
"""Stands for no bound."""


class ShownRange(nn.Module):
    """Bounds of what windows have shown: what a model imagines stays within.

    A network that is rolled out meets observations it has never seen; one answer beyond all data
    leads to a worse one, and after some steps a few trajectories of a batch outweigh all others.
    The bounds only ever widen; before the first window there are none. They are kept in normalized
    units, so that a bound noted before a refresh of the moments is a little off after it.

    Args:
        observation_dim: S.

    Attributes:
        lowest, highest: of normalized observations and reward, [S + 1] each.
    """

    def __init__(self, observation_dim: int):
        super().__init__()
        self.register_buffer("lowest", torch.full((observation_dim + 1,), -UNKNOWN))
        self.register_buffer("highest", torch.full((observation_dim + 1,), UNKNOWN))

    @torch.no_grad()
    def note(self, observations: Tensor, rewards: Tensor, counts: Tensor) -> None:
        """Widen the bounds to normalized observations [..., S] and rewards [...] of the steps whose
        weight [...] is not 0."""
        steps = torch.cat([observations, rewards.unsqueeze(-1)], dim=-1).flatten(0, -2)
        counts = counts.reshape(-1, 1) > 0
        low = torch.where(counts, steps, UNKNOWN).amin(0)
        high = torch.where(counts, steps, -UNKNOWN).amax(0)
        nothing = self.lowest <= -UNKNOWN
        self.lowest.copy_(torch.where(nothing, low, self.lowest.minimum(low)))
        self.highest.copy_(torch.where(nothing, high, self.highest.maximum(high)))

    def clamp(self, observations: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized observations [..., S] and rewards [...] within the bounds; NaN stays
        NaN."""
        observations = observations.clamp(self.lowest[:-1], self.highest[:-1])
        return observations, rewards.clamp(self.lowest[-1], self.highest[-1])

    def holds(self, observations: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the same numbers `clamp` leaves as they are."""
        low, high = self.lowest, self.highest
        return (
            (observations >= low[:-1]) & (observations <= high[:-1]),
            (rewards >= low[-1]) & (rewards <= high[-1]),
        )
