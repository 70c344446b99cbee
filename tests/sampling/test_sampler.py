import copy
import itertools
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import polygrad_fast as pg
from cases import ACTION_UPDATES, sampler_configs
from polygrad_fast.reference.guided_step import guided_step
from polygrad_fast.sampling import linear

S, A, H, K, B = 3, 2, 4, 6, 5
D = S + 2


def make_normalizer() -> pg.Normalizer:
    return pg.Normalizer.from_moments(
        observations=(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 2.0, 1.5])),
        actions=(torch.tensor([0.2, -0.4]), torch.tensor([0.6, 1.3])),
        rewards=(1.0, 3.0),
        terminals=(0.1, 0.3),
    )


def make_parts(seed: int = 0, num_steps: int = K) -> dict:
    """Random networks whose policy has different means at different states."""
    torch.manual_seed(seed)
    policy = pg.GaussianPolicy(S, A, 16, init_std=0.5)
    nn.init.normal_(policy.log_std, mean=-1.0, std=0.5)
    return {
        "denoiser": pg.ResidualMLPDenoiser(S, A, H, hidden_dim=16, num_layers=2),
        "policy": policy,
        "schedule": pg.NoiseSchedule.cosine(num_steps),
        "normalizer": make_normalizer(),
    }


def make_sampler(config=None, seed=0, num_steps=K, **overrides) -> pg.PolicyGuidedSampler:
    return pg.PolicyGuidedSampler(
        **({"engine": "reference"} | make_parts(seed, num_steps) | {"config": config} | overrides)
    )


def make_noise(seed: int = 0, num_steps: int = K, batch: int = B) -> pg.SampleNoise:
    g = torch.Generator().manual_seed(seed)
    return pg.SampleNoise(
        torch.randn(batch, H, D, generator=g),
        torch.randn(batch, H, A, generator=g),
        torch.randn(num_steps, batch, H, D, generator=g),
        torch.randn(num_steps, batch, H, A, generator=g),
    )


def make_observations(seed: int = 0, batch: int = B) -> torch.Tensor:
    return 3 * torch.randn(batch, S, generator=torch.Generator().manual_seed(seed))


def assert_same(a: pg.TrajectoryBatch, b: pg.TrajectoryBatch) -> None:
    for name in ("observations", "actions", "rewards", "terminals"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def differs(a: pg.TrajectoryBatch, b: pg.TrajectoryBatch) -> bool:
    return not torch.allclose(a.observations, b.observations, atol=1e-3)


class SpyDenoiser(nn.Module):
    """Records what it is shown."""

    def __init__(self, denoiser):
        super().__init__()
        self.inner, self.horizon = denoiser, denoiser.horizon
        self.observation_dim, self.action_dim = denoiser.observation_dim, denoiser.action_dim
        self.calls = []

    def forward(self, trajectory, actions, timesteps):
        prediction = self.inner(trajectory, actions, timesteps)
        call = (trajectory, actions, timesteps, prediction)
        self.calls.append(tuple(tensor.clone() for tensor in call))
        return prediction


class SpyPolicy(nn.Module):
    """Records the raw observations it reads."""

    def __init__(self, policy):
        super().__init__()
        self.inner, self.observation_dim, self.action_dim = policy, S, A
        self.seen = []

    def forward(self, observations):
        self.seen.append(observations.detach().clone())
        return self.inner(observations)


def chen_betas(num_steps: int) -> list[float]:
    """Chen 2023, Algorithm 1, tau = 1."""
    gamma = [math.cos(i / num_steps * math.pi / 2) ** 2 for i in range(num_steps + 1)]
    return [min(1 - b / a, 0.999) for a, b in itertools.pairwise(gamma)]


def naive_algorithm_2(parts, s0, delta, noise, num_steps):
    """Run Algorithm 2 with equations 1 and 11 in float64, straight from the paper."""
    denoiser, policy = (copy.deepcopy(parts[n]).double() for n in ("denoiser", "policy"))
    moments = {n: b.double() for n, b in parts["normalizer"].named_buffers()}
    mean_s, scale_s = moments["observations_mean"], moments["observations_scale"]
    mean_a, scale_a = moments["actions_mean"], moments["actions_scale"]
    x, u = noise.initial_trajectories.double(), noise.initial_actions.double()
    betas, xs, us = chen_betas(num_steps), [], []
    for i in range(num_steps, 0, -1):
        beta, alphabar = betas[i - 1], math.prod(1 - b for b in betas[:i])
        x = torch.cat([torch.cat([s0[:, None], x[:, :1, S:]], -1), x[:, 1:]], 1)
        eps = denoiser(x, u, torch.full((len(x),), i - 1))
        if i > 1:
            x0 = (x - math.sqrt(1 - alphabar) * eps) / math.sqrt(alphabar)
            states = torch.cat([s0[:, None], x0[:, 1:, :S]], 1)
            mu, sigma = policy(states * scale_s + mean_s)
            raw = u * scale_a + mean_a
            raw = raw + delta * (mu - raw) / sigma**2
            raw = torch.maximum(torch.minimum(raw, mu + 3 * sigma), mu - 3 * sigma)
            z = noise.actions[num_steps - i].double()
            u = (raw - mean_a) / scale_a + math.sqrt(beta) * z
        z = noise.trajectories[num_steps - i].double()
        x = (x - beta / math.sqrt(1 - alphabar) * eps) / math.sqrt(1 - beta)
        x = x + math.sqrt(beta) * z
        x[:, 0, :S] = s0
        xs.append(x)
        us.append(u)
    return torch.stack(xs), torch.stack(us)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 12])
