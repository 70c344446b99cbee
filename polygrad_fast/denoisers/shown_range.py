"""How far the data reach, beyond which a network's answers are guesses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

UNKNOWN = torch.finfo(torch.float32).max
"""Stands for no bound."""


class ShownRange(nn.Module):
    """Bounds of what windows have shown: what a model imagines stays within.

    A network that is rolled out meets observations it has never seen; one answer beyond all data
    leads to a worse one, and after some steps a few trajectories of a batch outweigh all others.
    The bounds only ever widen; before the first window there are none. They are in normalized
    units; `keep_raw` follows a change of the moments.

    Args:
        observation_dim: S.

    Attributes:
        lowest, highest: of normalized observations and reward, [S + 1] each.
    """

    def __init__(self, observation_dim: int):
        super().__init__()
        self.register_buffer("lowest", torch.full((observation_dim + 1,), -UNKNOWN))
        self.register_buffer("highest", torch.full((observation_dim + 1,), UNKNOWN))
        self.noted = {"lowest": "lowest", "highest": "highest"}

    @torch.no_grad()
    def note(self, observations: Tensor, rewards: Tensor, counts: Tensor) -> None:
        """Widen the bounds to normalized observations [..., S] and rewards [...] of the steps whose
        weight [...] is above 0, of which there is at least one."""
        steps = torch.cat([observations, rewards.unsqueeze(-1)], dim=-1).flatten(0, -2)
        counts = counts.reshape(-1, 1) > 0
        low = torch.where(counts, steps, UNKNOWN).amin(0)
        high = torch.where(counts, steps, -UNKNOWN).amax(0)
        nothing = self.lowest <= -UNKNOWN
        self.lowest.copy_(torch.where(nothing, low, self.lowest.minimum(low)))
        self.highest.copy_(torch.where(nothing, high, self.highest.maximum(high)))

    def clamp(self, observations: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized observations [..., S] and rewards [...] within the bounds; NaN stays
        NaN, what is infinite comes to a bound."""
        return within(self.lowest, self.highest, observations, rewards)

    def inside(self, observations: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Return which numbers that `clamp` has returned lie on no bound."""
        low, high = self.lowest, self.highest
        return (
            (observations > low[:-1]) & (observations < high[:-1]),
            (rewards > low[-1]) & (rewards < high[-1]),
        )

    @torch.no_grad()
    def keep_raw(self, shift: Tensor, ratio: Tensor) -> None:
        """Keep the bounds where they are in raw numbers, after the moments have changed.

        Args:
            shift, ratio: that turn a number normalized before into one normalized now, (x - shift)
                / ratio, [S + 1] each.
        """
        for bound in (self.lowest, self.highest):
            known = bound.abs() < UNKNOWN
            bound.copy_(torch.where(known, (bound - shift) / ratio, bound))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        for name, bound in self.named_buffers():  # older checkpoints have none
            state_dict.setdefault(prefix + name, bound)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def within(
    lowest: Tensor, highest: Tensor, observations: Tensor, rewards: Tensor
) -> tuple[Tensor, Tensor]:
    """Return observations [..., S] and rewards, of any shape, within bounds of [S + 1] each."""
    observations = observations.clamp(lowest[:-1], highest[:-1])
    return observations, rewards.clamp(lowest[-1], highest[-1])


def shown_ranges(modules: Iterable[nn.Module]) -> Iterator[ShownRange]:
    """Yield the ranges in these modules."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, ShownRange):
                yield part
