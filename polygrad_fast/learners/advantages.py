"""What is measured on trajectories before a policy learns from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polygrad_fast.errors import InputError
from polygrad_fast.terminals import alive_steps


def spread(standardized_actions: Tensor, statistic: str) -> Tensor:
    """Return the spread of standardized actions (a - mu) / sigma, [..., A], which is 1 for
    on-policy actions.

    "std": mean over action dimensions of the standard deviation (equation 9, as released);
    "mean_abs": E|z| / sqrt(2 / pi).

    Raises:
        InputError: another statistic.
    """
    if statistic == "mean_abs":
        return standardized_actions.abs().mean() / math.sqrt(2 / math.pi)
    if statistic != "std":
        raise InputError(f"statistic must be 'std' or 'mean_abs', got {statistic!r}")
    return standardized_actions.flatten(0, -2).std(dim=0).mean()


def generalized_advantages(
    rewards: Tensor, values: Tensor, terminals: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Return generalized advantage estimates [B, H - 1] (Schulman et al. 2016, arXiv 1506.02438).

    delta_t = r_t + gamma (1 - d_t) V(s_{t+1}) - V(s_t)
    A_t = delta_t + gamma lambda (1 - d_t) A_{t+1}

    The last step only serves as the next value.

    Args:
        rewards, values, terminals: r, V and d, [B, H] each.
        gamma, gae_lambda: discount and decay, 0 to 1.
    """
    continues = 1.0 - terminals[:, :-1]
    deltas = rewards[:, :-1] + gamma * continues * values[:, 1:] - values[:, :-1]
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * gae_lambda * continues[:, t] * running
        advantages[:, t] = running
    return advantages


def step_weights(terminals: Tensor, terminal_step_weight: float) -> Tensor:
    """Return the weights of steps in the losses, [B, H] -> [B, H]: 1 before the first terminal one,
    `terminal_step_weight` at it, 0 after it."""
    alive = alive_steps(terminals).to(terminals.dtype)
    return alive * (1.0 - terminals + terminal_step_weight * terminals)


def standardized(advantages: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return advantages [B, T] less their mean, over their standard deviation (unbiased); moments
    with weights [B, T] each step counts as often as it weighs; None: once."""
    if weights is None:
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    total = weights.sum()
    centered = advantages - (advantages * weights).sum() / total.clamp(min=1.0)
    variance = (centered.square() * weights).sum() / (total - 1.0).clamp(min=1.0)
    return centered / (variance.sqrt() + 1e-8)
