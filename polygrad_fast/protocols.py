"""What a denoiser and a policy of your own must offer, and the check that they do.

B batch, H horizon, S observation, A action, D = S + 2 (observation, reward, terminal flag), K
diffusion steps.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer


@runtime_checkable
class Denoiser(Protocol):
    """eps_theta(x | i, u): a module, or any callable with three attributes.

    A function gets them by assignment: `denoise.horizon = 10`. Where it also has
    `num_embedded_steps`, schedules of more steps are refused.

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


@runtime_checkable
class Policy(Protocol):
    """pi(a | s) = N(mean, std), diagonal: a module or any other callable.

    A policy whose network reads normalized observations may say so with the attribute
    `normed_inputs = True`; it then also has `distribution(inputs)`, which returns what a call does,
    for normalized observations, and which samplers and the learner use. Where a policy has
    `observation_dim` and `action_dim`, they are compared with the denoiser's.
    """

    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the raw actions, differentiably.

        Args:
            observations: raw, float32 [..., S]; may be overwritten.

        Returns:
            mean and std > 0, [..., A] each, floating point.
        """


def policy_moments(policy: Policy, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a policy's mean and std, [..., A] each, in the inputs' dtype.

    Args:
        inputs: observations [..., S] in the space the policy reads: normalized where
            `policy.normed_inputs`, else raw. The policy gets a copy.
    """
    call = policy.distribution if reads_normalized(policy) else policy
    mean, std = call(inputs.clone())
    return mean.to(inputs.dtype), std.to(inputs.dtype)


def reads_normalized(policy: Policy) -> bool:
    """Return whether a policy's network reads normalized observations."""
    return bool(getattr(policy, "normed_inputs", False))


def check_normalizer(normalizer: Any) -> None:
    """Raise InputError unless this is a `Normalizer`."""
    if not isinstance(normalizer, Normalizer):
        raise InputError(
            f"normalizer must be a polygrad_fast.Normalizer (Normalizer.from_moments makes one of "
            f"means and standard deviations), got {_kind(normalizer)}"
        )


def check_denoiser(
    denoiser: Any, num_train_timesteps: int, device: torch.device, trained: bool = False
) -> None:
    """Call a denoiser once and raise InputError unless it is a `Denoiser`.

    The call changes neither buffers nor the global random numbers.

    Args:
        num_train_timesteps: K. device: where the denoiser computes.
        trained: whether it is to be trained: then it must be a module of float32 weights, and is
            differentiated once.
    """
    if trained:
        check_trainable("denoiser", denoiser)
    name = f"denoiser {_kind(denoiser)}"
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
            f"the schedule has {num_train_timesteps} steps, the denoiser's step embedding only "
            f"{num_embedded} rows"
        )
    _check_weights(denoiser, name)
    state_dim, horizon = denoiser.observation_dim + 2, denoiser.horizon
    batch = _other_than(state_dim, horizon, denoiser.action_dim)
    wanted = (batch, horizon, state_dim)
    dtype = weights_dtype(denoiser)
    trajectory, actions = (
        _draw((batch, horizon, dim), device, dtype) for dim in (state_dim, denoiser.action_dim)
    )
    timesteps = torch.full((batch,), num_train_timesteps - 1, device=device)
    call = f"denoiser(trajectory {list(wanted)}, actions {list(actions.shape)}, timesteps)"

    def predict() -> Any:
        return denoiser(trajectory.clone(), actions.clone(), timesteps.clone())

    prediction = _dry_call(denoiser, name, call, device, predict)
    _check_result(prediction, wanted, f"{name}, called as {call},", "a prediction")
    if trained:
        _check_float32(denoiser, name)
        check = functools.partial(_check_gradient, denoiser, lambda: (predict(),))
        _dry_call(denoiser, name, call, device, check, gradients=True)


def check_policy(
    policy: Any,
    normalizer: Normalizer,
    action_dim: int,
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
    trained: bool = False,
) -> None:
    """Call a policy once per shape and raise InputError unless it is a `Policy`.

    The calls change neither buffers nor the global random numbers.

    Args:
        normalizer: whose observations it reads. action_dim: A.
        shapes: the axes before S to call it with, for instance [(4,), (2, 10)].
        device: where the policy computes.
        trained: whether it is to be trained: then it must be a module of float32 weights, and is
            differentiated once.
    """
    if trained:
        check_trainable("policy", policy)
    name = f"policy {_kind(policy)}"
    normed = reads_normalized(policy)
    method, space = ("policy.distribution", "normalized ") if normed else ("policy", "")
    function = getattr(policy, "distribution", None) if normed else policy
    if not callable(function):
        raise InputError(
            f"{name} must be callable as {method}({space}observations), returning mean and std of "
            f"the raw actions (see polygrad_fast.Policy)"
        )
    if normed and passes_by_forward(policy):
        raise InputError(
            f"{name} has normed_inputs=True and a forward of its own or a hook on it, which "
            f"policy.distribution passes by: change distribution too, or read raw observations "
            f"(normed_inputs=False)"
        )
    _check_weights(policy, name)
    for shape in shapes:
        inputs = _draw((*shape, normalizer.observation_dim), device, torch.float32)
        if not normed:
            inputs = normalizer.unnormalize(inputs, "observations")
        call = f"{method}({space}observations {list(inputs.shape)})"
        moments = functools.partial(lambda inputs: function(inputs.clone()), inputs)
        result = _dry_call(policy, name, call, device, moments)
        what = f"{name}, called as {call},"
        if not (isinstance(result, (tuple, list)) and len(result) == 2):
            raise InputError(f"{what} returned {_kind(result)}, wanted the pair (mean, std)")
        for field, tensor in zip(("a mean", "an std"), result, strict=True):
            _check_result(tensor, (*shape, action_dim), what, field)
        std = result[1]
        if not ((std > 0) & torch.isfinite(std)).all():
            raise InputError(
                f"{what} returned an std of {std.min().item():.3g} to {std.max().item():.3g}, "
                f"wanted positive finite numbers"
            )
    if trained:
        _check_float32(policy, name)
        check = functools.partial(_check_gradient, policy, moments)
        _dry_call(policy, name, call, device, check, gradients=True)


