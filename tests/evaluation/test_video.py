"""Frames, captions, strips and videos."""

import gymnasium
import numpy as np
import pytest

import polygrad_fast as pg
from polygrad_fast.evaluation.video import captioned, prepare_rendering, write_strip, write_video

imageio = pytest.importorskip("imageio.v2")


def picture(value: int) -> np.ndarray:
    return np.full((40, 64, 3), value, dtype=np.uint8)


def test_pictures_are_stacked_under_their_captions():
    frame = captioned([("one", picture(100)), ("", picture(200))])
    bar = 2 * 10
    assert frame.shape == (128, 64, 3)  # of blocks of 16 pixels
    assert (frame[bar : bar + 40, :64] == 100).all()
    assert (frame[2 * bar + 40 : 2 * bar + 80, :64] == 200).all()
    assert frame[:bar].max() > 200 and frame[bar + 40 : 2 * bar + 40].max() == 0
    assert frame[120:].max() == 0


def test_a_strip_shows_frames_evenly_spaced(tmp_path):
    frames = [picture(10 * i) for i in range(21)]
    write_strip(frames, tmp_path / "strip.png", num=5, width=32)
    strip = imageio.imread(tmp_path / "strip.png")
    assert strip.shape == (20, 160, 3)
    assert [int(strip[10, 32 * i + 16, 0]) for i in range(5)] == [0, 50, 100, 150, 200]
    write_strip(frames[:2], tmp_path / "strip.png", num=5, width=32)
    assert imageio.imread(tmp_path / "strip.png").shape == (20, 64, 3)


def test_a_video_is_there_whole_or_not_at_all(tmp_path):
    write_video([picture(0), picture(80), picture(160)], tmp_path / "x.gif", fps=5)
    values = [int(frame[..., 0].mean()) for frame in imageio.mimread(tmp_path / "x.gif")]
    assert values == pytest.approx([0, 80, 160], abs=6)
    assert imageio.get_reader(tmp_path / "x.gif").get_meta_data()["duration"] == 200  # ms

    def broken():
        yield picture(0)
        raise pg.InputError("no more")

    for name in ("new.gif", "x.gif"):
        before = (tmp_path / "x.gif").read_bytes()
        with pytest.raises(pg.InputError, match="no more"):
            write_video(broken(), tmp_path / name, fps=5)
        assert [path.name for path in tmp_path.iterdir()] == ["x.gif"]
        assert (tmp_path / "x.gif").read_bytes() == before
    with pytest.raises(pg.InputError, match="gif cannot be written"):
        write_video([picture(0)], tmp_path / "x.gif" / "y.gif", fps=5)


@pytest.mark.parametrize(
    ("env_id", "options", "follows"),
    [
        ("HalfCheetah-v5", {}, True),
        ("Ant-v5", {}, True),
        ("HalfCheetah-v5", {"camera_id": -1}, False),  # as asked for
        ("Hopper-v5", {}, False),  # its own view follows a body
        ("InvertedPendulum-v5", {}, False),  # there is no such camera
    ],
)
def test_the_camera_follows_what_would_leave_the_picture(monkeypatch, env_id, options, follows):
    mujoco = pytest.importorskip("mujoco")
    environment = gymnasium.make(env_id, **options)
    bare = environment.unwrapped
    monkeypatch.setattr(type(bare), "render", lambda self: picture(0))  # without a GL library
    bare.mujoco_renderer.camera_id = -1  # older versions of gymnasium look through it themselves
    environment.reset(seed=0)
    prepare_rendering(environment)
    camera = mujoco.mj_name2id(bare.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    assert bare.mujoco_renderer.camera_id == (camera if follows else -1)
    assert (camera >= 0) == (env_id != "InvertedPendulum-v5")


def test_what_fails_to_render_is_told_in_a_sentence(capsys):
    class Viewer:
        def __init__(self):
            raise RuntimeError("no display")

        def __del__(self):
            raise AttributeError("half made")

    class Blind(gymnasium.Env):
        def render(self):
            return Viewer()

    message = r"Blind cannot render here \(RuntimeError: no display\); for MuJoCo without"
    with pytest.raises(pg.InputError, match=message):
        prepare_rendering(Blind())
    assert capsys.readouterr().err == ""
