"""An environment whose exact state can be saved and restored."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from polygrad_fast.arguments import as_integer
from polygrad_fast.data.checks import as_finite_float32
from polygrad_fast.data.environment import (
    check_spaces,
    environment_name,
    reset_environment,
    step_environment,
)
from polygrad_fast.errors import CheckpointError, InputError

_FORMAT = "polygrad_fast.environment.v1"
_STATE_TYPES = {
    "format": str,
    "environment": str,
    "generator": str,
    "action_generator": str,
    "running": int,
    "episode_seed": int,
    "episode_length": int,
    "episode_return": float,
    "actions": Tensor,
    "observation": Tensor,
}


class ResumableEnvironment:
    """One environment whose exact state can be saved and restored, if it is deterministic.

    A state is the running episode's seed and the actions since its reset; it is restored by
    resetting with the seed and replaying the actions. So episodes must depend on their seed and
    actions alone: true of gymnasium's own environments, and checked at every restore.

    Args:
        env: environment with Box spaces of one dimension (see `check_spaces`).
        seed: seeds the generator of episode seeds and the action space; a non-negative integer.

    Attributes:
        episode_return: sum of the running (or last) episode's rewards.
        episode_length: its number of steps.

    Raises:
        InputError: unsuitable spaces, or a seed that is not a non-negative integer.
    """

    def __init__(self, env: gymnasium.Env, seed: int) -> None:
        seed = as_integer(seed, "seed", 0)
        self.env = env
        self.observation_dim, self.action_dim = check_spaces(env)
        self.name = environment_name(env)
        self._action_space = env.action_space
        self._generator = np.random.default_rng(seed)
        self._action_space.seed(self._draw_seed())
        self._running = False
        self._episode_seed = -1
        self._actions: list[np.ndarray] = []
        self._observation = np.zeros(0, dtype=np.float32)
        self.episode_return = 0.0
        self.episode_length = 0

    @property
    def observation(self) -> np.ndarray:
        """The newest observation, float32 [S]; what to act on after a restore.

        Raises:
            InputError: there has been no reset.
        """
        if self._episode_seed < 0:
            raise InputError(
                f"{self.name}: reset() must be called before an observation is read, got no "
                f"episode yet"
            )
        return self._observation.copy()

    @property
    def running(self) -> bool:
        """Whether an episode is running, so that `step` may be called."""
        return self._running

    def reset(self) -> np.ndarray:
        """Begin an episode with a seed drawn from this object's generator.

        Returns:
            The first observation, float32 [S].

        Raises:
            InputError: the observation is not finite or not of shape [S].
        """
        generator = self._generator.bit_generator.state
        try:
            self._begin(self._draw_seed())
        except BaseException:  # the next attempt takes the same seed
            self._generator.bit_generator.state = generator
            raise
        return self.observation

    def step(self, environment_action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Take one step.

        Args:
            environment_action: [A] in the environment's space; cast to the action space's dtype.

        Returns:
            (observation float32 [S], reward, terminated, truncated).

        Raises:
            InputError: no episode is running; the action is of another shape or not finite; the
                observation or the reward is not finite or of another shape, or a flag is none.
        """
        if not self._running:
            raise InputError(
                f"{self.name}: reset() must be called before step(), got no running episode"
            )
        as_finite_float32(environment_action, (self.action_dim,), f"{self.name}: action")
        # A copy in the space's dtype, which is what a replay hands in again.
        action = np.array(environment_action, dtype=self._action_space.dtype)
        where = f"{self.name}, step {self.episode_length + 1} of the episode"
        observation, reward, terminated, truncated = step_environment(
            self.env, action.copy(), self.observation_dim, where
        )
        # Only now: after an error the state is that before the step.
        self._actions.append(action)
        self._observation = observation
        self.episode_length += 1
        self.episode_return += reward
        self._running = not (terminated or truncated)
        return self.observation, reward, terminated, truncated

    def start(self, environment_action: np.ndarray) -> None:
        """Begin a step of an environment that can (`ProcessEnvironment`); `step` with the same
        action then takes it. The state stays that before the step."""
        self.env.start(np.array(environment_action, dtype=self._action_space.dtype))

    def sample_action(self) -> np.ndarray:
        """Draw an action [A] from the environment's action space, in the environment's space."""
        return self._action_space.sample()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state: generators, episode seed, actions since the reset, newest observation.

        Returns:
            Tensors, numbers and strings only, so `torch.load(weights_only=True)` reads them.
            Generator states hold 128-bit integers and are kept as JSON.
        """
        actions = np.zeros((len(self._actions), self.action_dim), dtype=self._action_space.dtype)
        if self._actions:
            actions[:] = self._actions
        return {
            "format": _FORMAT,
            "environment": self.name,
            "generator": json.dumps(self._generator.bit_generator.state),
            "action_generator": json.dumps(self._action_space.np_random.bit_generator.state),
            "running": int(self._running),
            "episode_seed": self._episode_seed,
            "episode_length": self.episode_length,
            "episode_return": self.episode_return,
            "actions": torch.from_numpy(actions),
            "observation": torch.from_numpy(self._observation.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Restore a state by replaying its episode; afterwards `observation` is the one to act on.

        Between episodes nothing is replayed: call `reset` next, as without the restore.

        Args:
            state: what `state_dict` returned.

        Returns:
            True if the replay ended in the stored observation and return. False, with one warning,
            if it did not: the environment is not deterministic, a new episode has been started, and
            the steps already collected of the old one must be closed as truncated (for a replay
            buffer, `end_episode`).

        Raises:
            CheckpointError: an entry is missing or damaged, or of another environment.
        """
        self._check_state(state)
        actions = state["actions"].cpu().numpy()
        observation = state["observation"].cpu().numpy()
        try:
            self._generator.bit_generator.state = json.loads(state["generator"])
            self._action_space.np_random.bit_generator.state = json.loads(state["action_generator"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.name}: saved generator states must be numpy's bit generators in JSON, got "
                f"what cannot be read ({error})"
            ) from error
        if not state["running"]:
            self._running = False
            self._episode_seed = state["episode_seed"]
            self._actions = [action.copy() for action in actions]
            self._observation = observation.copy()
            self.episode_length = state["episode_length"]
            self.episode_return = state["episode_return"]
            return True
        if (
            self._replay(state["episode_seed"], actions)
            and np.array_equal(self._observation, observation)
            and self.episode_return == state["episode_return"]
        ):
            return True
        warnings.warn(
            f"{self.name} is not deterministic: replaying the {len(actions)} actions of the saved "
            f"episode from its seed led to another observation or return, so a new episode is "
            f"started and the resumed run will differ from an uninterrupted one",
            stacklevel=2,
        )
        self.reset()
        return False

    def _draw_seed(self) -> int:
        return int(self._generator.integers(2**31))

    def _begin(self, seed: int) -> None:
        self._running = False  # until the observation has been found usable
        self._observation = reset_environment(
            self.env, seed, self.observation_dim, f"{self.name}, reset"
        )
        self._episode_seed = seed
        self._actions = []
        self.episode_return = 0.0
        self.episode_length = 0
        self._running = True

    def _replay(self, seed: int, actions: np.ndarray) -> bool:
        """Reset with the seed and repeat the actions; return whether the episode still runs."""
        try:
            self._begin(seed)
            for action in actions:
                if not self._running:
                    return False
                self.step(action)
        except InputError:  # an observation that was finite before
            return False
        return self._running

    def _check_state(self, state: Mapping[str, Any]) -> None:
        for name, kind in _STATE_TYPES.items():
            if name not in state:
                raise CheckpointError(f"{self.name}: {name!r} is missing from the saved state")
            if not isinstance(state[name], kind):
                raise CheckpointError(
                    f"{self.name}: saved {name} must be a {kind.__name__}, got {state[name]!r}"
                )
        for name, value in (("format", _FORMAT), ("environment", self.name)):
            if state[name] != value:
                raise CheckpointError(
                    f"{self.name}: saved {name} must be {value!r}, got {state[name]!r}"
                )
        dtype = torch.from_numpy(np.zeros(0, dtype=self._action_space.dtype)).dtype
        size = 0 if state["episode_seed"] < 0 else self.observation_dim
        wanted = {
            "actions": ((state["episode_length"], self.action_dim), dtype),
            "observation": ((size,), torch.float32),
        }
        for name, (shape, dtype) in wanted.items():
            tensor = state[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{self.name}: saved {name} must have shape {shape} and {dtype}, got "
                    f"{tuple(tensor.shape)} and {tensor.dtype}"
                )
        if state["running"] and state["episode_seed"] < 0:
            raise CheckpointError(
                f"{self.name}: saved episode_seed must be at least 0 where an episode is running, "
                f"got {state['episode_seed']}"
            )
