"""Video of one episode (extra `video`)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.returns import evaluate_policy

if TYPE_CHECKING:
    from polygrad_fast.agent import PolyGRAD


def record_episode(agent: PolyGRAD, path: Path, seed: int) -> None:
    """Play one deterministic episode and write its frames to `path` (.mp4 or .gif).

    Raises:
        InputError: another kind of file, imageio is not installed, or the environment cannot
            render here.
    """
    if path.suffix not in (".mp4", ".gif"):
        raise InputError(f"{path} has the suffix {path.suffix!r}, wanted .mp4 or .gif")
    try:
        import imageio.v2 as imageio
    except ImportError:
        raise InputError(
            "--video needs the extra 'video': pip install 'polygrad-fast[video]'"
        ) from None
    environment = agent.make_evaluation_environment(render_mode="rgb_array")
    try:
        environment.reset(seed=seed)
        environment.render()
    except Exception as error:  # no display, no GL library, no pygame: many kinds of errors
        raise InputError(
            f"{agent.env_id} cannot render here ({type(error).__name__}: {error}); for MuJoCo "
            f"without a display set MUJOCO_GL to egl or osmesa, whichever is installed, got "
            f"{os.environ.get('MUJOCO_GL', '')!r}"
        ) from error
    fps = environment.metadata.get("render_fps", 30)
    try:
        with contextlib.ExitStack() as stack:
            if not agent.evaluator.environments.is_given(environment):
                stack.callback(environment.close)
            writer = stack.enter_context(imageio.get_writer(path, fps=fps))
            evaluate_policy(
                lambda observations: agent.predict(observations, deterministic=True)[0],
                [environment],
                [seed],
                on_step=lambda: writer.append_data(environment.render()),
            )
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
