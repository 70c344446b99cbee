"""Generalized advantages: a linear recurrence over a trajectory's steps, backwards, in one launch.

A thread has one trajectory and keeps the running advantage and the next value in registers. Read
are 4 B (3 H - 1) bytes, written 4 B (H - 1); 6 FLOPs a step. Derivation: README.md in this folder.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polygrad_fast.errors import InputError

BLOCK_BATCH = 32
"""Trajectories per program, one warp: 1024 of them take 32 multiprocessors. Not measured."""


@triton.jit
def _generalized_advantages_kernel(
    rewards_ptr,  # [B, H]
    values_ptr,  # [B, H]
    terminals_ptr,  # [B, H]
    advantages_ptr,  # [B, H - 1]
    gamma,
    decay,  # gamma lambda
    batch,
    horizon,
    stride_rewards_b,
    stride_rewards_t,
    stride_values_b,
    stride_values_t,
    stride_terminals_b,
    stride_terminals_t,
    stride_advantages_b,
    BLOCK_BATCH: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    mask = b < batch
    row = b.to(tl.int64)
    rewards_ptr += row * stride_rewards_b
    values_ptr += row * stride_values_b
    terminals_ptr += row * stride_terminals_b
    advantages_ptr += row * stride_advantages_b
    following = tl.load(values_ptr + (horizon - 1) * stride_values_t, mask=mask, other=0.0)
    advantage = tl.zeros((BLOCK_BATCH,), dtype=tl.float32)
    for back in range(1, horizon):
        t = horizon - 1 - back
        reward = tl.load(rewards_ptr + t * stride_rewards_t, mask=mask, other=0.0)
        value = tl.load(values_ptr + t * stride_values_t, mask=mask, other=0.0)
        continues = 1.0 - tl.load(terminals_ptr + t * stride_terminals_t, mask=mask, other=0.0)
        delta = reward + gamma * continues * following - value
        advantage = delta + decay * continues * advantage
        tl.store(advantages_ptr + t, advantage, mask=mask)
        following = value


def generalized_advantages(
    rewards: Tensor, values: Tensor, terminals: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Return generalized advantage estimates [B, H - 1], as the twin in `reference` does.

    May be captured; nothing is read on the host.

    Args:
        rewards, values, terminals: float32 [B, H] each, of any strides, on one device.
        gamma, gae_lambda: discount and decay, 0 to 1.

    Raises:
        InputError: another dtype, or shapes differ.
    """
    tensors = {"rewards": rewards, "values": values, "terminals": terminals}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.ndim != 2 or tensor.shape != rewards.shape:
            raise InputError(
                f"{name} must be float32 of the shape [B, H] of rewards, {list(rewards.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    batch, horizon = rewards.shape
    advantages = rewards.new_empty(batch, max(0, horizon - 1))
    if advantages.numel() == 0:
        return advantages
    _generalized_advantages_kernel[(triton.cdiv(batch, BLOCK_BATCH),)](
        rewards_ptr=rewards,
        values_ptr=values,
        terminals_ptr=terminals,
        advantages_ptr=advantages,
        gamma=gamma,
        decay=gamma * gae_lambda,
        batch=batch,
        horizon=horizon,
        stride_rewards_b=rewards.stride(0),
        stride_rewards_t=rewards.stride(1),
        stride_values_b=values.stride(0),
        stride_values_t=values.stride(1),
        stride_terminals_b=terminals.stride(0),
        stride_terminals_t=terminals.stride(1),
        stride_advantages_b=advantages.stride(0),
        BLOCK_BATCH=BLOCK_BATCH,
        num_warps=1,
        num_stages=1,
    )
    return advantages
