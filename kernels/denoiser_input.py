"""Writing the denoiser's next input, states and actions of one trajectory after the other.

Shared by `guided_step` and `initial_state`. B H (D + A) numbers of the denoiser's dtype are
written, each once; a row of actions costs about 6 A FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from polygrad_fast.kernels.precision import clip, store_operand


@dataclass(frozen=True)
class ActionSpace:
    """Moments and bounds of the raw actions, [A] float32 each; bounds are read only where the
    denoiser sees clipped actions."""

    mean: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor


@triton.jit
def input_rows(input_ptr, row, horizon, stride_input, ROW_DIM: tl.constexpr):
    """Pointers [BLOCK_ROWS] to where each row's (state ++ action) lies in the flattened denoiser
    input."""
    batch = row // horizon
    return input_ptr + batch.to(tl.int64) * stride_input + (row - batch * horizon) * ROW_DIM


@triton.jit
def store_action_operand(
    ptr,
    actions,
    mask,
    column,
    mean,
    scale,
    low_ptr,
    high_ptr,
    denoiser_scale,
    ACTION_DIM: tl.constexpr,
    CLIP_DENOISER_ACTIONS: tl.constexpr,
):
    """Store actions as the denoiser sees them: clipped to the bounds where configured, scaled."""
    if CLIP_DENOISER_ACTIONS:
        valid = column < ACTION_DIM
        low = tl.load(low_ptr + column, mask=valid, other=0.0)
        high = tl.load(high_ptr + column, mask=valid, other=0.0)
        raw = clip(actions * scale[None, :] + mean[None, :], low[None, :], high[None, :])
        actions = (raw - mean[None, :]) / scale[None, :]
    store_operand(ptr, actions * denoiser_scale, mask)
