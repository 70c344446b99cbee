"""Training any world model on a dataset's windows, to measure what it imagines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from polygrad_fast.arguments import as_device
from polygrad_fast.config import SamplerConfig, TrainConfig, from_dict
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.data.replay import ReplayBuffer
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.offline.last_checkpoint import LastCheckpoint
from polygrad_fast.offline.loop import load_named_weights
from polygrad_fast.offline.model_training import ModelTraining
from polygrad_fast.world_models import WorldModel, build_world_model

KIND = "offline world model"
SPLIT_SEED = 0


def split_episodes(
    dataset: OfflineDataset, held_out: float
) -> tuple[OfflineDataset, OfflineDataset]:
    """Return the episodes that world models train on, and those that they are measured on, the same
    for every seed.

    Args:
        dataset: both together.
        held_out: share of the episodes, rounded down.

    Raises:
        InputError: that is no episode.
    """
    trained, measured = dataset.split(held_out, SPLIT_SEED)
    if measured is None:
        raise InputError(
            f"{dataset.source} must have episodes enough for a held-out share of {held_out:g}, got "
            f"{dataset.num_episodes}"
        )
    return trained, measured


def replay_of(dataset: OfflineDataset, horizon: int, device: torch.device) -> ReplayBuffer:
    """Return a dataset's steps in a replay buffer, which gives windows of `horizon` steps.

    Raises:
        InputError: no episode has such a window.
    """
    dims = dataset.observation_dim, dataset.action_dim
    total = len(dataset)
    replay = ReplayBuffer(max(total, horizon), horizon, *dims, device)
    columns = (
        dataset.observations,
        dataset.actions,
        dataset.rewards[:, None],
        dataset.terminals[:, None],
    )
    last_rows = np.flatnonzero(dataset.ends)
    own_last = np.repeat(last_rows, np.diff(last_rows, prepend=-1))  # of each row's episode
    rows = np.arange(total)
    window_end = rows + horizon - 1
    is_start = (window_end <= own_last) | dataset.terminals[own_last]
    starts = np.stack([rows, np.minimum(window_end, own_last)], axis=1)[is_start]
    state = {
        "total_steps": total,
        "total_episodes": dataset.num_episodes,
        "episode_starts": torch.tensor([total]),
        "steps": torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32)),
        "starts": torch.from_numpy(starts),
    }
    replay.load_state_dict(replay.state_dict() | state)
    if replay.num_windows == 0:
        raise InputError(
            f"{dataset.source} must have episodes of at least {horizon} steps, the horizon, got "
            f"none in {dataset.num_episodes}"
        )
    return replay


class WorldModelTraining(ModelTraining):
    """Train a world model on windows of a dataset.

    Implements `polygrad_fast.offline.loop.Training`.

    Args:
        dataset: actions in [-1, 1]; the moments of its steps normalize.
        config: resolved; what it says of world model, normalizer, rows of metrics, checkpoints and
            threads is read, its intervals counted in updates.
        total_updates: how many to take.
        seed: of weights, windows and noise.
        device: as `as_device` takes it.

    Attributes:
        model: the world model. normalizer: of the dataset's steps.

    Raises:
        InputError: no episode is as long as the horizon.
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        config: TrainConfig,
        total_updates: int,
        seed: int = 0,
        device: str | torch.device = "auto",
    ):
        self.config, device = config, as_device(device)
        self.replay = replay_of(dataset, config.horizon, device)
        normalizer = Normalizer(dataset.observation_dim, dataset.action_dim).to(device)
        normalizer.update(self.replay.moments(), config.normalizer.min_std())
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
            torch.manual_seed(seed)
            model = _build(config, normalizer, device)
        draws = torch.Generator(device).manual_seed(seed)
        super().__init__(model, normalizer, draws, device, total_updates, config.log_interval)

    def update(self) -> None:
        """Take one gradient step on a batch of windows."""
        windows = self.replay.sample(self.config.world_model_training.batch_size, self.draws)
        self.averages.add(self.model.update(windows, self.draws))


@dataclass(frozen=True, eq=False)
class TrainedWorldModel:
    """A world model of an `offline world model` run.

    Attributes:
        model: its averaged network imagines. normalizer: of the dataset's steps.
        config: what it imagines with.
    """

    model: WorldModel
    normalizer: Normalizer
    config: TrainConfig


def load_world_model(
    run_dir: Path, sampler: SamplerConfig | None = None, device: str | torch.device = "auto"
) -> TrainedWorldModel:
    """Return the world model of a run's last checkpoint; its guidance scale is the initial one.

    Args:
        run_dir: of the run.
        sampler: of trajectory diffusion, instead of the run's own.
        device: as `as_device` takes it.

    Raises:
        CheckpointError: no such run, or none of its checkpoints can be used.
    """
    last = LastCheckpoint.of(run_dir, KIND)
    config = from_dict(last.stored["config"], TrainConfig)
    if sampler is not None:
        config = replace(config, sampler=sampler)
    device = as_device(device)
    normalizer = Normalizer(*last.dims).to(device)
    model = _build(config, normalizer, device)
    modules = {**model.modules(), "normalizer": normalizer}
    load_named_weights(modules, last.weights, last.source)
    return TrainedWorldModel(model, normalizer, config)


def _build(config: TrainConfig, normalizer: Normalizer, device: torch.device) -> WorldModel:
    bounds = (torch.full((normalizer.action_dim,), bound) for bound in (-1.0, 1.0))
    return build_world_model(config, normalizer, tuple(bounds), device)
