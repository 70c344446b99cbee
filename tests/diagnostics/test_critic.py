"""The critic beside the returns of episodes whose values are known."""

import dataclasses

import gymnasium
import numpy as np
import pytest
from torch import nn

import polygrad_fast as pg
from polygrad_fast.diagnostics.critic import NUM_STEPS, critic_error
from polygrad_fast.diagnostics.table import _critic

LENGTH, GAMMA = 40, 0.95


class Countdown(gymnasium.Env):
    """Shows the steps left and pays 1 for each."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, length=LENGTH, terminates=True):
        self.length, self.terminates = length, terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.length
        return np.array([self.left], np.float32), {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        flags = (over, False) if self.terminates else (False, over)
        return np.array([self.left], np.float32), 1.0, *flags, {}


class Value(nn.Module):
    """(1 - gamma^k) / (1 - gamma) of k steps left, times a factor, plus an offset."""

    def __init__(self, factor=1.0, offset=0.0):
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, observations):
        left = observations[..., 0].double()
        return self.factor * (1 - GAMMA**left) / (1 - GAMMA) + self.offset


def error(value, **options):
    config = pg.TrainConfig.from_preset("quick")
    a2c = dataclasses.replace(config.a2c, gamma=GAMMA, reward_rms=None)
    policy = dataclasses.replace(config.policy, normed_inputs=False)
    config = dataclasses.replace(config, a2c=a2c, policy=policy)
    environment = Countdown(**options)
    agent = pg.PolyGRAD(environment, "quick", seed=0, device="cpu", config=config)
    learner = agent.training.learner
    assert not learner.normed_inputs  # values of raw observations, of raw rewards
    learner.target_value_function = value
    return critic_error(Countdown(**options), learner, agent.action_scaler, seed=0)


def test_true_values_are_the_returns():
    found = error(Value())
    lefts = np.arange(1, LENGTH + 1)
    assert found.value == pytest.approx(((1 - GAMMA**lefts) / (1 - GAMMA)).mean(), rel=1e-5)
    assert found.discounted_return == pytest.approx(found.value, rel=1e-5)
    assert found.correlation == pytest.approx(1.0, abs=1e-6)
    assert found.num_states == NUM_STEPS


def test_a_critic_that_hopes_is_found_out():
    found = error(Value(offset=3.0))
    assert found.value - found.discounted_return == pytest.approx(3.0, rel=1e-5)
    assert found.correlation == pytest.approx(1.0, abs=1e-6)


def test_a_critic_that_fears_what_is_good_is_found_out():
    assert error(Value(factor=-1.0)).correlation == pytest.approx(-1.0, abs=1e-6)


def test_a_time_limit_is_no_end():
    """Rewards would go on; a value stands in where it counts little, other states are left out."""
    length, true = 100, 1 / (1 - GAMMA)
    constant = Value(factor=0.0, offset=1.5 * true)
    found = error(constant, length=length, terminates=False)
    left = np.arange(1, length + 1)
    unknown = GAMMA**left
    counted = unknown <= 0.1
    wanted = (true * (1 - unknown) + 1.5 * true * unknown)[counted].mean()
    assert found.num_states == counted.sum() * NUM_STEPS // length
    assert found.discounted_return == pytest.approx(wanted, rel=1e-5)
    assert found.correlation is None  # the value is the same everywhere


def test_episodes_may_be_too_short_to_tell():
    found = error(Value(), terminates=False)
    assert (found.value, found.discounted_return, found.correlation) == (None, None, None)
    assert found.num_states == 0 and "time limit" in _critic(found)
