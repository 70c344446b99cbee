"""What a denoiser and a policy of your own must offer, the calls of them, and the checks before.

B batch, H horizon, S observation, A action, D = S + 2 (observation, reward, terminal flag), K
diffusion steps.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polygrad_fast.errors import InputError, first_line
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


class Policy(Protocol):
    """pi(a | s) = N(mean, std), diagonal: a module or any other callable.

    A policy whose network reads normalized observations says so with the attribute
    `normed_inputs = True`. It then has `distribution(inputs)`, which is what a call is, but for
    normalized observations: samplers, learner and agent use it instead of the call, and normalize
    with their own moments. Where a policy has `observation_dim` and `action_dim`, they are compared
    with the denoiser's.
    """

    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the raw actions, differentiably.

        Args:
            observations: raw, float32 (a module's weights' dtype, where that is another) [..., S];
                may be overwritten.

        Returns:
            mean and std > 0, [..., A] each, floating point.
        """


def call_denoiser(denoiser: Denoiser, trajectory: Tensor, actions: Tensor, k: int) -> Tensor:
    """Return a denoiser's prediction [B, H, D] at diffusion step k, in the trajectory's dtype.

    A module computes in the dtype of its weights. It may overwrite `trajectory` [B, H, D] and
    `actions` [B, H, A], and what it returns may be its own.

    Raises:
        InputError: it returns something else.
    """
    dtype = _weights_dtype(denoiser, trajectory.dtype)
    timesteps = torch.full((len(trajectory),), k, device=trajectory.device)
    prediction = denoiser(trajectory.to(dtype), actions.to(dtype), timesteps)
    wrong = _wrong_result(prediction, trajectory.shape)
    if wrong:
        raise InputError(
            f"{_denoiser_call(denoiser, trajectory, actions)}, returned a prediction {wrong}"
        )
    return prediction.to(trajectory.dtype)


def policy_moments(
    policy: Policy, normalizer: Normalizer, observations: Tensor, normalized: bool
) -> tuple[Tensor, Tensor]:
    """Return a policy's mean and std of the raw actions, [..., A] each, in the observations' dtype.

    Args:
        observations: [..., S]; the policy gets a copy, in the space that it reads and, as a module,
            in the dtype of its weights.
        normalized: whether they are normalized.

    Raises:
        InputError: it returns something else, or has two meanings: its `distribution` passes by
            what a call does.
    """
    reads = reads_normalized(policy)
    if reads and _passes_by_forward(policy):
        raise InputError(
            f"{_policy_name(policy)} has normed_inputs=True and a forward of its own or a hook on "
            f"it, which policy.distribution passes by: change distribution too, put the hook on a "
            f"part of it, or read raw observations (normed_inputs=False)"
        )
    if reads and not normalized:
        inputs = normalizer.normalize(observations, "observations")
    elif normalized and not reads:
        inputs = normalizer.unnormalize(observations, "observations")
    else:
        inputs = observations.clone()
    inputs = inputs.to(_weights_dtype(policy, inputs.dtype))
    result = (policy.distribution if reads else policy)(inputs)
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        raise InputError(
            f"{_policy_call(policy, observations)}, returned {_kind(result)}, wanted the pair "
            f"(mean, std)"
        )
    wanted = (*observations.shape[:-1], normalizer.action_dim)
    for name, tensor in zip(("a mean", "an std"), result, strict=True):
        wrong = _wrong_result(tensor, wanted)
        if wrong:
            raise InputError(f"{_policy_call(policy, observations)}, returned {name} {wrong}")
    mean, std = result
    return mean.to(observations.dtype), std.to(observations.dtype)


def reads_normalized(policy: Policy) -> bool:
    """Return whether a policy's network reads normalized observations."""
    return bool(getattr(policy, "normed_inputs", False))


def check_normalizer(normalizer: Any) -> None:
    """Raise InputError unless this is a `Normalizer` in float32."""
    if not isinstance(normalizer, Normalizer):
        raise InputError(
            f"normalizer must be a polygrad_fast.Normalizer (Normalizer.from_moments makes one of "
            f"means and standard deviations), got {_kind(normalizer)}"
        )
    for name, moment in normalizer.named_buffers():
        if moment.dtype != torch.float32:
            raise InputError(f"normalizer: {name} must be of torch.float32, got {moment.dtype}")


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
    trajectory, actions = (
        _draw((batch, horizon, dim), device) for dim in (state_dim, denoiser.action_dim)
    )

    def predict() -> Tensor:
        return call_denoiser(denoiser, trajectory.clone(), actions.clone(), num_train_timesteps - 1)

    call = _denoiser_call(denoiser, trajectory, actions)
    dry_call(denoiser, call, device, predict)
    if trained:
        _check_float32(denoiser, name)
        weights = list(denoiser.parameters())
        _check_gradient(denoiser, call, device, "its weights", weights, lambda: [predict()])


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
        normalizer: whose observations it reads. shapes: the axes before S to call it with, for
            instance [(4,), (2, 10)].
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
    _check_weights(policy, name)
    for shape in shapes:
        inputs = _draw((*shape, normalizer.observation_dim), device)
        call = _policy_call(policy, inputs)

        def moments(inputs: Tensor = inputs) -> tuple[Tensor, Tensor]:
            return policy_moments(policy, normalizer, inputs, normalized=True)

        _, std = dry_call(policy, call, device, moments)
        if not ((std > 0) & torch.isfinite(std)).all():
            raise InputError(
                f"{call}, returned an std of {std.min().item():.3g} to {std.max().item():.3g}, "
                f"wanted positive finite numbers"
            )
    if trained:
        _check_float32(policy, name)
        weights = list(policy.parameters())
        _check_gradient(policy, call, device, "its weights", weights, moments)
    if guides_states:
        what = "the observations, which update_states=True wants"
        _check_gradient(policy, call, device, what, [inputs.requires_grad_()], moments)


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


