"""Rows of trajectories as Policy-Guided Diffusion sees them: actions before their tanh, every
channel standardized."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from polygrad_fast.errors import InputError

ACTION_LIMIT = 0.999
"""Actions are clipped to it on both sides before the arctanh."""
SMALLEST_STD = 1e-6
"""A channel that varies less, relative to its mean where that is above 1, counts as constant: its
rounding errors are not to be blown up to unit size."""


class TrajectoryParts(NamedTuple):
    """Raw parts of trajectories."""

    observations: Tensor
    """[..., S]."""
    actions: Tensor
    """[..., A], in (-1, 1)."""
    rewards: Tensor
    """[...]."""
    terminals: Tensor
    """[...], 0 or 1."""


class TrajectoryNormalizer(nn.Module):
    """z = (v - mean) / std of the channels v = [observation | arctanh(action) | reward | terminal].

    Args:
        mean, std: [S + A + 2], finite, std above 0.
        observation_dim, action_dim: S and A.

    Raises:
        InputError: moments of another shape, not finite, or an std of 0 or less.
    """

    def __init__(self, mean: Tensor, std: Tensor, observation_dim: int, action_dim: int):
        super().__init__()
        size = observation_dim + action_dim + 2
        for name, moment in (("mean", mean), ("std", std)):
            if tuple(moment.shape) != (size,) or not torch.isfinite(moment).all():
                raise InputError(
                    f"the {name} of trajectories must be {size} finite numbers, got "
                    f"{moment.tolist()}"
                )
        if not (std > 0).all():
            raise InputError(f"the std of trajectories must be above 0, got {std.tolist()}")
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.register_buffer("mean", mean.to(torch.float32).clone())
        self.register_buffer("std", std.to(torch.float32).clone())

    @classmethod
    def from_channels(
        cls, channels: Tensor, weights: Tensor, observation_dim: int, action_dim: int
    ) -> TrajectoryNormalizer:
        """Return one with the mean and the population standard deviation of weighted rows.

        A constant channel gets a standard deviation of 1, see `SMALLEST_STD`.

        Args:
            channels: [n, S + A + 2], see `raw_channels`.
            weights: how often each row counts, [n], not all 0.
            observation_dim, action_dim: S and A.
        """
        weights = weights.to(torch.float64)
        weights = weights / weights.sum()
        values = channels.to(torch.float64)
        mean = weights @ values
        std = (weights @ (values - mean).square()).sqrt()
        std[std <= SMALLEST_STD * mean.abs().clamp(min=1)] = 1
        return cls(mean, std, observation_dim, action_dim)

    @property
    def action_mean(self) -> Tensor:
        """Mean [A] of the actions before their tanh."""
        return self.mean[self.observation_dim : -2]

    @property
    def action_std(self) -> Tensor:
        """Standard deviation [A] of the actions before their tanh."""
        return self.std[self.observation_dim : -2]

    def normalize(self, parts: TrajectoryParts) -> Tensor:
        """Return normalized trajectories [..., S + A + 2]."""
        return (raw_channels(parts) - self.mean) / self.std

    def unnormalize(self, trajectories: Tensor) -> TrajectoryParts:
        """Return raw parts of normalized trajectories [..., S + A + 2]: actions by tanh, terminals
        1 where above 0.5."""
        channels = trajectories * self.std + self.mean
        sizes = [self.observation_dim, self.action_dim, 1, 1]
        observations, actions, rewards, terminals = channels.split(sizes, dim=-1)
        return TrajectoryParts(
            observations,
            torch.tanh(actions),
            rewards.squeeze(-1),
            (terminals.squeeze(-1) > 0.5).to(channels.dtype),
        )


def raw_channels(parts: TrajectoryParts) -> Tensor:
    """Return [observation | arctanh(action) | reward | terminal], [..., S + A + 2], actions clipped
    to `ACTION_LIMIT` first."""
    actions = torch.arctanh(parts.actions.clamp(-ACTION_LIMIT, ACTION_LIMIT))
    columns = parts.observations, actions, parts.rewards[..., None], parts.terminals[..., None]
    return torch.cat([column.to(parts.observations.dtype) for column in columns], dim=-1)
