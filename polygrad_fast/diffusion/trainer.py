"""Training of the denoiser (Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polygrad_fast.config import DenoiserConfig, SamplerConfig
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.diffusion.ddpm import NoiseSchedule, denoising_loss


class DenoiserTrainer(AveragedTrainer):
    """Adam on the denoising loss, and the averaged copy that is used for sampling."""

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        config: DenoiserConfig,
        sampler_config: SamplerConfig,
    ):
        self.schedule, self.sampler_config = schedule, sampler_config
        self.config = c = config.resolved(model.horizon)
        super().__init__(model, c.learning_rate, c.ema_decay, c.ema_interval, c.ema_start)

    def update(
        self, trajectory: Tensor, actions: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on normalized windows [B, H, D], [B, H, A]; return detached
        scalar losses."""
        device = trajectory.device
        timesteps = torch.randint(
            self.schedule.num_train_timesteps,
            (trajectory.shape[0],),
            generator=generator,
            device=device,
        )
        noise = torch.randn(trajectory.shape, generator=generator, device=device)
        loss, parts = denoising_loss(
            self.model,
            trajectory,
            actions,
            timesteps,
            noise,
            self.schedule,
            self.sampler_config,
        )
        self.minimize(loss)
        return {"loss": loss.detach(), **parts}
