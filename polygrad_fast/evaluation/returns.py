"""Returns of a policy over whole episodes, played on parallel environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gymnasium
import numpy as np

from polygrad_fast.data.environment import (
    MAX_EPISODE_STEPS,
    check_spaces,
    environment_name,
    reset_environment,
    step_environment,
)
from polygrad_fast.data.environment_process import start_step
from polygrad_fast.errors import InputError


@dataclass(frozen=True)
class EpisodeStatistics:
    """Undiscounted returns and lengths of the episodes played."""

    returns: np.ndarray  # [N] float64
    lengths: np.ndarray  # [N] int64

    @property
    def mean_reward(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def std_reward(self) -> float:
        """Population standard deviation of the returns."""
        return float(self.returns.std())


def evaluate_policy(
    act: Callable[[np.ndarray], np.ndarray],
    environments: Sequence[gymnasium.Env],
    seeds: Sequence[int],
    on_step: Callable[[], None] | None = None,
    max_episode_steps: int | None = None,
) -> EpisodeStatistics:
    """Play one episode per seed, the environments side by side with one batched `act` per step.

    Args:
        act: maps observations [N, S] (float32) to environment actions [N, A].
        environments: at least one; each plays its share of the episodes. They are not closed.
        seeds: one per episode, given to `reset`.
        on_step: called after every reset and step, for instance to render.
        max_episode_steps: an episode that is still running after so many steps is broken off and
            left out, as released offline evaluations do; None: every episode is played to its end.

    Raises:
        InputError: no environment, no seed, no episode that ends in time, an observation or a
            reward that is not finite or of another shape, a flag that is none (the message names
            environment, episode and step), or an episode that does not end within
            `MAX_EPISODE_STEPS`.
    """
    if not environments or not seeds:
        raise InputError(
            f"environments and seeds must hold at least one each, got {len(environments)} and "
            f"{len(seeds)}"
        )
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=np.int64)
    finished = np.zeros(len(seeds), dtype=bool)
    waiting = list(range(len(seeds)))
    running: dict[int, tuple[int, np.ndarray]] = {}  # environment -> (episode, observation)

    names = [environment_name(env) for env in environments]
    sizes = [check_spaces(env)[0] for env in environments]

    def where(slot: int, episode: int) -> str:
        return f"{names[slot]}, evaluation episode {episode + 1}"

    def begin(slot: int) -> None:
        running.pop(slot, None)
        if waiting:
            episode = waiting.pop(0)
            place = f"{where(slot, episode)}, reset"
            seed = int(seeds[episode])
            observation = reset_environment(environments[slot], seed, sizes[slot], place)
            running[slot] = (episode, observation)

    for slot in range(len(environments)):
        begin(slot)
    while running:
        if on_step is not None:
            on_step()
        slots = list(running)
        observations = np.stack([running[slot][1] for slot in slots])
        actions = act(observations)
        for slot, action in zip(slots, actions, strict=True):
            start_step(environments[slot], action)
        for slot, action in zip(slots, actions, strict=True):
            episode = running[slot][0]
            lengths[episode] += 1
            place = f"{where(slot, episode)}, step {lengths[episode]}"
            observation, reward, terminated, truncated = step_environment(
                environments[slot], action, sizes[slot], place
            )
            returns[episode] += reward
            if lengths[episode] >= MAX_EPISODE_STEPS and not (terminated or truncated):
                raise InputError(
                    f"{where(slot, episode)} must end some time (gymnasium.wrappers.TimeLimit "
                    f"sees to it), got {lengths[episode]:,} steps without an end"
                )
            running[slot] = (episode, observation)
            finished[episode] = terminated or truncated
            if finished[episode] or lengths[episode] == max_episode_steps:
                begin(slot)
    if not finished.any():
        raise InputError(
            f"{names[0]}: an episode must end within {max_episode_steps:,} steps to be evaluated, "
            f"got {len(seeds)} that do not"
        )
    return EpisodeStatistics(returns[finished], lengths[finished])
