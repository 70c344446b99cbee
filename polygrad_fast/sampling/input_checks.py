"""Checks of what users give a sampler: modules, devices, bounds, observations and noise."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polygrad_fast.config import SamplerConfig
from polygrad_fast.diffusion.ddpm import NoiseSchedule
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.protocols import check_denoiser, check_policy
from polygrad_fast.sampling.components import SamplerComponents
from polygrad_fast.sampling.noise import SampleNoise


def check_modules(
    denoiser: Any,
    policy: Any,
    schedule: NoiseSchedule,
    normalizer: Normalizer,
    config: SamplerConfig,
    engine: str,
    device: torch.device,
) -> None:
    """Raise InputError unless these can be a sampler's modules and fit together."""
    check_denoiser(denoiser, schedule.num_train_timesteps, device)
    for name in ("observation_dim", "action_dim"):
        wanted = getattr(denoiser, name)
        for other in (policy, normalizer):
            got = getattr(other, name, wanted)
            if got != wanted:
                raise InputError(
                    f"{type(other).__name__}: {name} must be the denoiser's {wanted}, got {got}"
                )
    shapes = ((2, denoiser.horizon),)
    check_policy(policy, normalizer, shapes, device, guides_states=config.update_states)
    for method in ("normalize", "unnormalize"):
        own = method in vars(normalizer)
        if engine != "reference" and (
            own or getattr(type(normalizer), method) is not getattr(Normalizer, method)
        ):
            raise InputError(
                f"normalizer must be a plain Normalizer, of which engine {engine!r} reads the "
                f"moments only, or the engine 'reference': {type(normalizer).__name__} has a "
                f"{method} of its own"
            )


