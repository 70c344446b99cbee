"""The critic beside the returns of episodes whose values are known."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import polygrad_fast as pg
from polygrad_fast.diagnostics.critic import NUM_STEPS, critic_error, imagined_return
from polygrad_fast.diagnostics.table import _critic

LENGTH, GAMMA = 40, 0.95
REWARD = 4.0
"""The middle of the actions, which the policy's mean is."""


class Countdown(gymnasium.Env):
    """Shows the steps left; the reward is the action, in [2, 6], of which 4 is the middle."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(2.0, 6.0, (1,), np.float32)

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
        return np.array([self.left], np.float32), float(action[0]), *flags, {}


class Value(nn.Module):
    """(1 - gamma^k) / (1 - gamma) of k steps left, times a factor, plus an offset.

    Reads raw observations, or normalized ones by the moments of `normalizer`.
    """

    def __init__(self, factor=REWARD, offset=0.0):
        super().__init__()
        self.factor, self.offset, self.normalizer, self.unit = factor, offset, None, 1.0

    def forward(self, observations):
        if self.normalizer is not None:
            observations = self.normalizer.unnormalize(observations, "observations")
        left = observations[..., 0].double()
        return self.unit * (self.factor * (1 - GAMMA**left) / (1 - GAMMA) + self.offset)


class Model:
    """Imagines the countdown, normalized, 6 steps at a time.

    Args:
        normalizer: of everything.
        reward: of each step.
        ends: whether anything does.
        blown_up: the share of trajectories that leave all bounds in the fourth step, for that step.
        ended: whether these have ended in the step before.
    """

    def __init__(self, normalizer, reward=REWARD, ends=True, blown_up=0.0, ended=False):
        self.normalizer, self.reward, self.ends = normalizer, reward, ends
        self.blown_up, self.ended, self.calls = blown_up, ended, 0

    def imagine(self, initial_observations, policy, generator=None, normalized=False):
        assert normalized
        self.calls += 1
        normalizer = self.normalizer
        first = normalizer.unnormalize(initial_observations, "observations")
        left = first - torch.arange(6.0)  # [B, H]
        over = (left <= 1).float() if self.ends else torch.zeros_like(left)
        rewards, blown_up = torch.full_like(left, self.reward), round(self.blown_up * len(left))
        left[:blown_up, 3], rewards[:blown_up, 3] = 1e12, torch.inf
        if self.ended:
            over[:blown_up, 2:] = 1.0
        return pg.TrajectoryBatch(
            normalizer.normalize(left.unsqueeze(-1), "observations"),
            torch.zeros(*left.shape, 1),
            normalizer.normalize(rewards, "rewards"),
            normalizer.normalize(over, "terminals"),
        )


def error(value, normed=False, reward_rms=None, log_std=-30.0, model=None, **options):
    """Return what is found of a policy of mean 4, and the unit of the critic's rewards."""
    config = pg.TrainConfig.from_preset("quick")
    a2c = dataclasses.replace(config.a2c, gamma=GAMMA, reward_rms=reward_rms)
    policy = dataclasses.replace(config.policy, normed_inputs=normed)
    config = dataclasses.replace(config, a2c=a2c, policy=policy)
    agent = pg.PolyGRAD(Countdown(**options), "quick", seed=0, device="cpu", config=config)
    learner, normalizer = agent.training.learner, agent.normalizer
    assert learner.normed_inputs == normed
    with torch.no_grad():
        for name, moment, scale in (("observations", 3.0, 7.0), ("rewards", 0.5, 2.0)):
            getattr(normalizer, f"{name}_mean").fill_(moment)
            getattr(normalizer, f"{name}_scale").fill_(scale)
        for parameter in agent.policy.network[-1].parameters():
            parameter.zero_()
        agent.policy.min_std = 0.0
        agent.policy.log_std.fill_(log_std)
    value.normalizer = normalizer if normed else None
    if reward_rms is not None:
        value.unit = reward_rms / np.hypot(0.5, 2.0)
    learner.target_value_function = value
    model = Model(normalizer, **(model or {}))
    found = critic_error(Countdown(**options), model, learner, agent.action_scaler, seed=0)
    return found, value.unit


