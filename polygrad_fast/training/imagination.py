"""Algorithm 3: train a policy in imagination."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.config import TrainConfig
from polygrad_fast.data import ActionScaler, ReplayBuffer
from polygrad_fast.denoisers.shown_range import shown_ranges
from polygrad_fast.diagnostics.on_policy import on_policy_statistics
from polygrad_fast.errors import CheckpointError, NonFiniteError
from polygrad_fast.learners import Learner
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.profiling import annotate
from polygrad_fast.ranks import Ranks
from polygrad_fast.runs.metric_sums import MetricSums, merged_sums
from polygrad_fast.runs.random_streams import RandomStreams
from polygrad_fast.sampling import TrajectoryBatch
from polygrad_fast.training.actor import Actor
from polygrad_fast.training.collector import Collector, Transition
from polygrad_fast.training.estimate import Speed, num_updates
from polygrad_fast.training.learner_steps import LearnerSteps
from polygrad_fast.training.model_updates import ModelUpdates
from polygrad_fast.world_models import WorldModel

CHECK_INTERVAL = 256
"""Updates after which what was measured is read on the host, to notice what is not finite; on a CPU
every update's is."""
_FORMER_NAMES = {"denoiser_update": "model_update"}
"""Of updates, in checkpoints before world models were exchangeable."""