def check_trainable(name: str, module: Any) -> None:
    """Raise InputError unless this is a module with weights to train that a checkpoint can hold."""
    what = f"{name} {_kind(module)}"
    if not isinstance(module, nn.Module):
        raise InputError(f"{what} cannot be trained, wanted a torch.nn.Module")
    _check_weights(module, what)
    if not any(weight.requires_grad for weight in module.parameters()):
        raise InputError(f"{what} has no weights that require a gradient, wanted some to train")
    for key, value in module.state_dict().items():
        if not torch.is_tensor(value):
            raise InputError(
                f"{what} keeps a {_kind(value)} in its state_dict ({key!r}), wanted tensors only: "
                f"a checkpoint holds nothing else"
            )


def weights_dtype(module: Any, default: torch.dtype = torch.float32) -> torch.dtype:
    """Return the dtype of a module's weights, `default` where there are none."""
    weights = module.parameters() if isinstance(module, nn.Module) else ()
    return next((w.dtype for w in weights if w.is_floating_point()), default)


def passes_by_forward(policy: Any) -> bool:
    """Return whether calling a policy's other methods, as `distribution`, leaves out something that
    calling the policy does: a forward of its own, or a hook on it."""
    if not isinstance(policy, nn.Module):
        return False

    def depth(name: str) -> int:  # of the class that defines it, 0 = the policy's own
        return next((i for i, k in enumerate(type(policy).__mro__) if name in vars(k)), 0)

    hooked = policy._forward_hooks or policy._forward_pre_hooks
    replaced = "forward" in vars(policy) and "distribution" not in vars(policy)
    return bool(hooked or replaced or depth("forward") < depth("distribution"))


def _check_float32(module: nn.Module, name: str) -> None:
    for key, weight in module.named_parameters():
        if weight.dtype != torch.float32:
            raise InputError(f"{name} has {key} in {weight.dtype}, training wants torch.float32")


def _check_gradient(module: nn.Module, outputs: Callable[[], Iterable[Tensor]]) -> None:
    """Raise an error unless the outputs' gradient reaches a weight; leave `grad` as it is."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    total = sum(output.sum() for output in outputs())
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise RuntimeError("no weight has a gradient")


def _check_weights(module: Any, name: str) -> None:
    if isinstance(module, nn.Module) and any(map(is_lazy, module.parameters())):
        raise InputError(f"{name} has weights without a shape yet (lazy layers): call it once")


def _dry_call(
    owner: Any, name: str, call: str, device: torch.device, function: Callable, gradients=False
) -> Any:
    try:
        with (
            _unchanged(owner, device),
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.autocast(device.type, enabled=False),
        ):
            return function()
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        failed = "cannot be differentiated" if gradients else "failed"
        raise InputError(f"{name}, called as {call}, {failed}: {reason}") from error


@contextlib.contextmanager
def _unchanged(module: Any, device: torch.device) -> Iterator[None]:
    """Put a module's buffers and the global random numbers back as they were."""
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    before = [
        (part._buffers, name, buffer, buffer.detach().clone())
        for part in parts
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for buffers, name, buffer, value in before:
                buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _check_result(tensor: Any, wanted: tuple[int, ...], what: str, field: str) -> None:
    if not torch.is_tensor(tensor):
        raise InputError(f"{what} returned {_kind(tensor)} as {field}, wanted a tensor")
    if tuple(tensor.shape) != wanted:
        raise InputError(
            f"{what} returned {field} of shape {list(tensor.shape)}, wanted {list(wanted)}"
        )
    if not tensor.is_floating_point():
        raise InputError(f"{what} returned {field} of {tensor.dtype}, wanted floating point")


def _draw(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)


def _other_than(*sizes: int) -> int:
    """Return a batch size that no other axis has, so that exchanged axes are seen."""
    return next(batch for batch in range(2, 6) if batch not in sizes)


def _kind(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) and callable(value) else type(value).__name__
