"""The pathwise policy gradient: against autograd through a whole rollout, and against what the
score function estimates."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg
from polygrad_fast.denoisers.dynamics import Dynamics
from polygrad_fast.denoisers.one_step import OneStepNetwork
from polygrad_fast.learners.passes import (
    AutogradActor,
    AutogradCritic,
    ExplicitActor,
    ExplicitCritic,
    actor_passes,
)
from polygrad_fast.learners.pathwise import Steps, action_sensitivities
from polygrad_fast.protocols import policy_moments

S, A = 4, 2
BOUNDS = torch.tensor([-0.9, -1.0]), torch.tensor([0.7, 1.0])


def make_normalizer() -> pg.Normalizer:
    return pg.Normalizer.from_moments(
        observations=(torch.arange(S).float(), torch.linspace(0.5, 2.0, S)),
        actions=(torch.tensor([0.2, -0.4]), torch.tensor([0.6, 1.3])),
        rewards=(1.5, 3.0),
    )


def make_world(seed=0, normed_inputs=True, logit=-2.0, dtype=torch.float64):
    """A network of one step, policy and value function; terminal flags have about this logit."""
    torch.manual_seed(seed)
    normalizer = make_normalizer().to(dtype)
    network = OneStepNetwork(S, A, 24, 3).to(dtype)
    network.difference_scale.fill_(0.3)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2.0)
        network.network[-1].bias[-1] = logit
    policy = pg.GaussianPolicy(S, A, 12, 2, 0.6, normed_inputs=normed_inputs, normalizer=normalizer)
    value_function = pg.ValueFunction(S, 12)
    dynamics = Dynamics(network, normalizer, tuple(bound.to(dtype) for bound in BOUNDS))
    return network, normalizer, policy.to(dtype), value_function.to(dtype), dynamics


def rolled_out(network, normalizer, policy, starts, noise):
    """Observations [H][B, S], raw actions, normalized rewards and logits, all in one graph."""
    low, high = (bound.to(starts.dtype) for bound in BOUNDS)
    observation, steps = starts, []
    for z in noise:
        mean, std = policy_moments(policy, normalizer, observation, True)
        action = mean + std * z
        seen = normalizer.normalize(action.clamp(low, high), "actions")
        difference, reward, logit = network(observation, seen)
        steps.append((observation, action, reward, logit))
        observation = observation + network.difference_scale * difference
    return [list(column) for column in zip(*steps, strict=True)]


def returns_of(rewards, logits, values, gamma, gae_lambda):
    """Lambda-returns [T][B], each step going on with its own probability."""
    future, found = values[-1], []
    for t in reversed(range(len(rewards) - 1)):
        following = (1 - gae_lambda) * values[t + 1] + gae_lambda * future
        future = rewards[t] + gamma * torch.sigmoid(-logits[t]) * following
        found.insert(0, future)
    return found


@pytest.mark.parametrize("ranged", [True, False])
@pytest.mark.parametrize("bounds", [True, False])
def test_steps_are_differentiated_as_by_autograd(bounds, ranged):
    network, normalizer, *_ = make_world()
    if ranged:
        network.range.lowest.fill_(-0.8)
        network.range.highest.fill_(0.5)
    limits = tuple(b.double() for b in BOUNDS) if bounds else None
    g = torch.Generator().manual_seed(1)
    observations, actions = (torch.randn(9, n, generator=g).double() for n in (S, A))
    assert ((actions < BOUNDS[0]) | (actions > BOUNDS[1])).any()
    leaves = [tensor.clone().requires_grad_() for tensor in (observations, actions)]
    seen = leaves[1].clamp(*limits) if bounds else leaves[1]
    difference, reward, logit = network(leaves[0], normalizer.normalize(seen, "actions"))
    free = leaves[0] + network.difference_scale * difference, reward
    following, reward = network.range.clamp(*free)
    for cut, whole in zip((following, reward), free, strict=True):
        assert 0 < (cut != whole).sum() < cut.numel() if ranged else torch.equal(cut, whole)
    slopes = torch.randn(9, S, generator=g).double(), *torch.randn(2, 9, generator=g).double()
    rows = slice(2, 7)
    outputs = [tensor[rows] for tensor in (following, reward, logit)]
    slopes = [slope[rows] for slope in slopes]
    wanted = torch.autograd.grad(outputs, leaves, slopes)
    linearized = Dynamics(network, normalizer, limits).linearize(
        observations, actions, following.detach(), reward.detach()
    )
    torch.testing.assert_close(linearized.logits, logit.detach())
    for got, gradient in zip(linearized.pull_back(rows, *slopes), wanted, strict=True):
        torch.testing.assert_close(got, gradient[rows])


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 5),
    horizon=st.integers(2, 7),
    gae_lambda=st.sampled_from([0.0, 0.7, 1.0]),
    normed_inputs=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sensitivities_are_those_of_the_whole_rollout(
    batch, horizon, gae_lambda, normed_inputs, seed
):
    network, normalizer, policy, value_function, dynamics = make_world(seed, normed_inputs)
    g = torch.Generator().manual_seed(seed)
    starts = torch.randn(batch, S, generator=g).double()
    noise = torch.randn(horizon, batch, A, generator=g).double()
    columns = rolled_out(network, normalizer, policy, starts, noise)
    observations, actions, rewards, logits = columns
    values = [value_function(observation) for observation in observations]
    scaled = [2.5 * reward + 1.0 for reward in rewards]  # as the critic learns from them
    returns = returns_of(scaled, logits, values, 0.97, gae_lambda)
    wanted = [
        torch.autograd.grad(returns[t].sum(), actions[t], retain_graph=True)[0]
        for t in range(horizon - 1)
    ]
    slopes = [torch.autograd.grad(v.sum(), o, retain_graph=True)[0] for v, o in
              zip(values[1:], observations[1:], strict=True)]  # fmt: skip
    steps = Steps(
        *(
            torch.stack(column).detach()
            for column in (observations, actions[:-1], scaled[:-1], rewards[:-1])
        ),
        torch.zeros(horizon - 1, batch, dtype=torch.float64),
        torch.stack(values).detach(),
        torch.stack([torch.zeros_like(starts), *slopes]),
    )
    found, sensitivities = action_sensitivities(
        steps,
        dynamics,
        reaction_of(policy, normalizer, steps.observations, steps.actions),
        2.5,
        0.97,
        gae_lambda,
    )
    torch.testing.assert_close(found, torch.stack(returns).detach())
    torch.testing.assert_close(sensitivities, torch.stack(wanted))


def reaction_of(policy, normalizer, observations, actions):
    """In normalized observations, of passes written out where they are."""
    passes = actor_passes(policy, normalizer, None)
    if policy.normed_inputs:
        return passes.reaction(observations[:-1], actions)
    raw = normalizer.unnormalize(observations[:-1], "observations")
    react = passes.reaction(raw, actions)
    return lambda t, gradient: react(t, gradient) * normalizer.observations_scale


def learner_of(world, **options):
    _, normalizer, policy, value_function, dynamics = world
    config = pg.A2CConfig(gradient_estimator="pathwise", terminal_step_weight=1.0, **options)
    return pg.ActorCritic(policy, value_function, normalizer, config, None, dynamics)


@pytest.mark.parametrize("bootstrap", ["target", "lesser"])
@pytest.mark.parametrize("normed_inputs", [True, False])
def test_a_learners_sensitivities_are_those_of_the_whole_rollout(normed_inputs, bootstrap):
    """In whatever space policy and value function read."""
    network, normalizer, policy, value_function, _ = world = make_world(2, normed_inputs, -3.0)
    options = {"bootstrap": bootstrap, "target_critic_decay": 1.0}
    learner = learner_of(world, gae_lambda=0.7, **options)
    target = learner.target_value_function
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    g = torch.Generator().manual_seed(0)
    starts = torch.randn(5, S, generator=g).double()
    noise = torch.randn(6, 5, A, generator=g).double()
    columns = rolled_out(network, normalizer, policy, starts, noise)
    observations, actions, rewards, logits = columns
    if not normed_inputs:
        rewards = [normalizer.unnormalize(reward, "rewards") for reward in rewards]
        observations = [normalizer.unnormalize(o, "observations") for o in observations]
    values = [target(observation) for observation in observations]
    if bootstrap == "lesser":
        own = [value_function(observation) for observation in observations]
        lower = torch.stack(own) < torch.stack(values)
        assert lower.any() and not lower.all()
        values = [torch.minimum(*pair) for pair in zip(values, own, strict=True)]
    returns = returns_of(rewards, logits, values, learner.config.gamma, 0.7)
    wanted = [
        torch.autograd.grad(returns[t].sum(), actions[t], retain_graph=True)[0] for t in range(5)
    ]
    observations, actions, rewards, _ = (torch.stack(c, dim=1).detach() for c in columns)
    actions, flags = normalizer.normalize(actions, "actions"), torch.zeros(5, 6).double()
    learner._choose_passes()
    batch, _ = learner._batch(
        observations, actions, rewards, flags, learner.config, learner._dynamics
    )
    torch.testing.assert_close(batch.pathwise.sensitivities, torch.stack(wanted).permute(2, 1, 0))


def imagined(world, number, horizon, seed=0):
    network, normalizer, policy, _, _ = world
    g = torch.Generator().manual_seed(seed)
    dtype = policy.log_std.dtype
    starts = torch.randn(number, S, generator=g).to(dtype)
    noise = torch.randn(horizon, number, A, generator=g).to(dtype)
    with torch.no_grad():
        columns = rolled_out(network, normalizer, policy, starts, noise)
    observations, actions, rewards, logits = (torch.stack(c, dim=1) for c in columns)
    actions = normalizer.normalize(actions, "actions")
    return observations, actions, rewards, (logits > 0).to(dtype)


@pytest.mark.parametrize(("gae_lambda", "normed_inputs"), [(0.0, True), (0.6, False), (1.0, True)])
def test_it_is_the_expected_gradient_of_the_score_function(gae_lambda, normed_inputs):
    """Both estimate one gradient, where trajectories do not end; of 100 parts, within five standard
    errors of every weight's, and with less variance."""
    world = make_world(3, normed_inputs, logit=-40.0)
    options = {"gae_lambda": gae_lambda, "normalize_advantages": False, "entropy_coef": 0.0}
    learner = learner_of(world, **options)
    score = replace(learner.config, gradient_estimator="score")
    parts = {"score": [], "pathwise": []}
    for seed in range(100):
        batch = imagined(world, 200, 4, seed)
        assert batch[3].sum() == 0
        parts["pathwise"].append(learner.actor_gradient(*batch))
        parts["score"].append(learner.actor_gradient(*batch, score))
    score, pathwise = (torch.stack(parts[name]) for name in ("score", "pathwise"))
    difference = score - pathwise
    error = difference.mean(0) / (difference.std(0) / len(difference) ** 0.5 + 1e-12)
    assert error.abs().max() < 5, error.abs().max()
    assert pathwise.var(0).sum() < 0.3 * score.var(0).sum()
    direction = torch.nn.functional.cosine_similarity(score.mean(0), pathwise.mean(0), dim=0)
    assert direction > 0.95