def common_device(asked: str | torch.device | None, *modules: Any) -> torch.device:
    """Return the device of all modules' tensors, which must be one, and the one asked for."""
    tensors = [
        (f"{type(module).__name__}.{name}", tensor)
        for module in modules
        if isinstance(module, nn.Module)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    (first, tensor), *others = tensors
    device = tensor.device
    for name, tensor in others:
        if tensor.device != device:
            raise InputError(
                f"all modules must be on one device, got {name} on {tensor.device} and {first} on "
                f"{device}"
            )
    if asked is not None and asked != "auto":
        try:
            wanted = torch.device(asked)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device must be one of torch's, got {asked!r}: {reason}") from error
        if (wanted.type, wanted.index or 0) != (device.type, device.index or 0):
            raise InputError(
                f"device must be the modules' {str(device)!r} (that of {first}), got "
                f"{str(wanted)!r}"
            )
    return device


def check_bounds(bounds: Any, action_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (low, high) as float32 tensors [A] or scalars.

    Raises:
        InputError: no such pair, or low > high somewhere.
    """
    try:
        low, high = (torch.as_tensor(b, dtype=torch.float32, device=device) for b in bounds)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"action_bounds must be a pair (low, high) of numbers or arrays [{action_dim}], got "
            f"{bounds!r}"
        ) from None
    for name, bound in (("low", low), ("high", high)):
        if tuple(bound.shape) not in ((), (1,), (action_dim,)):
            raise InputError(
                f"action_bounds: {name} must be a number or of shape ({action_dim},), got shape "
                f"{tuple(bound.shape)}"
            )
    if not (low <= high).all():
        raise InputError(
            f"action_bounds must have low <= high, got {low.tolist()} and {high.tolist()}"
        )
    return low, high


def check_observations(
    observations: Any, components: SamplerComponents, reads_values: bool = True
) -> Tensor:
    """Return the initial observations as float32 [B, S] on the sampler's device.

    Args:
        reads_values: look for numbers that are not finite; waits for a GPU.

    Raises:
        InputError: another shape or dtype, or a number that is not finite.
    """
    observations = as_tensor(observations, "initial_observations")
    shape, wanted = tuple(observations.shape), components.observation_dim
    if len(shape) != 2 or shape[1] != wanted or shape[0] < 1:
        raise InputError(
            f"initial_observations must be of shape [B, {wanted}] with B at least 1, got shape "
            f"{shape}"
        )
    if not observations.is_floating_point():
        raise InputError(f"initial_observations must be floating point, got {observations.dtype}")
    converted = observations.to(components.device, torch.float32)
    if not reads_values:
        return converted
    finite = torch.isfinite(converted)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise InputError(
            f"initial_observations[{row}, {column}] must be a finite float32 number, got "
            f"{observations[row, column].item()}"
        )
    return converted


def check_guidance_scale(scale: Any) -> float | Tensor:
    """Return delta as a number or, where it is one, the tensor, which is not read.

    Raises:
        InputError: not one number, negative or not finite.
    """
    if isinstance(scale, np.ndarray) and scale.size == 1:
        scale = scale.item()
    if torch.is_tensor(scale):
        if scale.numel() != 1:
            raise InputError(
                f"guidance_scale must be one number, got a tensor of shape {tuple(scale.shape)}"
            )
        return scale
    if not (isinstance(scale, numbers.Real) and 0 <= scale < float("inf")):
        raise InputError(
            f"guidance_scale must be a non-negative finite number or a tensor, got {scale!r}"
        )
    return float(scale)


def check_generator(generator: Any, device: torch.device) -> None:
    """Raise InputError unless this is None or a generator on that device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator must be a torch.Generator, got {generator!r}")
    if generator.device.type != device.type:
        raise InputError(
            f"generator must be on the sampler's device {str(device)!r}, got one on "
            f"{str(generator.device)!r}"
        )


def check_noise(noise: Any, batch: int, components: SamplerComponents) -> SampleNoise:
    """Return the noise of B trajectories in float32 on the sampler's device.

    Raises:
        InputError: no SampleNoise, another shape, or a number that is not finite.
    """
    if not isinstance(noise, SampleNoise):
        raise InputError(f"noise must be a SampleNoise, got {type(noise).__name__}")
    states, actions = components.shapes(batch)
    num_steps = components.num_steps
    converted = {}
    for name, wanted in (
        ("initial_trajectories", states),
        ("initial_actions", actions),
        ("trajectories", (num_steps, *states)),
        ("actions", (num_steps, *actions)),
    ):
        tensor = as_tensor(getattr(noise, name), f"noise.{name}")
        if tuple(tensor.shape) != wanted:
            raise InputError(
                f"noise.{name} must be of shape {wanted}, got shape {tuple(tensor.shape)}"
            )
        converted[name] = tensor.to(components.device, torch.float32)
        if not torch.isfinite(converted[name]).all():
            raise InputError(f"noise.{name} must be finite numbers, got NaN or infinity")
    return SampleNoise(**converted)


def check_chain(return_chain: Any, num_steps: int) -> None:
    """Raise InputError unless this is a bool or a number of steps."""
    whole = isinstance(return_chain, numbers.Integral)
    if not (whole and 0 <= return_chain <= num_steps):
        raise InputError(
            f"return_chain must be True, False or a number of steps up to {num_steps}, got "
            f"{return_chain!r}"
        )


def as_tensor(value: Any, name: str) -> Tensor:
    """Return a tensor, an array or a list as a tensor.

    Raises:
        InputError: something else; `name` is what the message calls it.
    """
    if torch.is_tensor(value):
        return value
    try:
        if isinstance(value, (list, tuple)) and any(map(torch.is_tensor, value)):
            return torch.stack([torch.as_tensor(row) for row in value])
        array = np.asarray(value)
        if isinstance(value, (list, tuple)) and array.dtype.kind in "iu":
            array = array.astype(np.float64)  # whole numbers typed by hand
        if array.dtype.kind == "f" and array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        native = array.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(array, dtype=native, order="C"))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{name} must be a tensor, an array or a list of equally long lists of numbers, got "
            f"{type(value).__name__}"
        ) from None
