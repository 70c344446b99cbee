"""Folded and cast copies of the networks' weights in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def refresh(
    operation: str,
    left: Tensor | None = None,
    right: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    number: float = 0.0,
    steps: Tensor | None = None,
    frequencies: Tensor | None = None,
    first: Tensor | None = None,
    first_bias: Tensor | None = None,
) -> Tensor:
    """Return what one task of `kernels.refresh` computes, [R, C], before it is rounded.

    Args are those of `kernels.refresh.Task`, in any dtype, which the result has too. A step's
    features are in the frequencies' dtype: the angles are so large that their rounding counts.
    """
    biases = sum(b for b in (bias, second_bias) if b is not None)
    if operation == "copy":
        value = left if steps is None else left[steps]
        return (value if scale is None else value * scale) + biases
    if operation == "exp":
        return left.exp() + number
    if operation == "offset":
        return (left @ right[:, 0] + biases)[None]
    if operation == "embedding":
        t = steps.to(frequencies.dtype)[:, None]
        angles = t * frequencies * 2 * math.pi
        features = torch.cat([t, angles.sin(), angles.cos()], dim=1).to(first.dtype)
        left = F.silu(F.linear(features, first, first_bias))
    return left @ right + biases
