"""Given actions played from given states of a MuJoCo environment.

Two ways: gymnasium's loop, which steps the environment itself, and `mujoco.rollout`, which computes
the physics of all trajectories on native threads; observations, rewards and terminals are then
those that the environment's own `step` makes of the states. The second holds where these depend on
positions, velocities and actions alone (Hopper, Walker2d, HalfCheetah, Swimmer, InvertedPendulum;
not where they read contact forces or the places of bodies, as Ant's), and is taken only after it
has repeated the loop to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import gymnasium
import numpy as np
from tqdm import tqdm

from polygrad_fast.data.environment import check_spaces, environment_name
from polygrad_fast.errors import InputError

CHECKED_TRAJECTORIES = 16
"""Trajectories on which the two ways are compared."""
_MAX_NUMBERS = 4_000_000
"""Numbers that one call of `mujoco.rollout` returns."""
_NEEDED = ("model", "data", "set_state", "do_simulation", "frame_skip", "dt")


@dataclass(frozen=True)
class Played:
    """What the simulator answered to N sequences of T actions, in float64.

    Past a terminal step, and from where a simulation blew up, observations and rewards are NaN.
    """

    observations: np.ndarray  # [N, T, S], after each action
    rewards: np.ndarray  # [N, T]
    terminals: np.ndarray  # [N, T], bool; True past a terminal step too

    @classmethod
    def nothing(cls, num: int, num_steps: int, observation_dim: int) -> Played:
        """Return what is filled while playing."""
        return cls(
            np.full((num, num_steps, observation_dim), np.nan),
            np.full((num, num_steps), np.nan),
            np.zeros((num, num_steps), dtype=bool),
        )

    def first(self, num_steps: int) -> Played:
        """Return the answers to the first actions."""
        return Played(*(getattr(self, field.name)[:, :num_steps] for field in fields(self)))

    def equals(self, other: Played) -> bool:
        """Return whether all numbers are the same, NaN where NaN is."""
        return all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name), equal_nan=True)
            for field in fields(self)
        )


class MujocoReplay:
    """A MuJoCo environment of gymnasium that is put into states and plays actions from there.

    Args:
        environment: is reset, stepped and left as it then is; its wrappers see the steps.
        threads: of `mujoco.rollout`.
        progress: show a progress bar while playing.

    Attributes:
        is_native: whether `play` uses `mujoco.rollout`.
        environment, name, observation_dim: of the environment.

    Raises:
        InputError: not a MuJoCo environment.
    """

    def __init__(self, environment: gymnasium.Env, threads: int = 1, progress: bool = False):
        self.environment, self.name = environment, environment_name(environment)
        self.observation_dim, _ = check_spaces(environment)
        self._bare, self._threads, self._progress = environment.unwrapped, threads, progress
        if not all(hasattr(self._bare, name) for name in _NEEDED):
            raise InputError(
                f"environment must be one of gymnasium's MuJoCo environments, whose state can be "
                f"set, got {self.name}"
            )
        import mujoco  # an extra

        self._mujoco, self._kind = mujoco, mujoco.mjtState.mjSTATE_FULLPHYSICS
        self._state_size = mujoco.mj_stateSize(self._bare.model, self._kind)
        self.is_native = False
        environment.reset(seed=0)  # wrappers refuse steps before a reset

    def state(self) -> np.ndarray:
        """Return the environment's whole state: float64, [time, qpos, qvel, ...]."""
        state = np.empty(self._state_size)
        self._mujoco.mj_getState(self._bare.model, self._bare.data, state, self._kind)
        return state

    def set(self, state: np.ndarray) -> None:
        """Put the environment into a state that `state` returned, whatever came before: also what
        the solver begins its iterations from is reset."""
        model, data = self._bare.model, self._bare.data
        self._mujoco.mj_resetData(model, data)
        self._mujoco.mj_setState(model, data, state, self._kind)
        self._mujoco.mj_forward(model, data)

    def play(self, states: np.ndarray, actions: np.ndarray) -> Played:
        """Play actions [N, T, A] in the environment's units from states [N, ...]."""
        return (self.play_natively if self.is_native else self.play_in_a_loop)(states, actions)

    def check(self, states: np.ndarray, actions: np.ndarray) -> None:
        """Let `play` use `mujoco.rollout` if on the first of these it gives what the loop gives, to
        the last bit."""
        states, actions = states[:CHECKED_TRAJECTORIES], actions[:CHECKED_TRAJECTORIES]
        wanted = self.play_in_a_loop(states, actions)
        self.is_native = self.play_natively(states, actions).equals(wanted)

    def play_in_a_loop(self, states: np.ndarray, actions: np.ndarray) -> Played:
        """Play by stepping the environment."""
        played = Played.nothing(*actions.shape[:2], self.observation_dim)
        for i in self._bar(len(states)):
            self._play_one(states[i], actions[i], played, i)
        return played

    def play_natively(self, states: np.ndarray, actions: np.ndarray) -> Played:
        """Play by `mujoco.rollout`; for environments of this kind (see `check`) only."""
        from mujoco.rollout import Rollout

        model, skip = self._bare.model, self._bare.frame_skip
        played = Played.nothing(*actions.shape[:2], self.observation_dim)
        size = max(1, _MAX_NUMBERS // (actions.shape[1] * skip * self._state_size))
        workers = [self._mujoco.MjData(model) for _ in range(max(1, self._threads))]
        bar = iter(self._bar(len(states)))
        with Rollout(nthread=len(workers) if len(workers) > 1 else 0) as rollout:
            for first in range(0, len(states), size):
                part = slice(first, first + size)
                controls = np.repeat(actions[part], skip, axis=1).astype(np.float64)
                rows, _ = rollout.rollout(model, workers, states[part], controls)
                rows = rows[:, skip - 1 :: skip]
                for i, trajectory in enumerate(rows, first):
                    next(bar)
                    with self._stepping_through(trajectory):
                        self._play_one(states[i], actions[i], played, i)
        for _ in bar:  # ends it
            pass
        return played

    def _play_one(self, state: np.ndarray, actions: np.ndarray, played: Played, i: int) -> None:
        """Play one trajectory up to its end and note what the environment answers."""
        data, dt = self._bare.data, self._bare.dt
        self.set(state)
        for t, action in enumerate(actions):
            before = data.time
            observation, reward, terminated, _, _ = self.environment.step(action)
            # A simulation that blows up is begun anew by MuJoCo, its clock too; a rollout stands.
            if abs(data.time - before - dt) > dt / 2 or not np.isfinite(observation).all():
                return
            played.observations[i, t], played.rewards[i, t] = observation, reward
            if terminated:
                played.terminals[i, t:] = True
                return

    @contextlib.contextmanager
    def _stepping_through(self, states: np.ndarray) -> Iterator[None]:
        """Let the environment's steps lead to given states instead of simulating."""
        waiting = iter(states)

        def take_next(control: np.ndarray, n_frames: int) -> None:
            self._mujoco.mj_setState(self._bare.model, self._bare.data, next(waiting), self._kind)

        self._bare.do_simulation = take_next  # hides the method
        try:
            yield
        finally:
            del self._bare.do_simulation

    def _bar(self, num: int) -> tqdm:
        return tqdm(
            range(num),
            desc="simulating",
            unit="trajectory",
            leave=False,
            dynamic_ncols=True,
            disable=not self._progress,
        )
