"""Policies saved by Stable-Baselines3, to collect data with; it is not a dependency."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from polygrad_fast.errors import InputError, first_line

_SIGNS = (
    ("PPO", "clip_range"),
    ("SAC", "target_entropy"),
    ("TD3", "policy_delay"),
    ("A2C", "gae_lambda"),
)
"""Algorithms of continuous actions, each with an option that those after it lack."""


def load_stable_baselines3(
    path: Path, dims: tuple[int, int], deterministic: bool, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the policy of a model that Stable-Baselines3 saved (.zip).

    Loading runs code that the file holds (pickle): only of those you trust.

    Args:
        path: the file.
        dims: S and A of the environment to play in.
        deterministic: act by the policy's mean.
        seed: of its samples.

    Returns:
        A function from an observation [S] to an action [A] in the environment's space.

    Raises:
        InputError: not such a file, of another environment, or Stable-Baselines3 is not installed.
    """
    try:
        with zipfile.ZipFile(path) as file:
            options = json.loads(file.read("data"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not a model of Stable-Baselines3: {first_line(error)}"
        ) from None
    algorithm = next((name for name, sign in _SIGNS if sign in options), None)
    if algorithm is None:
        raise InputError(
            f"{path} must be a model of {', '.join(name for name, _ in _SIGNS)}, got another's"
        )
    try:
        import stable_baselines3
    except ImportError:
        raise InputError(
            f"{path} needs the package stable_baselines3: pip install stable-baselines3"
        ) from None
    try:
        model = getattr(stable_baselines3, algorithm).load(path, device="cpu")
    except Exception as error:  # unpickling raises whatever it likes
        raise InputError(
            f"{path} cannot be loaded by Stable-Baselines3: {first_line(error)}"
        ) from error
    found = model.observation_space.shape, model.action_space.shape
    if found != ((dims[0],), (dims[1],)):
        raise InputError(
            f"{path} must be of an environment with observations of {dims[0]} and actions of "
            f"{dims[1]} numbers, got shapes {found[0]} and {found[1]}"
        )
    model.set_random_seed(seed)
    return lambda observation: model.predict(observation, deterministic=deterministic)[0]
