"""Evaluation of offline agents, as Policy-Guided Diffusion does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from polygrad_fast.arguments import as_integer
from polygrad_fast.data.d4rl import d4rl_score, has_d4rl_score, score_caveat
from polygrad_fast.data.environment import environment_name
from polygrad_fast.evaluation.environments import (
    EnvironmentSource,
    EvaluationEnvironments,
    build_environment,
)
from polygrad_fast.evaluation.returns import EpisodeStatistics, evaluate_policy


@dataclass(frozen=True)
class OfflineEvaluation:
    """Episodes played, and their score."""

    episodes: EpisodeStatistics
    score: float | None
    """D4RL's, of the mean return; None where D4RL has no reference returns for the environment."""
    caveat: str | None
    """Why the score is missing, or not to be compared with published ones; None: it may be."""


class OfflineEvaluator:
    """Plays one episode each in environments side by side, at most as long as their time limit.

    Args:
        env: environment id, a function that makes the environment, or an environment, of which
            copies are used.
        num_episodes: 16 in the released code; beyond 16 environments play several.
        seed: of the episodes, the same each time.

    Attributes:
        name: of the environment.

    Raises:
        InputError: unknown environment, unsuitable spaces, or fewer than one episode.
    """

    def __init__(self, env: EnvironmentSource, num_episodes: int = 16, seed: int = 0):
        self.num_episodes = as_integer(num_episodes, "num_episodes", 1)
        seeds = np.random.default_rng(as_integer(seed, "seed", 0))
        self._seeds = seeds.integers(2**31, size=self.num_episodes).tolist()
        first = build_environment(env)
        self._environments = EvaluationEnvironments(first, env)
        self.name = environment_name(first)
        self._space = first.action_space
        self._max_steps = first.spec.max_episode_steps if first.spec is not None else None

    def evaluate(
        self, predict: Callable[[np.ndarray], tuple[np.ndarray, None]]
    ) -> OfflineEvaluation:
        """Play the episodes with an agent's `predict`, actions clipped to the bounds.

        Episodes that do not end within the environment's time limit are left out.

        Raises:
            InputError: observations or actions of another size, an environment that returns
                something unusable, or no episode that ends in time.
        """
        space = self._space

        def act(observations: np.ndarray) -> np.ndarray:
            actions = np.asarray(predict(observations)[0])
            return np.clip(actions.astype(space.dtype), space.low, space.high)

        episodes = evaluate_policy(
            act,
            self._environments.take(self.num_episodes),
            self._seeds,
            max_episode_steps=self._max_steps,
        )
        known = has_d4rl_score(self.name)
        score = float(d4rl_score(self.name, episodes.mean_reward)) if known else None
        return OfflineEvaluation(episodes, score, score_caveat(self.name))
