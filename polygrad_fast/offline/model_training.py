"""What trainings of world models on a dataset share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polygrad_fast.normalizer import Normalizer
from polygrad_fast.offline.loop import Averages, load_named_weights, named_weights
from polygrad_fast.world_models import WorldModel


class ModelTraining:
    """Trains a world model; a subclass has `update`, which adds to `averages`.

    Implements `polygrad_fast.offline.loop.Training` but for it.

    Args:
        model: the world model.
        normalizer: of the dataset.
        draws: of batches, and of what the model draws in training.
        device: where the model is.
        total_updates: how many to take.
        log_interval: updates between two rows of metrics.
    """

    improved = False  # by no evaluation: the averaged weights of the last update are used

    def __init__(
        self,
        model: WorldModel,
        normalizer: Normalizer,
        draws: torch.Generator,
        device: torch.device,
        total_updates: int,
        log_interval: int,
    ):
        self.model, self.normalizer, self.draws, self.device = model, normalizer, draws, device
        self.total_updates, self.averages = total_updates, Averages()
        self._log_interval = log_interval

    @property
    def num_updates(self) -> int:
        """Updates taken so far."""
        return self.model.trainer.num_updates

    def metrics(self) -> dict[str, float]:
        """Return the row that is due, see `Training`."""
        number = self.num_updates
        last = number == self.total_updates
        if number and (last or number % self._log_interval == 0):
            return self.averages.read(number)
        return {}

    def weights(self) -> dict[str, Tensor]:
        """Return networks, averaged copies and normalizer."""
        return named_weights({**self.model.modules(), "normalizer": self.normalizer})

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that continues the training exactly."""
        return {
            **self.model.state_dict(),
            "draws": self.draws.get_state(),
            "averages": self.averages.state_dict(),
        }

    def close(self) -> None:
        """Do nothing: there is nothing that only an unfinished training needs."""

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Any], source: str) -> None:
        """Continue from what `weights` and `state_dict` returned.

        Raises:
            CheckpointError: they are of another training.
        """
        load_named_weights(self.model.modules(), weights, source)
        self.model.load_state_dict(state)
        self.draws.set_state(state["draws"])
        self.averages.load_state_dict(state["averages"], self.device)
