"""What the experiments of all papers share: datasets by recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import gymnasium
import numpy as np

from polygrad_fast.arguments import as_choices
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.data.policy_file import StoredPolicy, load_policy
from polygrad_fast.data.write import write_dataset
from polygrad_fast.diagnostics.simulator import Simulator
from polygrad_fast.offline.task import OfflineTask
from polygrad_fast.recipes import (
    Behaviour,
    collect_from_file,
    collect_recipe,
    level_returns,
    levels_of,
)
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
        policies: folder of policy files that are played instead of trained ones; "": none.
    """

    def __init__(
        self,
        stages: Stages,
        dataset_steps: int,
        behaviour_seed: int,
        medium_return: float | None = None,
        policies: str = "",
    ):
        self.stages = stages
        self._dataset_steps, self._behaviour_seed = dataset_steps, behaviour_seed
        self._given, self._policies = {"medium": medium_return}, policies
        self._datasets: dict[tuple[str, str], Path] = {}  # that were checked

    def check_datasets(self, env_ids: Iterable[str], recipes: Iterable[str]) -> None:
        """Raise InputError, before any work, unless datasets of such recipes can be made."""
        env_ids = list(env_ids)
        as_choices(env_ids, "env_ids", env_ids)
        for env_id in env_ids:
            for recipe in recipes:
                self._returns(env_id, recipe)
            make_environment(env_id).close()
            self.policy_file(env_id)

    def behaviour(self, env_id: str, recipe: str) -> Behaviour:
        """Return the policies that a recipe needs."""
        return Behaviour(
            env_id,
            self.stages.folder / "behaviour" / env_id,
            self._behaviour_seed,
            self._returns(env_id, recipe),
            progress=self.stages.progress,
        )

    def policy_file(self, env_id: str) -> StoredPolicy | None:
        """Return the policy of an environment's file; None: there is no folder of such.

        Raises:
            InputError: no usable file of the environment.
        """
        return load_policy(self._policy_path(env_id), env_id) if self._policies else None

    def _policy_path(self, env_id: str) -> Path:
        return Path(self._policies) / f"{env_id}.safetensors"

    def dataset(self, env_id: str, recipe: str) -> Path:
        """Return the folder of a dataset."""
        key = env_id, recipe
        if key in self._datasets:
            return self._datasets[key]
        asked = {"seed": self._behaviour_seed, "returns": self._returns(env_id, recipe)}
        if recipe != "medium-replay":  # which is as long as its training
            asked["steps"] = self._dataset_steps
        name, described = f"{env_id}-{recipe}", {"recipe": recipe, "asked": asked}
        stored = self.policy_file(env_id)
        if stored is not None:
            name = f"{name}-of-file"
            described["trained_by"] = stored.facts.trained_by

        def make(path: Path) -> None:
            env = make_environment(env_id)
            found = self._collect(env, env_id, recipe)
            found = dataclasses.replace(found, recipe=found.recipe | {"asked": asked})
            write_dataset(found, path, env)
            env.close()

        self._datasets[key] = self.stages.dataset(name, described, make)
        return self._datasets[key]

    def _collect(self, env: gymnasium.Env, env_id: str, recipe: str) -> OfflineDataset:
        seed = self._behaviour_seed
        if self._policies:
            file, medium = self._policy_path(env_id), self._returns(env_id, recipe)["medium"]
            return collect_from_file(recipe, file, env, medium, None, self._dataset_steps, seed)
        steps = None if recipe == "medium-replay" else self._dataset_steps
        return collect_recipe(recipe, self.behaviour(env_id, recipe), num_steps=steps, seed=seed)

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
