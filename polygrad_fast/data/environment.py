"""Gymnasium environments: made, checked, reset and stepped, with errors of one sentence."""

from __future__ import annotations

import difflib
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers.utils import RunningMeanStd

from polygrad_fast.data.checks import as_finite_float32, as_finite_number, as_flag
from polygrad_fast.errors import InputError

_LOGGER = logging.getLogger(__name__)
MAX_EPISODE_STEPS = 1_000_000
"""An episode as long as this is taken for one that never ends."""
_GL_FILES = {"gl_context.py", "egl", "glfw", "osmesa"}  # of mujoco, which load a renderer


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
            f'environment must be an id such as "Hopper-v5" or a gymnasium.Env, got {env_id!r} of '
            f"type {type(env_id).__name__}"
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
            f"environment id must be one that gymnasium knows, got {env_id!r}"
            f"{_close_matches(env_id)}"
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
        is_box = isinstance(space, gymnasium.spaces.Box)
        if is_box and len(space.shape) == 1 and space.shape[0] >= 1:
            continue
        hint = ""
        if kind == "observation" and space.is_np_flattenable:
            hint = " (gymnasium.wrappers.FlattenObservation flattens)"
        if kind == "action" and not is_box:
            hint = " and a floating dtype (actions are continuous here)"
        raise InputError(
            f"{environment_name(env)}: {kind} space must be a Box of one dimension{hint}, got "
            f"{space}{f' of shape {space.shape}' if is_box else ''}"
        )
    if not np.issubdtype(env.action_space.dtype, np.floating):
        raise InputError(
            f"{environment_name(env)}: action space must have a floating dtype, got "
            f"{env.action_space}"
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
    """Warn of wrappers that keep running statistics, as `gymnasium.wrappers.NormalizeObservation`.

    Training and evaluation each have their own, so the policy is evaluated on other inputs than it
    learns from, and no checkpoint holds them.
    """
    for layer in layers(env):
        if any(isinstance(value, RunningMeanStd) for value in vars(layer).values()):
            warnings.warn(
                f"{environment_name(env)}: {type(layer).__name__} keeps running statistics, of "
                f"which the evaluation has its own and checkpoints have none; observations and "
                f"rewards should not depend on the past (policy.normed_inputs normalizes within "
                f"the agent)",
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
        raise InputError(
            f"{where}: the environment must return (observation, info), got {_outline(returned)}"
        )
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
            f"{where}: the environment must return (observation, reward, terminated, truncated, "
            f"info), got {_outline(returned)}"
        )
    observation, reward, terminated, truncated, _ = returned
    observation = as_finite_float32(observation, (observation_dim,), f"{where}: observation")
    reward = as_finite_number(reward, f"{where}: reward")
    terminated = as_flag(terminated, f"{where}: terminated")
    truncated = as_flag(truncated, f"{where}: truncated")
    return observation, reward, terminated, truncated


def _outline(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"{len(returned)} values"
    return f"one {type(returned).__name__}"


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
    """Raise InputError for an id that gymnasium would refuse without naming it."""
    module, colon, name = env_id.rpartition(":")
    if ":" in module:
        raise InputError(
            f"environment id must hold at most one ':', as module:Name-v0, got {env_id!r}"
        )
    importable = all(part.isidentifier() for part in module.split("."))
    if not name.strip() or (colon and not importable):
        raise InputError(
            f"environment id must be one such as Hopper-v5 or module:Name-v0, got {env_id!r}"
        )


def _rendering_library(error: BaseException | None) -> str | None:
    """Return what is wrong with MUJOCO_GL if it kept mujoco from being imported, else None."""
    value = os.environ.get("MUJOCO_GL", "").strip()
    frames = traceback.walk_tb(error.__traceback__ if error is not None else None)
    files = (PurePath(frame.f_code.co_filename).parts for frame, _ in frames)
    if not value or not any("mujoco" in file and _GL_FILES & set(file) for file in files):
        return None
    if "invalid value" in str(error):
        return f"MUJOCO_GL must be egl, osmesa, glfw or disable, or not be set, got {value!r}"
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
