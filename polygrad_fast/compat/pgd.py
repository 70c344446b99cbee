"""Weights of the released Policy-Guided Diffusion code (flax): to this library's and back.

The released names number the modules of a type in order of use. A Dense kernel is [in, out], a
convolution's [width, in, out], and GroupNorm has a scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from polygrad_fast.denoisers.temporal_unet import TemporalUNet
from polygrad_fast.errors import InputError

_PERMUTED = {2: (1, 0), 3: (2, 1, 0)}
"""Axes of a kernel, in both directions, by their number."""


def load_denoiser(
    arrays: Mapping[str, Tensor], observation_dim: int, action_dim: int
) -> TemporalUNet:
    """Build the U-Net of a released checkpoint's parameters, whose names and shapes tell its sizes.

    Args:
        arrays: float32 tensors or numpy arrays under the released names, joined by dots, for
            instance "Encoder_0.Conv_0.kernel". An enclosing "params." is taken off.
        observation_dim, action_dim: S and A; the weights tell S + A only.

    Raises:
        InputError: names or shapes are not those of the released U-Net.
    """
    what = "weights must be those of the released U-Net"
    if not isinstance(arrays, Mapping):
        raise InputError(f"{what}, by name, got {type(arrays).__name__}")
    arrays = {name.removeprefix("params."): torch.as_tensor(a) for name, a in arrays.items()}
    first = arrays.get("TimeEmbedding_0.Dense_0.kernel")
    if first is None or first.ndim != 2:
        raise InputError(
            f"{what}, with a matrix 'TimeEmbedding_0.Dense_0.kernel', got names "
            f"{sorted(arrays)[:4]}"
        )
    levels = [re.fullmatch(r"Encoder_0\.Dense_(\d+)\.kernel", name) for name in arrays]
    num_levels = sum(match is not None for match in levels)
    network = TemporalUNet(observation_dim, action_dim, first.shape[1], max(num_levels, 1))
    wanted = export_denoiser(network.state_dict())
    for name in sorted({*wanted, *arrays}):
        shapes = [tuple(a[name].shape) if name in a else None for a in (arrays, wanted)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{what} with {num_levels} levels for {observation_dim} observations and "
                f"{action_dim} actions: {name} must be of shape {shapes[1]}, got {shapes[0]}"
            )
    weights = {ours: _permuted(arrays[name]) for name, ours in _names(num_levels)}
    network.load_state_dict(weights)
    return network


def export_denoiser(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a U-Net's weights, or gradients by weights' names, under the released names and in
    the released layouts.

    Args:
        weights: for instance `TemporalUNet.state_dict()`.

    Raises:
        InputError: not those of a `TemporalUNet`.
    """
    num_levels = len({name.split(".")[1] for name in weights if name.startswith("encoder.")})
    names = list(_names(num_levels))
    if {ours for _, ours in names} != set(weights):
        raise InputError(
            f"weights must be those of a TemporalUNet, by name, got {sorted(weights)[:4]}"
        )
    return {name: _permuted(weights[ours]).contiguous() for name, ours in names}


def _permuted(array: Tensor) -> Tensor:
    return array.permute(_PERMUTED[array.ndim]) if array.ndim in _PERMUTED else array


def _names(num_levels: int) -> Iterator[tuple[str, str]]:
    """Yield (released name, ours) of every parameter."""
    for released, ours in _modules(num_levels):
        weight = "scale" if "GroupNorm" in released else "kernel"
        yield f"{released}.{weight}", f"{ours}.weight"
        yield f"{released}.bias", f"{ours}.bias"


def _modules(num_levels: int) -> Iterator[tuple[str, str]]:
    """Yield (released name, ours) of every module with parameters."""
    for i, layer in enumerate((1, 3)):
        yield f"TimeEmbedding_0.Dense_{i}", f"noise_embedding.{layer}"
    rooms = (("Encoder_0", "encoder", num_levels, 2), ("Decoder_0", "decoder", num_levels - 1, 3))
    for released, ours, count, convolutions in rooms:
        for i in range(count):
            yield f"{released}.Dense_{i}", f"{ours}.{i}.condition"
            for j in range(convolutions):
                number = convolutions * i + j
                yield f"{released}.Conv_{number}", f"{ours}.{i}.conv_{j + 1}"
                yield f"{released}.GroupNorm_{number}", f"{ours}.{i}.norm_{j + 1}"
    yield f"Decoder_0.Conv_{3 * (num_levels - 1)}", "output"
