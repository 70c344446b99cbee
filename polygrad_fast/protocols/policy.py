"""A policy of your own: what it must offer, its call, and the check before.

B batch, H horizon, S observation, A action.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.protocols.checks import (
    check_float32,
    check_gradient,
    check_trainable,
    check_weights,
    draw,
    dry_call,
    kind_of,
    weights_dtype,
    wrong_result,
)


class Policy(Protocol):
    """pi(a | s) = N(mean, std), diagonal: a module or any other callable.

    A policy whose network reads normalized observations says so with the attribute
    `normed_inputs = True`. It then has `distribution(inputs)`, which returns at normalized
    observations what a call returns at raw ones: samplers, learner and agent use it instead of the
    call, and normalize with their own moments. Where a policy has `observation_dim` and
    `action_dim`, they must equal the denoiser's.
    """

    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the raw actions, differentiably.

        Args:
            observations: raw, float32 (a module's weights' dtype, where that is another) [..., S];
                may be overwritten.

        Returns:
            mean and std > 0, [..., A] each, floating point.
        """


def policy_moments(
    policy: Policy, normalizer: Normalizer, observations: Tensor, normalized: bool
) -> tuple[Tensor, Tensor]:
    """Return a policy's mean and std of the raw actions, [..., A] each, in the observations' dtype.

    Args:
        observations: [..., S]; the policy gets a copy, in the space that it reads and, as a module,
            in the dtype of its weights.
        normalized: whether they are normalized.

    Raises:
        InputError: it returns something else, or its `distribution` leaves out what a call does, so
            that the two mean different things.
    """
    reads = reads_normalized(policy)
    if reads and _leaves_out_forward(policy):
        raise InputError(
            f"{_policy_name(policy)} has normed_inputs=True and a forward of its own or a hook on "
            f"it, which policy.distribution leaves out: change distribution too, put the hook on a "
            f"part of it, or read raw observations (normed_inputs=False)"
        )
    if reads and not normalized:
        inputs = normalizer.normalize(observations, "observations")
    elif normalized and not reads:
        inputs = normalizer.unnormalize(observations, "observations")
    else:
        inputs = observations.clone()
    inputs = inputs.to(weights_dtype(policy, inputs.dtype))
    result = (policy.distribution if reads else policy)(inputs)
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        raise InputError(
            f"{_policy_call(policy, observations)}, must return the pair (mean, std), got a "
            f"{kind_of(result)}"
        )
    wanted = (*observations.shape[:-1], normalizer.action_dim)
    for name, tensor in zip(("a mean", "an std"), result, strict=True):
        wrong = wrong_result(tensor, wanted)
        if wrong:
            raise InputError(f"{_policy_call(policy, observations)}, must return {name} {wrong}")
    mean, std = result
    return mean.to(observations.dtype), std.to(observations.dtype)


def reads_normalized(policy: Policy) -> bool:
    """Return whether a policy's network reads normalized observations."""
    return bool(getattr(policy, "normed_inputs", False))


def check_policy(
    policy: Any,
    normalizer: Normalizer,
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
    trained: bool = False,
    guides_states: bool = False,
) -> None:
    """Call a policy once per shape and raise InputError unless it is a `Policy`.

    The calls change neither buffers nor the global random numbers.

    Args:
        normalizer: whose observations it reads.
        shapes: the axes before S to call it with, for instance [(4,), (2, 10)].
        device: where the policy computes.
        trained: whether it is to be trained: then it must be a module of float32 weights, and is
            differentiated once.
        guides_states: whether its gradient moves observations (`SamplerConfig.update_states`).
    """
    if trained:
        check_trainable("policy", policy)
    name, normed = _policy_name(policy), reads_normalized(policy)
    if not callable(getattr(policy, "distribution", None) if normed else policy):
        method, space = ("policy.distribution", "normalized ") if normed else ("policy", "")
        raise InputError(
            f"{name} must be callable as {method}({space}observations), returning mean and std of "
            f"the raw actions (see polygrad_fast.Policy)"
        )
    check_weights(policy, name)
    for shape in shapes:
        inputs = draw((*shape, normalizer.observation_dim), device)
        call = _policy_call(policy, inputs)

        def moments(inputs: Tensor = inputs) -> tuple[Tensor, Tensor]:
            return policy_moments(policy, normalizer, inputs, normalized=True)

        _, std = dry_call(policy, call, device, moments)
        if not ((std > 0) & torch.isfinite(std)).all():
            raise InputError(
                f"{call}, must return an std of positive finite numbers, got "
                f"{std.min().item():.3g} to {std.max().item():.3g}"
            )
    if trained:
        check_float32(policy, name)
        weights = list(policy.parameters())
        check_gradient(policy, call, device, "its weights", weights, moments)
    if guides_states:
        what = "the observations, which update_states=True wants"
        check_gradient(policy, call, device, what, [inputs.requires_grad_()], moments)


def _leaves_out_forward(policy: Any) -> bool:
    """Return whether a policy's `distribution` leaves out something that calling the policy does.

    That is a forward of its own, or a hook on it.
    """
    if not isinstance(policy, nn.Module):
        return False

    def depth(name: str) -> int:  # of the class that defines it, 0 = the policy's own
        return next((i for i, k in enumerate(type(policy).__mro__) if name in vars(k)), 0)

    hooked = policy._forward_hooks or policy._forward_pre_hooks
    replaced = "forward" in vars(policy) and "distribution" not in vars(policy)
    return bool(hooked or replaced or depth("forward") < depth("distribution"))


def _policy_call(policy: Any, observations: Tensor) -> str:
    method = "policy.distribution(normalized " if reads_normalized(policy) else "policy("
    return f"{_policy_name(policy)}, called as {method}observations {list(observations.shape)})"


def _policy_name(policy: Any) -> str:
    return f"policy {kind_of(policy)}"
