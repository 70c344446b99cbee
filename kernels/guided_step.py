"""One step of policy-guided trajectory diffusion after the denoiser call, in one launch: estimate,
policy, score update, noise, state step and the next denoiser input.

Twin: `polygrad_fast.reference.guided_step`. Derivations and counts: README.md in this folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from polygrad_fast.config import check_choices
from polygrad_fast.kernels.denoiser_input import ActionSpace, input_rows, store_action_operand
from polygrad_fast.kernels.dependent_launch import launch_options, wait_for_previous
from polygrad_fast.kernels.policy_mean import PolicyOperands, policy_mean
from polygrad_fast.kernels.precision import clip, is_interpreted, padded, store_operand
from polygrad_fast.kernels.random_normals import normals
from polygrad_fast.kernels.step_table import (
    ACTION_SCALE,
    CHANGE_LIMIT,
    DENOISED_COEF,
    NOISE_STD,
    NUM_COLUMNS,
    PREDICTION_SCALE,
    X_COEF,
    X_SCALE,
    StepOptions,
)


@dataclass(frozen=True)
class StepBlocks:
    """Rows (trajectory steps) per program, hidden units per chunk, launch parameters."""

    block_rows: int
    block_units: int
    num_warps: int
    num_stages: int


# By the GEMMs' precision and the states' padded width: (few rows, many rows). Chosen so that
# none of a paper-sized sampler's at full batch spills on sm_90 and two programs of half precision
# share a multiprocessor; README.md lists what spills, tests/kernels/test_compiled.py prints all.
STEP_BLOCKS = {
    "float32": {
        16: (StepBlocks(16, 32, 8, 2), StepBlocks(32, 32, 8, 2)),
        32: (StepBlocks(16, 32, 8, 2), StepBlocks(32, 32, 8, 2)),
        64: (StepBlocks(16, 32, 8, 2), StepBlocks(16, 32, 8, 2)),
        128: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
        256: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
        512: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
    },
    "tf32": {
        16: (StepBlocks(16, 32, 8, 2), StepBlocks(64, 32, 8, 2)),
        32: (StepBlocks(16, 32, 8, 2), StepBlocks(64, 32, 8, 2)),
        64: (StepBlocks(16, 32, 8, 2), StepBlocks(32, 32, 8, 2)),
        128: (StepBlocks(16, 16, 8, 2), StepBlocks(32, 16, 8, 2)),
        256: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
        512: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
    },
    "float16": {
        16: (StepBlocks(16, 64, 8, 2), StepBlocks(64, 32, 4, 2)),
        32: (StepBlocks(16, 64, 8, 2), StepBlocks(64, 32, 4, 2)),
        64: (StepBlocks(16, 64, 8, 2), StepBlocks(64, 32, 8, 2)),
        128: (StepBlocks(16, 32, 8, 2), StepBlocks(32, 32, 8, 2)),
        256: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
        512: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
    },
}
MANY_ROWS = 4096


def step_blocks(precision: str, rows: int, state_dim: int) -> StepBlocks:
    """Return the tile sizes for that many rows (B H) of D states; precision is the policy's."""
    few, many = STEP_BLOCKS[precision][padded(state_dim)]
    return many if rows >= MANY_ROWS else few


