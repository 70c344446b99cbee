"""Gymnasium environments: construction, space checks, action scaling, exact save and restore."""

from __future__ import annotations

import difflib
import json
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Tensor

from polygrad_fast.data.replay import as_finite_float32, as_flag
from polygrad_fast.errors import CheckpointError, InputError

_LOGGER = logging.getLogger(__name__)
_FORMAT = "polygrad_fast.environment.v1"
_GL_FILES = {"gl_context.py", "egl", "glfw", "osmesa"}  # of mujoco, which load a renderer
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


def make_environment(env_id: str | gymnasium.Env, render_mode: str | None = None) -> gymnasium.Env:
    """Make an environment by `gymnasium.make`, with errors of one sentence.

    If mujoco is installed and has no warning handler, one is set that sends its warnings to
    logging: mujoco's own writes MUJOCO_LOG.TXT into the working directory (under mujoco 4 already
    when HalfCheetah is loaded).

    Args:
        env_id: registered id, as "Hopper-v5" or "module:Name-v0"; an environment is returned as is.
        render_mode: handed to the environment.

    Returns:
        The environment, with gymnasium's default wrappers.

    Raises:
        InputError: not a string; malformed; unknown id, namespace or version (close matches are
            named); a package the environment needs is not installed; its module, or making it,
            raised anything else.
    """
    if isinstance(env_id, gymnasium.Env):
        return env_id
    if not isinstance(env_id, str):
        raise InputError(
            f"environment: got {env_id!r} of type {type(env_id).__name__}, wanted an id such as "
            f'"Hopper-v5" or a gymnasium.Env'
        )
    _check_form(env_id)
    _silence_mujoco_log()
    try:
        with warnings.catch_warnings(record=True) as caught:  # of an environment that is not made
            environment = gymnasium.make(env_id, render_mode=render_mode)
        for warning in caught:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        return environment
    except gymnasium.error.UnregisteredEnv as error:
        raise InputError(
            f"environment id: got {env_id!r}, which gymnasium does not know{_close_matches(env_id)}"
        ) from error
    except gymnasium.error.DependencyNotInstalled as error:
        if reason := _rendering_library(error.__cause__):
            raise InputError(f"environment {env_id!r} cannot be made: {reason}") from error
        raise InputError(
            f"environment {env_id!r} needs a package that is not installed: {_hint(env_id, error)}"
        ) from error
    except (gymnasium.error.Error, ImportError) as error:
        # ImportError: the removed MuJoCo v2 and v3, and ids whose module cannot be imported.
        reason = _rendering_library(error) or f"{_clause(error)}{_close_matches(env_id)}"
        raise InputError(f"environment {env_id!r} cannot be made: {reason}") from error
    except Exception as error:  # whatever the module and the environment's constructor raise
        reason = _rendering_library(error) or f"{type(error).__name__}: {_clause(error)}"
        raise InputError(f"environment {env_id!r} cannot be made: {reason}") from error


def check_spaces(env: gymnasium.Env) -> tuple[int, int]:
    """Check that observations and actions are vectors and return their sizes.

    Args:
        env: any gymnasium environment.

    Returns:
        (S, A), the observation and the action dimension.

    Raises:
        InputError: a space is not a Box, not 1-D, empty, or the action space is not of floats; the
            message names the environment and the space.
    """
    for kind in ("observation", "action"):
        space = getattr(env, f"{kind}_space")
        hint = ""
        if kind == "observation" and space.is_np_flattenable:
            hint = "; gymnasium.wrappers.FlattenObservation flattens"
        if kind == "action" and not isinstance(space, gymnasium.spaces.Box):
            hint = " and a floating dtype: actions are continuous here"
        if not isinstance(space, gymnasium.spaces.Box):
            raise InputError(
                f"{environment_name(env)}: got {kind} space {space}, wanted a Box of one dimension"
                f"{hint}"
            )
        if len(space.shape) != 1 or space.shape[0] < 1:
            raise InputError(
                f"{environment_name(env)}: got {kind} space {space} of shape {space.shape}, wanted "
                f"a Box of one dimension{hint}"
            )
    if not np.issubdtype(env.action_space.dtype, np.floating):
        raise InputError(
            f"{environment_name(env)}: got action space {env.action_space}, wanted a floating dtype"
        )
    return env.observation_space.shape[0], env.action_space.shape[0]


