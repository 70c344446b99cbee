"""Copies of environment objects: faithful, independent, or refused."""

from __future__ import annotations

import random
import socket
import threading
import weakref

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.spaces import Box

from polygrad_fast.data.environment_copy import check_independent, copy_environment
from polygrad_fast.errors import InputError


def weak_pendulum(**options) -> gymnasium.Env:
    env = gymnasium.make("Pendulum-v1", **options)
    env.unwrapped.g = 1.0
    return env


def heavy_hopper() -> gymnasium.Env:
    pytest.importorskip("mujoco")
    env = gymnasium.make("Hopper-v5")
    env.unwrapped.model.body_mass[1] *= 3
    return env


def play(env: gymnasium.Env, seed: int = 3, steps: int = 40) -> list[bytes]:
    observation, _ = env.reset(seed=seed)
    seen, rng = [np.asarray(observation).tobytes()], np.random.default_rng(0)
    shape, dtype = env.action_space.shape, env.action_space.dtype
    for _ in range(steps):
        observation, reward, *ends, _ = env.step(rng.uniform(-1, 1, shape).astype(dtype))
        seen.append(np.asarray(observation).tobytes() + np.float64(reward).tobytes())
        if any(ends):
            break
    return seen


MADE = {
    "mujoco": heavy_hopper,
    "classic": weak_pendulum,
    "reward": lambda: wrappers.TransformReward(weak_pendulum(), lambda reward: reward / 7),
    "clip": lambda: wrappers.ClipAction(weak_pendulum()),
    "rescale": lambda: wrappers.RescaleAction(heavy_hopper(), np.float32(-0.5), np.float32(0.5)),
    "observation": lambda: wrappers.TransformObservation(weak_pendulum(), lambda o: 2 * o, None),
    "statistics": lambda: wrappers.RecordEpisodeStatistics(weak_pendulum()),
    "normalized": lambda: wrappers.NormalizeObservation(weak_pendulum()),
    "stack": lambda: wrappers.FlattenObservation(
        wrappers.FrameStackObservation(weak_pendulum(), 3)
    ),
}


@pytest.mark.parametrize("kind", list(MADE))
def test_a_copy_plays_as_the_original_and_leaves_it_alone(kind):
    env = MADE[kind]()
    copied = copy_environment(env)
    check_independent(copied)
    assert [type(a) for a in chain(copied)] == [type(a) for a in chain(env)]
    wanted = play(MADE[kind]())
    assert play(copied) == wanted
    assert play(copied, seed=4) != wanted
    assert play(env) == wanted  # as if nothing had been copied, stepped and checked


def chain(env: gymnasium.Env) -> list[gymnasium.Env]:
    return [env, *chain(env.env)] if isinstance(env, gymnasium.Wrapper) else [env]


def test_physics_differ_from_those_of_the_constructor():
    """So that the test above would notice an environment built anew."""
    for changed, fresh in ((weak_pendulum(), "Pendulum-v1"), (heavy_hopper(), "Hopper-v5")):
        assert play(changed) != play(gymnasium.make(fresh))


def test_mujoco_data_belong_to_the_copied_model():
    env = heavy_hopper()
    env.reset(seed=0)
    copied = copy_environment(env).unwrapped
    assert copied.data.model is copied.model and copied.mujoco_renderer.model is copied.model
    assert copied.model is not env.unwrapped.model
    assert np.array_equal(copied.model.body_mass, env.unwrapped.model.body_mass)
    assert np.array_equal(copied.data.qpos, env.unwrapped.data.qpos)
    before = env.unwrapped.data.qpos.copy(), env.unwrapped.model.body_mass.copy()
    copied.model.body_mass[:] = 1.0
    copied.step(np.ones(3))
    assert np.array_equal(env.unwrapped.data.qpos, before[0])
    assert np.array_equal(env.unwrapped.model.body_mass, before[1])


def test_the_running_episode_its_generator_and_its_time_limit_are_copied():
    env = weak_pendulum()
    env.reset(seed=0)
    for _ in range(195):
        env.step(np.zeros(1, np.float32))
    copied = copy_environment(env)
    ends = [copied.step(np.zeros(1, np.float32))[3] for _ in range(5)]
    assert ends == [False] * 4 + [True]
    wanted = env.unwrapped.np_random.bit_generator.state
    assert copied.unwrapped.np_random.bit_generator.state == wanted
    copied.unwrapped.np_random.normal()
    assert env.unwrapped.np_random.bit_generator.state == wanted
    assert env.get_wrapper_attr("_elapsed_steps") == 195


