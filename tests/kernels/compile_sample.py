"""Compile what paper-sized samples of engine "triton" launch, without the GPU.

    export PYTHONPATH=tests:tests/kernels:benchmarks
    python tests/kernels/compile_sample.py 90            # prints a JSON row per kernel and case
    python tests/kernels/compile_sample.py 90 --timed --jobs 16

Run as a script, without TRITON_INTERPRET. The engine runs on a CUDA device that is imitated; its
launches are recorded. A row says how often the kernel is launched in a sample, on how many
programs, in how many waves these run on the multiprocessors of an H200, and how many kernels the
engine compiled to check the device that this sample does not use. With --timed the kernels are
those of the samples that `benchmarks/bench_sampler.py` times: triton finds them on disk afterwards.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
from collections.abc import Iterator

import fake_cuda
import torch
from launches import Launch, compiled, recorded

from harness import sampler_case
from polygrad_fast.kernels.residual_mlp import ONE_WAVE
from polygrad_fast.sampling.triton_engine import TritonEngine

CASES = [(1024, 10, "float16"), (1024, 10, "tf32"), (16384, 10, "float16")]
# Batches of 16384 take the kernels of those of 4096.
TIMED = [
    (batch, horizon, dtype)
    for horizon in (10, 50, 200)
    for batch in (1024, 4096, 256)
    for dtype in ("float16", "tf32", "bfloat16", "float32")
]


def launches_of(
    architecture: int, batch: int, horizon: int, dtype: str
) -> tuple[list[Launch], list[Launch]]:
    """Return what an engine's construction launches and what a sample does."""
    with recorded(architecture) as launches, fake_cuda.installed(), torch.no_grad():
        device = torch.device("cuda")
        components = sampler_case.build(sampler_case.Sizes(), horizon, device)
        engine = TritonEngine(components, dtype)
        checked = launches.copy()
        launches.clear()
        s0 = torch.zeros(batch, components.observation_dim, device=device)
        seed = torch.zeros(2, dtype=torch.int64, device=device)
        engine._run(0, s0, torch.zeros(1, device=device), seed)
        return checked, launches.copy()


def unique(launches: list[Launch]) -> list[Launch]:
    """Return one launch of each kernel that is compiled, that of most programs."""
    by_programs = sorted(launches, key=lambda launch: math.prod(launch.grid))
    return list({launch.specialization: launch for launch in by_programs}.values())


def rows_of(architecture: int, batch: int, horizon: int, dtype: str) -> Iterator[dict]:
    """Yield the rows of one case."""
    checked, launches = launches_of(architecture, batch, horizon, dtype)
    times = collections.Counter(launch.specialization for launch in launches)
    in_vain = {launch.specialization for launch in checked} - set(times)
    own = unique(launches)
    for launch, row in zip(own, compiled(own, architecture, jobs=1), strict=True):
        grid = math.prod(launch.grid)
        yield {
            "kernel": launch.name.strip("_").removesuffix("_kernel"),
            "batch": batch,
            "dtype": dtype,
            "launches": times[launch.specialization],
            "grid": grid,
            "waves": -(-grid // (ONE_WAVE * row["programs"])),
            "checked_in_vain": len(in_vain),
            **row,
        }


def main() -> int:
    """Compile, print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", type=int)
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if not options.timed:
        for case in CASES:
            for row in rows_of(options.architecture, *case):
                print(json.dumps(row), flush=True)
        return 0
    launches = unique([t for case in TIMED for t in launches_of(options.architecture, *case)[1]])
    rows = list(compiled(launches, options.architecture, options.jobs))
    errors = [row["error"] for row in rows if "error" in row]
    print(f"{len(rows) - len(errors)} of {len(rows)} kernels compiled", *errors)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
