"""Evaluations of one policy while it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from polygrad_fast.evaluation.environments import EvaluationEnvironments
from polygrad_fast.evaluation.returns import EpisodeStatistics, evaluate_policy
from polygrad_fast.profiling import annotate


class Evaluator:
    """Play episodes with the current policy and remember the best mean return.

    Args:
        act: maps observations [N, S] and whether to take the policy's mean to actions [N, A].
        environments: what is played on.
        seed: of the episodes, the same each time.

    Attributes:
        best_mean_reward: of the evaluations so far, None before the first.
    """

    def __init__(
        self,
        act: Callable[[np.ndarray, bool], np.ndarray],
        environments: EvaluationEnvironments,
        seed: int,
    ):
        self._act, self.environments, self._seed = act, environments, seed
        self.best_mean_reward: float | None = None

    def evaluate(
        self, num_episodes: int, seed: int | None = None, deterministic: bool = True
    ) -> EpisodeStatistics:
        """Play whole episodes; see `PolyGRAD.evaluate`."""
        seeds = np.random.default_rng(self._seed if seed is None else seed)
        with annotate("evaluation"):
            return evaluate_policy(
                lambda observations: self._act(observations, deterministic),
                self.environments.take(num_episodes),
                seeds.integers(2**31, size=num_episodes).tolist(),
            )

    def note(self, result: EpisodeStatistics, keep: Callable[[], None]) -> dict[str, float]:
        """Have the policy of an evaluation kept, by `keep`, if none before was better; return the
        evaluation's columns of metrics.csv."""
        if self.is_best(result):
            keep()
            self.best_mean_reward = result.mean_reward
        return {
            "eval/mean_reward": result.mean_reward,
            "eval/std_reward": result.std_reward,
            "eval/mean_episode_length": float(result.lengths.mean()),
            "eval/best_mean_reward": self.best_mean_reward,
        }

    def is_best(self, result: EpisodeStatistics) -> bool:
        """Whether no evaluation before was better: of equal ones the last counts, whose policy has
        trained longest."""
        # "not <": older checkpoints may hold a NaN
        best = self.best_mean_reward
        return best is None or not result.mean_reward < best

    def state_dict(self) -> dict[str, Any]:
        """Return the best mean return."""
        return {"best_mean_reward": self.best_mean_reward}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best_mean_reward = state["best_mean_reward"]
