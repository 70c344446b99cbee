"""A dataset of episodes, checked, and what offline agents learn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from polygrad_fast.errors import InputError
from polygrad_fast.trajectory_normalizer import TrajectoryParts
from polygrad_fast.transitions import Transitions

FLOATS = ("observations", "actions", "rewards", "next_observations")
FLAGS = ("terminals", "timeouts")


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """R environment steps of whole episodes, one after the other; arrays cannot be written to.

    Args:
        observations, next_observations: numbers [R, S].
        actions: numbers [R, A].
        rewards: numbers [R].
        terminals: whether the environment ended the episode in this step (its value is 0), [R].
        timeouts: whether the episode was cut off after this step, [R].
        source: names file or folder in errors.
        ends: the last step of each episode, [R]; None: those of terminals and timeouts. The last
            row is one in any case.
        true_next: whether a cut-off episode's last next observation is what the environment
            returned; where it is not (D4RL arrays), these rows are no transitions.
        name: of the dataset, as "hopper-medium-v2"; None: not known.
        env_id: of the environment that it was collected in; None: not known.
        recipe: how it was collected, as its file says.

    Attributes:
        Those of the arguments: float32 and bool arrays.

    Raises:
        InputError: no rows, another rank or length, a value that is not finite in float32, or a
            flag other than 0 and 1; the message names source and array.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray
    source: str = "dataset"
    ends: np.ndarray | None = None
    true_next: bool = False
    name: str | None = None
    env_id: str | None = None
    recipe: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        checked = {name: as_numbers(getattr(self, name), name, self.source) for name in FLOATS}
        rows = len(checked["observations"])
        if rows == 0:
            raise InputError(f"{self.source}: observations must hold at least one step, got none")
        checked |= {name: as_flags(getattr(self, name), name, self.source) for name in FLAGS}
        if self.ends is None:
            checked["ends"] = checked["terminals"] | checked["timeouts"]
        else:
            checked["ends"] = as_flags(self.ends, "ends", self.source).copy()
        check_lengths(checked, self.source)
        sizes = checked["observations"].shape[1], checked["next_observations"].shape[1]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{self.source}: next_observations must have {sizes[0]} columns as observations, "
                f"got {sizes[1]}"
            )
        checked["ends"][-1] = True
        for name, array in checked.items():
            array = array.view()  # the caller's own stays writable
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def observation_dim(self) -> int:
        """S."""
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        """A."""
        return self.actions.shape[1]

    @property
    def num_episodes(self) -> int:
        """Number of episodes, unfinished ones included."""
        return int(self.ends.sum())

    def episode_returns(self) -> np.ndarray:
        """Return each episode's sum of rewards, float64 [episodes]."""
        starts = np.flatnonzero(np.append(True, self.ends[:-1]))
        return np.add.reduceat(self.rewards.astype(np.float64), starts)

    @classmethod
    def concatenate(cls, parts: Sequence[OfflineDataset]) -> OfflineDataset:
        """Return the episodes of several datasets in one, which is of the first one's environment.

        Raises:
            InputError: no dataset, or other dimensions than the first one's.
        """
        dims = {(part.observation_dim, part.action_dim) for part in parts}
        if len(dims) != 1:
            raise InputError(
                f"datasets must be of one observation and action dimension to be concatenated, got "
                f"{sorted(dims)}"
            )
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in (*FLOATS, *FLAGS, "ends")
        }
        true_next = all(part.true_next for part in parts)
        return dataclasses.replace(parts[0], **arrays, true_next=true_next, recipe=None)

    def take_episodes(self, episodes: np.ndarray) -> OfflineDataset:
        """Return the dataset of some episodes, numbered from 0, in the order given.

        Raises:
            InputError: no episode, or one that is not there.
        """
        episodes = np.asarray(episodes, dtype=np.int64)
        if episodes.ndim != 1 or not len(episodes):
            raise InputError(f"{self.source}: at least one episode must be taken, got none")
        if episodes.min() < 0 or episodes.max() >= self.num_episodes:
            raise InputError(
                f"{self.source}: episodes must be in [0, {self.num_episodes}), got "
                f"{int(episodes.min())} to {int(episodes.max())}"
            )
        stops = np.flatnonzero(self.ends) + 1
        starts = np.append(0, stops[:-1])
        lengths = (stops - starts)[episodes]
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        rows = np.repeat(starts[episodes], lengths) + offsets
        arrays = {name: getattr(self, name)[rows] for name in (*FLOATS, *FLAGS, "ends")}
        return dataclasses.replace(self, **arrays)

    def split(
        self, validation_fraction: float = 0.05, seed: int = 0
    ) -> tuple[OfflineDataset, OfflineDataset | None]:
        """Hold out int(validation_fraction * episodes) episodes, drawn without replacement.

        Returns:
            The dataset of the others, in order, and that of the held-out ones in the order drawn;
            None where that is no episode.

        Raises:
            InputError: a fraction outside [0, 1).
        """
        if not 0 <= validation_fraction < 1:
            raise InputError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        number = int(validation_fraction * self.num_episodes)
        drawn = np.random.default_rng(seed).choice(self.num_episodes, number, replace=False)
        return self.without(drawn), self.take_episodes(drawn) if number else None

    def without(self, episodes: np.ndarray) -> OfflineDataset:
        """Return the dataset of all but some episodes; itself where there are none to leave out."""
        if not len(episodes):
            return self
        return self.take_episodes(np.setdiff1d(np.arange(self.num_episodes), episodes))

    def parts(self) -> TrajectoryParts:
        """Return observations, actions, rewards and terminals, float32, as tensors; copies."""
        observations, actions, rewards, terminals = (
            torch.from_numpy(array.astype(np.float32))
            for array in (self.observations, self.actions, self.rewards, self.terminals)
        )
        return TrajectoryParts(observations, actions, rewards, terminals)

    def transitions(self) -> Transitions:
        """Return what an agent learns from: every step, raw, terminals as `done`.

        Without the steps after which an episode was cut off, where their next observations are
        another episode's (`true_next`).
        """
        kept = slice(None) if self.true_next else np.flatnonzero(~self.timeouts)
        arrays = (self.observations, self.actions, self.rewards, self.next_observations)
        tensors = [torch.from_numpy(array[kept].copy()) for array in arrays]
        terminals = torch.from_numpy(self.terminals[kept].astype(np.float32))
        return Transitions.from_parts(*tensors, terminals)


