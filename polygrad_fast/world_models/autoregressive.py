"""A plain autoregressive world model: one network, one step at a time, no diffusion."""

from __future__ import annotations

import torch
from torch import Tensor

from polygrad_fast.config import AutoregressiveConfig
from polygrad_fast.data.replay import Windows
from polygrad_fast.denoisers.dynamics import Dynamics
from polygrad_fast.denoisers.one_step import OneStepNetwork, one_step_losses
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.world_models.rollout import StepwiseModel


class Autoregressive(StepwiseModel):
    """The one-step network rolled out as `StepwiseModel` says; deterministic, or with Gaussian
    noise of the size by which the data scatter around its predictions.

    Args:
        config: size and training of the network.

    The others are those of `StepwiseModel`.
    """

    def __init__(
        self,
        config: AutoregressiveConfig,
        horizon: int,
        normalizer: Normalizer,
        action_bounds: tuple,
        device: torch.device,
    ):
        dims = normalizer.observation_dim, normalizer.action_dim
        network = OneStepNetwork(*dims, config.hidden_dim, config.num_layers, config.process_noise)
        trainer = AveragedTrainer(
            network.to(device),
            config.learning_rate,
            config.ema_decay,
            config.ema_interval,
            train_dtype=config.train_dtype,
        )
        super().__init__(trainer, horizon, normalizer, action_bounds, device)

    def dynamics(self) -> Dynamics:
        """Return the averaged network; see `WorldModel.dynamics`."""
        return Dynamics(self.trainer.ema_model, self.normalizer, (self._low, self._high))

    def update(
        self, windows: Windows, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on every transition of the windows; see `WorldModel.update`.

        The losses are those of `one_step_losses`.
        """
        trajectory = self.normalizer.normalize_trajectory(
            windows.observations, windows.rewards, windows.terminals
        )
        with self.trainer.network() as network:
            losses = one_step_losses(
                self.trainer.model,
                trajectory[..., :-2],
                self.seen(windows.actions),
                trajectory[..., -2],
                windows.terminals,
                network,
            )
        return self.minimize(losses)

    def step(
        self,
        observations: list[Tensor],
        seen: list[Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the network's answer; see `StepwiseModel.step`."""
        network = self.trainer.ema_model
        difference, reward, logit = network(observations[-1], seen[-1])
        if network.process_noise:
            scale, device = network.residual_scale, reward.device
            noise = torch.randn(len(reward), len(scale), generator=generator, device=device)
            difference = difference + scale[:-1] * noise[:, :-1]
            reward = reward + scale[-1] * noise[:, -1]
        return difference * network.difference_scale, reward, logit
