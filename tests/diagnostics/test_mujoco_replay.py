"""mujoco.rollout gives what gymnasium's loop gives, or is not taken."""

import gymnasium
import numpy as np
import pytest

import polygrad_fast as pg
from polygrad_fast.data.environment import make_environment
from polygrad_fast.diagnostics.mujoco_replay import MujocoReplay

NATIVE = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Swimmer-v5", "InvertedPendulum-v5")
NATIVE += ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
LOOP_ONLY = ("Ant-v5", "InvertedDoublePendulum-v5", "Reacher-v5")
N, T = 24, 30


def replay_of(environment, **options):
    """A replay, states along an episode of it, and actions, some of them out of bounds."""
    replay = MujocoReplay(environment, **options)
    space, g = environment.action_space, np.random.default_rng(0)
    actions = 0.4 * g.standard_normal((N, T, *space.shape)) * space.high
    actions = actions.clip(space.low, space.high).astype(np.float32)
    environment.reset(seed=1)
    states = []
    for i in range(N):
        states.append(replay.state())
        environment.step(actions[i, 0])
    return replay, np.array(states), actions


@pytest.mark.parametrize("env_id", NATIVE)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_rollout_is_the_loop_to_the_last_bit(env_id, threads):
    replay, states, actions = replay_of(make_environment(env_id), threads=threads)
    loop, native = replay.play_in_a_loop(states, actions), replay.play_natively(states, actions)
    assert native.equals(loop)
    assert np.isfinite(loop.rewards[:, 0]).all() and loop.rewards[:, 0].std() >= 0
    ended = loop.terminals.any(axis=1)
    assert ended.any() == (env_id[:6] in ("Hopper", "Walker", "Invert"))
    assert not replay.is_native
    replay.check(states, actions)
    assert replay.is_native and replay.play(states, actions).equals(loop)


@pytest.mark.parametrize("env_id", LOOP_ONLY)
def test_where_steps_read_more_than_positions_and_velocities_the_loop_is_taken(env_id):
    replay, states, actions = replay_of(make_environment(env_id))
    replay.check(states, actions)
    assert not replay.is_native
    assert not replay.play_natively(states, actions).equals(replay.play(states, actions))


class Weaker(gymnasium.ActionWrapper):
    def action(self, action):
        return 0.5 * action


class Doubled(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return 2 * observation


def test_wrappers_are_not_bypassed():
    replay, states, actions = replay_of(Weaker(make_environment("Hopper-v5")))
    replay.check(states, actions)
    assert not replay.is_native
    plain, _, _ = replay_of(make_environment("Hopper-v5"))
    assert replay.play(states, actions).equals(plain.play(states, 0.5 * actions))

    doubled, _, _ = replay_of(Doubled(make_environment("Hopper-v5")))
    doubled.check(states, actions)
    assert doubled.is_native
    wanted = 2 * plain.play(states, actions).observations
    assert np.array_equal(doubled.play(states, actions).observations, wanted, equal_nan=True)


def test_what_was_played_before_has_no_effect():
    """Also not by where the solver's iterations begin."""
    replay, states, actions = replay_of(make_environment("Walker2d-v5"))
    forwards = replay.play_in_a_loop(states, actions)
    backwards = replay.play_in_a_loop(states[::-1], actions[::-1])
    assert np.array_equal(backwards.observations[::-1], forwards.observations, equal_nan=True)
    alone = replay.play_in_a_loop(states[5:6], actions[5:6])
    assert np.array_equal(alone.rewards[0], forwards.rewards[5], equal_nan=True)


def test_trajectories_are_those_of_an_environment_of_its_own():
    """Played with nothing of the code under test."""
    replay, states, actions = replay_of(make_environment("Hopper-v5"))
    played = replay.play(states, actions)
    environment = make_environment("Hopper-v5")
    for i in range(0, N, 3):
        environment.reset(seed=0)
        environment.unwrapped.set_state(states[i, 1:7], states[i, 7:13])
        for t in range(T):
            observation, reward, terminated, _, _ = environment.step(actions[i, t])
            np.testing.assert_allclose(played.observations[i, t], observation, atol=1e-6)
            assert played.rewards[i, t] == pytest.approx(reward, abs=1e-6)
            assert played.terminals[i, t] == terminated
            if terminated:
                assert np.isnan(played.observations[i, t + 1 :]).all()
                assert np.isnan(played.rewards[i, t + 1 :]).all()
                assert played.terminals[i, t:].all()
                break


def test_a_simulation_that_blows_up_is_told_in_both_ways():
    replay, states, actions = replay_of(make_environment("HalfCheetah-v5"))
    states[1::2, 10:] = 1e9  # not at time 0, to where MuJoCo sets the clock back
    loop, native = replay.play_in_a_loop(states, actions), replay.play_natively(states, actions)
    for played in (loop, native):
        assert np.isnan(played.rewards[1::2, 0]).all() and not played.terminals.any()
        assert np.isfinite(played.rewards[::2]).all()
    assert native.equals(loop)


def test_large_batches_are_played_in_parts(monkeypatch):
    replay, states, actions = replay_of(make_environment("Hopper-v5"))
    wanted = replay.play_natively(states, actions)
    monkeypatch.setattr("polygrad_fast.diagnostics.mujoco_replay._MAX_NUMBERS", 5 * T * 4 * 13)
    assert replay.play_natively(states, actions).equals(wanted)


def test_the_environment_steps_as_before_afterwards():
    environment = make_environment("Hopper-v5")
    replay, states, actions = replay_of(environment)
    replay.play_natively(states, actions)
    other = make_environment("Hopper-v5")
    results = []
    for each in (environment, other):
        each.reset(seed=5)
        results.append(each.step(actions[0, 0])[0])
    assert np.array_equal(*results)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "MountainCarContinuous-v0"])
def test_other_environments_are_refused(env_id):
    message = (
        f"must be one of gymnasium's MuJoCo environments, whose state can be set, got {env_id}"
    )
    with pytest.raises(pg.InputError, match=message):
        MujocoReplay(make_environment(env_id))
