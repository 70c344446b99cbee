"""Environments: errors of one sentence, action scaling, exact restore."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polygrad_fast.data.environment import (
    ActionScaler,
    ResumableEnvironment,
    check_spaces,
    make_environment,
)
from polygrad_fast.errors import CheckpointError, InputError


class Walk(gymnasium.Env):
    """A point that moves by the action; `noise` breaks determinism, `bad` replaces observations."""

    def __init__(self, noise: float = 0.0, length: int = 50, bad=None, reward: float = 1.0):
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.noise, self.length, self.bad, self.reward = noise, length, bad, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = self.np_random.normal(size=2), 0
        return self.position.copy(), {}

    def step(self, action):
        self.steps += 1
        self.position = self.position + action + self.noise * np.random.normal(size=2)
        observation = self.position.copy() if self.bad is None else self.bad
        return observation, self.reward, self.steps >= self.length, False, {}


def through_torch(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def play(env: ResumableEnvironment, steps: int) -> list[tuple]:
    """Random steps, resetting after an episode's end; everything seen, as bytes and numbers."""
    seen = []
    for _ in range(steps):
        action = env.sample_action()
        observation, *rest = env.step(action)
        seen.append((action.tobytes(), observation.tobytes(), *rest))
        if not env.running:
            seen.append(env.reset().tobytes())
    return seen


def test_make_environment_makes_and_passes_on():
    env = make_environment("Pendulum-v1", render_mode="rgb_array")
    assert env.spec.id == "Pendulum-v1" and env.render_mode == "rgb_array"
    assert make_environment(env) is env
    assert check_spaces(env) == (3, 1)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("HalfCheeta-v5", "'HalfCheeta-v5', which gymnasium does not know, .*HalfCheetah-v5"),
        ("hopper-v5", "'hopper-v5', which gymnasium does not know, did you mean Hopper-v5"),
        ("Hopper-v9", "'Hopper-v9', which gymnasium does not know, .*Hopper-v5"),
        ("Qwertyuiop-v0", "'Qwertyuiop-v0', which gymnasium does not know$"),
        ("nowhere/Thing-v0", "'nowhere/Thing-v0', which gymnasium does not know"),
        ("Hopper-v3", "'Hopper-v3' .*(gymnasium-robotics|mujoco-py).*Hopper-v5 or Hopper-v4"),
        ("no_such_module:Thing-v0", "cannot be made: No module named 'no_such_module'"),
        ("not an id", "'not an id' cannot be made: Malformed"),
        ("a:b:Thing-v0", "'a:b:Thing-v0', wanted at most one ':'"),
        (":", "':', wanted an id such as Hopper-v5 or module:Name-v0"),
        ("", "'', wanted an id such as Hopper-v5"),
        ("  ", "'  ', wanted an id such as Hopper-v5"),
        ("numpy:", "'numpy:', wanted an id such as"),
        (":Pendulum-v1", "':Pendulum-v1', wanted an id such as"),
        (".:Pendulum-v1", "'.:Pendulum-v1', wanted an id such as"),
        ("my file:Pendulum-v1", "'my file:Pendulum-v1', wanted an id such as"),
        ("Pendulum-v1 ", "'Pendulum-v1 ' cannot be made: Malformed.*did you mean Pendulum-v1"),
        (
            "broken_on_import:Own-v0",
            "'broken_on_import:Own-v0' cannot be made: NameError: .*'oops'",
        ),
        (3, "got 3 of type int, wanted an id"),
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
        ("bogus", "MUJOCO_GL is 'bogus', wanted egl, osmesa, glfw or disable, or unset it"),
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
        InputError, match=r"CartPole-v1: got action space Discrete\(2\), .*continuous"
    ):
        check_spaces(env)
    with pytest.raises(InputError, match="CartPole-v1"):
        ResumableEnvironment(env, seed=0)
    env = Walk()
    env.observation_space = Box(0, 255, (4, 4), np.uint8)
    with pytest.raises(InputError, match=r"Walk: got observation space .* of shape \(4, 4\)"):
        check_spaces(env)
    env.observation_space = gymnasium.spaces.Dict({"a": Box(-1, 1, (2,))})
    flattens = "wanted a Box of one dimension; gymnasium.wrappers.FlattenObservation flattens"
    with pytest.raises(InputError, match=rf"Walk: got observation space Dict.*{flattens}"):
        check_spaces(env)
    env.observation_space = gymnasium.spaces.Tuple([Box(-1, 1, (2,)), gymnasium.spaces.Discrete(3)])
    with pytest.raises(InputError, match=rf"Walk: got observation space Tuple.*{flattens}"):
        check_spaces(env)
    assert check_spaces(gymnasium.wrappers.FlattenObservation(env)) == (5, 2)
    env.observation_space = gymnasium.spaces.Sequence(Box(-1, 1, (2,)))
    with pytest.raises(InputError, match=r"Walk: got observation space Sequence.*dimension$"):
        check_spaces(env)
    env = Walk()
    env.action_space = Box(0, 5, (2,), np.int64)
    with pytest.raises(InputError, match="Walk: got action space .*, wanted a floating dtype"):
        check_spaces(env)