@pytest.mark.parametrize("normed, reward_rms", [(False, None), (False, 0.1), (True, 0.1)])
def test_true_values_are_the_returns(normed, reward_rms):
    """In the unit of the critic's rewards, whatever the moments of observations and rewards."""
    found, unit = error(Value(), normed, reward_rms)
    lefts = np.arange(1, LENGTH + 1)
    wanted = unit * REWARD * ((1 - GAMMA**lefts) / (1 - GAMMA)).mean()
    assert found.value == pytest.approx(wanted, rel=1e-5)
    assert found.discounted_return == pytest.approx(wanted, rel=1e-5)
    assert found.imagined_return == pytest.approx(wanted, rel=0.1)  # of some of the states
    assert found.correlation == pytest.approx(1.0, abs=1e-6)
    assert (found.num_states, found.num_episodes) == (NUM_STEPS, NUM_STEPS // LENGTH)


def test_normalized_rewards_are_the_unit_of_a_critic_that_reads_normalized_observations():
    found, _ = error(Value(factor=(REWARD - 0.5) / 2.0), normed=True)
    assert found.discounted_return == pytest.approx(found.value, rel=1e-5)


def test_a_critic_that_hopes_is_found_out():
    found, _ = error(Value(offset=3.0))
    assert found.value - found.discounted_return == pytest.approx(3.0, rel=1e-5)
    assert found.correlation == pytest.approx(1.0, abs=1e-6)
    true, _ = error(Value())
    assert found.imagined_return == pytest.approx(true.imagined_return, rel=1e-5)


def test_a_model_that_hopes_is_found_out():
    true, _ = error(Value())
    richer, _ = error(Value(), model={"reward": 1.5 * REWARD})
    assert richer.imagined_return == pytest.approx(1.5 * true.imagined_return, rel=1e-5)
    assert richer.discounted_return == true.discounted_return
    endless, _ = error(Value(factor=0.0, offset=20.0), model={"ends": False})
    steps = 45  # trajectories of 5 steps until gamma^k <= 0.1
    wanted = REWARD * (1 - GAMMA**steps) / (1 - GAMMA) + 20.0 * GAMMA**steps
    assert endless.imagined_return == pytest.approx(wanted, rel=1e-4)
    assert _critic(endless).endswith(f"episodes; imagined from 256 of them: {wanted:.2f}")


def test_a_model_that_diverges_says_nothing():
    true = REWARD / (1 - GAMMA)
    value = Value(factor=0.0, offset=true)
    few, _ = error(value, model={"ends": False, "blown_up": 0.03})
    assert few.imagined_return == pytest.approx(true, rel=1e-4)
    many, _ = error(value, model={"ends": False, "blown_up": 0.5})
    assert many.imagined_return is None and _critic(many).endswith("the model diverges")
    after, _ = error(value, model={"ends": False, "blown_up": 0.5, "ended": True})
    wanted = (true + REWARD * (1 + GAMMA + GAMMA**2)) / 2  # what follows an end is not looked at
    assert after.imagined_return == pytest.approx(wanted, rel=1e-4)


def test_imagination_stops_where_all_have_ended():
    normalizer = pg.Normalizer(1, 1)
    model = Model(normalizer, blown_up=1.0, ended=True)
    policy, value = pg.GaussianPolicy(1, 1, 8), pg.ValueFunction(1, 8)
    learner = pg.ActorCritic(policy, value, normalizer, pg.A2CConfig(gamma=1.0))
    starts = torch.full((5, 1), float(LENGTH))
    assert imagined_return(model, learner, starts, 0) == pytest.approx(3 * REWARD)
    assert model.calls == 1
    assert imagined_return(model, learner, torch.zeros(0, 1), 0) is None
    model = Model(normalizer, ends=False)  # without end and discount there is no return
    assert imagined_return(model, learner, starts, 0) is None


def test_a_critic_that_fears_what_is_good_is_found_out():
    assert error(Value(factor=-1.0))[0].correlation == pytest.approx(-1.0, abs=1e-6)


def test_actions_are_drawn_from_the_policy_by_the_seed():
    """Noise of deviation 1 clipped to the bounds keeps the mean and scatters the returns."""
    found, _ = error(Value(), log_std=0.0)
    true, _ = error(Value())
    assert found == error(Value(), log_std=0.0)[0]
    assert found.discounted_return == pytest.approx(true.value, rel=0.02)
    assert 0.9 < found.correlation < 0.9999


def test_a_time_limit_is_no_end():
    """Rewards would go on; a value stands in where it counts little, other states are left out."""
    length, true = 100, REWARD / (1 - GAMMA)
    found, _ = error(Value(factor=0.0, offset=1.5 * true), length=length, terminates=False)
    unknown = GAMMA ** np.arange(1, length + 1)
    counted = unknown <= 0.1
    wanted = (true * (1 - unknown) + 1.5 * true * unknown)[counted].mean()
    assert found.num_states == counted.sum() * NUM_STEPS // length
    assert found.discounted_return == pytest.approx(wanted, rel=1e-5)
    assert found.correlation is None  # the value is the same everywhere
    assert "correlation" not in _critic(found) and "40 episodes" in _critic(found)


def test_a_long_episode_is_broken_off():
    found, _ = error(Value(factor=0.0, offset=REWARD / (1 - GAMMA)), length=NUM_STEPS + 1)
    assert found.num_episodes == 1
    assert found.num_states == (GAMMA ** np.arange(1, NUM_STEPS + 1) <= 0.1).sum()
    assert found.discounted_return == pytest.approx(found.value, rel=1e-5)


def test_episodes_may_be_too_short_to_tell():
    found, _ = error(Value(), terminates=False)
    known = found.value, found.discounted_return, found.correlation, found.imagined_return
    assert known == (None, None, None, None)
    assert found.num_states == found.num_episodes == 0 and "time limit" in _critic(found)
