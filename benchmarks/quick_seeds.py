"""Train a preset on several seeds and store what its policies score on episodes of their own.

    python benchmarks/quick_seeds.py --env-id Pendulum-v1 Hopper-v5 --seeds 100 101 102 --jobs 2

With `--model-free sac` that algorithm of Stable-Baselines3, with its own settings, learns in the
environment itself, for as many of its steps as the preset has or `--total-timesteps` says. Of each
seed the untrained policy, the best checkpoint and the last one play the same fresh episodes, whose
seed follows from environment, preset and training seed: two rows share episodes only where they
differ in the world model alone, and none are those of the evaluations that chose the best
checkpoint. Every seed is a process with one thread. A row is written to
benchmarks/results/quick_seeds.jsonl as soon as its seed is done, in place of one of the same case
and machine; after an interruption `--resume` measures the rest.
`python benchmarks/report.py` makes the tables.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
import typing
from pathlib import Path

import numpy as np
import torch

from harness.rows import Provenance, Row, RowFile, provenance
from polygrad_fast.agent import PolyGRAD
from polygrad_fast.baselines import ALGORITHMS, find_algorithm, load_model, train_baseline
from polygrad_fast.config import PRESETS, TrainConfig
from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.environments import EvaluationEnvironments, build_environment
from polygrad_fast.evaluation.evaluator import Evaluator
from polygrad_fast.runs.metrics import read_metrics

WORLD_MODELS = typing.get_args(typing.get_type_hints(TrainConfig)["world_model"])
RESULTS = Path(__file__).parent / "results" / "quick_seeds.jsonl"
MODEL_FREE = {name: f"none, {name.upper()}" for name in ALGORITHMS}
"""Algorithm -> what a row names as its world model."""
FIRST_EVALUATION_SEED = 2**31
"""Training seeds are below: an agent's own evaluations are seeded by its training seed."""


def evaluation_seed(env_id: str, preset: str, seed: int) -> int:
    """Return the seed of a row's fresh episodes, in [2^31, 2^32); the same for all world models."""
    digest = hashlib.sha256(f"{env_id} {preset} {seed}".encode()).digest()
    return FIRST_EVALUATION_SEED + int.from_bytes(digest[:8], "big") % FIRST_EVALUATION_SEED


def tiny(config: TrainConfig) -> TrainConfig:
    """Return a configuration that only tries the mechanics."""
    return dataclasses.replace(
        config,
        denoiser=dataclasses.replace(config.denoiser, pretrain_updates=2),
        autoregressive=dataclasses.replace(config.autoregressive, pretrain_updates=2),
        total_timesteps=90,
        learning_starts=60,
        imagined_batch_size=8,
        eval_interval=20,
        eval_episodes=2,
        log_interval=10,
    )


@dataclasses.dataclass
class Trained:
    """What a training left behind."""

    evaluators: dict[str, Evaluator]  # of the policies "untrained", "best" and "last"
    train_steps: int
    best_step: int
    train_seconds: float
    metrics: list[dict[str, float]]


