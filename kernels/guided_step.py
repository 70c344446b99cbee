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
from polygrad_fast.kernels.residual_mlp import is_interpreted, round_to_tf32

FP16_MAX = tl.constexpr(65504.0)
ALL = tl.constexpr(tl.PropagateNan.ALL)

# Columns of the schedule table, [K, NUM_COLUMNS].
X_SCALE = tl.constexpr(0)  # x0_hat = X_SCALE x - PREDICTION_SCALE prediction ("epsilon")
PREDICTION_SCALE = tl.constexpr(1)
DENOISED_COEF = tl.constexpr(2)  # posterior mean = DENOISED_COEF x0_hat + X_COEF x
X_COEF = tl.constexpr(3)
NOISE_STD = tl.constexpr(4)
CHANGE_LIMIT = tl.constexpr(5)  # infinite where the state change is not limited
ACTION_SCALE = tl.constexpr(6)  # of the denoiser's actions in this step
NUM_COLUMNS = tl.constexpr(8)  # rows of 32 bytes

MAX_POLICY_DIM = 256
MAX_POLICY_LAYERS = 2
MAX_STATE_DIM = 512
MAX_ONE_LAYER_STATE_DIM = 64  # a one-layer policy's weight is one tile in shared memory
MAX_ACTION_DIM = 64


@dataclass(frozen=True)
class StepBlocks:
    """Rows (trajectory steps) per program, hidden units per chunk, launch parameters."""

    block_rows: int
    block_units: int
    num_warps: int
    num_stages: int


# By the GEMMs' precision and the states' padded width: (few rows, many rows). Chosen so that
# none of a paper-sized sampler's at full batch spills on sm_80 or sm_90; a few others spill up to
# 16 bytes (README.md; tests/kernels/test_compiled.py prints the table).
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
        16: (StepBlocks(16, 64, 8, 2), StepBlocks(64, 64, 8, 2)),
        32: (StepBlocks(16, 64, 8, 2), StepBlocks(64, 64, 8, 2)),
        64: (StepBlocks(16, 64, 8, 2), StepBlocks(64, 32, 8, 2)),
        128: (StepBlocks(16, 32, 8, 2), StepBlocks(32, 32, 8, 2)),
        256: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
        512: (StepBlocks(16, 16, 8, 2), StepBlocks(16, 16, 8, 2)),
    },
}
MANY_ROWS = 4096


def step_blocks(precision: str, rows: int, state_dim: int) -> StepBlocks:
    """Return the tile sizes for that many rows (B H) of D states; precision is the policy's."""
    few, many = STEP_BLOCKS[precision][_padded(state_dim)]
    return many if rows >= MANY_ROWS else few


def _padded(dim: int) -> int:
    """Width of a tile that holds `dim` columns; tl.dot wants at least 16."""
    return max(16, triton.next_power_of_2(dim))


@dataclass(frozen=True)
class PolicyOperands:
    """The policy as the kernel reads it: on normalized observations, one row per output unit."""

    first_weight: Tensor  # [hidden, S] float32, row stride a multiple of 16 bytes
    hidden_weight: Tensor  # [hidden, hidden], the GEMM's dtype; not read with one layer
    # Those that are multiplied in tf32 come rounded to it.
    vectors: Tensor  # [layers, 3, hidden] float32: bias, LayerNorm's gamma and beta
    last_weight: Tensor  # [A, hidden] float32
    last_bias: Tensor  # [A] float32
    std: Tensor  # [A] float32, raw actions
    num_layers: int
    eps: float
    precision: str  # a key of STEP_BLOCKS; "float16" also serves bfloat16 engines


@dataclass(frozen=True)
class StepOptions:
    """The options of `SamplerConfig` that the kernel is compiled for."""

    prediction_type: str
    action_update: str
    clip_std: float | None
    clip_order: str
    clip_final_actions: bool
    policy_input: str
    limits_state_change: bool
    variance_type: str
    clips_denoiser_actions: bool
    max_guidance: float | None