def test_what_follows_a_terminal_step_changes_nothing():
    """A step that ends is worth its reward, and steps after it have no weight."""
    world = make_world(logit=0.0)
    learner = learner_of(world, entropy_coef=0.0)
    observations, actions, rewards, _ = imagined(world, 6, 5)
    flags = torch.zeros(6, 5, dtype=torch.float64)
    flags[:, 2:] = 1.0
    observations[:, 3:] = observations[:, 2:3]  # as a world model leaves it
    wanted = learner.actor_gradient(observations, actions, rewards, flags)
    actions, rewards = actions.clone(), rewards.clone()
    actions[:, 3:] += 1.0
    rewards[:, 3:] += 1.0
    torch.testing.assert_close(
        learner.actor_gradient(observations, actions, rewards, flags), wanted
    )
    rewards[:, 0] += 1.0  # of an action that none comes before: its gradient is not in its value
    torch.testing.assert_close(
        learner.actor_gradient(observations, actions, rewards, flags), wanted
    )


@pytest.mark.parametrize("normed_inputs", [True, False])
@pytest.mark.parametrize("saturation_coef", [0.0, 0.1])
def test_passes_written_out_equal_autograd(saturation_coef, normed_inputs):
    world = make_world(normed_inputs=normed_inputs)
    learner = learner_of(world, entropy_coef=0.1, saturation_coef=saturation_coef)
    batch = imagined(world, 7, 5)
    flags = torch.zeros_like(batch[3])
    flags[::2, 3:] = 1.0
    batch = (*batch[:3], flags)
    explicit = learner.actor_gradient(*batch)
    written_out, learner._choose_passes = learner._actor, lambda: None
    assert type(written_out) is ExplicitActor and type(learner._critic) is ExplicitCritic
    learner._actor = AutogradActor(learner.policy, learner.normalizer)
    learner._critic = AutogradCritic(learner.value_function)
    torch.testing.assert_close(explicit, learner.actor_gradient(*batch))
    data, _ = learner._batch(*batch, learner.config, learner._dynamics)
    losses = [
        passes.gradients(data, learner.config).loss for passes in (learner._actor, written_out)
    ]
    torch.testing.assert_close(*losses)


