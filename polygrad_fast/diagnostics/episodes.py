"""Episodes in a MuJoCo environment, fresh ones of a policy or those of a dataset, and windows of
them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from polygrad_fast.data import ActionScaler
from polygrad_fast.data.environment import reset_environment, step_environment
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.diagnostics.mujoco_replay import MujocoReplay, Played
from polygrad_fast.diagnostics.simulator import Simulator
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.protocols import policy_moments

MIN_EPISODES = 10
MAX_EPISODE_STEPS = 100_000
_STREAM = 13
"""Parts the seeds of these episodes from those of training and evaluation."""


@dataclass(frozen=True)
class Episode:
    """T steps from a reset to an end."""

    states: np.ndarray  # [T, ...], before each action
    observations: np.ndarray  # [T + 1, S], float32 as policies and replay buffers see them
    actions: np.ndarray  # [T, A], in the environment's units
    rewards: np.ndarray  # [T]
    terminated: bool

    def starts(self, num_steps: int) -> np.ndarray:
        """Return the steps from which the next `num_steps` are known: they lie within the episode,
        or it terminates."""
        length = len(self.actions)
        return np.arange(length if self.terminated else max(0, length - num_steps + 1))


@dataclass(frozen=True)
class RecordedWindows:
    """N windows of T steps, as they were played.

    Past a terminal step, actions repeat, and what was played is as `Played` says.
    """

    states: np.ndarray  # [N, ...], at the first step
    observations: np.ndarray  # [N, S], likewise
    actions: np.ndarray  # [N, T, A]
    played: Played
    num_episodes: int
    """From which they are."""


def record_windows(
    replay: MujocoReplay,
    policy: Any,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    num: int,
    num_steps: int,
    seed: int,
    progress: bool = False,
) -> RecordedWindows:
    """Play episodes with actions drawn from the policy, at least `MIN_EPISODES` and until there are
    `num` starts, and draw `num` windows of `num_steps` steps from them, each start once.

    Raises:
        InputError: no episode is as long, or the environment returned something unusable.
    """
    seeds = np.random.default_rng([_STREAM, seed])
    noise = torch.Generator().manual_seed(int(seeds.integers(2**63)))
    episodes: list[Episode] = []
    found = 0
    with tqdm(
        total=num,
        desc="playing",
        unit="start",
        leave=False,
        dynamic_ncols=True,
        disable=not progress,
    ) as bar:
        while len(episodes) < MIN_EPISODES or 0 < found < num:
            episode_seed, where = int(seeds.integers(2**31)), f"episode {len(episodes) + 1}"
            episodes.append(
                _play(replay, policy, normalizer, action_scaler, episode_seed, noise, where)
            )
            found += len(episodes[-1].starts(num_steps))
            bar.update(min(found, num) - bar.n)
    if found == 0:
        longest = max(len(episode.actions) for episode in episodes)
        raise InputError(
            f"{replay.name} must have episodes of at least {num_steps} steps for that horizon, got "
            f"{longest} in the longest of {len(episodes)}"
        )
    every = [(episode, start) for episode in episodes for start in episode.starts(num_steps)]
    picks = seeds.choice(len(every), num, replace=False)
    return _windows([every[pick] for pick in picks], num_steps)


def dataset_windows(
    replay: MujocoReplay,
    simulator: Simulator,
    dataset: OfflineDataset,
    num: int,
    num_steps: int,
    seed: int,
) -> RecordedWindows:
    """Draw `num` windows of `num_steps` steps from a dataset's episodes, each start once.

    The states of a window are those that its first observation shows; starts that do not determine
    theirs are left out.

    Args:
        replay, simulator: of one environment.
        dataset: its actions in the environment's units; the last next observation of each episode
            is a true one.

    Raises:
        InputError: fewer starts.
    """
    every: list[tuple[Episode, int]] = []
    first = 0
    for last in np.flatnonzero(dataset.ends):
        rows = slice(first, last + 1)
        shown, first = dataset.observations[rows], last + 1
        states = []
        for observation in shown:
            simulator.set(observation)
            states.append(replay.state())
        episode = Episode(
            np.array(states),
            np.concatenate([shown, dataset.next_observations[last : last + 1]]),
            dataset.actions[rows],
            dataset.rewards[rows],
            bool(dataset.terminals[last]),
        )
        determined = simulator.is_determined(shown)
        every += [(episode, t) for t in episode.starts(num_steps) if determined[t]]
    if len(every) < num:
        raise InputError(
            f"{dataset.source} must have at least {num} starts of {num_steps} steps to measure "
            f"from, got {len(every)} in {dataset.num_episodes} episodes"
        )
    picks = np.random.default_rng([_STREAM, seed]).choice(len(every), num, replace=False)
    return _windows([every[pick] for pick in picks], num_steps)


def _play(
    replay: MujocoReplay,
    policy: Any,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    seed: int,
    noise: torch.Generator,
    where: str,
) -> Episode:
    environment, size = replay.environment, replay.observation_dim
    place = f"{replay.name}, {where}"
    observation = reset_environment(environment, seed, size, f"{place}, reset")
    states, observations, actions, rewards = [], [observation], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        if len(actions) >= MAX_EPISODE_STEPS:
            raise InputError(
                f"{place} must end some time (gymnasium.wrappers.TimeLimit sees to it), got "
                f"{MAX_EPISODE_STEPS:,} steps without an end"
            )
        states.append(replay.state())
        actions.append(draw_action(policy, normalizer, action_scaler, observation, noise))
        step = f"{place}, step {len(actions)}"
        observation, reward, terminated, truncated = step_environment(
            environment, actions[-1], size, step
        )
        observations.append(observation)
        rewards.append(reward)
    columns = (states, observations, actions, rewards)
    return Episode(*(np.array(column) for column in columns), terminated)


@torch.no_grad()
def draw_action(
    policy: Any,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    observation: np.ndarray,
    noise: torch.Generator,
) -> np.ndarray:
    """Return an action [A] in the environment's units, drawn from the policy at a raw observation
    [S] with normals of a generator on the CPU."""
    seen = torch.from_numpy(observation).to(normalizer.observations_mean.device)
    mean, std = policy_moments(policy, normalizer, seen, normalized=False)
    drawn = mean.cpu() + std.cpu() * torch.randn(mean.shape, generator=noise)
    return action_scaler.to_environment(drawn.numpy())


def _windows(starts: list[tuple[Episode, int]], num_steps: int) -> RecordedWindows:
    states, observations = (
        np.array([getattr(episode, name)[start] for episode, start in starts])
        for name in ("states", "observations")
    )
    played = Played.nothing(len(starts), num_steps, observations.shape[1])
    actions = []
    for i, (episode, start) in enumerate(starts):
        steps = np.arange(start, min(start + num_steps, len(episode.actions)))
        count = len(steps)
        played.observations[i, :count] = episode.observations[steps + 1]
        played.rewards[i, :count] = episode.rewards[steps]
        ended = episode.terminated and steps[-1] == len(episode.actions) - 1
        played.terminals[i, count - 1 :] = ended
        rows = np.minimum(np.arange(start, start + num_steps), len(episode.actions) - 1)
        actions.append(episode.actions[rows])
    num_episodes = len({id(episode) for episode, _ in starts})
    return RecordedWindows(states, observations, np.array(actions), played, num_episodes)