@pytest.mark.parametrize("delta", [0.005, 0.05])
def test_paper_preset_is_algorithm_2(num_steps, delta):
    parts, noise = make_parts(num_steps=num_steps), make_noise(3, num_steps)
    s0 = make_observations()
    sampler = pg.PolicyGuidedSampler(**parts, config=pg.SamplerConfig.paper(), engine="reference")
    batch = sampler.sample(s0, delta, noise=noise, normalized=True, return_chain=True)
    with torch.no_grad():
        xs, us = naive_algorithm_2(parts, s0.double(), delta, noise, num_steps)
    for k in range(num_steps):
        for got, wanted in ((batch.chain_trajectories, xs), (batch.chain_actions, us)):
            error = (got[k].double() - wanted[k]).abs().max()
            assert error < 2e-5 * wanted[k].abs().max().clamp(min=1), k
    before_last = batch.chain_actions[-2] if num_steps > 1 else noise.initial_actions
    assert torch.equal(batch.chain_actions[-1], before_last)


def naive_step(case, config, k, prediction, x, u, s0, delta, z_x, z_u):
    """One step in float64, from the documentation of SamplerConfig; `case` holds the parts."""
    betas = case.schedule.betas
    num_steps = config.num_inference_steps or K
    kept = [round(j * (K - 1) / max(1, num_steps - 1)) for j in range(num_steps)]
    if num_steps == 1:
        kept = [K - 1]
    alphabar = (1 - betas[: kept[k] + 1]).prod()
    previous = (1 - betas[: kept[k - 1] + 1]).prod() if k > 0 else torch.ones(())
    beta = 1 - alphabar / previous
    variance = beta if config.variance_type == "beta" else beta * (1 - previous) / (1 - alphabar)
    noise_std = max(variance, 1e-20) ** 0.5
    n = case.normalizer

    def distribution(states):
        return torch.distributions.Normal(*case.policy(n.unnormalize(states, "observations")))

    x0 = prediction
    if config.prediction_type == "epsilon":
        x0 = (x - (1 - alphabar).sqrt() * prediction) / alphabar.sqrt()
    x0 = x0.clone()
    x0[:, 0, :S] = s0

    def posterior(x0):
        first = previous.sqrt() * beta / (1 - alphabar)
        return first * x0 + (1 - beta).sqrt() * (1 - previous) / (1 - alphabar) * x

    mean = posterior(x0)
    limit = config.clip_state_change
    if limit is not None and k < config.clip_state_change_steps:
        mean = torch.minimum(torch.maximum(mean, x - limit), x + limit)
    states = {"denoised": x0, "posterior_mean": mean, "noisy": x}[config.policy_input][..., :S]
    pi = distribution(states)

    def clip(a):
        if config.clip_std is None:
            return a
        low, high = (pi.mean + sign * config.clip_std * pi.stddev for sign in (-1, 1))
        return torch.minimum(torch.maximum(a, low), high)

    raw = n.unnormalize(u, "actions")
    if config.action_update == "exact":
        pass  # below: the last step's actions are those of the final states
    elif k == 0:
        u = n.normalize(clip(raw), "actions") if config.clip_final_actions else u
    elif config.action_update == "sample":
        u = n.normalize(pi.mean + pi.stddev * z_u, "actions")
    elif config.action_update == "score":
        raw = clip(raw) if config.clip_order == "before" else raw
        share = delta / pi.variance
        if config.max_guidance is not None:
            share = share.clamp(max=config.max_guidance)
        raw = raw + share * (pi.mean - raw)
        raw = clip(raw) if config.clip_order == "after" else raw
        if config.update_states:
            s = states.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                distribution(s).log_prob(raw.detach()).sum().backward()
            x0[..., :S] = states + delta * s.grad
            x0[:, 0, :S] = s0
            mean = posterior(x0)
        u = n.normalize(raw, "actions") + noise_std * z_u
    if k > 0 or config.variance_type == "beta":
        mean = mean + noise_std * z_x
    mean[:, 0, :S] = s0
    if config.action_update == "exact":
        pi = distribution(mean[..., :S] if k == 0 else states)
        u = n.normalize(pi.mean + pi.stddev * z_u, "actions")
    return mean, u


@dataclass
class Float64Case:
    """The parts of a sampler in float64, and one random state of its loop."""

    seed: int

    def __post_init__(self):
        parts = make_parts(self.seed % 5)
        betas = parts["schedule"].betas.double()
        self.schedule = pg.NoiseSchedule.from_betas(betas)
        self.policy = parts["policy"].double().requires_grad_(False)
        self.normalizer = parts["normalizer"].double()
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.prediction, self.x, self.z_x = draw(3, B, H, D)
        self.u, self.z_u = draw(2, B, H, A) * 2
        self.s0 = draw(B, S)
        self.x[:, 0, :S] = self.s0

    def run(self, config, k, delta, step=guided_step):
        x, u, prediction = self.x.clone(), self.u.clone(), self.prediction.clone()
        schedule = self.schedule.respaced(config.num_inference_steps)
        arguments = (self.s0, k, self.policy, self.normalizer, schedule, config, delta)
        z_u = self.z_u if k or config.action_update == "exact" else None
        with torch.no_grad():
            result = step(prediction, x, u, *arguments, self.z_x, z_u)
        assert torch.equal(x, self.x) and torch.equal(u, self.u), "the inputs must stay as they are"
        assert torch.equal(prediction, self.prediction)
        return result