@triton.jit
def _sincos_turns(u):
    """sin and cos of 2 pi u, u in [0, 1], to 1e-7.

    By quadrants: 4 u = q + r with |r| <= 1/2, and minimax polynomials in (r pi / 2)^2. The
    library's cosine brings a slow path for huge arguments along, with stack memory.
    """
    q = tl.floor(4.0 * u + 0.5)
    x = (4.0 * u - q) * 1.5707963267948966
    x2 = x * x
    sin = x + x * x2 * (-0.16666654611 + x2 * (8.3321608736e-3 - x2 * 1.9515295891e-4))
    cos = (
        1.0
        - 0.5 * x2
        + x2
        * x2
        * (4.166664568298827e-2 + x2 * (-1.388731625493765e-3 + x2 * 2.443315711809948e-5))
    )
    quadrant = q.to(tl.int32)
    odd = (quadrant & 1) == 1
    s, c = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    s = tl.where((quadrant & 2) == 2, -s, s)
    c = tl.where(((quadrant + 1) & 2) == 2, -c, c)
    return s, c


@triton.jit
def _two_normals(r0, r1):
    """Box-Muller: two random 32-bit integers to two standard normals, |n| < 5.7."""
    u0 = tl.maximum(tl.uint_to_uniform_float(r0), 1.0e-7)
    s, c = _sincos_turns(tl.uint_to_uniform_float(r1))
    radius = tl.sqrt(-2.0 * tl.log(u0))
    return radius * c, radius * s


@triton.jit
def _four_normals(seed, call, trajectory, step, index):
    """Philox 4x32-10 at the counter (index, trajectory, step, call): four standard normals."""
    zero = index * 0
    r0, r1, r2, r3 = tl.philox(seed, index, zero + trajectory, zero + step, zero + call)
    n0, n1 = _two_normals(r0, r1)
    n2, n3 = _two_normals(r2, r3)
    return n0, n1, n2, n3


