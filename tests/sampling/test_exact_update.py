"""action_update="exact": actions are the policy's at the states that are returned, and what the
iteration of states and actions converges to."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import polygrad_fast as pg
from polygrad_fast.denoisers.shown_range import ShownRange

S, A, H, K = 3, 2, 4, 12
ENGINES = ["reference", "torch"]


class StateDependentPolicy(nn.Module):
    """Raw observations -> mean and std, both functions of the state."""

    observation_dim, action_dim = S, A

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(S, 2 * A)

    def forward(self, observations):
        mean, log_std = self.linear(observations).chunk(2, dim=-1)
        return mean, torch.exp(0.3 * log_std.tanh()) * 0.2


def make_normalizer():
    return pg.Normalizer.from_moments(
        observations=(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 2.0, 1.5])),
        actions=(torch.tensor([0.2, -0.4]), torch.tensor([0.6, 1.3])),
    )


def make_sampler(engine="reference", policy=None, std=0.3, seed=0, **options):
    torch.manual_seed(seed)
    own = pg.GaussianPolicy(S, A, 16, init_std=std, min_std=0.5 * std)
    denoiser = pg.ResidualMLPDenoiser(S, A, H, hidden_dim=16, num_layers=2)
    return pg.PolicyGuidedSampler(
        denoiser,
        policy if policy is not None else own,
        pg.NoiseSchedule.cosine(K),
        make_normalizer(),
        pg.SamplerConfig.official(action_update="exact", **options),
        engine=engine,
        action_bounds=(torch.tensor([-0.5, -0.1]), torch.tensor([0.4, 0.8])),
    )


def make_noise(batch, num_steps=K, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, H, S + 2), (batch, H, A)
    return pg.SampleNoise(
        *(torch.randn(shape, generator=g) for shape in shapes),
        *(torch.randn(num_steps, *shape, generator=g) for shape in shapes),
    )


@torch.no_grad()
def standardized(batch, policy):
    """z = (a - mean) / std at the raw observations returned."""
    mean, std = policy(batch.observations)
    return (batch.actions - mean) / std


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variance_type", ["posterior", "beta"])
@pytest.mark.parametrize("policy_input", ["denoised", "posterior_mean", "noisy"])
@pytest.mark.parametrize("policy", [None, StateDependentPolicy()])
def test_standardized_actions_are_xi(engine, variance_type, policy_input, policy):
    sampler = make_sampler(engine, policy, variance_type=variance_type, policy_input=policy_input)
    s0, noise = 3 * torch.randn(7, S), make_noise(7)
    z = standardized(sampler.sample(s0, noise=noise), sampler.components.policy)
    torch.testing.assert_close(z, noise.initial_actions, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("std", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("num_inference_steps", [None, 3])
def test_actions_are_on_policy(engine, std, num_inference_steps):
    """By the statistics of z = (a - mean) / std: distribution, R2 on the state, dependence on the
    z before."""
    sampler = make_sampler(engine, std=std, num_inference_steps=num_inference_steps)
    n = 4000
    s0 = 3 * torch.randn(n, S, generator=torch.Generator().manual_seed(1))
    batch = sampler.sample(s0, generator=torch.Generator().manual_seed(2))
    z = standardized(batch, sampler.components.policy).double()
    x = z.flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    ks = torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())
    assert ks < 1.95 / math.sqrt(len(x))  # 0.1 % level
    states = torch.cat([torch.ones(n, H, 1), batch.observations], dim=-1).double().flatten(0, 1)
    explained = states @ torch.linalg.lstsq(states, z.flatten(0, 1)).solution
    r2 = explained.var(0) / z.flatten(0, 1).var(0)
    assert (r2 < 4 * S / (n * H)).all()
    after, before = z[:, 1:].flatten(), z[:, :-1].flatten()
    assert (after * before).mean().abs() < 4 / math.sqrt(len(after))


@pytest.mark.parametrize("engine", ENGINES)
def test_options_that_play_no_part(engine):
    s0, noise = torch.randn(5, S), make_noise(5)
    wanted = make_sampler(engine).sample(s0, noise=noise)
    for options in (
        {"clip_std": 0.1},
        {"clip_std": None},
        {"clip_order": "after"},
        {"clip_final_actions": False},
        {"max_guidance": 0.1},
    ):
        got = make_sampler(engine, **options).sample(s0, noise=noise)
        assert torch.equal(got.actions, wanted.actions), options
    for scale in (0.0, 100.0, torch.tensor(3.0)):
        got = make_sampler(engine).sample(s0, scale, noise=noise)
        assert torch.equal(got.actions, wanted.actions), scale
    other = replace(noise, actions=noise.actions + 1.0)
    assert torch.equal(make_sampler(engine).sample(s0, noise=other).actions, wanted.actions)


def test_state_updates_are_refused():
    with pytest.raises(pg.InputError, match="action_update must be 'score' .* got 'exact'"):
        make_sampler(update_states=True)


class Recorder(nn.Module):
    """Keeps what a denoiser is shown and what it answers."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, []
        self.observation_dim, self.action_dim, self.horizon = S, A, H

    def forward(self, trajectory, actions, timesteps):
        prediction = self.inner(trajectory, actions, timesteps)
        self.calls.append((trajectory.clone(), actions.clone(), timesteps[0].item(), prediction))
        return prediction


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("denoiser_actions", ["raw", "clipped"])
@torch.no_grad()
def test_the_denoiser_sees_the_policys_actions_at_its_last_estimate(engine, denoiser_actions):
    options = dict(denoiser_actions=denoiser_actions, scale_actions=False)
    plain = make_sampler(engine, num_inference_steps=4, **options)
    c, recorder = plain.components, Recorder(plain.components.denoiser)
    sampler = pg.PolicyGuidedSampler(
        recorder,
        c.policy,
        pg.NoiseSchedule.cosine(K),
        c.normalizer,
        plain.config,
        engine=engine,
        action_bounds=c.action_bounds,
    )
    recorder.calls.clear()
    s0, noise, n = torch.randn(5, S), make_noise(5, 4), c.normalizer
    batch = sampler.sample(s0, noise=noise, return_chain=True)
    low, high = c.action_bounds

    def seen(raw):
        clipped = raw.clamp(low, high) if denoiser_actions == "clipped" else raw
        return n.normalize(clipped, "actions")

    def on_policy(states):
        mean, std = c.policy(n.unnormalize(states, "observations"))
        return mean + std * noise.initial_actions

    assert [call[2] for call in recorder.calls] == [11, 7, 4, 0]
    wanted = seen(n.unnormalize(noise.initial_actions, "actions"))
    outside = 0.0
    for step, (_, actions, _, prediction) in enumerate(recorder.calls):
        torch.testing.assert_close(actions, wanted, rtol=1e-4, atol=1e-4)
        states = prediction[..., :S].clone()
        states[:, 0] = n.normalize(s0, "observations")
        raw = on_policy(states)
        outside += ((raw < low) | (raw > high)).float().mean() / 4
        if step < 3:
            kept = n.unnormalize(batch.chain_actions[step], "actions")
            torch.testing.assert_close(kept, raw, rtol=1e-4, atol=1e-4)
        wanted = seen(raw)
    assert outside > 0.2, "the bounds must bind"
    last = batch.chain_trajectories[-1][..., :S]
    torch.testing.assert_close(batch.actions, on_policy(last), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("return_chain", [False, 1, 3, True])
@pytest.mark.parametrize("policy", [None, StateDependentPolicy()])
@torch.no_grad()
def test_mean_change(engine, return_chain, policy):
    sampler = make_sampler(engine, policy)
    s0, noise = torch.randn(5, S), make_noise(5)
    batch = sampler.sample(s0, noise=noise, return_chain=return_chain)
    whole = sampler.sample(s0, noise=noise, return_chain=True)
    c, xi = sampler.components, noise.initial_actions
    _, std = c.policy(batch.observations)
    before, after = c.normalizer.unnormalize(whole.chain_actions[-2:], "actions")
    wanted = ((after - before) / std).square().mean().sqrt()
    torch.testing.assert_close(batch.mean_change, wanted)
    if policy is None:  # of the mean alone: std xi is the same in both
        means = after - std * xi, before - std * xi
        moved = ((means[0] - means[1]) / std).square().mean().sqrt()
        torch.testing.assert_close(batch.mean_change, moved)
    kept = K if return_chain is True else int(return_chain)
    if kept:
        assert torch.equal(batch.chain_actions, whole.chain_actions[-kept:])
        assert torch.equal(batch.chain_trajectories, whole.chain_trajectories[-kept:])
    else:
        assert batch.chain_actions is None and batch.chain_trajectories is None


def test_other_updates_have_no_mean_change():
    for options in ({"action_update": "score"}, {"num_inference_steps": 1}):
        base = make_sampler()
        config = replace(base.config, **options)
        c = base.components
        parts = c.denoiser, c.policy, pg.NoiseSchedule.cosine(K), c.normalizer, config
        assert pg.PolicyGuidedSampler(*parts).sample(torch.randn(2, S)).mean_change is None


class LinearWorld(nn.Module):
    """The exact posterior mean of s_{t+1} = s_t + 0.3 u_t (raw), which does not depend on x.

    reward 0, flag 0; the normalizer's moments of observations are 0 and 1.
    """

    def __init__(self, dim, horizon, normalizer):
        super().__init__()
        self.observation_dim = self.action_dim = dim
        self.horizon, self.normalizer = horizon, normalizer

    def forward(self, trajectory, actions, timesteps):
        dim = self.observation_dim
        moves = 0.3 * self.normalizer.unnormalize(actions, "actions")
        states = trajectory[:, :1, :dim] + moves.cumsum(1) - moves
        return torch.cat([states, torch.zeros_like(trajectory[..., -2:])], dim=-1)


class LinearPolicy(nn.Module):
    def __init__(self, gain, std):
        super().__init__()
        self.gain, self.std = gain, std

    def forward(self, observations):
        mean = self.gain * observations.flip(-1)
        return mean, torch.full_like(mean, self.std)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_steps", [2, 4, 6, 7, 16])
def test_linear_world_reaches_the_closed_loop(engine, num_steps):
    """Each step of the iteration makes one more state exact, so that a horizon of 6 is the closed
    loop s <- s + 0.3 (W s + std xi) after 6 steps, and has settled after 7; before, the diagnosis
    says that it has not."""
    dim, horizon, gain, std = 2, 6, 1.3, 0.4
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.zeros(dim), torch.ones(dim) - 1e-6),
        actions=(torch.tensor([0.3, -0.1]), torch.tensor([0.7, 1.4])),
    )
    config = pg.SamplerConfig.official(
        action_update="exact",
        scale_actions=False,
        clip_state_change=None,
        num_inference_steps=num_steps,
    )
    sampler = pg.PolicyGuidedSampler(
        LinearWorld(dim, horizon, normalizer),
        LinearPolicy(gain, std),
        pg.NoiseSchedule.cosine(16),
        normalizer,
        config,
        engine=engine,
    )
    g = torch.Generator().manual_seed(0)
    shapes = (50, horizon, dim + 2), (50, horizon, dim)
    noise = pg.SampleNoise(
        *(torch.randn(shape, generator=g) for shape in shapes),
        *(torch.randn(num_steps, *shape, generator=g) for shape in shapes),
    )
    s = s0 = torch.randn(50, dim, generator=g)
    batch = sampler.sample(s0, noise=noise)
    states, actions = [], []
    for t in range(horizon):
        states.append(s)
        actions.append(gain * s.flip(-1) + std * noise.initial_actions[:, t])
        s = s + 0.3 * actions[-1]
    states, actions = torch.stack(states, 1), torch.stack(actions, 1)
    exact = min(horizon, num_steps)
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.observations[:, :exact], states[:, :exact], **close)
    torch.testing.assert_close(batch.actions[:, :exact], actions[:, :exact], **close)
    if num_steps < horizon:
        assert (batch.observations - states)[:, exact:].abs().amax((0, 2)).min() > 0.01
    assert (batch.mean_change < 1e-4) == (num_steps > horizon)
    z = (batch.actions - gain * batch.observations.flip(-1)) / std
    torch.testing.assert_close(z, noise.initial_actions, **close)