@triton.jit(do_not_specialize=["k", "action_noise_step"])
def _guided_step_kernel(
    prediction_ptr,  # [B, H, D]
    trajectory_ptr,  # [B, H, D]; trajectory_out may be the same
    actions_ptr,  # [B, H, A]; actions_out may be the same
    initial_ptr,  # [B, S]
    table_ptr,  # [K, NUM_COLUMNS]
    guidance_ptr,  # [1]
    action_mean_ptr,  # [A]
    action_scale_ptr,  # [A]
    action_low_ptr,  # [A]
    action_high_ptr,  # [A]
    seed_ptr,  # [2] int64: seed and call number
    trajectory_noise_ptr,  # [B, H, D], read where GIVEN_NOISE
    action_noise_ptr,  # [B, H, A]
    first_weight_ptr,
    hidden_weight_ptr,
    vectors_ptr,
    last_weight_ptr,
    last_bias_ptr,
    std_ptr,
    trajectory_out_ptr,
    actions_out_ptr,
    input_ptr,  # [B, >= H (D + A)], the next denoiser input
    k,
    action_noise_step,  # counter of the actions' normals: k, or K for those of the initial state
    num_rows,
    horizon,
    stride_first,
    stride_hidden,
    stride_input,
    eps,
    clip_std,
    max_guidance,
    OBSERVATION_DIM: tl.constexpr,
    STATE_DIM: tl.constexpr,
    ACTION_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    LAST_STEP: tl.constexpr,
    PREDICTS_NOISE: tl.constexpr,
    ACTION_UPDATE: tl.constexpr,
    CLIP: tl.constexpr,
    POLICY_INPUT: tl.constexpr,
    LIMIT_STATE_CHANGE: tl.constexpr,
    STATE_NOISE: tl.constexpr,
    MAX_GUIDANCE: tl.constexpr,
    CLIP_DENOISER_ACTIONS: tl.constexpr,
    GIVEN_NOISE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        wait_for_previous()
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # one (trajectory, t) each
    row_mask = row < num_rows
    batch = row // horizon
    t = row - batch * horizon
    d, a = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_A)
    a_valid = a < ACTION_DIM
    state_mask = row_mask[:, None] & (d < STATE_DIM)[None, :]
    action_mask = row_mask[:, None] & a_valid[None, :]
    observed = (d < OBSERVATION_DIM)[None, :]
    state_at = row.to(tl.int64)[:, None] * STATE_DIM + d[None, :]  # [BLOCK_ROWS, BLOCK_D]
    action_at = row.to(tl.int64)[:, None] * ACTION_DIM + a[None, :]  # [BLOCK_ROWS, BLOCK_A]
    table = table_ptr + k * NUM_COLUMNS

    # x0 estimate with the first observation put back
    denoised = tl.load(prediction_ptr + state_at, mask=state_mask, other=0.0)
    trajectory = tl.load(trajectory_ptr + state_at, mask=state_mask, other=0.0)
    if PREDICTS_NOISE:
        denoised = (
            tl.load(table + X_SCALE) * trajectory - tl.load(table + PREDICTION_SCALE) * denoised
        )
    is_first = (t == 0)[:, None] & observed
    initial = tl.load(
        initial_ptr + batch.to(tl.int64)[:, None] * OBSERVATION_DIM + d[None, :],
        mask=is_first & row_mask[:, None],
        other=0.0,
    )
    denoised = tl.where(is_first, initial, denoised)
    mean = tl.load(table + DENOISED_COEF) * denoised + tl.load(table + X_COEF) * trajectory
    if LIMIT_STATE_CHANGE:
        limit = tl.load(table + CHANGE_LIMIT)
        change = mean - trajectory
        mean = tl.where(change > limit, trajectory + limit, mean)
        mean = tl.where(change < -limit, trajectory - limit, mean)

    if POLICY_INPUT == "denoised":
        observations = denoised
    elif POLICY_INPUT == "posterior_mean":
        observations = mean
    else:
        observations = trajectory
    observations = tl.where(observed, observations, 0.0)

    # states: stored before the policy runs, which needs the registers
    noise_std = tl.load(table + NOISE_STD)
    state_quads: tl.constexpr = (STATE_DIM + 3) // 4
    quads: tl.constexpr = state_quads + (ACTION_DIM + 3) // 4
    if STATE_NOISE:
        if GIVEN_NOISE:
            noise = tl.load(trajectory_noise_ptr + state_at, mask=state_mask, other=0.0)
        else:
            noise = normals(seed_ptr, batch, k, t * quads, BLOCK_ROWS, BLOCK_D)
        mean += noise_std * noise
    mean = tl.where(is_first, initial, mean)
    if LAST_STEP and ACTION_UPDATE == "exact":
        observations = tl.where(observed, mean, 0.0)
    tl.store(trajectory_out_ptr + state_at, mean, mask=state_mask)
    input_at = input_rows(input_ptr, row, horizon, stride_input, STATE_DIM + ACTION_DIM)
    if not LAST_STEP:
        store_operand(input_at[:, None] + d[None, :], mean, state_mask)

    # actions
    action_mean = tl.load(action_mean_ptr + a, mask=a_valid, other=0.0)
    action_scale = tl.load(action_scale_ptr + a, mask=a_valid, other=1.0)
    actions = tl.load(actions_ptr + action_at, mask=action_mask, other=0.0)
    if ACTION_UPDATE != "none":
        mu = policy_mean(
            observations, d, a, first_weight_ptr, hidden_weight_ptr, vectors_ptr, last_weight_ptr,
            last_bias_ptr, stride_first, stride_hidden, eps, OBSERVATION_DIM, ACTION_DIM, HIDDEN,
            NUM_LAYERS, INPUT_PRECISION, ROUND_TF32, BLOCK_ROWS, BLOCK_A, BLOCK_UNITS,
            BLOCK_HIDDEN,
        )  # fmt: skip
        std = tl.load(std_ptr + a, mask=a_valid, other=1.0)[None, :]  # [1, BLOCK_A]
        if ACTION_UPDATE == "sample" or ACTION_UPDATE == "exact":
            raw = mu
        else:
            low, high = mu - clip_std * std, mu + clip_std * std
            raw = actions * action_scale[None, :] + action_mean[None, :]
            if CLIP == "before":
                raw = clip(raw, low, high)
            if ACTION_UPDATE == "score":
                guidance = tl.load(guidance_ptr)
                if MAX_GUIDANCE:
                    guidance = tl.minimum(guidance, max_guidance * std * std)
                raw += guidance * ((mu - raw) / (std * std))
            if CLIP == "after":
                raw = clip(raw, low, high)
        if not LAST_STEP or ACTION_UPDATE == "exact":
            if GIVEN_NOISE:
                noise = tl.load(action_noise_ptr + action_at, mask=action_mask, other=0.0)
            else:
                first = t * quads + state_quads
                noise = normals(seed_ptr, batch, action_noise_step, first, BLOCK_ROWS, BLOCK_A)
            if ACTION_UPDATE == "sample" or ACTION_UPDATE == "exact":
                raw += std * noise
        actions = (raw - action_mean[None, :]) / action_scale[None, :]
        if not LAST_STEP and ACTION_UPDATE == "score":
            actions += noise_std * noise
    tl.store(actions_out_ptr + action_at, actions, mask=action_mask)
    if not LAST_STEP:
        store_action_operand(
            input_at[:, None] + STATE_DIM + a[None, :], actions, action_mask, a, action_mean,
            action_scale, action_low_ptr, action_high_ptr,
            tl.load(table - NUM_COLUMNS + ACTION_SCALE), ACTION_DIM, CLIP_DENOISER_ACTIONS,
        )  # fmt: skip


