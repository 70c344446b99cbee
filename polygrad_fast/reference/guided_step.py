"""One step of policy-guided trajectory diffusion: the body of Algorithm 2's loop after the
denoiser call."""

from __future__ import annotations

import torch
from torch import Tensor

from polygrad_fast.config import SamplerConfig, check_choices
from polygrad_fast.diffusion.ddpm import NoiseSchedule
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import log_prob, score
from polygrad_fast.protocols import Policy, policy_moments


def denoiser_actions(
    actions_norm: Tensor,
    k: int,
    schedule: NoiseSchedule,
    normalizer: Normalizer,
    config: SamplerConfig,
    action_bounds: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return the actions [B, H, A] as the denoiser sees them in step k: clipped to the bounds and
    scaled where configured."""
    check_choices(config)
    if config.denoiser_actions == "clipped":
        raw = normalizer.unnormalize(actions_norm, "actions")
        actions_norm = normalizer.normalize(raw.clamp(*action_bounds), "actions")
    if config.scale_actions:
        actions_norm = actions_norm * schedule.alphas_cumprod[k].sqrt()
    return actions_norm


def guided_step(
    prediction: Tensor,
    trajectory: Tensor,
    actions: Tensor,
    initial_observations: Tensor,
    k: int,
    policy: Policy,
    normalizer: Normalizer,
    schedule: NoiseSchedule,
    config: SamplerConfig,
    guidance_scale: float | Tensor,
    trajectory_noise: Tensor,
    action_noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advance states and actions from diffusion step i = k + 1 to k (Algorithm 2, lines 8-13, with
    equation 11).

    Args:
        prediction: the denoiser's output [B, H, D].
        trajectory: x_i [B, H, D], normalized. actions: u_i [B, H, A], normalized.
        initial_observations: s0 [B, S], normalized.
        k: 0-based diffusion step, K-1 .. 0.
        guidance_scale: delta, in units of squared raw actions.
        trajectory_noise: standard normals [B, H, D].
        action_noise: [B, H, A], or None in the last step. With action_update "exact" it is xi, the
            same in every step, the last one included.

    Returns:
        x_{i-1} and u_{i-1}, normalized; the first observation is s0.

    Raises:
        InputError: an option of `config` has a value that is none of its names.
    """
    check_choices(config)
    observation_dim = initial_observations.shape[-1]
    last_step = k == 0

    # line 9: predict the fully denoised trajectory
    if config.prediction_type == "epsilon":
        denoised = (
            schedule.sqrt_recip_alphas_cumprod[k] * trajectory
            - schedule.sqrt_recipm1_alphas_cumprod[k] * prediction
        )
    else:
        denoised = prediction.clone()
    denoised[:, 0, :observation_dim] = initial_observations

    # line 13 without its noise: equation 1, written in terms of x0_hat
    from_denoised, from_trajectory, noise_std = (
        table[k] for table in schedule.step_coefficients(config.variance_type)
    )

    def posterior_mean(denoised: Tensor) -> Tensor:
        return from_denoised * denoised + from_trajectory * trajectory

    mean = posterior_mean(denoised)
    if config.clip_state_change is not None and k < config.clip_state_change_steps:
        limit = config.clip_state_change
        mean = trajectory + (mean - trajectory).clamp(-limit, limit)

    policy_states = {"denoised": denoised, "posterior_mean": mean, "noisy": trajectory}
    policy_observations = policy_states[config.policy_input][..., :observation_dim]

    def moments(observations: Tensor) -> tuple[Tensor, Tensor]:
        return policy_moments(policy, normalizer, observations, normalized=True)

    # lines 8-12: update the actions
    exact = config.action_update == "exact"
    if config.action_update == "score" or (last_step and not exact):
        policy_mean, policy_std = moments(policy_observations)
        raw_actions = normalizer.unnormalize(actions, "actions")

    def clip(raw: Tensor) -> Tensor:
        if config.clip_std is None:
            return raw
        reach = config.clip_std * policy_std
        return torch.clamp(raw, policy_mean - reach, policy_mean + reach)

    if last_step and not exact:
        if config.clip_final_actions and config.clip_std is not None:
            actions = normalizer.normalize(clip(raw_actions), "actions")
    elif config.action_update == "score":
        if config.clip_order == "before":
            raw_actions = clip(raw_actions)
        step_size = guidance_scale
        if config.max_guidance is not None:
            largest = config.max_guidance * policy_std.square()
            step_size = torch.minimum(torch.ones_like(largest) * guidance_scale, largest)
        raw_actions = raw_actions + step_size * score(raw_actions, policy_mean, policy_std)
        if config.clip_order == "after":
            raw_actions = clip(raw_actions)
        if config.update_states:
            with torch.enable_grad():
                observations = policy_observations.detach().requires_grad_(True)
                distribution = moments(observations)
                likelihood = log_prob(raw_actions, *distribution).sum()
                (gradient,) = torch.autograd.grad(likelihood, observations)
            denoised[..., :observation_dim] = policy_observations + guidance_scale * gradient
            mean = posterior_mean(denoised)
        actions = normalizer.normalize(raw_actions, "actions") + noise_std * action_noise
    elif config.action_update == "sample":
        policy_mean, policy_std = moments(policy_observations)
        raw_actions = policy_mean + policy_std * action_noise
        actions = normalizer.normalize(raw_actions, "actions")

    # line 13: update states and rewards; line 6 of the next step: set the initial state
    trajectory = mean + noise_std * trajectory_noise
    trajectory[:, 0, :observation_dim] = initial_observations

    if exact:  # the actions of the last step are the policy's at the states that are returned
        observations = trajectory[..., :observation_dim] if last_step else policy_observations
        policy_mean, policy_std = moments(observations)
        actions = normalizer.normalize(policy_mean + policy_std * action_noise, "actions")
    return trajectory, actions
