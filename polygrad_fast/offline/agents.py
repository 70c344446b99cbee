"""Training an agent on real, unguided or guided data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from polygrad_fast.arguments import as_device
from polygrad_fast.config import OfflineTrainConfig, from_dict
from polygrad_fast.data.actions import ActionScaler
from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.evaluation.offline import OfflineEvaluation, OfflineEvaluator
from polygrad_fast.learners import IQL, TD3BC
from polygrad_fast.offline.diffusion import DiffusionModel, seeded
from polygrad_fast.offline.ensemble import EnsembleModel
from polygrad_fast.offline.loop import Averages, load_named_weights, named_weights
from polygrad_fast.offline.synthetic import (
    DiffusionSource,
    EnsembleSource,
    Source,
    SyntheticSets,
)
from polygrad_fast.offline.task import OfflineTask
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.directory import read_run_config
from polygrad_fast.runs.restore import checkpoint_to_load
from polygrad_fast.transitions import Transitions

KIND = "offline train"
AGENTS = {"td3_bc": TD3BC, "iql": IQL}
MODELS: dict[str, type | None] = {
    "real": None,
    "unguided": DiffusionModel,
    "guided": DiffusionModel,
    "ensemble": EnsembleModel,
}
"""Kinds of data, and what they are sampled from."""
DATA = tuple(MODELS)
_NAMES = {None: "no model", DiffusionModel: "a diffusion model", EnsembleModel: "an ensemble"}


def build_agent(
    name: str,
    config: OfflineTrainConfig,
    observation_dim: int,
    action_dim: int,
    observation_moments: tuple[Tensor, Tensor],
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
) -> TD3BC | IQL:
    """Return a new agent whose actions are in [-1, 1].

    Args:
        name: "td3_bc" or "iql".
        config: whose options of that name, and `total_updates`, are the agent's.
        observation_dim, action_dim: S and A.
        observation_moments: mean and standard deviation [S] of the real data's observations, used
            with `normalize_observations`.
        generator: of the first weights.
        device: where its networks go.

    Raises:
        InputError: unknown agent.
    """
    if name not in AGENTS:
        raise InputError(f"agent must be one of {list(AGENTS)}, got {name!r}")
    options = dataclasses.replace(getattr(config, name), total_updates=config.total_updates)
    bounds = [-1.0] * action_dim, [1.0] * action_dim
    moments = observation_moments if options.normalize_observations else None
    agent = AGENTS[name](observation_dim, *bounds, options, moments, generator)
    for module in agent.modules().values():
        module.to(device)
    return agent


def _source(
    task: OfflineTask,
    model: DiffusionModel | EnsembleModel | None,
    config: OfflineTrainConfig,
    data: str,
    device: torch.device,
    progress: bool,
) -> Source | None:
    """Return what synthetic sets of such data are sampled from."""
    kind = None if model is None else type(model)
    if kind is not MODELS[data]:
        raise InputError(f"{data} data need {_NAMES[MODELS[data]]}, got {_NAMES[kind]}")
    if kind is None:
        return None
    if kind is EnsembleModel:
        return EnsembleSource(task, model, config, device)
    return DiffusionSource(task, model, config, device, progress)


class AgentTraining:
    """Train an agent on batches of a dataset, or mostly of synthetic trajectories, which are
    sampled anew from time to time.

    Implements `polygrad_fast.offline.loop.Training`. A resumed training has the same synthetic
    sets, from their files or sampled again, see `SyntheticSets`.

    Args:
        task: dataset and environment.
        config: sizes and options.
        agent: "td3_bc" or "iql".
        data: "real"; "unguided" or "guided" trajectories of a diffusion model; or "ensemble", those
            of the agent's policy in a dynamics ensemble.
        seed: of weights, batches and synthetic data.
        device: as `as_device` takes it.
        model: the diffusion model or the ensemble, on the device; not with real data.
        evaluator: of the environment; None: no evaluations.
        folder: where synthetic sets are kept while they are used; None: in memory only.
        progress: show a progress bar while sampling.

    Attributes:
        learner: the agent. synthetic: the synthetic sets, None with real data.

    Raises:
        InputError: unknown agent or data, a model missing, given in vain or of another kind or
            task, no guidance to follow, or fewer rows than a batch takes.
    """

    def __init__(
        self,
        task: OfflineTask,
        config: OfflineTrainConfig,
        agent: str,
        data: str,
        seed: int = 0,
        device: str | torch.device = "auto",
        model: DiffusionModel | EnsembleModel | None = None,
        evaluator: OfflineEvaluator | None = None,
        folder: Path | None = None,
        progress: bool = False,
    ):
        if data not in DATA:
            raise InputError(f"data must be one of {list(DATA)}, got {data!r}")
        if data == "guided" and config.guidance.coefficient == 0:
            raise InputError("guidance.coefficient must be above 0 for guided data, got 0.0")
        self.config, self.data, self.device = config, data, as_device(device)
        self.total_updates, self.improved = config.total_updates, False
        source = _source(task, model, config, data, self.device, progress)
        self.num_real = config.batch_size if source is None else config.num_real
        real = task.dataset.transitions()
        if len(real) < self.num_real:
            raise InputError(
                f"{task.dataset.source} must hold at least {self.num_real} transitions, those of a "
                f"batch, got {len(real)}"
            )
        self.real = real.to(self.device)
        dims = real.observation_dim, real.action_dim
        self.learner = build_agent(
            agent, config, *dims, real.observation_moments(), seeded(seed, 0), self.device
        )
        self.synthetic = None
        if source is not None:
            largest = -(-(config.batch_size - self.num_real) // config.num_sets)
            if source.least < largest:
                raise InputError(
                    f"a synthetic set must hold at least {largest} transitions, those of a batch, "
                    f"got {source.least} of {config.num_trajectories} trajectories"
                )
            self.synthetic = SyntheticSets(
                source, self.learner.policy, data != "unguided", config.num_sets, seed, folder
            )
        self._evaluator, self._scaler = evaluator, task.scaler
        self._draws = seeded(seed, 1)
        self._averages = Averages()
        self.best_mean_reward: float | None = None

    @property
    def num_updates(self) -> int:
        """Updates taken so far."""
        return self.learner.num_updates

    def update(self) -> None:
        """Take one update on a batch, then let go of a synthetic set that has served its time."""
        measured = self.learner.update(self.batch(), self._draws)
        name = self.learner.name
        self._averages.add({f"{name}/{key}": value for key, value in measured.items()})
        index = self.num_updates - 1
        if self.synthetic is not None and index > 0 and index % self.config.lifetime == 0:
            self.synthetic.renew(self.learner.policy)

    def batch(self) -> Transitions:
        """Draw a batch: real rows and synthetic ones, each part without replacement."""
        parts = [self.real.sample(self.num_real, self._draws)] if self.num_real else []
        if self.synthetic is not None:
            parts += self.synthetic.batch(self.config.batch_size - self.num_real, self._draws)
        return parts[0] if len(parts) == 1 else Transitions.concatenate(parts)

    def close(self) -> None:
        """Delete the files of the synthetic sets, which a finished training needs no more."""
        if self.synthetic is not None:
            self.synthetic.close()

    def metrics(self) -> dict[str, float]:
        """Return the row that is due, see `Training`."""
        number, config = self.num_updates, self.config
        last = number == self.total_updates
        row: dict[str, float] = {}
        self.improved = False
        if self._evaluator is not None and (number % config.eval_interval == 0 or last):
            row = self._evaluate()
        if number and (row or last or number % config.log_interval == 0):
            row |= self._averages.read(number)
            if self.synthetic is not None:
                row |= self.synthetic.metrics()
        return row

    def _evaluate(self) -> dict[str, float]:
        result = self._evaluator.evaluate(environment_predict(self.learner, self._scaler))
        mean = result.episodes.mean_reward
        if self.best_mean_reward is None or mean >= self.best_mean_reward:
            self.best_mean_reward, self.improved = mean, True
        row = {
            "eval/mean_reward": mean,
            "eval/std_reward": result.episodes.std_reward,
            "eval/best_mean_reward": self.best_mean_reward,
        }
        return row | comparable_score(result)

    def weights(self) -> dict[str, Tensor]:
        """Return the agent's weights and those of the policies that the synthetic sets are of."""
        return named_weights(self._modules())

    def _modules(self) -> dict[str, nn.Module]:
        guides = {} if self.synthetic is None else self.synthetic.modules()
        return {**self.learner.modules(), **guides}

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that continues the training exactly."""
        return {
            "learner": self.learner.state_dict(),
            "draws": self._draws.get_state(),
            "averages": self._averages.state_dict(),
            "synthetic": None if self.synthetic is None else self.synthetic.state_dict(),
            "best_mean_reward": self.best_mean_reward,
        }

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Any], source: str) -> None:
        """Continue from what `weights` and `state_dict` returned.

        Raises:
            CheckpointError: they are of another training.
        """
        load_named_weights(self._modules(), weights, source)
        self.learner.load_state_dict(state["learner"])
        self._draws.set_state(state["draws"])
        self._averages.load_state_dict(state["averages"], self.device)
        if self.synthetic is not None:
            self.synthetic.load_state_dict(state["synthetic"])
        self.best_mean_reward = state["best_mean_reward"]


def comparable_score(result: OfflineEvaluation) -> dict[str, float]:
    """Return the D4RL score where it may be compared with published ones."""
    comparable = result.score is not None and result.caveat is None
    return {"eval/score": result.score} if comparable else {}


def environment_predict(
    agent: TD3BC | IQL, scaler: ActionScaler
) -> Callable[[np.ndarray], tuple[np.ndarray, None]]:
    """Return an agent's `predict` in the environment's actions."""
    return lambda observations: (scaler.to_environment(agent.predict(observations)[0]), None)


def load_agent(
    run_dir: Path, checkpoint: str, device: str | torch.device = "auto"
) -> tuple[Callable[[np.ndarray], tuple[np.ndarray, None]], dict[str, Any], int]:
    """Return `predict` of an agent of an `offline train` run, in the environment's actions, with
    the run's config.json and the number of updates.

    Args:
        run_dir: the run directory.
        checkpoint: "best" or "last".
        device: as `as_device` takes it.

    Raises:
        CheckpointError: no such run, or no such checkpoint that can be used.
    """
    stored = read_run_config(run_dir, KIND)
    path, _ = checkpoint_to_load(run_dir, checkpoint)
    weights, _, metadata = load_checkpoint(path)
    config = from_dict(stored["config"], OfflineTrainConfig)
    try:
        low, high = (np.array(stored[f"action_{end}"], dtype=np.float32) for end in ("low", "high"))
        size, name = int(stored["observation_dim"]), stored["agent"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run_dir / 'config.json'} is damaged: {error!r}") from None
    moments = torch.zeros(size), torch.ones(size)  # the weights hold them
    agent = build_agent(name, config, size, len(low), moments, None, as_device(device))
    load_named_weights(agent.modules(), weights, str(path))
    scaler = ActionScaler(gymnasium.spaces.Box(low, high, dtype=np.float32), rescale=True)
    return environment_predict(agent, scaler), stored, int(metadata["num_timesteps"])
