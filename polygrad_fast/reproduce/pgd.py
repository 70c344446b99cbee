"""Policy-guided diffusion (arXiv 2404.06356): returns, likelihood and error of its trajectories.

All experiments share datasets, models and agents in one folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polygrad_fast.config import (
    DiffuseConfig,
    DynamicsConfig,
    OfflineTrainConfig,
    PGDScale,
)
from polygrad_fast.evaluation.offline import OfflineEvaluator
from polygrad_fast.offline.agents import load_agent
from polygrad_fast.offline.runs import OfflineRun, diffuse, fit_ensemble, train_agent
from polygrad_fast.reproduce.experiment import Experiment
from polygrad_fast.reproduce.stages import Stages

TEST_SEED = 3_000_017
"""Of the episodes that agents are compared on, which nothing else plays."""


class PGDExperiment(Experiment):
    """What the experiments share: each part is made when it is first asked for.

    Args:
        stages: in the experiments' folder.
        scale: sizes.
    """

    def __init__(self, stages: Stages, scale: PGDScale):
        super().__init__(stages, scale.dataset_steps, scale.behaviour_seed)
        self.scale = scale

    def diffusion(self, env_id: str, recipe: str, seed: int) -> Path:
        """Return the run directory of a diffusion model."""
        config = DiffuseConfig.from_preset(self.scale.preset)
        config = _replaced(config, total_updates=self.scale.diffusion_updates)
        return self._model("diffusion", diffuse, config, env_id, recipe, seed)

    def ensemble(self, env_id: str, recipe: str, seed: int) -> Path:
        """Return the run directory of a dynamics ensemble."""
        config = DynamicsConfig.from_preset(self.scale.preset)
        config = _replaced(config, total_updates=self.scale.ensemble_updates)
        return self._model("ensemble", fit_ensemble, config, env_id, recipe, seed)

    def _model(
        self,
        kind: str,
        begin: Callable[..., OfflineRun],
        config: DiffuseConfig | DynamicsConfig,
        env_id: str,
        recipe: str,
        seed: int,
    ) -> Path:
        dataset, preset = str(self.dataset(env_id, recipe)), self.scale.preset
        return self.stages.train(
            f"models/{env_id}-{recipe}/{kind}-{seed}",
            lambda path, resume: begin(dataset, path, preset, seed, config, resume=resume),
        )

    def train_config(self, total_updates: int | None) -> OfflineTrainConfig:
        """Return how agents are trained: evaluated once, at their end."""
        scale = self.scale
        config = _replaced(
            OfflineTrainConfig.from_preset(scale.preset),
            total_updates=total_updates,
            lifetime=scale.lifetime,
            num_trajectories=scale.num_trajectories,
        )
        return dataclasses.replace(config, eval_interval=config.total_updates)

    def agent(self, env_id: str, recipe: str, name: str, data: str, seed: int) -> Path:
        """Return the run directory of an agent."""
        models = {"unguided": self.diffusion, "guided": self.diffusion, "ensemble": self.ensemble}
        model = models[data](env_id, recipe, seed) if data in models else None
        dataset, config = (
            str(self.dataset(env_id, recipe)),
            self.train_config(self.scale.agent_updates),
        )
        return self.stages.train(
            f"agents/{env_id}-{recipe}/{name}-{data}-{seed}",
            lambda path, resume: train_agent(
                name,
                data,
                dataset,
                path,
                model,
                self.scale.preset,
                seed,
                config,
                resume=resume,
                progress=self.stages.progress,
            ),
        )

    def test(self, env_id: str, recipe: str, name: str, data: str, seed: int) -> dict[str, Any]:
        """Return fresh episodes of an agent: "returns" and "score", of the mean by D4RL's
        constants, or None."""

        def play() -> dict[str, Any]:
            run_dir = self.agent(env_id, recipe, name, data, seed)
            predict, _, _ = load_agent(run_dir, "last")
            evaluator = OfflineEvaluator(env_id, self.scale.test_episodes, TEST_SEED)
            found = evaluator.evaluate(predict)
            self.stages.tell(
                f"{env_id}, {recipe}, {name} on {data} data, seed {seed}: mean return "
                f"{found.episodes.mean_reward:.0f}"
            )
            return {"returns": found.episodes.returns.tolist(), "score": found.score}

        case = {"env_id": env_id, "recipe": recipe, "agent": name, "data": data, "seed": seed}
        sizes = ("dataset_steps", "behaviour_seed", "preset", "agent_updates", "test_episodes")
        inputs = case | {key: getattr(self.scale, key) for key in sizes} | self._model_inputs(data)
        path = f"test/{env_id}-{recipe}-{name}-{data}-{seed}"
        return self.stages.result(path, inputs, play)

    def _model_inputs(self, data: str) -> dict[str, Any]:
        """Return the sizes that agents on such data depend on besides their own."""
        scale = self.scale
        sets = {"lifetime": scale.lifetime, "num_trajectories": scale.num_trajectories}
        if data == "real":
            return {}
        if data == "ensemble":
            return sets | {"ensemble_updates": scale.ensemble_updates}
        return sets | {"diffusion_updates": scale.diffusion_updates}


def _replaced(config: Any, **options: Any) -> Any:
    """Return a configuration with the options that are not None."""
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(config, **given)


def action_log_likelihood(
    policy: Callable[[Tensor], tuple[Tensor, Tensor]], observations: Tensor, actions: Tensor
) -> float:
    """Return the mean over rows of log N(a; m(s), v(s)), summed over action entries.

    Args:
        policy: returns mean and standard deviation [N, A] at raw observations [N, S].
        observations, actions: raw, [N, S] and [N, A].
    """
    with torch.no_grad():
        mean, std = policy(observations)
        found = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(actions)
        return float(found.sum(-1).mean())
