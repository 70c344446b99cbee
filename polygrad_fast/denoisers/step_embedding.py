"""Embeddings of the diffusion step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from polygrad_fast.errors import InputError


def check_inputs(
    denoiser: nn.Module, trajectory: Tensor, actions: Tensor, timesteps: Tensor
) -> None:
    """Raise InputError unless the shapes are [B, H, D], [B, H, A] and [B], and states and actions
    of the weights' dtype (or autocast takes care of it)."""
    batch = trajectory.shape[0] if trajectory.ndim else 0
    dtype = next(denoiser.parameters()).dtype
    for name, tensor, wanted in (
        ("trajectory", trajectory, (batch, denoiser.horizon, denoiser.state_dim)),
        ("actions", actions, (batch, denoiser.horizon, denoiser.action_dim)),
        ("timesteps", timesteps, (batch,)),
    ):
        if tuple(tensor.shape) != wanted:
            raise InputError(
                f"{name} must be of shape {wanted} (the batch is the trajectory's), got "
                f"{tuple(tensor.shape)}"
            )
        if (
            name != "timesteps"
            and tensor.dtype != dtype
            and not torch.is_autocast_enabled(tensor.device.type)
        ):
            raise InputError(f"{name} must be of {dtype}, as the weights, got {tensor.dtype}")


class RandomFourierFeatures(nn.Module):
    """t -> [t, sin(2 pi w t), cos(2 pi w t)], fixed random frequencies w: [B] -> [B, dim + 1]."""

    def __init__(self, dim: int = 16):
        super().__init__()
        self.register_buffer("weights", torch.randn(dim // 2))

    def forward(self, timesteps: Tensor) -> Tensor:
        t = timesteps.to(self.weights.dtype).unsqueeze(-1)
        angles = t * self.weights * 2 * math.pi
        return torch.cat([t, angles.sin(), angles.cos()], dim=-1)


class SinusoidalFeatures(nn.Module):
    """The transformer's sinusoidal features with base 10,000: [B] -> [B, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.to(self.frequencies.dtype).unsqueeze(-1) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def step_mlp(features: nn.Module, feature_dim: int, dim: int) -> nn.Sequential:
    """Features of the diffusion step -> Linear -> SiLU -> Linear, as released: [B] -> [B, dim]."""
    return nn.Sequential(features, nn.Linear(feature_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
