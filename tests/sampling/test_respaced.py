"""num_inference_steps: sampling in a subset of the steps of training."""

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import polygrad_fast as pg
from polygrad_fast.diffusion.ddpm import warn_of_amplified_errors

S, A, H, K, B = 3, 2, 4, 24, 5
ENGINES = ["reference", "torch"]
DENOISERS = {
    "mlp": lambda: pg.ResidualMLPDenoiser(S, A, H, 16, 2),
    "mlp_layer": lambda: pg.ResidualMLPDenoiser(
        S, A, H, 16, 2, step_conditioning="layer", num_train_timesteps=K
    ),
    "transformer": lambda: pg.TransformerDenoiser(S, A, H, 16, 2),
    "transformer_learned": lambda: pg.TransformerDenoiser(
        S, A, H, 16, 2, step_conditioning="learned", num_train_timesteps=K
    ),
}


def make_parts(kind="mlp"):
    torch.manual_seed(0)
    normalizer = pg.Normalizer(S, A)
    denoiser, policy = DENOISERS[kind](), pg.GaussianPolicy(S, A, 16)
    return SimpleNamespace(denoiser=denoiser, policy=policy, normalizer=normalizer)


def make_sampler(parts, schedule, config, engine):
    modules = parts.denoiser, parts.policy, schedule, parts.normalizer
    return pg.PolicyGuidedSampler(*modules, config, engine=engine)


def make_noise(num_steps):
    g = torch.Generator().manual_seed(0)
    shapes = (B, H, S + 2), (B, H, A)
    return pg.SampleNoise(
        *(torch.randn(shape, generator=g) for shape in shapes),
        *(torch.randn(num_steps, *shape, generator=g) for shape in shapes),
    )


