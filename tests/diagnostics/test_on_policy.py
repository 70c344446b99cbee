"""Statistics of standardized actions against data whose answers are known."""

import math
from types import SimpleNamespace

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.diagnostics.on_policy import kolmogorov_smirnov, on_policy_statistics

S, A, H, B = 3, 2, 6, 4000


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.arange(S).float(), torch.linspace(0.5, 2.0, S)),
        actions=(torch.tensor([0.2, -0.4]), torch.tensor([0.6, 1.3])),
    )
    policy = pg.GaussianPolicy(S, A, 16, init_std=0.6)
    observations = torch.randn(B, H, S)
    noise = torch.randn(B, H, A)
    return SimpleNamespace(
        normalizer=normalizer, policy=policy, observations=observations, noise=noise
    )


def measure(setting, z, terminals=None, observations=None):
    """Statistics of actions mu + sigma z."""
    observations = setting.observations if observations is None else observations
    with torch.no_grad():
        mean, std = setting.policy(setting.normalizer.unnormalize(observations, "observations"))
    actions = setting.normalizer.normalize(mean + std * z, "actions")
    terminals = torch.zeros(z.shape[:2]) if terminals is None else terminals
    return on_policy_statistics(
        setting.policy, setting.normalizer, observations, actions, terminals
    )


def test_on_policy_actions(setting):
    found = measure(setting, setting.noise)
    assert abs(found.r2) < 0.005
    assert found.std == pytest.approx(1.0, abs=0.01)
    assert found.ks_floor == pytest.approx(0.8687 / math.sqrt(B * H * A), rel=1e-3)
    assert found.ks < 2 * found.ks_floor
    assert abs(found.autocorrelation) < 0.02


def test_r2_is_the_share_that_the_state_explains(setting):
    for share in (0.05, 0.46):
        direction = torch.tensor([[0.6, 0.0], [0.8, 1.0], [0.0, 0.0]])
        z = math.sqrt(share) * setting.observations @ direction
        found = measure(setting, z + math.sqrt(1 - share) * setting.noise)
        assert found.r2 == pytest.approx(share, abs=0.02)
        assert found.std == pytest.approx(1.0, abs=0.02)
        assert found.ks < 2.5 * found.ks_floor  # the distribution as a whole is as it should be


def test_a_small_batch_without_effect_has_little_r2(setting):
    """As many features as a fifth of the actions: least squares alone would give -0.25."""
    values = [
        measure(
            setting,
            setting.noise[first : first + 24],
            observations=setting.observations[first : first + 24],
        ).r2
        for first in range(0, 2400, 24)
    ]
    assert -0.08 < sum(values) / len(values) <= 0.0


def test_the_policys_own_features_count(setting):
    """What is linear in the last hidden layer, but not in the state."""
    with torch.no_grad():
        raw = setting.normalizer.unnormalize(setting.observations, "observations")
        hidden = setting.policy.network[:-1](raw)
    shape = hidden @ torch.randn(16, A, generator=torch.Generator().manual_seed(1))
    shape = (shape - shape.mean((0, 1))) / shape.std((0, 1))
    z = math.sqrt(0.5) * (shape + setting.noise)
    assert measure(setting, z).r2 == pytest.approx(0.5, abs=0.02)


def test_autocorrelation_of_a_known_process(setting):
    z = [setting.noise[:, 0]]
    for t in range(1, H):
        z.append(0.6 * z[-1] + 0.8 * setting.noise[:, t])
    found = measure(setting, torch.stack(z, dim=1))
    assert found.autocorrelation == pytest.approx(0.6, abs=0.02)


def test_what_follows_a_terminal_step_does_not_count(setting):
    terminals = torch.zeros(B, H)
    terminals[::2, 2:] = 1.0
    junk = setting.noise.clone()
    junk[::2, 3:] = 50.0
    assert measure(setting, junk, terminals) == measure(setting, setting.noise, terminals)
    junk[::2, 2] = 50.0  # the terminal step's own action is one
    assert measure(setting, junk, terminals).std > 5


def test_kolmogorov_smirnov_against_known_distances():
    assert kolmogorov_smirnov(torch.zeros(100)) == pytest.approx(0.5)
    n = 10_000
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    assert kolmogorov_smirnov(quantiles) == pytest.approx(0.5 / n, rel=1e-3)
    shifted = torch.special.ndtr(torch.tensor(0.25)) * 2 - 1  # largest halfway between the means
    assert kolmogorov_smirnov(quantiles + 0.5) == pytest.approx(shifted.item(), abs=2e-4)
    g = torch.Generator().manual_seed(0)
    draws = [kolmogorov_smirnov(torch.randn(500, generator=g)) for _ in range(200)]
    assert sum(draws) / 200 == pytest.approx(0.8687 / math.sqrt(500), rel=0.06)
