"""How well two noisy estimates of one vector agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Of two vectors, each the mean of two independent estimates."""

    cosine: float
    """Of the two means."""
    ceiling: float
    """What the cosine would be if both estimated the same, given their noise."""
    length_ratio: float
    """Length of the first over that of the second."""


def agreement(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Agreement:
    """Compare two pairs of independent estimates [P], the second pair taken for the truth.

    The ceiling is sqrt(r_a r_b), the reliabilities r estimated from the halves' cosine c by the
    Spearman-Brown formula r = 2 c / (1 + c), 0 where c is negative.
    """
    means = [(first + second) / 2 for first, second in (a, b)]
    lengths = [mean.norm().item() for mean in means]
    reliabilities = [math.sqrt(_spearman_brown(cosine(*halves))) for halves in (a, b)]
    return Agreement(
        cosine=cosine(*means),
        ceiling=math.prod(reliabilities),
        length_ratio=lengths[0] / lengths[1] if lengths[1] > 0 else 0.0,
    )


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors; 0 where one is zero."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def _spearman_brown(correlation: float) -> float:
    """Return the reliability of a mean of two halves from their correlation."""
    return max(0.0, 2 * correlation / (1 + correlation)) if correlation > -1 else 0.0
