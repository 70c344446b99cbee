"""Where does trajectory diffusion win? Worlds with chance in them, or with observations that hide
something: what each world model imagines against what happens, each trained as long.

    python benchmarks/chance.py --seeds 0 1 2

Three worlds (`harness/chance_tasks.py`): a linear-Gaussian system whose mean and covariance are
known, HalfCheetah-v5 with noise on its actions, and HalfCheetah-v5 without its velocities. Data and
truth are the same for all seeds, which are those of weights, updates and imagination. A row is
stored as soon as it is there; costs are measured with the first seed.
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
from torch import Tensor
from world_models import EXACT, RESIDUAL_MLP, train, trajectory_diffusion

from harness.chance_tables import BATCHES, HORIZONS
from harness.chance_tasks import TASKS, Sizes, Task, floor, score
from harness.rows import Row, RowFile, provenance
from polygrad_fast.config import TrainConfig
from polygrad_fast.diagnostics.timing import seconds_per_1000
from polygrad_fast.errors import InputError
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.world_models import WorldModel
from polygrad_fast.world_models.build import build_world_model

RESULTS = Path(__file__).parent / "results" / "chance.jsonl"
WIDE = replace(RESIDUAL_MLP, hidden_dim=512)
IMAGINED_AT_A_TIME = 512
ONE_STEP, ROLLOUT = "one-step network", "trajectory diffusion, rollout"


def configurations() -> dict[str, TrainConfig]:
    """Return by name what is trained. Windows hold the start and the steps up to a horizon: the
    shorter one for what imagines step by step, as far as it is asked to."""
    laptop = TrainConfig.from_preset("laptop")
    short, long = (
        replace(trajectory_diffusion(laptop, EXACT, WIDE, num_steps=32), horizon=h + 1)
        for h in HORIZONS
    )
    rollout = replace(RESIDUAL_MLP, kind="rollout", batch_size=32, process_noise=True)
    noisy = replace(short.autoregressive, process_noise=True)
    unscaled = replace(EXACT, scale_actions=False)
    return {
        ONE_STEP: replace(short, world_model="autoregressive", autoregressive=noisy),
        "ensemble": replace(short, world_model="ensemble"),
        ROLLOUT: trajectory_diffusion(long, unscaled, rollout, 64),
        "trajectory diffusion, 51 steps": long,
        "trajectory diffusion, 11 steps": short,
    }


def _horizon(world_model: WorldModel) -> int:
    return world_model.longest_horizon or max(HORIZONS) + 1


def imagine(world_model: WorldModel, task: Task, seed: int) -> Tensor:
    """Return imagined observations [M N, H, S], the trajectories of a start together."""
    generator = torch.Generator().manual_seed(seed)
    starts = task.starts.repeat_interleave(task.draws, dim=0)
    parts = [
        world_model.imagine(
            part, task.policy, generator, horizon=_horizon(world_model)
        ).observations
        for part in starts.split(IMAGINED_AT_A_TIME)
    ]
    return torch.cat(parts)


def measure(options: argparse.Namespace, file: RowFile, command: str) -> None:
    """Measure every case and store its row."""
    facts = provenance(torch.device("cpu"), command)
    sizes = Sizes(*options.sizes)

    def store(case: dict, values: dict[str, float]) -> None:
        row = Row(
            **dataclasses.asdict(facts),
            benchmark="chance",
            dtype="float32",
            case=case,
            status="ok",
            values=values,
            smoke=options.smoke,
        )
        file.add(row)
        print(case, {name: round(value, 3) for name, value in values.items()}, flush=True)

    tasks = {name: TASKS[name](sizes) for name in options.only}
    for name, task in tasks.items():
        found = floor(task, task.normalizer().observations_scale)
        store({"task": name, "model": "truth again", "seed": 0}, found)
    for seed, (name, task) in itertools.product(options.seeds, tasks.items()):
        normalizer = task.normalizer()
        scale = normalizer.observations_scale
        for model, config in configurations().items():
            if model == ROLLOUT and not isinstance(task.policy, GaussianPolicy):
                continue  # settled at once with policies of the library only, else too slow
            torch.manual_seed(seed)
            bounds = tuple(torch.as_tensor(bound) for bound in task.bounds)
            world_model = build_world_model(config, normalizer, bounds, torch.device("cpu"))
            replay, batch_size = task.replay(config.horizon), config.world_model_training.batch_size
            updates = train(world_model, replay, batch_size, options.seconds, seed)
            trained = {"updates": updates, "train_seconds": options.seconds}
            case = {"task": name, "model": model, "seed": seed}
            values = score(task, imagine(world_model, task, seed), scale) | trained
            for batch in BATCHES if seed == options.seeds[0] else ():
                starts = replay.sample_initial_observations(8 if options.smoke else batch)
                horizon, calls = _horizon(world_model), options.calls
                cost = seconds_per_1000(
                    world_model, task.policy, starts, horizon=horizon, calls=calls
                )
                values[f"seconds_per_1000_{batch}"] = cost
            store(case, values)
            if model == ONE_STEP:
                world_model.trainer.ema_model.residual_squares.zero_()
                without = values | score(task, imagine(world_model, task, seed), scale)
                store(case | {"model": f"{model}, without chance"}, without)


def main(arguments: list[str] | None = None) -> int:
    """Measure the worlds and seeds of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="of training (%(default)s)")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the mechanics")
    options = parser.parse_args(arguments)
    options.sizes, options.calls = dataclasses.astuple(Sizes()), 2
    if options.smoke:
        options.seconds, options.sizes, options.calls = 0.05, (800, 4, 4), 1
    torch.set_num_threads(1)
    command = shlex.join(["python", "benchmarks/chance.py", *arguments])
    try:
        measure(options, RowFile(options.rows), command)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
