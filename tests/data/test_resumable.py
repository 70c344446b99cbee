"""Environments whose exact state is saved and restored."""

from __future__ import annotations

import io
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.resumable import ResumableEnvironment
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
    with pytest.raises(InputError, match="seed must be an integer of at least 0, got -1"):
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
        (
            np.array([0, np.nan]),
            r"Walk, step 1 of the episode: observation\[1\] must be .*, got nan$",
        ),
        (
            np.array([np.inf, 0]),
            r"Walk, step 1 of the episode: observation\[0\] must be .*, got inf$",
        ),
        (np.zeros(3), r"observation must have shape \(2,\), got \(3,\)"),
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
    with pytest.raises(InputError, match=r"Walk, reset: observation\[0\] must be .*, got nan"):
        env.reset()
    env = ResumableEnvironment(Walk(reward=float("inf")), seed=0)
    env.reset()
    with pytest.raises(InputError, match="step 1 of the episode: reward must .*, got inf"):
        env.step(np.zeros(2))
    with pytest.raises(InputError, match=r"Walk: action\[0\] must be .*, got nan"):
        env.step(np.array([np.nan, 0]))
    with pytest.raises(InputError, match=r"Walk: action must have shape \(2,\), got \(1,\)"):
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
            "saved environment must be 'Walk', got 'Ant-v5'",
        ),
        (lambda s: s.update(episode_return="x"), "episode_return must be a float, got 'x'"),
        (
            lambda s: s.update(actions=s["actions"][1:]),
            r"must have shape \(2, 2\) .*, got \(1, 2\)",
        ),
        (lambda s: s.update(observation=torch.zeros(3)), r"must have shape \(2,\) .*, got \(3,\)"),
        (lambda s: s.update(generator="{"), "generator states must be .* cannot be read"),
        (
            lambda s: s.update(episode_seed=-1, observation=torch.zeros(0)),
            "episode_seed must .*, got -1",
        ),
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
