"""Training a dynamics ensemble on a dataset's transitions, for trajectories of an agent's policy
that are rolled out in it: the autoregressive baseline of policy-guided diffusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.arguments import as_device
from polygrad_fast.config import DynamicsConfig, from_dict
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.offline.diffusion import seeded
from polygrad_fast.offline.generation import fingerprint
from polygrad_fast.offline.last_checkpoint import LastCheckpoint
from polygrad_fast.offline.loop import load_named_weights
from polygrad_fast.offline.model_training import ModelTraining
from polygrad_fast.transitions import Transitions
from polygrad_fast.world_models import Ensemble

KIND = "offline ensemble"
MIN_STD = 1e-3
"""Least standard deviation that a channel is divided by."""


def build_ensemble(
    config: DynamicsConfig,
    normalizer: Normalizer,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Ensemble:
    """Return a new ensemble of actions in [-1, 1], which imagines `window_length` steps; its first
    weights are drawn from the generator."""
    low, high = (torch.full((normalizer.action_dim,), bound) for bound in (-1.0, 1.0))
    length = config.window_length
    return Ensemble(config.ensemble, length, normalizer, (low, high), device, generator)


def moments_of(transitions: Transitions) -> Normalizer:
    """Return the normalizer of a dataset's transitions; terminal flags stay as they are."""
    fields = {}
    for name in ("observations", "actions", "rewards"):
        values = getattr(transitions, name).to(torch.float64)
        fields[name] = values.mean(0).float(), values.std(0, correction=0).float()
    normalizer = Normalizer(transitions.observation_dim, transitions.action_dim)
    normalizer.update(fields, dict.fromkeys(fields, MIN_STD))
    return normalizer


class EnsembleTraining(ModelTraining):
    """Train the ensemble on batches of a dataset's transitions.

    Implements `polygrad_fast.offline.loop.Training`.

    Args:
        dataset: actions in [-1, 1].
        config: sizes and options.
        seed: of weights, batches and bootstraps.
        device: as `as_device` takes it.

    Attributes:
        model: the ensemble. normalizer: of the dataset's transitions.

    Raises:
        InputError: fewer transitions than a batch.
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        config: DynamicsConfig,
        seed: int = 0,
        device: str | torch.device = "auto",
    ):
        self.config, device = config, as_device(device)
        self.transitions = dataset.transitions().to(device)
        size = config.ensemble.batch_size
        if len(self.transitions) < size:
            raise InputError(
                f"{dataset.source} must hold at least {size} transitions, those of a batch, got "
                f"{len(self.transitions)}"
            )
        normalizer = moments_of(self.transitions).to(device)
        model = build_ensemble(config, normalizer, device, seeded(seed, 0))
        sizes = config.total_updates, config.log_interval
        super().__init__(model, normalizer, seeded(seed, 1), device, *sizes)

    def update(self) -> None:
        """Take one gradient step on a batch."""
        batch = self.transitions.sample(self.config.ensemble.batch_size, self.draws)
        self.averages.add(self.model.fit(batch, self.draws))


@dataclass(frozen=True, eq=False)
class EnsembleModel:
    """A trained ensemble.

    Attributes:
        model: its averaged networks imagine. config: it was trained with.
        stored: its run's config.json. num_updates: it was trained for.
    """

    model: Ensemble
    config: DynamicsConfig
    stored: dict[str, Any]
    num_updates: int

    def describe(self) -> dict[str, Any]:
        """Return what identifies it."""
        return {"num_updates": self.num_updates, "weights": fingerprint(self.model.network)}


def load_ensemble(run_dir: Path, device: str | torch.device = "auto") -> EnsembleModel:
    """Return the ensemble of the last checkpoint of an `offline ensemble` run.

    Raises:
        CheckpointError: no such run, or none of its checkpoints can be used.
    """
    last = LastCheckpoint.of(run_dir, KIND)
    config = from_dict(last.stored["config"], DynamicsConfig)
    device = as_device(device)
    normalizer = Normalizer(*last.dims).to(device)
    model = build_ensemble(config, normalizer, device)
    modules = {"ema_dynamics": model.network, "normalizer": normalizer}
    load_named_weights(modules, last.weights, last.source)
    return EnsembleModel(model, config, last.stored, last.num_updates)


def as_distribution(policy: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a policy as one that returns mean and standard deviation, 0 where it draws nothing."""

    def distribution(observations: Tensor) -> tuple[Tensor, Tensor]:
        found = policy(observations)
        return (found, torch.zeros_like(found)) if isinstance(found, Tensor) else found

    return distribution