class ImaginationTraining:
    """Act and store a step, train the world model, imagine, train the policy: `step` by `step`.

    Args:
        config: resolved.
        collector, action_scaler, actor: what acts where.
        normalizer: shared by all networks; its moments are set here.
        world_model, learner: what imagines, and what improves the policy.
        streams: random numbers.
        ranks: the processes that train together, each with its part of environments and batches.

    Attributes:
        num_timesteps: environment steps taken so far with all updates due after them.
        target_timesteps: where the training ends, for what is annealed.
        updates_left: by name, those of the step after `num_timesteps`, where that is taken, but not
            finished; else None.
        consistent: whether training can go on from the state as it is: not after an error within
            an update.
        stop_requested: end after the current update.
        replay: the replay buffer.
        speed: how fast it goes.
    """

    def __init__(
        self,
        config: TrainConfig,
        collector: Collector,
        action_scaler: ActionScaler,
        actor: Actor,
        replay: ReplayBuffer,
        normalizer: Normalizer,
        world_model: WorldModel,
        learner: Learner,
        streams: RandomStreams,
        ranks: Ranks,
    ):
        self.config = config
        self.collector, self.action_scaler, self.actor = collector, action_scaler, actor
        self.replay, self.normalizer = replay, normalizer
        self.world_model, self.learner, self.streams = world_model, learner, streams
        self.ranks = world_model.trainer.ranks = learner.ranks = ranks
        self.num_timesteps, self.target_timesteps = 0, config.total_timesteps
        self.updates_left: dict[str, int] | None = None
        self.consistent, self.stop_requested = True, False
        self.speed = Speed(0)
        self._sums = MetricSums()  # since the last row
        on_cpu = actor.device.type == "cpu"
        self._check_interval, self._unchecked = 1 if on_cpu else CHECK_INTERVAL, 0
        self._model_updates = ModelUpdates(
            world_model,
            replay,
            config.world_model_training.batch_size // ranks.number,
            streams.generator,
            self._sums,
        )
        self._step_learner, self._policy_updates = LearnerSteps(learner), 0

    def step(self) -> bool:
        """Take one environment step, in each of the processes, and all updates due after that;
        `count_step` then counts.

        Returns:
            False where `stop_requested` left updates for the next call.

        Raises:
            InputError: the environment returned something unusable.
            NonFiniteError: an update met NaN; on a GPU, this one or one of the last
                `CHECK_INTERVAL`.
        """
        for environment in self.collector.restore():
            self.replay.end_episode(environment)
        if self.updates_left is None:
            try:
                self._interact()
            except NonFiniteError:
                self.check_finite()  # what was measured before is the cause
                raise
        updates = {
            "model_update": (self.update_model, self._model_updates.at_once),
            "policy_update": (self.update_policy, lambda due: 1),
        }
        for name, (update, at_once) in updates.items():
            while self.updates_left[name] > 0:
                if self.ranks.any(self.stop_requested):
                    return False
                count = at_once(self.updates_left[name])
                with self.speed.measured(name, count), self._indivisible():
                    update(count)
                    self.updates_left[name] -= count
        return True

    def count_step(self) -> None:
        """Count the steps that `step` has finished."""
        self.num_timesteps, self.updates_left = self.following_step, None

    @property
    def following_step(self) -> int:
        """`num_timesteps` after the next `step`."""
        return self.num_timesteps + self.ranks.number

    def _interact(self) -> None:
        """Take one environment step and note the updates that are due after it; where the
        environments step while these run, begin the next step of the one that stepped."""
        step, collector = self.num_timesteps // self.ranks.number, self.collector
        with self.speed.measured("env_step", self.ranks.number):
            self._draw_action(step)
            self._take_environment_step(step)
            if collector.ahead:
                following = step + len(collector.environments)
                self._draw_action(following)
                collector.begin(following)

    def _draw_action(self, step: int) -> None:
        self.collector.prepare(step)
        with self._indivisible():
            self.collector.draw(step)

    def _take_environment_step(self, step: int) -> None:
        c = self.config
        taken = self.collector.take(step)
        with self._indivisible():
            if c.sampler.denoiser_actions == "clipped":
                bounds = self.action_scaler.low, self.action_scaler.high
                taken = taken._replace(action=np.clip(taken.action, *bounds))
            transitions = [Transition(*values) for values in self.ranks.exchange(taken)]
            with annotate("replay_add"):
                for transition in transitions:
                    self.replay.add(*transition)
            trained_steps = self.following_step - c.learning_starts
            if taken.over:
                environment = self.collector.turn(step)
                self._sums.add(
                    {
                        "train/episode_return": environment.episode_return,
                        "train/episode_length": environment.episode_length,
                    }
                )
            ended = any(transition.over for transition in transitions)
            by_episode = c.normalizer.refresh == "episode" and ended and trained_steps > 0
            if by_episode or trained_steps == 0:
                self._refresh_normalizer()
            model = c.world_model_training
            pretrain = model.pretrain_updates if trained_steps == 0 else 0
            delayed = trained_steps - c.policy_delay_steps
            self.updates_left = {
                "model_update": pretrain + self._due(trained_steps, model.updates_per_env_step),
                "policy_update": self._due(delayed, c.policy_updates_per_env_step),
            }

    def update_model(self, count: int = 1) -> None:
        """Train the world model on windows of the replay buffer, `count` times.

        Raises:
            NonFiniteError: a loss is not finite, or was not in an update before.
        """
        with annotate("model_update"):
            self._model_updates.take(count)
            self._check_if_due()

    def update_policy(self, count: int = 1) -> None:
        """Imagine a batch under the current policy and train the policy on it, `count` times.

        Raises:
            NonFiniteError: something imagined, a loss or a gradient is not finite, or was not in an
                update before.
        """
        for _ in range(count):
            self._update_policy()

    def _update_policy(self) -> None:
        with annotate("policy_update"):
            with self.speed.measured("sample"):
                number = self.config.imagined_batch_size // self.ranks.number
                batch = self.imagine(number, normalized=True)
            self._sums.note("imagined", batch.finite())
            self._check_if_due()
            terminals = self.normalizer.unnormalize(batch.terminals, "terminals")
            flags = (terminals > 0.5).to(batch.rewards.dtype)
            interval = self.config.diagnostics_interval
            if interval > 0 and self._policy_updates % interval == 0:
                self._measure_actions(batch, flags)
            self._policy_updates += 1
            with annotate("a2c_update"):
                metrics = self._step_learner(
                    batch.observations,
                    batch.actions,
                    batch.rewards,
                    flags,
                    progress=min(1.0, self.following_step / self.target_timesteps),
                )
            self.actor.acting.refresh()
            tuned = self.world_model.feedback(metrics)
            prefix = self.learner.name
            self._sums.add({f"{prefix}/{name}": value for name, value in metrics.items()})
            if tuned:
                self._sums.add(tuned)
            self._check_if_due()

    def check_finite(self) -> None:
        """Read what was measured since the last row on the host.

        Raises:
            NonFiniteError: something was not finite; the state is none to continue from.
        """
        with annotate("check_finite"):
            self._unchecked = 0
            try:
                self._sums.check()
            except NonFiniteError:
                self.consistent = False
                raise

    def _check_if_due(self) -> None:
        self._unchecked += 1
        if self._unchecked >= self._check_interval:
            self.check_finite()

    def _measure_actions(self, batch: TrajectoryBatch, terminals: Tensor) -> None:
        """Measure whether the actions of a normalized batch are the policy's."""
        found = on_policy_statistics(
            self.learner.policy, self.normalizer, batch.observations, batch.actions, terminals
        )
        self._sums.add({f"on_policy/{name}": value for name, value in vars(found).items()})

    def imagine(self, num_trajectories: int, normalized: bool = False) -> TrajectoryBatch:
        """Imagine trajectories under the current policy, from observations in the replay buffer.

        Raises:
            InputError: no window in the buffer yet.
        """
        generator, c = self.streams.generator, self.config
        with annotate("imagine"):
            observations = self.replay.sample_initial_observations(
                num_trajectories, generator, c.newest_start_states, c.share_of_newest
            )
            if normalized:
                observations = self.normalizer.normalize(observations, "observations")
            policy = self.learner.policy
            return self.world_model.imagine(observations, policy, generator, normalized)

    def metrics(self) -> dict[str, float]:
        """Return the means of what was measured, in all processes, since `clear_metrics`."""
        return merged_sums(self.ranks.gather(self._sums.state_dict())).means()

    def clear_metrics(self) -> None:
        """Begin a new row of metrics."""
        self._sums.clear()

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return all networks by name."""
        return {
            **self.world_model.modules(),
            "normalizer": self.normalizer,
            **self.learner.modules(),
        }

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of `modules` as "module.name"."""
        return {
            f"{name}.{key}": tensor
            for name, module in self.modules().items()
            for key, tensor in module.state_dict().items()
        }

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore what `weights` returned.

        Raises:
            CheckpointError: they are of other networks.
        """
        for name, module in self.modules().items():
            prefix = f"{name}."
            part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                raise CheckpointError(
                    f"the checkpoint's {name} is not of this configuration: "
                    f"{str(error).splitlines()[-1].strip()}"
                ) from error

    def state_dict(self) -> dict[str, Any]:
        """Return everything but weights that continues the training exactly, of all processes; to
        be called in each of them."""
        gather = self.ranks.gather
        streams, *others = gather(self.streams.state_dict())
        return {
            "num_timesteps": self.num_timesteps,
            "sums": merged_sums(gather(self._sums.state_dict())).state_dict(),
            "begun_step": self.updates_left,
            "policy_updates": self._policy_updates,
            **self.world_model.state_dict(),
            "actor_critic": self.learner.state_dict(),
            "replay": self.replay.state_dict(),
            **Collector.joined_states(gather(self.collector.state_dict())),
            **self.actor.acting.state_dict(),
            **streams,
            "other_streams": others,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the environments follow with the next step."""
        self.num_timesteps = state["num_timesteps"]
        self.ranks.check_multiples(num_timesteps=self.num_timesteps)
        # what was measured before is one process's, the first
        self._sums.load_state_dict(state["sums"] if self.ranks.index == 0 else {})
        self._model_updates.reset()
        self.world_model.load_state_dict(state)
        self.learner.load_state_dict(state["actor_critic"])
        self.replay.load_state_dict(state["replay"])
        self.actor.acting.load_state_dict(state)
        self.streams.load_state_dict(state, self.num_timesteps)
        self.collector.load_state_dict(state, self.ranks.index, self.ranks.number)
        left = state.get("begun_step")
        if left is not None:
            left = {_FORMER_NAMES.get(name, name): count for name, count in left.items()}
        self.updates_left = left
        self._policy_updates = state.get("policy_updates", 0)  # older checkpoints have none

    @contextlib.contextmanager
    def _indivisible(self) -> Iterator[None]:
        """What an error inside leaves half done is no state to continue from."""
        self.consistent = False
        yield
        self.consistent = True

    def _due(self, steps: int, ratio: float) -> int:
        """Return how many updates fall on the last step of each process, of `steps` steps in all,
        at `ratio` updates per step."""
        return num_updates(steps, ratio) - num_updates(steps - self.ranks.number, ratio)

    def _refresh_normalizer(self) -> None:
        with annotate("normalizer_update"):
            c, normalizer = self.config.normalizer, self.normalizer
            mean, scale = normalizer.state_moments()
            normalizer.update(self.replay.moments(), c.min_std())
            mean_now, scale_now = normalizer.state_moments()
            for bounds in shown_ranges(self.world_model.modules().values()):
                bounds.keep_raw((mean_now - mean) / scale, scale_now / scale)
            if c.preserve_functions and self.num_timesteps >= self.config.learning_starts:
                self.learner.keep_functions(mean[:-1], scale[:-1])
            self.actor.acting.refresh()
