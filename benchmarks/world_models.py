"""Judge world models by the policy gradient they give: train each for the same processor time on
one run's replay, and compare what it imagines with the simulator.

    python benchmarks/world_models.py runs/hopper --seconds 75

Every case gets the policy, critic, normalizer and replay of the run's last checkpoint, and a fresh
network. A row is stored as soon as a case is done, in place of one of the same case and machine.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harness.rows import Row, RowFile, provenance
from polygrad_fast.agent import PolyGRAD
from polygrad_fast.config import (
    DenoiserConfig,
    GuidanceConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainConfig,
)
from polygrad_fast.data.replay import ReplayBuffer
from polygrad_fast.diagnostics.gradient import policy_gradient_report
from polygrad_fast.diagnostics.guidance import tune_guidance
from polygrad_fast.diagnostics.timing import seconds_per_1000
from polygrad_fast.errors import InputError
from polygrad_fast.world_models import WorldModel
from polygrad_fast.world_models.build import STEPWISE, build_world_model

RESULTS = Path(__file__).parent / "results" / "world_models.jsonl"
TIMED_BATCH = 256
SHOWN = ("cosine", "cosine_ceiling", "newest_lambda_0/cosine", "r2", "seconds_per_1000")


RESIDUAL_MLP = DenoiserConfig(
    hidden_dim=256, num_layers=3, learning_rate=1e-3, ema_decay=0.95, ema_start=0
)
RELEASED = SamplerConfig.official(denoiser_actions="clipped")
EXACT = replace(RELEASED, action_update="exact", clip_state_change=None)


def trajectory_diffusion(
    config: TrainConfig,
    sampler: SamplerConfig,
    denoiser: DenoiserConfig = RESIDUAL_MLP,
    num_steps: int = 16,
    guidance_rate: float = 0.03,
) -> TrainConfig:
    """Return the options of trajectory diffusion in K steps, its guidance scale tuned at a rate."""
    return replace(
        config,
        world_model="trajectory_diffusion",
        schedule=ScheduleConfig(num_train_timesteps=num_steps, tau=1.0),
        sampler=sampler,
        denoiser=denoiser,
        guidance=GuidanceConfig(initial=0.05, learning_rate=guidance_rate),
    )


def cases(config: TrainConfig) -> dict[str, tuple[TrainConfig, tuple[int, ...]]]:
    """Return by name what is trained, and the numbers of diffusion steps it imagines in."""
    rollout = replace(RESIDUAL_MLP, kind="rollout", batch_size=32)
    unscaled = replace(EXACT, scale_actions=False)

    def of(sampler: SamplerConfig, denoiser: DenoiserConfig, num_steps: int) -> TrainConfig:
        return trajectory_diffusion(config, sampler, denoiser, num_steps)

    few, many = (16, 8, 4), (128, 64, 32, 16, 8)
    least = config.horizon + 1  # after which a rollout has settled
    settled = tuple(steps for steps in (128, 64, 32, 16) if steps > config.horizon) or (least,)
    return {
        "residual MLP, released update": (of(RELEASED, RESIDUAL_MLP, 16), (16,)),
        "residual MLP, exact": (of(EXACT, RESIDUAL_MLP, 16), few),
        "residual MLP, exact, K = 128": (of(EXACT, RESIDUAL_MLP, 128), many),
        "rollout, exact": (of(unscaled, rollout, least), (least,)),
        "rollout, exact, K = 128": (of(unscaled, rollout, max(128, least)), settled),
    } | {name.replace("_", " "): (replace(config, world_model=name), (0,)) for name in STEPWISE}


def train(
    world_model: WorldModel, replay: ReplayBuffer, batch_size: int, seconds: float, seed: int = 0
) -> int:
    """Train for so many processor seconds; return the number of updates."""
    generator = torch.Generator().manual_seed(seed)
    updates, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        windows = replay.sample(batch_size, generator)
        world_model.update(windows, generator)
        updates += 1
    return updates


def starts_of(agent: PolyGRAD) -> tuple[Callable[[torch.Generator], Tensor], torch.Generator]:
    """Return how `tune_guidance` draws starts of a run's replay, and a new stream for it."""

    def draw(generator: torch.Generator) -> Tensor:
        return agent.replay.sample_initial_observations(TIMED_BATCH, generator)

    return draw, torch.Generator().manual_seed(1)


