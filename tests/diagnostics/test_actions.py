"""Standardized actions at several sigmas, on world models whose actions are known."""

import math

import numpy as np
import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.diagnostics.actions import action_report, action_table
from polygrad_fast.sampling import TrajectoryBatch

S, A, H, N = 3, 2, 5, 3000


class KnownModel:
    """States are random; actions are mu(s) + sigma z with z as a function makes it from normals
    [B, H, A] and normalized states [B, H, S]."""

    longest_horizon = H

    def __init__(self, normalizer, z, end=H):
        self.normalizer, self.z, self.end = normalizer, z, end

    @torch.no_grad()
    def imagine(self, initial_observations, policy, generator=None, normalized=False, horizon=None):
        assert normalized and horizon is None
        batch = len(initial_observations)
        states = torch.randn(batch, H, S, generator=generator)
        states[:, 0] = initial_observations
        mean, std = policy(self.normalizer.unnormalize(states, "observations"))
        z = self.z(torch.randn(batch, H, A, generator=generator), states)
        actions = self.normalizer.normalize(mean + std * z, "actions")
        terminals = (torch.arange(H) >= self.end).float().expand(batch, H)
        return TrajectoryBatch(states, actions, torch.zeros(batch, H), terminals)


@pytest.fixture(scope="module")
def normalizer():
    return pg.Normalizer.from_moments(
        observations=(torch.arange(S).float(), torch.linspace(0.5, 2.0, S)),
        actions=(torch.tensor([0.2, -0.4]), torch.tensor([0.6, 1.3])),
    )


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return pg.GaussianPolicy(S, A, 16, init_std=0.6, min_std=0.2)


def found(normalizer, policy, z, sigma=0.3, seed=0, num=N, end=H):
    starts = torch.randn(num, S, generator=torch.Generator().manual_seed(9))
    starts = normalizer.unnormalize(starts, "observations")
    model = KnownModel(normalizer, z, end)
    return action_report(model, policy, normalizer, starts, sigma, seed, 700)


@pytest.mark.parametrize("sigma", [1.0, 0.3, 0.02])
def test_on_policy_actions_at_any_sigma(normalizer, policy, sigma):
    before = policy.std.clone()
    numbers = found(normalizer, policy, lambda normals, states: normals, sigma).summary()
    assert numbers["sigma"] == sigma and numbers["num"] == N * H * A
    assert numbers["std"] == pytest.approx(1.0, abs=0.02)
    assert numbers["mean"] == pytest.approx(0.0, abs=0.02)
    assert numbers["kurtosis"] == pytest.approx(3.0, abs=0.15)
    assert numbers["beyond_3"] == pytest.approx(0.0027, abs=0.001)
    assert numbers["ks_floor"] == pytest.approx(0.8687 / math.sqrt(N * H * A), rel=1e-3)
    assert numbers["ks"] < 2 * numbers["ks_floor"]
    assert abs(numbers["r2"]) < 0.01 and abs(numbers["autocorrelation"]) < 0.02
    assert torch.equal(policy.std, before)


def uniform(normals, states):
    return math.sqrt(3) * (2 * torch.special.ndtr(normals) - 1)


def of_the_state(normals, states):
    return math.sqrt(0.5) * (normals + states[..., :A])


@pytest.mark.parametrize(
    ("z", "wanted"),
    [
        (lambda n, s: 1.5 * n + 0.5, {"std": 1.5, "mean": 0.5, "kurtosis": 3.0}),
        (lambda n, s: 1.5 * n + 0.5, {"beyond_3": 0.0478 + 0.0098}),  # ndtr(-5/3), ndtr(-7/3)
        # of a uniform distribution; |F - ndtr| is largest at +-1.06
        (uniform, {"kurtosis": 1.8, "std": 1.0, "beyond_3": 0.0, "ks": 0.0570, "r2": 0.0}),
        (of_the_state, {"r2": 0.5, "std": 1.0, "kurtosis": 3.0, "autocorrelation": 0.0}),
        (lambda n, s: n[:, :1].expand_as(n), {"autocorrelation": 1.0, "std": 1.0}),
    ],
)
def test_known_distributions(normalizer, policy, z, wanted):
    numbers = found(normalizer, policy, z).summary()
    for name, value in wanted.items():
        tolerance = {"kurtosis": 0.15, "ks": 0.006, "beyond_3": 0.004}.get(name, 0.03)
        assert numbers[name] == pytest.approx(value, abs=tolerance), name


def test_values_are_those_of_the_numbers_and_seeds_give_them_again(normalizer, policy):
    first, again, other = (
        found(normalizer, policy, of_the_state, seed=seed, num=64) for seed in (0, 0, 1)
    )
    assert np.array_equal(first.values, again.values) and len(first.values) == 64 * H * A
    assert not np.array_equal(first.values, other.values)
    assert first.summary() == again.summary()
    assert first.mean == pytest.approx(first.values.mean())
    assert first.beyond_3 == (np.abs(first.values) > 3).mean()
    lines = action_table([first, other]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[1].split()[-1] == f"{first.statistics.autocorrelation:.4f}"


def test_what_follows_an_end_does_not_count(normalizer, policy):
    def late(normals, states):
        return torch.where(torch.arange(H)[:, None] > 2, 50.0, normals)

    ended = found(normalizer, policy, late, end=2)
    assert len(ended.values) == N * 3 * A and np.abs(ended.values).max() < 10
    assert ended.kurtosis == pytest.approx(3.0, abs=0.2)


def test_bad_arguments_are_refused(normalizer, policy):
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(pg.InputError, match="std must be a positive finite number"):
            found(normalizer, policy, uniform, sigma, num=8)
    with pytest.raises(pg.InputError, match=r"observations must be at least 4 .*, got 3"):
        found(normalizer, policy, uniform, num=3)


def test_action_updates_are_told_apart():
    """Of a denoiser that knows nothing: exact ones are on-policy, sampled without guidance not."""
    agent = pg.PolyGRAD("Pendulum-v1", preset="quick", device="cpu")
    starts = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    numbers = {}
    for update in ("exact", "none"):
        agent.world_model.use_action_update(update)
        assert agent.sampler.config.action_update == update
        numbers[update] = action_report(
            agent.world_model, agent.policy, agent.normalizer, starts, 0.3
        ).summary()
    assert numbers["exact"]["std"] == pytest.approx(1.0, abs=0.05)
    assert numbers["exact"]["ks"] < 3 * numbers["exact"]["ks_floor"]
    assert numbers["none"]["ks"] > 0.2
    with pytest.raises(pg.InputError, match="action_update must be"):
        agent.world_model.use_action_update("other")
