"""Generalized advantage estimation, step by step."""

from __future__ import annotations

import torch
from torch import Tensor


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