def as_numbers(given: Any, name: str, source: str) -> np.ndarray:
    """Return a dataset's array of numbers as float32, [rows] for rewards, else [rows, size]; not a
    copy where it is one already.

    Raises:
        InputError: no numbers, another rank, or a value that is not finite in float32.
    """
    try:
        array = np.asarray(given)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iuf":
        kind = type(given).__name__ if array.dtype == object else str(array.dtype)
        raise InputError(f"{source}: {name} must be an array of numbers, got {kind}")
    rank = 1 if name == "rewards" else 2
    if array.ndim != rank or 0 in array.shape[1:]:
        shape = "[steps]" if rank == 1 else "[steps, size]"
        raise InputError(f"{source}: {name} must have shape {shape}, got {list(array.shape)}")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(numbers).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(numbers))[0])
        raise InputError(
            f"{source}: {name}{list(index)} must be a finite float32 number, got {array[index]}"
        )
    return numbers


def as_flags(given: Any, name: str, source: str) -> np.ndarray:
    """Return a dataset's flags as bool [rows].

    Raises:
        InputError: another rank, or a value other than 0 and 1.
    """
    array = np.asarray(given)
    if array.ndim != 1:
        raise InputError(f"{source}: {name} must have shape [steps], got {list(array.shape)}")
    if array.dtype == bool:
        return array
    wrong = np.flatnonzero(~((array == 0) | (array == 1)))
    if len(wrong):
        raise InputError(f"{source}: {name}[{wrong[0]}] must be 0 or 1, got {array[wrong[0]]!s}")
    return array.astype(bool)


def check_lengths(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raise InputError unless a dataset's arrays have as many rows as its observations."""
    rows = len(arrays["observations"])
    for name, array in arrays.items():
        if len(array) != rows:
            raise InputError(
                f"{source}: {name} must have {rows:,} rows as observations, got {len(array):,}"
            )