def judge(world_model: WorldModel, agent: PolyGRAD, num: int) -> dict[str, float]:
    """Return what the gradient tool says of a world model, and its cost; all gradients by the score
    function, as pathwise ones are not there for all."""
    learner = copy.copy(agent.training.learner)
    learner.config = replace(learner.config, gradient_estimator="score")
    report = policy_gradient_report(
        agent.make_evaluation_environment(),
        world_model,
        learner,
        agent.replay,
        agent.action_scaler,
        num=num,
    )
    starts = agent.replay.sample_initial_observations(TIMED_BATCH)
    seconds = seconds_per_1000(world_model, agent.policy, starts)
    known = {name: value for name, value in report.summary().items() if value is not None}
    return known | {"seconds_per_1000": seconds}


def measure(agent: PolyGRAD, options: argparse.Namespace, file: RowFile, command: str) -> None:
    """Train and judge every case, and store its rows."""
    bounds = (agent.action_scaler.low, agent.action_scaler.high)
    facts = provenance(torch.device("cpu"), command)
    every = cases(agent.config)
    for name in options.only:
        if name not in every:
            raise InputError(f"--only must be of {list(every)}, got {name!r}")
    for name, (config, numbers_of_steps) in every.items():
        if options.only and name not in options.only:
            continue

        def build(config: TrainConfig) -> WorldModel:
            torch.manual_seed(0)
            return build_world_model(config, agent.normalizer, bounds, torch.device("cpu"))

        trained = build(config)
        batch_size = config.world_model_training.batch_size
        updates = train(trained, agent.replay, batch_size, options.seconds)
        if config.sampler.action_update == "score":
            tune_guidance(trained, agent.policy, *starts_of(agent), options.tune)
        for steps in numbers_of_steps:
            world_model = trained
            if steps:
                world_model = build(
                    replace(config, sampler=replace(config.sampler, num_inference_steps=steps))
                )
                for part, module in world_model.modules().items():
                    module.load_state_dict(trained.modules()[part].state_dict())
                world_model.load_state_dict(trained.state_dict())
            values = judge(world_model, agent, options.num)
            row = Row(
                **dataclasses.asdict(facts),
                benchmark="world_models",
                dtype="float32",
                case={
                    "env_id": agent.env_id,
                    "env_steps": agent.num_timesteps,
                    "world_model": name,
                    "steps": steps,
                },
                status="ok",
                values=values | {"updates": updates, "train_seconds": options.seconds},
                smoke=options.smoke,
            )
            file.add(row)
            shown = {key: round(values[key], 3) for key in SHOWN}
            print(f"{name}, {steps} steps, {updates} updates: {shown}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Judge the world models of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", default="last", help="last, or a folder in checkpoints/")
    parser.add_argument("--seconds", type=float, default=75.0, help="of training (%(default)s)")
    parser.add_argument("--num", type=int, default=4096, help="trajectories (%(default)s)")
    parser.add_argument("--tune", type=int, default=200, help="samples of guidance (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], help="names of cases")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the mechanics")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seconds, options.num, options.tune = 0.05, 64, 2
    torch.set_num_threads(1)
    command = shlex.join(["python", "benchmarks/world_models.py", *arguments])
    path = options.run_dir
    if options.checkpoint != "last":
        path = path / "checkpoints" / options.checkpoint
    try:
        agent = PolyGRAD.load(path, device="cpu")
        file = RowFile(options.rows)
        measure(agent, options, file, command)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
