"""Programmatic dependent launch: a kernel's programs come onto the multiprocessors while the kernel
before it still runs, and wait there for its end, so that its launch costs no time of its own.

Shared by all kernels; two instructions per program, no bytes. From capability 9.0 on; not for the
interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polygrad_fast.kernels.precision import is_interpreted

MINIMUM_CAPABILITY = (9, 0)


@triton.jit
def wait_for_previous():
    """Wait until the kernel before has ended and what it wrote can be read; then let the next one's
    programs come.

    Before the first access to memory that another kernel of the chain writes or reads: as every
    kernel waits, each begins after all those before it.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


def launch_options(dependent: bool) -> dict[str, bool]:
    """Return the arguments of a launch: the kernel's constant DEPENDENT and triton's own option."""
    if not dependent or is_interpreted():
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