@triton.jit
def _normals(
    seed_ptr, trajectory, step, first_index, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Standard normals [BLOCK_ROWS, BLOCK], four columns per counter from first_index on.

    A function of (seed, call, trajectory, step, element) alone, whatever the tiling.
    """
    seed = tl.load(seed_ptr)
    call = tl.load(seed_ptr + 1).to(tl.int32)
    index = first_index[:, None] + tl.arange(0, BLOCK // 4)[None, :]  # [BLOCK_ROWS, BLOCK / 4]
    n0, n1, n2, n3 = _four_normals(seed, call, trajectory[:, None], step, index)
    quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [BLOCK_ROWS, BLOCK / 4, 2, 2], in order
    return tl.reshape(quads, (BLOCK_ROWS, BLOCK))


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def _store_operand(ptr, value, mask):
    """Store as the next GEMM's operand; float16 saturates instead of overflowing."""
    if ptr.dtype.element_ty == tl.float16:
        value = _clip(value, -FP16_MAX, FP16_MAX)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _input_rows(input_ptr, row, horizon, stride_input, ROW_DIM: tl.constexpr):
    """Pointers [BLOCK_ROWS] to where each row's (state ++ action) lies in the flattened denoiser
    input."""
    batch = row // horizon
    return input_ptr + batch.to(tl.int64) * stride_input + (row - batch * horizon) * ROW_DIM


@triton.jit
def _store_action_operand(
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
        raw = _clip(actions * scale[None, :] + mean[None, :], low[None, :], high[None, :])
        actions = (raw - mean[None, :]) / scale[None, :]
    _store_operand(ptr, actions * denoiser_scale, mask)


@triton.jit
def _first_layer(
    observations,  # [BLOCK_ROWS, BLOCK_D], zero from column S on
    weight_ptr,
    vectors_ptr,
    unit,
    unit_mask,
    column,
    stride_weight,
    OBSERVATION_DIM: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    weight = tl.load(
        weight_ptr + unit[None, :] * stride_weight + column[:, None],
        mask=(column < OBSERVATION_DIM)[:, None] & unit_mask[None, :],
        other=0.0,
    )  # [BLOCK_D, units]
    z = tl.dot(observations, weight, input_precision=INPUT_PRECISION)
    return z + tl.load(vectors_ptr + unit, mask=unit_mask, other=0.0)[None, :]


@triton.jit
def _norm_elu(z, mean, rstd, vectors_ptr, unit, unit_mask, HIDDEN: tl.constexpr):
    """ELU(LayerNorm(z)) of some units, given the moments of all; 0 for padded units."""
    gamma = tl.load(vectors_ptr + HIDDEN + unit, mask=unit_mask, other=0.0)
    beta = tl.load(vectors_ptr + 2 * HIDDEN + unit, mask=unit_mask, other=0.0)
    z = (z - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
    return tl.where(z > 0, z, tl.exp(z) - 1.0)


@triton.jit
def _policy_mean(
    observations,  # [BLOCK_ROWS, BLOCK_D] float32, zero from column S on
    column,
    action_column,
    first_weight_ptr,
    hidden_weight_ptr,
    vectors_ptr,
    last_weight_ptr,
    last_bias_ptr,
    stride_first,
    stride_hidden,
    eps,
    OBSERVATION_DIM: tl.constexpr,
    ACTION_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """tanh(MLP(observations)), [BLOCK_ROWS, BLOCK_A].

    With two layers the first is computed twice, in chunks of BLOCK_UNITS: once for its moments,
    once as the operand of the second. Neither its 256 columns nor the second's weight ever sit in
    registers or shared memory as a whole.
    """
    if ROUND_TF32:
        observations = round_to_tf32(observations)
    wide = tl.arange(0, BLOCK_HIDDEN)
    wide_mask = wide < HIDDEN
    if NUM_LAYERS == 1:
        z = _first_layer(
            observations, first_weight_ptr, vectors_ptr, wide, wide_mask, column,
            stride_first, OBSERVATION_DIM, INPUT_PRECISION,
        )  # fmt: skip
    else:
        mean = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        m2 = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK_UNITS):
            unit = start + tl.arange(0, BLOCK_UNITS)
            unit_mask = unit < HIDDEN
            z = _first_layer(
                observations, first_weight_ptr, vectors_ptr, unit, unit_mask, column,
                stride_first, OBSERVATION_DIM, INPUT_PRECISION,
            )  # fmt: skip
            count = tl.minimum(HIDDEN - start, BLOCK_UNITS) * 1.0  # the interpreter counts in ints
            seen = start * 1.0
            chunk_mean = tl.sum(tl.where(unit_mask[None, :], z, 0.0), axis=1) / count
            delta = tl.where(unit_mask[None, :], z - chunk_mean[:, None], 0.0)
            shift = chunk_mean - mean
            m2 += tl.sum(delta * delta, axis=1) + shift * shift * (seen * count / (seen + count))
            mean += shift * (count / (seen + count))
        rstd = 1.0 / tl.sqrt(m2 / HIDDEN + eps)
        z = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK_UNITS):
            unit = start + tl.arange(0, BLOCK_UNITS)
            unit_mask = unit < HIDDEN
            h = _first_layer(
                observations, first_weight_ptr, vectors_ptr, unit, unit_mask, column,
                stride_first, OBSERVATION_DIM, INPUT_PRECISION,
            )  # fmt: skip
            h = _norm_elu(h, mean, rstd, vectors_ptr, unit, unit_mask, HIDDEN)
            weight = tl.load(
                hidden_weight_ptr + wide[None, :] * stride_hidden + unit[:, None],
                mask=unit_mask[:, None] & wide_mask[None, :],
                other=0.0,
            )  # [BLOCK_UNITS, BLOCK_HIDDEN]
            h = h.to(weight.dtype)
            if ROUND_TF32 and weight.dtype == tl.float32:
                h = round_to_tf32(h)
            z = tl.dot(h, weight, z, input_precision=INPUT_PRECISION)
        vectors_ptr += 3 * HIDDEN
        z += tl.load(vectors_ptr + wide, mask=wide_mask, other=0.0)[None, :]
    mean = tl.sum(tl.where(wide_mask[None, :], z, 0.0), axis=1) / HIDDEN
    delta = tl.where(wide_mask[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(delta * delta, axis=1) / HIDDEN + eps)
    z = _norm_elu(z, mean, rstd, vectors_ptr, wide, wide_mask, HIDDEN)  # [BLOCK_ROWS, BLOCK_HIDDEN]
    # The last layer has few columns: float32 sums cost less than a padded tensor-core tile.
    out = tl.zeros((BLOCK_ROWS, BLOCK_A), dtype=tl.float32)
    for action in range(ACTION_DIM):
        weight = tl.load(last_weight_ptr + action * HIDDEN + wide, mask=wide_mask, other=0.0)
        value = tl.sum(z * weight[None, :], axis=1) + tl.load(last_bias_ptr + action)
        out = tl.where((action_column == action)[None, :], value[:, None], out)
    return 1.0 - 2.0 / (tl.exp(2.0 * out) + 1.0)


@triton.jit(do_not_specialize=["k"])
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
):
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
            noise = _normals(seed_ptr, batch, k, t * quads, BLOCK_ROWS, BLOCK_D)
        mean += noise_std * noise
    mean = tl.where(is_first, initial, mean)
    tl.store(trajectory_out_ptr + state_at, mean, mask=state_mask)
    input_rows = _input_rows(input_ptr, row, horizon, stride_input, STATE_DIM + ACTION_DIM)
    if not LAST_STEP:
        _store_operand(input_rows[:, None] + d[None, :], mean, state_mask)

    # actions
    action_mean = tl.load(action_mean_ptr + a, mask=a_valid, other=0.0)
    action_scale = tl.load(action_scale_ptr + a, mask=a_valid, other=1.0)
    actions = tl.load(actions_ptr + action_at, mask=action_mask, other=0.0)
    if ACTION_UPDATE != "none":
        policy_mean = _policy_mean(
            observations, d, a, first_weight_ptr, hidden_weight_ptr, vectors_ptr, last_weight_ptr,
            last_bias_ptr, stride_first, stride_hidden, eps, OBSERVATION_DIM, ACTION_DIM, HIDDEN,
            NUM_LAYERS, INPUT_PRECISION, ROUND_TF32, BLOCK_ROWS, BLOCK_A, BLOCK_UNITS,
            BLOCK_HIDDEN,
        )  # fmt: skip
        std = tl.load(std_ptr + a, mask=a_valid, other=1.0)[None, :]  # [1, BLOCK_A]
        if ACTION_UPDATE == "sample":
            raw = policy_mean
        else:
            low, high = policy_mean - clip_std * std, policy_mean + clip_std * std
            raw = actions * action_scale[None, :] + action_mean[None, :]
            if CLIP == "before":
                raw = _clip(raw, low, high)
            if ACTION_UPDATE == "score":
                guidance = tl.load(guidance_ptr)
                if MAX_GUIDANCE:
                    guidance = tl.minimum(guidance, max_guidance * std * std)
                raw += guidance * ((policy_mean - raw) / (std * std))
            if CLIP == "after":
                raw = _clip(raw, low, high)
        if not LAST_STEP:
            if GIVEN_NOISE:
                noise = tl.load(action_noise_ptr + action_at, mask=action_mask, other=0.0)
            else:
                noise = _normals(seed_ptr, batch, k, t * quads + state_quads, BLOCK_ROWS, BLOCK_A)
            if ACTION_UPDATE == "sample":
                raw += std * noise
        actions = (raw - action_mean[None, :]) / action_scale[None, :]
        if not LAST_STEP and ACTION_UPDATE == "score":
            actions += noise_std * noise
    tl.store(actions_out_ptr + action_at, actions, mask=action_mask)
    if not LAST_STEP:
        _store_action_operand(
            input_rows[:, None] + STATE_DIM + a[None, :], actions, action_mask, a, action_mean,
            action_scale, action_low_ptr, action_high_ptr,
            tl.load(table - NUM_COLUMNS + ACTION_SCALE), ACTION_DIM, CLIP_DENOISER_ACTIONS,
        )  # fmt: skip


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
):
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
        trajectory = _normals(seed_ptr, batch, num_steps, t * quads, BLOCK_ROWS, BLOCK_D)
        actions = _normals(seed_ptr, batch, num_steps, t * quads + state_quads, BLOCK_ROWS, BLOCK_A)
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
    input_rows = _input_rows(input_ptr, row, horizon, stride_input, STATE_DIM + ACTION_DIM)
    _store_operand(input_rows[:, None] + d[None, :], trajectory, state_mask)
    _store_action_operand(
        input_rows[:, None] + STATE_DIM + a[None, :], actions, action_mask, a, action_mean,
        action_scale, action_low_ptr, action_high_ptr,
        tl.load(table_ptr + (num_steps - 1) * NUM_COLUMNS + ACTION_SCALE), ACTION_DIM,
        CLIP_DENOISER_ACTIONS,
    )  # fmt: skip


@dataclass(frozen=True)
class ActionSpace:
    """Moments and bounds of the raw actions, [A] float32 each; bounds are read only where the
    denoiser sees clipped actions."""

    mean: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor


def schedule_table(schedule, options: StepOptions, config) -> Tensor:
    """Return the constants of every step, [K, 8] float32, on the schedule's device.

    Args:
        schedule: a `NoiseSchedule`. options: as for the kernel. config: the `SamplerConfig`.
    """
    table = schedule.betas.new_zeros((schedule.num_train_timesteps, NUM_COLUMNS.value))
    table[:, X_SCALE.value] = schedule.sqrt_recip_alphas_cumprod
    table[:, PREDICTION_SCALE.value] = schedule.sqrt_recipm1_alphas_cumprod
    coefficients = schedule.step_coefficients(options.variance_type)
    for column, values in zip((DENOISED_COEF, X_COEF, NOISE_STD), coefficients, strict=True):
        table[:, column.value] = values
    table[:, CHANGE_LIMIT.value] = float("inf")
    if options.limits_state_change:
        table[: config.clip_state_change_steps, CHANGE_LIMIT.value] = config.clip_state_change
    table[:, ACTION_SCALE.value] = schedule.alphas_cumprod.sqrt() if config.scale_actions else 1.0
    return table.contiguous()


def step_options(config) -> StepOptions:
    """Return what the kernel needs of a `SamplerConfig`."""
    check_choices(config)
    return StepOptions(
        prediction_type=config.prediction_type,
        action_update=config.action_update,
        clip_std=config.clip_std,
        clip_order=config.clip_order,
        clip_final_actions=config.clip_final_actions,
        policy_input=config.policy_input,
        limits_state_change=config.clip_state_change is not None,
        variance_type=config.variance_type,
        clips_denoiser_actions=config.denoiser_actions == "clipped",
        max_guidance=config.max_guidance,
    )


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
        BLOCK_D=_padded(state_dim),
        BLOCK_A=_padded(action_dim),
        num_warps=4,
        num_stages=2,
    )


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
    noise: tuple[Tensor, Tensor] | None,
    trajectory_out: Tensor,
    actions_out: Tensor,
    denoiser_input: Tensor,
    blocks: StepBlocks | None = None,
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
        noise: standard normals ([B, H, D], [B, H, A]) to use instead, or None.
        trajectory_out, actions_out: receive x_{i-1} and u_{i-1}; may be the inputs.
        denoiser_input: [B, >= H (D + A)] in the denoiser's dtype; columns beyond are left alone.
            Not written in the last step.
        blocks: tile sizes; default `step_blocks`.

    Numerics: element-wise parts, LayerNorms and the policy's last layer in float32; its first layer
    in float32 or (precision "tf32", "float16") tf32, its second in `hidden_weight`'s dtype or,
    where that is float32, like the first. tf32 operands are rounded to nearest. A normal is a
    function of (seed, call, trajectory, step, element) alone. Neither synchronizes nor allocates;
    may be captured. Compiled anew for the last step, whose mathematics differ.

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
    if last_step:  # no step along the score any more, at most a clip
        clips = options.clip_final_actions and options.clip_std is not None
        action_update, clip = ("clip", "before") if clips else ("none", "none")
    trajectory_noise, action_noise = noise or (trajectory, actions)
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
        action_noise_ptr=action_noise,
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
        BLOCK_D=_padded(state_dim),
        BLOCK_A=_padded(action_dim),
        BLOCK_UNITS=blocks.block_units,
        BLOCK_HIDDEN=_padded(hidden),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
