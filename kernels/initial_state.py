"""The start of a sample: x_K and u_K drawn, s0 put in, and the first denoiser input, in one launch.

B H (D + A) normals; 4 B H (D + A) bytes written, and as many numbers of the denoiser's dtype; read
are B S numbers of s0 and, where the noise is given, 4 B H (D + A) bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from polygrad_fast.kernels.denoiser_input import ActionSpace, input_rows, store_action_operand
from polygrad_fast.kernels.dependent_launch import launch_options, wait_for_previous
from polygrad_fast.kernels.precision import padded, store_operand
from polygrad_fast.kernels.random_normals import normals
from polygrad_fast.kernels.step_table import ACTION_SCALE, NUM_COLUMNS, StepOptions


@triton.jit
def _initial_state_kernel(
    initial_ptr,  # [B, S]
    table_ptr,  # [K, NUM_COLUMNS]
    action_mean_ptr,  # [A]
    action_scale_ptr,  # [A]
    action_low_ptr,  # [A]
    action_high_ptr,  # [A]
    seed_ptr,  # [2] int64
    trajectory_noise_ptr,  # [B, H, D], read where GIVEN_NOISE
    action_noise_ptr,  # [B, H, A]
    trajectory_out_ptr,
    actions_out_ptr,
    input_ptr,
    num_steps,
    num_rows,
    horizon,
    stride_input,
    OBSERVATION_DIM: tl.constexpr,
    STATE_DIM: tl.constexpr,
    ACTION_DIM: tl.constexpr,
    CLIP_DENOISER_ACTIONS: tl.constexpr,
    GIVEN_NOISE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        wait_for_previous()
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < num_rows
    batch = row // horizon
    t = row - batch * horizon
    d, a = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_A)
    state_mask = row_mask[:, None] & (d < STATE_DIM)[None, :]
    action_mask = row_mask[:, None] & (a < ACTION_DIM)[None, :]
    state_at = row.to(tl.int64)[:, None] * STATE_DIM + d[None, :]  # [BLOCK_ROWS, BLOCK_D]
    action_at = row.to(tl.int64)[:, None] * ACTION_DIM + a[None, :]  # [BLOCK_ROWS, BLOCK_A]
    state_quads: tl.constexpr = (STATE_DIM + 3) // 4
    quads: tl.constexpr = state_quads + (ACTION_DIM + 3) // 4
    if GIVEN_NOISE:
        trajectory = tl.load(trajectory_noise_ptr + state_at, mask=state_mask, other=0.0)
        actions = tl.load(action_noise_ptr + action_at, mask=action_mask, other=0.0)
    else:
        trajectory = normals(seed_ptr, batch, num_steps, t * quads, BLOCK_ROWS, BLOCK_D)
        actions = normals(seed_ptr, batch, num_steps, t * quads + state_quads, BLOCK_ROWS, BLOCK_A)
    is_first = (t == 0)[:, None] & (d < OBSERVATION_DIM)[None, :]
    initial = tl.load(
        initial_ptr + batch.to(tl.int64)[:, None] * OBSERVATION_DIM + d[None, :],
        mask=is_first & row_mask[:, None],
        other=0.0,
    )
    trajectory = tl.where(is_first, initial, trajectory)
    tl.store(trajectory_out_ptr + state_at, trajectory, mask=state_mask)
    tl.store(actions_out_ptr + action_at, actions, mask=action_mask)
    action_mean = tl.load(action_mean_ptr + a, mask=a < ACTION_DIM, other=0.0)
    action_scale = tl.load(action_scale_ptr + a, mask=a < ACTION_DIM, other=1.0)
    input_at = input_rows(input_ptr, row, horizon, stride_input, STATE_DIM + ACTION_DIM)
    store_operand(input_at[:, None] + d[None, :], trajectory, state_mask)
    store_action_operand(
        input_at[:, None] + STATE_DIM + a[None, :], actions, action_mask, a, action_mean,
        action_scale, action_low_ptr, action_high_ptr,
        tl.load(table_ptr + (num_steps - 1) * NUM_COLUMNS + ACTION_SCALE), ACTION_DIM,
        CLIP_DENOISER_ACTIONS,
    )  # fmt: skip


def initial_state(
    initial_observations: Tensor,
    table: Tensor,
    space: ActionSpace,
    options: StepOptions,
    seed: Tensor,
    noise: tuple[Tensor, Tensor] | None,
    trajectory_out: Tensor,
    actions_out: Tensor,
    denoiser_input: Tensor,
    dependent: bool = False,
) -> None:
    """Draw x_K and u_K, put s0 into x_K, write both and the first denoiser input.

    Arguments are those of `guided_step`.
    """
    batch, horizon, state_dim = trajectory_out.shape
    action_dim = actions_out.shape[-1]
    rows = batch * horizon
    block_rows = 16
    trajectory_noise, action_noise = noise or (trajectory_out, actions_out)
    _initial_state_kernel[(triton.cdiv(rows, block_rows),)](
        initial_ptr=initial_observations,
        table_ptr=table,
        action_mean_ptr=space.mean,
        action_scale_ptr=space.scale,
        action_low_ptr=space.low,
        action_high_ptr=space.high,
        seed_ptr=seed,
        trajectory_noise_ptr=trajectory_noise,
        action_noise_ptr=action_noise,
        trajectory_out_ptr=trajectory_out,
        actions_out_ptr=actions_out,
        input_ptr=denoiser_input,
        num_steps=table.shape[0],
        num_rows=rows,
        horizon=horizon,
        stride_input=denoiser_input.stride(0),
        OBSERVATION_DIM=state_dim - 2,
        STATE_DIM=state_dim,
        ACTION_DIM=action_dim,
        CLIP_DENOISER_ACTIONS=options.clips_denoiser_actions,
        GIVEN_NOISE=noise is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_D=padded(state_dim),
        BLOCK_A=padded(action_dim),
        num_warps=4,
        num_stages=2,
        **launch_options(dependent),
    )
