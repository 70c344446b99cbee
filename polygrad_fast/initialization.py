"""First weights of networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal truncated at 2."""


def lecun_normal_(weight: Tensor, fan_in: int, generator: torch.Generator | None = None) -> None:
    """Fill `weight` in place with normals of standard deviation 1 / sqrt(fan_in), truncated at two
    deviations of what is drawn (flax's default kernels).

    Args:
        weight: of any shape.
        fan_in: inputs that a unit sums up.
        generator: source of the normals; default torch's.
    """
    std = 1.0 / (TRUNCATED_STD * math.sqrt(fan_in))
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
