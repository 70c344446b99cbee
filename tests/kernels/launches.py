"""Launches of Triton kernels recorded and compiled for a GPU that is not there.

A recorded launch is one that triton itself was about to compile: types, constants, alignments and
options are those it chose. Not for the interpreter, which replaces the kernels when it is on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
"""Of a multiprocessor of sm_80 and sm_90; registers are given to a warp 256 at a time."""
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes of shared memory of a multiprocessor, of which each program takes another 1024."""


class Driver:
    """Stands for the driver of one GPU; nothing is launched."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Launch:
    """A kernel, what triton specializes it to, as it keeps it, and the programs of the grid."""

    kernel: triton.JITFunction
    specialization: str
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextlib.contextmanager
def recorded(architecture: int) -> Iterator[list[Launch]]:
    """Record the launches in the block instead of compiling and launching.

    Args:
        architecture: the GPU's compute capability, for instance 90; one per process.
    """
    launches: list[Launch] = []
    run, grids = triton.JITFunction.run, []

    def noted(kernel, *args, grid, **kwargs):
        grids.append(tuple(grid))
        return run(kernel, *args, grid=grid, **kwargs)

    def hook(*, fn, compile, **others) -> bool:
        launches.append(Launch(fn.jit_function, compile["specialization_data"], grids.pop()))
        return True  # do not compile

    before = driver._active
    driver.set_active(Driver(architecture))
    try:
        with (
            mock.patch.object(triton.JITFunction, "run", noted),
            mock.patch.object(knobs.runtime, "jit_cache_hook", hook),
        ):
            yield launches
    finally:
        driver._active = before


def compiled(launches: Iterable[Launch], architecture: int, jobs: int) -> Iterator[dict]:
    """Compile launches in `jobs` processes and yield the row of each, in order.

    Triton keeps what it compiled on disk, so that a launch on such a GPU finds it.
    """
    with concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("fork"), initializer=_set_driver, initargs=(architecture,)
    ) as pool:
        _LAUNCHES[:] = launches
        yield from pool.map(_row, range(len(_LAUNCHES)))


_LAUNCHES: list[Launch] = []
"""For the forked processes: a kernel cannot be pickled."""


def _set_driver(architecture: int) -> None:
    driver.set_active(Driver(architecture))


def _row(index: int) -> dict:
    """Compile one launch; return its row, or the error in one."""
    launch = _LAUNCHES[index]
    try:
        return row(launch)
    except Exception as error:
        return {
            "error": f"{type(error).__name__}: {error}",
            "specialization": launch.specialization,
        }


def row(launch: Launch) -> dict:
    """Compile a launch and return what it needs."""
    kernel = launch.kernel.preload(launch.specialization)
    ptx, options = kernel.asm["ptx"], kernel.metadata
    needs = {
        "sm": options.target.arch,
        "warps": options.num_warps,
        "stages": options.num_stages,
        "shared": options.shared,
        **resources(kernel.asm["cubin"]),
    }
    return {
        **needs,
        "programs": programs_per_multiprocessor(needs),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "cvt_tf32": len(re.findall(r"cvt\.rna\.tf32", ptx)),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Read registers and stack (spills lie there) out of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(numbers["REG"]),
        "stack": int(numbers["STACK"]) + int(numbers["LOCAL"]),
    }


def programs_per_multiprocessor(needs: dict) -> int:
    """Return how many programs run on one multiprocessor at a time."""
    per_warp = -(-needs["registers"] * 32 // 256) * 256
    return min(
        REGISTERS // per_warp // needs["warps"],
        WARPS // needs["warps"],
        SHARED[needs["sm"]] // (needs["shared"] + 1024),
        PROGRAMS,
    )