class Holder(gymnasium.Wrapper):
    def __init__(self, env, thing):
        super().__init__(env)
        self.thing = thing


def test_functions_are_copied_with_what_they_hold():
    env = weak_pendulum()
    scale = [2.0]
    calls = []

    def function(reward, env=env):
        calls.append(reward)
        return reward * scale[0] * env.unwrapped.g

    env = Holder(env, {"deep": [function, env.unwrapped.reset, weakref.ref(env.unwrapped), np]})
    copied = copy_environment(env)
    new, reset, reference, module = copied.thing["deep"]
    env.unwrapped.g, scale[0] = 50.0, 50.0
    assert new(1.0) == 2.0 and calls == []
    assert reset.__self__ is copied.unwrapped is reference()
    assert module is np


def test_arrays_keep_what_they_share():
    state, table = np.zeros(6), np.arange(4.0)
    table.flags.writeable = False
    env = Holder(weak_pendulum(), [state, state[1:5:2], state[::-1], table, table[1:]])
    whole, part, reversed_, constant, rest = copy_environment(env).thing
    whole[:] = range(6)
    assert part.tolist() == [1, 3] and reversed_.tolist() == [5, 4, 3, 2, 1, 0]
    part[0] = 9
    assert whole[1] == 9 and not state.any()
    assert constant is table and rest.tolist() == [1, 2, 3]
    again = copy_environment(copy_environment(env)).thing
    again[1][0] = 7
    assert again[0][1] == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (threading.Lock, r"Holder.thing \(TypeError: cannot pickle '_thread.lock' object\)"),
        (socket.socket, "cannot pickle 'socket' object"),
        (lambda: (n for n in range(3)), "cannot pickle 'generator' object"),
        (lambda: open("/dev/null"), "cannot pickle '_io.TextIOWrapper' object"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_copied_is_named_in_one_sentence(make, message):
    with pytest.raises(InputError, match=message) as caught:
        copy_environment(wrappers.ClipAction(Holder(weak_pendulum(), make())))
    assert "give eval_env=, " in str(caught.value) and "function that makes" in str(caught.value)
    assert str(caught.value).startswith("Pendulum-v1 cannot be copied for evaluation: ")
    assert "\n" not in str(caught.value)


def test_views_of_a_simulators_memory_are_refused():
    env = heavy_hopper()
    for thing in (env.unwrapped.data.qpos, env.unwrapped.data.qpos[1:], env.unwrapped.data.body(1)):
        with pytest.raises(InputError, match=r"Holder.thing"):
            copy_environment(Holder(env, thing))


class Drift(gymnasium.Env):
    """Adds actions to a number that `worlds` holds under a key, as a simulator's handle."""

    worlds: dict[int, float] = {}

    def __init__(self, noise=None):
        self.observation_space, self.action_space = Box(-9, 9, (1,)), Box(-1, 1, (1,))
        self.key, self.noise = len(self.worlds), noise

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.worlds[self.key] = self.np_random.normal()
        return np.array([self.worlds[self.key]]), {}

    def step(self, action):
        self.worlds[self.key] += float(action[0]) + (self.noise() if self.noise else 0.0)
        return np.array([self.worlds[self.key]]), 0.0, False, False, {}


def test_copies_that_share_a_simulator_are_refused():
    with pytest.raises(InputError, match="Drift cannot be .*: its copies influence one another"):
        check_independent(Drift())


def test_noise_of_global_generators_is_not_taken_for_influence():
    class Own(Drift):
        def __init__(self, noise):
            super().__init__(noise)
            self.worlds = {}

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    wanted = random.random(), np.random.normal(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    for noise in (random.random, np.random.random, lambda: torch.rand(1).item()):
        check_independent(Own(noise))
    assert (random.random(), np.random.normal(), torch.rand(1).item()) == wanted


def test_a_copy_that_cannot_be_played_is_refused():
    env = weak_pendulum()
    env.unwrapped.g = None
    with pytest.raises(InputError, match="playing a copy raised TypeError"):
        check_independent(env)
