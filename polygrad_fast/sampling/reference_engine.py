"""Engine "reference": Algorithm 2 in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from polygrad_fast.profiling import annotate
from polygrad_fast.reference.guided_step import denoiser_actions, guided_step
from polygrad_fast.sampling.components import SampleNoise, SamplerComponents, call_denoiser


def diffusion_step(
    components: SamplerComponents,
    trajectory: Tensor,
    actions: Tensor,
    initial_observations: Tensor,
    k: int,
    guidance_scale: float | Tensor,
    trajectory_noise: Tensor,
    action_noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call the denoiser and advance from step i = k + 1 to k (Algorithm 2, lines 6-13).

    Args are those of `guided_step`; the denoiser computes in its weights' dtype.
    """
    c = components
    seen = denoiser_actions(actions, k, c.schedule, c.normalizer, c.config, c.action_bounds)
    prediction = call_denoiser(c.denoiser, trajectory.clone(), seen.clone(), k)
    return guided_step(
        prediction,
        trajectory,
        actions,
        initial_observations,
        k,
        c.policy,
        c.normalizer,
        c.schedule,
        c.config,
        guidance_scale,
        trajectory_noise,
        action_noise,
    )


class ReferenceEngine:
    """Run the loop of Algorithm 2 step by step; noise comes from torch's generator in the released
    code's order."""

    def __init__(self, components: SamplerComponents):
        self.components = components

    def sample(
        self,
        initial_observations: Tensor,
        guidance_scale: float | Tensor,
        generator: torch.Generator | None,
        noise: SampleNoise | None,
        return_chain: bool | int,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Return normalized states [B, H, D], actions [B, H, A] and, where asked, both chains [n,
        B, H, .] of the last n steps.

        Args are those of `PolicyGuidedSampler.sample`, checked, with normalized initial
        observations [B, S].
        """
        c = self.components
        batch, observation_dim = initial_observations.shape
        states_shape = (batch, c.horizon, observation_dim + 2)
        actions_shape = (batch, c.horizon, c.action_dim)

        def normals(shape: tuple[int, ...], given: Tensor | None) -> Tensor:
            if given is not None:
                return given.to(c.device)
            with annotate("noise"):
                return torch.randn(shape, generator=generator, device=c.device)

        trajectory = normals(states_shape, noise and noise.initial_trajectories).clone()
        actions = normals(actions_shape, noise and noise.initial_actions).clone()
        trajectory[:, 0, :observation_dim] = initial_observations
        chain_length = c.chain_length(return_chain)
        chain = []
        for step, k in enumerate(reversed(range(c.schedule.num_train_timesteps))):
            trajectory_noise = normals(states_shape, noise and noise.trajectories[step])
            action_noise = None
            if k > 0 and c.config.action_update != "none":
                action_noise = normals(actions_shape, noise and noise.actions[step])
            with annotate("diffusion_step"):
                trajectory, actions = diffusion_step(
                    c,
                    trajectory,
                    actions,
                    initial_observations,
                    k,
                    guidance_scale,
                    trajectory_noise,
                    action_noise,
                )
            if k < chain_length:
                chain.append((trajectory, actions))
        chains = tuple(map(torch.stack, zip(*chain, strict=True))) if chain else None
        return trajectory, actions, chains
