"""Weights of the released Policy-Guided Diffusion agents, to this library's TD3+BC and IQL and
back.

Names are flax's: `actor.Dense_0.kernel` [in, out], `q1.Dense_2.bias`, `actor.logstd`, `value.`;
IQL's twin critics are `q.VmapSoftQNetwork_0.Dense_k` with a leading axis of 2; targets are
`target_actor.`, `target_q1.`, `target_q2.`, `target_q.`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.compat.weights import part
from polygrad_fast.config import IQLConfig, TD3BCConfig
from polygrad_fast.errors import InputError
from polygrad_fast.learners import IQL, TD3BC
from polygrad_fast.learners.networks import (
    BoundedGaussianPolicy,
    BoundedPolicy,
    DeterministicPolicy,
    TwinCritics,
)

Bounds = Sequence[float] | Tensor
Moments = tuple[Tensor, Tensor] | None
_TWINS = "VmapSoftQNetwork_0."


def load_policy(
    arrays: Mapping[str, Any], low: Bounds, high: Bounds, observation_moments: Moments = None
) -> BoundedPolicy:
    """Build a policy from an agent's actor: IQL's, which has `logstd`, or TD3+BC's.

    Args:
        arrays: `Dense_k.kernel`, `Dense_k.bias`, k = 0, 1, 2, perhaps `logstd`; numpy or torch.
        low, high: the actions' bounds, [A].
        observation_moments: mean and std [S], where it normalizes observations.

    Raises:
        InputError: an array is missing or of another shape.
    """
    arrays = _tensors(arrays)
    observation_dim, hidden_dim = _of(arrays, "Dense_0.kernel", 2).shape
    kind = BoundedGaussianPolicy if "logstd" in arrays else DeterministicPolicy
    policy = kind(observation_dim, low, high, hidden_dim, observation_moments)
    _load_actor(policy, arrays)
    return policy


def load_td3_bc(
    arrays: Mapping[str, Any],
    low: Bounds,
    high: Bounds,
    config: TD3BCConfig | None = None,
    observation_moments: Moments = None,
) -> TD3BC:
    """Build TD3+BC from a released agent's weights; targets are copies where `arrays` has none.

    Args:
        arrays: `actor.*`, `q1.*`, `q2.*`, perhaps `target_actor.*`, `target_q1.*`, `target_q2.*`.
        low, high: the actions' bounds, [A].
        config: default the released settings; its `hidden_dim` is the arrays'.
        observation_moments: as in `TD3BC`.

    Raises:
        InputError: an array is missing or of another shape.
    """
    arrays = _tensors(arrays)
    options = _options(arrays, config or TD3BCConfig())
    agent = TD3BC(*options[:1], low, high, options[1], observation_moments)
    for prefix, policy, critics in (
        ("", agent.policy, agent.critics),
        ("target_", agent.target_policy, agent.target_critics),
    ):
        if prefix and not part(arrays, prefix):
            prefix = ""
        _load_actor(policy, part(arrays, f"{prefix}actor."))
        q1, q2 = (part(arrays, f"{prefix}q{k}.") for k in (1, 2))
        _load_critics(critics, {n: torch.stack((v, _of(q2, n, v.ndim))) for n, v in q1.items()})
    return agent


def load_iql(
    arrays: Mapping[str, Any],
    low: Bounds,
    high: Bounds,
    config: IQLConfig | None = None,
    observation_moments: Moments = None,
) -> IQL:
    """Build IQL from a released agent's weights; targets are copies where `arrays` has none.

    Args:
        arrays: `actor.*` with `actor.logstd`, `q.VmapSoftQNetwork_0.*`, `value.*`, perhaps
            `target_q.VmapSoftQNetwork_0.*`.
        low, high, config, observation_moments: as in `load_td3_bc`.

    Raises:
        InputError: an array is missing or of another shape.
    """
    arrays = _tensors(arrays)
    options = _options(arrays, config or IQLConfig())
    agent = IQL(*options[:1], low, high, options[1], observation_moments)
    _load_actor(agent.policy, part(arrays, "actor."))
    _load_mlp(agent.value_function, part(arrays, "value."))
    critics = part(arrays, f"q.{_TWINS}")
    _load_critics(agent.critics, critics)
    _load_critics(agent.target_critics, part(arrays, f"target_q.{_TWINS}") or critics)
    return agent


def export_agent(agent: TD3BC | IQL, gradients: bool = False) -> dict[str, Tensor]:
    """Return an agent's weights, targets included, under the released names; copies.

    Args:
        gradients: return the gradients of the last steps instead, of what has been trained.
    """
    arrays = _actor_arrays(agent.policy, "actor.", gradients)
    if isinstance(agent, IQL):
        arrays |= _critic_arrays(agent.critics, f"q.{_TWINS}", gradients)
        arrays |= _mlp_arrays(agent.value_function, "value.", gradients)
        if not gradients:
            arrays |= _critic_arrays(agent.target_critics, f"target_q.{_TWINS}", False)
        return arrays
    twins = (
        {"": agent.critics} if gradients else {"": agent.critics, "target_": agent.target_critics}
    )
    for prefix, critics in twins.items():
        for name, both in _critic_arrays(critics, "", gradients).items():
            arrays |= {f"{prefix}q{k}.{name}": one for k, one in enumerate(both, 1)}
    if not gradients:
        arrays |= _actor_arrays(agent.target_policy, "target_actor.", False)
    return arrays


def _options(arrays: dict[str, Tensor], config: Any) -> tuple[int, Any]:
    """Return S and the configuration with the arrays' width."""
    observation_dim, hidden_dim = _of(arrays, "actor.Dense_0.kernel", 2).shape
    return observation_dim, replace(config, hidden_dim=hidden_dim)


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in arrays.items()}


