"""Windows of a dataset's episodes, normalized: what a trajectory diffusion model learns from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.arguments import as_integer
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.errors import InputError
from polygrad_fast.trajectory_normalizer import (
    TrajectoryNormalizer,
    TrajectoryParts,
    raw_channels,
)
from polygrad_fast.transitions import Transitions

ACTION_ROUNDING = 1e-3
"""How far beyond 1 an action may be, for instance of a bound in another precision."""


def window_starts(dataset: OfflineDataset, length: int, stride: int) -> np.ndarray:
    """Return the first rows of the windows that the released code takes.

    A start is valid if no episode ends before the last row of its window. Taken are every
    `stride`-th of the ascending list of valid starts (over all episodes together), the first row of
    each episode and windows with a terminal in their last row, where valid; without windows with a
    timeout in their last row, even if that is terminal too.

    Args:
        dataset: its rows in order.
        length: L, at least 1.
        stride: at least 1.

    Returns:
        int64 [W], ascending.

    Raises:
        InputError: length or stride below 1.
    """
    as_integer(length, "length of windows", 1)
    as_integer(stride, "stride of windows", 1)
    number = len(dataset) - length + 1
    if number <= 0:
        return np.zeros(0, dtype=np.int64)
    ends_before = np.append(0, np.cumsum(dataset.ends))
    valid = ends_before[length - 1 : length - 1 + number] == ends_before[:number]
    last = slice(length - 1, length - 1 + number)
    first_rows = np.append(True, dataset.ends[:-1])[:number]
    taken = valid & (first_rows | dataset.terminals[last])
    taken[np.flatnonzero(valid)[::stride]] = True
    return np.flatnonzero(taken & ~dataset.timeouts[last])


class TrajectoryWindows:
    """Normalized windows of L rows [observation | arctanh(action) | reward | terminal].

    Holds each row once; windows are gathered when asked for.

    Args:
        dataset: what they are taken of.
        length, stride: see `window_starts`.
        normalizer: that of other windows, for a validation set; None: mean and population standard
            deviation over all rows of all windows, a row counted once per window it is in.

    Attributes:
        rows: normalized, float32 [n, S + A + 2]. starts: int64 [W]. normalizer: as above.

    Raises:
        InputError: no window, which names the longest episode, or actions beyond [-1, 1].
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        length: int,
        stride: int = 1,
        normalizer: TrajectoryNormalizer | None = None,
    ):
        starts = window_starts(dataset, length, stride)
        if not len(starts):
            stops = np.flatnonzero(dataset.ends) + 1
            longest = int(np.diff(stops, prepend=0).max())
            raise InputError(
                f"{dataset.source}: windows of {length} steps must lie within an episode and not "
                f"end where it was cut off, got none: the longest episode has {longest} steps"
            )
        largest = float(np.abs(dataset.actions).max())
        if largest > 1 + ACTION_ROUNDING:
            raise InputError(
                f"{dataset.source}: actions must lie in [-1, 1] for windows, which hold their "
                f"arctanh, got one of size {largest:g}"
            )
        channels = raw_channels(dataset.parts())
        if normalizer is None:
            changes = np.zeros(len(dataset) + 1, dtype=np.int64)
            changes[starts] = 1  # starts are distinct
            changes[starts + length] -= 1
            counts = torch.from_numpy(np.cumsum(changes[:-1]))
            dims = dataset.observation_dim, dataset.action_dim
            normalizer = TrajectoryNormalizer.from_channels(channels, counts, *dims)
        self.normalizer, self.length = normalizer, length
        device = normalizer.mean.device
        self.rows = channels.to(device).sub_(normalizer.mean).div_(normalizer.std)
        self.starts = torch.from_numpy(starts).to(device)
        self._offsets = torch.arange(length, device=device)

    def __len__(self) -> int:
        return len(self.starts)

    def gather(self, index: Tensor) -> Tensor:
        """Return the windows numbered `index` (int64 [B]) in a new tensor [B, L, S + A + 2]."""
        return self.rows[self.starts[index, None] + self._offsets]


def to_transitions(trajectories: TrajectoryParts) -> Transitions:
    """Return the transitions of raw trajectories of L rows, L - 1 of each, in order.

    Action, reward and terminal flag of the last row are left out: they have no next observation.

    Args:
        trajectories: [B, L, ..], L at least 2.

    Raises:
        InputError: fewer than 2 rows.
    """
    observations = trajectories.observations
    if observations.ndim != 3 or observations.shape[1] < 2:
        raise InputError(
            f"observations of trajectories must have shape [B, L, S] with L at least 2, got "
            f"{list(observations.shape)}"
        )
    return Transitions.from_parts(
        observations[:, :-1].flatten(0, 1),
        trajectories.actions[:, :-1].flatten(0, 1),
        trajectories.rewards[:, :-1].flatten(),
        observations[:, 1:].flatten(0, 1),
        trajectories.terminals[:, :-1].flatten(),
    )