@settings(max_examples=150, deadline=None)
@given(
    config=sampler_configs((None, 1, 2, K - 1, K)),
    k=st.integers(0, K - 1),
    delta=st.sampled_from([0.0, 2.0**-8, 0.25]),
    seed=st.integers(0, 2**31),
)
def test_one_step_of_every_option_matches_a_naive_float64_step(config, k, delta, seed):
    case, k = Float64Case(seed), k % (config.num_inference_steps or K)
    x, u = case.run(config, k, delta)
    with torch.no_grad():
        arguments = (case.prediction, case.x, case.u, case.s0, delta, case.z_x, case.z_u)
        wanted_x, wanted_u = naive_step(case, config, k, *arguments)
    torch.testing.assert_close(x, wanted_x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(u, wanted_u, rtol=1e-10, atol=1e-10)
    assert torch.equal(x[:, 0, :S], case.s0)


@pytest.mark.parametrize("k", [1, K - 1])
def test_state_update_is_the_finite_difference_of_log_pi(k):
    case, delta, h = Float64Case(7), 0.2, 1e-5
    config = pg.SamplerConfig.official(update_states=True, clip_state_change=None, clip_std=None)
    moved, u = case.run(config, k, delta)
    still, _ = case.run(replace(config, update_states=False), k, delta)
    noise_std = (0.5 * case.schedule.posterior_log_variance_clipped[k]).exp()
    actions = case.normalizer.unnormalize(u - noise_std * case.z_u, "actions")

    def log_pi(states):
        mean, std = case.policy(case.normalizer.unnormalize(states, "observations"))
        return torch.distributions.Normal(mean, std).log_prob(actions).sum((1, 2))

    states = case.prediction[..., :S].clone()
    states[:, 0] = case.s0
    gradient = torch.zeros_like(states)
    for t, s in itertools.product(range(1, H), range(S)):
        step = torch.zeros_like(states)
        step[:, t, s] = h
        gradient[:, t, s] = (log_pi(states + step) - log_pi(states - step)) / (2 * h)
    assert gradient[:, 1:].abs().min() > 0
    wanted = case.schedule.posterior_mean_coef1[k] * delta * gradient
    torch.testing.assert_close((moved - still)[..., :S], wanted, rtol=1e-6, atol=1e-9)
    assert torch.equal(moved[..., S:], still[..., S:])


@settings(max_examples=60, deadline=None)
@given(
    config=sampler_configs((None, 1, 2, K - 1, K)),
    normalized=st.booleans(),
    scale=st.sampled_from([0.0, 0.005, 0.1]),
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 3]),
)
def test_every_option_gives_finite_trajectories_from_s0(config, normalized, scale, seed, batch):
    sampler = make_sampler(config, seed % 7, action_bounds=(-1.0, 1.0))
    s0, generator = make_observations(seed, batch), torch.Generator().manual_seed(seed)
    out = sampler.sample(s0, scale, generator, normalized=normalized, return_chain=True)
    assert out.observations.shape == (batch, H, S) and out.actions.shape == (batch, H, A)
    assert out.rewards.shape == out.terminals.shape == (batch, H)
    num_steps = config.num_inference_steps or K
    assert out.chain_trajectories.shape == (num_steps, batch, H, D)
    assert out.chain_actions.shape == (num_steps, batch, H, A)
    compares = config.action_update == "exact" and num_steps > 1
    assert (out.mean_change is not None) == compares
    assert not compares or (out.mean_change.shape == () and torch.isfinite(out.mean_change))
    for tensor in (out.observations, out.actions, out.rewards, out.chain_trajectories):
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
    assert torch.equal(out.observations[:, 0], s0)
    s0_norm = s0 if normalized else sampler.components.normalizer.normalize(s0, "observations")
    assert (out.chain_trajectories[:, :, 0, :S] == s0_norm).all()
    last, n = out.chain_trajectories[-1], sampler.components.normalizer
    if normalized:
        assert torch.equal(out.observations, last[..., :S])
        assert torch.equal(out.rewards, last[..., S])
        assert torch.equal(out.terminals, last[..., S + 1])
        assert torch.equal(out.actions, out.chain_actions[-1])
    else:
        raw = n.unnormalize(last[..., :S], "observations")
        assert torch.equal(out.observations[:, 1:], raw[:, 1:])
        assert torch.equal(out.rewards, n.unnormalize(last[..., S], "rewards"))
        assert torch.equal(out.actions, n.unnormalize(out.chain_actions[-1], "actions"))
        flags = n.unnormalize(last[..., S + 1], "terminals") > 0.5
        assert torch.equal(out.terminals, flags.float())


def constant_policy(mean=(0.3, -0.2), std=(0.15, 0.4)) -> pg.GaussianPolicy:
    """The same distribution at every state."""
    policy = pg.GaussianPolicy(S, A, 8, 1)
    with torch.no_grad():
        policy.network[-1].weight.zero_()
        policy.network[-1].bias.copy_(torch.atanh(torch.tensor(mean)))
        policy.log_std.copy_((torch.tensor(std) - 0.1).log())
    return policy


@settings(max_examples=40, deadline=None)
@given(config=sampler_configs((None, 1, 2, K - 1, K)), scale=st.sampled_from([0.0, 0.01, 100.0]))
def test_clipped_actions_stay_within_reach_of_the_policy(config, scale):
    assume(config.action_update != "exact")
    config = replace(config, clip_std=1.5, clip_final_actions=True, update_states=False)
    sampler = make_sampler(config, policy=constant_policy(), action_bounds=(-1.0, 1.0))
    actions = sampler.sample(make_observations(), scale, torch.Generator().manual_seed(0)).actions
    distance = (actions - torch.tensor([0.3, -0.2])).abs()
    assert (distance <= 1.5 * torch.tensor([0.15, 0.4]) + 1e-6).all()


