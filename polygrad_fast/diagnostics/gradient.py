"""Is the imagined policy gradient true? Compared with the simulator's, and taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import torch
from torch import Tensor

from polygrad_fast.arguments import as_integer
from polygrad_fast.config import A2CConfig
from polygrad_fast.data import ActionScaler, ReplayBuffer
from polygrad_fast.diagnostics.agreement import Agreement, agreement, cosine
from polygrad_fast.diagnostics.critic import CriticError, critic_error
from polygrad_fast.diagnostics.on_policy import OnPolicyStatistics, on_policy_statistics
from polygrad_fast.diagnostics.rollouts import (
    Transitions,
    imagine,
    simulate,
    simulator_outcomes,
    transitions,
)
from polygrad_fast.diagnostics.simulator import Simulator
from polygrad_fast.errors import InputError
from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.sampling import TrajectoryBatch
from polygrad_fast.world_models import WorldModel

CHECKED_STEPS = 256
"""Steps of the replay buffer by which the simulator is checked."""


@dataclass(frozen=True)
class OneStepError:
    """What is wrong with imagined steps, from the same state and action as the simulator's."""

    rms: float
    """Root mean square of the next observation's error, in normalized units, over steps that
    neither calls terminal."""
    median: float
    """Median over steps of the root mean square over their entries."""
    reward_rms: float
    """Likewise of the reward, over all steps."""
    missed_terminals: float
    """Share of all steps that are terminal only in the simulator."""
    false_terminals: float
    """Share of all steps that are terminal only in imagination."""
    unsimulated: float
    """Share of the imagined steps from states in which the simulation blows up; left out."""


@dataclass(frozen=True)
class GradientReport:
    """The imagined policy gradient beside the simulated one.

    Gradients are those of the actor's loss, without its entropy and saturation terms, which need no
    trajectories: of current policy, normalizer and target critic, as the next update would have
    them. Imagined ones at the run's own lambda are estimated as the run does it, all others by the
    score function. "Newest" and "all" are start observations of the replay buffer.
    """

    newest: Agreement
    """Imagined with simulated, newest starts, at the run's own lambda."""
    newest_lambda_0: Agreement
    all: Agreement
    all_lambda_0: Agreement
    actions: Agreement
    """At lambda 0, newest starts: imagined states and actions with the simulator's rewards, next
    states and terminals, beside the simulated gradient. What is missing here, the imagined actions
    or states did."""
    model: float
    """At lambda 0: cosine of imagined with simulated outcomes of the same states and actions. What
    is missing here, the model's outcomes did."""
    starts: Agreement
    """Simulated from all starts beside simulated from the newest, at the run's own lambda: what it
    costs to learn from old starts."""
    on_policy: OnPolicyStatistics
    """Of the actions imagined from the newest starts."""
    error: OneStepError
    critic: CriticError
    """Of the critic on which all these gradients rest."""
    gae_lambda: float
    estimator: str
    """Of the imagined gradients at the run's own lambda, "score" or "pathwise"."""
    num_newest: int
    """Starts among which the newest are drawn, without those whose state is not determined."""
    num_all: int
    share_determined: float
    """Share of all starts whose observation determines the state (no clipped velocity)."""
    share_repeated: float
    """Share of the run's own steps that the simulator repeats from their observations."""

    def summary(self) -> dict[str, float | None]:
        """Return everything that is a number by name."""
        found: dict[str, float | None] = {
            "cosine": self.newest.cosine,
            "cosine_ceiling": self.newest.ceiling,
            "r2": self.on_policy.r2,
        }
        for name, value in vars(self).items():
            if name == "estimator":
                continue
            if dataclasses.is_dataclass(value):
                found |= {f"{name}/{key}": number for key, number in vars(value).items()}
            else:
                found[name] = value
        return found


