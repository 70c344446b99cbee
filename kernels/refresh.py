"""Folded and cast copies of the networks' weights, as the other kernels read them: all of them in
one launch, or in two where one copy is computed from another.

Twin: `polygrad_fast.reference.refresh`. Derivations and counts: README.md in this folder.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polygrad_fast.kernels.precision import nearest_tf32
from polygrad_fast.kernels.random_normals import sincos_turns

TILE = 64  # rows and columns of `out` that a program computes
TILE_INNER = 32  # columns of `left` at a time
NUM_FREQUENCIES = tl.constexpr(8)
NUM_FEATURES = tl.constexpr(17)  # of a diffusion step: itself, a sine and a cosine per frequency

OPERATIONS = ("copy", "exp", "offset", "product", "embedding")
COPY, EXP, OFFSET, PRODUCT, EMBEDDING = map(tl.constexpr, range(len(OPERATIONS)))
# The table's columns, 64 bits each: what a program does, where, on what.
(
    OPERATION, ROW, COLUMN, ROWS, COLUMNS, INNER, OUT, OUT_STRIDE, ROUNDING, LEFT, LEFT_STRIDE,
    RIGHT, RIGHT_ROW_STRIDE, RIGHT_COLUMN_STRIDE, SCALE, BIAS, SECOND_BIAS, NUMBER, STEPS,
    FREQUENCIES, FIRST, FIRST_BIAS, NUM_COLUMNS,
) = map(tl.constexpr, range(23))  # fmt: skip
FLOAT32, TF32, FLOAT16, BFLOAT16 = map(tl.constexpr, range(4))
_ROUNDINGS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


@dataclass(frozen=True)
class Task:
    """One matrix to compute, `out` [R, C], from others; float32 but for `out` and `steps`, rows
    contiguous. With w = `left`, b = the sum of the biases:

    "copy": (w[steps[r], c] or w[r, c]) scale[c] + b[c]
    "exp": exp(w[r, c]) + number
    "offset": sum_j w[c, j] right[j, 0] + b[c], R = 1, in float64
    "product": sum_j w[r, j] right[j, c] + b[c]
    "embedding": the same with w[r] = SiLU(first f(steps[r]) + first_bias), f a step's 17 Fourier
        features: itself, sin(2 pi v steps[r]) and cos(..) of 8 frequencies v
    """

    operation: str  # one of OPERATIONS
    out: Tensor  # float32, float16 or bfloat16
    left: Tensor | None = None
    right: Tensor | None = None  # [J, C]; any strides
    scale: Tensor | None = None  # [C]
    bias: Tensor | None = None  # [C]
    second_bias: Tensor | None = None  # [C]
    number: float = 0.0
    steps: Tensor | None = None  # [R] int64
    frequencies: Tensor | None = None  # [8]
    first: Tensor | None = None  # [J, 17]
    first_bias: Tensor | None = None  # [J]
    round_tf32: bool = False  # round float32 to tf32's ten bits


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"rows must be contiguous, got strides {tensor.stride()}")
    return tensor.data_ptr()


def _rows_of(task: Task) -> Tensor:
    """Return the table's rows of one task on the host, one for each tile of its `out`."""
    rows, columns = task.out.shape
    left, right, inner = task.left, task.right, 0
    if task.operation == "offset":
        inner = left.shape[1]
    elif right is not None:
        inner = right.shape[0]
    number = struct.unpack("<i", struct.pack("<f", task.number))[0]
    common = [
        OPERATIONS.index(task.operation), 0, 0, rows, columns, inner,
        _address(task.out), task.out.stride(0),
        TF32.value if task.round_tf32 else _ROUNDINGS[task.out.dtype].value,
        _address(left), 0 if left is None else left.stride(0),
        0 if right is None else right.data_ptr(), *((0, 0) if right is None else right.stride()),
        _address(task.scale), _address(task.bias), _address(task.second_bias), number,
        _address(task.steps), _address(task.frequencies), _address(task.first),
        _address(task.first_bias),
    ]  # fmt: skip
    corners = torch.cartesian_prod(torch.arange(0, rows, TILE), torch.arange(0, columns, TILE))
    table = torch.tensor(common).repeat(len(corners), 1)
    table[:, ROW.value : COLUMN.value + 1] = corners
    return table


