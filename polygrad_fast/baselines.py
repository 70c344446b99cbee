"""Model-free baselines of Stable-Baselines3, which is not a dependency, measured like a run."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from polygrad_fast.arguments import as_integer
from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.environments import EvaluationEnvironments, build_environment
from polygrad_fast.evaluation.evaluator import Evaluator
from polygrad_fast.evaluation.returns import EpisodeStatistics
from polygrad_fast.runs.directory import locked, refuse_another_run
from polygrad_fast.runs.files import replacing, write_json_atomic
from polygrad_fast.runs.metrics import MetricsLog
from polygrad_fast.runs.versions import versions

ALGORITHMS = {
    "a2c": ("stable_baselines3", "A2C"),
    "ppo": ("stable_baselines3", "PPO"),
    "sac": ("stable_baselines3", "SAC"),
    "td3": ("stable_baselines3", "TD3"),
    "trpo": ("sb3_contrib", "TRPO"),
}
"""Name -> package and class."""


def train_baseline(
    algorithm: str,
    env_id: str,
    run_dir: Path,
    total_timesteps: int,
    seed: int = 0,
    eval_interval: int = 5000,
    eval_episodes: int = 10,
    progress_bar: bool = False,
) -> EpisodeStatistics:
    """Train an algorithm with its package's default settings on one environment, and evaluate it as
    a run of this library is evaluated.

    The run directory gets config.json, versions.json, metrics.csv with the columns of this
    library's evaluations, and the models best.zip and last.zip, which Stable-Baselines3 loads.
    A run that was interrupted is not resumed.

    Args:
        algorithm: one of `ALGORITHMS`.
        env_id: gymnasium environment with Box observations and actions.
        run_dir: a directory without a run.
        total_timesteps: environment steps, at least 1.
        seed: of the algorithm, of its environment and of the evaluations' episodes.
        eval_interval: environment steps between two evaluations of the policy's mean.
        eval_episodes: of each.
        progress_bar: show one.

    Returns:
        The last evaluation.

    Raises:
        InputError: an unknown algorithm, its package is not installed, an environment that cannot
            be made or used, a number out of range, or the directory holds a run.
    """
    make = _algorithm(algorithm)
    total_timesteps = as_integer(total_timesteps, "total_timesteps", 1)
    seed = as_integer(seed, "seed", 0, below=2**32)
    eval_interval = as_integer(eval_interval, "eval_interval", 1)
    eval_episodes = as_integer(eval_episodes, "eval_episodes", 1)
    environment = build_environment(env_id)
    environments = EvaluationEnvironments(environment, env_id)
    try:
        model = make("MlpPolicy", environment, seed=seed, device="cpu")
    except AssertionError as error:  # how it refuses spaces
        raise InputError(f"{env_id} cannot be learnt by {algorithm}: {error}") from error

    def act(observations: np.ndarray, deterministic: bool) -> np.ndarray:
        return model.predict(observations, deterministic=deterministic)[0]

    evaluator = Evaluator(act, environments, seed)
    package = ALGORITHMS[algorithm][0]
    identity = {
        "baseline": algorithm,
        "package": f"{package} {importlib.import_module(package).__version__}",
        "env_id": env_id,
        "seed": seed,
        "total_timesteps": total_timesteps,
        "eval_interval": eval_interval,
        "eval_episodes": eval_episodes,
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        refuse_another_run(run_dir)
        write_json_atomic(run_dir / "versions.json", versions())
        write_json_atomic(run_dir / "config.json", identity)
        with MetricsLog(run_dir / "metrics.csv") as log, _bar(total_timesteps, progress_bar) as bar:
            evaluations = _Evaluations(model, evaluator, log, run_dir, eval_episodes)
            evaluations.take(0)

            def after_step(local: dict[str, Any], _: dict[str, Any]) -> bool:
                step = model.num_timesteps
                bar.update(1)
                if step % eval_interval == 0 or step == total_timesteps:
                    evaluations.take(step)
                return step < total_timesteps

            model.learn(total_timesteps, callback=after_step)
        _save(model, run_dir / "last.zip")
    return evaluations.last


class _Evaluations:
    """Evaluations of a model, written as rows; the best model is kept."""

    def __init__(
        self,
        model: Any,
        evaluator: Evaluator,
        log: MetricsLog,
        run_dir: Path,
        episodes: int,
    ):
        self._model, self._evaluator, self._log, self._run_dir = model, evaluator, log, run_dir
        self._episodes = episodes
        self._since, self._step = time.perf_counter(), 0

    def take(self, step: int) -> None:
        """Evaluate after so many environment steps."""
        seconds = time.perf_counter() - self._since
        self.last = result = self._evaluator.evaluate(self._episodes)
        row = self._evaluator.note(result, lambda: _save(self._model, self._run_dir / "best.zip"))
        episodes = [episode["r"] for episode in self._model.ep_info_buffer or ()]
        if episodes:
            row["train/episode_return"] = float(np.mean(episodes))
        if step:
            row["time/env_steps_per_s"] = (step - self._step) / seconds
        self._log.write(step, row)
        self._since, self._step = time.perf_counter(), step


def _algorithm(name: str) -> Any:
    if name not in ALGORITHMS:
        raise InputError(f"algo must be one of {list(ALGORITHMS)}, got {name!r}")
    package, kind = ALGORITHMS[name]
    try:
        return getattr(importlib.import_module(package), kind)
    except ImportError:
        raise InputError(
            f"{name} needs the package {package}: pip install 'polygrad-fast[baselines]'"
        ) from None


def _save(model: Any, path: Path) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        model.save(file)


def _bar(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not enabled, unit="step", dynamic_ncols=True)