def test_an_update_improves_the_imagined_return():
    """Of the same starts and chance, step by step."""
    world = make_world(5, logit=-10.0, dtype=torch.float32)
    learner = learner_of(
        world, gae_lambda=1.0, reward_rms=0.3, actor_learning_rate=1e-2, target_update=0.05
    )
    network, normalizer, policy, value_function, _ = world

    def score():
        g = torch.Generator().manual_seed(99)
        starts, noise = torch.randn(512, S, generator=g), torch.randn(5, 512, A, generator=g)
        with torch.no_grad():
            _, _, rewards, _ = rolled_out(network, normalizer, policy, starts, noise)
        return torch.stack(rewards[:-1]).mean().item()

    before, weights = score(), copy.deepcopy(value_function.state_dict())
    for seed in range(40):
        found = learner.update(*imagined(world, 64, 5, seed))
        assert found["update_size"] < 0.1
    assert score() > before + 0.1
    assert any((weights[k] != v).any() for k, v in value_function.state_dict().items())


def test_a_policy_that_does_not_look_reacts_to_nothing():
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(A))

        def forward(self, observations):
            mean = self.mean.expand(*observations.shape[:-1], A)
            return mean, torch.full_like(mean, 0.5)

    network, normalizer, _, value_function, dynamics = make_world(dtype=torch.float32)
    policy = Blind()
    world = network, normalizer, policy, value_function, dynamics
    config = pg.A2CConfig(gradient_estimator="pathwise")
    learner = pg.ActorCritic(policy, value_function, normalizer, config, True, dynamics)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 8, A, generator=g)
    with torch.no_grad():
        columns = rolled_out(*world[:3], torch.randn(8, S, generator=g), noise)
    observations, actions, rewards, logits = (torch.stack(c, dim=1) for c in columns)
    actions = normalizer.normalize(actions, "actions")
    gradient = learner.actor_gradient(observations, actions, rewards, (logits > 0).float())
    assert gradient.shape == (A,) and gradient.abs().min() > 0


def test_without_dynamics_it_is_refused():
    _, normalizer, policy, value_function, dynamics = make_world()
    for known, wanted in ((dynamics, "pathwise"), (None, "score")):
        config = pg.A2CConfig(gradient_estimator="auto")
        learner = pg.ActorCritic(policy, value_function, normalizer, config, None, known)
        assert learner.config.gradient_estimator == wanted
    with pytest.raises(pg.InputError, match="must be 'score' for a world model without one"):
        pg.ActorCritic(
            policy, value_function, normalizer, pg.A2CConfig(gradient_estimator="pathwise")
        )
    with pytest.raises(pg.InputError, match="must be 'score' for a world model without one"):
        learner.actor_gradient(
            *(torch.zeros(2, 3, n).double() for n in (S, A)),
            *torch.zeros(2, 2, 3).double(),
            replace(config, gradient_estimator="pathwise"),
        )
    with pytest.raises(pg.InputError, match="gradient_estimator must be"):
        pg.A2CConfig(gradient_estimator="reinforce")
