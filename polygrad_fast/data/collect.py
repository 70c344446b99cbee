"""Play episodes in an environment and keep them as a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from polygrad_fast.arguments import as_integer
from polygrad_fast.data.environment import (
    MAX_EPISODE_STEPS,
    check_spaces,
    environment_name,
    reset_environment,
    step_environment,
)
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.errors import InputError
from polygrad_fast.runs.versions import versions

Act = Callable[[np.ndarray], np.ndarray]


def random_actions(env: gymnasium.Env, seed: int) -> Act:
    """Return a policy that draws from the environment's action space, seeded."""
    env.action_space.seed(seed)
    return lambda observation: env.action_space.sample()


def check_noise(env: gymnasium.Env, noise_std: Sequence[float]) -> None:
    """Raise InputError unless such noise can be added to the environment's actions."""
    for level in noise_std:
        if not (np.isfinite(level) and level >= 0):
            raise InputError(f"noise_std must be numbers of at least 0, got {level}")
    if any(noise_std) and not env.action_space.is_bounded():
        raise InputError(
            f"noise_std must be 0 for {environment_name(env)}, whose actions have no bounds: "
            f"{env.action_space}"
        )


def collect_episodes(
    env: gymnasium.Env,
    act: Act,
    num_episodes: int | None,
    seed: int = 0,
    noise_std: Sequence[float] = (),
    recipe: dict[str, Any] | None = None,
    on_episode: Callable[[float, int], None] | None = None,
    num_steps: int | None = None,
) -> OfflineDataset:
    """Play whole episodes, one after the other, and return their steps.

    Args:
        env: environment with Box spaces of one dimension.
        act: maps an observation, float32 [S], to an action [A] in the environment's space.
        num_episodes: at least 1; None: as many as `num_steps` need.
        seed: of the episodes and of the noise.
        noise_std: standard deviations of Gaussian noise on the actions, in units of half their
            range, for the episodes in turn: with (0, 0.3) every second one is played with noise.
            Noisy actions are clipped to the bounds. None given: actions as they are.
        recipe: what else the dataset's recipe is to say, as the policy's name.
        on_episode: called with each episode's return and number of steps.
        num_steps: play on until there are so many, the last episode to its end; None: no matter how
            many there are.

    Returns:
        The dataset, its actions those taken. Its `recipe` has seed, noise_std and what
        `describe_episodes` says.

    Raises:
        InputError: unsuitable spaces or arguments, neither or both of num_episodes and num_steps,
            noise on unbounded actions, an environment that
            returns something unusable, or an episode that does not end.
    """
    if (num_episodes is None) == (num_steps is None):
        raise InputError(
            f"one of num_episodes and num_steps must be given, got {num_episodes} and {num_steps}"
        )
    if num_episodes is not None:
        num_episodes = as_integer(num_episodes, "num_episodes", 1)
    else:
        num_steps = as_integer(num_steps, "num_steps", 1)
    seed = as_integer(seed, "seed", 0)
    observation_dim, action_dim = check_spaces(env)
    name, space = environment_name(env), env.action_space
    check_noise(env, noise_std)
    episode_seeds, noise_seed = np.random.SeedSequence(seed).spawn(2)
    seeds = np.random.default_rng(episode_seeds)
    generator = np.random.default_rng(noise_seed)
    steps: list[tuple] = []
    returns: list[float] = []
    while len(steps) < num_steps if num_episodes is None else len(returns) < num_episodes:
        episode = len(returns)
        level = noise_std[episode % len(noise_std)] if noise_std else 0.0
        where = f"{name}, episode {episode + 1}"
        observation = reset_environment(env, int(seeds.integers(2**31)), observation_dim, where)
        episode_return, length, over = 0.0, 0, False
        while not over:
            action = np.asarray(act(observation), dtype=space.dtype)
            if level > 0:
                noise = level * (space.high - space.low) / 2 * generator.standard_normal(action_dim)
                action = np.clip((action + noise).astype(space.dtype), space.low, space.high)
            length += 1
            # the environment gets a copy: what it does with it is not to be recorded
            following, reward, terminated, truncated = step_environment(
                env, action.copy(), observation_dim, f"{where}, step {length}"
            )
            over = terminated or truncated
            steps.append((observation, action, reward, following, terminated, truncated, over))
            observation, episode_return = following, episode_return + reward
            if length >= MAX_EPISODE_STEPS and not over:
                raise InputError(
                    f"{where} must end some time (gymnasium.wrappers.TimeLimit sees to it), got "
                    f"{length:,} steps without an end"
                )
        returns.append(episode_return)
        if on_episode is not None:
            on_episode(episode_return, length)
    observations, actions, rewards, next_observations, terminals, timeouts, ends = (
        np.array(column) for column in zip(*steps, strict=True)
    )
    dataset = OfflineDataset(
        observations,
        actions,
        rewards,
        next_observations,
        terminals,
        timeouts,
        ends=ends,
        true_next=True,
        source=name,
        env_id=name,
    )
    made = {**(recipe or {}), "seed": seed, "noise_std": list(noise_std)}
    return dataclasses.replace(dataset, recipe=made | describe_episodes(dataset))


def describe_episodes(dataset: OfflineDataset) -> dict[str, Any]:
    """Return what a recipe says of every dataset: env_id, episodes, steps, mean_return and
    std_return (population), and versions of what it was made with."""
    returns = dataset.episode_returns()
    return {
        "env_id": dataset.env_id,
        "episodes": dataset.num_episodes,
        "steps": len(dataset),
        "mean_return": float(returns.mean()),
        "std_return": float(returns.std()),
        "versions": versions(),
    }
