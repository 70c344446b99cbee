"""How the kernels multiply and round: precisions, tf32, saturating stores.

Shared by all kernels; element by element, without bytes of its own: a store is 4 or 2 bytes per
number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)
ALL = tl.constexpr(tl.PropagateNan.ALL)


@dataclass(frozen=True)
class Precision:
    """How a kernel multiplies: the dtype of the GEMM's operands and `tl.dot`'s input precision.

    Sums, residual stream, moments and biases are float32 in all of them.
    """

    dtype: torch.dtype
    input_precision: str
    moments_tile: int
    """Columns per partial moment: BLOCK_N of every layer that writes moments."""


PRECISIONS = {
    "float32": Precision(torch.float32, "ieee", 64),
    "tf32": Precision(torch.float32, "tf32", 128),
    "float16": Precision(torch.float16, "tf32", 128),
    "bfloat16": Precision(torch.bfloat16, "tf32", 128),
}


@triton.jit
def round_to_tf32(a):
    """Round float32 to tf32, ties away from zero: tensor cores cut the other bits off. Not for the
    interpreter, which has no inline assembly."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], tl.float32, True, 1)


@triton.jit
def nearest_tf32(a):
    """Round float32 to tf32 as `round_to_tf32` does, by integers, so that the interpreter can; NaN
    stays NaN."""
    bits = (a.to(tl.int32, bitcast=True) + 0x1000) & ~0x1FFF
    return tl.where(a == a, bits.to(tl.float32, bitcast=True), a)


@triton.jit
def clip(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def store_operand(ptr, value, mask):
    """Store as the next GEMM's operand; float16 saturates instead of overflowing."""
    if ptr.dtype.element_ty == tl.float16:
        value = clip(value, -FP16_MAX, FP16_MAX)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


def is_interpreted() -> bool:
    """Return whether the kernels run in triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return not isinstance(round_to_tf32, triton.runtime.JITFunction)


def padded(dim: int) -> int:
    """Width of a tile that holds `dim` columns; tl.dot wants at least 16."""
    return max(16, triton.next_power_of_2(dim))
