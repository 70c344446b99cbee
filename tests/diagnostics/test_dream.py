"""A dream is imagined, and what is beside it is what the environment does."""

import gymnasium
import numpy as np
import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.data.environment import make_environment
from polygrad_fast.diagnostics.dream import dream, pose_simulator
from polygrad_fast.sampling import TrajectoryBatch


class Watched(gymnasium.Wrapper):
    """Remembers the newest episode; its pictures are the positions that would be seen."""

    def reset(self, *, seed=None, options=None):
        self.seed, self.actions = seed, []
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        self.actions.append(action)
        return self.env.step(action)

    def render(self):
        return self.unwrapped.data.qpos.copy()


class Imagined:
    """Observations that drift by a known amount, actions out of bounds, an end where asked for."""

    longest_horizon = 12

    def __init__(self, normalizer, end=None):
        self.normalizer, self.end = normalizer, end

    def imagine(self, initial_observations, policy, generator=None, normalized=False, horizon=None):
        steps = torch.arange(horizon).float()
        observations = initial_observations[:, None] + 0.1 * steps[:, None]
        terminals = torch.zeros(1, horizon)
        if self.end is not None:
            terminals[:, self.end :] = 1.0
        self.actions = 3 * torch.randn(1, horizon, 3, generator=generator)
        return TrajectoryBatch(
            observations,
            self.normalizer.normalize(self.actions, "actions"),
            torch.zeros(1, horizon),
            self.normalizer.normalize(terminals, "terminals"),
        )


@pytest.fixture(scope="module")
def parts(agent):
    return agent.policy, agent.normalizer, agent.action_scaler


def watched(parts, seed=0):
    environment = Watched(make_environment("Hopper-v5"))
    return environment, pose_simulator(environment, *parts, seed)


@pytest.mark.parametrize("start", [0, 3])
def test_the_real_trajectory_is_that_of_the_imagined_actions(parts, start):
    environment, simulator = watched(parts)
    model = Imagined(parts[1])
    found = dream(environment, simulator, model, *parts, horizon=8, start=start, seed=2)
    again = make_environment("Hopper-v5")
    observation, _ = again.reset(seed=environment.seed)
    real, positions, ended = [], [], None
    taken = parts[2].to_environment(model.actions[0, :-1].numpy())
    assert (np.abs(taken) == 1).any()  # clipped
    played = environment.actions
    assert np.array_equal(played[start:], taken[: len(played) - start])
    for t, action in enumerate(played):
        if t >= start:
            real.append(observation)
            positions.append(again.unwrapped.data.qpos.copy())
        observation, _, ended, _, _ = again.step(action)
    np.testing.assert_allclose(found.real[: len(real)], np.array(real), rtol=1e-6)
    assert found.real_length == len(real) + (not ended)
    for (_, shown), wanted in zip(found.frames, positions, strict=False):
        assert np.array_equal(shown, wanted)
    assert len(found.frames) == len(found.real) == len(found.imagined) == 8
    if ended:
        assert np.isnan(found.errors[found.real_length :]).all()


def test_the_imagined_pictures_are_of_the_imagined_observations(parts):
    environment, simulator = watched(parts)
    found = dream(environment, simulator, Imagined(parts[1]), *parts, horizon=6, start=2, seed=1)
    shown = np.array([picture for picture, _ in found.frames])
    np.testing.assert_allclose(shown[:, 1:], found.imagined[:, :5], rtol=1e-6)
    x = found.frames[0][1][0] + np.concatenate([[0], np.cumsum(0.008 * found.imagined[1:, 5])])
    np.testing.assert_allclose(shown[:, 0], x, rtol=1e-6)
    difference = (found.imagined - found.real) / parts[1].observations_scale.numpy()
    alive = min(found.imagined_length, found.real_length)
    wanted = np.square(difference).mean(axis=1)
    np.testing.assert_allclose(found.errors[:alive], wanted[:alive], rtol=1e-4, atol=1e-12)
    assert found.errors[0] < 1e-10 and found.imagined_length == 6 and alive >= 2


def test_past_an_imagined_end_the_dream_stands_still(parts):
    environment, simulator = watched(parts)
    found = dream(environment, simulator, Imagined(parts[1], end=2), *parts, horizon=6)
    assert found.imagined_length == 3
    assert np.isnan(found.errors[3:]).all() and np.isfinite(found.errors[:2]).all()
    assert (found.imagined[3:] == found.imagined[2]).all()
    assert all(np.array_equal(found.frames[t][0], found.frames[2][0]) for t in (3, 4, 5))


def test_a_seed_gives_the_same_dream_again(agent, parts):
    def found(seed):
        environment, simulator = watched(parts, seed)
        options = dict(horizon=15, seed=seed)  # longer than in training
        return dream(environment, simulator, agent.world_model, *parts, **options)

    first, again, other = found(0), found(0), found(1)
    assert np.array_equal(first.imagined, again.imagined)
    assert np.array_equal(first.errors, again.errors, equal_nan=True)
    assert not np.array_equal(first.imagined, other.imagined)
    assert len(first.imagined) == 15


def test_where_observations_do_not_fix_the_pose_there_are_no_pictures():
    agent = pg.PolyGRAD("MountainCarContinuous-v0", preset="quick", device="cpu")
    parts = (agent.policy, agent.normalizer, agent.action_scaler)
    environment = make_environment("MountainCarContinuous-v0")
    assert pose_simulator(environment, *parts) is None
    found = dream(environment, None, agent.world_model, *parts, horizon=4)
    assert found.frames == [] and found.imagined.shape == found.real.shape == (4, 2)
    assert found.real_length == 4
    assert np.isfinite(found.errors).tolist() == [t < found.imagined_length for t in range(4)]


def test_bad_arguments_are_refused(parts):
    environment, simulator = watched(parts)
    model = Imagined(parts[1])
    for options, message in [
        ({"horizon": 13}, "horizon must be at most 12, .*, got 13"),
        ({"horizon": 1}, "horizon must be an integer of at least 2, got 1"),
        ({"horizon": 5, "start": -1}, "start must be an integer of at least 0, got -1"),
        (
            {"horizon": 5, "start": 900},
            r"start must lie within the episode of Hopper-v5, which ended after \d+ steps, got 900",
        ),
    ]:
        with pytest.raises(pg.InputError, match=message):
            dream(environment, simulator, model, *parts, **options)
