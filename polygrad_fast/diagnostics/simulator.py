"""Environments as simulators that start from any observation.

A `Simulator` sets an environment to the state that an observation shows. It finds out by itself how
observations are made of the state, and checks that on steps the environment has taken, instead of
knowing environments by name: MuJoCo environments of gymnasium whose observations begin with
positions (without those that nothing depends on, x of Hopper-v5, x and y of Ant-v5, which become 0)
and velocities, or have sines and cosines in place of angles (InvertedDoublePendulum-v5), and
Pendulum-v1.

Hopper-v5, Walker2d-v5 and InvertedDoublePendulum-v5 show velocities clipped to [-10, 10]. An
observation with a velocity at the bound does not say what the state is: `is_determined` tells. The
reward of Ant-v5 depends also on where a body was a moment before; what it differs by is 1% of its
standard deviation in 9 of 10 steps.
"""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium
import numpy as np

from polygrad_fast.data.environment import check_spaces, environment_name
from polygrad_fast.errors import InputError

OBSERVATION_TOLERANCE, REWARD_TOLERANCE = 1e-2, 0.05
"""Largest errors of a step that counts as repeated, in standard deviations; of the observation the
root mean square."""
MIN_REPEATED = 0.95
"""Least share of the steps checked that must be repeated."""
_HUGE = 1e6
"""A velocity that any clip changes."""


class StateLayout(Protocol):
    """How an environment's observation shows its state."""

    velocity_limit: np.ndarray
    """Largest magnitude of every velocity that observations show, infinite without a clip."""

    def velocities(self, observations: np.ndarray) -> np.ndarray:
        """Return the entries of observations [N, S] that are velocities."""

    num_hidden: int
    """Leading positions that observations do not show."""

    def set(self, observation: np.ndarray, hidden: np.ndarray) -> None:
        """Put the environment into the state that an observation [S] shows, with the positions that
        it hides."""

    def hidden(self) -> np.ndarray:
        """Return the positions that observations hide, [num_hidden], as they now are."""

    def state(self) -> Any:
        """Return the state, for `restore`."""

    def restore(self, state: Any) -> None:
        """Put the environment into a state that `state` returned."""


class _MujocoLayout:
    """(qpos without `hidden` leading entries, qvel, anything that follows from them)."""

    def __init__(self, environment: Any, hidden: int):
        self._environment, self.num_hidden = environment, hidden
        self._num_positions = environment.model.nq - hidden
        self._num_velocities = environment.model.nv
        self._num_shown = self._num_positions
        self.velocity_limit = np.full(self._num_velocities, np.inf)

    def fits(self, observation_dim: int) -> bool:
        """Whether observations are long enough."""
        return observation_dim >= self._num_shown + self._num_velocities

    def measure_limits(self) -> None:
        """Find out at which magnitude velocities are clipped, by showing huge ones."""
        before = self.state()
        self.restore((before[0], np.full(self._num_velocities, _HUGE)))
        shown = np.abs(self.velocities(np.asarray(self._environment._get_obs())[None])[0])
        self.velocity_limit = np.where(shown < 0.5 * _HUGE, shown, np.inf)
        self.restore(before)

    def velocities(self, observations: np.ndarray) -> np.ndarray:
        first = self._num_shown
        return observations[:, first : first + self._num_velocities]

    def positions(self, observation: np.ndarray) -> np.ndarray:
        """Return qpos without its hidden entries."""
        return observation[: self._num_positions]

    def set(self, observation: np.ndarray, hidden: np.ndarray) -> None:
        observation = observation.astype(np.float64)
        positions = np.concatenate([hidden, self.positions(observation)])
        self.restore((positions, self.velocities(observation[None])[0]))

    def hidden(self) -> np.ndarray:
        return self._environment.data.qpos[: self.num_hidden].copy()

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        data = self._environment.data
        return data.qpos.copy(), data.qvel.copy()

    def restore(self, state: tuple[np.ndarray, np.ndarray]) -> None:
        self._environment.set_state(*state)


