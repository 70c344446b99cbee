"""What a policy and trajectories must be for A2C, and a policy's outputs before its squashing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polygrad_fast.config import A2CConfig
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.protocols import check_trainable, dry_call, policy_moments, reads_normalized


def moments_and_outputs(
    policy: nn.Module, normalizer: Normalizer, inputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a policy's mean and std at inputs in the space it reads, and what its `network` gave
    on the way."""
    outputs = []
    hook = policy.network.register_forward_hook(lambda network, given, out: outputs.append(out))
    try:
        mean, std = policy_moments(policy, normalizer, inputs, reads_normalized(policy))
    finally:
        hook.remove()
    if not (len(outputs) == 1 and torch.is_tensor(outputs[0])):
        raise InputError(
            f"with a2c.saturation_coef above 0, policy.network must return one tensor in a call of "
            f"the policy {type(policy).__name__}, got "
            f"{[type(output).__name__ for output in outputs]}"
        )
    return mean, std, outputs[0]


def check_learning_policy(policy: nn.Module, normalizer: Normalizer, config: A2CConfig) -> None:
    """Raise InputError unless this policy can be trained with these options."""
    check_trainable("policy", policy)
    if config.saturation_coef == 0:
        return
    if not isinstance(getattr(policy, "network", None), nn.Module):
        raise InputError(
            f"a2c.saturation_coef must be 0 for a policy without a module `network`, whose outputs "
            f"it penalizes, got {config.saturation_coef} and a {type(policy).__name__}"
        )
    inputs = normalizer.observations_mean.expand(2, 2, -1)
    call = f"policy {type(policy).__name__}, called with observations {list(inputs.shape)}"
    dry_call(policy, call, inputs.device, lambda: moments_and_outputs(policy, normalizer, inputs))


def check_trajectories(
    policy: nn.Module,
    normalizer: Normalizer,
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    terminals: Tensor,
) -> None:
    """Raise InputError unless these are trajectories that this policy can learn from."""
    observation_dim = normalizer.observation_dim
    weights = next(policy.parameters())
    if observations.ndim != 3 or observations.shape[1] < 2:
        raise InputError(
            f"observations must be of shape [B, H, {observation_dim}] with H at least 2, got "
            f"shape {tuple(observations.shape)}"
        )
    batch, horizon = observations.shape[:2]
    for name, tensor, wanted in (
        ("observations", observations, (batch, horizon, observation_dim)),
        ("actions", actions, (batch, horizon, normalizer.action_dim)),
        ("rewards", rewards, (batch, horizon)),
        ("terminals", terminals, (batch, horizon)),
    ):
        if tuple(tensor.shape) != wanted:
            raise InputError(f"{name} must be of shape {wanted}, got {tuple(tensor.shape)}")
        if (tensor.dtype, tensor.device) != (weights.dtype, weights.device):
            raise InputError(
                f"{name} must be of {weights.dtype} on {weights.device}, as the policy's "
                f"weights, got {tensor.dtype} on {tensor.device}"
            )
    if batch * (horizon - 1) < 2:
        raise InputError(
            f"at least two steps must have a next value, as their advantages are "
            f"standardized, got {batch} trajectories of {horizon} steps"
        )
