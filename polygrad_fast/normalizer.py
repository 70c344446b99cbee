"""Per-field standardization of observations, actions, rewards and terminal flags."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polygrad_fast.errors import InputError

FIELDS = ("observations", "actions", "rewards", "terminals")
EPSILON = 1e-6


class Normalizer(nn.Module):
    """Standardize each field: normalize(x) = (x - mean) / (std + 1e-6); unnormalize is its inverse.

    The moments are buffers that are only ever changed in place, so that samplers and captured
    graphs that hold them see every refresh. At first they are 0 and 1, which leaves values as they
    are, as does a field of `from_moments` that is `None`.

    Args:
        observation_dim, action_dim: S and A.
    """

    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        self.observation_dim, self.action_dim = observation_dim, action_dim
        for field, dim in zip(FIELDS, (observation_dim, action_dim, 1, 1), strict=True):
            self.register_buffer(f"{field}_mean", torch.zeros(dim))
            self.register_buffer(f"{field}_scale", torch.ones(dim))

    @classmethod
    def from_moments(
        cls,
        observations: tuple[Tensor, Tensor],
        actions: tuple[Tensor, Tensor],
        rewards: tuple[Tensor, Tensor] | None = None,
        terminals: tuple[Tensor, Tensor] | None = None,
    ) -> Normalizer:
        """Build a normalizer from (mean, std) pairs.

        Args:
            observations: mean and std, [S] each.
            actions: mean and std, [A] each.
            rewards: mean and std, scalars or [1]; `None` leaves rewards unchanged.
            terminals: likewise for the 0/1 terminal flag.

        Raises:
            InputError: a shape differs between mean and std, or a moment is not finite, or a std
                is negative.
        """
        observation_dim = torch.as_tensor(observations[0]).numel()
        action_dim = torch.as_tensor(actions[0]).numel()
        normalizer = cls(observation_dim, action_dim)
        moments = dict(zip(FIELDS, (observations, actions, rewards, terminals), strict=True))
        normalizer.update({field: pair for field, pair in moments.items() if pair is not None})
        return normalizer

    @torch.no_grad()
    def update(
        self,
        moments: dict[str, tuple[Tensor, Tensor]],
        min_std: dict[str, float] | None = None,
    ) -> None:
        """Replace the moments of the given fields in place.

        Args:
            moments: field -> (mean, std).
            min_std: field -> lower bound of its standard deviation; early data may be constant (no
                terminal yet).

        Raises:
            InputError: unknown field, wrong shape, a moment that is not finite, or a negative std;
                no field was changed.
        """
        checked = {}
        for field, (mean, std) in moments.items():
            if field not in FIELDS:
                raise InputError(f"field must be one of {list(FIELDS)}, got {field!r}")
            target = self.get_buffer(f"{field}_mean")
            mean, std = (torch.as_tensor(m, dtype=torch.float32).reshape(-1) for m in (mean, std))
            if mean.shape != target.shape or std.shape != target.shape:
                raise InputError(
                    f"{field}: mean and std must be of shape {tuple(target.shape)} each, got "
                    f"{tuple(mean.shape)} and {tuple(std.shape)}"
                )
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std >= 0).all()):
                raise InputError(
                    f"{field}: moments must be finite and std non-negative, got mean "
                    f"{mean.tolist()} and std {std.tolist()}"
                )
            if min_std is not None:
                std = std.clamp(min=min_std.get(field, 0.0))
            checked[field] = mean, std + EPSILON
        for field, (mean, scale) in checked.items():
            self.get_buffer(f"{field}_mean").copy_(mean)
            self.get_buffer(f"{field}_scale").copy_(scale)

    def _moments(self, field: str) -> tuple[Tensor, Tensor]:
        if field not in FIELDS:
            raise InputError(f"field must be one of {list(FIELDS)}, got {field!r}")
        return getattr(self, f"{field}_mean"), getattr(self, f"{field}_scale")

    def state_moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and scale of observations and reward side by side, copies of [S + 1] each."""
        observations, rewards = self._moments("observations"), self._moments("rewards")
        mean, scale = (torch.cat(parts) for parts in zip(observations, rewards, strict=True))
        return mean, scale

    def normalize(self, x: Tensor, field: str) -> Tensor:
        """Map raw values [..., dim] of a field to normalized ones; rewards and terminals also
        without the last axis."""
        mean, scale = self._moments(field)
        return (x - mean) / scale

    def unnormalize(self, x: Tensor, field: str) -> Tensor:
        """Map normalized values of a field back to raw ones; shapes as in `normalize`."""
        mean, scale = self._moments(field)
        return x * scale + mean

    def normalize_trajectory(
        self, observations: Tensor, rewards: Tensor, terminals: Tensor
    ) -> Tensor:
        """Join raw [B, H, S], [B, H] and [B, H] into the normalized states [B, H, D], D = S + 2."""
        return torch.cat(
            [
                self.normalize(observations, "observations"),
                self.normalize(rewards, "rewards").unsqueeze(-1),
                self.normalize(terminals, "terminals").unsqueeze(-1),
            ],
            dim=-1,
        )