class _MujocoAngleLayout(_MujocoLayout):
    """(qpos[0], sin qpos[1:], cos qpos[1:], qvel, anything that follows from them)."""

    def __init__(self, environment: Any):
        super().__init__(environment, hidden=0)
        self._num_angles = self._num_positions - 1
        self._num_shown = 1 + 2 * self._num_angles

    def positions(self, observation: np.ndarray) -> np.ndarray:
        sines, cosines = observation[1 : self._num_shown].reshape(2, self._num_angles)
        return np.concatenate([observation[:1], np.arctan2(sines, cosines)])


class _PendulumLayout:
    """(cos angle, sin angle, velocity), of an environment with `state` = (angle, velocity)."""

    num_hidden = 0

    def __init__(self, environment: Any):
        self._environment = environment
        self.velocity_limit = np.full(1, np.inf)  # its state has the clipped velocity itself

    def velocities(self, observations: np.ndarray) -> np.ndarray:
        return observations[:, 2:]

    def hidden(self) -> np.ndarray:
        return np.zeros(0)

    def set(self, observation: np.ndarray, hidden: np.ndarray) -> None:
        cosine, sine, velocity = observation.astype(np.float64)
        self.restore(np.array([np.arctan2(sine, cosine), velocity]))

    def state(self) -> np.ndarray:
        return np.array(self._environment.state)

    def restore(self, state: np.ndarray) -> None:
        self._environment.state = state.copy()


