"""Videos and strips of frames (extra `video`)."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from polygrad_fast.data.environment import environment_name
from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.environments import EvaluationEnvironments
from polygrad_fast.evaluation.returns import evaluate_policy
from polygrad_fast.runs.files import replacing, write_bytes_atomic

VIDEOS = (".mp4", ".gif")
_BLOCK = 16
"""Encoders want frames of multiples of so many pixels."""


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
    if path.suffix not in VIDEOS:
        raise InputError(f"a video must be a .mp4 or .gif file, got {path}")
    check_video("--video")
    environment = environments.make(render_mode="rgb_array")
    environment.reset(seed=seed)
    prepare_rendering(environment)
    fps = environment.metadata.get("render_fps", 30)
    with contextlib.ExitStack() as stack:
        if not environments.is_given(environment):
            stack.callback(environment.close)
        append = stack.enter_context(_video(path, fps))
        evaluate_policy(act, [environment], [seed], lambda: append(environment.render()))


def check_video(what: str) -> None:
    """Raise InputError where frames cannot be written: imageio is an extra.

    Args:
        what: needs it, for the message.
    """
    try:
        import imageio.v2  # noqa: F401
        import PIL.ImageDraw  # noqa: F401
    except ImportError:
        raise InputError(
            f"{what} needs the extra 'video': pip install 'polygrad-fast[video]'"
        ) from None


def prepare_rendering(environment: gymnasium.Env) -> None:
    """Let the camera of an environment, which has been reset, follow what moves.

    Raises:
        InputError: it cannot render here.
    """
    _follow(environment.unwrapped)
    try:
        environment.render()
    except Exception as error:  # no display, no GL library, no pygame: many kinds of errors
        _forget_locals(error)
        raise InputError(
            f"{environment_name(environment)} cannot render here ({type(error).__name__}: {error})"
            f"; for MuJoCo without a display MUJOCO_GL must be egl or osmesa, whichever is "
            f"installed, got {os.environ.get('MUJOCO_GL', '')!r}"
        ) from error


def _follow(bare: Any) -> None:
    """Look through the model's own camera "track" where the environment has one, but looks from a
    fixed point, as gymnasium 1.4 at HalfCheetah, Ant and Swimmer, which run out of the picture."""
    renderer = getattr(bare, "mujoco_renderer", None)
    if getattr(renderer, "camera_id", None) != -1:  # not of MuJoCo, or a camera of the model
        return
    chosen = getattr(bare, "camera_id", None) is not None
    if not chosen and "trackbodyid" not in (renderer.default_cam_config or {}):
        import mujoco

        camera = mujoco.mj_name2id(bare.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        renderer.camera_id = camera  # -1 where there is none


def _forget_locals(error: Exception) -> None:
    """Let go of what failed half made, as gymnasium's viewer, whose deletion then complains."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda complaint: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        sys.unraisablehook = hook


def write_video(frames: Sequence[np.ndarray], path: Path, fps: float) -> None:
    """Write frames, uint8 [height, width, 3] each, to `path` (.mp4 or .gif).

    Raises:
        InputError: the file cannot be written.
    """
    with _video(path, fps) as append:
        for frame in frames:
            append(frame)


def write_strip(frames: Sequence[np.ndarray], path: Path, num: int = 6, width: int = 240) -> None:
    """Write a picture (.png) of at most `num` frames, evenly spaced, side by side, each `width`
    pixels wide, in 256 colors."""
    from PIL import Image

    picks = np.unique(np.linspace(0, len(frames) - 1, num).round().astype(int))
    height = round(frames[0].shape[0] * width / frames[0].shape[1])
    strip = Image.new("RGB", (width * len(picks), height))
    for i, pick in enumerate(picks):
        frame = Image.fromarray(frames[pick]).resize((width, height), Image.Resampling.LANCZOS)
        strip.paste(frame, (width * i, 0))
    data = io.BytesIO()
    small = strip.quantize(256, dither=Image.Dither.NONE)
    small.save(data, format="PNG", optimize=True)
    write_bytes_atomic(path, data.getvalue())


def captioned(pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Return one frame of pictures of the same width [height, width, 3], one below the other, each
    under a line of white text on black."""
    from PIL import Image, ImageDraw, ImageFont

    width = pictures[0][1].shape[1]
    size = max(10, width // 20)
    font, bar = ImageFont.load_default(size), 2 * size
    height = sum(bar + picture.shape[0] for _, picture in pictures)
    frame = Image.new("RGB", tuple(-(-side // _BLOCK) * _BLOCK for side in (width, height)))
    draw, top = ImageDraw.Draw(frame), 0
    for text, picture in pictures:
        draw.text((size // 2, top + size // 3), text, fill="white", font=font)
        frame.paste(Image.fromarray(picture), (0, top + bar))
        top += bar + picture.shape[0]
    return np.asarray(frame)


@contextlib.contextmanager
def _video(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], Any]]:
    """Yield what appends a frame to a video, which is there when the block has ended."""
    import imageio.v2 as imageio

    # of .gif files imageio ignores fps
    speed = {"duration": 1000 / fps, "loop": 0} if path.suffix == ".gif" else {"fps": fps}
    try:
        with replacing(path) as temporary, imageio.get_writer(temporary, **speed) as writer:
            yield writer.append_data
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
