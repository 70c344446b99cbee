"""What terminal flags say of a trajectory's steps."""

from __future__ import annotations

from torch import Tensor


def alive_steps(terminals: Tensor) -> Tensor:
    """Return which steps are taken, the first terminal one included: 0/1 [B, H] -> bool [B, H]."""
    return terminals.cumsum(dim=1) - terminals == 0
