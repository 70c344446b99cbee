"""PolyGRAD: a policy trained by A2C in a diffusion world model (Algorithm 3)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from polygrad_fast.arguments import as_integer, as_path
from polygrad_fast.config import TrainConfig, from_dict
from polygrad_fast.data import (
    ActionScaler,
    ReplayBuffer,
    ResumableEnvironment,
    check_spaces,
)
from polygrad_fast.data.checks import as_finite_float32
from polygrad_fast.data.environment import environment_name, warn_of_statistics
from polygrad_fast.diffusion.ddpm import warn_of_amplified_errors
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.evaluation.environments import (
    EnvironmentSource,
    EvaluationEnvironments,
    build_environment,
)
from polygrad_fast.evaluation.returns import EpisodeStatistics, evaluate_policy
from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy, ValueFunction
from polygrad_fast.profiling import annotate
from polygrad_fast.protocols import check_denoiser, check_policy, policy_moments
from polygrad_fast.runs.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from polygrad_fast.runs.checkpoint_manager import CheckpointManager
from polygrad_fast.runs.directory import (
    difference,
    locked,
    options_of,
    read_run_config,
    refuse_another_run,
    refuse_lost_progress,
)
from polygrad_fast.runs.files import write_json_atomic
from polygrad_fast.runs.interrupts import stop_on_signals
from polygrad_fast.runs.metrics import MetricsLog, TensorboardLog
from polygrad_fast.runs.versions import versions
from polygrad_fast.sampling import PolicyGuidedSampler, TrajectoryBatch
from polygrad_fast.training.estimate import (
    Durations,
    TimeLeft,
    num_updates,
    remaining_counts,
    time_left,
)
from polygrad_fast.training.memory import check_sampling_memory, check_training_memory
from polygrad_fast.world_models import Autoregressive, TrajectoryDiffusion, WorldModel

Callback = Callable[["PolyGRAD", dict[str, float]], Any]


class PolyGRAD:
    """Train a policy in imagination on any `gymnasium.Env` with Box observations and actions.

    Args:
        env: environment id, a function that makes the environment, or an environment. Of the latter
            evaluations use copies, which have its wrappers, physics and everything else as they are
            now.
        preset: "default" (released code), "paper", or "quick" (CPU-sized); see `TrainConfig`.
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
        policy, denoiser, normalizer, replay: what is being trained, on what.

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
        if run_dir is not None:
            run_dir = as_path(run_dir, "run_dir")
            refuse_another_run(run_dir)
        self._env_source, self._eval_env_source = env, eval_env
        environment = build_environment(env)
        observation_dim, action_dim = check_spaces(environment)
        # as given: "module:Name-v0" must be imported again by whoever loads the agent
        self.env_id = env if isinstance(env, str) else environment_name(environment)
        config = config if config is not None else TrainConfig.from_preset(preset, self.env_id)
        self.config = config.resolved(self.env_id)
        self.preset, self.seed = preset, as_integer(seed, "seed", 0, below=2**32)
        self.device = _resolve_device(device)
        sizes = observation_dim, action_dim
        trains = run_dir is not None  # else `learn` checks: a loaded agent may only act
        check_training_memory(self.config, *sizes, self.device, trains)

        # independent streams, also between neighbouring seeds
        streams = np.random.SeedSequence(self.seed).spawn(5)
        seeds = [int(stream.generate_state(1, np.uint64)[0]) for stream in streams]
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(seeds[0])
        self.generator = torch.Generator(self.device).manual_seed(seeds[1])
        self._acting_generator = torch.Generator().manual_seed(seeds[2])
        # predictions of a user's callback must not change the run
        self._prediction_generator = torch.Generator().manual_seed(seeds[3])

        c = self.config
        self.environment = ResumableEnvironment(environment, seeds[4])
        self.action_scaler = ActionScaler(environment.action_space, c.rescale_actions)
        self.replay = ReplayBuffer(
            c.replay_capacity, c.horizon, observation_dim, action_dim, self.device
        )
        self.normalizer = Normalizer(observation_dim, action_dim).to(self.device)
        own = {"denoiser": denoiser, "policy": policy}
        self._own_modules = {
            name: f"{type(module).__module__}.{type(module).__qualname__}"
            for name, module in own.items()
            if module is not None
        }
        self.world_model = self._build_world_model(denoiser)
        if policy is None:
            policy = GaussianPolicy(
                observation_dim,
                action_dim,
                c.policy.hidden_dim,
                c.policy.num_layers,
                c.policy.init_std,
                c.policy.min_std,
                c.policy.normed_inputs,
                self.normalizer,
            )
        else:
            self._check_own_policy(policy)
        value_function = ValueFunction(observation_dim, c.policy.hidden_dim, c.policy.num_layers)
        self.actor_critic = ActorCritic(
            policy.to(self.device),
            value_function.to(self.device),
            self.normalizer,
            c.a2c,
            c.policy.normed_inputs,
        )
        self.world_model.prepare(policy)

        self.num_timesteps = 0
        self._target_timesteps = c.total_timesteps
        self._best_mean_reward: float | None = None
        self._sums: dict[str, list[float]] = {}
        self._action: np.ndarray | None = None  # drawn, but not taken yet
        # updates left of the step after num_timesteps, where that is taken, but not finished
        self._updates_left: dict[str, int] | None = None
        self._consistent = True  # whether training can go on from the state as it is
        self._environment_state: dict[str, Any] | None = None  # to restore before the next step
        self._locked = False
        warn_of_statistics(environment)
        self.evaluation_environments = EvaluationEnvironments(environment, env, eval_env)
        self._stop_requested = False
        self._can_learn = True
        self._memory_checked = trains
        if tensorboard and run_dir is None:
            raise InputError("tensorboard=True needs a run_dir, got None")
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "tensorboard=True needs the extra 'tensorboard': "
                "pip install 'polygrad-fast[tensorboard]'"
            )
        self._tensorboard = tensorboard
        self.run_dir: Path | None = None
        self._checkpoints: CheckpointManager | None = None
        if run_dir is not None:
            self._open_run_dir(run_dir)

    def _build_world_model(self, denoiser: torch.nn.Module | None) -> WorldModel:
        """Return the configured world model, with an own denoiser where one is given."""
        bounds = self.action_scaler.low, self.action_scaler.high
        if self.config.world_model == "autoregressive":
            if denoiser is not None:
                raise InputError(
                    f"denoiser={type(denoiser).__name__} needs the world model "
                    f"'trajectory_diffusion', got {self.config.world_model!r}"
                )
            return Autoregressive(
                self.config.autoregressive,
                self.config.horizon,
                self.normalizer,
                bounds,
                self.device,
            )
        if denoiser is not None:
            self._check_own_denoiser(denoiser)
        return TrajectoryDiffusion(self.config, self.normalizer, bounds, self.device, denoiser)

    def _check_own_denoiser(self, denoiser: torch.nn.Module) -> None:
        """Raise InputError unless this is a denoiser for the environment and configuration."""
        if isinstance(denoiser, torch.nn.Module):
            denoiser.to(self.device)
        num_steps = self.config.schedule.num_train_timesteps
        check_denoiser(denoiser, num_steps, self.device, trained=True)
        for name, wanted in (
            ("observation_dim", self.environment.observation_dim),
            ("action_dim", self.environment.action_dim),
            ("horizon", self.config.horizon),
        ):
            got = getattr(denoiser, name)
            if got != wanted:
                source = "config" if name == "horizon" else f"environment {self.env_id}"
                raise InputError(
                    f"denoiser {type(denoiser).__name__} has {name} {got}, the {source} {wanted}"
                )

    def _check_own_policy(self, policy: torch.nn.Module) -> None:
        """Raise InputError unless this is a policy for the environment that can be trained."""
        if isinstance(policy, torch.nn.Module):
            policy.to(self.device)
        shapes = (), (3,), (2, self.config.horizon)  # as it acts, evaluates and imagines
        check_policy(policy, self.normalizer, shapes, self.device, trained=True)

    @property
    def policy(self) -> torch.nn.Module:
        """The current policy."""
        return self.actor_critic.policy

    @property
    def denoiser(self) -> torch.nn.Module:
        """The averaged denoiser that imagines; of the world model "trajectory_diffusion" only."""
        return self.world_model.denoiser

    @property
    def sampler(self) -> PolicyGuidedSampler:
        """What imagines; of the world model "trajectory_diffusion" only."""
        return self.world_model.sampler(self.policy)

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
        if callback is not None and not callable(callback):
            raise InputError(f"callback must be callable, got {callback!r}")
        if not self._can_learn:
            raise InputError(
                "the best checkpoint holds weights only; load the last one to continue training"
            )
        if self.num_timesteps == 0:
            self._warn()
        self._check_memory()
        self._target_timesteps = self.num_timesteps + total_timesteps
        self._stop_requested = False
        with contextlib.ExitStack() as stack:
            if self.config.cpu_threads is not None and self.device.type == "cpu":
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self.config.cpu_threads)
            stack.enter_context(self.locked())
            in_python = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            signals = [signal.SIGINT] if in_python else []
            interrupts = stack.enter_context(stop_on_signals(self.stop, signals))
            try:
                sinks = [stack.enter_context(sink) for sink in self._open_logs()]
                bar = stack.enter_context(
                    _progress_bar(self.num_timesteps, self._target_timesteps, progress_bar)
                )
                self._run(bar, sinks, callback)
            except BaseException as error:
                self._save_before(error)
                explained = self._explained(error)
                if explained is error:
                    raise
                raise explained from error
            if interrupts:
                raise self._explained(KeyboardInterrupt())
        return self

    def _warn(self) -> None:
        """Say what is known to go wrong with this configuration."""
        if isinstance(self.world_model, TrajectoryDiffusion):
            schedule = self.world_model.schedule
            warn_of_amplified_errors(schedule, self.config.sampler, stacklevel=3)

    def step(self) -> None:
        """Take one environment step and all updates due after it, as `learn` does, but without
        evaluations, metrics and checkpoints: for loops and measurements of one's own.

        Raises:
            InputError: the environment returned something unusable.
            NonFiniteError: an update met NaN.
        """
        speed = _Speed(self.num_timesteps)
        self._stop_requested = False
        self._restore_environment()
        if self._updates_left is None:
            self._interact(speed)
        if self._take_updates(speed):  # else `stop` left some for the next call
            self.num_timesteps, self._updates_left = self.num_timesteps + 1, None

    def stop(self) -> None:
        """Let the running `learn` end after its current update, with a checkpoint; safe in a signal
        handler."""
        self._stop_requested = True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in the run directory, as `learn` does.

        Raises:
            InputError: another process is training there, or has since this agent was made or
                loaded.
        """
        if self.run_dir is None or self._locked:
            yield
            return
        with locked(self.run_dir):
            if self._checkpoints.others_saved():
                raise InputError(
                    f"another process has trained in {self.run_dir} since this agent was made or "
                    f"loaded; load it again"
                )
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def _check_memory(self) -> None:
        """Check, before the first training in this process, that there is memory for it."""
        if not self._memory_checked:
            weights = sum(tensor.nbytes for tensor in self._weights().values())
            c, replay = self.config, self.replay
            sizes = replay.observation_dim, replay.action_dim
            check_training_memory(c, *sizes, self.device, held=weights + replay.nbytes)
            self._memory_checked = True

    def _run(self, bar, sinks: list, callback: Callback | None) -> None:
        """Take steps until the target, or until told to stop."""
        speed = _Speed(self.num_timesteps)
        unsaved = estimated = False

        def write(step: int, metrics: dict[str, float]) -> None:
            left = self._time_left(step, speed) if estimated else None
            bar.set_postfix_str(self._postfix(metrics, left))
            for sink in sinks:
                sink.write(step, metrics)

        def tell(metrics: dict[str, float]) -> None:
            if callback is not None and callback(self, metrics) is False:
                self.stop()

        if self.num_timesteps == 0:
            metrics = self._timed_evaluation(0, speed)
            write(0, metrics)
            tell(metrics)
        self._restore_environment()
        while self._updates_left is not None or (
            self.num_timesteps < self._target_timesteps and not self._stop_requested
        ):
            unsaved = True
            if self._updates_left is None:
                self._interact(speed)
            if not self._take_updates(speed):
                break
            step = self.num_timesteps + 1
            metrics = self._due_metrics(step, speed)
            if metrics:
                write(step, metrics)
                self._sums = {}
            self.num_timesteps, self._updates_left = step, None
            bar.update(1)
            if metrics:
                tell(metrics)
            if not estimated and step > self.config.learning_starts:
                estimated = self._estimate(bar, speed)
            if step % self.config.checkpoint_interval == 0:
                self._save_checkpoint()
                unsaved = False
        if unsaved:
            self._save_checkpoint()

    def _save_before(self, error: BaseException) -> None:
        """Save the state before an error ends the training, if it is one to continue from."""
        if self._environment_state is None:  # the error may have left the environment anywhere
            self._environment_state = self.environment.state_dict()
        at_once = isinstance(error, KeyboardInterrupt) and self._stop_requested
        if self._consistent and self.num_timesteps > 0 and not at_once:
            # where saving itself fails, the last checkpoint is an older one
            with contextlib.suppress(OSError, NonFiniteError):
                self._save_checkpoint()

    def _explained(self, error: BaseException) -> BaseException:
        """Return an error of `learn` with the step and the last checkpoint in it, or in its
        notes."""
        step = self.num_timesteps + (self._updates_left is not None)
        return self._placed(error, f"training stopped at environment step {step}")

    def _placed(self, error: BaseException, where: str) -> BaseException:
        """Return an error with a place and the last checkpoint in it, or in its notes."""
        last = self._last_checkpoint()
        if isinstance(error, (InputError, NonFiniteError)):
            return type(error)(f"{where}: {error}; {last}")
        if isinstance(error, OSError) and error.errno is not None:  # of a file
            name = f"{error.filename}: " if error.filename else ""
            return OSError(error.errno, f"{where}: {name}{error.strerror or error}; {last}")
        error.add_note(f"{where}; {last}")
        return error

    def _estimate(self, bar, speed: _Speed) -> bool:
        """Show how long the rest takes, and warn if that is long; return False if neither is known
        yet."""
        left = self._time_left(self.num_timesteps, speed)
        is_long = left.seconds > 86400
        if not left.measured and not is_long:
            return False
        if is_long:
            bar.clear()  # the warning gets a line of its own
            advice = "fewer environment steps or a smaller imagined_batch_size shorten the run"
            if self.device.type == "cpu" and self.preset != "quick":
                advice = "the preset 'quick' is made for a CPU"
            warnings.warn(
                f"at the speed measured so far, the remaining "
                f"{self._target_timesteps - self.num_timesteps:,} environment steps take {left} "
                f"on {self.device.type!r}; {advice}",
                stacklevel=4,
            )
        bar.set_postfix_str(self._postfix({}, left))
        return True

    def _time_left(self, step: int, speed: _Speed) -> TimeLeft:
        counts = remaining_counts(self.config, step, self._target_timesteps)
        return time_left(speed.durations.typical(), counts)

    @contextlib.contextmanager
    def _indivisible(self) -> Iterator[None]:
        """What an error inside leaves half done is no state to continue from."""
        self._consistent = False
        yield
        self._consistent = True

    def _restore_environment(self) -> None:
        """Make the environment what it was at the checkpoint, or before an error in it."""
        if self._environment_state is not None:
            if not self.environment.load_state_dict(self._environment_state):
                self.replay.end_episode()
                self._action = None  # was drawn for another observation
            self._environment_state = None

    def _interact(self, speed: _Speed) -> None:
        """Take one environment step and count the updates that are due after it."""
        c = self.config
        start = time.perf_counter()
        if not self.environment.running:
            with annotate("env_reset"):
                self.environment.reset()
        observation = self.environment.observation
        if self._action is None:  # else the environment failed in this step before
            with annotate("act"), self._indivisible():
                if self.num_timesteps < c.learning_starts:
                    sampled = self.environment.sample_action()
                    self._action = self.action_scaler.from_environment(sampled)
                else:
                    self._action = self._act(observation)
        action = self._action
        environment_action = self.action_scaler.to_environment(action)
        with annotate("env_step"):
            _, reward, terminated, truncated = self.environment.step(environment_action)
        with self._indivisible():
            if c.sampler.denoiser_actions == "clipped":
                action = np.clip(action, self.action_scaler.low, self.action_scaler.high)
            with annotate("replay_add"):
                self.replay.add(observation, action, reward, terminated, truncated)
            self._action = None
            trained_steps = self.num_timesteps + 1 - c.learning_starts
            if terminated or truncated:
                self._add_metric("train/episode_return", self.environment.episode_return)
                self._add_metric("train/episode_length", self.environment.episode_length)
                if trained_steps > 0 and c.normalizer.refresh == "episode":
                    self._refresh_normalizer()
            if trained_steps == 0:
                self._refresh_normalizer()
            pretrain = c.world_model_training.pretrain_updates if trained_steps == 0 else 0
            delayed = trained_steps - c.policy_delay_steps
            self._updates_left = {
                "model_update": pretrain
                + _due(trained_steps, c.world_model_training.updates_per_env_step),
                "policy_update": _due(delayed, c.policy_updates_per_env_step),
            }
        speed.durations.add("env_step", time.perf_counter() - start)

    def _take_updates(self, speed: _Speed) -> bool:
        """Take the updates that are left; return False where `stop` left some."""
        for name, take in (
            ("model_update", self._update_model),
            ("policy_update", self._update_policy),
        ):
            while self._updates_left[name] > 0:
                if self._stop_requested:
                    return False
                start = time.perf_counter()
                with self._indivisible():
                    take(speed)
                    self._updates_left[name] -= 1
                speed.durations.add(name, time.perf_counter() - start)
        return True

    def _refresh_normalizer(self) -> None:
        with annotate("normalizer_update"):
            self.normalizer.update(self.replay.moments(), self.config.normalizer.min_std())

    def _update_model(self, speed: _Speed) -> None:
        with annotate("model_update"):
            batch_size = self.config.world_model_training.batch_size
            windows = self.replay.sample(batch_size, self.generator)
            losses = self.world_model.update(windows, self.generator)
            values = torch.stack(list(losses.values())).tolist()
            for name, value in zip(losses, values, strict=True):
                if not math.isfinite(value):
                    part, _, quantity = name.partition("/")
                    raise NonFiniteError(f"the {part}'s {quantity} is {value}")
                self._add_metric(name, value)
            speed.updates += 1

    def _update_policy(self, speed: _Speed) -> None:
        with annotate("policy_update"):
            start = time.perf_counter()
            batch = self.imagine(self.config.imagined_batch_size, normalized=True)
            with annotate("check_finite"):
                fields = ("observations", "actions", "rewards", "terminals")
                finite = torch.stack(
                    [torch.isfinite(getattr(batch, name)).all() for name in fields]
                )
                for name, fine in zip(fields, finite.tolist(), strict=True):
                    if not fine:
                        raise NonFiniteError(f"the imagined {name} are not finite")
            speed.add_sample(time.perf_counter() - start)
            terminals = self.normalizer.unnormalize(batch.terminals, "terminals")
            with annotate("a2c_update"):
                metrics = self.actor_critic.update(
                    batch.observations,
                    batch.actions,
                    batch.rewards,
                    (terminals > 0.5).to(batch.rewards.dtype),
                    progress=min(1.0, (self.num_timesteps + 1) / self._target_timesteps),
                )
            tuned = self.world_model.feedback(metrics)
            for name, value in metrics.items():
                self._add_metric(f"a2c/{name}", value)
            for name, value in tuned.items():
                self._add_metric(name, value)
            speed.updates += 1

    def imagine(self, num_trajectories: int, normalized: bool = False) -> TrajectoryBatch:
        """Imagine trajectories under the current policy, from observations in the replay buffer.

        Raises:
            InputError: fewer than one trajectory asked for, more than the memory holds, or no
                window in the buffer yet.
        """
        num_trajectories = as_integer(num_trajectories, "num_trajectories", 1)
        if num_trajectories > self.config.imagined_batch_size:
            sizes = self.replay.observation_dim, self.replay.action_dim
            check_sampling_memory(self.config, *sizes, num_trajectories, self.device)
        with annotate("imagine"):
            observations = self.replay.sample_initial_observations(num_trajectories, self.generator)
            if normalized:
                observations = self.normalizer.normalize(observations, "observations")
            return self.world_model.imagine(observations, self.policy, self.generator, normalized)

    def _moments(self, observations: Tensor) -> Tensor:
        """Return the policy's mean and std at raw observations, on the CPU: [..., S] -> [2, ...,
        A]."""
        moments = policy_moments(self.policy, self.normalizer, observations, normalized=False)
        return torch.stack(moments).cpu()

    @torch.no_grad()
    def _act(self, observation: np.ndarray) -> np.ndarray:
        mean, std = self._moments(torch.tensor(observation, device=self.device))
        noise = torch.randn(mean.shape, generator=self._acting_generator)
        action = (mean + std * noise).numpy()
        if not np.isfinite(action).all():
            self._check_too_large(observation)
            raise NonFiniteError(f"the policy's action is {action.tolist()}")
        return action

    def _check_too_large(self, observation: np.ndarray) -> None:
        """Blame an observation where a policy of finite weights gave a result that is not."""
        if all(torch.isfinite(weight).all() for weight in self.policy.parameters()):
            largest = np.unravel_index(np.abs(observation).argmax(), observation.shape)
            raise InputError(
                f"observation{[int(i) for i in largest]} is {observation[largest]:g}, so large "
                f"that the policy's mean is not finite, wanted less"
            )

    @torch.no_grad()
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
        if isinstance(observation, Tensor):
            observation = observation.detach().cpu()
        try:
            array = np.asarray(observation)
        except ValueError as error:  # rows of different lengths
            raise InputError(f"observation cannot be read as an array: {error}") from error
        size = self.environment.observation_dim
        if array.ndim not in (1, 2) or array.shape[-1] != size:
            raise InputError(
                f"observation of shape {array.shape} given, wanted [{size}] or [N, {size}]"
            )
        if array.dtype.kind not in "iuf":
            raise InputError(f"observation of dtype {array.dtype} given, wanted real numbers")
        array = as_finite_float32(array, array.shape, "observation")
        inputs = torch.from_numpy(array).to(self.device)
        mean, std = self._moments(inputs)
        if not torch.isfinite(mean).all():
            self._check_too_large(array)
            raise NonFiniteError("the policy's mean is not finite")
        if not deterministic:
            mean = mean + std * torch.randn(mean.shape, generator=self._prediction_generator)
        return self.action_scaler.to_environment(mean.numpy()), None

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
        seeds = (
            np.random.default_rng(self.seed if seed is None else as_integer(seed, "seed", 0))
            .integers(2**31, size=num_episodes)
            .tolist()
        )
        with annotate("evaluation"):
            return evaluate_policy(
                lambda observations: self.predict(observations, deterministic)[0],
                self.evaluation_environments.take(num_episodes),
                seeds,
            )

    def best_timestep(self) -> int | None:
        """Return the environment step whose policy `run_dir` keeps as the best, None if there is
        none."""
        path = self._checkpoints.best() if self._checkpoints is not None else None
        return None if path is None else int(read_metadata(path)["num_timesteps"])

    def make_evaluation_environment(self, render_mode: str | None = None) -> gymnasium.Env:
        """Return another environment like those that `evaluate` plays on; where `eval_env` is an
        environment, that one."""
        return self.evaluation_environments.make(render_mode)

    def _add_metric(self, name: str, value: float) -> None:
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1.0

    def _due_metrics(self, step: int, speed: _Speed) -> dict[str, float]:
        """Return the row of metrics due at a step, or nothing."""
        c = self.config
        last = step == self._target_timesteps
        metrics: dict[str, float] = {}
        if last or (step > c.learning_starts and step % c.eval_interval == 0):
            metrics = self._timed_evaluation(step, speed)
        if metrics or step % c.log_interval == 0 or last:
            metrics |= {name: total / count for name, (total, count) in self._sums.items()}
            metrics |= speed.read(step)
        return metrics

    def _timed_evaluation(self, step: int, speed: _Speed) -> dict[str, float]:
        start = time.perf_counter()
        metrics = self._evaluate_and_keep_best(step)
        speed.durations.add("evaluation", time.perf_counter() - start)
        return metrics

    def _evaluate_and_keep_best(self, step: int) -> dict[str, float]:
        result = self.evaluate(self.config.eval_episodes)
        # of equals the later one, which is trained longer; older checkpoints may hold a NaN
        best = self._best_mean_reward
        if best is None or not result.mean_reward < best:
            if self._checkpoints is not None:
                with annotate("checkpoint"):
                    metadata = self._metadata() | {"num_timesteps": step}
                    self._checkpoints.save_best(self._weights(), metadata)
            self._best_mean_reward = result.mean_reward
        return {
            "eval/mean_reward": result.mean_reward,
            "eval/std_reward": result.std_reward,
            "eval/mean_episode_length": float(result.lengths.mean()),
            "eval/best_mean_reward": self._best_mean_reward,
        }

    def _postfix(self, metrics: dict[str, float], left: TimeLeft | None) -> str:
        shown = []
        if "time/env_steps_per_s" in metrics:
            shown.append(f"{metrics['time/env_steps_per_s']:.0f} env steps/s")
        if "time/updates_per_s" in metrics:
            shown.append(f"{metrics['time/updates_per_s']:.0f} updates/s")
        if "time/sample_ms" in metrics:
            shown.append(f"{metrics['time/sample_ms']:.1f} ms/sample")
        if self._best_mean_reward is not None:
            shown.append(f"best return {self._best_mean_reward:.0f}")
        if left is not None:
            shown.append(f"{left} left")
        return ", ".join(shown)

    def _open_logs(self) -> list[MetricsLog | TensorboardLog]:
        if self.run_dir is None:
            return []
        # the row of step 0 is written by this call, those up to num_timesteps were written before
        resume_step = self.num_timesteps or -1
        logs: list = [MetricsLog(self.run_dir / "metrics.csv", resume_step)]
        if self._tensorboard:
            logs.append(TensorboardLog(self.run_dir, resume_step))
        return logs

    def _open_run_dir(self, run_dir: Path) -> None:
        found = versions()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            with locked(run_dir):
                refuse_another_run(run_dir)  # that another process has begun meanwhile
                write_json_atomic(run_dir / "versions.json", found)
                write_json_atomic(run_dir / "config.json", self._metadata())
        except OSError as error:
            raise InputError(f"run directory {run_dir} cannot be written: {error}") from error
        self._attach(CheckpointManager(run_dir), run_dir)

    def _attach(
        self, checkpoints: CheckpointManager, run_dir: Path, tensorboard: bool = False
    ) -> None:
        self.run_dir = run_dir
        self._tensorboard = self._tensorboard or tensorboard
        self._checkpoints = checkpoints
        self._checkpoints.keep_last = self.config.keep_checkpoints

    def _metadata(self) -> dict[str, Any]:
        return {
            "env_id": self.env_id,
            "env_given_by_id": isinstance(self._env_source, str),
            "eval_env": self._describe_eval_env(),
            "preset": self.preset,
            "seed": self.seed,
            "num_timesteps": self.num_timesteps,
            "own_modules": self._own_modules,
            "config": dataclasses.asdict(self.config),
        }

    def _describe_eval_env(self) -> dict[str, Any] | None:
        source = self._eval_env_source
        if source is None:
            return None
        if isinstance(source, str):
            return {"id": source, "given_by_id": True}
        (environment,) = self.evaluation_environments.take(1)
        return {"id": environment_name(environment), "given_by_id": False}

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {
            **self.world_model.modules(),
            "normalizer": self.normalizer,
            **self.actor_critic.modules(),
        }

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, module in self._modules().items()
            for key, tensor in module.state_dict().items()
        }

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, module in self._modules().items():
            prefix = f"{name}."
            part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                raise CheckpointError(
                    f"the checkpoint's {name} is not of this configuration: "
                    f"{str(error).splitlines()[-1].strip()}"
                ) from error

    def _state(self) -> dict[str, Any]:
        numpy_state = np.random.get_state()
        return {
            "num_timesteps": self.num_timesteps,
            "best_mean_reward": self._best_mean_reward,
            "sums": self._sums,
            "action": None if self._action is None else torch.from_numpy(self._action),
            "begun_step": self._updates_left,
            **self.world_model.state_dict(),
            "actor_critic": self.actor_critic.state_dict(),
            "replay": self.replay.state_dict(),
            "environment": self._environment_state or self.environment.state_dict(),
            "device_type": self.device.type,
            "generator": self.generator.get_state(),
            "acting_generator": self._acting_generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "python_rng": json.dumps(random.getstate()),
            "numpy_rng": json.dumps([numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]]),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.num_timesteps = state["num_timesteps"]
        self._best_mean_reward = state["best_mean_reward"]
        self._sums = {name: list(entry) for name, entry in state["sums"].items()}
        self.world_model.load_state_dict(state)
        self.actor_critic.load_state_dict(state["actor_critic"])
        self.replay.load_state_dict(state["replay"])
        if state["device_type"] == self.device.type:
            self.generator.set_state(state["generator"])
        else:  # generators of different devices cannot take over each other's state
            entropy = [self.seed, self.num_timesteps]
            self.generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            warnings.warn(
                f"the checkpoint was written on {state['device_type']!r}: on {self.device.type!r} "
                f"training continues with new random numbers",
                stacklevel=4,
            )
        self._acting_generator.set_state(state["acting_generator"])
        torch.set_rng_state(state["torch_rng"])
        version, internal, gauss = json.loads(state["python_rng"])
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = json.loads(state["numpy_rng"])
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        action = state.get("action")
        self._action = None if action is None else action.numpy()
        self._updates_left = state.get("begun_step")
        self._environment_state = state["environment"]

    def _save_checkpoint(self) -> None:
        if self._checkpoints is not None:
            with annotate("checkpoint"):
                self._check_weights()
                self._checkpoints.save(
                    self.num_timesteps, self._weights(), self._state(), self._metadata()
                )

    def _check_weights(self) -> None:
        """Keep a checkpoint of broken weights from replacing a good one."""
        for name, tensor in self._weights().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(f"the weight {name} is not finite")

    def _last_checkpoint(self) -> str:
        latest = self._checkpoints.latest() if self._checkpoints is not None else None
        return f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"

    def save(self, path: str | Path) -> Path:
        """Save everything needed to predict and to continue training, as a checkpoint directory.

        Raises:
            InputError: `path` is no path.
            CheckpointError: `path` exists and is no checkpoint.
        """
        path = as_path(path, "path")
        with annotate("checkpoint"):
            return save_checkpoint(path, self._weights(), self._state(), self._metadata())

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
        if checkpoint not in ("last", "best"):
            raise InputError(f"checkpoint must be 'last' or 'best', got {checkpoint!r}")
        if path.is_file():
            raise CheckpointError(f"{path} is a file, wanted a run or checkpoint directory")
        if not path.is_dir():
            raise CheckpointError(f"{path} does not exist, wanted a run or checkpoint directory")
        if not (path / "config.json").exists():
            return cls._from_checkpoint(path, given)
        manager = CheckpointManager(path)
        found = manager.best() if checkpoint == "best" else manager.latest()
        if found is None:
            damage = "; ".join(manager.damage(checkpoint))
            gone = checkpoint == "last" and manager.has_saved()
            why = f" that can be used: {damage}" if damage else " any more" if gone else " yet"
            raise CheckpointError(f"{path} has no {checkpoint} checkpoint{why}")
        agent = cls._from_checkpoint(found, given, read_run_config(path))
        if checkpoint == "last":
            agent._attach(manager, path, tensorboard)
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
        manager = CheckpointManager(run_dir)
        found = manager.latest()
        given = dict(env=env, device=device, denoiser=denoiser, policy=policy, eval_env=eval_env)
        if found is not None:
            agent = cls._from_checkpoint(found, given, stored)
        else:
            interval = from_dict(stored["config"], TrainConfig).checkpoint_interval
            damage, saved = manager.damage("last"), manager.has_saved()
            refuse_lost_progress(run_dir, interval, saved, damage, manager.best())
            agent = cls._from_metadata(stored, given)
        agent._attach(manager, run_dir, tensorboard)
        return agent

    @classmethod
    def _from_metadata(cls, metadata: dict[str, Any], given: dict[str, Any]) -> PolyGRAD:
        """Build the agent that was saved; `given` are the arguments of `load` that the constructor
        takes too."""
        given = dict(given)
        if given["env"] is None:
            if not metadata["env_given_by_id"]:
                raise InputError(
                    f"this agent was trained on an environment given as an object or a function "
                    f"({metadata['env_id']}): give the environment as env="
                )
            given["env"] = metadata["env_id"]
        evaluated_on = metadata.get("eval_env")
        if given["eval_env"] is None and evaluated_on is not None:
            if not evaluated_on["given_by_id"]:
                raise InputError(
                    f"this agent was evaluated on an environment given as an object or a function "
                    f"({evaluated_on['id']}): give the environment as eval_env="
                )
            given["eval_env"] = evaluated_on["id"]
        trained = metadata.get("own_modules", {})
        for name in ("denoiser", "policy"):
            if name in trained and given[name] is None:
                raise InputError(
                    f"this agent was trained with an own {name}, {trained[name]}: load it in "
                    f"Python and give such a module as {name}="
                )
            if given[name] is not None and name not in trained:
                raise InputError(
                    f"this agent was trained with its built-in {name}, got {name}="
                    f"{type(given[name]).__name__}; wanted none"
                )
        return cls(
            preset=metadata["preset"],
            seed=metadata["seed"],
            config=from_dict(metadata["config"], TrainConfig),
            **given,
        )

    @classmethod
    def _from_checkpoint(
        cls, path: Path, given: dict[str, Any], wanted: dict[str, Any] | None = None
    ) -> PolyGRAD:
        """Load one checkpoint; where the run's config.json is given as `wanted`, it must be of that
        run."""
        weights, state, metadata = load_checkpoint(path)
        if wanted is not None:
            differs = difference(options_of(wanted), options_of(metadata))
            if differs is not None:
                raise CheckpointError(
                    f"checkpoint {path} is of another run than its config.json: {differs[1]}"
                )
        agent = cls._from_metadata(metadata, given)
        agent._load_weights(weights)
        agent.num_timesteps = metadata["num_timesteps"]
        agent._can_learn = state is not None
        if state is not None:
            try:
                agent._load_state(state)
            except (KeyError, TypeError, RuntimeError) as error:
                raise CheckpointError(f"checkpoint {path} cannot be restored: {error!r}") from error
        return agent

    def extend(self, total_timesteps: int) -> None:
        """Set the length of the run that `run_dir` describes, so that resuming it knows it too.

        Raises:
            InputError: total_timesteps < 1, or another process trains in the run directory, which
                then stays as it is.
            OSError: config.json cannot be written; names step and last checkpoint.
        """
        config = dataclasses.replace(self.config, total_timesteps=total_timesteps)
        with self.locked():
            if self.run_dir is not None:
                metadata = self._metadata() | {"config": dataclasses.asdict(config)}
                try:
                    write_json_atomic(self.run_dir / "config.json", metadata)
                except OSError as error:
                    where = f"the run at environment step {self.num_timesteps} is not extended"
                    raise self._placed(error, where) from error
            self.config = config


class _Speed:
    """Rates since the last reading."""

    def __init__(self, step: int):
        self.updates = 0
        self.durations = Durations()
        self._step, self._time = step, time.perf_counter()
        self._sample_seconds, self._samples = 0.0, 0

    def add_sample(self, seconds: float) -> None:
        self._sample_seconds += seconds
        self._samples += 1

    def read(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = max(now - self._time, 1e-9)
        rates = {"time/env_steps_per_s": (step - self._step) / elapsed}
        if self.updates:
            rates["time/updates_per_s"] = self.updates / elapsed
        if self._samples:
            rates["time/sample_ms"] = 1e3 * self._sample_seconds / self._samples
        self.updates, self._step, self._time = 0, step, now
        self._sample_seconds, self._samples = 0.0, 0
        return rates


def _due(steps: int, ratio: float) -> int:
    """Return how many updates fall on the last of `steps` steps at `ratio` updates per step."""
    return num_updates(steps, ratio) - num_updates(steps - 1, ratio)


def _resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return resolved


def _progress_bar(start: int, target: int, enabled: bool):
    from tqdm import tqdm

    # without tqdm's own estimate: it takes the prefill's speed for that of the training
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
    return tqdm(
        total=target,
        initial=start,
        disable=not enabled,
        unit="step",
        dynamic_ncols=True,
        bar_format=layout,
    )