def refresh_table(tasks: Sequence[Task], device: torch.device) -> Tensor:
    """Return what one launch does, a row per program: [programs, NUM_COLUMNS] int64 on the device.

    It holds addresses: the tasks' tensors must live, where they are, as long as it is used. Copies
    from the host, so that a GPU waits.

    Raises:
        ValueError: a tensor whose rows are not contiguous.
    """
    return torch.cat([_rows_of(task) for task in tasks]).to(device)


@triton.jit
def _vector(address, column, mask):
    """Load float32 [BLOCK] at an address; 0 where that is 0."""
    pointer = address.to(tl.pointer_type(tl.float32))
    return tl.load(pointer + column, mask=mask & (address != 0), other=0.0)


@triton.jit
def _store(task, value, at, mask):
    """Store as float32, rounded to tf32 or not, float16 or bfloat16."""
    rounding, out = tl.load(task + ROUNDING), tl.load(task + OUT)
    if rounding == FLOAT16:
        pointer = out.to(tl.pointer_type(tl.float16))
        tl.store(pointer + at, value.to(tl.float16), mask=mask)
    elif rounding == BFLOAT16:
        pointer = out.to(tl.pointer_type(tl.bfloat16))
        tl.store(pointer + at, value.to(tl.bfloat16), mask=mask)
    else:
        if rounding == TF32:
            value = nearest_tf32(value)
        tl.store(out.to(tl.pointer_type(tl.float32)) + at, value, mask=mask)


