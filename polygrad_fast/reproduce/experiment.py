"""What the experiments of all papers share: datasets by recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import gymnasium
import numpy as np

from polygrad_fast.arguments import as_choices
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.write import write_dataset
from polygrad_fast.diagnostics.simulator import Simulator
from polygrad_fast.offline.task import OfflineTask
from polygrad_fast.recipes import Behaviour, collect_recipe, level_returns, levels_of
from polygrad_fast.reproduce.stages import Stages

CHECKED_STEPS = 256
"""Steps of a dataset by which it is checked that the simulator repeats them."""


class Experiment:
    """Makes each dataset when it is first asked for, its behaviour policy trained before.

    Args:
        stages: in the experiments' folder.
        dataset_steps: of a dataset but for medium-replay.
        behaviour_seed: of policies and datasets.
        medium_return: mean return from which on a policy is medium; None: known by environment.
    """

    def __init__(
        self,
        stages: Stages,
        dataset_steps: int,
        behaviour_seed: int,
        medium_return: float | None = None,
    ):
        self.stages = stages
        self._dataset_steps, self._behaviour_seed = dataset_steps, behaviour_seed
        self._given = {"medium": medium_return}
        self._datasets: dict[tuple[str, str], Path] = {}  # that were checked

    def check_datasets(self, env_ids: Iterable[str], recipes: Iterable[str]) -> None:
        """Raise InputError, before any work, unless datasets of such recipes can be made."""
        env_ids = list(env_ids)
        as_choices(env_ids, "env_ids", env_ids)
        for env_id in env_ids:
            for recipe in recipes:
                self._returns(env_id, recipe)
            make_environment(env_id).close()

    def behaviour(self, env_id: str, recipe: str) -> Behaviour:
        """Return the policies that a recipe needs."""
        return Behaviour(
            env_id,
            self.stages.folder / "behaviour" / env_id,
            self._behaviour_seed,
            self._returns(env_id, recipe),
            progress=self.stages.progress,
        )

    def dataset(self, env_id: str, recipe: str) -> Path:
        """Return the folder of a dataset."""

        def make(path: Path) -> None:
            behaviour = self.behaviour(env_id, recipe)
            steps = None if recipe == "medium-replay" else self._dataset_steps
            found = collect_recipe(recipe, behaviour, num_steps=steps, seed=self._behaviour_seed)
            env = make_environment(env_id)
            write_dataset(found, path, env)
            env.close()

        key = env_id, recipe
        if key not in self._datasets:
            name = f"{env_id}-{recipe}"
            self._datasets[key] = self.stages.dataset(name, {"recipe": recipe}, make)
        return self._datasets[key]

    def _returns(self, env_id: str, recipe: str) -> dict[str, float]:
        return level_returns(env_id, levels_of(recipe), self._given)


def dataset_simulator(environment: gymnasium.Env, task: OfflineTask, seed: int) -> Simulator:
    """Return an environment as a simulator of a dataset's observations, checked on some of its
    steps, which the seed draws.

    Raises:
        InputError: observations do not determine what happens.
    """
    dataset, generator = task.dataset, np.random.default_rng(seed)
    known = np.flatnonzero(~dataset.timeouts)
    rows = generator.choice(known, min(len(known), CHECKED_STEPS), replace=False)
    return Simulator(
        environment,
        dataset.observations[rows],
        task.scaler.to_environment(dataset.actions[rows]),
        dataset.rewards[rows],
        dataset.terminals[rows].astype(np.float32),
        dataset.next_observations[rows],
        (observation_scale(task), dataset.rewards.std(keepdims=True, dtype=np.float64) + 1e-6),
    )


def observation_scale(task: OfflineTask) -> np.ndarray:
    """Return the unit of each entry of a dataset's observations, [S]."""
    return task.dataset.observations.std(axis=0, dtype=np.float64) + 1e-6