def test_equation_11_clips_before_its_noise_and_not_in_the_last_step():
    sampler = make_sampler(pg.SamplerConfig.paper(clip_std=1.5), policy=constant_policy())
    noise, n = make_noise(), sampler.components.normalizer
    chain = sampler.sample(make_observations(), 0.001, noise=noise, return_chain=True).chain_actions
    betas = sampler.components.schedule.betas.flip(0)
    quiet = chain[:-1] - betas[:-1].sqrt().view(-1, 1, 1, 1) * noise.actions[:-1]
    distance = (n.unnormalize(quiet, "actions") - torch.tensor([0.3, -0.2])).abs()
    reach = 1.5 * torch.tensor([0.15, 0.4])
    assert (distance <= reach + 1e-5).all()
    assert ((distance - reach).abs() < 1e-5).any(), "some action must have met the limit"
    assert torch.equal(chain[-1], chain[-2])
    assert ((n.unnormalize(chain[-1], "actions") - torch.tensor([0.3, -0.2])).abs() > reach).any()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_max_guidance_is_the_share_of_the_way_to_the_mean(share):
    config = pg.SamplerConfig.official(clip_std=None, max_guidance=share)
    noise = make_noise()
    noise = replace(noise, actions=torch.zeros_like(noise.actions))
    sampler = make_sampler(config, policy=constant_policy())
    out = sampler.sample(make_observations(), 1e6, noise=noise, return_chain=True)
    unnormalize = sampler.components.normalizer.unnormalize
    initial = unnormalize(noise.initial_actions, "actions") - torch.tensor([0.3, -0.2])
    for step in range(K - 1):
        distance = unnormalize(out.chain_actions[step], "actions") - torch.tensor([0.3, -0.2])
        wanted = (1 - share) ** (step + 1) * initial
        torch.testing.assert_close(distance, wanted, rtol=1e-4, atol=1e-5)


def test_max_guidance_binds_per_action_dimension_and_not_below_it():
    policy = constant_policy(std=(0.15, 0.4))
    noise, delta = make_noise(), 0.02  # 0.02 / 0.15^2 = 0.89, 0.02 / 0.4^2 = 0.125
    results = []
    for bound in (None, 0.5, 0.95):
        config = pg.SamplerConfig.official(max_guidance=bound, clip_std=None)
        results.append(
            make_sampler(config, policy=policy).sample(
                make_observations(), delta, noise=noise, return_chain=True
            )
        )
    free, bound, loose = (result.chain_actions[0] for result in results)
    assert not torch.allclose(free[..., 0], bound[..., 0], atol=1e-2)
    assert torch.equal(free[..., 1], bound[..., 1])
    assert torch.equal(free, loose)


@pytest.mark.parametrize("scale_actions", [False, True])
@pytest.mark.parametrize("denoiser_actions", ["raw", "clipped"])
def test_the_denoiser_sees_the_actions_it_should(denoiser_actions, scale_actions):
    low, high = torch.tensor([-0.5, -0.1]), torch.tensor([0.4, 0.8])
    config = pg.SamplerConfig.official(
        denoiser_actions=denoiser_actions, scale_actions=scale_actions, clip_std=None
    )
    spy = SpyDenoiser(make_parts()["denoiser"])
    sampler = make_sampler(config, denoiser=spy, action_bounds=(low, high))
    spy.calls.clear()  # the check at construction
    noise, n = make_noise(), sampler.components.normalizer
    out = sampler.sample(make_observations(), 0.001, noise=noise, return_chain=True)
    held = torch.cat([noise.initial_actions[None], out.chain_actions[:-1]])
    raw = n.unnormalize(held, "actions")
    assert ((raw < low) | (raw > high)).float().mean() > 0.2, "the bounds must bind"
    shown = n.normalize(raw.clamp(low, high), "actions") if denoiser_actions == "clipped" else held
    if scale_actions:
        shown = shown * sampler.components.schedule.alphas_cumprod.sqrt().flip(0).view(K, 1, 1, 1)
    torch.testing.assert_close(torch.stack([call[1] for call in spy.calls]), shown)
    assert [call[2].tolist() for call in spy.calls] == [[k] * B for k in reversed(range(K))]


@pytest.mark.parametrize("clip_state_change", [None, 0.1])
@pytest.mark.parametrize("policy_input", ["denoised", "posterior_mean", "noisy"])
def test_policy_input(policy_input, clip_state_change):
    config = pg.SamplerConfig.official(
        policy_input=policy_input, clip_state_change=clip_state_change, clip_state_change_steps=3
    )
    spy, policy = SpyDenoiser(make_parts()["denoiser"]), SpyPolicy(make_parts()["policy"])
    sampler = make_sampler(config, denoiser=spy, policy=policy)
    s0, schedule = make_observations(), sampler.components.schedule
    spy.calls.clear(), policy.seen.clear()  # the check at construction
    sampler.sample(s0, 0.01, torch.Generator().manual_seed(1))
    assert len(policy.seen) == K
    for k, seen, (x, _, _, prediction) in zip(
        reversed(range(K)), policy.seen, spy.calls, strict=True
    ):
        prediction[:, 0, :S] = x[:, 0, :S]
        mean = schedule.posterior_mean_coef1[k] * prediction + schedule.posterior_mean_coef2[k] * x
        if clip_state_change is not None and k < 3:
            mean = mean.clamp(x - clip_state_change, x + clip_state_change)
        states = {"denoised": prediction, "posterior_mean": mean, "noisy": x}[policy_input]
        wanted = sampler.components.normalizer.unnormalize(states[..., :S], "observations")
        torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-5)
        if policy_input != "posterior_mean":
            torch.testing.assert_close(seen[:, 0], s0)


