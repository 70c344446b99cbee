"""Rows of a normalized trajectory, and the raw values that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polygrad_fast.errors import InputError

MAX_ACTION = 0.999
"""Actions are clipped to this before the inverse of tanh."""


class RawTrajectories(NamedTuple):
    """Raw values of trajectories of L rows."""

    observations: Tensor  # [..., L, S]
    actions: Tensor  # [..., L, A], in (-1, 1)
    rewards: Tensor  # [..., L]
    terminals: Tensor  # [..., L], 0 or 1


@dataclass(frozen=True, eq=False)
class TrajectoryScale:
    """Mean and standard deviation of the channels of a row, which is
    [observation | arctanh of the action | reward | done], D = S + A + 2.

    z = (v - mean) / std, with v = arctanh(clip(action, -0.999, 0.999)) for actions: policy-guided
    diffusion's normalization, which divides by std alone.

    Args:
        mean, std: float32 [D] each; a std of 0 is to be replaced by 1 before.
        observation_dim, action_dim: S and A.

    Raises:
        InputError: another shape, a number that is not finite, or a std that is not positive.
    """

    mean: Tensor
    std: Tensor
    observation_dim: int
    action_dim: int

    def __post_init__(self) -> None:
        wanted = (self.observation_dim + self.action_dim + 2,)
        for name, moment in (("mean", self.mean), ("std", self.std)):
            if tuple(moment.shape) != wanted or not torch.isfinite(moment).all():
                raise InputError(
                    f"{name} must be {wanted[0]} finite numbers for {self.observation_dim} "
                    f"observations, {self.action_dim} actions, reward and done, got shape "
                    f"{tuple(moment.shape)}: {moment.tolist()}"
                )
        if not (self.std > 0).all():
            raise InputError(f"std must be positive, got {self.std.tolist()}")

    @property
    def observations(self) -> slice:
        """The observation's columns."""
        return slice(0, self.observation_dim)

    @property
    def actions(self) -> slice:
        """The action's columns."""
        return slice(self.observation_dim, self.observation_dim + self.action_dim)

    def normalize(self, raw: RawTrajectories) -> Tensor:
        """Return the rows [..., L, D] of raw values."""
        inverse = torch.atanh(raw.actions.clamp(-MAX_ACTION, MAX_ACTION))
        ends = raw.rewards.unsqueeze(-1), raw.terminals.unsqueeze(-1)
        return (torch.cat([raw.observations, inverse, *ends], dim=-1) - self.mean) / self.std

    def unnormalize(self, trajectories: Tensor) -> RawTrajectories:
        """Return the raw values of rows [..., L, D]: action = tanh(.), terminal = 1 where above
        0.5, observation and reward unclipped."""
        values = trajectories * self.std + self.mean
        terminals = (values[..., -1] > 0.5).to(values.dtype)
        return RawTrajectories(
            values[..., self.observations],
            values[..., self.actions].tanh(),
            values[..., -2],
            terminals,
        )

    def to(self, device: str | torch.device) -> TrajectoryScale:
        """Return the scale on a device."""
        mean, std = self.mean.to(device), self.std.to(device)
        return TrajectoryScale(mean, std, self.observation_dim, self.action_dim)
