"""Passes written out against autograd."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg
from polygrad_fast.learners import explicit_mlp
from polygrad_fast.learners.explicit_mlp import ExplicitMLP
from polygrad_fast.learners.passes import (
    AutogradActor,
    AutogradCritic,
    Batch,
    ExplicitActor,
    ExplicitCritic,
    actor_passes,
    critic_passes,
)
from polygrad_fast.policy import mlp


def make_networks(width=12, num_layers=2, dtype=torch.float64, seed=0, dims=(5, 3)):
    """A policy that reads normalized observations and a value function, LayerNorms included."""
    torch.manual_seed(seed)
    normalizer = pg.Normalizer(*dims)
    policy = pg.GaussianPolicy(
        *dims, width, num_layers, 0.6, normed_inputs=True, normalizer=normalizer
    )
    value_function = pg.ValueFunction(dims[0], width, num_layers)
    for module in (policy, value_function):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return policy.to(dtype), value_function.to(dtype), normalizer.to(dtype)


def make_batch(batch=7, steps=4, dtype=torch.float64, seed=0, dims=(5, 3)) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    inputs, shape = draw(batch, steps, dims[0]), (batch, steps)
    weights = (torch.rand(shape, generator=g) < 0.8).to(dtype)
    return Batch(inputs, inputs, draw(dims[1], *shape), draw(*shape), draw(*shape), weights)


def assert_same(got, wanted):
    for name, value in vars(wanted).items():
        if name != "gradients":
            found = getattr(got, name)
            torch.testing.assert_close(found.expand_as(value), value, rtol=1e-9, atol=1e-12)
    for g, w in zip(got.gradients, wanted.gradients, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 40),
    steps=st.integers(1, 12),
    width=st.sampled_from([1, 3, 16, 40]),
    num_layers=st.integers(1, 3),
    block=st.sampled_from([64, 500, 10**6]),
    saturation_coef=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_passes_written_out_equal_autograd(
    batch, steps, width, num_layers, block, saturation_coef, seed
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explicit_mlp, "BLOCK_SIZE", block)
        policy, value_function, normalizer = make_networks(width, num_layers, seed=seed)
        data = make_batch(batch, steps, seed=seed)
        config = pg.A2CConfig(entropy_coef=0.1, saturation_coef=saturation_coef)
        explicit, plain = ExplicitActor(policy), AutogradActor(policy, normalizer)
        for _ in range(2):  # nothing is left of the first
            wanted = plain.gradients(data, config)
            assert_same(explicit.gradients(data, config), wanted)
        for got, value in zip(
            explicit.moments(data.policy_inputs), plain.moments(data.policy_inputs), strict=True
        ):
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)
        explicit, plain = ExplicitCritic(value_function), AutogradCritic(value_function)
        others = make_networks(width, num_layers, seed=seed + 1)[1].state_dict()
        args = others, data.value_inputs
        torch.testing.assert_close(explicit.values(*args), plain.values(*args), rtol=1e-9, atol=0)
        assert_same(explicit.gradients(data), plain.gradients(data))


def test_rounding_is_that_of_autograd():
    """Errors of float32 gradients, from float64, are at most twice autograd's."""
    policy, _, normalizer = make_networks(64, dtype=torch.float32)
    data, config = make_batch(64, 10, torch.float32), pg.A2CConfig()
    exact_policy = copy.deepcopy(policy).double()
    exact_batch = Batch(*(tensor.double() for tensor in vars(data).values() if tensor is not None))
    exact = AutogradActor(exact_policy, copy.deepcopy(normalizer).double())
    wanted = exact.gradients(exact_batch, config).gradients
    errors = []
    for passes in (ExplicitActor(policy), AutogradActor(policy, normalizer)):
        got = passes.gradients(data, config).gradients
        pairs = zip(got, wanted, strict=True)
        errors.append([((g - w).norm() / w.norm()).item() for g, w in pairs])
    assert all(0 < ours <= 2 * theirs for ours, theirs in zip(*errors, strict=True))


def test_frozen_parameters_have_no_gradient():
    policy, value_function, normalizer = make_networks()
    policy.log_std.requires_grad_(False)
    policy.network[1].requires_grad_(False)
    value_function.network[0].requires_grad_(False)
    got = ExplicitActor(policy).gradients(make_batch(), pg.A2CConfig())
    assert_same(got, AutogradActor(policy, normalizer).gradients(make_batch(), pg.A2CConfig()))
    assert [g is None for g in got.gradients].count(True) == 3
    got = ExplicitCritic(value_function).gradients(make_batch())
    assert_same(got, AutogradCritic(value_function).gradients(make_batch()))
    assert [g is None for g in got.gradients][:2] == [True, True]


def test_a_frozen_policy_makes_no_graph():
    policy, _, _ = make_networks()
    got = ExplicitActor(policy).gradients(make_batch(), pg.A2CConfig())
    assert not any(t.requires_grad for t in (*got.gradients, got.loss, got.mean, got.std))


