"""What an engine of the sampler is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from polygrad_fast.sampling.noise import SampleNoise

Sampled = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]
"""Normalized states [B, H, D] and actions [B, H, A] and, where asked for, the chains of both."""


class Engine(Protocol):
    """One implementation of Algorithm 2. It reads current weights and moments at every call.

    Attributes:
        settles: whether the last two diffusion steps have the same actions whatever the weights
            are, as it is with a rollout in more steps than its horizon.
    """

    settles: bool

    def sample(
        self,
        initial_observations: Tensor,
        guidance_scale: float | Tensor,
        generator: torch.Generator | None,
        noise: SampleNoise | None,
        return_chain: bool | int,
    ) -> Sampled:
        """Diffuse one trajectory from each initial observation.

        The arguments are those of `PolicyGuidedSampler.sample`, which has checked and converted
        them: float32 on the sampler's device.

        Args:
            initial_observations: s0 [B, S], normalized.
            guidance_scale: delta, in squared raw actions.
            generator: source of the normals where no `noise` is given; default torch's.
            noise: every normal.
            return_chain: whether, or of how many last steps, to return the chains.

        Returns:
            Normalized states [B, H, D] and actions [B, H, A], and the chains of both after each
            step, [n, B, H, .] in loop order, or None. All are the caller's own.
        """
