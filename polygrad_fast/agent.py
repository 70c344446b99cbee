"""PolyGRAD: a policy trained by A2C in a diffusion world model (Algorithm 3)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import numbers
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from polygrad_fast.config import TrainConfig, from_dict
from polygrad_fast.data import (
    ActionScaler,
    ReplayBuffer,
    ResumableEnvironment,
    check_spaces,
)
from polygrad_fast.data.environment import environment_name, warn_of_statistics
from polygrad_fast.data.replay import as_finite_float32
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.evaluation.environments import (
    EnvironmentSource,
    EvaluationEnvironments,
    build_environment,
)
from polygrad_fast.evaluation.returns import EpisodeStatistics, evaluate_policy
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy, ValueFunction
from polygrad_fast.profiling import annotate
from polygrad_fast.sampling import PolicyGuidedSampler, TrajectoryBatch
from polygrad_fast.schedule import NoiseSchedule
from polygrad_fast.training.a2c import ActorCritic
from polygrad_fast.training.checkpoint import (
    CheckpointManager,
    load_checkpoint,
    save_checkpoint,
)
from polygrad_fast.training.denoiser import DenoiserTrainer, build_denoiser
from polygrad_fast.training.guidance import GuidanceTuner
from polygrad_fast.training.memory import check_sampling_memory, check_training_memory
from polygrad_fast.training.run_directory import (
    comparable,
    difference,
    locked,
    read_run_config,
)
from polygrad_fast.training.run_log import MetricsLog, TensorboardLog, versions, write_json_atomic

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
        eval_env: what to evaluate on instead of environments like `env`: an id, a function, or an
            environment, which is then used itself, its episodes one after the other.

    Attributes:
        num_timesteps: environment steps taken so far, the prefill included.
        policy, denoiser, normalizer, replay: what is being trained, on what.

    Raises:
        InputError: unknown environment or preset, unsuitable spaces, an environment that cannot be
            copied, a device that is not there, too little memory, or a `run_dir` that holds another
            run.
    """

    def __init__(
        self,
        env: EnvironmentSource,
        preset: str = "default",
        seed: int = 0,
        device: str | torch.device = "auto",
        config: TrainConfig | None = None,
        run_dir: str | Path | None = None,
        tensorboard: bool = False,
        eval_env: EnvironmentSource | None = None,
    ):
        self._env_source, self._eval_env_source = env, eval_env
        environment = build_environment(env)
        observation_dim, action_dim = check_spaces(environment)
        # as given: "module:Name-v0" must be imported again by whoever loads the agent
        self.env_id = env if isinstance(env, str) else environment_name(environment)
        config = config if config is not None else TrainConfig.from_preset(preset, self.env_id)
        self.config = config.resolved(self.env_id)
        if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
            raise InputError(f"seed must be an integer in [0, 2^32), got {seed!r}")
        self.preset, self.seed = preset, int(seed)
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
        num_steps = c.schedule.num_train_timesteps
        schedule = NoiseSchedule.cosine(num_steps, c.schedule.tau).to(self.device)
        denoiser = build_denoiser(c.denoiser, observation_dim, action_dim, c.horizon, num_steps)
        self.denoiser_trainer = DenoiserTrainer(
            denoiser.to(self.device), schedule, c.denoiser, c.sampler
        )
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
        value_function = ValueFunction(observation_dim, c.policy.hidden_dim, c.policy.num_layers)
        self.actor_critic = ActorCritic(
            policy.to(self.device), value_function.to(self.device), self.normalizer, c.a2c
        )
        self.guidance = GuidanceTuner(c.guidance)
        self.sampler = PolicyGuidedSampler(
            self.denoiser_trainer.ema_model,
            policy,
            schedule,
            self.normalizer,
            c.sampler,
            engine=c.engine,
            dtype=c.dtype,
            device=self.device,
            action_bounds=(self.action_scaler.low, self.action_scaler.high),
        )

        self.num_timesteps = 0
        self._target_timesteps = c.total_timesteps
        self._best_mean_reward: float | None = None
        self._sums: dict[str, list[float]] = {}
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
            self._open_run_dir(Path(run_dir))

    @property
    def policy(self) -> GaussianPolicy:
        """The current policy."""
        return self.actor_critic.policy

    @property
    def denoiser(self) -> torch.nn.Module:
        """The averaged denoiser that imagines."""
        return self.denoiser_trainer.ema_model

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | None = None,
        progress_bar: bool = False,
    ) -> PolyGRAD:
        """Train for `total_timesteps` further environment steps (Algorithm 3).

        What is annealed runs from the current step to the end of this call; every call ends with an
        evaluation and, in a run directory, a checkpoint.

        Args:
            total_timesteps: at least 1; the random prefill counts.
            callback: called as callback(agent, metrics) with every row of metrics; returning False
                stops the training, as `stop` does.
            progress_bar: show one, with the speed.

        Returns:
            The agent.

        Raises:
            InputError: total_timesteps < 1, another process trains in the run directory, or the
                environment returned something unusable.
            NonFiniteError: training met NaN; names step, quantity and last checkpoint.
        """
        if not isinstance(total_timesteps, numbers.Integral) or total_timesteps < 1:
            raise InputError(
                f"total_timesteps must be an integer of at least 1, got {total_timesteps!r}"
            )
        if callback is not None and not callable(callback):
            raise InputError(f"callback must be callable, got {callback!r}")
        if not self._can_learn:
            raise InputError(
                "the best checkpoint holds weights only; load the last one to continue training"
            )
        self._check_memory()
        self._target_timesteps = self.num_timesteps + int(total_timesteps)
        self._stop_requested = False
        with contextlib.ExitStack() as stack:
            if self.config.cpu_threads is not None and self.device.type == "cpu":
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self.config.cpu_threads)
            if self.run_dir is not None:
                stack.enter_context(locked(self.run_dir))
            sinks = [stack.enter_context(sink) for sink in self._open_logs()]
            bar = stack.enter_context(
                _progress_bar(self.num_timesteps, self._target_timesteps, progress_bar)
            )
            try:
                self._run(bar, sinks, callback)
            except (NonFiniteError, InputError) as error:
                raise type(error)(
                    f"training stopped at environment step {self.num_timesteps}: {error}; "
                    f"{self._last_checkpoint()}"
                ) from error
        return self

    def stop(self) -> None:
        """Let the running `learn` end after its current step, with a checkpoint; safe in a signal
        handler."""
        self._stop_requested = True

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

        def report(metrics: dict[str, float]) -> None:
            bar.set_postfix_str(self._postfix(metrics))
            for sink in sinks:
                sink.write(self.num_timesteps, metrics)
            if callback is not None and callback(self, metrics) is False:
                self.stop()

        if self.num_timesteps == 0:
            report(self._evaluate_and_keep_best())
        if not self.environment.running:
            self.environment.reset()
        while self.num_timesteps < self._target_timesteps and not self._stop_requested:
            self._step(speed)
            bar.update(1)
            metrics = self._due_metrics(speed)
            if metrics:
                report(metrics)
            self._checkpoint_if_due()

    def _step(self, speed: _Speed) -> None:
        """Take one environment step and the updates that are due after it."""
        c = self.config
        observation = self.environment.observation
        with annotate("act"):
            if self.num_timesteps < c.learning_starts:
                action = self.action_scaler.from_environment(self.environment.sample_action())
            else:
                action = self._act(observation)
        environment_action = self.action_scaler.to_environment(action)
        with annotate("env_step"):
            _, reward, terminated, truncated = self.environment.step(environment_action)
        if c.sampler.denoiser_actions == "clipped":
            action = np.clip(action, self.action_scaler.low, self.action_scaler.high)
        with annotate("replay_add"):
            self.replay.add(observation, action, reward, terminated, truncated)
        self.num_timesteps += 1
        if terminated or truncated:
            self._add_metric("train/episode_return", self.environment.episode_return)
            self._add_metric("train/episode_length", self.environment.episode_length)
            if self.num_timesteps > c.learning_starts and c.normalizer.refresh == "episode":
                self._refresh_normalizer()
            with annotate("env_reset"):
                self.environment.reset()

        trained_steps = self.num_timesteps - c.learning_starts
        if trained_steps == 0:
            self._refresh_normalizer()
            for _ in range(c.denoiser.pretrain_updates):
                with annotate("denoiser_update"):
                    self._update_denoiser(speed)
        for _ in range(_due(trained_steps, c.denoiser.updates_per_env_step)):
            with annotate("denoiser_update"):
                self._update_denoiser(speed)
        for _ in range(_due(trained_steps - c.policy_delay_steps, c.policy_updates_per_env_step)):
            with annotate("policy_update"):
                self._update_policy(speed)

    def _refresh_normalizer(self) -> None:
        with annotate("normalizer_update"):
            self.normalizer.update(self.replay.moments(), self.config.normalizer.min_std())

    def _update_denoiser(self, speed: _Speed) -> None:
        windows = self.replay.sample(self.config.denoiser.batch_size, self.generator)
        trajectory = self.normalizer.normalize_trajectory(
            windows.observations, windows.rewards, windows.terminals
        )
        actions = self.normalizer.normalize(windows.actions, "actions")
        losses = self.denoiser_trainer.update(trajectory, actions, self.generator)
        values = torch.stack(list(losses.values())).tolist()
        for name, value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(f"the denoiser's {name} is {value}")
            self._add_metric(f"denoiser/{name}", value)
        speed.updates += 1

    def _update_policy(self, speed: _Speed) -> None:
        start = time.perf_counter()
        batch = self.imagine(self.config.imagined_batch_size, normalized=True)
        with annotate("check_finite"):
            fields = ("observations", "actions", "rewards", "terminals")
            finite = torch.stack([torch.isfinite(getattr(batch, name)).all() for name in fields])
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
                progress=min(1.0, self.num_timesteps / self._target_timesteps),
            )
        statistic = {"std": "action_std", "mean_abs": "action_mean_abs"}
        if self.config.sampler.action_update == "score":
            with annotate("guidance_update"):
                self.guidance.update(metrics[statistic[self.config.guidance.statistic]])
        metrics["guidance_scale"] = self.guidance.value
        for name, value in metrics.items():
            self._add_metric(f"a2c/{name}", value)
        speed.updates += 1

    def imagine(self, num_trajectories: int, normalized: bool = False) -> TrajectoryBatch:
        """Imagine trajectories under the current policy, from observations in the replay buffer.

        Raises:
            InputError: fewer than one trajectory asked for, more than the memory holds, or no
                window in the buffer yet.
        """
        if not isinstance(num_trajectories, numbers.Integral):
            raise InputError(f"num_trajectories must be an integer, got {num_trajectories!r}")
        if num_trajectories > self.config.imagined_batch_size:
            sizes = self.replay.observation_dim, self.replay.action_dim
            check_sampling_memory(self.config, *sizes, num_trajectories, self.device)
        with annotate("imagine"):
            observations = self.replay.sample_initial_observations(num_trajectories, self.generator)
            if normalized:
                observations = self.normalizer.normalize(observations, "observations")
            return self.sampler.sample(
                observations, self.guidance.value, generator=self.generator, normalized=normalized
            )

    @torch.no_grad()
    def _act(self, observation: np.ndarray) -> np.ndarray:
        moments = self.policy(torch.from_numpy(observation).to(self.device))
        mean, std = torch.stack(moments).cpu()
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
        mean, std = torch.stack(self.policy(inputs)).cpu()
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
            InputError: an argument out of range, or an environment that returns something unusable,
                as a reward that is not finite.
        """
        if not isinstance(num_episodes, numbers.Integral) or num_episodes < 1:
            raise InputError(f"num_episodes must be an integer of at least 1, got {num_episodes!r}")
        if seed is not None and (not isinstance(seed, numbers.Integral) or seed < 0):
            raise InputError(f"seed must be None or a non-negative integer, got {seed!r}")
        seeds = (
            np.random.default_rng(self.seed if seed is None else seed)
            .integers(2**31, size=num_episodes)
            .tolist()
        )
        with annotate("evaluation"):
            return evaluate_policy(
                lambda observations: self.predict(observations, deterministic)[0],
                self.evaluation_environments.take(num_episodes),
                seeds,
            )

    def make_evaluation_environment(self, render_mode: str | None = None) -> gymnasium.Env:
        """Return another environment like those that `evaluate` plays on; where `eval_env` is an
        environment, that one."""
        return self.evaluation_environments.make(render_mode)

    def _add_metric(self, name: str, value: float) -> None:
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1.0

    def _due_metrics(self, speed: _Speed) -> dict[str, float]:
        """Return the row of metrics due at this step, or nothing."""
        step, c = self.num_timesteps, self.config
        last = step == self._target_timesteps
        metrics: dict[str, float] = {}
        if step > c.learning_starts and (step % c.eval_interval == 0 or last):
            metrics = self._evaluate_and_keep_best()
        if metrics or step % c.log_interval == 0 or last:
            metrics |= {name: total / count for name, (total, count) in self._sums.items()}
            self._sums = {}
            metrics |= speed.read(step)
        return metrics

    def _evaluate_and_keep_best(self) -> dict[str, float]:
        result = self.evaluate(self.config.eval_episodes)
        # of equals the later one, which is trained longer; older checkpoints may hold a NaN
        best = self._best_mean_reward
        if best is None or not result.mean_reward < best:
            self._best_mean_reward = result.mean_reward
            if self._checkpoints is not None:
                with annotate("checkpoint"):
                    self._checkpoints.save_best(self._weights(), self._metadata())
        return {
            "eval/mean_reward": result.mean_reward,
            "eval/std_reward": result.std_reward,
            "eval/mean_episode_length": float(result.lengths.mean()),
            "eval/best_mean_reward": self._best_mean_reward,
        }

    def _postfix(self, metrics: dict[str, float]) -> str:
        shown = []
        if "time/env_steps_per_s" in metrics:
            shown.append(f"{metrics['time/env_steps_per_s']:.0f} env steps/s")
        if "time/updates_per_s" in metrics:
            shown.append(f"{metrics['time/updates_per_s']:.0f} updates/s")
        if "time/sample_ms" in metrics:
            shown.append(f"{metrics['time/sample_ms']:.1f} ms/sample")
        if self._best_mean_reward is not None:
            shown.append(f"best return {self._best_mean_reward:.0f}")
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
        if (run_dir / "config.json").exists() or (run_dir / "metrics.csv").exists():
            raise InputError(
                f"{run_dir} already holds a run; resume it or give another run directory"
            )
        try:
            write_json_atomic(run_dir / "versions.json", versions())
            write_json_atomic(run_dir / "config.json", self._metadata())
        except OSError as error:
            raise InputError(f"run directory {run_dir} cannot be written: {error}") from error
        self._attach(run_dir)

    def _attach(self, run_dir: Path, tensorboard: bool = False) -> None:
        self.run_dir = run_dir
        self._tensorboard = self._tensorboard or tensorboard
        self._checkpoints = CheckpointManager(run_dir, self.config.keep_checkpoints)

    def _metadata(self) -> dict[str, Any]:
        return {
            "env_id": self.env_id,
            "env_given_by_id": isinstance(self._env_source, str),
            "eval_env": self._describe_eval_env(),
            "preset": self.preset,
            "seed": self.seed,
            "num_timesteps": self.num_timesteps,
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
            "denoiser": self.denoiser_trainer.model,
            "ema_denoiser": self.denoiser_trainer.ema_model,
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
            "guidance_scale": self.guidance.value,
            "denoiser_trainer": self.denoiser_trainer.state_dict(),
            "actor_critic": self.actor_critic.state_dict(),
            "replay": self.replay.state_dict(),
            "environment": self.environment.state_dict(),
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
        self.guidance.value = state["guidance_scale"]
        self.denoiser_trainer.load_state_dict(state["denoiser_trainer"])
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
        if not self.environment.load_state_dict(state["environment"]):
            self.replay.end_episode()

    def _checkpoint_if_due(self) -> None:
        step = self.num_timesteps
        last = step == self._target_timesteps or self._stop_requested
        if self._checkpoints is not None and (last or step % self.config.checkpoint_interval == 0):
            with annotate("checkpoint"):
                self._check_weights()
                self._checkpoints.save(step, self._weights(), self._state(), self._metadata())

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
            CheckpointError: `path` exists and is no checkpoint.
        """
        with annotate("checkpoint"):
            return save_checkpoint(Path(path), self._weights(), self._state(), self._metadata())

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: EnvironmentSource | None = None,
        device: str | torch.device = "auto",
        checkpoint: str = "last",
        tensorboard: bool = False,
        eval_env: EnvironmentSource | None = None,
    ) -> PolyGRAD:
        """Load an agent from `save`'s directory or from a run directory.

        Args:
            path: what `save` wrote, or a run directory, whose run then continues with `learn`.
            env: the environment, where the saved one has no registered id.
            device: as in the constructor.
            checkpoint: of a run directory, "last" or "best" (best evaluated; its weights only, so
                it can act, but not continue training).
            tensorboard, eval_env: as in the constructor; an `eval_env` that the saved agent had is
                kept where it was an id, and must be given again where it was not.

        Raises:
            CheckpointError: nothing there, a damaged checkpoint, or one of another configuration.
        """
        path = Path(path)
        if checkpoint not in ("last", "best"):
            raise InputError(f"checkpoint must be 'last' or 'best', got {checkpoint!r}")
        if not path.is_dir():
            raise CheckpointError(f"{path} does not exist, wanted a run or checkpoint directory")
        if not (path / "config.json").exists():
            return cls._from_checkpoint(path, env, eval_env, device)
        stored = read_run_config(path)
        manager = CheckpointManager(path)
        found = manager.best() if checkpoint == "best" else manager.latest()
        if found is None:
            raise CheckpointError(f"{path} has no {checkpoint} checkpoint yet")
        agent = cls._from_checkpoint(found, env, eval_env, device, stored)
        if checkpoint == "last":
            agent._attach(path, tensorboard)
        return agent

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        env: EnvironmentSource | None = None,
        device: str | torch.device = "auto",
        tensorboard: bool = False,
        eval_env: EnvironmentSource | None = None,
    ) -> PolyGRAD:
        """Load a run to continue it; a run killed before its first checkpoint starts anew.

        Args are those of `load`.

        Raises:
            CheckpointError: no run there, or its configuration cannot be read.
        """
        run_dir = Path(run_dir)
        stored = read_run_config(run_dir)
        if CheckpointManager(run_dir).latest() is not None:
            return cls.load(run_dir, env, device, tensorboard=tensorboard, eval_env=eval_env)
        agent = cls._from_metadata(stored, env, eval_env, device)
        agent._attach(run_dir, tensorboard)
        return agent

    @classmethod
    def _from_metadata(cls, metadata: dict[str, Any], env, eval_env, device) -> PolyGRAD:
        if env is None and not metadata["env_given_by_id"]:
            raise InputError(
                f"this agent was trained on an environment given as an object or a function "
                f"({metadata['env_id']}): give the environment as env="
            )
        evaluated_on = metadata.get("eval_env")
        if eval_env is None and evaluated_on is not None:
            if not evaluated_on["given_by_id"]:
                raise InputError(
                    f"this agent was evaluated on an environment given as an object or a function "
                    f"({evaluated_on['id']}): give the environment as eval_env="
                )
            eval_env = evaluated_on["id"]
        return cls(
            metadata["env_id"] if env is None else env,
            metadata["preset"],
            metadata["seed"],
            device,
            from_dict(metadata["config"]),
            eval_env=eval_env,
        )

    @classmethod
    def _from_checkpoint(
        cls, path: Path, env, eval_env, device, wanted: dict[str, Any] | None = None
    ) -> PolyGRAD:
        """Load one checkpoint; where `wanted` is given, its configuration must be that."""
        weights, state, metadata = load_checkpoint(path)
        if wanted is not None:
            for name in ("env_id", "seed", "config"):
                got = comparable(metadata[name])
                if got != comparable(wanted[name]):
                    raise CheckpointError(
                        f"checkpoint {path} is of another configuration: {name} is "
                        f"{difference(got, comparable(wanted[name]))} of the run"
                    )
        agent = cls._from_metadata(metadata, env, eval_env, device)
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
        """Set the length of the run that `run_dir` describes, so that resuming it knows it too."""
        self.config = dataclasses.replace(self.config, total_timesteps=total_timesteps)
        if self.run_dir is not None:
            write_json_atomic(self.run_dir / "config.json", self._metadata())


class _Speed:
    """Rates since the last reading."""

    def __init__(self, step: int):
        self.updates = 0
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
    return math.floor(steps * ratio) - math.floor((steps - 1) * ratio) if steps > 0 else 0


def _resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return resolved


def _progress_bar(start: int, target: int, enabled: bool):
    from tqdm import tqdm

    return tqdm(total=target, initial=start, disable=not enabled, unit="step", dynamic_ncols=True)