def policy_gradient_report(
    environment: gymnasium.Env,
    world_model: WorldModel,
    learner: ActorCritic,
    replay: ReplayBuffer,
    action_scaler: ActionScaler,
    num: int = 4096,
    newest: int = 4000,
    seed: int = 0,
    batch_size: int = 1024,
) -> GradientReport:
    """Compare the policy gradient that imagination gives with the simulator's, from the same start
    observations, with the same policy, normalizer and critic; nothing of them changes.

    Args:
        environment: like the one trained on; it is reset, stepped and left as it then is.
        world_model, learner, replay, action_scaler: of the run.
        num: trajectories per gradient, imagined and simulated, half of them in either half.
        newest: the newest so many starts of the replay buffer are compared with all of them.
        seed: of starts, actions and imagination.
        batch_size: trajectories imagined at a time.

    Raises:
        InputError: num < 8 or newest < 1, too few starts, or an environment whose observations do
            not determine its state.
        NonFiniteError: a gradient is not finite.
    """
    num = as_integer(num, "num", 8)
    newest = as_integer(newest, "newest", 1)
    seed = as_integer(seed, "seed", 0, below=2**32)
    if replay.num_windows == 0:
        raise InputError(
            "the gradient needs start observations in the replay buffer, got none; the best "
            "checkpoint has no replay buffer, the last one has"
        )
    ways = _BothWays(environment, world_model, learner, replay, action_scaler, seed, batch_size)
    observations = replay.initial_observations()
    determined = ways.simulator.is_determined(observations.cpu().numpy())
    determined = torch.from_numpy(determined).to(observations.device)
    newest_starts = observations[-newest:][determined[-newest:]]
    all_starts = observations[determined]
    if len(newest_starts) == 0:
        raise InputError(
            f"the gradient needs start observations that determine the state, got a clipped "
            f"velocity in all of the newest {newest}"
        )
    imagined, imagined_from_all = (
        ways.halves(ways.imagine, starts, num) for starts in (newest_starts, all_starts)
    )
    simulated, simulated_from_all = (
        ways.halves(ways.simulate, starts, num) for starts in (newest_starts, all_starts)
    )
    own, true, single = ways.gradient, ways.score_gradient, ways.gradient_at_lambda_0
    steps = [ways.transitions(batch) for batch in imagined]
    shown, happened, error = ways.simulator_outcomes(steps)
    true_gradients = _each(ways.gradient_of_transitions, happened)
    whole = TrajectoryBatch.joined(imagined)
    return GradientReport(
        newest=agreement(_each(own, imagined), _each(true, simulated)),
        newest_lambda_0=agreement(_each(single, imagined), _each(single, simulated)),
        all=agreement(_each(own, imagined_from_all), _each(true, simulated_from_all)),
        all_lambda_0=agreement(_each(single, imagined_from_all), _each(single, simulated_from_all)),
        actions=agreement(true_gradients, _each(single, simulated)),
        model=cosine(sum(_each(ways.gradient_of_transitions, shown)), sum(true_gradients)),
        starts=agreement(_each(true, simulated_from_all), _each(true, simulated)),
        on_policy=on_policy_statistics(
            learner.policy,
            learner.normalizer,
            whole.observations,
            whole.actions,
            ways.flags(whole),
        ),
        error=error,
        critic=critic_error(environment, world_model, learner, action_scaler, seed),
        gae_lambda=learner.config.gae_lambda,
        estimator=ways.estimator,
        num_newest=len(newest_starts),
        num_all=len(all_starts),
        share_determined=determined.double().mean().item(),
        share_repeated=ways.simulator.share_repeated,
    )


