"""Training an agent on real, unguided or guided data."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from polygrad_fast.arguments import as_device
from polygrad_fast.config import OfflineTrainConfig, from_dict
from polygrad_fast.data.actions import ActionScaler
from polygrad_fast.data.windows import to_transitions
from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.evaluation.offline import OfflineEvaluation, OfflineEvaluator
from polygrad_fast.learners import IQL, TD3BC
from polygrad_fast.offline.diffusion import DiffusionModel, seeded
from polygrad_fast.offline.generation import generate
from polygrad_fast.offline.loop import Averages, load_named_weights, named_weights
from polygrad_fast.offline.task import OfflineTask
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.directory import read_run_config
from polygrad_fast.runs.restore import checkpoint_to_load
from polygrad_fast.sampling.edm_sampler import EDMSampler
from polygrad_fast.sampling.policy_score import PolicyGuidance
from polygrad_fast.transitions import Transitions

KIND = "offline train"
AGENTS = {"td3_bc": TD3BC, "iql": IQL}
DATA = ("real", "unguided", "guided")


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


def check_diffusion(task: OfflineTask, model: DiffusionModel, config: OfflineTrainConfig) -> None:
    """Raise InputError unless a diffusion model is one of a task, and can be sampled from with a
    configuration."""
    identity, stored = task.identity, model.stored
    for name in ("observation_dim", "action_low", "action_high"):
        if identity[name] != stored[name]:
            raise InputError(
                f"{name} of the dataset must be {stored[name]}, that of the diffusion model's "
                f"({stored['dataset']}), got {identity[name]}"
            )
    ours, theirs = identity["dataset_env_id"], stored["dataset_env_id"]
    if ours and theirs and ours != theirs:
        raise InputError(
            f"the dataset's environment must be {theirs}, that of the diffusion model's "
            f"({stored['dataset']}), got {ours}"
        )
    if config.sampler.sigma_data != model.config.sigma_data:
        raise InputError(
            f"sampler.sigma_data must be {model.config.sigma_data}, with which the diffusion model "
            f"was trained, got {config.sampler.sigma_data}"
        )
    rows, shortest = config.trajectory_rows, model.network.min_length
    if rows is not None and rows < shortest:
        raise InputError(
            f"trajectory_rows must be at least {shortest} for the diffusion model, got {rows}"
        )


class AgentTraining:
    """Train an agent on batches of a dataset, or mostly of trajectories sampled from a diffusion
    model of it, which are sampled anew from time to time.

    Implements `polygrad_fast.offline.loop.Training`. A synthetic set is that of its number, the
    seed, and the policy as it was when the set was sampled, whose weights checkpoints hold: a
    resumed training has the same one, from its files or sampled again.

    Args:
        task: dataset and environment.
        config: sizes and options.
        agent: "td3_bc" or "iql".
        data: "real", "unguided" or "guided".
        seed: of weights, batches and synthetic data.
        device: as `as_device` takes it.
        model: the diffusion model, on the device; not with real data.
        evaluator: of the environment; None: no evaluations.
        folder: where synthetic sets are kept while they are used; None: in memory only.
        progress: show a progress bar while sampling.

    Attributes:
        learner: the agent. synthetic: the present set, None before it is needed.
        set_number: which set it is, from 0. guide: the policy as it was when that was sampled.

    Raises:
        InputError: unknown agent or data, a model missing, given in vain or of another task, no
            guidance to follow, or fewer real rows than a batch takes.
    """

    def __init__(
        self,
        task: OfflineTask,
        config: OfflineTrainConfig,
        agent: str,
        data: str,
        seed: int = 0,
        device: str | torch.device = "auto",
        model: DiffusionModel | None = None,
        evaluator: OfflineEvaluator | None = None,
        folder: Path | None = None,
        progress: bool = False,
    ):
        if data not in DATA:
            raise InputError(f"data must be one of {list(DATA)}, got {data!r}")
        if (model is None) != (data == "real"):
            got = "none" if model is None else "one"
            wanted = "no diffusion model" if data == "real" else "a diffusion model"
            raise InputError(f"{data} data need {wanted}, got {got}")
        if data == "guided" and config.guidance.coefficient == 0:
            raise InputError("guidance.coefficient must be above 0 for guided data, got 0.0")
        if model is not None:
            check_diffusion(task, model, config)
        self.config, self.data, self.device = config, data, as_device(device)
        self.total_updates, self.improved = config.total_updates, False
        self.num_real = config.batch_size if model is None else config.num_real
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
        self.guide = copy.deepcopy(self.learner.policy).requires_grad_(False)
        self.set_number, self.synthetic = 0, None
        self._model, self._evaluator, self._folder = model, evaluator, folder
        self._seed, self._progress = seed, progress
        if model is not None:
            rows = config.trajectory_rows
            self._rows = model.config.window_length + 1 if rows is None else rows
            num_synthetic = config.batch_size - self.num_real
            available = config.num_trajectories * (self._rows - 1)
            if available < num_synthetic:
                raise InputError(
                    f"num_trajectories times (trajectory_rows - 1) must be at least "
                    f"{num_synthetic}, the synthetic rows of a batch, got {available}"
                )
            self._sampler = EDMSampler(
                model.network, config.sampler, config.engine, config.dtype, self.device
            )
        self._scaler = task.scaler
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
        index, lifetime = self.num_updates - 1, self.config.lifetime
        if self._model is not None and index > 0 and index % lifetime == 0:
            self.set_number, self.synthetic = index // lifetime, None
            self.guide.load_state_dict(self.learner.policy.state_dict())

    def batch(self) -> Transitions:
        """Draw a batch: real rows and synthetic ones, each part without replacement."""
        if self._model is None:
            return self.real.sample(self.num_real, self._draws)
        if self.synthetic is None:
            self.synthetic = self.sample_set()
        parts = []
        number = self.config.batch_size - self.num_real
        for table, rows in ((self.real, self.num_real), (self.synthetic, number)):
            if rows:
                parts.append(table.sample(rows, self._draws))
        return Transitions.concatenate(parts)

    @property
    def set_is_guided(self) -> bool:
        """Whether the present set is guided by `guide`."""
        first = self.set_number == 0 and self.config.first_unguided
        return self.data == "guided" and not first

    def sample_set(self) -> Transitions:
        """Sample the present synthetic set, or read what is there of it; sets before it are
        deleted."""
        config, normalizer = self.config, self._model.normalizer
        folder = None
        if self._folder is not None:
            folder = self._folder / f"set_{self.set_number:05d}"
            for old in self._folder.glob("set_*"):
                if old.name < folder.name:
                    shutil.rmtree(old, ignore_errors=True)
        guidance = None
        if self.set_is_guided:
            guidance = PolicyGuidance(self.guide, normalizer, config.guidance)
        seed = int(np.random.SeedSequence([self._seed, 2, self.set_number]).generate_state(1)[0])

        def sample() -> Tensor:
            return generate(
                self._sampler,
                config.num_trajectories,
                self._rows,
                seed,
                folder,
                config.sampling_batch_size,
                guidance,
                self._progress,
            )

        try:
            trajectories = sample()
        except CheckpointError as error:
            # damaged, or begun on another device: nothing is lost but the time to sample it
            warnings.warn(f"a synthetic set is sampled again: {error}", stacklevel=2)
            shutil.rmtree(folder)
            trajectories = sample()
        return to_transitions(normalizer.unnormalize(trajectories.to(self.device)))

    def close(self) -> None:
        """Delete the files of the present set, which a finished training needs no more."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

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
                row |= {
                    "synthetic/set": self.set_number,
                    "synthetic/mean_reward": float(self.synthetic.rewards.mean()),
                    "synthetic/terminals": float(self.synthetic.terminals.mean()),
                }
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
        """Return the agent's weights and those of the policy that the present set is of."""
        return named_weights({**self.learner.modules(), "guide": self.guide})

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that continues the training exactly."""
        return {
            "learner": self.learner.state_dict(),
            "draws": self._draws.get_state(),
            "averages": self._averages.state_dict(),
            "set_number": self.set_number,
            "best_mean_reward": self.best_mean_reward,
        }

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Any], source: str) -> None:
        """Continue from what `weights` and `state_dict` returned.

        Raises:
            CheckpointError: they are of another training.
        """
        load_named_weights({**self.learner.modules(), "guide": self.guide}, weights, source)
        self.learner.load_state_dict(state["learner"])
        self._draws.set_state(state["draws"])
        self._averages.load_state_dict(state["averages"], self.device)
        self.set_number, self.synthetic = state["set_number"], None
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
