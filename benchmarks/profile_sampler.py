"""Sample for a profiler, or under torch.profiler; see PROFILING.md.

    nsys profile --capture-range=cudaProfilerApi ... python benchmarks/profile_sampler.py
    python benchmarks/profile_sampler.py --torch-profiler trace.json

Samples --warmup times, which compiles and captures, then --samples times inside the capture range
and prints the time. Sizes default to the paper's on Walker2d, with random weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import polygrad_fast as pg
from polygrad_fast import profiling
from polygrad_fast.config import DenoiserConfig
from polygrad_fast.errors import InputError
from polygrad_fast.sampling.sampler import ENGINES
from polygrad_fast.training.denoiser import build_denoiser

OBSERVATION_DIM, ACTION_DIM = 17, 6  # Walker2d
DTYPES = ("auto", "float16", "bfloat16", "tf32", "float32")
DENOISERS = ("residual_mlp", "transformer")


def fail(message: str) -> None:
    """Report bad input in one line and leave with exit code 2."""
    print(f"profile_sampler.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Sample for a profiler, or under torch.profiler; see benchmarks/PROFILING.md."
    )
    parser.error = fail
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--batch", type=int, default=1024, help="trajectories per sample (%(default)s)"
    )
    parser.add_argument("--horizon", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--num-steps", type=int, default=128, help="diffusion steps (%(default)s)")
    parser.add_argument("--denoiser", choices=DENOISERS, default="residual_mlp")
    parser.add_argument("--hidden-dim", type=int, help="denoiser's width; default: the paper's")
    parser.add_argument("--policy-dim", type=int, default=256, help="its width (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="samples before (%(default)s)")
    parser.add_argument("--samples", type=int, default=3, help="samples recorded (%(default)s)")
    parser.add_argument(
        "--torch-profiler",
        type=Path,
        metavar="OUT.json",
        help="write a Chrome trace (or .json.gz)",
    )
    parser.add_argument(
        "--kernel-times", action="store_true", help="run torch.profiler and print its table"
    )
    options = parser.parse_args(arguments)
    for name in ("batch", "horizon", "num_steps", "hidden_dim", "policy_dim", "samples"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.warmup < 0:
        fail(f"--warmup must be at least 0, got {options.warmup}")
    return options


def build(options: argparse.Namespace) -> pg.PolicyGuidedSampler:
    """Return a sampler with random weights and moments, the same at every call."""
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {options.device!r} cannot be used: {reason}") from error
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.randn(OBSERVATION_DIM), torch.rand(OBSERVATION_DIM) + 0.5),
        actions=(0.1 * torch.randn(ACTION_DIM), torch.rand(ACTION_DIM) + 0.5),
    )
    denoiser = build_denoiser(
        DenoiserConfig(kind=options.denoiser, hidden_dim=options.hidden_dim),
        OBSERVATION_DIM,
        ACTION_DIM,
        options.horizon,
        options.num_steps,
    )
    return pg.PolicyGuidedSampler(
        denoiser.to(device),
        pg.GaussianPolicy(OBSERVATION_DIM, ACTION_DIM, options.policy_dim).to(device),
        pg.NoiseSchedule.cosine(options.num_steps),
        normalizer.to(device),
        engine=options.engine,
        dtype=options.dtype,
    )


def run(options: argparse.Namespace) -> None:
    """Warm up, sample inside the capture range, report."""
    if options.torch_profiler:
        profiling.check_trace_path(options.torch_profiler)
    sampler = build(options)
    s0 = torch.randn(options.batch, OBSERVATION_DIM, device=options.device)
    for _ in range(options.warmup):
        sampler.sample(s0)
    profiled = options.torch_profiler is not None or options.kernel_times
    with profiling.capture(torch_profiler=profiled) as profiler:
        start = time.perf_counter()
        for _ in range(options.samples):
            sampler.sample(s0)
        if s0.is_cuda:
            torch.cuda.synchronize()
        milliseconds = 1e3 * (time.perf_counter() - start) / options.samples
    print(
        f"engine {sampler.engine}, dtype {options.dtype}, {s0.device}, {options.denoiser}, "
        f"B={options.batch} H={options.horizon} K={options.num_steps}: {milliseconds:.2f} ms per "
        f"sample over {options.samples}, profilers slow it down"
    )
    if profiler is not None:
        print(profiling.range_table(profiler))
    if options.kernel_times:
        print(profiling.kernel_table(profiler))
    if options.torch_profiler:
        profiling.write_trace(profiler, options.torch_profiler)
        print(f"trace in {options.torch_profiler}: open it in https://ui.perfetto.dev")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = parse(arguments)
    try:
        run(options)
    except (InputError, OSError) as error:
        fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
