"""What a learner is to the training loop: one that learns from imagined trajectories, and one that
learns from transitions of a dataset."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from polygrad_fast.transitions import Transitions


class Learner(Protocol):
    """Improves a policy on imagined trajectories.

    Attributes:
        name: in metrics.csv its quantities are called "name/quantity".
        policy: what it trains, in place.
    """

    name: str
    policy: nn.Module

    def step(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        progress: float | Tensor = 0.0,
    ) -> dict[str, Tensor]:
        """Train on normalized trajectories, with no reading on the host; terminals are 0 or 1.

        Where something is not finite, one of the results is not either, and nothing is changed.

        Args:
            observations, actions, rewards, terminals: [B, H, S], [B, H, A], [B, H], [B, H].
            progress: share of the training that is over, 0 to 1, for what is annealed; a scalar on
                the device for a step that a graph holds.

        Returns:
            What was measured, by name, detached scalars on the device: "action_std" and
            "action_mean_abs" among it (see `advantages.spread`), from which trajectory diffusion
            tunes its guidance scale.
        """

    def capture_key(self) -> Hashable | None:
        """Return what a CUDA graph of a `step` depends on besides its arguments' shapes and the
        contents of tensors, None where no graph can hold it."""

    def update(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        progress: float = 0.0,
    ) -> dict[str, float]:
        """Take a `step` and return what was measured as numbers.

        Raises:
            NonFiniteError: something was not finite; nothing was changed.
        """

    def keep_functions(self, mean: Tensor, scale: Tensor) -> None:
        """Keep policy and values the same functions of raw observations, after the normalizer's
        moments of observations have changed from `mean` and `scale` [S]."""

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by name, the policy's among them: their weights are saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that continues the training exactly: tensors, numbers, strings."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class OfflineLearner(Protocol):
    """Improves a policy on transitions, real or synthetic.

    Attributes:
        name: in metrics.csv its quantities are called "name/quantity".
        policy: what it trains, in place. `policy.score_parameters(observations)` returns mean and
            standard deviation [..., A] of the Gaussian whose score guides a sampler, at raw
            observations [..., S].
        num_updates: taken so far.
    """

    name: str
    policy: nn.Module
    num_updates: int

    def update(
        self, batch: Transitions, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Train on N raw transitions.

        Args:
            generator: of what is drawn, on the CPU.

        Returns:
            What was measured, by name: scalars on the device, not read on the host.

        Raises:
            InputError: a batch of other dimensions.
        """

    def predict(
        self,
        observation: np.ndarray,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, None]:
        """Return raw actions [A] or [N, A] within their bounds, and None, at raw observations [S]
        or [N, S]."""

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by name, the policy's among them: their weights are saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that continues the training exactly: tensors, numbers, strings."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
