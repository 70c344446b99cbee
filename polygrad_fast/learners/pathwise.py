"""The policy gradient through the dynamics: what an action changes, by the chain rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polygrad_fast.denoisers.dynamics import Dynamics

React = Callable[[int, Tensor], Tensor]
"""Gets a step's number and gradients in its raw actions, [B, A]; returns them as gradients in the
normalized observations to which the policy reacted with these actions, [B, S]."""


@dataclass(frozen=True)
class Steps:
    """Imagined trajectories, a step after the other; T = H - 1."""

    observations: Tensor  # normalized [H, B, S]
    actions: Tensor  # raw [T, B, A]
    rewards: Tensor  # as the critic learns from them, [T, B]
    predicted_rewards: Tensor  # the same, normalized, [T, B]
    flags: Tensor  # terminals, 0 or 1, [T, B]
    values: Tensor  # of the observations, [H, B]
    value_slopes: Tensor  # gradients of the values in the normalized observations, [H, B, S]


@torch.no_grad()
def action_sensitivities(
    steps: Steps,
    dynamics: Dynamics,
    react: React,
    reward_slope: Tensor | float,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Return lambda-returns R [T, B] and their derivatives q = dR_t / da_t [T, B, A], the policy
    reacting to all that follows.

    With c the probability that a trajectory goes on after a step,

        R_t = r_t + gamma c_t ((1 - lambda) V(s_{t+1}) + lambda R_{t+1})

    and a_t = mu(s_t) + sigma(s_t) z_t, of which z is what chance has drawn, as the chance in s' is.
    p_t = dR_t / ds_t follows backwards from the last step, where it is dV / ds:

        w_t = gamma c_t ((1 - lambda) dV / ds_{t+1} + lambda p_{t+1})
        q_t = dr / da + (ds' / da)^T w_t + gamma (..) dc / da
        p_t = dr / ds + (ds' / ds)^T w_t + gamma (..) dc / ds + (da / ds)^T q_t

    Where nothing ends, E[sum_t (d a_t / d theta)^T q_t], states held, is
    E[sum_t grad log pi(a_t | s_t) A_t], the score function's gradient, with less variance (Mohamed
    et al. 2020, arXiv 1906.10652; Heess et al. 2015, arXiv 1510.09142). Where trajectories may end,
    the score function counts an end as imagined, c above or below 0.5, which has no slope; this
    differentiates the probability. At the imagined end itself, V of the last state stands for what
    would have followed.

    Args:
        dynamics: by which the trajectories were imagined.
        react: the policy's part, (da / ds)^T.
        reward_slope: of `steps.rewards` in normalized rewards.
        gamma, gae_lambda: discount and decay, 0 to 1.
    """
    num_steps, batch, _ = steps.actions.shape
    observations = steps.observations[:-1]
    linearized = dynamics.linearize(
        observations.flatten(0, 1),
        steps.actions.flatten(0, 1),
        steps.observations[1:].flatten(0, 1),
        steps.predicted_rewards.flatten(),
    )
    goes_on = torch.sigmoid(-linearized.logits).view(num_steps, batch)
    alive = 1.0 - steps.flags
    returns, sensitivities = torch.empty_like(steps.rewards), torch.empty_like(steps.actions)
    future, slope = steps.values[-1], steps.value_slopes[-1]
    rewards_gradient = torch.ones_like(future) * reward_slope
    for t in reversed(range(num_steps)):
        decay = gae_lambda * alive[t]
        following = torch.lerp(steps.values[t + 1], future, decay)
        following_slope = torch.lerp(steps.value_slopes[t + 1], slope, decay.unsqueeze(-1))
        discount = gamma * goes_on[t]
        slope, sensitivities[t] = linearized.pull_back(
            slice(t * batch, (t + 1) * batch),
            (discount * alive[t]).unsqueeze(-1) * following_slope,
            rewards_gradient,
            -discount * (1.0 - goes_on[t]) * following,
        )
        slope = slope + react(t, sensitivities[t])
        future = steps.rewards[t] + discount * following
        returns[t] = future
    return returns, sensitivities
