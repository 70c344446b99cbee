"""An autoregressive transformer as a world model."""

from __future__ import annotations

import torch
from torch import Tensor

from polygrad_fast.config import TransformerModelConfig
from polygrad_fast.data.replay import Windows
from polygrad_fast.denoisers.one_step import one_step_losses
from polygrad_fast.denoisers.transformer_dynamics import TransformerDynamics
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.world_models.rollout import StepwiseModel


class Transformer(StepwiseModel):
    """Deterministic dynamics that see the imagined steps so far, up to the context's length; the
    paper's transformer baseline (appendix C.3).

    It trains on the first `context` steps of windows, all predicted at once, by the losses of
    `one_step_losses`.

    Args:
        config: size and training of the network.

    The others are those of `StepwiseModel`.
    """

    def __init__(
        self,
        config: TransformerModelConfig,
        horizon: int,
        normalizer: Normalizer,
        action_bounds: tuple,
        device: torch.device,
    ):
        network = TransformerDynamics(
            normalizer.observation_dim,
            normalizer.action_dim,
            config.context,
            config.hidden_dim,
            config.num_layers,
            config.num_heads,
        )
        trainer = AveragedTrainer(
            network.to(device), config.learning_rate, config.ema_decay, config.ema_interval
        )
        super().__init__(trainer, horizon, normalizer, action_bounds, device)

    def update(
        self, windows: Windows, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on windows; see `WorldModel.update`."""
        trajectory = self.normalizer.normalize_trajectory(
            windows.observations, windows.rewards, windows.terminals
        )
        parts = (
            trajectory[..., :-2],
            self.seen(windows.actions),
            trajectory[..., -2],
            windows.terminals,
        )
        context = self.trainer.model.context
        losses = one_step_losses(self.trainer.model, *(part[:, :context] for part in parts))
        return self.minimize(losses)

    def step(
        self,
        observations: list[Tensor],
        seen: list[Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the network's answer to the last steps; see `StepwiseModel.step`."""
        network = self.trainer.ema_model
        past = (torch.stack(part[-network.context :], dim=1) for part in (observations, seen))
        difference, reward, logit = (part[:, -1] for part in network(*past))
        return difference * network.difference_scale, reward, logit