def test_other_weights_are_read_anew():
    network = mlp(4, 6, 2, 2)
    passes, inputs = ExplicitMLP(network), torch.randn(9, 4)
    for _ in range(2):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        passes.read(list(network.parameters()))
        torch.testing.assert_close(
            passes.outputs(inputs), network(inputs).t(), rtol=1e-5, atol=1e-6
        )


class Own(pg.GaussianPolicy):
    pass


CHANGES = {
    "a forward hook": lambda m: m.network[1].register_forward_hook(lambda *_: None),
    "a backward hook": lambda m: m.network[0].register_full_backward_hook(lambda *_: None),
    "a parameter's hook": lambda m: m.network[0].weight.register_hook(lambda g: g),
    "a hook after its gradient": lambda m: m.network[0].weight.register_post_accumulate_grad_hook(
        lambda p: None
    ),
    "another activation": lambda m: m.network.__setitem__(2, torch.nn.ReLU()),
    "another epsilon": lambda m: setattr(m.network[1], "eps", 1e-5),
    "another device": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_networks_are_differentiated_by_autograd(name):
    policy, value_function, normalizer = make_networks()
    actor, critic = actor_passes(policy, normalizer, None), critic_passes(value_function, None)
    assert isinstance(actor, ExplicitActor) and isinstance(critic, ExplicitCritic)
    assert actor_passes(policy, normalizer, actor) is actor
    assert critic_passes(value_function, critic) is critic
    CHANGES[name](policy)
    CHANGES[name](value_function)
    assert isinstance(actor_passes(policy, normalizer, actor), AutogradActor)
    assert isinstance(critic_passes(value_function, critic), AutogradCritic)


def test_a_class_of_ones_own_is_differentiated_by_autograd():
    normalizer = pg.Normalizer(5, 3)
    assert isinstance(actor_passes(Own(5, 3, 8), normalizer, None), AutogradActor)
    module = torch.nn.Sequential(torch.nn.Linear(5, 1), torch.nn.Flatten(-2))
    assert isinstance(critic_passes(module, None), AutogradCritic)


def test_passes_follow_the_weights_dtype():
    policy, value_function, normalizer = make_networks(dtype=torch.float32)
    actor, critic = actor_passes(policy, normalizer, None), critic_passes(value_function, None)
    policy.double(), value_function.double()
    data = make_batch()
    got = actor_passes(policy, normalizer.double(), actor).gradients(data, pg.A2CConfig())
    assert_same(got, AutogradActor(policy, normalizer).gradients(data, pg.A2CConfig()))
    got = critic_passes(value_function, critic).gradients(data)
    assert_same(got, AutogradCritic(value_function).gradients(data))


@pytest.mark.parametrize("written_out", [True, False])
def test_a_reaction_is_what_autograd_says(written_out):
    """Of what a policy's actions change with its observations, the drawn normals held."""
    torch.manual_seed(0)
    policy = pg.GaussianPolicy(4, 2, 12, 2, 0.6).double()
    inputs, actions = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 2).double()
    passes = ExplicitActor(policy) if written_out else AutogradActor(policy, pg.Normalizer(4, 2))
    react, gradient = passes.reaction(inputs, actions), torch.randn(5, 2).double()
    for t in range(3):
        leaves = inputs[t].clone().requires_grad_()
        mean, _ = policy(leaves)
        (wanted,) = torch.autograd.grad(mean, leaves, gradient)
        torch.testing.assert_close(react(t, gradient), wanted)


def test_a_reaction_moves_actions_as_drawn():
    """A deviation that depends on the state moves an action in units of what was drawn."""

    class Cautious(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4).double()

        def forward(self, observations):
            mean, log_std = self.layer(observations).chunk(2, dim=-1)
            return mean, log_std.exp()

    torch.manual_seed(0)
    policy, gradient = Cautious(), torch.randn(5, 2).double()
    inputs, z = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 2).double()
    mean, std = policy(inputs)
    react = AutogradActor(policy, pg.Normalizer(4, 2)).reaction(inputs, (mean + std * z).detach())
    leaves = inputs[1].clone().requires_grad_()
    mean, std = policy(leaves)
    (wanted,) = torch.autograd.grad(mean + std * z[1], leaves, gradient)
    torch.testing.assert_close(react(1, gradient), wanted)


def test_a_value_function_that_does_not_look_has_no_slope():
    class Same(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, observations):
            return self.value.expand(observations.shape[:-1])

    weights = {"value": torch.tensor(3.0)}
    values, slopes = AutogradCritic(Same()).values_and_slopes(weights, torch.randn(3, 5, 4))
    assert (values == 3.0).all() and slopes.shape == (3, 5, 4) and not slopes.any()


def test_slopes_of_values_are_what_autograd_says():
    torch.manual_seed(0)
    value_function = pg.ValueFunction(4, 12).double()
    weights = {
        name: weight.detach() + 0.1 * torch.randn_like(weight)
        for name, weight in value_function.named_parameters()
    }
    observations = torch.randn(3, 5, 4).double()
    got = ExplicitCritic(value_function).values_and_slopes(weights, observations)
    wanted = AutogradCritic(value_function).values_and_slopes(weights, observations)
    for tensor, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(tensor, other)
    assert wanted[1].abs().max() > 0.01
