"""A demonstration: from nothing to agents on real, unguided and guided data, on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from polygrad_fast.config import DiffuseConfig, OfflineTrainConfig
from polygrad_fast.data.collect import collect_episodes
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.write import write_dataset
from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.offline import OfflineEvaluator
from polygrad_fast.evaluation.plots import plot_offline_comparison
from polygrad_fast.offline.agents import load_agent
from polygrad_fast.offline.runs import OfflineRun, diffuse, train_agent

DATA = ("real", "unguided", "guided")
"""That agents learn from."""
ENVIRONMENT = "Pendulum-v1"
NOISE_STD = (1.0, 2.0, 4.0)
"""Of the episodes in turn, in units of half the actions' range."""
EPISODES = 20
TEST_EPISODES = 100
TEST_SEED = 2_000_003
"""Of the final episodes, which no training evaluation played."""


def swing_up(observation: np.ndarray) -> np.ndarray:
    """Return the torque [1] of a hand-written controller of Pendulum-v1: it feeds energy until the
    upright position can be reached, and holds it there by a spring and a damper."""
    cosine, sine, velocity = observation
    angle = math.atan2(sine, cosine)  # 0 is upright
    if cosine > 0.9:
        torque = -12.0 * angle - 3.0 * velocity
    else:
        missing = 15.0 * (1.0 - cosine) - 0.5 * velocity**2
        torque = math.copysign(2.0, velocity) * (1.0 if missing > 0 else -1.0)
    return np.clip(np.array([torque], dtype=np.float32), -2.0, 2.0)


def run_demo(
    run_dir: Path,
    agent: str = "td3_bc",
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str], None] = print,
    diffuse_config: DiffuseConfig | None = None,
    train_config: OfflineTrainConfig | None = None,
) -> dict[str, Any]:
    """Collect a dataset of a noisy controller in Pendulum-v1, train a diffusion model on it and an
    agent on each kind of data, play fresh episodes and draw the returns into `comparison.png`.

    Args:
        run_dir: a folder that is not there yet.
        agent: "td3_bc" or "iql".
        seed: of everything.
        progress: show progress bars.
        tell: gets a sentence per stage.
        diffuse_config, train_config: default the preset "quick".

    Returns:
        Mean returns by name: dataset, real, unguided, guided; and seconds.

    Raises:
        InputError: the folder is there already.
        KeyboardInterrupt: Ctrl-C came.
    """
    if run_dir.exists():
        raise InputError(f"--run-dir must be a folder that is not there yet, got {run_dir}")
    begun = time.perf_counter()
    data_file = run_dir / "dataset.npz"
    returns = {"dataset": _collect(data_file, seed, progress)}
    tell(f"{EPISODES} episodes of a noisy controller in {data_file}: {describe(returns)}")
    diffusion = diffuse(
        str(data_file), run_dir / "diffusion", "quick", seed, diffuse_config, device="cpu"
    )
    _finish(diffusion, progress)
    tell(f"diffusion model in {run_dir / 'diffusion'} after {_since(begun)}")
    evaluator = OfflineEvaluator(ENVIRONMENT, TEST_EPISODES, TEST_SEED)
    curves = {}
    for data in DATA:
        where = run_dir / data
        run = train_agent(
            agent,
            data,
            str(data_file),
            where,
            None if data == "real" else run_dir / "diffusion",
            "quick",
            seed,
            train_config,
            device="cpu",
        )
        _finish(run, progress)
        predict, _, _ = load_agent(where, "last", "cpu")
        returns[data] = evaluator.evaluate(predict).episodes.returns
        curves[data] = _curve(run)
        tell(f"{agent} on {data} data after {_since(begun)}: {describe({data: returns[data]})}")
    figure = run_dir / "comparison.png"
    title = f"{ENVIRONMENT}, {agent}, seed {seed}"
    try:
        plot_offline_comparison(curves, returns, figure, title)
        tell(f"figure in {figure}")
    except InputError as error:  # matplotlib is an extra
        tell(f"no figure ({error})")
    tell(
        f"mean return (standard deviation over episodes): {describe(returns)}; one seed, so "
        f"differences of this size may be chance"
    )
    means = {name: float(np.mean(values)) for name, values in returns.items()}
    return means | {"seconds": round(time.perf_counter() - begun, 1)}


def describe(returns: dict[str, Sequence[float]]) -> str:
    """Return means and standard deviations in words."""
    return ", ".join(
        f"{name} {np.mean(values):.0f} ({np.std(values):.0f})" for name, values in returns.items()
    )


def _finish(run: OfflineRun, progress: bool) -> None:
    if not run.train(progress):
        raise KeyboardInterrupt


def _collect(path: Path, seed: int, progress: bool) -> np.ndarray:
    """Write the dataset and return its episodes' returns."""
    env = make_environment(ENVIRONMENT)
    path.parent.mkdir(parents=True)
    recipe = {"policy": "swing_up"}
    with tqdm(total=EPISODES, unit="episode", disable=not progress) as bar:
        dataset = collect_episodes(
            env, swing_up, EPISODES, seed, NOISE_STD, recipe, lambda *episode: bar.update()
        )
    write_dataset(dataset, path, env)
    return dataset.episode_returns()


def _curve(run: OfflineRun) -> tuple[list[float], list[float]]:
    """Return updates and mean returns of a run's evaluations."""
    rows = [row for row in run.rows() if "eval/mean_reward" in row]
    return [row["update"] for row in rows], [row["eval/mean_reward"] for row in rows]


def _since(begun: float) -> str:
    return f"{(time.perf_counter() - begun) / 60:.1f} minutes"
