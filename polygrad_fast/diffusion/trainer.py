"""Training of the denoiser (Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polygrad_fast.config import DenoiserConfig, SamplerConfig
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.diffusion.ddpm import NoiseSchedule, denoising_loss


class DenoiserTrainer(AveragedTrainer):
    """Adam on the denoising loss, and the averaged copy that is used for sampling.

    Args:
        model: a `polygrad_fast.Denoiser`; its weights change in place.
        schedule: of K steps.
        config: learning rate and averaging.
        sampler_config: what the denoiser predicts, and how it sees actions.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        config: DenoiserConfig,
        sampler_config: SamplerConfig,
    ):
        self.schedule, self.sampler_config = schedule, sampler_config
        self.config = c = config.resolved(model.horizon)
        super().__init__(
            model,
            c.learning_rate,
            c.ema_decay,
            c.ema_interval,
            c.ema_start,
            train_dtype=c.train_dtype,
            num_train_timesteps=schedule.num_train_timesteps,
        )

    def update(
        self, trajectory: Tensor, actions: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step of Algorithm 1 on normalized windows; of a denoiser that has
        losses of its own (see `polygrad_fast.Denoiser`), one on these.

        Args:
            trajectory, actions: [B, H, D] and [B, H, A].
            generator: source of diffusion steps and noise; default torch's.

        Returns:
            Detached scalars: the loss, and its parts by name.
        """
        if hasattr(self.model, "transition_losses"):
            with self.network() as network:
                given = () if network is self.model else (network,)
                losses = self.model.transition_losses(trajectory, actions, *given)
            loss = sum(losses.values())
            self.minimize(loss)
            return {name: value.detach() for name, value in ({"loss": loss} | losses).items()}
        device = trajectory.device
        timesteps = torch.randint(
            self.schedule.num_train_timesteps,
            (trajectory.shape[0],),
            generator=generator,
            device=device,
        )
        noise = torch.randn(trajectory.shape, generator=generator, device=device)
        with self.network() as network:
            loss, parts = denoising_loss(
                network,
                trajectory,
                actions,
                timesteps,
                noise,
                self.schedule,
                self.sampler_config,
            )
        self.minimize(loss)
        return {"loss": loss.detach(), **parts}
