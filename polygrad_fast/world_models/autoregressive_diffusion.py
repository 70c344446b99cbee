"""Diffusion of one step at a time as a world model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from polygrad_fast.config import AutoregressiveDiffusionConfig
from polygrad_fast.data.replay import Windows
from polygrad_fast.denoisers.one_step import measure_scale
from polygrad_fast.denoisers.transition_denoiser import TransitionDenoiser
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.diffusion.edm import NoiseLevels, denoise, edm_loss, training_sigma
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.sampling.heun import heun_sample
from polygrad_fast.terminals import alive_steps
from polygrad_fast.world_models.rollout import StepwiseModel


class AutoregressiveDiffusion(StepwiseModel):
    """Each step is a whole reverse diffusion of the transition, given observation and action; the
    paper's autoregressive diffusion baseline (appendix C.3), which is SynthER's model conditioned.

    Args:
        config: size, training and sampler of the denoiser.

    The others are those of `StepwiseModel`.
    """

    def __init__(
        self,
        config: AutoregressiveDiffusionConfig,
        horizon: int,
        normalizer: Normalizer,
        action_bounds: tuple,
        device: torch.device,
    ):
        self.config, self._levels = config, NoiseLevels.of(config.sampler)
        dims = normalizer.observation_dim, normalizer.action_dim
        network = TransitionDenoiser(*dims, config.hidden_dim, config.num_layers)
        trainer = AveragedTrainer(
            network.to(device), config.learning_rate, config.ema_decay, config.ema_interval
        )
        super().__init__(trainer, horizon, normalizer, action_bounds, device)

    def update(
        self, windows: Windows, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on every transition of the windows; see `WorldModel.update`.

        EDM's loss; padding carries no weight, and a step whose difference is not in the data, a
        terminal one or a window's last, none for that.
        """
        trajectory = self.normalizer.normalize_trajectory(
            windows.observations, windows.rewards, windows.terminals
        )
        observations, network = trajectory[..., :-2], self.trainer.model
        differences = torch.zeros_like(observations)
        differences[:, :-1] = observations[:, 1:] - observations[:, :-1]
        is_real = alive_steps(windows.terminals).float()
        goes_on = is_real * (1.0 - windows.terminals)
        goes_on[:, -1] = 0.0
        measure_scale(network.difference_scale, differences, goes_on.unsqueeze(-1))
        network.range.note(observations, trajectory[..., -2], is_real)
        flags = 2.0 * windows.terminals - 1.0
        known = differences * goes_on.unsqueeze(-1)  # what is noised and seen, too
        parts = (known / network.difference_scale, trajectory[..., -2:-1], flags[..., None])
        clean = torch.cat(parts, dim=-1).flatten(0, 1)
        weights = torch.cat(
            [goes_on[..., None].expand_as(observations), is_real[..., None].expand(-1, -1, 2)], -1
        )
        given = observations.flatten(0, 1), self.seen(windows.actions).flatten(0, 1)
        options = {"generator": generator, "device": clean.device}
        sigma = training_sigma(torch.randn(len(clean), **options), self.config)
        noise = torch.randn(clean.shape, **options)
        loss = edm_loss(
            lambda x, c_noise: network(x.squeeze(1), c_noise, *given).unsqueeze(1),
            clean.unsqueeze(1),
            sigma,
            noise.unsqueeze(1),
            self.config.sampler.sigma_data,
            weights.flatten(0, 1).unsqueeze(1),
        )
        self.trainer.minimize(loss)
        return {"dynamics/loss": loss.detach()}

    def step(
        self,
        observations: list[Tensor],
        seen: list[Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw what follows the last step by a reverse diffusion; see `StepwiseModel.step`."""
        network, sampler = self.trainer.ema_model, self.config.sampler
        given = observations[-1], seen[-1]
        shape = (len(seen[-1]), 1, network.observation_dim + 2)

        def normals() -> Tensor:
            return torch.randn(shape, generator=generator, device=seen[-1].device)

        def step_noise() -> Iterator[Tensor | None]:
            for gamma in self._levels.gamma:
                yield normals() if gamma > 0.0 else None

        def denoised(x: Tensor, sigma: float) -> Tensor:
            return denoise(
                lambda x, c_noise: network(x.squeeze(1), c_noise, *given).unsqueeze(1),
                x,
                x.new_full((len(x),), sigma),
                sampler.sigma_data,
            )

        drawn, _ = heun_sample(normals(), step_noise(), sampler, denoised)
        difference, reward, flag = drawn[:, 0].split([network.observation_dim, 1, 1], dim=-1)
        return difference * network.difference_scale, reward.squeeze(-1), flag.squeeze(-1)
