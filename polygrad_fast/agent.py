"""PolyGRAD: a policy trained by A2C in a diffusion world model (Algorithm 3)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from polygrad_fast.arguments import as_device, as_integer, as_path
from polygrad_fast.config import TrainConfig, from_dict
from polygrad_fast.data import ActionScaler, ReplayBuffer, ResumableEnvironment, check_spaces
from polygrad_fast.data.environment import environment_name, warn_of_statistics
from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.evaluation.environments import (
    EnvironmentSource,
    EvaluationEnvironments,
    build_environment,
)
from polygrad_fast.evaluation.evaluator import Evaluator
from polygrad_fast.evaluation.returns import EpisodeStatistics
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.profiling import annotate
from polygrad_fast.ranks import current_ranks
from polygrad_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from polygrad_fast.runs.checkpoint_manager import CheckpointManager
from polygrad_fast.runs.directory import (
    difference,
    options_of,
    read_run_config,
    refuse_another_run,
)
from polygrad_fast.runs.restore import (
    checkpoint_to_load,
    checkpoint_to_resume,
    constructor_arguments,
)
from polygrad_fast.runs.run import Run
from polygrad_fast.sampling import PolicyGuidedSampler, TrajectoryBatch
from polygrad_fast.training.build import build_training
from polygrad_fast.training.environments import training_environments
from polygrad_fast.training.memory import check_sampling_memory, check_training_memory
from polygrad_fast.training.session import Session
from polygrad_fast.world_models import TrajectoryDiffusion, WorldModel

Callback = Callable[["PolyGRAD", dict[str, float]], Any]
SPLIT_OPTIONS = (
    "num_envs",
    "learning_starts",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "imagined_batch_size",
)
"""Of TrainConfig, what processes that train together have equal parts of."""


class PolyGRAD:
    """Train a policy in imagination on any `gymnasium.Env` with Box observations and actions.

    Args:
        env: environment id, a function that makes the environment, or an environment. Of the latter
            evaluations use copies, which have its wrappers, physics and everything else as they are
            now.
        preset: "default" (released code), "paper", "laptop" (locomotion on a CPU), or "quick"
            (minutes on a CPU); see `TrainConfig.from_preset`.
        seed: seeds python, numpy, torch, the environment and its action space.
        device: "auto" is CUDA where there is one, else the CPU.
        config: a full configuration instead of a preset.
        run_dir: where metrics, checkpoints and versions go; None: nothing is written.
        tensorboard: also write TensorBoard events to `run_dir`; needs the extra `tensorboard`.
        denoiser: a network of your own instead of the configured one, a module that is a
            `polygrad_fast.Denoiser` for `config.horizon`. It is moved to the device and trained in
            place, in the mode it is in; what imagines is its averaged copy, in evaluation mode. Of
            `config.denoiser` only the options of training apply.
        policy: a policy of your own, a module that is a `polygrad_fast.Policy` for actions in
            `action_scaler`'s units ([-1, 1] with `config.rescale_actions`). It is trained in place
            and acts and imagines in the mode it is in. Of `config.policy` the sizes of the value
            function and `normed_inputs`, for it, apply; `a2c.saturation_coef` above 0 penalizes the
            outputs of its module `network`.
        eval_env: what to evaluate on instead of environments like `env`: an id, a function, or an
            environment, which is then used itself, its episodes one after the other.

    Attributes:
        num_timesteps: environment steps taken so far, the prefill included, with all updates due
            after them.
        policy, world_model, normalizer, replay: what is being trained, on what.
        ranks: the processes that train together, where torch.distributed is set up: each calls the
            same methods.
        training: the loop of Algorithm 3 with its environment, learner and random streams.

    Raises:
        InputError: unknown environment or preset, unsuitable spaces, an environment that cannot be
            copied, a device that is not there, too little memory, an own module that cannot be
            used, a `run_dir` that holds another run, or an argument of another type.
    """

    def __init__(
        self,
        env: EnvironmentSource,
        preset: str = "default",
        seed: int = 0,
        device: str | torch.device | None = "auto",
        config: TrainConfig | None = None,
        run_dir: str | Path | None = None,
        tensorboard: bool = False,
        denoiser: torch.nn.Module | None = None,
        policy: torch.nn.Module | None = None,
        eval_env: EnvironmentSource | None = None,
    ):
        if config is not None and not isinstance(config, TrainConfig):
            raise InputError(
                f"config must be a TrainConfig (for instance TrainConfig.from_preset('quick')), "
                f"got {config!r}"
            )
        self.ranks = current_ranks()
        if run_dir is not None:
            run_dir = as_path(run_dir, "run_dir")
            if self.ranks.index > 0:  # the first process writes
                run_dir, tensorboard = None, False
            else:
                refuse_another_run(run_dir)
        environment = build_environment(env)
        dims = check_spaces(environment)
        # as given: "module:Name-v0" must be imported again by whoever loads the agent
        self.env_id = env if isinstance(env, str) else environment_name(environment)
        config = config if config is not None else TrainConfig.from_preset(preset)
        self.config = c = config.resolved(self.env_id)
        self.ranks.check_multiples(
            **{name: getattr(c, name) for name in SPLIT_OPTIONS},
            batch_size=c.world_model_training.batch_size,
        )
        self.preset, self.seed = preset, as_integer(seed, "seed", 0, below=2**32)
        self.device = as_device(device)
        self._memory_checked = run_dir is not None  # else `learn` checks: a loaded one may only act
        check_training_memory(c, *dims, self.device, self._memory_checked)

        own = {"denoiser": denoiser, "policy": policy}
        number = c.num_envs // self.ranks.number
        several = training_environments(environment, env, number, c.env_processes)
        self.training = build_training(
            c, several, self.seed, self.device, self.ranks, denoiser, policy
        )

        warn_of_statistics(environment)
        environments = EvaluationEnvironments(environment, env, eval_env, c.eval_processes)
        self.evaluator = Evaluator(self._act, environments, self.seed)
        self._can_learn = True
        identity = {
            "env_id": self.env_id,
            "env_given_by_id": isinstance(env, str),
            "eval_env": None if eval_env is None else environments.describe(),
            "preset": self.preset,
            "seed": self.seed,
            "own_modules": {
                name: f"{type(module).__module__}.{type(module).__qualname__}"
                for name, module in own.items()
                if module is not None
            },
            "config": dataclasses.asdict(c),
        }
        if run_dir is None:
            self.run = Run(identity, None, tensorboard)
        else:
            self.run = Run.begin(run_dir, identity, c.keep_checkpoints, tensorboard)

    @property
    def num_timesteps(self) -> int:
        """Environment steps taken so far, the prefill included, with all updates due after them."""
        return self.training.num_timesteps

    @property
    def run_dir(self) -> Path | None:
        """Where metrics and checkpoints go; None: nowhere."""
        return self.run.directory

    @property
    def policy(self) -> torch.nn.Module:
        """The current policy."""
        return self.training.learner.policy

    @property
    def world_model(self) -> WorldModel:
        """What imagines."""
        return self.training.world_model

    @property
    def denoiser(self) -> torch.nn.Module:
        """The averaged denoiser that imagines; of the world model "trajectory_diffusion" only.

        Raises:
            InputError: another world model.
        """
        return self._trajectory_diffusion("denoiser").denoiser

    @property
    def sampler(self) -> PolicyGuidedSampler:
        """What imagines; of the world model "trajectory_diffusion" only.

        Raises:
            InputError: another world model.
        """
        return self._trajectory_diffusion("sampler").sampler(self.policy)

    def _trajectory_diffusion(self, asked: str) -> TrajectoryDiffusion:
        if not isinstance(self.world_model, TrajectoryDiffusion):
            raise InputError(
                f"world_model must be 'trajectory_diffusion' for an agent's {asked}, got "
                f"{self.config.world_model!r}"
            )
        return self.world_model

    @property
    def normalizer(self) -> Normalizer:
        """The moments of the data, as all networks see them."""
        return self.training.normalizer

    @property
    def replay(self) -> ReplayBuffer:
        """The environment steps taken."""
        return self.training.replay

    @property
    def environment(self) -> ResumableEnvironment:
        """The environment trained on, of several the first one."""
        return self.training.collector.environments[0]

    @property
    def action_scaler(self) -> ActionScaler:
        """Maps the policy's actions to the environment's."""
        return self.training.action_scaler

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | None = None,
        progress_bar: bool = False,
    ) -> PolyGRAD:
        """Train for `total_timesteps` further environment steps (Algorithm 3).

        What is annealed runs from the current step to the end of this call, where an evaluation
        follows. In a run directory every call ends with a checkpoint, from which `resume` continues
        exactly: also one that is stopped, even between two updates, or ended by an error of the
        environment, the callback or the disk. Only an error within an update (NaN) leaves no state
        to continue from: then the last checkpoint is what was saved before. Ctrl-C waits for the
        current update, then raises KeyboardInterrupt.

        Args:
            total_timesteps: at least 1; the random prefill counts.
            callback: called as callback(agent, metrics) with every row of metrics; returning False
                stops the training, as `stop` does.
            progress_bar: show one, with the speed.

        Returns:
            The agent.

        Raises:
            InputError: total_timesteps < 1, another process trains in the run directory or has
                trained there meanwhile, or the environment returned something unusable.
            NonFiniteError: training met NaN; names step, quantity and last checkpoint.
            OSError: a file cannot be written; names file, step and last checkpoint.
        """
        total_timesteps = as_integer(total_timesteps, "total_timesteps", 1)
        self.ranks.check_multiples(total_timesteps=total_timesteps)
        if callback is not None and not callable(callback):
            raise InputError(f"callback must be callable, got {callback!r}")
        if not self._can_learn:
            raise InputError(
                "the best checkpoint holds weights only; load the last one to continue training"
            )
        training = self.training
        if self.num_timesteps == 0:
            self.world_model.warn(stacklevel=2)
        self._check_memory()
        training.target_timesteps = self.num_timesteps + total_timesteps
        training.stop_requested = False

        def tell(metrics: dict[str, float]) -> object:
            return None if callback is None else callback(self, metrics)

        Session(training, self.run, self.evaluator, tell, progress_bar).train()
        return self

    def step(self) -> None:
        """Take one environment step and all updates due after it, as `learn` does, but without
        evaluations, metrics and checkpoints: for loops and measurements of one's own.

        Raises:
            InputError: the environment returned something unusable.
            NonFiniteError: an update met NaN.
        """
        self.training.stop_requested = False
        if self.training.step():  # else `stop` left some updates for the next call
            self.training.count_step()

    def stop(self) -> None:
        """Let the running `learn` end after its current update, with a checkpoint; safe in a signal
        handler."""
        self.training.stop_requested = True

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from training in the run directory, as `learn` does.

        Raises:
            InputError: another process is training there, or has since this agent was made or
                loaded.
        """
        return self.run.locked()

    def _check_memory(self) -> None:
        """Check, before the first training in this process, that there is memory for it."""
        if not self._memory_checked:
            weights = sum(tensor.nbytes for tensor in self.training.weights().values())
            dims = self.replay.observation_dim, self.replay.action_dim
            held = weights + self.replay.nbytes
            check_training_memory(self.config, *dims, self.device, held=held)
            self._memory_checked = True

    def imagine(self, num_trajectories: int, normalized: bool = False) -> TrajectoryBatch:
        """Imagine trajectories under the current policy, from observations in the replay buffer.

        Raises:
            InputError: fewer than one trajectory asked for, more than the memory holds, or no
                window in the buffer yet.
        """
        num_trajectories = as_integer(num_trajectories, "num_trajectories", 1)
        if num_trajectories > self.config.imagined_batch_size:
            dims = self.replay.observation_dim, self.replay.action_dim
            check_sampling_memory(self.config, *dims, num_trajectories, self.device)
        return self.training.imagine(num_trajectories, normalized)

    def predict(
        self, observation: np.ndarray, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        """Return the action for an observation, in the environment's own units, within its bounds.

        Args:
            observation: [S] or [N, S], raw.
            deterministic: take the policy's mean instead of a sample.

        Returns:
            The action, [A] or [N, A], and None (the state that Stable-Baselines3 returns).

        Raises:
            InputError: wrong shape or dtype, or a value that is not finite in float32.
            NonFiniteError: the policy's weights are not finite.
        """
        return self._act(observation, deterministic), None

    def _act(self, observation: np.ndarray, deterministic: bool) -> np.ndarray:
        generator = None if deterministic else self.training.streams.predictions
        return self.training.actor.predict(observation, generator)

    def evaluate(
        self, num_episodes: int = 10, seed: int | None = None, deterministic: bool = True
    ) -> EpisodeStatistics:
        """Play whole episodes on other environments than the training one, which is not touched.

        Args:
            num_episodes: at least 1.
            seed: of the episodes; None: the agent's, so that all its evaluations play the same
                episodes.
            deterministic: act by the policy's mean.

        Raises:
            InputError: fewer than one episode, a seed that is no integer of at least 0, or an
                environment that returns something unusable, as a reward that is not finite.
        """
        num_episodes = as_integer(num_episodes, "num_episodes", 1)
        seed = None if seed is None else as_integer(seed, "seed", 0)
        return self.evaluator.evaluate(num_episodes, seed, deterministic)

    def best_timestep(self) -> int | None:
        """Return the environment step whose policy `run_dir` keeps as the best, None if there is
        none."""
        return self.run.best_timestep()

    def make_evaluation_environment(self, render_mode: str | None = None) -> gymnasium.Env:
        """Return another environment like those that `evaluate` plays on; where `eval_env` is an
        environment, that one."""
        return self.evaluator.environments.make(render_mode)

    def save(self, path: str | Path) -> Path:
        """Save everything needed to predict and to continue training, as a checkpoint directory.

        Raises:
            InputError: `path` is no path.
            CheckpointError: `path` exists and is no checkpoint.
        """
        path = as_path(path, "path")
        with annotate("checkpoint"):
            state = self.training.state_dict() | self.evaluator.state_dict()
            metadata = self.run.metadata(self.num_timesteps)
            weights = self.training.weights()
            return self.ranks.first(lambda: save_checkpoint(path, weights, state, metadata))

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: EnvironmentSource | None = None,
        device: str | torch.device | None = "auto",
        checkpoint: str = "last",
        tensorboard: bool = False,
        denoiser: torch.nn.Module | None = None,
        policy: torch.nn.Module | None = None,
        eval_env: EnvironmentSource | None = None,
    ) -> PolyGRAD:
        """Load an agent from `save`'s directory or from a run directory.

        Args:
            path: what `save` wrote, or a run directory, whose run then continues with `learn`.
            env: the environment, where the saved one has no registered id.
            device: as in the constructor.
            checkpoint: of a run directory, "last" or "best" (best evaluated; its weights only, so
                it can act, but not continue training).
            tensorboard: as in the constructor.
            denoiser, policy: modules of the same structure where the agent was made with own ones;
                their weights are overwritten.
            eval_env: as in the constructor; one that the saved agent had is kept where it was an
                id, and must be given again where it was not.

        Raises:
            InputError: an own module is missing, or one is given where the agent has none.
            CheckpointError: nothing there, a damaged checkpoint, or one of another configuration.
        """
        path = as_path(path, "path")
        given = dict(env=env, device=device, denoiser=denoiser, policy=policy, eval_env=eval_env)
        found, checkpoints = checkpoint_to_load(path, checkpoint)
        wanted = None if checkpoints is None else read_run_config(path)
        agent = cls._from_checkpoint(found, given, wanted)
        if checkpoints is not None and checkpoint == "last":
            agent._continue_in(checkpoints, tensorboard)
        return agent

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        env: EnvironmentSource | None = None,
        device: str | torch.device | None = "auto",
        tensorboard: bool = False,
        denoiser: torch.nn.Module | None = None,
        policy: torch.nn.Module | None = None,
        eval_env: EnvironmentSource | None = None,
    ) -> PolyGRAD:
        """Load a run to continue it; a run killed before its first checkpoint starts anew.

        Args are those of `load`.

        Raises:
            CheckpointError: no run there, its configuration cannot be read, or its checkpoints are
                all damaged or gone.
        """
        run_dir = as_path(run_dir, "run_dir")
        stored = read_run_config(run_dir)
        given = dict(env=env, device=device, denoiser=denoiser, policy=policy, eval_env=eval_env)
        config = from_dict(stored["config"], TrainConfig)
        found, checkpoints = checkpoint_to_resume(run_dir, config.checkpoint_interval)
        if found is not None:
            agent = cls._from_checkpoint(found, given, stored)
        else:
            agent = cls(config=config, **constructor_arguments(stored, given))
        agent._continue_in(checkpoints, tensorboard)
        return agent

    @classmethod
    def _from_checkpoint(
        cls, path: Path, given: dict[str, Any], wanted: dict[str, Any] | None
    ) -> PolyGRAD:
        """Load one checkpoint; where the run's config.json is given as `wanted`, it must be of that
        run."""
        weights, state, metadata = load_checkpoint(path)
        if wanted is not None:
            differs = difference(options_of(wanted), options_of(metadata))
            if differs is not None:
                name, wanted_value, got = differs
                raise CheckpointError(
                    f"checkpoint {path} is of another run than its config.json: {name} must be "
                    f"{wanted_value}, got {got}"
                )
        config = from_dict(metadata["config"], TrainConfig)
        agent = cls(config=config, **constructor_arguments(metadata, given))
        agent.training.load_weights(weights)
        agent.training.num_timesteps = metadata["num_timesteps"]
        agent._can_learn = state is not None
        if state is not None:
            try:
                agent.training.load_state_dict(state)
                agent.evaluator.load_state_dict(state)
            except (KeyError, TypeError, RuntimeError) as error:
                raise CheckpointError(f"checkpoint {path} cannot be restored: {error!r}") from error
        return agent

    def _continue_in(self, checkpoints: CheckpointManager, tensorboard: bool) -> None:
        if self.ranks.index == 0:
            checkpoints.keep_last = self.config.keep_checkpoints
            self.run = Run(self.run.identity, checkpoints, tensorboard)

    def extend(self, total_timesteps: int) -> None:
        """Set the length of the run that `run_dir` describes, so that resuming it knows it too.

        Raises:
            InputError: total_timesteps < 1, or another process trains in the run directory, which
                then stays as it is.
            OSError: config.json cannot be written; names step and last checkpoint.
        """
        config = dataclasses.replace(self.config, total_timesteps=total_timesteps)
        with self.locked():
            self.run.extend(self.num_timesteps, dataclasses.asdict(config))
        self.config = self.training.config = config
