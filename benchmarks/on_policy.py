"""Are imagined actions the policy's? The released, the paper's and the exact action update beside
each other, at policy standard deviations from 1.0 to 0.02.

    python benchmarks/on_policy.py --env-id Hopper-v5 HalfCheetah-v5 Walker2d-v5 --seeds 0 1 2

Of each environment and seed a policy is trained for a moment in an autoregressive world model, so
that its means depend on the state; then denoisers are trained on its replay for `--seconds`. The
guidance scale is tuned anew for every standard deviation. A row is stored as soon as it is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from world_models import EXACT, RELEASED, starts_of, train, trajectory_diffusion

from harness.rows import Row, RowFile, provenance
from polygrad_fast.agent import PolyGRAD
from polygrad_fast.config import (
    SamplerConfig,
    TrainConfig,
)
from polygrad_fast.diagnostics.actions import action_report
from polygrad_fast.diagnostics.guidance import tune_guidance
from polygrad_fast.errors import InputError
from polygrad_fast.world_models.build import build_world_model

RESULTS = Path(__file__).parent / "results" / "on_policy.jsonl"
SIGMAS = (1.0, 0.3, 0.1, 0.05, 0.02)
UPDATES = {
    "released": RELEASED,
    "paper": SamplerConfig.paper(prediction_type="sample", denoiser_actions="clipped"),
    "exact": EXACT,
}


def make_agent(env_id: str, seed: int, total_timesteps: int) -> PolyGRAD:
    """Return an agent with a policy that has learnt for a moment."""
    config = TrainConfig.from_preset("laptop")
    config = replace(
        config,
        world_model="autoregressive",
        learning_starts=min(config.learning_starts, total_timesteps // 2),
        eval_interval=10**9,
        eval_episodes=1,
    )
    agent = PolyGRAD(env_id, "laptop", seed, "cpu", config)
    return agent.learn(total_timesteps)


def measure(options: argparse.Namespace, file: RowFile, command: str) -> None:
    """Measure every case and store its row."""
    facts = provenance(torch.device("cpu"), command)
    for env_id, seed in itertools.product(options.env_id, options.seeds):
        agent = make_agent(env_id, seed, options.steps)
        bounds = (agent.action_scaler.low, agent.action_scaler.high)
        generator = torch.Generator().manual_seed(seed)
        starts = agent.replay.sample_initial_observations(options.num, generator)
        for update, sampler in UPDATES.items():
            config = trajectory_diffusion(agent.config, sampler, guidance_rate=0.1)
            torch.manual_seed(seed)
            world_model = build_world_model(config, agent.normalizer, bounds, torch.device("cpu"))
            train(world_model, agent.replay, config.denoiser.batch_size, options.seconds)
            for sigma in SIGMAS:
                policy = agent.policy.with_std(sigma)
                if sampler.action_update == "score":
                    tune_guidance(world_model, policy, *starts_of(agent), options.tune)
                report = action_report(
                    world_model, agent.policy, agent.normalizer, starts, sigma, seed
                )
                values = report.summary() | {"train_seconds": options.seconds}
                if sampler.action_update == "score":
                    values["guidance_scale"] = world_model.guidance.value.item()
                case = {"env_id": env_id, "update": update, "sigma": sigma, "seed": seed}
                file.add(
                    Row(
                        **dataclasses.asdict(facts),
                        benchmark="on_policy",
                        dtype="float32",
                        case=case,
                        status="ok",
                        values=values,
                        smoke=options.smoke,
                    )
                )
                shown = {name: round(values[name], 4) for name in ("std", "ks", "ks_floor", "r2")}
                print(case, shown, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure the environments and seeds of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-id", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000, help="of the environment (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training (%(default)s)")
    parser.add_argument("--num", type=int, default=2048, help="trajectories (%(default)s)")
    parser.add_argument("--tune", type=int, default=40, help="samples of guidance (%(default)s)")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the mechanics")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.seconds, options.num, options.tune = 60, 0.05, 32, 2
    torch.set_num_threads(1)
    command = shlex.join(["python", "benchmarks/on_policy.py", *arguments])
    try:
        for env_id in options.env_id:
            PolyGRAD(env_id, "laptop", device="cpu")  # refused now or never
        measure(options, RowFile(options.rows), command)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
