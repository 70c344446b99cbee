"""What is measured on trajectories before a policy learns from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

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

    The last step only serves as the next value. On a GPU it is one kernel, where triton is there;
    else a scan whose spans double.

    Args:
        rewards, values, terminals: r, V and d, [B, H] each.
        gamma, gae_lambda: discount and decay, 0 to 1.
    """
    if rewards.device.type == "cuda" and rewards.dtype == torch.float32:
        kernel = _kernel()
        if kernel is not None:
            return kernel(rewards, values, terminals, gamma, gae_lambda)
    return doubling_scan(rewards, values, terminals, gamma, gae_lambda)


def doubling_scan(
    rewards: Tensor, values: Tensor, terminals: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Return the same in log2 H operations, on any device."""
    # one row per step: PyTorch is slow where the last axis is short
    rewards, values, terminals = (x.t().contiguous() for x in (rewards, values, terminals))
    continues = 1.0 - terminals[:-1]
    advantages = torch.addcmul(rewards[:-1] - values[:-1], continues, values[1:], value=gamma)
    # A_t is the sum over `span` steps from t so far, and decay_t what multiplies the steps after
    decay, span = continues.mul_(gamma * gae_lambda), 1
    while span < len(advantages):
        advantages[:-span] = torch.addcmul(advantages[:-span], decay[:-span], advantages[span:])
        decay[:-span] = decay[:-span] * decay[span:]
        span *= 2
    return advantages.t()


@functools.cache
def _kernel() -> Callable[..., Tensor] | None:
    """Return the GPU's kernel, None without triton."""
    try:
        from polygrad_fast.kernels.generalized_advantages import generalized_advantages
    except ImportError:
        return None
    return generalized_advantages


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
