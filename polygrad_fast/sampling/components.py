"""What a sampler is made of, shared by its engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polygrad_fast.config import SamplerConfig
from polygrad_fast.diffusion.ddpm import NoiseSchedule
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.protocols import Denoiser, Policy


@dataclass(frozen=True)
class SamplerComponents:
    """Modules and options of one sampler; engines read current weights and moments at every
    call. The schedule is the one given, respaced to the configuration's `num_inference_steps`; the
    device is its tensors', so that "cuda" has its index.
    """

    denoiser: Denoiser
    policy: Policy
    schedule: NoiseSchedule
    normalizer: Normalizer
    config: SamplerConfig
    device: torch.device
    action_bounds: tuple[Tensor, Tensor] | None

    def __post_init__(self) -> None:
        respaced = self.schedule.respaced(self.config.num_inference_steps)
        object.__setattr__(self, "schedule", respaced)
        object.__setattr__(self, "device", respaced.betas.device)

    @property
    def observation_dim(self) -> int:
        """S."""
        return self.denoiser.observation_dim

    @property
    def action_dim(self) -> int:
        """A."""
        return self.denoiser.action_dim

    @property
    def horizon(self) -> int:
        """H."""
        return self.denoiser.horizon

    @property
    def num_steps(self) -> int:
        """K, the diffusion steps of a sample: all of the schedule, or `num_inference_steps`."""
        return self.schedule.num_train_timesteps

    @property
    def shows_initial_noise(self) -> bool:
        """Whether the denoiser gets the normals that the diffusion began from in every step."""
        return bool(getattr(self.denoiser, "reads_initial_noise", False))

    def shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of B trajectories' states [B, H, D] and actions [B, H, A]."""
        return (batch, self.horizon, self.observation_dim + 2), (
            batch,
            self.horizon,
            self.action_dim,
        )

    def chain_length(self, return_chain: bool | int) -> int:
        """Return how many last steps of the chain `return_chain` asks for: True is all of them."""
        return self.num_steps if return_chain is True else int(return_chain)