def _of(arrays: Mapping[str, Tensor], name: str, rank: int) -> Tensor:
    """Return a named array of a rank."""
    if name not in arrays:
        raise InputError(
            f"weights of a released agent must hold {name}, got {sorted(arrays) or 'nothing'}"
        )
    if arrays[name].ndim != rank:
        raise InputError(f"{name} must have {rank} axes, got shape {list(arrays[name].shape)}")
    return arrays[name]


@torch.no_grad()
def _copy(parameter: Tensor, array: Tensor, name: str) -> None:
    if parameter.shape != array.shape:
        raise InputError(
            f"{name} must have shape {list(parameter.shape)} as the agent's other weights, got "
            f"{list(array.shape)}"
        )
    parameter.copy_(array)


def _load_mlp(network: nn.Sequential, arrays: Mapping[str, Tensor]) -> None:
    for k, linear in enumerate(network[::2]):
        _copy(linear.weight, _of(arrays, f"Dense_{k}.kernel", 2).T, f"Dense_{k}.kernel transposed")
        _copy(linear.bias, _of(arrays, f"Dense_{k}.bias", 1), f"Dense_{k}.bias")


def _load_actor(policy: BoundedPolicy, arrays: Mapping[str, Tensor]) -> None:
    _load_mlp(policy.network, arrays)
    if isinstance(policy, BoundedGaussianPolicy):
        _copy(policy.log_std, _of(arrays, "logstd", 1), "logstd")


def _load_critics(critics: TwinCritics, arrays: Mapping[str, Tensor]) -> None:
    for k, (kernel, bias) in enumerate(zip(critics.kernels, critics.biases, strict=True)):
        _copy(kernel, _of(arrays, f"Dense_{k}.kernel", 3), f"Dense_{k}.kernel")
        _copy(bias, _of(arrays, f"Dense_{k}.bias", 2)[:, None], f"Dense_{k}.bias")


def _named(parameter: Tensor, name: str, gradients: bool) -> dict[str, Tensor]:
    """Return a parameter, or its gradient where there is one, by its released name."""
    tensor = parameter.grad if gradients else parameter
    return {} if tensor is None else {name: tensor.detach().clone()}


def _mlp_arrays(network: nn.Sequential, prefix: str, gradients: bool) -> dict[str, Tensor]:
    arrays = {}
    for k, linear in enumerate(network[::2]):
        kernel = _named(linear.weight, f"{prefix}Dense_{k}.kernel", gradients)
        arrays |= {name: weight.T.contiguous() for name, weight in kernel.items()}
        arrays |= _named(linear.bias, f"{prefix}Dense_{k}.bias", gradients)
    return arrays


def _actor_arrays(policy: BoundedPolicy, prefix: str, gradients: bool) -> dict[str, Tensor]:
    arrays = _mlp_arrays(policy.network, prefix, gradients)
    if isinstance(policy, BoundedGaussianPolicy):
        arrays |= _named(policy.log_std, f"{prefix}logstd", gradients)
    return arrays


def _critic_arrays(critics: TwinCritics, prefix: str, gradients: bool) -> dict[str, Tensor]:
    arrays = {}
    for k, (kernel, bias) in enumerate(zip(critics.kernels, critics.biases, strict=True)):
        arrays |= _named(kernel, f"{prefix}Dense_{k}.kernel", gradients)
        both = _named(bias, f"{prefix}Dense_{k}.bias", gradients)
        arrays |= {name: one.squeeze(1) for name, one in both.items()}
    return arrays
