"""Video of one episode (extra `video`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from polygrad_fast.data.environment import environment_name
from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.environments import EvaluationEnvironments
from polygrad_fast.evaluation.returns import evaluate_policy


def record_episode(
    environments: EvaluationEnvironments,
    act: Callable[[np.ndarray], np.ndarray],
    path: Path,
    seed: int,
) -> None:
    """Play one episode and write its frames to `path` (.mp4 or .gif).

    Args:
        environments: makes the one to play in, with the render mode "rgb_array".
        act: maps observations [1, S] (float32) to environment actions [1, A].
        path: the file.
        seed: of the episode, given to `reset`.

    Raises:
        InputError: another kind of file, imageio is not installed, or the environment cannot
            render here.
    """
    if path.suffix not in (".mp4", ".gif"):
        raise InputError(f"a video must be a .mp4 or .gif file, got {path}")
    try:
        import imageio.v2 as imageio
    except ImportError:
        raise InputError(
            "--video needs the extra 'video': pip install 'polygrad-fast[video]'"
        ) from None
    environment = environments.make(render_mode="rgb_array")
    try:
        environment.reset(seed=seed)
        environment.render()
    except Exception as error:  # no display, no GL library, no pygame: many kinds of errors
        raise InputError(
            f"{environment_name(environment)} cannot render here ({type(error).__name__}: {error})"
            f"; for MuJoCo without a display MUJOCO_GL must be egl or osmesa, whichever is "
            f"installed, got {os.environ.get('MUJOCO_GL', '')!r}"
        ) from error
    fps = environment.metadata.get("render_fps", 30)
    try:
        with contextlib.ExitStack() as stack:
            if not environments.is_given(environment):
                stack.callback(environment.close)
            writer = stack.enter_context(imageio.get_writer(path, fps=fps))
            evaluate_policy(
                act, [environment], [seed], lambda: writer.append_data(environment.render())
            )
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