def guided_step(
    prediction: Tensor,
    trajectory: Tensor,
    actions: Tensor,
    initial_observations: Tensor,
    k: int,
    policy: PolicyOperands,
    table: Tensor,
    space: ActionSpace,
    options: StepOptions,
    guidance_scale: Tensor,
    seed: Tensor,
    noise: tuple[Tensor, Tensor | None] | None,
    trajectory_out: Tensor,
    actions_out: Tensor,
    denoiser_input: Tensor,
    blocks: StepBlocks | None = None,
    dependent: bool = False,
) -> None:
    """Advance states and actions from diffusion step k + 1 to k (Algorithm 2, lines 8-13, with
    equation 11) and write the denoiser's next input, in one launch.

    All tensors are on one device and contiguous; float32 unless said otherwise.

    Args:
        prediction: the denoiser's output [B, H, D].
        trajectory: x_i [B, H, D], normalized. actions: u_i [B, H, A], normalized.
        initial_observations: s0 [B, S], normalized.
        k: 0-based diffusion step, K-1 .. 0.
        policy: folded onto normalized observations.
        table: `schedule_table` [K, 8]. space: moments and bounds of the actions.
        guidance_scale: delta, [1], in units of squared raw actions.
        seed: [2] int64, seed and call number of the in-kernel noise.
        noise: standard normals ([B, H, D], [B, H, A]) to use instead, or None; those of the actions
            may be None where the step takes none. With action update "exact" they are xi in every
            step; where nothing is given, xi is drawn again, the numbers of `initial_state`'s u_K.
        trajectory_out, actions_out: receive x_{i-1} and u_{i-1}; may be the inputs.
        denoiser_input: [B, >= H (D + A)] in the denoiser's dtype; columns beyond are left alone.
            Not written in the last step.
        blocks: tile sizes; default `step_blocks`.
        dependent: launch before the kernel before has ended, see `dependent_launch`.

    Numerics: element-wise parts, LayerNorms and the policy's last layer in float32; its first layer
    in float32 or (precision "tf32", "float16") tf32, its second in `hidden_weight`'s dtype or,
    where that is float32, like the first. tf32 operands are rounded to nearest. A normal is a
    function of (seed, call, trajectory, step, element) alone. Neither synchronizes nor allocates;
    may be captured. Compiled anew for the last step, whose mathematics differ: with "exact" the
    policy reads the final states.

    Raises:
        InputError: an option has a value that is none of its names.
    """
    check_choices(options)
    batch, horizon, state_dim = trajectory.shape
    action_dim = actions.shape[-1]
    rows = batch * horizon
    blocks = blocks or step_blocks(policy.precision, rows, state_dim)
    last_step = k == 0
    hidden = policy.first_weight.shape[0]
    clip = options.clip_order if options.clip_std is not None else "none"
    action_update = options.action_update
    if action_update == "exact":
        clip = "none"
    elif last_step:  # no step along the score any more, at most a clip
        clips = options.clip_final_actions and options.clip_std is not None
        action_update, clip = ("clip", "before") if clips else ("none", "none")
    trajectory_noise, action_noise = noise or (trajectory, None)
    _guided_step_kernel[(triton.cdiv(rows, blocks.block_rows),)](
        prediction_ptr=prediction,
        trajectory_ptr=trajectory,
        actions_ptr=actions,
        initial_ptr=initial_observations,
        table_ptr=table,
        guidance_ptr=guidance_scale,
        action_mean_ptr=space.mean,
        action_scale_ptr=space.scale,
        action_low_ptr=space.low,
        action_high_ptr=space.high,
        seed_ptr=seed,
        trajectory_noise_ptr=trajectory_noise,
        action_noise_ptr=actions if action_noise is None else action_noise,
        first_weight_ptr=policy.first_weight,
        hidden_weight_ptr=policy.hidden_weight,
        vectors_ptr=policy.vectors,
        last_weight_ptr=policy.last_weight,
        last_bias_ptr=policy.last_bias,
        std_ptr=policy.std,
        trajectory_out_ptr=trajectory_out,
        actions_out_ptr=actions_out,
        input_ptr=denoiser_input,
        k=k,
        action_noise_step=table.shape[0] if action_update == "exact" else k,
        num_rows=rows,
        horizon=horizon,
        stride_first=policy.first_weight.stride(0),
        stride_hidden=policy.hidden_weight.stride(0),
        stride_input=denoiser_input.stride(0),
        eps=policy.eps,
        clip_std=float(options.clip_std or 0.0),
        max_guidance=float(options.max_guidance or 0.0),
        OBSERVATION_DIM=state_dim - 2,
        STATE_DIM=state_dim,
        ACTION_DIM=action_dim,
        HIDDEN=hidden,
        NUM_LAYERS=policy.num_layers,
        INPUT_PRECISION="ieee" if policy.precision == "float32" else "tf32",
        ROUND_TF32=policy.precision != "float32" and not is_interpreted(),
        LAST_STEP=last_step,
        PREDICTS_NOISE=options.prediction_type == "epsilon",
        ACTION_UPDATE=action_update,
        CLIP=clip,
        POLICY_INPUT=options.policy_input,
        LIMIT_STATE_CHANGE=options.limits_state_change,
        STATE_NOISE=not last_step or options.variance_type == "beta",
        MAX_GUIDANCE=options.max_guidance is not None,
        CLIP_DENOISER_ACTIONS=options.clips_denoiser_actions,
        GIVEN_NOISE=noise is not None,
        BLOCK_ROWS=blocks.block_rows,
        BLOCK_D=padded(state_dim),
        BLOCK_A=padded(action_dim),
        BLOCK_UNITS=blocks.block_units,
        BLOCK_HIDDEN=padded(hidden),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **launch_options(dependent),
    )