@triton.jit
def _left(task, row, row_mask, j):
    """left[r, j], [BLOCK, BLOCK_INNER]; 0 beyond its columns."""
    pointer = tl.load(task + LEFT).to(tl.pointer_type(tl.float32))
    at = pointer + row[:, None] * tl.load(task + LEFT_STRIDE) + j[None, :]
    mask = row_mask[:, None] & (j < tl.load(task + INNER))[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _offset(task, column, mask, BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """sum_j left[c, j] right[j, 0] in float64, [BLOCK]."""
    right = tl.load(task + RIGHT).to(tl.pointer_type(tl.float32))
    inner = tl.load(task + INNER)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, inner, BLOCK_INNER):
        j = start + tl.arange(0, BLOCK_INNER)
        w = _left(task, column, mask, j)
        v = tl.load(right + j * tl.load(task + RIGHT_ROW_STRIDE), mask=j < inner, other=0.0)
        total += tl.sum(w.to(tl.float64) * v.to(tl.float64)[None, :], axis=1)
    return total


@triton.jit
def _right(task, j, j_mask, column, mask):
    """right[j, c], [BLOCK_INNER, BLOCK]."""
    pointer = tl.load(task + RIGHT).to(tl.pointer_type(tl.float32))
    row_stride, column_stride = (
        tl.load(task + RIGHT_ROW_STRIDE),
        tl.load(task + RIGHT_COLUMN_STRIDE),
    )
    at = pointer + j[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(at, mask=j_mask[:, None] & mask[None, :], other=0.0)


@triton.jit
def _product(
    task, row, row_mask, column, mask,
    BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """sum_j left[r, j] right[j, c], [BLOCK, BLOCK], in sums of BLOCK_INNER products."""
    inner = tl.load(task + INNER)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        j = start + tl.arange(0, BLOCK_INNER)
        w = _left(task, row, row_mask, j)
        total += tl.dot(w, _right(task, j, j < inner, column, mask), input_precision="ieee")
    return total


@triton.jit
def _features(task, row, row_mask, BLOCK: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """The Fourier features of the steps, [BLOCK, BLOCK_FEATURES], 0 from column 17 on."""
    steps = tl.load(task + STEPS).to(tl.pointer_type(tl.int64))
    frequencies = tl.load(task + FREQUENCIES).to(tl.pointer_type(tl.float32))
    f = tl.arange(0, BLOCK_FEATURES)
    step = tl.load(steps + row, mask=row_mask, other=0).to(tl.float32)[:, None]
    waves = (f > 0) & (f < NUM_FEATURES)
    v = tl.load(frequencies + (f - 1) % NUM_FREQUENCIES, mask=waves, other=0.0)
    # rounded as torch rounds it, for the angle is hundreds of turns; then exactly to one turn
    angle = step * v[None, :] * 2.0 * 3.14159274101257324
    turns = angle.to(tl.float64) * 0.15915494309189535
    sin, cos = sincos_turns((turns - tl.floor(turns)).to(tl.float32))
    value = tl.where((f <= NUM_FREQUENCIES)[None, :], sin, cos)
    return tl.where(waves[None, :], value, tl.where((f == 0)[None, :], step, 0.0))


@triton.jit
def _embedding(
    task, row, row_mask, column, mask,
    BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """sum_j SiLU(first f(steps[r]) + first_bias)[j] right[j, c], [BLOCK, BLOCK]."""
    features = _features(task, row, row_mask, BLOCK, 32)
    first = tl.load(task + FIRST).to(tl.pointer_type(tl.float32))
    inner = tl.load(task + INNER)
    f = tl.arange(0, 32)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        j = start + tl.arange(0, BLOCK_INNER)
        w = tl.load(
            first + j[None, :] * NUM_FEATURES + f[:, None],
            mask=(j < inner)[None, :] & (f < NUM_FEATURES)[:, None],
            other=0.0,
        )  # [32, BLOCK_INNER]
        z = tl.dot(features, w, input_precision="ieee")
        z += _vector(tl.load(task + FIRST_BIAS), j, j < inner)[None, :]
        z = z / (1.0 + tl.exp(-z))
        total += tl.dot(z, _right(task, j, j < inner, column, mask), input_precision="ieee")
    return total


@triton.jit
def _refresh_kernel(
    table_ptr,  # [programs, NUM_COLUMNS] int64
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    task = table_ptr + tl.program_id(0).to(tl.int64) * NUM_COLUMNS
    operation = tl.load(task + OPERATION)
    row = tl.load(task + ROW) + tl.arange(0, BLOCK)
    column = tl.load(task + COLUMN) + tl.arange(0, BLOCK)
    row_mask, column_mask = row < tl.load(task + ROWS), column < tl.load(task + COLUMNS)
    mask = row_mask[:, None] & column_mask[None, :]
    bias = _vector(tl.load(task + BIAS), column, column_mask)
    bias += _vector(tl.load(task + SECOND_BIAS), column, column_mask)
    if operation == PRODUCT:
        value = _product(task, row, row_mask, column, column_mask, BLOCK, BLOCK_INNER)
        value += bias[None, :]
    elif operation == EMBEDDING:
        value = _embedding(task, row, row_mask, column, column_mask, BLOCK, BLOCK_INNER)
        value += bias[None, :]
    elif operation == OFFSET:
        total = _offset(task, column, column_mask, BLOCK, BLOCK_INNER) + bias.to(tl.float64)
        value = tl.broadcast_to(total.to(tl.float32)[None, :], (BLOCK, BLOCK))
    else:
        steps = tl.load(task + STEPS)
        pointer = steps.to(tl.pointer_type(tl.int64))
        gathered = tl.load(pointer + row, mask=row_mask & (steps != 0), other=0)
        source = tl.where(steps != 0, gathered, row)  # [BLOCK]
        left = tl.load(task + LEFT).to(tl.pointer_type(tl.float32))
        at = left + source[:, None] * tl.load(task + LEFT_STRIDE) + column[None, :]
        value = tl.load(at, mask=mask, other=0.0)
        if operation == EXP:
            number = tl.load(task + NUMBER).to(tl.int32).to(tl.float32, bitcast=True)
            value = tl.exp(value) + number
        else:
            scale = tl.load(task + SCALE)
            factor = _vector(scale, column, column_mask)
            value = value * tl.where(scale != 0, factor, 1.0)[None, :] + bias[None, :]
    _store(task, value, row[:, None] * tl.load(task + OUT_STRIDE) + column[None, :], mask)


def refresh(table: Tensor) -> None:
    """Compute what the table's tasks say, in one launch; none may read what another one writes.

    Args:
        table: of `refresh_table`.

    Numerics: products in float32, without tensor cores, in sums of TILE_INNER that are summed
    again: the errors of 5000 terms are those of some hundred. Offsets are summed in float64, and
    their terms exact; a copy is rounded once. Does not synchronize; may be captured: weights are
    read anew by every replay.
    """
    _refresh_kernel[(len(table),)](
        table_ptr=table,
        BLOCK=TILE,
        BLOCK_INNER=TILE_INNER,
        num_warps=8,
        num_stages=1,
        maxnreg=128,  # two programs to a multiprocessor
    )
