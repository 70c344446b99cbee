"""Sample for a profiler, or under torch.profiler; see PROFILING.md.

    nsys profile --capture-range=cudaProfilerApi ... python benchmarks/profile_sampler.py
    python benchmarks/profile_sampler.py --torch-profiler trace.json

Samples --warmup times, which compiles and captures, then --samples times inside the capture range
and prints the time. Sizes default to the paper's on Walker2d, with random weights.
"""

from __future__ import annotations

import argparse
import sys

import torch

import polygrad_fast as pg
from harness import profiled, sampler_case
from polygrad_fast.errors import InputError

DENOISERS = ("residual_mlp", "transformer")
SIZES = ("batch", "horizon", "num_steps", "hidden_dim", "policy_dim", "samples")


def make_parser() -> profiled.Parser:
    """Return the command line's options."""
    parser = profiled.Parser(__file__, "Sample")
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
    return parser


def build(options: argparse.Namespace) -> pg.PolicyGuidedSampler:
    """Return a sampler with random weights and moments, the same at every call."""
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {options.device!r} cannot be used: {reason}") from error
    sizes = sampler_case.Sizes(
        num_steps=options.num_steps, hidden_dim=options.hidden_dim, policy_dim=options.policy_dim
    )
    c = sampler_case.build(sizes, options.horizon, device, options.denoiser)
    modules = c.denoiser, c.policy, c.schedule, c.normalizer
    return pg.PolicyGuidedSampler(*modules, c.config, engine=options.engine, dtype=options.dtype)


def run(options: argparse.Namespace) -> None:
    """Warm up, sample inside the capture range, report."""
    sampler = build(options)
    s0 = torch.randn(options.batch, sampler_case.OBSERVATION_DIM, device=options.device)

    def sample(times: int) -> None:
        for _ in range(times):
            sampler.sample(s0)

    sample(options.warmup)
    profiled.record(
        options,
        lambda: sample(options.samples),
        lambda milliseconds: (
            f"engine {sampler.engine}, dtype {options.dtype}, {s0.device}, {options.denoiser}, "
            f"B={options.batch} H={options.horizon} K={options.num_steps}: "
            f"{milliseconds / options.samples:.2f} ms per sample over {options.samples}"
        ),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return make_parser().run(arguments, SIZES, run)


if __name__ == "__main__":
    sys.exit(main())
