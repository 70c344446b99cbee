"""Guidance by a policy's score."""

import math

import pytest
import torch
from torch import nn

from polygrad_fast.config import EDMConfig, PolicyGuidanceConfig
from polygrad_fast.diffusion.edm import NoiseLevels
from polygrad_fast.errors import InputError
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.sampling.edm_sampler import EDMSampler
from polygrad_fast.sampling.heun import Step
from polygrad_fast.sampling.policy_score import (
    PolicyGuidance,
    guidance_weights,
    policy_score,
    unit_direction,
)
from polygrad_fast.trajectory_normalizer import TrajectoryNormalizer

S, A = 3, 2
D = S + A + 2
LEVELS = NoiseLevels.of(EDMConfig(num_inference_steps=10))


def make_normalizer() -> TrajectoryNormalizer:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(D, generator=generator)
    return TrajectoryNormalizer(mean, torch.rand(D, generator=generator) + 0.5, S, A)


def draw(batch=3, length=5, seed=0) -> torch.Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed))


class Gaussian:
    def __call__(self, observations):
        mean = torch.tanh(observations[..., :A] * 0.3)
        return mean, 0.3 + observations[..., 1:].square().mean(-1, keepdim=True).expand_as(mean)


class Deterministic:
    def __call__(self, observations):
        return torch.sin(observations[..., :A])


class WithScore(Deterministic):
    """Its call is not what guides."""

    def score_parameters(self, observations):
        return Gaussian()(observations)


@pytest.mark.parametrize("policy", [Gaussian(), Deterministic(), WithScore()])
def test_the_score_is_the_gradient_of_the_log_likelihood(policy):
    normalizer, x = make_normalizer().double(), draw().double()
    actions = x[..., S : S + A].clone().requires_grad_()
    observations = x[..., :S] * normalizer.std[:S] + normalizer.mean[:S]
    result = getattr(policy, "score_parameters", policy)(observations)
    mean, std = result if isinstance(result, tuple) else (result, torch.ones_like(result))
    played = torch.tanh(actions * normalizer.std[S : S + A] + normalizer.mean[S : S + A])
    log_likelihood = torch.distributions.Normal(mean, std).log_prob(played).sum()
    (wanted,) = torch.autograd.grad(log_likelihood, actions)
    got = policy_score(policy, x, normalizer)
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_a_policy_of_this_library_guides():
    torch.manual_seed(0)
    policy = GaussianPolicy(S, A, hidden_dim=8)
    score = policy_score(policy, draw(), make_normalizer())
    assert score.shape == (3, 5, A) and not score.requires_grad


def test_unit_directions_are_of_whole_trajectories():
    gradient = torch.randn(4, 5, A)
    gradient[1] = 0.0
    gradient[2, 0, 0] = 0.0
    direction = unit_direction(gradient)
    assert torch.equal(direction[1], torch.zeros(5, A))
    norms = (direction - 1e-8).norm(dim=(1, 2))
    assert norms[[0, 2, 3]].tolist() == pytest.approx([1.0] * 3, rel=1e-5)
    assert torch.allclose(direction[0], gradient[0] / gradient[0].norm())
    assert direction[2, 0, 0].item() == pytest.approx(1e-8)  # as released


@pytest.mark.parametrize("normalize", [True, False])
def test_saturated_trajectories_stay_as_they_are(normalize):
    """Every tanh saturates in the first: the release divides 0 by 0 there."""
    x = draw()
    x[0, :, S : S + A] = 80.0
    config = PolicyGuidanceConfig(coefficient=1.0, normalize=normalize)
    guided = PolicyGuidance(Gaussian(), make_normalizer(), config)(x, Step(2, LEVELS, None))
    assert torch.equal(guided[0], x[0]) and torch.isfinite(guided).all()
    assert not torch.equal(guided[1], x[1])


