"""A denoiser of your own: what it must offer, its call, and the check before.

B batch, H horizon, S observation, A action, D = S + 2 (observation, reward, terminal flag), K
diffusion steps.
"""

from __future__ import annotations

import numbers
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from polygrad_fast.errors import InputError
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


@runtime_checkable
class Denoiser(Protocol):
    """eps_theta(x | i, u): a module, or any callable with three attributes.

    A function gets them by assignment: `denoise.horizon = 10`. Where it also has
    `num_embedded_steps`, schedules of more steps are refused.

    Where it has `transition_losses`, which maps clean windows [B, H, D] and actions [B, H, A], all
    normalized, to scalars by name, training minimizes their sum in place of the denoising loss.

    With a true attribute `reads_initial_noise` it is called, in every diffusion step of a sample,
    with the normals that this began from instead of noisy states.

    Attributes:
        observation_dim, action_dim, horizon: S, A and H.
    """

    observation_dim: int
    action_dim: int
    horizon: int

    def __call__(self, trajectory: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the clean trajectory or the noise (`SamplerConfig.prediction_type`).

        Args:
            trajectory: noisy observations, rewards and terminal flags [B, H, D], normalized,
                float32 (a module's weights' dtype, where that is another). It may be overwritten,
                as may the actions, but not kept: the engines use their memory again.
            actions: [B, H, A], normalized, of the same dtype; multiplied by sqrt(alphabar) with
                `SamplerConfig.scale_actions`.
            timesteps: diffusion steps, 0 = least noise, int64 [B]; in sampling all are equal.

        Returns:
            The prediction [B, H, D], normalized, floating point.
        """


def call_denoiser(denoiser: Denoiser, trajectory: Tensor, actions: Tensor, k: int) -> Tensor:
    """Return a denoiser's prediction [B, H, D] at diffusion step k, in the trajectory's dtype.

    A module computes in the dtype of its weights. It may overwrite `trajectory` [B, H, D] and
    `actions` [B, H, A], and may return a tensor that it keeps and uses again.

    Raises:
        InputError: it returns something else.
    """
    dtype = weights_dtype(denoiser, trajectory.dtype)
    timesteps = torch.full((len(trajectory),), k, device=trajectory.device)
    prediction = denoiser(trajectory.to(dtype), actions.to(dtype), timesteps)
    wrong = wrong_result(prediction, trajectory.shape)
    if wrong:
        raise InputError(
            f"{_denoiser_call(denoiser, trajectory, actions)}, must return a prediction {wrong}"
        )
    return prediction.to(trajectory.dtype)


def check_denoiser(
    denoiser: Any, num_train_timesteps: int, device: torch.device, trained: bool = False
) -> None:
    """Call a denoiser once and raise InputError unless it is a `Denoiser`.

    The call changes neither buffers nor the global random numbers.

    Args:
        num_train_timesteps: K.
        device: where the denoiser computes.
        trained: whether it is to be trained: then it must be a module of float32 weights, and is
            differentiated once.
    """
    if trained:
        check_trainable("denoiser", denoiser)
    name = f"denoiser {kind_of(denoiser)}"
    if not callable(denoiser):
        raise InputError(f"{name} must be callable as denoiser(trajectory, actions, timesteps)")
    for attribute in ("observation_dim", "action_dim", "horizon"):
        size = getattr(denoiser, attribute, None)
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise InputError(
                f"{name} must have the attribute {attribute}, an integer of at least 1, got "
                f"{size!r} (see polygrad_fast.Denoiser; is it the policy?)"
            )
    num_embedded = getattr(denoiser, "num_embedded_steps", None)
    if num_embedded is not None and num_embedded < num_train_timesteps:
        raise InputError(
            f"the denoiser's step embedding must have a row for each of the schedule's "
            f"{num_train_timesteps} steps, got {num_embedded}"
        )
    check_weights(denoiser, name)
    state_dim, horizon = denoiser.observation_dim + 2, denoiser.horizon
    batch = _other_than(state_dim, horizon, denoiser.action_dim)
    trajectory, actions = (
        draw((batch, horizon, dim), device) for dim in (state_dim, denoiser.action_dim)
    )

    def predict() -> Tensor:
        return call_denoiser(denoiser, trajectory.clone(), actions.clone(), num_train_timesteps - 1)

    call = _denoiser_call(denoiser, trajectory, actions)
    dry_call(denoiser, call, device, predict)
    if trained:
        check_float32(denoiser, name)
        weights = list(denoiser.parameters())
        check_gradient(denoiser, call, device, "its weights", weights, lambda: [predict()])


def _denoiser_call(denoiser: Any, trajectory: Tensor, actions: Tensor) -> str:
    shapes = f"trajectory {list(trajectory.shape)}, actions {list(actions.shape)}"
    return f"denoiser {kind_of(denoiser)}, called as denoiser({shapes}, timesteps)"


def _other_than(*sizes: int) -> int:
    """Return a batch size that no other axis has, so that exchanged axes are seen."""
    return next(batch for batch in range(2, 6) if batch not in sizes)
