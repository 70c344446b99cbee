"""Standard normals from a counter, drawn inside the kernels.

Shared by `guided_step` and `initial_state`. Work per four normals: ten rounds of Philox 4x32, about
100 integer and 60 float operations; no bytes but the 16 of the seed. README.md in this folder says
which counter belongs to which number.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sincos_turns(u):
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
    s, c = sincos_turns(tl.uint_to_uniform_float(r1))
    radius = tl.sqrt(-2.0 * tl.log(u0))
    return radius * c, radius * s


@triton.jit
def four_normals(seed, call, trajectory, step, index):
    """Philox 4x32-10 at the counter (index, trajectory, step, call): four standard normals."""
    zero = index * 0
    r0, r1, r2, r3 = tl.philox(seed, index, zero + trajectory, zero + step, zero + call)
    n0, n1 = _two_normals(r0, r1)
    n2, n3 = _two_normals(r2, r3)
    return n0, n1, n2, n3


@triton.jit
def normals(seed_ptr, trajectory, step, first_index, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Standard normals [BLOCK_ROWS, BLOCK], four columns per counter from first_index on.

    A function of (seed, call, trajectory, step, element) alone, whatever the tiling.
    """
    seed = tl.load(seed_ptr)
    call = tl.load(seed_ptr + 1).to(tl.int32)
    index = first_index[:, None] + tl.arange(0, BLOCK // 4)[None, :]  # [BLOCK_ROWS, BLOCK / 4]
    n0, n1, n2, n3 = four_normals(seed, call, trajectory[:, None], step, index)
    quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [BLOCK_ROWS, BLOCK / 4, 2, 2], in order
    return tl.reshape(quads, (BLOCK_ROWS, BLOCK))
