"""Model-free baselines of Stable-Baselines3, which is not a dependency, measured like a run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from polygrad_fast.arguments import as_integer
from polygrad_fast.errors import CheckpointError, InputError
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
ON_POLICY = ("a2c", "ppo", "trpo")
"""Those that may train on normalized observations and rewards."""


def train_baseline(
    algorithm: str,
    env_id: str,
    run_dir: Path,
    total_timesteps: int,
    seed: int = 0,
    eval_interval: int = 5000,
    eval_episodes: int = 10,
    progress_bar: bool = False,
    num_envs: int = 1,
    normalize: bool = False,
    hyperparameters: Mapping[str, Any] | None = None,
) -> EpisodeStatistics:
    """Train an algorithm, by default with its package's settings on one environment, and evaluate
    it as a run of this library is evaluated.

    The run directory gets config.json, versions.json, metrics.csv with the columns of this
    library's evaluations, and the models best.zip and last.zip, which Stable-Baselines3 loads and
    which read observations as they are. A run that was interrupted is not resumed.

    Args:
        algorithm: one of `ALGORITHMS`.
        env_id: gymnasium environment with Box observations and actions.
        run_dir: a directory without a run.
        total_timesteps: environment steps, at least 1.
        seed: of the algorithm, of its environment and of the evaluations' episodes.
        eval_interval: environment steps between two evaluations of the policy's mean.
        eval_episodes: of each.
        progress_bar: show one.
        num_envs: environments that are stepped side by side, at least 1. An evaluation takes place
            at the first step of all of them that reaches its number.
        normalize: train on observations and rewards over running moments (VecNormalize), of
            `ON_POLICY` algorithms. Models are saved with the moments folded into their first
            layers, so without the clipping of normalized observations at 10.
        hyperparameters: of the algorithm's constructor, beside policy, environment, seed, device.

    Returns:
        The last evaluation.

    Raises:
        InputError: an unknown algorithm, its package is not installed, an environment that cannot
            be made or used, a number out of range, hyperparameters that the algorithm refuses,
            `normalize` with another algorithm, or the directory holds a run.
    """
    make = find_algorithm(algorithm)
    total_timesteps = as_integer(total_timesteps, "total_timesteps", 1)
    seed = as_integer(seed, "seed", 0, below=2**32)
    eval_interval = as_integer(eval_interval, "eval_interval", 1)
    eval_episodes = as_integer(eval_episodes, "eval_episodes", 1)
    num_envs = as_integer(num_envs, "num_envs", 1)
    if normalize and algorithm not in ON_POLICY:
        raise InputError(f"normalize must be left out with {algorithm}: only {list(ON_POLICY)}")
    options = dict(hyperparameters or {})
    _check_numbers(make, options)
    built = [build_environment(env_id) for _ in range(num_envs)]
    environments = EvaluationEnvironments(built[0], env_id)
    stepped = _vectorized(built, normalize, options)
    try:
        model = make("MlpPolicy", stepped, seed=seed, device="cpu", **options)
        if normalize:
            with _reading_raw_observations(model):  # whether the networks have layers to fold into
                pass
    except AssertionError as error:  # how it refuses spaces, and some hyperparameters
        given = f" with hyperparameters {options}" if options else ""
        raise InputError(f"{env_id} cannot be learnt by {algorithm}{given}: {error}") from error
    except (AttributeError, IndexError) as error:
        raise InputError(
            f"normalize needs networks with a hidden layer, got hyperparameters {options}"
        ) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{algorithm} refuses hyperparameters {options}: {error}") from error

    def act(observations: np.ndarray, deterministic: bool) -> np.ndarray:
        if normalize:
            observations = stepped.normalize_obs(observations)
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
        "num_envs": num_envs,
        "normalize": normalize,
        "hyperparameters": options,
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
                bar.update(num_envs)
                if step % eval_interval < num_envs or step >= total_timesteps:
                    evaluations.take(step)
                return step < total_timesteps

            # it would leave an empty directory for logs among the temporary files
            logger = importlib.import_module("stable_baselines3.common.logger")
            model.set_logger(logger.Logger(folder=None, output_formats=[]))
            model.learn(total_timesteps, callback=after_step)
        _save(model, run_dir / "last.zip")
    return evaluations.last


def _check_numbers(make: Any, options: Mapping[str, Any]) -> None:
    """Raise InputError unless hyperparameters whose defaults are numbers are numbers."""
    parameters = inspect.signature(make).parameters
    for name, value in options.items():
        default = parameters[name].default if name in parameters else None
        numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
        if numeric and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InputError(f"hyperparameter {name} must be a number as {default}, got {value!r}")


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


def read_baseline_config(run_dir: Path) -> dict[str, Any]:
    """Return the config.json that `train_baseline` wrote.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = run_dir / "config.json"
    try:
        stored = json.loads(path.read_text())
        stored["baseline"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from None
    return stored


def find_algorithm(name: str) -> Any:
    """Return the class of an algorithm.

    Raises:
        InputError: an unknown one, or its package is not installed.
    """
    if name not in ALGORITHMS:
        raise InputError(f"algo must be one of {list(ALGORITHMS)}, got {name!r}")
    package, kind = ALGORITHMS[name]
    try:
        return getattr(importlib.import_module(package), kind)
    except ImportError:
        raise InputError(
            f"{name} needs the package {package}: pip install 'polygrad-fast[baselines]'"
        ) from None


def _vectorized(built: list[gymnasium.Env], normalize: bool, options: Mapping[str, Any]) -> Any:
    """Return environments as Stable-Baselines3 wraps one, stepped side by side."""
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    stepped = DummyVecEnv([functools.partial(Monitor, environment) for environment in built])
    if not normalize:
        return stepped
    gamma = options.get("gamma", 0.99)  # the default of all three
    return VecNormalize(stepped, gamma=gamma)


def load_model(algorithm: str, path: Path) -> Any:
    """Return a model that a baseline saved; loading runs code that the file holds.

    Raises:
        InputError: an unknown algorithm, or its package is not installed.
    """
    return find_algorithm(algorithm).load(path, device="cpu")


def _save(model: Any, path: Path) -> None:
    with _reading_raw_observations(model), replacing(path) as temporary:
        with open(temporary, "wb") as file:
            model.save(file)


@contextlib.contextmanager
def _reading_raw_observations(model: Any) -> Iterator[None]:
    """Fold the moments of normalized observations into the layers that read them: with
    z = (o - m) / s, W z + b = (W / s) o + (b - (W / s) m)."""
    normalizer = model.get_vec_normalize_env()
    if normalizer is None:
        yield
        return
    moments = normalizer.obs_rms
    mean = torch.as_tensor(moments.mean, dtype=torch.float64)
    std = torch.as_tensor(moments.var, dtype=torch.float64).add(normalizer.epsilon).sqrt()
    extractor = model.policy.mlp_extractor
    layers = [extractor.policy_net[0], extractor.value_net[0]]
    kept = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
    try:
        with torch.no_grad():
            for layer, (weight, bias) in zip(layers, kept, strict=True):
                scaled = weight.double() / std
                layer.weight.copy_(scaled)
                layer.bias.copy_(bias.double() - scaled @ mean)
        yield
    finally:
        with torch.no_grad():
            for layer, (weight, bias) in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)


def _bar(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not enabled, unit="step", dynamic_ncols=True)
