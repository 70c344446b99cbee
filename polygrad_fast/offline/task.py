"""A dataset in the units of offline learning, and the environment that it is of."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from polygrad_fast.data.actions import ActionScaler
from polygrad_fast.data.d4rl import REFERENCE_RETURNS
from polygrad_fast.data.environment import check_spaces, make_environment
from polygrad_fast.data.load import load_dataset
from polygrad_fast.data.offline_dataset import FLAGS, FLOATS, OfflineDataset
from polygrad_fast.data.windows import ACTION_ROUNDING
from polygrad_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class OfflineTask:
    """A dataset whose actions are in [-1, 1], the bounds of its environment.

    Attributes:
        dataset: actions scaled; those of D4RL's environments are in [-1, 1] already.
        env_id: of the environment; None: not known.
        space: the environment's actions.
        identity: what a run's config.json says of it: dataset, dataset_env_id (that the dataset
            names), dataset_fingerprint, observation_dim, action_low, action_high.
    """

    dataset: OfflineDataset
    env_id: str | None
    space: gymnasium.spaces.Box
    identity: dict[str, Any]

    @property
    def scaler(self) -> ActionScaler:
        """Between [-1, 1] and the environment's actions."""
        return ActionScaler(self.space, rescale=True)


def load_task(source: str, env_id: str | None = None) -> OfflineTask:
    """Read a dataset and scale its actions from their environment's bounds to [-1, 1].

    Where neither `env_id` nor the dataset names the environment, the bounds are -1 and 1.

    Args:
        source: see `polygrad_fast.data.load_dataset`.
        env_id: the environment; None: the one that the dataset names.

    Raises:
        InputError: no dataset, an environment that cannot be made, has unbounded actions or other
            dimensions, or actions beyond the bounds.
    """
    dataset = load_dataset(source)
    own, env_id = dataset.env_id, env_id or dataset.env_id
    dims = dataset.observation_dim, dataset.action_dim
    # D4RL's versions cannot be made any more
    if env_id is None or (env_id == own and own in REFERENCE_RETURNS):
        space = gymnasium.spaces.Box(-1.0, 1.0, (dataset.action_dim,), np.float32)
    else:
        env = make_environment(env_id)
        found, space = check_spaces(env), env.action_space
        env.close()
        if found != dims:
            raise InputError(
                f"{source} must have (observation, action) dimensions {found} as {env_id}, got "
                f"{dims}"
            )
    scaler = ActionScaler(space, rescale=True)
    if not scaler.rescaled:
        raise InputError(f"{env_id} must have bounded actions for offline learning, got {space}")
    largest = ACTION_ROUNDING * (space.high - space.low) / 2
    outside = (dataset.actions < space.low - largest) | (dataset.actions > space.high + largest)
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise InputError(
            f"{source}: actions must lie in [{space.low[column]:g}, {space.high[column]:g}], the "
            f"bounds of {env_id or 'an unknown environment'} (see --env-id), got "
            f"{dataset.actions[row, column]:g} in row {row:,}"
        )
    identity = {
        "dataset": str(Path(source).absolute()) if Path(source).exists() else source,
        "dataset_env_id": dataset.env_id,
        "dataset_fingerprint": dataset_fingerprint(dataset),
        "observation_dim": dataset.observation_dim,
        "action_low": space.low.tolist(),
        "action_high": space.high.tolist(),
    }
    scaled = dataclasses.replace(dataset, actions=scaler.from_environment(dataset.actions))
    return OfflineTask(scaled, env_id, space, identity)


def dataset_fingerprint(dataset: OfflineDataset) -> str:
    """Return a hash of a dataset's arrays."""
    digest = hashlib.sha256()
    for name in (*FLOATS, *FLAGS, "ends"):
        array = getattr(dataset, name)
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()
