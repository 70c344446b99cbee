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

import torch

import polygrad_fast as pg
from harness import profiled
from polygrad_fast.config import PRESETS


def make_parser() -> profiled.Parser:
    """Return the command line's options."""
    parser = profiled.Parser(__file__, "Train")
    parser.add_argument("--env-id", default="Walker2d-v5", help="%(default)s, which needs MuJoCo")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="quick is for a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="imagined trajectories; default: the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill", type=int, default=1000, help="random steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="policy updates before (%(default)s)")
    parser.add_argument("--updates", type=int, default=3, help="those recorded (%(default)s)")
    return parser


def build(options: argparse.Namespace) -> pg.PolyGRAD:
    """Return an agent whose updates begin right after the prefill."""
    config = pg.TrainConfig.from_preset(options.preset)
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
    agent = build(options)
    agent.environment.reset()

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            agent.step()

    def steps_for(policy_updates: int) -> int:
        return math.ceil(policy_updates / agent.config.policy_updates_per_env_step)

    train(options.prefill + steps_for(options.warmup))
    num_steps = steps_for(options.updates)
    profiled.record(
        options,
        lambda: train(num_steps),
        lambda milliseconds: (
            f"{options.env_id}, preset {options.preset}, engine {agent.sampler.engine}, dtype "
            f"{options.dtype}, {agent.device}: {milliseconds / options.updates:.2f} ms per policy "
            f"update with {num_steps / options.updates:g} environment steps and their denoiser "
            f"updates, over {options.updates}"
        ),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return make_parser().run(arguments, ("batch", "prefill", "updates"), run)


if __name__ == "__main__":
    sys.exit(main())
