"""What a world model is to the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polygrad_fast.arguments import as_integer
from polygrad_fast.data.replay import Windows
from polygrad_fast.denoisers.dynamics import Dynamics
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.errors import InputError
from polygrad_fast.sampling import TrajectoryBatch


class WorldModel(Protocol):
    """Learns from windows of real data and imagines trajectories under a policy.

    It holds what it learns and what it tunes; the training loop holds data, policy and counters,
    and `TrainConfig.world_model_training` how many windows and updates there are.

    Attributes:
        longest_horizon: the most steps that it can imagine; None: as many as are asked for.
        trainer: takes the gradient steps of `update` and counts them.
    """

    longest_horizon: int | None
    trainer: AveragedTrainer

    def prepare(self, policy: Any) -> None:
        """Build what imagining under `policy` needs, so that errors come before any work.

        Raises:
            InputError: the policy or an option cannot be used.
        """

    def warn(self, stacklevel: int) -> None:
        """Warn, before training begins, of what is known to go wrong with the configuration."""

    def update(
        self, windows: Windows, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on raw windows [B, H, .].

        Returns:
            Detached scalars by the names they have in metrics.csv; they are not read on the host.
        """

    def imagine(
        self,
        initial_observations: Tensor,
        policy: Any,
        generator: torch.Generator | None = None,
        normalized: bool = False,
        horizon: int | None = None,
    ) -> TrajectoryBatch:
        """Imagine a trajectory of `policy` from each initial observation [B, S].

        Observations are raw, and so are all results, with terminals 0 or 1; with `normalized=True`
        all of them are normalized, the terminal flags included.

        Args:
            horizon: imagine only the first so many steps, or more than in training; None: as many
                as in training.

        Raises:
            InputError: horizon < 1, or above `longest_horizon`.
        """

    def feedback(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hear what the policy's update measured on the imagined batch, detached scalars; return
        what was tuned, likewise, by the names it has in metrics.csv. Nothing is read on the
        host."""

    def dynamics(self) -> Dynamics | None:
        """Return what one imagined step follows from, to be differentiated; None: there is no such
        thing, and no pathwise policy gradient."""
        return None

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by name: their weights are saved with the other weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that continues the training exactly: tensors, numbers, strings."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def check_horizon(world_model: WorldModel, horizon: int) -> int:
    """Return the horizon, if a world model can imagine as many steps.

    Raises:
        InputError: horizon < 1, or above the model's `longest_horizon`.
    """
    horizon, longest = as_integer(horizon, "horizon", 1), world_model.longest_horizon
    if longest is not None and horizon > longest:
        raise InputError(
            f"horizon must be at most {longest}, the whole trajectory that this world model "
            f"({type(world_model).__name__}) was trained to imagine at once, got {horizon}: train "
            f"one with --horizon {horizon}, or an autoregressive one, which imagines any"
        )
    return horizon