def environment_name(env: gymnasium.Env) -> str:
    """Return the environment's registered id, or its class name if it has none."""
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def layers(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """Yield the environment's wrappers, outermost first, and the bare environment."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def warn_of_statistics(env: gymnasium.Env) -> None:
    """Warn of wrappers that keep running statistics, as `gymnasium.wrappers.NormalizeObservation`:
    training and evaluation each have their own, so the policy is evaluated on other inputs than it
    learns from, and no checkpoint holds them."""
    for layer in layers(env):
        if any(isinstance(value, RunningMeanStd) for value in vars(layer).values()):
            warnings.warn(
                f"{environment_name(env)}: {type(layer).__name__} keeps running statistics, of "
                f"which the evaluation has its own and checkpoints have none; wanted observations "
                f"and rewards that do not depend on the past (policy.normed_inputs normalizes "
                f"within the agent)",
                stacklevel=3,
            )


def reset_environment(
    env: gymnasium.Env, seed: int, observation_dim: int, where: str
) -> np.ndarray:
    """Reset an environment and check what it returns.

    Args:
        env: the environment.
        seed: of the episode.
        observation_dim: S.
        where: names the environment and the episode in an error.

    Returns:
        The first observation, float32 [S].

    Raises:
        InputError: not a pair, or an observation that is not finite or not of shape [S].
    """
    returned = env.reset(seed=seed)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise InputError(f"{where}: got {_outline(returned)}, wanted (observation, info)")
    return as_finite_float32(returned[0], (observation_dim,), f"{where}: observation")


def step_environment(
    env: gymnasium.Env, action: np.ndarray, observation_dim: int, where: str
) -> tuple[np.ndarray, float, bool, bool]:
    """Step an environment and check what it returns.

    Args:
        env: the environment.
        action: [A] in the environment's space.
        observation_dim: S.
        where: names the environment, episode and step in an error.

    Returns:
        (observation float32 [S], reward, terminated, truncated).

    Raises:
        InputError: not five values, or one of them not finite, of another shape or no flag.
    """
    returned = env.step(action)
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise InputError(
            f"{where}: got {_outline(returned)}, wanted (observation, reward, terminated, "
            f"truncated, info)"
        )
    observation, reward, terminated, truncated, _ = returned
    observation = as_finite_float32(observation, (observation_dim,), f"{where}: observation")
    as_finite_float32(reward, (), f"{where}: reward")
    terminated = as_flag(terminated, f"{where}: terminated")
    truncated = as_flag(truncated, f"{where}: truncated")
    return observation, float(reward), terminated, truncated


def _outline(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"{len(returned)} values"
    return f"one {type(returned).__name__}"


class ActionScaler:
    """Map actions between the policy's space and the environment's.

    With `rescale` and finite bounds the policy's space is [-1, 1]^A and an environment action is
    low + (clip(a, -1, 1) + 1)/2 * (high - low). Otherwise the policy speaks the environment's own
    actions, which are clipped to its bounds where these are finite.

    Args:
        action_space: the environment's.
        rescale: ask for [-1, 1]; without effect on a space with an infinite bound.

    Attributes:
        low, high: float32 [A], bounds in the policy's space, possibly infinite.
        rescaled: whether the policy's space is [-1, 1]^A.

    Raises:
        InputError: the action space is not a Box of one dimension, or has a finite bound that
            float32 arithmetic cannot handle: beyond float32, or beyond 1e18 without rescaling,
            where squares overflow.
    """

    def __init__(self, action_space: gymnasium.spaces.Box, rescale: bool) -> None:
        if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
            raise InputError(f"action space: got {action_space}, wanted a Box of one dimension")
        self._dtype = action_space.dtype
        self._env_low, self._env_high = action_space.low, action_space.high
        self._low64 = action_space.low.astype(np.float64)
        high64 = action_space.high.astype(np.float64)
        self.rescaled = bool(rescale) and bool(np.isfinite([self._low64, high64]).all())
        largest = float(np.finfo(np.float32).max) if self.rescaled else 1e18
        for name, bound in (("low", self._low64), ("high", high64)):
            for i in np.flatnonzero(np.isfinite(bound) & (np.abs(bound) > largest)):
                raise InputError(
                    f"action space: {name}[{i}] is {bound[i]:g}, wanted a bound from "
                    f"{-largest:.3g} to {largest:.3g}, or infinite"
                )
        self._range64 = high64 - self._low64
        if self.rescaled:
            self.low = np.full(action_space.shape, -1.0, dtype=np.float32)
            self.high = np.full(action_space.shape, 1.0, dtype=np.float32)
        else:
            self.low = action_space.low.astype(np.float32)
            self.high = action_space.high.astype(np.float32)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Return the environment's action for a policy action.

        Args:
            action: [A] or [N, A] in the policy's space; values outside its bounds are clipped.

        Returns:
            A new array of the same shape in the action space's dtype, within its bounds.

        Raises:
            InputError: another shape.
        """
        action = self._checked(action)
        if self.rescaled:
            action = self._low64 + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * self._range64
        with np.errstate(over="ignore"):
            action = action.astype(self._dtype)
        # Clipped after the cast: rounding to the space's dtype may step over a bound.
        return np.clip(action, self._env_low, self._env_high)

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """Return the policy action of an environment's action; the inverse of `to_environment`.

        Args:
            action: [A] or [N, A] within the environment's bounds.

        Returns:
            float32 array of the same shape in the policy's space; 0 where a bound pair is equal.

        Raises:
            InputError: another shape.
        """
        action = self._checked(action)
        if not self.rescaled:
            return action.astype(np.float32)
        scale = np.divide(
            2.0, self._range64, out=np.zeros_like(self._range64), where=self._range64 > 0
        )
        offset = np.where(self._range64 > 0, -1.0, 0.0)
        return np.clip((action - self._low64) * scale + offset, -1.0, 1.0).astype(np.float32)

    def _checked(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, dtype=np.float64)
        size = self.low.shape[0]
        if action.ndim not in (1, 2) or action.shape[-1] != size:
            raise InputError(f"action: got shape {action.shape}, wanted ({size},) or (N, {size})")
        return action


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
        if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
            raise InputError(f"seed: got {seed!r}, wanted a non-negative integer")
        self.env = env
        self.observation_dim, self.action_dim = check_spaces(env)
        self.name = environment_name(env)
        self._action_space = env.action_space
        self._generator = np.random.default_rng(int(seed))
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
            raise InputError(f"{self.name}: got no episode yet, wanted reset() before observation")
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
                f"{self.name}: got step() with no running episode, wanted reset() first"
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
                f"{self.name}: the saved generator states cannot be read ({error}), wanted numpy "
                f"bit generator states in JSON"
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
        """Reset with the seed and repeat the actions; whether the episode is still running then."""
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
                    f"{self.name}: saved {name} is {state[name]!r}, wanted {kind.__name__}"
                )
        for name, value in (("format", _FORMAT), ("environment", self.name)):
            if state[name] != value:
                raise CheckpointError(
                    f"{self.name}: saved with {name} {state[name]!r}, wanted {value!r}"
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
                    f"{self.name}: saved {name} has shape {tuple(tensor.shape)} and "
                    f"{tensor.dtype}, wanted {shape} and {dtype}"
                )
        if state["running"] and state["episode_seed"] < 0:
            raise CheckpointError(
                f"{self.name}: saved a running episode of seed {state['episode_seed']}, wanted a "
                f"seed >= 0"
            )


