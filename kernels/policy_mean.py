"""The mean of a Gaussian policy, tanh(MLP), inside a kernel.

Part of `guided_step`. A row costs 2 (2 S P + P^2 + A P) FLOPs with two layers of P units (the first
layer is computed twice), 2 (S P + A P) with one; a program reads the weights, 4 (2 S P + A P) bytes
and P^2 of the hidden layer's dtype, from L2. Derivations: README.md in this folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from polygrad_fast.kernels.precision import round_to_tf32

MAX_POLICY_DIM = 256
MAX_POLICY_LAYERS = 2
MAX_STATE_DIM = 512
MAX_ONE_LAYER_STATE_DIM = 64  # a one-layer policy's weight is one tile in shared memory
MAX_ACTION_DIM = 64


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
def policy_mean(
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