finite = st.floats(-100, 100, width=32)


@st.composite
def bounded_spaces(draw):
    size = draw(st.integers(1, 4))
    low = draw(arrays(np.float32, size, elements=finite))
    width = draw(arrays(np.float32, size, elements=st.floats(0.0625, 100, width=32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return Box(low.astype(dtype), (low + width).astype(dtype), dtype=dtype)


@settings(max_examples=100, deadline=None)
@given(space=bounded_spaces(), data=st.data())
def test_rescaled_actions_stay_in_bounds_and_come_back(space, data):
    scaler = ActionScaler(space, rescale=True)
    shape = data.draw(st.sampled_from([space.shape, (1, *space.shape), (3, *space.shape)]))
    action = data.draw(arrays(np.float32, shape, elements=st.floats(-2, 2, width=32)))
    raw = scaler.to_environment(action)
    assert raw.dtype == space.dtype and raw.shape == shape
    assert (raw >= space.low).all() and (raw <= space.high).all()
    back = scaler.from_environment(raw)
    assert back.dtype == np.float32 and back.shape == shape
    # An error of one float32 rounding of the largest bound, seen through the space's width.
    largest = np.maximum(np.abs(space.low), np.abs(space.high))
    slack = 2 * largest * 2.0**-23 / (space.high - space.low).astype(np.float64) + 1e-6
    assert (np.abs(back - np.clip(action, -1, 1)) <= slack).all()
    assert scaler.low.tolist() == [-1] * space.shape[0]
    assert scaler.high.tolist() == [1] * space.shape[0]


def test_rescaling_maps_ends_to_bounds_and_middle_to_middle():
    low, high = np.array([-2, 0, 3], dtype=np.float32), np.array([2, 5, 3], dtype=np.float32)
    scaler = ActionScaler(Box(low, high), rescale=True)
    actions = np.array([[-1, -1, -1], [0, 0, 0], [1, 1, 1], [-9, 9, 0.5]])
    raw = [[-2, 0, 3], [0, 2.5, 3], [2, 5, 3], [-2, 5, 3]]
    assert scaler.to_environment(actions).tolist() == raw
    # The third bounds are equal: every action is the same there and 0 stands for it.
    back = [[-1, -1, 0], [0, 0, 0], [1, 1, 0], [-1, 1, 0]]
    assert scaler.from_environment(np.array(raw)).tolist() == back


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (5, 3), elements=st.floats(-1e6, 1e6, width=32)))
def test_without_rescaling_actions_are_only_clipped_to_finite_bounds(action):
    low = np.array([-1, -np.inf, -np.inf], dtype=np.float32)
    high = np.array([2, 7, np.inf], dtype=np.float32)
    for rescale in (False, True):  # an infinite bound switches rescaling off
        scaler = ActionScaler(Box(low, high), rescale=rescale)
        assert not scaler.rescaled
        assert np.array_equal(scaler.low, low) and np.array_equal(scaler.high, high)
        assert np.array_equal(scaler.to_environment(action), np.clip(action, low, high))
        assert np.array_equal(scaler.from_environment(action), action)
    bounded = ActionScaler(Box(-2.0, 2.0, (3,)), rescale=False)
    assert bounded.low.tolist() == [-2, -2, -2] and not bounded.rescaled
    assert np.array_equal(bounded.to_environment(action), np.clip(action, -2, 2))


def test_action_scaler_names_wrong_shapes_and_spaces():
    scaler = ActionScaler(Box(-1.0, 1.0, (3,)), rescale=True)
    for bad in (np.zeros(2), np.zeros((4, 1)), np.zeros((1, 1, 3)), np.float32(0)):
        for convert in (scaler.to_environment, scaler.from_environment):
            with pytest.raises(InputError, match=r"wanted \(3,\) or \(N, 3\)"):
                convert(bad)
    with pytest.raises(InputError, match=r"got Discrete\(2\)"):
        ActionScaler(gymnasium.spaces.Discrete(2), rescale=True)


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "Pendulum-v1", "Hopper-v5"])
def test_a_restored_environment_continues_bit_equal(env_id):
    if env_id != "Pendulum-v1":
        pytest.importorskip("mujoco")
    env = ResumableEnvironment(make_environment(env_id), seed=5)
    env.reset()
    play(env, 40)
    while env.episode_length < 3:  # stop inside an episode
        play(env, 1)
    state = through_torch(env.state_dict())
    assert state["running"] == 1 and len(state["actions"]) == env.episode_length
    restored = ResumableEnvironment(make_environment(env_id), seed=99)
    restored.reset()
    play(restored, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restored.load_state_dict(state) is True
    assert restored.observation.tobytes() == env.observation.tobytes()
    assert restored.episode_return == env.episode_return
    assert restored.episode_length == env.episode_length
    assert play(restored, 30) == play(env, 30)
    assert restored.reset().tobytes() == env.reset().tobytes()
    assert play(restored, 30) == play(env, 30)


def test_the_time_limit_is_restored():
    env = ResumableEnvironment(make_environment("Pendulum-v1"), seed=0)
    env.reset()
    play(env, 190)
    restored = ResumableEnvironment(make_environment("Pendulum-v1"), seed=0)
    assert restored.load_state_dict(env.state_dict())
    ends = [restored.step(restored.sample_action())[3] for _ in range(10)]
    assert ends == [False] * 9 + [True]


@pytest.mark.parametrize("when", ["before the first reset", "after an episode's end"])
def test_a_state_between_episodes_is_restored(when):
    env = ResumableEnvironment(Walk(length=3), seed=1)
    if when == "after an episode's end":
        env.reset()
        for _ in range(3):
            env.step(env.sample_action())
        assert not env.running
    restored = ResumableEnvironment(Walk(length=3), seed=2)
    restored.reset()
    assert restored.load_state_dict(through_torch(env.state_dict())) is True
    assert not restored.running
    assert restored.state_dict().keys() == env.state_dict().keys()
    assert restored.episode_return == env.episode_return
    assert restored.reset().tobytes() == env.reset().tobytes()
    assert play(restored, 10) == play(env, 10)


def test_an_environment_with_hidden_randomness_warns_and_starts_anew():
    env = ResumableEnvironment(Walk(noise=0.1), seed=1)
    env.reset()
    play(env, 5)
    restored = ResumableEnvironment(Walk(noise=0.1), seed=1)
    with pytest.warns(UserWarning, match="Walk is not deterministic: .*5 actions") as caught:
        assert restored.load_state_dict(through_torch(env.state_dict())) is False
    assert len(caught) == 1
    assert restored.running and restored.episode_length == 0 and restored.episode_return == 0
    assert np.isfinite(restored.step(restored.sample_action())[0]).all()


@pytest.mark.parametrize("changed", [{"reward": 2.0}, {"length": 4}, {"bad": np.full(2, np.nan)}])
def test_a_replay_that_differs_in_return_end_or_finiteness_is_not_exact(changed):
    env = ResumableEnvironment(Walk(), seed=1)
    env.reset()
    play(env, 5)
    other = ResumableEnvironment(Walk(**changed), seed=1)
    with pytest.warns(UserWarning, match="not deterministic"):
        assert other.load_state_dict(env.state_dict()) is False
    assert other.running and other.episode_length == 0


def test_one_seed_determines_everything():
    runs = []
    for seed in (3, 3, 4):
        env = ResumableEnvironment(Walk(length=7), seed=seed)
        runs.append([env.reset().tobytes(), *play(env, 20)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    with pytest.raises(InputError, match="seed: got -1"):
        ResumableEnvironment(Walk(), seed=-1)


def test_episodes_differ_and_are_counted():
    env = ResumableEnvironment(Walk(length=4, reward=0.5), seed=0)
    first = env.reset()
    assert first.dtype == np.float32 and first.shape == (2,)
    assert (env.episode_return, env.episode_length) == (0.0, 0)
    for n in range(4):
        observation, reward, terminated, truncated = env.step(np.array([0.5, -0.5]))
        assert (reward, terminated, truncated) == (0.5, n == 3, False)
    assert (env.episode_return, env.episode_length) == (2.0, 4)
    np.testing.assert_allclose(observation, first + [2.0, -2.0], rtol=1e-6)
    assert not np.array_equal(env.reset(), first)


def test_the_callers_arrays_are_not_shared():
    env = ResumableEnvironment(Walk(), seed=0)
    observation = env.reset()
    observation[:] = 7.0
    assert not (env.observation == 7.0).any()
    action = np.array([0.25, 0.5], dtype=np.float32)
    env.step(action)
    action[:] = 0.0
    assert env.state_dict()["actions"].tolist() == [[0.25, 0.5]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([0, np.nan]), r"Walk, step 1 of the episode: observation\[1\] is nan"),
        (np.array([np.inf, 0]), r"Walk, step 1 of the episode: observation\[0\] is inf"),
        (np.zeros(3), r"observation: got shape \(3,\), wanted \(2,\)"),
    ],
)
def test_bad_observations_are_named(bad, message):
    env = ResumableEnvironment(Walk(bad=bad), seed=0)
    env.reset()
    with pytest.raises(InputError, match=message):
        env.step(np.zeros(2))


def test_a_bad_first_observation_bad_reward_and_bad_action_are_named():
    walk = Walk()
    walk.reset = lambda *, seed=None, options=None: (np.array([np.nan, 0]), {})
    env = ResumableEnvironment(walk, seed=0)
    with pytest.raises(InputError, match=r"Walk, reset: observation\[0\] is nan"):
        env.reset()
    env = ResumableEnvironment(Walk(reward=float("inf")), seed=0)
    env.reset()
    with pytest.raises(InputError, match="step 1 of the episode: reward is inf"):
        env.step(np.zeros(2))
    with pytest.raises(InputError, match=r"Walk: action\[0\] is nan"):
        env.step(np.array([np.nan, 0]))
    with pytest.raises(InputError, match=r"Walk: action: got shape \(1,\), wanted \(2,\)"):
        env.step(np.zeros(1))


def test_step_without_an_episode_is_refused():
    env = ResumableEnvironment(Walk(length=1), seed=0)
    with pytest.raises(InputError, match="no running episode"):
        env.step(np.zeros(2))
    with pytest.raises(InputError, match="no episode yet"):
        _ = env.observation
    env.reset()
    env.step(np.zeros(2))
    with pytest.raises(InputError, match="no running episode"):
        env.step(np.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("actions"), "'actions' is missing"),
        (
            lambda s: s.update(environment="Ant-v5"),
            "saved with environment 'Ant-v5', wanted 'Walk'",
        ),
        (lambda s: s.update(episode_return="x"), "episode_return is 'x', wanted float"),
        (lambda s: s.update(actions=s["actions"][1:]), r"shape \(1, 2\) .*, wanted \(2, 2\)"),
        (lambda s: s.update(observation=torch.zeros(3)), r"shape \(3,\) .*, wanted \(2,\)"),
        (lambda s: s.update(generator="{"), "generator states cannot be read"),
        (lambda s: s.update(episode_seed=-1, observation=torch.zeros(0)), "seed -1"),
    ],
)
def test_a_damaged_or_foreign_state_is_refused(change, message):
    env = ResumableEnvironment(Walk(), seed=1)
    env.reset()
    play(env, 2)
    state = env.state_dict()
    change(state)
    other = ResumableEnvironment(Walk(), seed=1)
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict(state)
