"""Guidance of a trajectory sampler by a target policy's score (arXiv 2404.06356, section 4)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from polygrad_fast.config import PolicyGuidanceConfig
from polygrad_fast.diffusion.edm import NoiseLevels
from polygrad_fast.errors import InputError
from polygrad_fast.sampling.heun import Step
from polygrad_fast.trajectory_normalizer import TrajectoryNormalizer

DIRECTION_OFFSET = 1e-8
"""Added to every entry of a unit direction, as released."""


@functools.lru_cache(maxsize=16)
def guidance_weights(config: PolicyGuidanceConfig, levels: NoiseLevels) -> tuple[float, ...]:
    """Return lambda_i of every step, N numbers.

    "linear" (released code): lambda ((1 - i / N) + beta sin(pi (i + 1) / N)).
    "paper" (equation 14, which counts n = N - i): lambda (sigma_i + beta sigma_0 sin(pi n / N)).
    Both are 0 before `delay_steps` and in the last step.
    """
    n, c = levels.num_steps, config
    weights = []
    for i in range(n):
        if c.schedule == "linear":
            weight = (1 - i / n) + c.cosine_coefficient * math.sin(math.pi * (i + 1) / n)
        else:
            wave = math.sin(math.pi * (n - i) / n)
            weight = levels.sigma[i] + c.cosine_coefficient * levels.sigma[0] * wave
        guided = c.delay_steps <= i < n - 1
        weights.append(c.coefficient * weight if guided else 0.0)
    return tuple(weights)


def policy_score(
    policy: Callable, trajectories: Tensor, normalizer: TrajectoryNormalizer
) -> Tensor:
    """Return the gradient of the policy's log-likelihood with respect to the normalized actions.

    Of sum over rows and actions of log N(tanh(u); m, v), u = action std + mean before the tanh:
    g = (m - tanh u) / v^2 (1 - tanh(u)^2) std, with m and v at the trajectories' observations. No
    gradient is taken through the policy. Where every tanh saturates g is 0.

    Args:
        policy: gets raw observations [B, L, S]. Its `score_parameters(observations)`, where it has
            that, returns m and v, [B, L, A] each; else calling it returns the pair (mean, std) of a
            Gaussian, or the action of a deterministic policy, for which v = 1.
        trajectories: normalized [B, L, D].
        normalizer: of the channels.

    Raises:
        InputError: the policy returns something else.
    """
    n, dim = normalizer, normalizer.observation_dim
    with torch.no_grad():
        raw = trajectories[..., :dim] * n.std[:dim] + n.mean[:dim]
        result = getattr(policy, "score_parameters", policy)(raw)
        mean, std = result if isinstance(result, (tuple, list)) else (result, None)
        normalized = trajectories[..., dim:-2]
        for name, tensor in (("mean or action", mean), ("std", std)):
            if tensor is not None and tensor.shape != normalized.shape:
                raise InputError(
                    f"policy must return a {name} of shape {tuple(normalized.shape)} at raw "
                    f"observations {tuple(raw.shape)}, got {tuple(tensor.shape)}"
                )
        actions = torch.tanh(normalized * n.action_std + n.action_mean)
        difference = mean - actions
        if std is not None:
            difference = difference / std.square()
        return difference * (1.0 - actions.square()) * n.action_std


def unit_direction(gradient: Tensor) -> Tensor:
    """Return g / ||g|| + 1e-8, the norm over each trajectory's rows and actions: [B, L, A].

    A gradient of norm 0 (every tanh of the trajectory saturates, or every action is the policy's)
    has direction 0, so that the trajectory stays as it is; the released code divides 0 by 0 there.
    """
    norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
    return torch.where(norm > 0, gradient / norm + DIRECTION_OFFSET, torch.zeros_like(gradient))


class PolicyGuidance:
    """Move the actions of noisy trajectories along a policy's score, at the start of every step.

    x_action <- x_action + lambda_i g, with g of `policy_score`, taken at the noisy trajectory or
    at the denoised one and of unit length or not: as released, straight onto the noisy actions and
    not scaled by sigma.

    Args:
        policy: see `policy_score`; its current weights are read at every step.
        normalizer: of the sampler's trajectories, on their device.
        config: coefficients and options; default no guidance (the released code's).
    """

    def __init__(
        self,
        policy: Callable,
        normalizer: TrajectoryNormalizer,
        config: PolicyGuidanceConfig | None = None,
    ):
        self.policy, self.normalizer = policy, normalizer
        self.config = config or PolicyGuidanceConfig()

    def direction(self, trajectories: Tensor) -> Tensor:
        """Return the gradient, or its direction with `normalize`, at trajectories [B, L, D]:
        [B, L, A]."""
        gradient = policy_score(self.policy, trajectories, self.normalizer)
        return unit_direction(gradient) if self.config.normalize else gradient

    def __call__(self, trajectories: Tensor, step: Step) -> Tensor:
        """Return the guided trajectories; see `polygrad_fast.sampling.heun.Guidance`. In a step of
        weight 0 neither policy nor denoiser is called."""
        weight = guidance_weights(self.config, step.levels)[step.index]
        if weight == 0.0:
            return trajectories
        at = step.denoise(trajectories) if self.config.denoised else trajectories
        guided = trajectories.clone()
        guided[..., self.normalizer.observation_dim : -2] += weight * self.direction(at)
        return guided
