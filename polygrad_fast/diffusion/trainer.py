"""Training of the denoiser (Algorithm 1)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from polygrad_fast.config import DenoiserConfig, SamplerConfig
from polygrad_fast.diffusion.ddpm import NoiseSchedule, denoising_loss
from polygrad_fast.errors import InputError


class DenoiserTrainer:
    """Adam on the denoising loss, and the EMA copy that is used for sampling.

    Attributes:
        model: the network being trained. ema_model: its averaged copy.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        config: DenoiserConfig,
        sampler_config: SamplerConfig,
    ):
        self.model, self.schedule = model, schedule
        self.config, self.sampler_config = config.resolved(model.horizon), sampler_config
        try:
            self.ema_model = copy.deepcopy(model).requires_grad_(False).eval()
        except Exception as error:
            raise InputError(
                f"denoiser {type(model).__name__} cannot be copied for its average: {error}"
            ) from error
        self.optimizer = torch.optim.Adam(model.parameters(), lr=self.config.learning_rate)
        self.num_updates = 0

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
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.num_updates % self.config.ema_interval == 0:
            self._update_ema()
        self.num_updates += 1
        return {"loss": loss.detach(), **parts}

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = self.config.ema_decay if self.num_updates >= self.config.ema_start else 0.0
        averages, weights = list(self.ema_model.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        # an own denoiser's running statistics, for instance
        for copied, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            copied.copy_(buffer)

    def state_dict(self) -> dict:
        """Return optimizer state and counters; the weights are saved with the other weights."""
        return {"optimizer": self.optimizer.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates = state["num_updates"]