class AtTimesteps(nn.Module):
    """A denoiser whose steps are numbered by their place among the kept ones."""

    observation_dim, action_dim, horizon = S, A, H

    def __init__(self, inner, timesteps):
        super().__init__()
        self.inner, self.timesteps = inner, torch.tensor(timesteps)

    def forward(self, trajectory, actions, timesteps):
        return self.inner(trajectory, actions, self.timesteps[timesteps])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize(
    "preset, num_steps, kept",
    [("official", 4, [0, 8, 15, 23]), ("paper", 5, [0, 6, 12, 17, 23]), ("official", 1, [23])],
)
def test_is_the_short_schedule_with_the_denoiser_asked_at_the_kept_steps(
    engine, kind, preset, num_steps, kept
):
    parts, build = make_parts(kind), getattr(pg.SamplerConfig, preset)
    schedule = pg.NoiseSchedule.cosine(K)
    alphabar = (1 - schedule.betas.double()).cumprod(0)[kept]
    betas = 1 - alphabar / torch.cat([torch.ones(1).double(), alphabar[:-1]])
    short = pg.NoiseSchedule.from_betas(betas).to(torch.float32)
    s0, noise = torch.randn(B, S), make_noise(num_steps)
    config = build(num_inference_steps=num_steps)
    got = make_sampler(parts, schedule, config, engine).sample(
        s0, 0.05, noise=noise, return_chain=True
    )
    renamed = SimpleNamespace(**vars(parts) | {"denoiser": AtTimesteps(parts.denoiser, kept)})
    wanted = make_sampler(renamed, short, build(), "reference").sample(
        s0, 0.05, noise=noise, return_chain=True
    )
    assert len(got.chain_actions) == num_steps
    torch.testing.assert_close(
        got.chain_trajectories, wanted.chain_trajectories, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(got.chain_actions, wanted.chain_actions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_steps_are_the_schedule_itself(engine):
    parts, noise, s0 = make_parts(), make_noise(K), torch.randn(B, S)
    batches = [
        make_sampler(
            parts,
            pg.NoiseSchedule.cosine(K),
            pg.SamplerConfig.official(num_inference_steps=n),
            engine,
        ).sample(s0, noise=noise)
        for n in (None, K)
    ]
    assert torch.equal(batches[0].observations, batches[1].observations)
    assert torch.equal(batches[0].actions, batches[1].actions)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_steps_than_the_schedule_has(engine):
    config = pg.SamplerConfig.official(num_inference_steps=K + 1)
    match = f"num_inference_steps must be from 1 to num_train_timesteps {K}, got {K + 1}"
    with pytest.raises(pg.InputError, match=match):
        make_sampler(make_parts(), pg.NoiseSchedule.cosine(K), config, engine)
    with pytest.raises(pg.InputError, match="num_inference_steps must be at least 1, got 0"):
        pg.SamplerConfig.official(num_inference_steps=0)


@pytest.mark.parametrize("duplicate", [copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_asks_the_denoiser_at_the_same_steps(duplicate):
    config = pg.SamplerConfig.official(num_inference_steps=5)
    sampler = make_sampler(make_parts(), pg.NoiseSchedule.cosine(K), config, "torch")
    twin, s0, noise = duplicate(sampler), torch.randn(B, S), make_noise(5)
    assert twin.components.schedule.timesteps == (0, 6, 12, 17, 23)
    assert torch.equal(
        twin.sample(s0, noise=noise).actions, sampler.sample(s0, noise=noise).actions
    )


def test_the_warning_of_amplified_errors_is_that_of_the_steps_taken():
    schedule = pg.NoiseSchedule.cosine(K)
    gentle = pg.NoiseSchedule.from_betas(torch.full((8,), 0.3))
    with pytest.warns(UserWarning, match="error by 32 in one"):
        warn_of_amplified_errors(schedule, pg.SamplerConfig.paper())
    gain = schedule.respaced(3).epsilon_error_gain.max().item()
    assert gain > 100
    with pytest.warns(UserWarning, match=f"error by {gain:.0f} in one"):
        warn_of_amplified_errors(schedule, pg.SamplerConfig.paper(num_inference_steps=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_amplified_errors(gentle, pg.SamplerConfig.paper())


class Gaussian(nn.Module):
    """E[x0 | x_k] where every entry of x0 is N(0.5, 0.3^2)."""

    observation_dim, action_dim, horizon = S, A, H
    mean, variance = 0.5, 0.09

    def __init__(self, schedule):
        super().__init__()
        self.alphas_cumprod = schedule.alphas_cumprod

    def forward(self, trajectory, actions, timesteps):
        a = self.alphas_cumprod[timesteps].view(-1, 1, 1)
        precision = a * self.variance + 1 - a
        return (a.sqrt() * self.variance * trajectory + (1 - a) * self.mean) / precision


@pytest.mark.parametrize("num_steps", [2, 8, 64])
def test_what_few_steps_lose_of_the_noise_of_linear_dynamics(num_steps):
    """Mean and spread of sampled rewards are those of the linear recursion, computed in float64.

    The posterior's variance is that for a known x0, so that even all steps lose some of the true
    spread, and two of them most of it.
    """
    schedule = pg.NoiseSchedule.cosine(64)
    a = torch.cos((torch.arange(64).double() + 1) / 64 * math.pi / 2) ** 2
    a[-1] = 1e-3 * a[-2]  # beta is at most 0.999
    kept = torch.linspace(0, 63, num_steps).round().long()
    mean, variance, v0 = torch.zeros(()).double(), torch.ones(()).double(), Gaussian.variance
    for k in reversed(range(num_steps)):
        now, previous = a[kept[k]], a[kept[k - 1]] if k else torch.ones(()).double()
        gain = now.sqrt() * v0 / (now * v0 + 1 - now)  # x0_hat = gain x + offset
        offset = (1 - now) * Gaussian.mean / (now * v0 + 1 - now)
        from_x0 = (1 - now / previous) * previous.sqrt() / (1 - now)
        from_x = (1 - previous) * (now / previous).sqrt() / (1 - now)
        mean = from_x0 * (gain * mean + offset) + from_x * mean
        noise = (1 - now / previous) * (1 - previous) / (1 - now)
        variance = (from_x0 * gain + from_x) ** 2 * variance + noise
    parts = make_parts()
    parts.denoiser = Gaussian(schedule)
    config = pg.SamplerConfig.official(clip_state_change=None, num_inference_steps=num_steps)
    n = 20_000
    rewards = make_sampler(parts, schedule, config, "torch").sample(
        torch.zeros(n, S), generator=torch.Generator().manual_seed(0), normalized=True
    ).rewards  # fmt: skip
    count = rewards.numel()
    assert abs(rewards.mean() - mean) < 4 * (variance / count).sqrt()
    assert abs(rewards.var() / variance - 1) < 4 * math.sqrt(2 / count)
    assert abs(mean - Gaussian.mean) < 1e-6 + 0.02 * v0**0.5
    share = (variance / v0).sqrt()
    low, high = {2: (0.0, 0.35), 8: (0.6, 0.95), 64: (0.9, 1.0)}[num_steps]
    assert low < share < high, share
