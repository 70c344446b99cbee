"""Environments: made by id or taken as they are, errors of one sentence."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from polygrad_fast.data.environment import check_spaces, make_environment
from polygrad_fast.errors import InputError


def test_make_environment_makes_and_passes_on():
    env = make_environment("Pendulum-v1", render_mode="rgb_array")
    assert env.spec.id == "Pendulum-v1" and env.render_mode == "rgb_array"
    assert make_environment(env) is env
    assert check_spaces(env) == (3, 1)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("HalfCheeta-v5", "id must be one that .*, got 'HalfCheeta-v5', .*HalfCheetah-v5"),
        ("hopper-v5", "gymnasium knows, got 'hopper-v5', did you mean Hopper-v5"),
        ("Hopper-v9", "gymnasium knows, got 'Hopper-v9', .*Hopper-v5"),
        ("Qwertyuiop-v0", "gymnasium knows, got 'Qwertyuiop-v0'$"),
        ("nowhere/Thing-v0", "gymnasium knows, got 'nowhere/Thing-v0'"),
        ("Hopper-v3", "'Hopper-v3' .*(gymnasium-robotics|mujoco-py).*Hopper-v5 or Hopper-v4"),
        ("no_such_module:Thing-v0", "cannot be made: No module named 'no_such_module'"),
        ("not an id", "'not an id' cannot be made: Malformed"),
        ("a:b:Thing-v0", "at most one ':', .*, got 'a:b:Thing-v0'$"),
        (":", "one such as Hopper-v5 or module:Name-v0, got ':'$"),
        ("", "one such as Hopper-v5 or .*, got ''$"),
        ("  ", "one such as Hopper-v5 or .*, got '  '$"),
        ("numpy:", "one such as .*, got 'numpy:'$"),
        (":Pendulum-v1", "one such as .*, got ':Pendulum-v1'$"),
        (".:Pendulum-v1", "one such as .*, got '.:Pendulum-v1'$"),
        ("my file:Pendulum-v1", "one such as .*, got 'my file:Pendulum-v1'$"),
        ("Pendulum-v1 ", "'Pendulum-v1 ' cannot be made: Malformed.*did you mean Pendulum-v1"),
        (
            "broken_on_import:Own-v0",
            "'broken_on_import:Own-v0' cannot be made: NameError: .*'oops'",
        ),
        (3, "must be an id such as .*, got 3 of type int$"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*out of date")
def test_ids_that_cannot_be_made_raise_one_sentence(env_id, message, tmp_path, monkeypatch):
    (tmp_path / "broken_on_import.py").write_text("oops\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        make_environment(env_id)
    assert "\n" not in str(caught.value)


def test_an_environment_that_raises_while_it_is_made_is_named():
    with pytest.raises(InputError, match="'Raises-v0' cannot be made: ZeroDivisionError: division"):
        gymnasium.register("Raises-v0", lambda **options: 1 / 0)
        make_environment("Raises-v0")
    gymnasium.registry.pop("Raises-v0")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("bogus", "MUJOCO_GL must be egl, osmesa, glfw or disable, or not be set, got 'bogus'"),
        (
            "osmesa",
            "MUJOCO_GL is 'osmesa', which mujoco cannot load (AttributeError: no library); "
            "install its library (Debian and Ubuntu: libosmesa6), or unset MUJOCO_GL",
        ),
    ],
)
def test_a_renderer_that_mujoco_cannot_load_is_blamed_on_mujoco_gl(tmp_path, value, message):
    pytest.importorskip("mujoco")
    # PyOpenGL without libOSMesa, whether or not this machine has it
    (tmp_path / "OpenGL.py").write_text("raise AttributeError('no library')\n")
    code = (
        "from polygrad_fast.data.environment import make_environment\n"
        "make_environment('Pendulum-v1')\n"
        "try:\n    make_environment('Hopper-v5')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    changed = {"MUJOCO_GL": value, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **changed}, capture_output=True, text=True
    )
    assert result.stderr == ""
    assert result.stdout == f"environment 'Hopper-v5' cannot be made: {message}\n"


def test_other_errors_are_not_blamed_on_mujoco_gl(monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    gymnasium.register(
        "NoModel-v0",
        "gymnasium.envs.mujoco.hopper_v5:HopperEnv",
        kwargs={"xml_file": "/nowhere.xml"},
    )
    with pytest.raises(InputError, match="cannot be made: OSError: File /nowhere.xml does not"):
        make_environment("NoModel-v0")
    gymnasium.registry.pop("NoModel-v0")


def test_a_missing_dependency_says_what_to_install(monkeypatch):
    def missing(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed. Run pip.")

    monkeypatch.setattr(gymnasium, "make", missing)
    message = r"""'Hopper-v5' needs a package .*: pip install "gymnasium\[mujoco\]"$"""
    with pytest.raises(InputError, match=message):
        make_environment("Hopper-v5")


def test_another_missing_dependency_keeps_its_own_hint(monkeypatch):
    def missing(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed.\nRun pip box2d.")

    monkeypatch.setattr(gymnasium, "make", missing)
    with pytest.raises(InputError, match="Box2D is not installed; Run pip box2d$"):
        make_environment("LunarLander-v3")


def test_mujoco_warnings_go_to_logging_and_not_to_a_file(tmp_path, monkeypatch, caplog):
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    mujoco.set_mju_user_warning(None)
    env = make_environment("HalfCheetah-v5")
    env.reset(seed=0)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        # The handler runs in C: an error raised from a warning there would abort the process.
        warnings.filterwarnings("error", message=".*QACC.*|.*CTRL.*")
        env.unwrapped.data.ctrl[:] = np.nan
        mujoco.mj_step(env.unwrapped.model, env.unwrapped.data)
    assert any("mujoco: Nan, Inf or huge value" in record.message for record in caplog.records)
    assert list(tmp_path.iterdir()) == []


def test_a_mujoco_handler_of_the_user_is_kept():
    mujoco = pytest.importorskip("mujoco")
    if not hasattr(mujoco, "get_mju_user_warning"):
        pytest.skip("this mujoco cannot say which handler is set")
    heard = []
    mujoco.set_mju_user_warning(heard.append)
    try:
        make_environment("Pendulum-v1")
        mujoco.MjModel.from_xml_string(
            '<mujoco><compiler settotalmass="1"/><worldbody><body><joint/>'
            '<geom size="1"/></body></worldbody></mujoco>'
        )
        assert mujoco.get_mju_user_warning() == heard.append
    finally:
        mujoco.set_mju_user_warning(None)


def test_spaces_other_than_vectors_are_refused_by_name():
    env = make_environment("CartPole-v1")
    with pytest.raises(
        InputError, match=r"CartPole-v1: action space must .*continuous.*, got Discrete\(2\)$"
    ):
        check_spaces(env)

    def pendulum(**spaces):
        env = make_environment("Pendulum-v1").unwrapped
        vars(env).update(spaces)
        return env

    env = pendulum(observation_space=Box(0, 255, (4, 4), np.uint8))
    message = r"Pendulum-v1: observation space must be .*flattens\), got Box.* of shape \(4, 4\)$"
    with pytest.raises(InputError, match=message):
        check_spaces(env)
    flattens = r"a Box of one dimension \(gymnasium.wrappers.FlattenObservation flattens\)"
    env = pendulum(observation_space=gymnasium.spaces.Dict({"a": Box(-1, 1, (2,))}))
    with pytest.raises(InputError, match=rf"Pendulum-v1: .* be {flattens}, got Dict"):
        check_spaces(env)
    both = gymnasium.spaces.Tuple([Box(-1, 1, (2,)), gymnasium.spaces.Discrete(3)])
    env = pendulum(observation_space=both)
    with pytest.raises(InputError, match=rf"Pendulum-v1: .* be {flattens}, got Tuple"):
        check_spaces(env)
    assert check_spaces(gymnasium.wrappers.FlattenObservation(env)) == (5, 1)
    env = pendulum(observation_space=gymnasium.spaces.Sequence(Box(-1, 1, (2,))))
    with pytest.raises(InputError, match=r"observation space .* of one dimension, got Sequence"):
        check_spaces(env)
    env = pendulum(action_space=Box(0, 5, (2,), np.int64))
    with pytest.raises(InputError, match="action space must have a floating dtype, got Box"):
        check_spaces(env)
    env = pendulum(action_space=Box(0, 5, (0,)))
    with pytest.raises(InputError, match=r"action space .* dimension, got Box.* of shape \(0,\)"):
        check_spaces(env)
