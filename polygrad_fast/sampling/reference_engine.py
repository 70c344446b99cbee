"""Engine "reference": Algorithm 2 in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from polygrad_fast.profiling import annotate
from polygrad_fast.protocols import call_denoiser
from polygrad_fast.reference.guided_step import denoiser_actions, guided_step
from polygrad_fast.sampling.components import SamplerComponents
from polygrad_fast.sampling.engine import Sampled
from polygrad_fast.sampling.noise import LoopNormals, SampleNoise


def diffusion_step(
    components: SamplerComponents,
    trajectory: Tensor,
    actions: Tensor,
    initial_observations: Tensor,
    k: int,
    guidance_scale: float | Tensor,
    trajectory_noise: Tensor,
    action_noise: Tensor | None,
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Call the denoiser and advance from step i = k + 1 to k (Algorithm 2, lines 6-13).

    The arguments are those of `guided_step`, and the states that the denoiser is called with; None:
    `trajectory`. The denoiser computes in its weights' dtype.
    """
    c = components
    seen = denoiser_actions(actions, k, c.schedule, c.normalizer, c.config, c.action_bounds)
    timestep = c.schedule.timesteps[k]
    states = trajectory if shown is None else shown
    prediction = call_denoiser(c.denoiser, states.clone(), seen.clone(), timestep)
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

    settles = False

    def __init__(self, components: SamplerComponents):
        self.components = components

    def sample(
        self,
        initial_observations: Tensor,
        guidance_scale: float | Tensor,
        generator: torch.Generator | None,
        noise: SampleNoise | None,
        return_chain: bool | int,
    ) -> Sampled:
        """Run Algorithm 2; see `Engine.sample`."""
        c = self.components
        normals = LoopNormals(c, len(initial_observations), generator, noise)
        trajectory, actions = normals.initial_trajectories.clone(), normals.initial_actions.clone()
        trajectory[:, 0, : c.observation_dim] = initial_observations
        shown = trajectory if c.shows_initial_noise else None
        chain_length = c.chain_length(return_chain)
        chain = []
        for step, k in enumerate(reversed(range(c.num_steps))):
            noises = normals.step(step, k)
            with annotate("diffusion_step"):
                trajectory, actions = diffusion_step(
                    c, trajectory, actions, initial_observations, k, guidance_scale, *noises, shown
                )
            if k < chain_length:
                chain.append((trajectory, actions))
        chains = tuple(map(torch.stack, zip(*chain, strict=True))) if chain else None
        return trajectory, actions, chains