def test_a_policy_on_normalized_observations_gives_the_same():
    parts = make_parts()
    normed = pg.GaussianPolicy(S, A, 16, normed_inputs=True, normalizer=parts["normalizer"])
    scale = parts["normalizer"].observations_scale
    with torch.no_grad():  # the same function of raw observations
        normed.load_state_dict(parts["policy"].state_dict())
        first = normed.network[0]
        first.bias += first.weight @ parts["normalizer"].observations_mean
        first.weight *= scale
    config, noise = pg.SamplerConfig.official(update_states=True), make_noise()
    batches = [
        make_sampler(config, policy=policy).sample(make_observations(), 0.1, noise=noise)
        for policy in (parts["policy"], normed)
    ]
    torch.testing.assert_close(batches[0].observations, batches[1].observations, atol=1e-4, rtol=0)
    torch.testing.assert_close(batches[0].actions, batches[1].actions, atol=1e-4, rtol=0)


def test_clip_state_change_limits_the_mean_in_the_last_steps():
    config = pg.SamplerConfig.official(clip_state_change=0.02, clip_state_change_steps=3)
    noise, s0 = make_noise(), make_observations()
    noise = replace(noise, trajectories=torch.zeros_like(noise.trajectories))
    chain = make_sampler(config).sample(s0, noise=noise, return_chain=True).chain_trajectories
    change = (chain[1:] - chain[:-1]).abs().amax((1, 2, 3))
    assert (change[-3:] <= 0.02 + 1e-6).all() and (change[-3:] > 0.0199).all()
    assert (change[:-3] > 0.1).all()


def test_raw_and_normalized_modes_are_the_same_trajectories():
    sampler, noise, s0 = make_sampler(), make_noise(), make_observations()
    n = sampler.components.normalizer
    raw = sampler.sample(s0, noise=noise)
    normed = sampler.sample(n.normalize(s0, "observations"), noise=noise, normalized=True)
    assert torch.equal(raw.observations[:, 0], s0)
    wanted = n.unnormalize(normed.observations, "observations")
    assert torch.equal(raw.observations[:, 1:], wanted[:, 1:])
    assert torch.equal(raw.actions, n.unnormalize(normed.actions, "actions"))
    assert torch.equal(raw.rewards, n.unnormalize(normed.rewards, "rewards"))


