import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg
from polygrad_fast.policy import entropy, log_prob, score

examples = settings(max_examples=60, deadline=None)
S, A = 4, 3
seeds = st.integers(0, 2**31)
shapes = st.lists(st.integers(1, 4), max_size=3)


def gaussian(seed: int, shape: list[int]):
    """Actions far into the tails, means, and deviations between 1e-2 and 1e2, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mean, z = torch.randn(2, *shape, A, generator=generator, dtype=torch.float64)
    exponent = 4 * torch.rand(*shape, A, generator=generator, dtype=torch.float64) - 2
    std = 10**exponent
    return mean + 5 * z * std, mean, std


def make_normalizer() -> pg.Normalizer:
    moments = (torch.tensor([1.0, -20.0, 0.3, 4.0]), torch.tensor([0.1, 5.0, 2.0, 1.0]))
    return pg.Normalizer.from_moments(moments, (torch.zeros(A), torch.ones(A)))


@examples
@given(seeds, shapes)
def test_score_is_the_gradient_of_log_prob(seed, shape):
    actions, mean, std = gaussian(seed, shape)
    actions.requires_grad_(True)
    (wanted,) = torch.autograd.grad(log_prob(actions, mean, std).sum(), actions)
    torch.testing.assert_close(score(actions, mean, std), wanted, rtol=1e-12, atol=0)


@examples
@given(seeds, shapes)
def test_log_prob_and_entropy_match_torch_distributions(seed, shape):
    actions, mean, std = gaussian(seed, shape)
    wanted = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    got = log_prob(actions, mean, std)
    assert got.shape == entropy(std).shape == tuple(shape)
    torch.testing.assert_close(got, wanted.log_prob(actions), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy(std), wanted.entropy(), rtol=1e-12, atol=1e-12)


@examples
@given(
    init_std=st.floats(0.02, 10.0),
    share=st.floats(0.0, 0.99),
    log_std=st.lists(st.floats(-5, 3), min_size=A, max_size=A),
)
def test_std_is_exp_log_std_plus_min_std(init_std, share, log_std):
    min_std = share * init_std
    policy = pg.GaussianPolicy(S, A, 8, 1, init_std=init_std, min_std=min_std)
    assert policy.std.tolist() == pytest.approx([init_std] * A, rel=1e-5)
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor(log_std))
    wanted = [math.exp(value) + min_std for value in log_std]
    assert policy.std.tolist() == pytest.approx(wanted, rel=1e-6)
    mean, std = policy(torch.randn(5, 2, S))
    assert torch.equal(std, policy.std.expand(5, 2, A)) and mean.shape == std.shape
    assert (std > min_std).all()


@pytest.mark.parametrize("normed", [False, True])
def test_another_std_leaves_the_means_and_the_policy_as_they_are(normed):
    options = {"normed_inputs": True, "normalizer": make_normalizer()} if normed else {}
    policy = pg.GaussianPolicy(S, A, 8, 1, init_std=0.7, min_std=0.2, **options)
    observations = torch.randn(5, 2, S)
    mean, std = policy(observations)
    for wanted in (0.02, 0.7, 3):
        other = policy.with_std(wanted)
        got_mean, got_std = other(observations)
        assert torch.equal(got_mean, mean)
        assert got_std.flatten().tolist() == pytest.approx([wanted] * 30, rel=1e-6)
        assert other.normalizer is policy.normalizer
    assert torch.equal(policy(observations)[1], std) and policy.min_std == 0.2
    for wrong in (0, -1.0, math.inf, math.nan, "1"):
        with pytest.raises(pg.InputError, match="std must be a positive finite number, got"):
            policy.with_std(wrong)


@pytest.mark.parametrize("normed", [False, True])
def test_on_raw_observations_it_is_the_same_function_without_a_normalizer(normed):
    normalizer = make_normalizer()
    policy = pg.GaussianPolicy(S, A, 8, 1, normed_inputs=normed, normalizer=normalizer)
    observations = 3 * torch.randn(40, S) + 1
    mean, std = policy(observations)
    raw = policy.on_raw_observations()
    assert raw.normalizer is None and not raw.normed_inputs
    normalizer.observations_mean += 5.0  # which it no longer sees
    for got, wanted in zip(raw(observations), (mean, std), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(raw.with_std(0.5)(observations)[0], mean, atol=1e-5)
    assert policy.normed_inputs == normed and policy.normalizer is normalizer


def test_mean_is_tanh_of_the_released_trunk():
    policy = pg.GaussianPolicy(S, A, hidden_dim=8, num_layers=2)
    w = {n: p.double() for n, p in policy.network.state_dict().items()}
    x = 100 * torch.randn(6, S)
    h = x.double()
    for linear, norm in ((0, 1), (3, 4)):
        h = h @ w[f"{linear}.weight"].T + w[f"{linear}.bias"]
        centred = h - h.mean(-1, keepdim=True)
        h = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        h = h * w[f"{norm}.weight"] + w[f"{norm}.bias"]
        h = torch.where(h > 0, h, h.exp() - 1)
    wanted = (h @ w["6.weight"].T + w["6.bias"]).tanh()
    mean, _ = policy(x)
    torch.testing.assert_close(mean.double(), wanted, rtol=1e-4, atol=1e-5)
    assert mean.abs().max() <= 1


def test_normed_inputs_normalizes_raw_observations():
    normalizer = make_normalizer()
    policy = pg.GaussianPolicy(S, A, 8, normed_inputs=True, normalizer=normalizer)
    observations = torch.randn(7, S) * 10
    mean, std = policy(observations)
    scale = torch.tensor([0.1, 5.0, 2.0, 1.0]) + 1e-6
    by_hand = (observations - torch.tensor([1.0, -20.0, 0.3, 4.0])) / scale
    torch.testing.assert_close(mean, policy.distribution(by_hand)[0])
    torch.testing.assert_close(mean, torch.tanh(policy.network(by_hand)))

    plain = pg.GaussianPolicy(S, A, 8, normalizer=normalizer)
    plain.load_state_dict(policy.state_dict())
    torch.testing.assert_close(plain(by_hand)[0], mean)
    assert not torch.allclose(plain(observations)[0], mean)


def test_refreshed_moments_are_seen():
    normalizer = make_normalizer()
    policy = pg.GaussianPolicy(S, A, 8, normed_inputs=True, normalizer=normalizer)
    observations = torch.randn(7, S)
    normalizer.update({"observations": (torch.ones(S), torch.full((S,), 3.0))})
    wanted = policy.distribution((observations - 1) / (3 + 1e-6))[0]
    torch.testing.assert_close(policy(observations)[0], wanted)


def test_the_shared_normalizer_is_not_part_of_the_state():
    policy = pg.GaussianPolicy(S, A, 8, normed_inputs=True, normalizer=make_normalizer())
    assert not any("normalizer" in name for name in policy.state_dict())
    assert not list(policy.buffers())


@pytest.mark.parametrize("shape", [(S + 1,), (5, S - 1), (), (S, 5)])
def test_observations_of_another_width_are_refused(shape):
    policy = pg.GaussianPolicy(S, A, 8)
    with pytest.raises(pg.InputError) as error:
        policy(torch.zeros(shape))
    assert str(error.value) == f"observations must be of shape [..., {S}], got {tuple(shape)}"


@pytest.mark.parametrize("init_std, min_std", [(0.1, 0.1), (0.05, 0.1), (1.0, -0.1), (-1.0, -2.0)])
def test_deviations_must_be_ordered(init_std, min_std):
    with pytest.raises(
        pg.InputError, match=rf"^init_std must be above min_std.*{init_std}.*{min_std}"
    ):
        pg.GaussianPolicy(S, A, init_std=init_std, min_std=min_std)


def test_normed_inputs_without_a_normalizer_is_refused():
    with pytest.raises(
        pg.InputError, match="^normalizer must be given with normed_inputs=True, got None"
    ):
        pg.GaussianPolicy(S, A, normed_inputs=True)


def test_value_function_drops_its_last_axis():
    value_function = pg.ValueFunction(S, 8, 3)
    values = value_function(torch.randn(2, 5, S))
    assert values.shape == (2, 5)
    assert sum(isinstance(m, torch.nn.Linear) for m in value_function.modules()) == 4
