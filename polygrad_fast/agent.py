"""PolyGRAD: a policy trained by A2C in a diffusion world model (Algorithm 3)."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import time
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
    make_environment,
)
from polygrad_fast.data.environment import environment_name
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.evaluation.returns import EpisodeStatistics, evaluate_policy
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy, ValueFunction
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
from polygrad_fast.training.run_log import MetricsLog, TensorboardLog, versions, write_json_atomic

Callback = Callable[["PolyGRAD", dict[str, float]], Any]


class PolyGRAD:
    """Train a policy in imagination on any `gymnasium.Env` with Box observations and actions.

    Args:
        env: environment id, a function that makes the environment, or an environment.
        preset: "default" (released code), "paper", or "quick" (CPU-sized); see `TrainConfig`.
        seed: seeds python, numpy, torch, the environment and its action space.
        device: "auto" is CUDA where there is one, else the CPU.
        config: a full configuration instead of a preset.
        run_dir: where metrics, checkpoints and versions go; None: nothing is written.
        tensorboard: also write TensorBoard events to `run_dir`; needs the extra `tensorboard`.

    Attributes:
        num_timesteps: environment steps taken so far, the prefill included.
        policy, denoiser, normalizer, replay: what is being trained, on what.

    Raises:
        InputError: unknown environment or preset, unsuitable spaces, a device that is not there,
            or a `run_dir` that holds another run.
    """

    def __init__(
        self,
        env: str | gymnasium.Env | Callable[[], gymnasium.Env],
        preset: str = "default",
        seed: int = 0,
        device: str | torch.device = "auto",
        config: TrainConfig | None = None,
        run_dir: str | Path | None = None,
        tensorboard: bool = False,
    ):
        self._env_source = env
        environment = _make(env)
        observation_dim, action_dim = check_spaces(environment)
        # as given: "module:Name-v0" must be imported again by whoever loads the agent
        self.env_id = env if isinstance(env, str) else environment_name(environment)
        config = config if config is not None else TrainConfig.from_preset(preset, self.env_id)
        self.config = config.resolved()
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise InputError(f"seed must be an integer in [0, 2^32), got {seed!r}")
        self.preset, self.seed = preset, seed
        self.device = _resolve_device(device)

        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._acting_generator = torch.Generator().manual_seed(seed + 1)

        c = self.config
        self.environment = ResumableEnvironment(environment, seed)
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
            device=self.device,
            action_bounds=(self.action_scaler.low, self.action_scaler.high),
        )

        self.num_timesteps = 0
        self._target_timesteps = c.total_timesteps
        self._best_mean_reward: float | None = None
        self._sums: dict[str, list[float]] = {}
        self._evaluation_environments: list[gymnasium.Env] = []
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

    # ------------------------------------------------------------------------------------ training

    def learn(
        self,
        total_timesteps: int,
        progress_bar: bool = False,
        callback: Callback | None = None,
    ) -> PolyGRAD:
        """Train for `total_timesteps` further environment steps (Algorithm 3).

        Args:
            total_timesteps: at least 1; the random prefill counts.
            progress_bar: show one, with the speed.
            callback: called as callback(agent, metrics) with every row of metrics; returning False
                stops the training.

        Returns:
            The agent.

        Raises:
            InputError: total_timesteps < 1, or the environment returned something unusable.
            NonFiniteError: training met NaN; names step, quantity and last checkpoint.
        """
        if not isinstance(total_timesteps, (int, np.integer)) or total_timesteps < 1:
            raise InputError(
                f"total_timesteps must be an integer of at least 1, got {total_timesteps!r}"
            )
        self._target_timesteps = self.num_timesteps + int(total_timesteps)
        first_step = self.num_timesteps
        log, events = self._open_logs()
        speed = _Speed(self.num_timesteps)
        bar = _progress_bar(first_step, self._target_timesteps, progress_bar)
        try:
            if self.num_timesteps == 0:
                metrics = self._evaluate_and_keep_best()
                if log is not None:
                    log.write(0, metrics)
                if events is not None:
                    events.write(0, metrics)
            if not self.environment.running:
                self.environment.reset()
            while self.num_timesteps < self._target_timesteps:
                self._step(speed)
                metrics = self._report(speed)
                bar.update(1)
                if metrics:
                    bar.set_postfix_str(self._postfix(metrics))
                    if log is not None:
                        log.write(self.num_timesteps, metrics)
                    if events is not None:
                        events.write(self.num_timesteps, metrics)
                self._checkpoint_if_due()
                if metrics and callback is not None and callback(self, metrics) is False:
                    break
        except NonFiniteError as error:
            raise NonFiniteError(
                f"training stopped at environment step {self.num_timesteps}: {error}; "
                f"{self._last_checkpoint()}"
            ) from error
        finally:
            bar.close()
            for sink in (log, events):
                if sink is not None:
                    sink.close()
        return self

    def _step(self, speed: _Speed) -> None:
        """Take one environment step and the updates that are due after it."""
        c = self.config
        observation = self.environment.observation
        if self.num_timesteps < c.prefill_steps:
            action = self.action_scaler.from_environment(self.environment.sample_action())
        else:
            action = self._act(observation)
        next_values = self.environment.step(self.action_scaler.to_environment(action))
        _, reward, terminated, truncated = next_values
        if c.sampler.denoiser_actions == "clipped":
            action = np.clip(action, self.action_scaler.low, self.action_scaler.high)
        self.replay.add(observation, action, reward, terminated, truncated)
        self.num_timesteps += 1
        if terminated or truncated:
            self._add_metric("train/episode_return", self.environment.episode_return)
            self._add_metric("train/episode_length", self.environment.episode_length)
            if self.num_timesteps > c.prefill_steps and c.normalizer.refresh == "episode":
                self._refresh_normalizer()
            self.environment.reset()

        trained_steps = self.num_timesteps - c.prefill_steps
        if trained_steps == 0:
            self._refresh_normalizer()
            for _ in range(c.denoiser.pretrain_updates):
                self._update_denoiser(speed)
        for _ in range(_due(trained_steps, c.denoiser.updates_per_env_step)):
            self._update_denoiser(speed)
        for _ in range(_due(trained_steps - c.policy_delay_steps, c.policy_updates_per_env_step)):
            self._update_policy(speed)

    def _refresh_normalizer(self) -> None:
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
        total = batch.observations.sum() + batch.actions.sum() + batch.rewards.sum()
        if not math.isfinite(total.item()):
            raise NonFiniteError("an imagined trajectory is not finite")
        speed.add_sample(time.perf_counter() - start)
        terminals = self.normalizer.unnormalize(batch.terminals, "terminals")
        metrics = self.actor_critic.update(
            batch.observations,
            batch.actions,
            batch.rewards,
            (terminals > 0.5).to(batch.rewards.dtype),
            progress=min(1.0, self.num_timesteps / self._target_timesteps),
        )
        statistic = {"std": "action_std", "mean_abs": "action_mean_abs"}
        if self.config.sampler.action_update == "score":
            self.guidance.update(metrics[statistic[self.config.guidance.statistic]])
        metrics["guidance_scale"] = self.guidance.value
        for name, value in metrics.items():
            self._add_metric(f"a2c/{name}", value)
        speed.updates += 1

    def imagine(self, num_trajectories: int, normalized: bool = False) -> TrajectoryBatch:
        """Imagine trajectories under the current policy, from observations in the replay buffer.

        Raises:
            InputError: fewer than one trajectory asked for, or no window in the buffer yet.
        """
        observations = self.replay.sample_initial_observations(num_trajectories, self.generator)
        if normalized:
            observations = self.normalizer.normalize(observations, "observations")
        return self.sampler.sample(
            observations, self.guidance.value, generator=self.generator, normalized=normalized
        )

    # ------------------------------------------------------------------------- acting, evaluation

    @torch.no_grad()
    def _act(self, observation: np.ndarray) -> np.ndarray:
        mean, std = self.policy(torch.from_numpy(observation).to(self.device))
        mean, std = mean.cpu(), std.cpu()
        noise = torch.randn(mean.shape, generator=self._acting_generator)
        action = (mean + std * noise).numpy()
        if not np.isfinite(action).all():
            raise NonFiniteError(f"the policy's action is {action.tolist()}")
        return action

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
            InputError: wrong shape or dtype, or a value that is not finite.
        """
        array = np.asarray(observation)
        size = self.environment.observation_dim
        if array.ndim not in (1, 2) or array.shape[-1] != size:
            raise InputError(
                f"observation of shape {array.shape} given, wanted [{size}] or [N, {size}]"
            )
        if not np.issubdtype(array.dtype, np.number):
            raise InputError(f"observation of dtype {array.dtype} given, wanted numbers")
        if not np.isfinite(array).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise InputError(f"observation{list(index)} is {array[index]}, wanted a finite number")
        inputs = torch.from_numpy(array.astype(np.float32)).to(self.device)
        mean, std = (tensor.cpu() for tensor in self.policy(inputs))
        if not deterministic:
            mean = mean + std * torch.randn(mean.shape, generator=self._acting_generator)
        return self.action_scaler.to_environment(mean.numpy()), None

    def evaluate(
        self, num_episodes: int = 10, seed: int | None = None, deterministic: bool = True
    ) -> EpisodeStatistics:
        """Play whole episodes on fresh environments; the training environment is not touched.

        Args:
            num_episodes: at least 1.
            seed: of the episodes; None: drawn from the agent's seed and the step.
            deterministic: act by the policy's mean.
        """
        if num_episodes < 1:
            raise InputError(f"num_episodes must be at least 1, got {num_episodes}")
        entropy = [self.seed, self.num_timesteps] if seed is None else [seed]
        seeds = np.random.default_rng(entropy).integers(2**31, size=num_episodes).tolist()
        while len(self._evaluation_environments) < min(num_episodes, 16):
            self._evaluation_environments.append(self.make_evaluation_environment())
        return evaluate_policy(
            lambda observations: self.predict(observations, deterministic)[0],
            self._evaluation_environments[:num_episodes],
            seeds,
        )

    def make_evaluation_environment(self, render_mode: str | None = None) -> gymnasium.Env:
        """Make another environment like the one trained on."""
        if isinstance(self._env_source, gymnasium.Env):
            spec = self._env_source.spec
            if spec is not None:
                return gymnasium.make(spec, render_mode=render_mode)
            try:
                return copy.deepcopy(self._env_source)
            except Exception as error:
                raise InputError(
                    f"{self.env_id} cannot be copied for evaluation ({error}); "
                    f"give a function that makes the environment instead"
                ) from error
        return _make(self._env_source, render_mode)

    # ------------------------------------------------------------------------------------ reports

    def _add_metric(self, name: str, value: float) -> None:
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1.0

    def _report(self, speed: _Speed) -> dict[str, float]:
        """Return the row of metrics due at this step, or nothing."""
        step, c = self.num_timesteps, self.config
        last = step == self._target_timesteps
        metrics: dict[str, float] = {}
        if step > c.prefill_steps and (step % c.eval_interval == 0 or last):
            metrics = self._evaluate_and_keep_best()
        if metrics or step % c.log_interval == 0 or last:
            metrics |= {name: total / count for name, (total, count) in self._sums.items()}
            self._sums = {}
            metrics |= speed.read(step)
        return metrics

    def _evaluate_and_keep_best(self) -> dict[str, float]:
        result = self.evaluate(self.config.eval_episodes)
        if self._best_mean_reward is None or result.mean_reward > self._best_mean_reward:
            self._best_mean_reward = result.mean_reward
            if self._checkpoints is not None:
                self._checkpoints.save_best(self._weights(), self._metadata())
        return {
            "eval/mean_reward": result.mean_reward,
            "eval/std_reward": result.std_reward,
            "eval/mean_episode_length": float(result.lengths.mean()),
            "eval/best_mean_reward": self._best_mean_reward,
        }

    def _postfix(self, metrics: dict[str, float]) -> str:
        shown = [f"{metrics['time/env_steps_per_s']:.0f} env steps/s"]
        if "time/updates_per_s" in metrics:
            shown.append(f"{metrics['time/updates_per_s']:.0f} updates/s")
        if "time/sample_ms" in metrics:
            shown.append(f"{metrics['time/sample_ms']:.1f} ms/sample")
        if self._best_mean_reward is not None:
            shown.append(f"best return {self._best_mean_reward:.0f}")
        return ", ".join(shown)

    def _open_logs(self) -> tuple[MetricsLog | None, TensorboardLog | None]:
        if self.run_dir is None:
            return None, None
        resume_step = self.num_timesteps
        log = MetricsLog(self.run_dir / "metrics.csv", resume_step)
        events = TensorboardLog(self.run_dir, resume_step) if self._tensorboard else None
        return log, events

    # -------------------------------------------------------------------------- saving and loading

    def _open_run_dir(self, run_dir: Path) -> None:
        if (run_dir / "config.json").exists() or (run_dir / "metrics.csv").exists():
            raise InputError(
                f"{run_dir} already holds a run; resume it or give another run directory"
            )
        self._attach(run_dir)
        write_json_atomic(run_dir / "config.json", self._metadata())
        write_json_atomic(run_dir / "versions.json", versions())

    def _attach(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._checkpoints = CheckpointManager(run_dir, self.config.keep_checkpoints)

    def _metadata(self) -> dict[str, Any]:
        return {
            "env_id": self.env_id,
            "preset": self.preset,
            "seed": self.seed,
            "num_timesteps": self.num_timesteps,
            "config": dataclasses.asdict(self.config),
        }

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
            "target_timesteps": self._target_timesteps,
            "best_mean_reward": self._best_mean_reward,
            "sums": self._sums,
            "guidance_scale": self.guidance.value,
            "denoiser_trainer": self.denoiser_trainer.state_dict(),
            "actor_critic": self.actor_critic.state_dict(),
            "replay": self.replay.state_dict(),
            "environment": self.environment.state_dict(),
            "generator": self.generator.get_state(),
            "acting_generator": self._acting_generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "python_rng": json.dumps(random.getstate()),
            "numpy_rng": json.dumps([numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]]),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.num_timesteps = state["num_timesteps"]
        self._target_timesteps = state["target_timesteps"]
        self._best_mean_reward = state["best_mean_reward"]
        self._sums = {name: list(entry) for name, entry in state["sums"].items()}
        self.guidance.value = state["guidance_scale"]
        self.denoiser_trainer.load_state_dict(state["denoiser_trainer"])
        self.actor_critic.load_state_dict(state["actor_critic"])
        self.replay.load_state_dict(state["replay"])
        self.generator.set_state(state["generator"])
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
        due = step % self.config.checkpoint_interval == 0 or step == self._target_timesteps
        if self._checkpoints is not None and due:
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
        return save_checkpoint(Path(path), self._weights(), self._state(), self._metadata())

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: str | gymnasium.Env | Callable[[], gymnasium.Env] | None = None,
        device: str | torch.device = "auto",
        checkpoint: str = "last",
        tensorboard: bool = False,
    ) -> PolyGRAD:
        """Load an agent from `save`'s directory or from a run directory.

        Args:
            path: what `save` wrote, or a run directory, whose run then continues with `learn`.
            env: the environment, where the saved one has no registered id.
            device: as in the constructor.
            checkpoint: of a run directory, "last" or "best" (best evaluated; its weights only, so
                it can act, but not continue training).
            tensorboard: as in the constructor.

        Raises:
            CheckpointError: nothing there, a damaged checkpoint, or one of another configuration.
        """
        path = Path(path)
        if checkpoint not in ("last", "best"):
            raise InputError(f"checkpoint must be 'last' or 'best', got {checkpoint!r}")
        if not path.is_dir():
            raise CheckpointError(f"{path} does not exist, wanted a run or checkpoint directory")
        run_dir = path if (path / "config.json").exists() else None
        if run_dir is not None:
            manager = CheckpointManager(run_dir)
            found = manager.best() if checkpoint == "best" else manager.latest()
            if found is None:
                raise CheckpointError(f"{run_dir} has no {checkpoint} checkpoint yet")
            path = found
        weights, state, metadata = load_checkpoint(path)
        env_id = metadata["env_id"]
        if env is None and ":" not in env_id and env_id not in gymnasium.registry:
            raise InputError(
                f"{path} was trained on {env_id}, which has no registered id: "
                f"give the environment as env="
            )
        agent = cls(
            env if env is not None else env_id,
            metadata["preset"],
            metadata["seed"],
            device,
            from_dict(metadata["config"]),
            tensorboard=tensorboard,
        )
        agent._load_weights(weights)
        agent.num_timesteps = metadata["num_timesteps"]
        if state is not None:
            agent._load_state(state)
            if run_dir is not None:
                agent._attach(run_dir)
        return agent

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        device: str | torch.device = "auto",
        tensorboard: bool = False,
    ) -> PolyGRAD:
        """Load a run to continue it; a run killed before its first checkpoint starts anew.

        Raises:
            CheckpointError: no run there, or its configuration cannot be read.
        """
        run_dir = Path(run_dir)
        stored = read_run_config(run_dir)
        if CheckpointManager(run_dir).latest() is not None:
            return cls.load(run_dir, device=device, tensorboard=tensorboard)
        agent = cls(
            stored["env_id"],
            stored["preset"],
            stored["seed"],
            device,
            from_dict(stored["config"]),
            tensorboard=tensorboard,
        )
        agent._attach(run_dir)
        return agent


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """Return a run directory's config.json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = run_dir / "config.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{run_dir} is not a run directory: it has no config.json; wanted one that `train` made"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


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


def _make(
    env: str | gymnasium.Env | Callable[[], gymnasium.Env], render_mode: str | None = None
) -> gymnasium.Env:
    if callable(env) and not isinstance(env, gymnasium.Env):
        made = env()
        if not isinstance(made, gymnasium.Env):
            raise InputError(
                f"the environment function returned {type(made).__name__}, wanted a gymnasium.Env"
            )
        return made
    return make_environment(env, render_mode)


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