def test_terminals_are_flags_of_both_kinds_in_raw_mode():
    sampler, noise, s0 = make_sampler(), make_noise(), make_observations()
    sampler.components.normalizer.update({"terminals": (0.5, 1.0)})
    raw = sampler.sample(s0, noise=noise)
    n = sampler.components.normalizer
    normed = sampler.sample(n.normalize(s0, "observations"), noise=noise, normalized=True)
    assert set(raw.terminals.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(raw.terminals == 1, n.unnormalize(normed.terminals, "terminals") > 0.5)


@pytest.mark.parametrize("action_update", ACTION_UPDATES)
def test_draw_order_is_the_released_codes(action_update):
    sampler, s0 = make_sampler(pg.SamplerConfig.official(action_update=action_update)), None
    s0, g = make_observations(), torch.Generator().manual_seed(11)
    initial = torch.randn(B, H, D, generator=g), torch.randn(B, H, A, generator=g)
    states, actions = [], []
    for step in range(K):
        states.append(torch.randn(B, H, D, generator=g))
        drawn = step < K - 1 and action_update in ("score", "sample")
        actions.append(torch.randn(B, H, A, generator=g) if drawn else torch.full((B, H, A), 1e9))
    noise = pg.SampleNoise(*initial, torch.stack(states), torch.stack(actions))
    by_hand = sampler.sample(s0, noise=noise)
    generator = torch.Generator().manual_seed(11)
    assert_same(sampler.sample(s0, generator=generator), by_hand)
    assert torch.equal(generator.get_state(), g.get_state()), "not one draw more or less"
    torch.manual_seed(11)
    assert_same(sampler.sample(s0), by_hand)


def test_generator_reproducibility_leaves_the_global_state_alone():
    sampler, s0 = make_sampler(), make_observations()
    before = torch.get_rng_state()
    first, second, other = (
        sampler.sample(s0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    sampler.sample(s0, noise=make_noise())
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(first, second)
    assert differs(first, other)
    generator = torch.Generator().manual_seed(1)
    assert_same(sampler.sample(s0, generator=generator), first)
    assert differs(sampler.sample(s0, generator=generator), first), "the generator moves on"


@pytest.mark.parametrize("update_states", [False, True])
def test_rows_of_a_batch_are_independent(update_states):
    config = pg.SamplerConfig.official(update_states=update_states)
    sampler, noise, s0 = make_sampler(config), make_noise(), make_observations()
    whole = sampler.sample(s0, 0.05, noise=noise)
    row = pg.SampleNoise(
        noise.initial_trajectories[2:3],
        noise.initial_actions[2:3],
        noise.trajectories[:, 2:3],
        noise.actions[:, 2:3],
    )
    alone = sampler.sample(s0[2:3], 0.05, noise=row)
    torch.testing.assert_close(alone.observations, whole.observations[2:3], atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.actions, whole.actions[2:3], atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", ["denoiser", "policy", "log_std", "moments"])
def test_changes_between_two_calls_are_seen(change):
    parts, noise, s0 = make_parts(), make_noise(), make_observations()
    sampler = make_sampler(**parts)
    before = sampler.sample(s0, 0.05, noise=noise)
    with torch.no_grad():
        if change == "denoiser":
            parts["denoiser"].output.bias += 1.0
        elif change == "policy":
            parts["policy"].network[-1].bias += 1.0
        elif change == "log_std":
            parts["policy"].log_std += 1.0
        else:
            parts["normalizer"].update({"observations": (torch.ones(S), torch.full((S,), 3.0))})
    after = sampler.sample(s0, 0.05, noise=noise)
    assert not torch.allclose(after.actions, before.actions, atol=1e-3)
    assert_same(after, make_sampler(**parts).sample(s0, 0.05, noise=noise))


@pytest.mark.parametrize("update_states", [False, True])
def test_sampling_leaves_no_trace(update_states):
    parts, noise = make_parts(), make_noise()
    sampler = make_sampler(pg.SamplerConfig.official(update_states=update_states), **parts)
    s0 = make_observations().requires_grad_(True)
    kept = copy.deepcopy(noise), s0.detach().clone()
    out = sampler.sample(s0, 0.1, noise=noise, return_chain=True)
    for name in ("observations", "actions", "rewards", "terminals", "chain_trajectories"):
        assert not getattr(out, name).requires_grad
    for module in (parts["denoiser"], parts["policy"]):
        assert all(p.grad is None for p in module.parameters())
    for name in ("initial_trajectories", "initial_actions", "trajectories", "actions"):
        assert torch.equal(getattr(noise, name), getattr(kept[0], name)), name
    assert torch.equal(s0, kept[1])


def test_no_chain_unless_asked_for():
    out = make_sampler().sample(make_observations())
    assert out.chain_trajectories is None and out.chain_actions is None


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_the_last_steps_of_the_chain(engine):
    sampler, s0, noise = make_sampler(engine=engine), make_observations(), make_noise()
    whole = sampler.sample(s0, noise=noise, return_chain=True)
    for length in (1, 2, K):
        out = sampler.sample(s0, noise=noise, return_chain=length)
        assert torch.equal(out.chain_trajectories, whole.chain_trajectories[-length:])
        assert torch.equal(out.chain_actions, whole.chain_actions[-length:])
        assert torch.equal(out.actions, whole.actions)
    for wrong in (K + 1, -1, 1.5, "all"):
        with pytest.raises(pg.InputError, match="return_chain must be.*got"):
            sampler.sample(s0, return_chain=wrong)


def test_strided_and_float64_observations_give_the_same():
    sampler, noise, s0 = make_sampler(), make_noise(), make_observations()
    wanted = sampler.sample(s0, noise=noise)
    strided = s0.T.contiguous().T
    assert not strided.is_contiguous()
    assert_same(sampler.sample(strided, noise=noise), wanted)
    assert_same(sampler.sample(s0.repeat_interleave(2, 0)[::2], noise=noise), wanted)
    assert_same(sampler.sample(s0.double(), noise=noise), wanted)
    half = sampler.sample(s0.bfloat16(), noise=noise)
    assert torch.equal(half.observations[:, 0], s0.bfloat16().float())


def test_guidance_scale_may_be_a_tensor():
    sampler, noise, s0 = make_sampler(), make_noise(), make_observations()
    wanted = sampler.sample(s0, 0.25, noise=noise)
    assert_same(sampler.sample(s0, torch.tensor(0.25), noise=noise), wanted)
    assert not torch.allclose(sampler.sample(s0, 0.0, noise=noise).actions, wanted.actions)


@pytest.mark.parametrize(
    "observations, message",
    [
        (torch.zeros(B, S + 1), r"must be of shape \[B, 3\] .* got shape \(5, 4\)"),
        (torch.zeros(S), r"must be of shape \[B, 3\] .* got shape \(3,\)"),
        (torch.zeros(1, B, S), r"must be of shape \[B, 3\] .* got shape \(1, 5, 3\)"),
        (torch.zeros(0, S), r"with B at least 1, got shape \(0, 3\)"),
        (torch.zeros(B, S, dtype=torch.int64), r"floating point, got torch\.int64"),
        (torch.zeros(B, S, dtype=torch.bool), r"floating point, got torch\.bool"),
        (torch.zeros(B, S, dtype=torch.complex64), r"floating point, got torch\.complex64"),
        (torch.eye(B)[:, :S].log(), r"initial_observations\[0, 1\] must be a finite .* got -inf"),
        (torch.full((B, S), math.nan), r"initial_observations\[0, 0\] must be a finite .* got nan"),
        (np.zeros((B, S), dtype=np.int32), r"floating point, got torch\.int32"),
        ([[0.0] * S, [0.0]], "must be a tensor, an array or a list of equally long.*got list"),
        ([["a"] * S], "must be a tensor, an array or a list.*got list"),
        ("abc", "must be a tensor, an array or a list.*got str"),
        (None, "must be a tensor, an array or a list.*got NoneType"),
        ({}, "must be a tensor, an array or a list.*got dict"),
    ],
)
def test_unusable_observations_are_refused(observations, message):
    with pytest.raises(pg.InputError, match=message):
        make_sampler().sample(observations)


def test_where_values_are_not_read_the_trajectory_tells():
    observations = torch.zeros(B, S)
    observations[1, 2] = math.nan
    batch = make_sampler().sample(observations, check_finite=False)
    assert not batch.finite()["observations"]
    with pytest.raises(pg.InputError, match="got shape"):
        make_sampler().sample(observations[0], check_finite=False)


@pytest.mark.parametrize("scale", [-1e-9, -math.inf, math.inf, math.nan])
def test_guidance_scale_must_be_non_negative_and_finite(scale):
    with pytest.raises(pg.InputError, match=f"guidance_scale must be .* got {scale}"):
        make_sampler().sample(make_observations(), scale)


@pytest.mark.parametrize(
    "name", ["initial_trajectories", "initial_actions", "trajectories", "actions"]
)
def test_noise_of_another_shape_is_refused(name):
    noise = make_noise()
    wanted = tuple(getattr(noise, name).shape)
    for wrong in (getattr(noise, name)[:-1], getattr(noise, name)[..., :-1], torch.zeros(())):
        with pytest.raises(pg.InputError) as error:
            make_sampler().sample(make_observations(), noise=replace(noise, **{name: wrong}))
        message = str(error.value)
        assert f"noise.{name}" in message
        assert str(tuple(wrong.shape)) in message and str(wanted) in message


@pytest.mark.parametrize("option", ["engine", "dtype"])
def test_unknown_engine_and_dtype_are_refused(option):
    with pytest.raises(pg.InputError, match=f"{option}.*got .*'jax'"):
        make_sampler(**{option: "jax"})


@pytest.mark.parametrize("name", ["policy", "normalizer"])
@pytest.mark.parametrize("dims", [(S + 1, A), (S, A + 1)])
def test_modules_of_different_dimensions_are_refused(name, dims):
    other = {"policy": pg.GaussianPolicy(*dims, 8), "normalizer": pg.Normalizer(*dims)}[name]
    wrong, right = (dims[0], S) if dims[0] != S else (dims[1], A)
    with pytest.raises(
        pg.InputError, match=f"{type(other).__name__}: .* must be .* {right}, got {wrong}"
    ):
        make_sampler(**{name: other})


def test_clipped_denoiser_actions_need_bounds():
    with pytest.raises(pg.InputError, match="action_bounds must be a pair .*'clipped', got None"):
        make_sampler(pg.SamplerConfig.official(denoiser_actions="clipped"))


def test_config_defaults_to_the_released_codes():
    assert make_sampler().config == pg.SamplerConfig.official()


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_input_that_only_looks_right_is_refused(engine):
    sampler, s0 = make_sampler(engine=engine), make_observations()
    huge = torch.full((2, S), 1e300, dtype=torch.float64)
    with pytest.raises(pg.InputError, match=r"initial_observations\[0, 0\] must be .* got 1e\+300"):
        sampler.sample(huge)
    noise = make_noise()
    broken = replace(noise, actions=noise.actions * float("nan"))
    with pytest.raises(pg.InputError, match="noise.actions must be finite numbers, got NaN"):
        sampler.sample(s0, noise=broken)
    with pytest.raises(pg.InputError, match="SampleNoise, got tuple"):
        sampler.sample(s0, noise=())
    with pytest.raises(pg.InputError, match="noise.actions must be a tensor.* got str"):
        sampler.sample(s0, noise=replace(noise, actions="x"))
    with pytest.raises(pg.InputError, match=r"guidance_scale must be .* got array\(\[0., 0.\]\)"):
        sampler.sample(s0, guidance_scale=np.zeros(2))
    with pytest.raises(pg.InputError, match="guidance_scale must be .* got 'x'"):
        sampler.sample(s0, guidance_scale="x")


def test_action_bounds_are_checked_at_construction():
    clipped = pg.SamplerConfig.official(denoiser_actions="clipped")
    with pytest.raises(pg.InputError, match=r"low must be .* got shape \(5,\)"):
        make_sampler(clipped, action_bounds=(torch.zeros(5), 1.0))
    with pytest.raises(pg.InputError, match="must have low <= high, got 1.0 and -1.0"):
        make_sampler(clipped, action_bounds=(1.0, -1.0))
    for wrong in (1.0, (1.0,), (0.0, 1.0, 2.0), (None, 1.0), "ab", {}, np.array(1.0)):
        with pytest.raises(pg.InputError, match=r"action_bounds must be a pair \(low, high\).*got"):
            make_sampler(clipped, action_bounds=wrong)
    arrays = make_sampler(clipped, action_bounds=[np.full(A, -1.0), np.float64(1.0)])
    assert arrays.components.action_bounds[0].dtype == torch.float32


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_accepted_inputs(engine):
    """Arrays, lists, numpy's numbers, torch's dtypes and no device."""
    sampler = make_sampler(engine=engine, device=None, dtype=torch.float32)
    s0, noise = make_observations(), make_noise()
    wanted = sampler.sample(s0, 0.25, noise=noise, return_chain=2)
    arrays = pg.SampleNoise(*(tensor.double().numpy() for tensor in vars(noise).values()))
    frozen = s0.numpy().copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for observations in (
            frozen,
            s0.numpy().astype(np.longdouble),
            s0.numpy().astype(">f4"),
            s0.numpy()[::-1][::-1],
            s0.tolist(),
            list(s0),
            list(s0.numpy()),
            tuple(s0.numpy()),
        ):
            got = sampler.sample(
                observations, np.float32(0.25), noise=arrays, return_chain=np.int64(2)
            )
            assert_same(got, wanted)
            assert torch.equal(got.chain_actions, wanted.chain_actions)
    for scale in (np.float64(0.25), np.array(0.25), np.array([0.25])):
        assert_same(sampler.sample(s0, scale, noise=noise), wanted)
    whole = [[1, 2, 3]] * B
    assert_same(
        sampler.sample(whole, noise=noise), sampler.sample(torch.tensor(whole).float(), noise=noise)
    )


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("config", {}, r"config must be a SamplerConfig, got \{\}"),
        ("schedule", 12, "schedule must be a NoiseSchedule, got 12"),
        ("schedule", None, "schedule must be a NoiseSchedule, got None"),
        ("normalizer", None, "normalizer must be a polygrad_fast.Normalizer.*got NoneType"),
        ("normalizer", nn.Identity(), "normalizer must be a polygrad_fast.Normalizer.*Identity"),
        ("dtype", torch.int8, "dtype.*got.*'int8'"),
        ("dtype", 3, "dtype.*got.*3"),
        ("dtype", ["float32"], "dtype must be a name or a torch.dtype, got .*'float32'"),
        ("device", 1.5, "device must be one of torch's, got 1.5"),
    ],
)
def test_wrong_types_are_refused(option, value, message):
    parts = {"config": None, "engine": "torch"} | {option: value}
    with pytest.raises(pg.InputError, match=message):
        make_sampler(**parts)


class LogNormalizer(pg.Normalizer):
    """Not affine, which only the reference engine reads."""

    def normalize(self, x, field):
        return super().normalize(x, field).asinh()

    def unnormalize(self, x, field):
        return super().unnormalize(x.sinh(), field)


def test_a_normalizer_with_its_own_mapping():
    normalizer = LogNormalizer(S, A)
    for engine in ("torch", "auto"):
        with pytest.raises(pg.InputError, match="'reference': LogNormalizer has a normalize of"):
            make_sampler(normalizer=normalizer, engine=engine)
    sampler, s0, noise = make_sampler(normalizer=normalizer), make_observations(), make_noise()
    plain = make_sampler(normalizer=pg.Normalizer(S, A)).sample(s0, noise=noise)
    assert differs(sampler.sample(s0, noise=noise), plain)


@pytest.mark.parametrize(
    "option", ["action_update", "prediction_type", "clip_order", "policy_input", "variance_type"]
)
def test_an_unknown_name_raises_in_every_step(option):
    """However it got into the configuration."""
    config = pg.SamplerConfig.official()
    object.__setattr__(config, option, "typo")
    for k in range(K):
        with pytest.raises(pg.InputError, match=f"{option} must be one of .*, got 'typo'"):
            Float64Case(0).run(config, k, 0.1)


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize(
    "option", ["action_update", "prediction_type", "clip_order", "policy_input", "denoiser_actions"]
)
def test_an_unknown_name_raises_in_every_engine(engine, option):
    config = pg.SamplerConfig.official()
    sampler = make_sampler(config, engine=engine)
    object.__setattr__(config, option, "typo")
    with pytest.raises(pg.InputError, match=f"{option} must be one of .*, got 'typo'"):
        sampler.sample(make_observations())


def test_more_steps_than_the_step_embedding_has():
    denoiser = pg.ResidualMLPDenoiser(
        S, A, H, hidden_dim=8, num_layers=1, step_conditioning="layer", num_train_timesteps=K - 1
    )
    with pytest.raises(pg.InputError, match=f"schedule's {K} steps, got {K - 1}"):
        make_sampler(denoiser=denoiser)


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_inference_mode_and_float64_noise(engine):
    noise, s0 = make_noise(), make_observations()
    config = pg.SamplerConfig.official(update_states=True)
    sampler = make_sampler(config, engine=engine)
    wanted = sampler.sample(s0, noise=noise)
    double = pg.SampleNoise(*(tensor.double() for tensor in vars(noise).values()))
    with torch.inference_mode():
        assert_same(sampler.sample(s0 * 1.0, noise=double), wanted)


def test_results_do_not_alias_the_callers_noise():
    config = pg.SamplerConfig.official(action_update="none", clip_std=None)
    noise = make_noise()
    batch = make_sampler(config).sample(make_observations(), noise=noise, normalized=True)
    batch.actions.zero_()
    assert noise.initial_actions.abs().sum() > 0


def pickled(sampler):
    return pickle.loads(pickle.dumps(sampler))


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_a_used_sampler_can_be_copied_and_pickled(engine, duplicate, monkeypatch):
    monkeypatch.setattr(linear, "PACKING_USES", 1)
    monkeypatch.setattr(linear, "PACKING_SIZE", 1)
    bounds = (torch.full((A,), -1.0), 1.0)
    config = pg.SamplerConfig.official(denoiser_actions="clipped")
    sampler, s0 = make_sampler(config, engine=engine, action_bounds=bounds), make_observations()
    wanted = sampler.sample(s0, noise=make_noise())
    twin = duplicate(sampler)
    assert twin.engine == engine and twin.config == config
    assert_same(twin.sample(s0, noise=make_noise()), wanted)
    with torch.no_grad():
        sampler.components.denoiser.output.weight.mul_(2.0)
    changed = sampler.sample(s0, noise=make_noise())
    assert differs(changed, wanted)
    shares_modules = duplicate is copy.copy
    assert_same(twin.sample(s0, noise=make_noise()), changed if shares_modules else wanted)


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_threads_may_share_a_sampler(engine):
    sampler = make_sampler(engine=engine, num_steps=20)
    cases = [(make_observations(i), make_noise(i, num_steps=20)) for i in range(4)]
    wanted = [sampler.sample(s0, noise=noise) for s0, noise in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(5):
            results = pool.map(lambda case: sampler.sample(case[0], noise=case[1]), cases)
            for got, expected in zip(results, wanted, strict=True):
                assert_same(got, expected)
