"""Transitions of an environment in one table, and batches drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polygrad_fast.arguments import as_integer
from polygrad_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class Transitions:
    """N transitions (s, a, r, d, s'), raw, one row each: a batch is one gather.

    Attributes:
        rows: float32 [N, 2 S + A + 2], the columns observation, action, reward, terminal, next
            observation. `pairs` are the first S + A of them, as critics read them.
        observation_dim, action_dim: S and A.

    Raises:
        InputError: `rows` is of another shape.
    """

    rows: Tensor
    observation_dim: int
    action_dim: int

    def __post_init__(self) -> None:
        width = 2 * self.observation_dim + self.action_dim + 2
        if self.rows.ndim != 2 or self.rows.shape[1] != width:
            raise InputError(
                f"rows of transitions must have shape [N, {width}] with observations of "
                f"{self.observation_dim} and actions of {self.action_dim} numbers, got "
                f"{list(self.rows.shape)}"
            )

    @classmethod
    def from_parts(
        cls,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_observations: Tensor,
        terminals: Tensor,
    ) -> Transitions:
        """Copy arrays into one table.

        Args:
            observations, next_observations: [N, S].
            actions: [N, A].
            rewards, terminals: [N] each; a terminal is 0 or 1, and 0 where an episode was cut off.

        Raises:
            InputError: ranks or lengths differ.
        """
        if observations.ndim != 2 or actions.ndim != 2:
            raise InputError(
                f"observations and actions must have shapes [N, S] and [N, A], got "
                f"{list(observations.shape)} and {list(actions.shape)}"
            )
        (number, observation_dim), action_dim = observations.shape, actions.shape[1]
        for name, tensor, wanted in (
            ("actions", actions, (number, action_dim)),
            ("rewards", rewards, (number,)),
            ("next_observations", next_observations, (number, observation_dim)),
            ("terminals", terminals, (number,)),
        ):
            if tuple(tensor.shape) != wanted:
                raise InputError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
        columns = (observations, actions, rewards[:, None], terminals[:, None], next_observations)
        rows = torch.empty(number, 2 * observation_dim + action_dim + 2, device=observations.device)
        torch.cat([column.to(rows.dtype) for column in columns], dim=1, out=rows)
        return cls(rows, observation_dim, action_dim)

    @classmethod
    def concatenate(cls, parts: Sequence[Transitions]) -> Transitions:
        """Return the transitions of several tables in one.

        Raises:
            InputError: no table, or other dimensions than the first one's.
        """
        dims = {(part.observation_dim, part.action_dim) for part in parts}
        if len(dims) != 1:
            raise InputError(
                f"transitions must be of one observation and action dimension to be concatenated, "
                f"got {sorted(dims)}"
            )
        return cls(torch.cat([part.rows for part in parts]), *dims.pop())

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def pairs(self) -> Tensor:
        """Observations and actions side by side, [N, S + A]."""
        return self.rows[:, : self.observation_dim + self.action_dim]

    @property
    def observations(self) -> Tensor:
        """[N, S]."""
        return self.rows[:, : self.observation_dim]

    @property
    def actions(self) -> Tensor:
        """[N, A]."""
        return self.pairs[:, self.observation_dim :]

    @property
    def rewards(self) -> Tensor:
        """[N]."""
        return self.rows[:, self.observation_dim + self.action_dim]

    @property
    def terminals(self) -> Tensor:
        """0 or 1, [N]."""
        return self.rows[:, self.observation_dim + self.action_dim + 1]

    @property
    def next_observations(self) -> Tensor:
        """[N, S]."""
        return self.rows[:, self.observation_dim + self.action_dim + 2 :]

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Transitions:
        """Draw a batch without replacement, each set of `batch_size` rows equally likely.

        Args:
            batch_size: at least 1, at most N.
            generator: of random numbers, on the CPU or on the table's device.

        Raises:
            InputError: more rows asked for than there are.
        """
        index = distinct_integers(len(self), batch_size, generator)
        rows = self.rows[index.to(self.rows.device)]
        return Transitions(rows, self.observation_dim, self.action_dim)

    def observation_moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and population standard deviation [S] of the observations, computed in
        float64."""
        observations = self.observations.to(torch.float64)
        mean, std = observations.mean(dim=0), observations.std(dim=0, correction=0)
        return mean.to(torch.float32), std.to(torch.float32)

    def to(self, device: str | torch.device) -> Transitions:
        """Return the transitions on a device."""
        return Transitions(self.rows.to(device), self.observation_dim, self.action_dim)


def distinct_integers(below: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `count` distinct integers in [0, below), int64, each set equally likely.

    Few out of many are drawn with replacement until no two are equal, in 1.7 attempts on average at
    most; else they are the beginning of a permutation.

    Raises:
        InputError: count is not in 1 .. below.
    """
    as_integer(count, "number of rows to draw", 1, below + 1)
    device = "cpu" if generator is None else generator.device
    if below < count * count:
        permutation = torch.randperm(below, generator=generator, device=device)
        return permutation[:count]
    while True:
        drawn = torch.randint(below, (count,), generator=generator, device=device)
        if len(torch.unique(drawn)) == count:
            return drawn