class Simulator:
    """An environment that is put into the state that an observation shows.

    Args:
        environment: is reset, stepped and left as it then is; its wrappers see the steps, and must
            not depend on the past. Truncation is ignored.
        observations, actions, rewards, terminals, next_observations: steps that such an environment
            has taken, [N, S], [N, A] in the environment's units, [N], 0/1 [N], [N, S]; at least
            one, by which it is checked that observations determine what happens.
        scales: units of errors, of observations [S] and rewards [1].

    Attributes:
        share_repeated: share of the steps checked that the simulator repeats from their
            observations.

    Raises:
        InputError: observations are of another size, do not determine the state or not by any
            layout known here, or all steps given have a clipped velocity.
    """

    def __init__(
        self,
        environment: gymnasium.Env,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminals: np.ndarray,
        next_observations: np.ndarray,
        scales: tuple[np.ndarray, np.ndarray],
    ):
        self.environment = environment
        observation_dim, _ = check_spaces(environment)
        self.name = environment_name(environment)
        if observations.shape[1] != observation_dim:
            raise InputError(
                f"{self.name} must have observations of {observations.shape[1]} entries as the "
                f"steps have, got {observation_dim}"
            )
        environment.reset(seed=0)
        best = 0.0
        for layout in _layouts(environment.unwrapped, observation_dim):
            self._layout = layout
            chosen = self.is_determined(observations)
            if not chosen.any():
                continue
            repeated = [
                self._repeats(*step, scales)
                for step in zip(
                    observations[chosen],
                    actions[chosen],
                    rewards[chosen],
                    terminals[chosen],
                    next_observations[chosen],
                    strict=True,
                )
            ]
            self.share_repeated = float(np.mean(repeated))
            if self.share_repeated >= MIN_REPEATED:
                return
            best = max(best, self.share_repeated)
        raise InputError(
            f"{self.name} must be an environment whose observations determine its state (MuJoCo's "
            f"Hopper, Walker2d, HalfCheetah, Swimmer, Ant, Humanoid, InvertedPendulum and "
            f"InvertedDoublePendulum, or Pendulum, without wrappers that change observations), got "
            f"one of which {best:.0%} of its own steps are repeated from their observations"
        )

    def is_determined(self, observations: np.ndarray) -> np.ndarray:
        """Return of which observations [N, S] no velocity is at the bound where it is clipped."""
        limits = self._layout.velocity_limit
        return (np.abs(self._layout.velocities(observations)) < limits).all(axis=1)

    def set(self, observation: np.ndarray, hidden: np.ndarray | None = None) -> None:
        """Put the environment into the state that an observation [S] shows.

        Args:
            hidden: the positions that observations do not show; 0 where none are given.
        """
        self._layout.set(
            observation, np.zeros(self._layout.num_hidden) if hidden is None else hidden
        )

    def hidden(self) -> np.ndarray:
        """Return the positions that observations do not show, as they now are."""
        return self._layout.hidden()

    def moved(self, hidden: np.ndarray, observation: np.ndarray) -> np.ndarray:
        """Return where hidden positions are a step later, by the velocities that the observation
        [S] after the step shows."""
        velocities = self._layout.velocities(observation[None])[0]
        dt = getattr(self.environment.unwrapped, "dt", 0.0)
        return hidden + dt * velocities[: len(hidden)]

    def state(self) -> Any:
        """Return the environment's state, for `restore`."""
        return self._layout.state()

    def restore(self, state: Any) -> None:
        """Put the environment into a state that `state` returned."""
        self._layout.restore(state)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Take an action [A] in the environment's units and return (observation [S], reward,
        terminated); all of the observation is NaN where the simulation blew up."""
        data = getattr(self.environment.unwrapped, "data", None)
        before = getattr(data, "time", 0.0)
        observation, reward, terminated, _, _ = self.environment.step(action)
        observation = np.asarray(observation, dtype=np.float32)
        blew_up = getattr(data, "time", 0.0) < before  # then MuJoCo resets itself, the clock too
        if blew_up or not (np.isfinite(observation).all() and np.isfinite(reward)):
            return np.full_like(observation, np.nan), float("nan"), False
        return observation, float(reward), bool(terminated)

    def _repeats(
        self,
        observation: np.ndarray,
        action: np.ndarray,
        reward: float,
        terminal: float,
        next_observation: np.ndarray,
        scales: tuple[np.ndarray, np.ndarray],
    ) -> bool:
        """Return whether a step from an observation is the step as it was."""
        self.set(observation)
        got, got_reward, got_terminal = self.step(action)
        if got_terminal != bool(terminal):
            return False
        if not abs(got_reward - reward) <= REWARD_TOLERANCE * scales[1].item():
            return False
        if terminal:  # the replay buffer has no observation after it
            return True
        error = np.sqrt(np.square((got - next_observation) / scales[0]).mean())
        return bool(error <= OBSERVATION_TOLERANCE)


def check_determined(environment: gymnasium.Env, num_steps: int = 64) -> None:
    """Play some random steps and raise InputError unless observations determine what happens, as
    `Simulator` says; the environment is reset and stepped."""
    action_space = environment.action_space
    action_space.seed(0)
    observation, _ = environment.reset(seed=0)
    steps: list[tuple] = []
    for _ in range(num_steps):
        action = action_space.sample()
        following, reward, terminated, truncated, _ = environment.step(action)
        steps.append((observation, action, reward, terminated, following))
        observation = environment.reset()[0] if terminated or truncated else following
    columns = [np.asarray(column, dtype=np.float32) for column in zip(*steps, strict=True)]
    scales = columns[0].std(axis=0) + 1e-6, columns[2].std(keepdims=True) + 1e-6
    Simulator(environment, *columns, scales)


def _layouts(environment: Any, observation_dim: int) -> list[StateLayout]:
    """Return the layouts that an environment's observations may have."""
    if all(hasattr(environment, name) for name in ("model", "data", "set_state", "_get_obs")):
        hidden = range(min(3, environment.model.nq))
        candidates = [_MujocoLayout(environment, count) for count in hidden]
        candidates.append(_MujocoAngleLayout(environment))
        found = [layout for layout in candidates if layout.fits(observation_dim)]
        for layout in found:
            layout.measure_limits()
        return found
    if observation_dim == 3 and np.shape(getattr(environment, "state", None)) == (2,):
        return [_PendulumLayout(environment)]
    return []