def _log_mujoco_warning(message: str) -> None:
    # Logging, not warnings.warn: this is called from C, where an exception, as a filter that turns
    # warnings into errors would raise, aborts the process.
    _LOGGER.warning("mujoco: %s", message)


def _silence_mujoco_log() -> None:
    try:
        import mujoco
    except Exception:  # absent or broken: environments that need it will say so
        return
    current = getattr(mujoco, "get_mju_user_warning", lambda: None)()
    if current is None:
        mujoco.set_mju_user_warning(_log_mujoco_warning)


def _check_form(env_id: str) -> None:
    """Raise InputError for what gymnasium would fail on without naming the id."""
    module, colon, name = env_id.rpartition(":")
    if ":" in module:
        raise InputError(f"environment id: got {env_id!r}, wanted at most one ':', module:Name-v0")
    importable = all(part.isidentifier() for part in module.split("."))
    if not name.strip() or (colon and not importable):
        raise InputError(
            f"environment id: got {env_id!r}, wanted an id such as Hopper-v5 or module:Name-v0"
        )


def _rendering_library(error: BaseException | None) -> str | None:
    """Return what to do about MUJOCO_GL if it kept mujoco from being imported, else None."""
    value = os.environ.get("MUJOCO_GL", "").strip()
    frames = traceback.walk_tb(error.__traceback__ if error is not None else None)
    files = (PurePath(frame.f_code.co_filename).parts for frame, _ in frames)
    if not value or not any("mujoco" in file and _GL_FILES & set(file) for file in files):
        return None
    if "invalid value" in str(error):
        return f"MUJOCO_GL is {value!r}, wanted egl, osmesa, glfw or disable, or unset it"
    package = {"osmesa": "libosmesa6", "egl": "libegl1", "glfw": "libglfw3"}.get(value.lower())
    install = f"install its library (Debian and Ubuntu: {package})" if package else "set another"
    return (
        f"MUJOCO_GL is {value!r}, which mujoco cannot load ({type(error).__name__}: "
        f"{_clause(error)}); {install}, or unset MUJOCO_GL"
    )


def _close_matches(env_id: str) -> str:
    """Return ", did you mean ..." from the registry, or nothing if no id is close."""
    # The MuJoCo v2 and v3 ids are registered only to say that they have been removed.
    known = {
        name.lower(): name
        for name, spec in gymnasium.registry.items()
        if name != env_id and not getattr(spec.entry_point, "__name__", "").startswith("_raise")
    }
    matches = difflib.get_close_matches(env_id.lower(), list(known), n=3, cutoff=0.7)
    return f", did you mean {' or '.join(known[name] for name in matches)}?" if matches else ""


def _hint(env_id: str, error: gymnasium.error.DependencyNotInstalled) -> str:
    spec = gymnasium.registry.get(env_id.rsplit(":", 1)[-1])
    entry_point = str(spec.entry_point) if spec is not None else ""
    if "mujoco_py" in str(error).lower().replace("-", "_"):  # v2 and v3 in gymnasium < 1.2
        return f"mujoco-py, no longer maintained{_close_matches(env_id)}"
    if "mujoco" in entry_point.lower() or "mujoco" in str(error).lower():
        return 'pip install "gymnasium[mujoco]"'
    return _clause(error)


def _clause(error: Exception) -> str:
    """Return the message of an error as part of one sentence."""
    return " ".join(str(error).split()).rstrip(".").replace(". ", "; ")
