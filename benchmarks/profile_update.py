"""Train for a profiler, or under torch.profiler; see PROFILING.md.

    nsys profile --capture-range=cudaProfilerApi ... python benchmarks/profile_update.py
    python benchmarks/profile_update.py --preset quick --torch-profiler trace.json

Fills the replay buffer by random actions, then runs the agent's own training step (Algorithm 3:
environment steps, denoiser updates, imagination, A2C) for --warmup and, inside the capture range,
for --updates policy updates.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import torch

import polygrad_fast as pg
from polygrad_fast import profiling
from polygrad_fast.agent import _Speed
from polygrad_fast.config import PRESETS
from polygrad_fast.errors import InputError
from polygrad_fast.sampling.sampler import ENGINES

DTYPES = ("auto", "float16", "bfloat16", "tf32", "float32")


def fail(message: str) -> None:
    """Report bad input in one line and leave with exit code 2."""
    print(f"profile_update.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train for a profiler, or under torch.profiler; see benchmarks/PROFILING.md."
    )
    parser.error = fail
    parser.add_argument("--env-id", default="Walker2d-v5", help="%(default)s, which needs MuJoCo")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="quick is for a CPU")
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="imagined trajectories; default: the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill", type=int, default=1000, help="random steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="policy updates before (%(default)s)")
    parser.add_argument("--updates", type=int, default=3, help="those recorded (%(default)s)")
    parser.add_argument(
        "--torch-profiler", type=Path, metavar="OUT.json", help="write a Chrome trace (or .json.gz)"
    )
    parser.add_argument(
        "--kernel-times", action="store_true", help="run torch.profiler and print its table"
    )
    options = parser.parse_args(arguments)
    for name in ("batch", "prefill", "updates"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.warmup < 0:
        fail(f"--warmup must be at least 0, got {options.warmup}")
    return options


def build(options: argparse.Namespace) -> pg.PolyGRAD:
    """Return an agent whose updates begin right after the prefill."""
    config = pg.TrainConfig.from_preset(options.preset, options.env_id)
    config = dataclasses.replace(
        config,
        learning_starts=options.prefill,
        policy_delay_steps=0,
        imagined_batch_size=options.batch or config.imagined_batch_size,
        denoiser=dataclasses.replace(config.denoiser, pretrain_updates=0),
        engine=options.engine,
        dtype=options.dtype,
    )
    agent = pg.PolyGRAD(options.env_id, options.preset, options.seed, options.device, config)
    if config.cpu_threads is not None and agent.device.type == "cpu":
        torch.set_num_threads(config.cpu_threads)
    return agent


def run(options: argparse.Namespace) -> None:
    """Fill the buffer, warm up, train inside the capture range, report."""
    if options.torch_profiler:
        profiling.check_trace_path(options.torch_profiler)
    agent = build(options)
    speed = _Speed(0)
    agent.environment.reset()

    def steps_for(policy_updates: int) -> int:
        return math.ceil(policy_updates / agent.config.policy_updates_per_env_step)

    for _ in range(options.prefill + steps_for(options.warmup)):
        agent._step(speed)
    profiled = options.torch_profiler is not None or options.kernel_times
    num_steps = steps_for(options.updates)
    with profiling.capture(torch_profiler=profiled) as profiler:
        start = time.perf_counter()
        for _ in range(num_steps):
            agent._step(speed)
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        milliseconds = 1e3 * (time.perf_counter() - start)
    print(
        f"{options.env_id}, preset {options.preset}, engine {agent.sampler.engine}, dtype "
        f"{options.dtype}, {agent.device}: {milliseconds / options.updates:.2f} ms per policy "
        f"update with {num_steps / options.updates:g} environment steps and their denoiser "
        f"updates, over {options.updates}; profilers slow it down"
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