class NoisyLinearStep(nn.Module):
    """o' = o + 0.3 u + noise of 0.2 and 0.5, reward 0 + noise of 0.1, never terminal."""

    process_noise = True

    def __init__(self, dim):
        super().__init__()
        self.difference_scale = nn.Parameter(torch.ones(dim))
        self.residual_scale = torch.tensor([0.2, 0.5, 0.1])
        self.range = ShownRange(dim)

    def forward(self, observations, actions):
        never = torch.full_like(observations[..., 0], -1e4)
        return 0.3 * actions, torch.zeros_like(never), never


@pytest.mark.parametrize("num_steps", [6, 16])
def test_few_steps_imagine_the_whole_chance_of_a_linear_gaussian_system(num_steps):
    """The closed loop o' = A o + 0.3 std xi + w has a known mean and covariance at every step:
    settled samples have them, with one step more than the horizon as with sixteen."""
    dim, horizon, gain, std, batch = 2, 5, 0.8, 0.4, 40_000
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.zeros(dim), torch.ones(dim) - 1e-6),
        actions=(torch.zeros(dim), torch.ones(dim) - 1e-6),
    )
    denoiser = pg.RolloutDenoiser(dim, dim, horizon, process_noise=True)
    denoiser.step = NoisyLinearStep(dim)
    config = pg.SamplerConfig.official(
        action_update="exact",
        scale_actions=False,
        clip_state_change=None,
        num_inference_steps=num_steps,
    )
    sampler = pg.PolicyGuidedSampler(
        denoiser, LinearPolicy(gain, std), pg.NoiseSchedule.cosine(16), normalizer, config
    )
    s0 = torch.tensor([1.0, -0.5])
    batch = sampler.sample(s0.expand(batch, -1), generator=torch.Generator().manual_seed(0))
    step = torch.eye(2).double() + 0.3 * gain * torch.eye(2).double().flip(-1)
    noise = torch.diag(torch.tensor([0.2, 0.5]).double().square() + (0.3 * std) ** 2)
    mean, covariance = s0.double(), torch.zeros(2, 2).double()
    for t in range(horizon):
        seen = batch.observations[:, t].double()
        torch.testing.assert_close(seen.mean(0), mean, rtol=0, atol=0.02)
        torch.testing.assert_close(seen.T.cov(), covariance, rtol=0.05, atol=0.01)
        mean, covariance = step @ mean, step @ covariance @ step.T + noise
    assert covariance.diagonal().sqrt().min() > 0.5
    assert (batch.rewards.std(0) - 0.1).abs().max() < 0.003
    neighbours = torch.corrcoef(batch.rewards.T)
    assert (neighbours - torch.eye(horizon)).abs().max() < 0.02
