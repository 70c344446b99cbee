"""Training a trajectory diffusion model on a dataset's windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.arguments import as_device
from polygrad_fast.config import DiffuseConfig, from_dict
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.data.windows import TrajectoryWindows, window_starts
from polygrad_fast.denoisers.temporal_unet import TemporalUNet
from polygrad_fast.diffusion.edm import (
    EDMTrainer,
    edm_loss,
    epoch_batches,
    num_training_updates,
    training_sigma,
)
from polygrad_fast.offline.generation import fingerprint
from polygrad_fast.offline.last_checkpoint import LastCheckpoint
from polygrad_fast.offline.loop import Averages, load_named_weights, named_weights
from polygrad_fast.trajectory_normalizer import TrajectoryNormalizer

KIND = "offline diffuse"
VALIDATION_SEED = 0


def seeded(*numbers: int) -> torch.Generator:
    """Return a random stream on the CPU, independent of those of other numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class DiffusionTraining:
    """Train a U-Net by EDM's loss on the windows of a dataset, some episodes held out.

    Implements `polygrad_fast.offline.loop.Training`. Each epoch's order is that of a stream of its
    own, so that a training continues within one.

    Args:
        dataset: actions in [-1, 1].
        config: sizes and options.
        seed: of held-out episodes, weights, orders and noise.
        device: as `as_device` takes it.

    Attributes:
        network, trainer, normalizer: U-Net, its training with the averaged copy, and the windows'
            normalizer.

    Raises:
        InputError: no window, or fewer than a batch.
    """

    improved = False  # by no evaluation: the averaged weights of the last update are used

    def __init__(
        self,
        dataset: OfflineDataset,
        config: DiffuseConfig,
        seed: int = 0,
        device: str | torch.device = "auto",
    ):
        self.config, self.device, self._seed = config, as_device(device), seed
        training, held_out = dataset.split(config.validation_fraction, seed)
        self.windows = TrajectoryWindows(training, config.window_length, config.window_stride)
        self.normalizer = self.windows.normalizer
        self._validation = self._validation_windows(held_out)
        updates = num_training_updates(len(self.windows), config.training)
        self.total_updates = updates if config.total_updates is None else config.total_updates
        sizes = dataset.observation_dim, dataset.action_dim
        self.network = _build_network(config, *sizes, seeded(seed, 0)).to(self.device)
        self.trainer = EDMTrainer(
            self.network, self.total_updates, config.training, config.sigma_data
        )
        self._noise = seeded(seed, 1)
        self._batches = self._order()
        self._averages = Averages()

    @property
    def num_updates(self) -> int:
        """Updates taken so far."""
        return self.trainer.num_updates

    def update(self) -> None:
        """Take one gradient step on the next batch of windows."""
        batch = self.windows.gather(next(self._batches))
        sigma_normal = torch.randn(len(batch), generator=self._noise)
        noise = torch.randn(batch.shape, generator=self._noise)
        on_device = (tensor.to(self.device) for tensor in (batch, sigma_normal, noise))
        batch, sigma_normal, noise = on_device
        measured = self.trainer.update(batch, sigma_normal=sigma_normal, noise=noise)
        self._averages.add({f"diffusion/{name}": value for name, value in measured.items()})

    def metrics(self) -> dict[str, float]:
        """Return the row that is due, see `Training`."""
        number, config = self.num_updates, self.config
        last = number == self.total_updates
        row: dict[str, float] = {}
        if number and (last or number % config.log_interval == 0):
            row |= self._averages.read(number)
        validates = number % config.validation_interval == 0 or last
        if self._validation is not None and validates:
            row["diffusion/validation_loss"] = self.validation_loss()
        return row

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the averaged network's loss on held-out windows, the same noise each time."""
        generator = seeded(VALIDATION_SEED)
        total = 0.0
        for batch in self._validation.split(self.config.training.batch_size):
            sigma = training_sigma(
                torch.randn(len(batch), generator=generator), self.config.training
            )
            noise = torch.randn(batch.shape, generator=generator)
            on_device = (tensor.to(self.device) for tensor in (batch, sigma, noise))
            loss = edm_loss(self.trainer.ema_model, *on_device, self.config.sigma_data)
            total += float(loss) * len(batch)
        return total / len(self._validation)

    def weights(self) -> dict[str, Tensor]:
        """Return network, averaged copy and normalizer."""
        return named_weights(
            {
                "network": self.network,
                "averaged": self.trainer.ema_model,
                "normalizer": self.normalizer,
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that continues the training exactly."""
        return {
            "trainer": self.trainer.state_dict(),
            "noise": self._noise.get_state(),
            "averages": self._averages.state_dict(),
        }

    def close(self) -> None:
        """Do nothing: there is nothing that only an unfinished training needs."""

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Any], source: str) -> None:
        """Continue from what `weights` and `state_dict` returned.

        Raises:
            CheckpointError: they are of another training.
        """
        modules = {"network": self.network, "averaged": self.trainer.ema_model}
        load_named_weights(modules, weights, source)
        self.trainer.load_state_dict(state["trainer"])
        self._noise.set_state(state["noise"])
        self._averages.load_state_dict(state["averages"], self.device)
        self._batches = self._order()

    def _order(self) -> Iterator[Tensor]:
        """Yield the batches' indices from the present update on."""
        size = self.config.training.batch_size
        epoch, skipped = divmod(self.num_updates, len(self.windows) // size)
        while True:
            batches = epoch_batches(len(self.windows), size, seeded(self._seed, 2, epoch))
            for number, batch in enumerate(batches):
                if number >= skipped:
                    yield batch
            epoch, skipped = epoch + 1, 0

    def _validation_windows(self, held_out: OfflineDataset | None) -> Tensor | None:
        """Return normalized windows [n, L, D], evenly spread; None where there are none."""
        config = self.config
        if held_out is None:
            return None
        if not len(window_starts(held_out, config.window_length, config.window_stride)):
            return None
        windows = TrajectoryWindows(
            held_out, config.window_length, config.window_stride, self.normalizer
        )
        number = min(len(windows), config.validation_windows)
        return windows.gather(torch.arange(number) * len(windows) // number)


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A trained diffusion model.

    Attributes:
        network: the averaged U-Net. normalizer: of its trajectories.
        config: it was trained with. stored: its run's config.json.
        num_updates: it was trained for.
    """

    network: TemporalUNet
    normalizer: TrajectoryNormalizer
    config: DiffuseConfig
    stored: dict[str, Any]
    num_updates: int

    def describe(self) -> dict[str, Any]:
        """Return what identifies it."""
        return {"num_updates": self.num_updates, "weights": fingerprint(self.network)}


def load_diffusion(run_dir: Path, device: str | torch.device = "auto") -> DiffusionModel:
    """Return the model of the last checkpoint of an `offline diffuse` run.

    Raises:
        CheckpointError: no such run, or none of its checkpoints can be used.
    """
    last = LastCheckpoint.of(run_dir, KIND)
    config = from_dict(last.stored["config"], DiffuseConfig)
    network = _build_network(config, *last.dims)
    width = sum(last.dims) + 2
    normalizer = TrajectoryNormalizer(torch.zeros(width), torch.ones(width), *last.dims)
    modules = {"averaged": network, "normalizer": normalizer}
    load_named_weights(modules, last.weights, last.source)
    device = as_device(device)
    return DiffusionModel(
        network.to(device).requires_grad_(False).eval(),
        normalizer.to(device),
        config,
        last.stored,
        last.num_updates,
    )


def _build_network(
    config: DiffuseConfig,
    observation_dim: int,
    action_dim: int,
    generator: torch.Generator | None = None,
) -> TemporalUNet:
    c = config.network
    return TemporalUNet(
        observation_dim, action_dim, c.features, c.num_levels, generator, c.norm_over
    )