class _BothWays:
    """From start observations to gradients, by imagination and by the simulator."""

    def __init__(
        self,
        environment: gymnasium.Env,
        world_model: WorldModel,
        learner: ActorCritic,
        replay: ReplayBuffer,
        action_scaler: ActionScaler,
        seed: int,
        batch_size: int,
    ):
        self._world_model, self._learner, self._batch_size = world_model, learner, batch_size
        self._normalizer, self._action_scaler = learner.normalizer, action_scaler
        self._horizon = replay.horizon
        self._on_device = torch.Generator(replay.device).manual_seed(seed)
        self._on_host = torch.Generator().manual_seed(seed)
        # of these terms the gradient needs no trajectories: they would only flatter the cosine
        self._config = replace(learner.config, entropy_coef=0.0, saturation_coef=0.0)
        self._dynamics = world_model.dynamics()
        if self._dynamics is None:  # of another world model than the run's
            self._config = replace(self._config, gradient_estimator="score")
        self.estimator = self._config.gradient_estimator
        if self.estimator == "pathwise":  # advantages in the unit of what it differentiates
            self._config = replace(self._config, normalize_advantages=False)
        self._score = replace(self._config, gradient_estimator="score")
        self.simulator = _checked_simulator(
            environment, replay, self._normalizer, action_scaler, self._on_device
        )

    def halves(
        self, way: Callable[[Tensor], TrajectoryBatch], starts: Tensor, num: int
    ) -> list[TrajectoryBatch]:
        """Return two independent batches of `num` trajectories together, from drawn starts."""
        picks = torch.randint(len(starts), (2, num // 2), generator=self._on_host)
        return [way(starts[half]) for half in picks.to(starts.device)]

    def imagine(self, starts: Tensor) -> TrajectoryBatch:
        """Imagine from raw observations [B, S]; a normalized batch."""
        observations = self._normalizer.normalize(starts, "observations")
        policy, generator = self._learner.policy, self._on_device
        return imagine(self._world_model, policy, observations, generator, self._batch_size)

    def simulate(self, starts: Tensor) -> TrajectoryBatch:
        """Play from raw observations [B, S]; a normalized batch."""
        return simulate(
            self.simulator,
            self._learner.policy,
            self._normalizer,
            self._action_scaler,
            starts,
            self._horizon,
            self._on_host,
        )

    def flags(self, batch: TrajectoryBatch) -> Tensor:
        """Return a normalized batch's terminal flags, 0/1 [B, H]."""
        terminals = self._normalizer.unnormalize(batch.terminals, "terminals")
        return (terminals > 0.5).to(batch.rewards.dtype)

    def transitions(self, batch: TrajectoryBatch) -> Transitions:
        """Return the single steps of a batch."""
        return transitions(batch, self.flags(batch))

    def gradient(self, batch: TrajectoryBatch) -> Tensor:
        """Return the actor's gradient [P] as the run estimates it, of imagined trajectories."""
        return self._gradient(batch, self._config)

    def score_gradient(self, batch: TrajectoryBatch) -> Tensor:
        """Return the actor's gradient [P] by the score function, at the run's own lambda."""
        return self._gradient(batch, self._score)

    def _gradient(self, batch: TrajectoryBatch, config: A2CConfig) -> Tensor:
        return self._learner.actor_gradient(
            batch.observations,
            batch.actions,
            batch.rewards,
            self.flags(batch),
            config,
            self._dynamics,
        )

    def gradient_at_lambda_0(self, batch: TrajectoryBatch) -> Tensor:
        """Return the actor's gradient [P] at lambda 0."""
        return self.gradient_of_transitions(self.transitions(batch))

    def gradient_of_transitions(self, steps: Transitions) -> Tensor:
        """Return the actor's gradient [P] from single steps."""
        return self._learner.actor_gradient(**steps.as_trajectories(), config=self._score)

    def simulator_outcomes(
        self, imagined: list[Transitions]
    ) -> tuple[list[Transitions], list[Transitions], OneStepError]:
        """Return the imagined steps that the simulator can take, with imagined and with its own
        outcomes, and the errors of the former."""
        shown, true = [], []
        for steps in imagined:
            outcomes = simulator_outcomes(
                self.simulator, self._normalizer, self._action_scaler, steps
            )
            simulated = ~torch.isnan(outcomes.rewards)
            shown.append(steps.of(simulated))
            true.append(outcomes.of(simulated))
        return shown, true, _one_step_error(imagined, shown, true)


def _one_step_error(
    imagined: list[Transitions], shown: list[Transitions], true: list[Transitions]
) -> OneStepError:
    def column(parts: list[Transitions], name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts]).double()

    ends, ends_truly = column(shown, "terminals"), column(true, "terminals")
    goes_on = (ends == 0) & (ends_truly == 0)
    differences = column(shown, "next_observations") - column(true, "next_observations")
    squares = differences[goes_on].square().mean(dim=-1)
    rewards = column(shown, "rewards") - column(true, "rewards")
    return OneStepError(
        rms=squares.mean().sqrt().item() if len(squares) else 0.0,
        median=squares.median().sqrt().item() if len(squares) else 0.0,
        reward_rms=rewards.square().mean().sqrt().item(),
        missed_terminals=((1 - ends) * ends_truly).mean().item(),
        false_terminals=(ends * (1 - ends_truly)).mean().item(),
        unsimulated=1.0 - len(ends) / len(column(imagined, "terminals")),
    )


def _checked_simulator(
    environment: gymnasium.Env,
    replay: ReplayBuffer,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    generator: torch.Generator,
) -> Simulator:
    """Return the environment as a simulator, checked by steps of the replay buffer."""
    windows = replay.sample(CHECKED_STEPS, generator)
    first, following = windows.observations[:, 0], windows.observations[:, 1]
    columns = (first, windows.actions[:, 0], windows.rewards[:, 0], windows.terminals[:, 0])
    observations, actions, rewards, terminals, next_observations = (
        column.cpu().numpy() for column in (*columns, following)
    )
    scales = normalizer.observations_scale.cpu().numpy(), normalizer.rewards_scale.cpu().numpy()
    actions = action_scaler.to_environment(actions)
    return Simulator(
        environment, observations, actions, rewards, terminals, next_observations, scales
    )


def _each(gradient: Callable[[Any], Tensor], halves: list[Any]) -> tuple[Tensor, Tensor]:
    first, second = halves
    return gradient(first), gradient(second)
