"""One layer of the residual MLP denoiser: LayerNorm, ReLU, GEMM, bias and residual in one launch.

Twin: `polygrad_fast.reference.residual_mlp`. Derivations and counts: README.md in this folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from polygrad_fast.kernels.dependent_launch import launch_options, wait_for_previous
from polygrad_fast.kernels.precision import (
    ALL,
    PRECISIONS,
    is_interpreted,
    round_to_tf32,
    store_operand,
)


@dataclass(frozen=True)
class LayerBlocks:
    """Tile sizes and launch parameters of one layer."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# (few programs, many programs, narrow output without moments)
LAYER_BLOCKS = {
    "float32": (
        LayerBlocks(32, 64, 32, 4, 2),
        LayerBlocks(64, 64, 32, 8, 2),
        LayerBlocks(32, 32, 32, 4, 2),
    ),
    "tf32": (
        LayerBlocks(64, 128, 32, 4, 3),
        LayerBlocks(128, 128, 32, 8, 3),
        LayerBlocks(64, 32, 32, 4, 3),
    ),
    "float16": (
        LayerBlocks(64, 128, 64, 4, 3),
        LayerBlocks(128, 128, 64, 8, 3),
        LayerBlocks(64, 32, 64, 4, 3),
    ),
}
LAYER_BLOCKS["bfloat16"] = LAYER_BLOCKS["float16"]
ONE_WAVE = 132  # multiprocessors of an H200; that this is the best boundary is unmeasured


def layer_blocks(precision: str, rows: int, out_dim: int, writes_moments: bool) -> LayerBlocks:
    """Return the tile sizes for a layer of that many rows and columns.

    A layer without moments is the output layer. Where its columns are so few that wide tiles would
    not occupy the device, it takes narrow ones. Larger tiles read each operand less often, and are
    taken where they occupy nine tenths of the device. All fit the 99 KB of shared memory of GeForce
    cards (their code is sm_80's) and the 227 KB of sm_90.
    """
    few, many, narrow = LAYER_BLOCKS[precision]

    def programs(blocks: LayerBlocks) -> int:
        return triton.cdiv(out_dim, blocks.block_n) * triton.cdiv(rows, blocks.block_m)

    if not writes_moments and programs(few) < ONE_WAVE:
        return narrow
    return many if 10 * programs(many) >= 9 * ONE_WAVE else few


@triton.jit
def _merged_moments(
    moments_ptr,
    row,
    row_mask,
    rows,
    eps,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
):
    """Merge per-tile (mean, sum of squared deviations) into mean and 1/std of whole rows (Chan)."""
    tile = tl.arange(0, NUM_TILES)
    count = tl.maximum(tl.minimum(DIM - tile * TILE, TILE), 0).to(tl.float32)  # [NUM_TILES]
    mask = row_mask[:, None] & (count > 0)[None, :]
    at = moments_ptr + tile.to(tl.int64)[None, :] * 2 * rows + row.to(tl.int64)[:, None]
    tile_mean = tl.load(at, mask=mask, other=0.0)  # [BLOCK_M, NUM_TILES]
    tile_m2 = tl.load(at + rows, mask=mask, other=0.0)
    mean = tl.sum(tile_mean * count[None, :], axis=1) / DIM
    delta = tl.where(mask, tile_mean - mean[:, None], 0.0)
    variance = tl.sum(tile_m2 + count[None, :] * delta * delta, axis=1) / DIM
    return mean, 1.0 / tl.sqrt(variance + eps)  # [BLOCK_M] each