def _weights_dtype(module: Any, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a module's weights, `default` where there are none."""
    weights = module.parameters() if isinstance(module, nn.Module) else ()
    return next((w.dtype for w in weights if w.is_floating_point()), default)


def _check_float32(module: nn.Module, name: str) -> None:
    for key, weight in module.named_parameters():
        if weight.dtype != torch.float32:
            raise InputError(f"{name} has {key} in {weight.dtype}, training wants torch.float32")


def _check_weights(module: Any, name: str) -> None:
    if isinstance(module, nn.Module) and any(map(is_lazy, module.parameters())):
        raise InputError(f"{name} has weights without a shape yet (lazy layers): call it once")


def _check_gradient(
    owner: Any,
    call: str,
    device: torch.device,
    what: str,
    inputs: list[Tensor],
    outputs: Callable[[], Iterable[Tensor]],
) -> None:
    """Raise InputError unless the outputs' gradient reaches one of the inputs, `what` in words;
    `grad` stays as it is."""

    def differentiate() -> None:
        total = sum(output.sum() for output in outputs())
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        if total.requires_grad:
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
            if any(gradient is not None for gradient in gradients):
                return
        raise RuntimeError("there is no gradient")

    failed = f"cannot be differentiated with respect to {what}"
    dry_call(owner, call, device, differentiate, failed, gradients=True)


def dry_call(
    owner: Any,
    call: str,
    device: torch.device,
    function: Callable[[], Any],
    failed: str = "failed",
    gradients: bool = False,
) -> Any:
    """Return what a function that calls a module returns; buffers and the global random numbers
    stay as they were.

    Args:
        owner: the module, on `device`. call, failed: words for the error.
        gradients: whether autograd records.

    Raises:
        InputError: the function raised an error.
    """
    try:
        with (
            _unchanged(owner, device),
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.autocast(device.type, enabled=False),
        ):
            return function()
    except InputError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"{call}, {failed}: {reason}") from error


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


def _wrong_result(tensor: Any, wanted: tuple[int, ...]) -> str | None:
    """Return in words what is wrong with a result, or None."""
    if not torch.is_tensor(tensor):
        return f"that is a {_kind(tensor)}, wanted a tensor"
    if tensor.shape != wanted:
        return f"of shape {list(tensor.shape)}, wanted {list(wanted)}"
    if not tensor.is_floating_point():
        return f"of {tensor.dtype}, wanted floating point"
    return None


def _passes_by_forward(policy: Any) -> bool:
    """Return whether a policy's `distribution` leaves out something that calling the policy does: a
    forward of its own, or a hook on it."""
    if not isinstance(policy, nn.Module):
        return False

    def depth(name: str) -> int:  # of the class that defines it, 0 = the policy's own
        return next((i for i, k in enumerate(type(policy).__mro__) if name in vars(k)), 0)

    hooked = policy._forward_hooks or policy._forward_pre_hooks
    replaced = "forward" in vars(policy) and "distribution" not in vars(policy)
    return bool(hooked or replaced or depth("forward") < depth("distribution"))


def _denoiser_call(denoiser: Any, trajectory: Tensor, actions: Tensor) -> str:
    shapes = f"trajectory {list(trajectory.shape)}, actions {list(actions.shape)}"
    return f"denoiser {_kind(denoiser)}, called as denoiser({shapes}, timesteps)"


def _policy_call(policy: Any, observations: Tensor) -> str:
    method = "policy.distribution(normalized " if reads_normalized(policy) else "policy("
    return f"{_policy_name(policy)}, called as {method}observations {list(observations.shape)})"


def _policy_name(policy: Any) -> str:
    return f"policy {_kind(policy)}"


def _draw(shape: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu").to(device)


def _other_than(*sizes: int) -> int:
    """Return a batch size that no other axis has, so that exchanged axes are seen."""
    return next(batch for batch in range(2, 6) if batch not in sizes)


def _kind(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) and callable(value) else type(value).__name__
