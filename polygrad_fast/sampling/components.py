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
class SampleNoise:
    """Every standard normal of one sample, in loop order (first row = step i = K)."""

    initial_trajectories: Tensor  # [B, H, D]
    initial_actions: Tensor  # [B, H, A]
    trajectories: Tensor  # [K, B, H, D]
    actions: Tensor  # [K, B, H, A]

    @classmethod
    def draw(
        cls,
        states: tuple[int, ...],
        actions: tuple[int, ...],
        num_steps: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> SampleNoise:
        """Draw all in the released code's order, in which the last step's actions take none
        (zeros).

        Args:
            states, actions: shapes [B, H, D] and [B, H, A]. num_steps: K.
            generator: default torch's.
        """

        def normals(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        initial = normals(states), normals(actions)
        state_noise = torch.empty(num_steps, *states, device=device)
        action_noise = torch.zeros(num_steps, *actions, device=device)
        for step in range(num_steps):
            state_noise[step] = normals(states)
            if step < num_steps - 1:
                action_noise[step] = normals(actions)
        return cls(*initial, state_noise, action_noise)


@dataclass(frozen=True)
class SamplerComponents:
    """Modules and options of one sampler; engines read current weights and moments at every
    call."""

    denoiser: Denoiser
    policy: Policy
    schedule: NoiseSchedule
    normalizer: Normalizer
    config: SamplerConfig
    device: torch.device
    action_bounds: tuple[Tensor, Tensor] | None

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

    def chain_length(self, return_chain: bool | int) -> int:
        """Return how many last steps of the chain `return_chain` asks for: True is all of them."""
        return self.schedule.num_train_timesteps if return_chain is True else int(return_chain)