@triton.jit
def _residual_mlp_layer_kernel(
    x_ptr,  # [rows, in_dim], float32 or the GEMM's dtype
    residual_ptr,  # [rows, out_dim], float32, read where RESIDUAL
    weight_ptr,  # [out_dim, in_dim], the GEMM's dtype
    bias_ptr,  # [out_dim], float32
    moments_ptr,  # [NUM_TILES, 2, rows]: what the producer of x wrote
    gamma_ptr,  # [in_dim], float32
    beta_ptr,  # [in_dim], float32
    out_ptr,  # [rows, out_dim], float32
    operand_out_ptr,  # [rows, out_dim], the GEMM's dtype, written where WRITE_OPERAND
    moments_out_ptr,  # [cdiv(out_dim, BLOCK_N), 2, rows]
    rows,
    out_dim,
    stride_x,
    stride_weight,
    stride_residual,
    stride_out,
    stride_operand_out,
    eps,
    IN_DIM: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WRITE_OPERAND: tl.constexpr,
    WRITE_MOMENTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        wait_for_previous()
    # Neighbouring programs share their rows: x is read from memory once and from L2 afterwards.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    m_mask, n_mask = m < rows, n < out_dim
    if NORMALIZE:
        mean, rstd = _merged_moments(moments_ptr, m, m_mask, rows, eps, IN_DIM, TILE, NUM_TILES)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_x  # [BLOCK_M, 1]
    weight_rows = weight_ptr + n.to(tl.int64)[None, :] * stride_weight  # [1, BLOCK_N]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, IN_DIM, BLOCK_K):
        column = start + k
        k_mask = column < IN_DIM
        a = tl.load(
            x_rows + column[None, :], mask=m_mask[:, None] & k_mask[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        w = tl.load(
            weight_rows + column[:, None], mask=k_mask[:, None] & n_mask[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        if NORMALIZE:
            a = a.to(tl.float32)
            gamma = tl.load(gamma_ptr + column, mask=k_mask, other=0.0)
            beta = tl.load(beta_ptr + column, mask=k_mask, other=0.0)
            a = (a - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
        if RELU:
            a = tl.maximum(a, 0.0, propagate_nan=ALL)
        a = a.to(weight_ptr.dtype.element_ty)
        if ROUND_TF32:
            a = round_to_tf32(a)
        accumulator = tl.dot(a, w, accumulator, input_precision=INPUT_PRECISION)

    out = accumulator + tl.load(bias_ptr + n, mask=n_mask, other=0.0)[None, :]
    mask = m_mask[:, None] & n_mask[None, :]
    if RESIDUAL:
        at = residual_ptr + m.to(tl.int64)[:, None] * stride_residual + n[None, :]
        out += tl.load(at, mask=mask, other=0.0)
    tl.store(out_ptr + m.to(tl.int64)[:, None] * stride_out + n[None, :], out, mask=mask)
    if WRITE_OPERAND:
        at = operand_out_ptr + m.to(tl.int64)[:, None] * stride_operand_out + n[None, :]
        store_operand(at, out, mask)
    if WRITE_MOMENTS:
        count = tl.minimum(out_dim - tl.program_id(0) * BLOCK_N, BLOCK_N).to(tl.float32)
        tile_mean = tl.sum(tl.where(n_mask[None, :], out, 0.0), axis=1) / count  # [BLOCK_M]
        delta = tl.where(n_mask[None, :], out - tile_mean[:, None], 0.0)
        at = moments_out_ptr + tl.program_id(0).to(tl.int64) * 2 * rows + m
        tl.store(at, tile_mean, mask=m_mask)
        tl.store(at + rows, tl.sum(delta * delta, axis=1), mask=m_mask)


def moments_shape(precision: str, rows: int, dim: int) -> tuple[int, int, int]:
    """Return the shape of the partial moments of a [rows, dim] tensor: [tiles, 2, rows]."""
    return triton.cdiv(dim, PRECISIONS[precision].moments_tile), 2, rows


def residual_mlp_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    precision: str,
    norm: tuple[Tensor, Tensor, Tensor, float] | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    operand_out: Tensor | None = None,
    moments_out: Tensor | None = None,
    blocks: LayerBlocks | None = None,
    dependent: bool = False,
) -> Tensor:
    """Write f(x) W^T + b (+ residual) to `out`, f being LayerNorm and ReLU, either or none, in one
    launch.

    In half precision a layer reads its producer's result twice: as `x`, rounded, which every tile
    of columns reads whole, and as `residual` in float32, of which each tile reads its own part.

    Args:
        x: [rows, in_dim], float32 or the precision's dtype, which it must have where f is none.
            Last axis contiguous.
        weight: [out_dim, in_dim] in the precision's dtype, last axis contiguous, row stride a
            multiple of 16 bytes for fast loads; in "tf32" rounded to tf32 by the caller (x is
            rounded here).
        bias: [out_dim], float32.
        out: [rows, out_dim], float32; neither x nor residual, which other programs still read.
        precision: a key of `PRECISIONS`.
        norm: (moments of x before it was rounded, as `moments_out` received them from x's producer;
            gamma [in_dim], beta [in_dim], eps); None: no LayerNorm.
        relu: apply ReLU (after the LayerNorm).
        residual: [rows, out_dim], float32, added to the result; None: nothing is.
        operand_out: [rows, out_dim] in the precision's dtype, receives `out` rounded; float16
            saturates.
        moments_out: `moments_shape(precision, rows, out_dim)`, float32, receives out's moments.
        blocks: tile sizes; default `layer_blocks`. block_n must be the precision's moments tile
            where moments are written.
        dependent: launch before the kernel before has ended, see `dependent_launch`.

    Returns:
        `out`.

    Numerics: float32 sums, residual and moments. Neither synchronizes nor allocates; may be
    captured.
    """
    rows, in_dim = x.shape
    out_dim = weight.shape[0]
    setting = PRECISIONS[precision]
    blocks = blocks or layer_blocks(precision, rows, out_dim, moments_out is not None)
    moments, gamma, beta, eps = norm or (x, x, x, 0.0)
    grid = (triton.cdiv(out_dim, blocks.block_n), triton.cdiv(rows, blocks.block_m))
    _residual_mlp_layer_kernel[grid](
        x_ptr=x,
        residual_ptr=out if residual is None else residual,
        weight_ptr=weight,
        bias_ptr=bias,
        moments_ptr=moments,
        gamma_ptr=gamma,
        beta_ptr=beta,
        out_ptr=out,
        operand_out_ptr=out if operand_out is None else operand_out,
        moments_out_ptr=out if moments_out is None else moments_out,
        rows=rows,
        out_dim=out_dim,
        stride_x=x.stride(0),
        stride_weight=weight.stride(0),
        stride_residual=out.stride(0) if residual is None else residual.stride(0),
        stride_out=out.stride(0),
        stride_operand_out=out.stride(0) if operand_out is None else operand_out.stride(0),
        eps=eps,
        IN_DIM=in_dim,
        TILE=setting.moments_tile,
        NUM_TILES=triton.next_power_of_2(triton.cdiv(in_dim, setting.moments_tile)),
        NORMALIZE=norm is not None,
        RELU=relu,
        RESIDUAL=residual is not None,
        WRITE_OPERAND=operand_out is not None,
        WRITE_MOMENTS=moments_out is not None,
        INPUT_PRECISION=setting.input_precision,
        ROUND_TF32=precision == "tf32" and not is_interpreted(),
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **launch_options(dependent),
    )
    return out