def run_seed(
    env_id: str,
    preset: str,
    world_model: str,
    seed: int,
    episodes: int,
    smoke: bool,
    total_timesteps: int | None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Train one seed, for the preset's environment steps or as many as given, and return the row's
    values and its learning curve."""
    torch.set_num_threads(1)
    config = TrainConfig.from_preset(preset)
    config = tiny(config) if smoke else config
    if total_timesteps is not None:
        config = dataclasses.replace(config, total_timesteps=total_timesteps)
    fresh = evaluation_seed(env_id, preset, seed)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        algorithm = next((name for name, shown in MODEL_FREE.items() if shown == world_model), None)
        if algorithm is not None:
            trained = train_model_free(env_id, algorithm, seed, config, run_dir)
        else:
            config = dataclasses.replace(config, world_model=world_model)
            trained = train_in_imagination(env_id, preset, seed, config, run_dir)
    values = {
        "train_steps": trained.train_steps,
        "train_seconds": round(trained.train_seconds, 1),
        "best_step": trained.best_step,
        **selection_cost(trained.metrics, config.eval_episodes),
        "episodes": episodes,
        "evaluation_seed": fresh,
    }
    for name, evaluator in trained.evaluators.items():
        scores = evaluator.evaluate(episodes, fresh)
        values[f"{name}_mean_reward"] = round(scores.mean_reward, 2)
        values[f"{name}_std_reward"] = round(scores.std_reward, 2)
    return values, learning_curve(trained.metrics)


def train_in_imagination(
    env_id: str, preset: str, seed: int, config: TrainConfig, run_dir: Path
) -> Trained:
    """Train an agent of this library."""
    agents = {"untrained": PolyGRAD(env_id, preset, seed, "cpu", config)}
    agent = PolyGRAD(env_id, preset, seed, "cpu", config, run_dir)
    start = time.perf_counter()
    agent.learn(config.total_timesteps)
    seconds = time.perf_counter() - start
    for checkpoint in ("best", "last"):
        agents[checkpoint] = PolyGRAD.load(run_dir, device="cpu", checkpoint=checkpoint)
    return Trained(
        {name: agent.evaluator for name, agent in agents.items()},
        agents["last"].num_timesteps,
        agents["best"].num_timesteps,
        seconds,
        read_metrics(run_dir / "metrics.csv"),
    )


def train_model_free(
    env_id: str, algorithm: str, seed: int, config: TrainConfig, run_dir: Path
) -> Trained:
    """Train a model-free algorithm for as many environment steps as a configuration has."""
    start = time.perf_counter()
    train_baseline(
        algorithm,
        env_id,
        run_dir,
        config.total_timesteps,
        seed,
        config.eval_interval,
        config.eval_episodes,
    )
    seconds = time.perf_counter() - start
    environment = build_environment(env_id)
    models = {
        "untrained": find_algorithm(algorithm)("MlpPolicy", environment, seed=seed, device="cpu")
    }
    for name in ("best", "last"):
        models[name] = load_model(algorithm, run_dir / f"{name}.zip")
    environments = EvaluationEnvironments(environment, env_id)

    def evaluator(model: typing.Any) -> Evaluator:
        def act(observations: np.ndarray, deterministic: bool) -> np.ndarray:
            return model.predict(observations, deterministic=deterministic)[0]

        return Evaluator(act, environments, seed)

    return Trained(
        {name: evaluator(model) for name, model in models.items()},
        models["last"].num_timesteps,
        models["best"].num_timesteps,
        seconds,
        read_metrics(run_dir / "metrics.csv"),
    )


def learning_curve(metrics: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return environment steps and mean returns of the evaluations during training."""
    evaluations = [row for row in metrics if "eval/mean_reward" in row]
    return {
        "env_step": [row["env_step"] for row in evaluations],
        "mean_reward": [round(row["eval/mean_reward"], 2) for row in evaluations],
    }


def selection_cost(metrics: list[dict[str, float]], eval_episodes: int) -> dict[str, int]:
    """Return the number of evaluations during training, which choose the best checkpoint, and the
    environment steps that they took."""
    lengths = [
        row["eval/mean_episode_length"] for row in metrics if "eval/mean_episode_length" in row
    ]
    return {
        "selection_evaluations": len(lengths),
        "selection_steps": round(sum(lengths) * eval_episodes),
    }


def rows_of(options: argparse.Namespace, facts: Provenance) -> list[Row]:
    """Return a row without values for every environment and seed."""
    return [
        Row(
            **dataclasses.asdict(facts),
            benchmark="quick_seeds",
            dtype="float32",
            case={
                "env_id": env_id,
                "preset": options.preset,
                "world_model": options.world_model,
                "seed": seed,
            },
            status="error",
            error="not run",
            smoke=options.smoke,
        )
        for env_id, seed in itertools.product(options.env_id, options.seeds)
    ]


def measure(options: argparse.Namespace, file: RowFile, rows: list[Row]) -> int:
    """Run the rows' seeds, `jobs` at a time, and store each as it ends; return how many failed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the new processes
    failed = 0
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, spawn, max_tasks_per_child=1) as pool:
        running = {
            pool.submit(
                run_seed,
                *row.case.values(),
                options.episodes,
                options.smoke,
                options.total_timesteps,
            ): row
            for row in rows
        }
        try:
            for future in concurrent.futures.as_completed(running):
                row, error = running[future], future.exception()
                if error is None:
                    values, curves = future.result()
                    values["jobs"] = options.jobs
                    row = dataclasses.replace(
                        row, status="ok", error=None, values=values, curves=curves
                    )
                else:
                    failed += 1
                    row = dataclasses.replace(row, error=f"{type(error).__name__}: {error}")
                file.add(row)
                print(row.name, row.error or json.dumps(row.values), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run the environments and seeds given on the command line; 1 if one of them failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-id", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="below 2^31")
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    learns_in = parser.add_mutually_exclusive_group()
    learns_in.add_argument("--world-model", choices=WORLD_MODELS, default=WORLD_MODELS[0])
    learns_in.add_argument("--model-free", choices=list(ALGORITHMS), help="without a world model")
    parser.add_argument("--total-timesteps", type=int, help="environment steps (the preset's)")
    parser.add_argument("--episodes", type=int, default=100, help="fresh ones (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side (%(default)s)")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--resume", action="store_true", help="leave out rows of this commit")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the mechanics")
    options = parser.parse_args(arguments)
    for name in ("episodes", "jobs", "total_timesteps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for seed in options.seeds:
        if not 0 <= seed < FIRST_EVALUATION_SEED:
            parser.error(f"--seeds must be in [0, 2^31), got {seed}")
    torch.set_num_threads(1)  # as the processes that train
    command = shlex.join(["python", "benchmarks/quick_seeds.py", *arguments])
    try:
        for env_id in options.env_id:
            PolyGRAD(env_id, options.preset, device="cpu")  # refused now or never
        if options.model_free:
            find_algorithm(options.model_free)
            options.world_model = MODEL_FREE[options.model_free]
        file = RowFile(options.rows)
    except InputError as error:
        parser.error(str(error))
    rows = rows_of(options, provenance(torch.device("cpu"), command))
    if options.resume:
        rows = [row for row in rows if row.dirty or not file.holds(row)]
    failed = measure(options, file, rows)
    if failed:
        print(f"{failed} of {len(rows)} seeds failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