def test_guidance_weights():
    config = PolicyGuidanceConfig(coefficient=2.0, cosine_coefficient=0.5, delay_steps=2)
    weights = guidance_weights(config, LEVELS)
    assert weights[:2] == (0.0, 0.0) and weights[9] == 0.0
    assert weights[4] == pytest.approx(2 * (0.6 + 0.5 * math.sin(math.pi * 0.5)))
    paper = PolicyGuidanceConfig.paper(cosine_coefficient=0.5)
    weights = guidance_weights(paper, LEVELS)
    assert weights[0] == pytest.approx(80.0) and weights[9] == 0.0
    assert weights[5] == pytest.approx(LEVELS.sigma[5] + 0.5 * 80 * math.sin(math.pi / 2))


class Counting:
    def __init__(self):
        self.calls, self.observations = 0, None

    def __call__(self, observations):
        self.calls += 1
        self.observations = observations
        return torch.zeros(*observations.shape[:-1], A)


def test_where_and_how_far_actions_move():
    normalizer, x = make_normalizer(), draw()
    policy = Counting()
    config = PolicyGuidanceConfig(coefficient=0.7, cosine_coefficient=0.0)
    guided = PolicyGuidance(policy, normalizer, config)(x, Step(3, LEVELS, None))
    score = policy_score(policy, x, normalizer)
    assert torch.allclose(
        policy.observations, x[..., :S] * normalizer.std[:S] + normalizer.mean[:S]
    )
    assert torch.equal(guided[..., :S], x[..., :S])
    assert torch.equal(guided[..., S + A :], x[..., S + A :])
    assert torch.allclose(guided[..., S : S + A] - x[..., S : S + A], 0.7 * 0.7 * score, atol=1e-6)


def test_denoised_guidance_reads_the_denoised_trajectory():
    normalizer, x, clean = make_normalizer(), draw(), draw(seed=1)
    seen = []

    def denoise(y):
        seen.append(y)
        return clean

    config = PolicyGuidanceConfig(coefficient=1.0, cosine_coefficient=0.0, denoised=True)
    guided = PolicyGuidance(Gaussian(), normalizer, config)(x, Step(0, LEVELS, denoise))
    assert len(seen) == 1 and seen[0] is x
    wanted = x.clone()
    wanted[..., S : S + A] += policy_score(Gaussian(), clean, normalizer)
    assert torch.allclose(guided, wanted)


@pytest.mark.parametrize(
    "config", [PolicyGuidanceConfig(), PolicyGuidanceConfig(coefficient=1.0, delay_steps=10)]
)
def test_no_weight_no_call(config):
    policy, x = Counting(), draw()
    guidance = PolicyGuidance(policy, make_normalizer(), config)
    for index in range(10):
        assert guidance(x, Step(index, LEVELS, None)) is x
    assert policy.calls == 0


class Zero(nn.Module):
    """F = 0: the sampler's end is c_skip of the noise, near 0."""

    trajectory_dim = D

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, c):
        return self.weight * x


def test_guided_samples_are_likelier_under_the_policy():
    normalizer, policy = make_normalizer(), Gaussian()
    sampler = EDMSampler(Zero(), EDMConfig(num_inference_steps=20))

    def log_likelihood(coefficient):
        config = PolicyGuidanceConfig(coefficient=coefficient, normalize=True, denoised=True)
        guidance = PolicyGuidance(policy, normalizer, config)
        x = sampler.sample(64, 5, torch.Generator().manual_seed(0), guidance=guidance).trajectories
        raw = normalizer.unnormalize(x)
        mean, std = policy(raw.observations)
        return torch.distributions.Normal(mean, std).log_prob(raw.actions).mean().item()

    values = [log_likelihood(c) for c in (0.0, 0.5, 2.0)]
    assert values[0] + 0.02 < values[1] and values[1] + 0.02 < values[2]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3, 5, A + 1), r"a mean or action of shape \(3, 5, 2\) .*got \(3, 5, 3\)"),
        ((torch.zeros(3, 5, A), torch.ones(A)), r"a std of shape \(3, 5, 2\) .*got \(2,\)"),
    ],
)
def test_a_policy_that_returns_something_else(result, message):
    with pytest.raises(InputError, match=f"policy must return {message}"):
        policy_score(lambda observations: result, draw(), make_normalizer())
