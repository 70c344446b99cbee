import copy
import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrize

import polygrad_fast as pg
from polygrad_fast.learners.advantages import generalized_advantages, standardized, step_weights
from polygrad_fast.policy import log_prob

S, A, B, H = 4, 2, 16, 6
FIELDS = ("observations", "actions", "rewards", "terminals")


def make_normalizer() -> pg.Normalizer:
    return pg.Normalizer.from_moments(
        observations=(torch.arange(S).float(), torch.linspace(0.5, 2.0, S)),
        actions=(torch.tensor([0.2, -0.4]), torch.tensor([0.6, 1.3])),
        rewards=(1.5, 3.0),
    )


def make_actor_critic(config=None, normed_inputs=True, seed=0) -> pg.ActorCritic:
    torch.manual_seed(seed)
    normalizer = make_normalizer()
    policy = pg.GaussianPolicy(
        S, A, 16, init_std=0.6, normed_inputs=normed_inputs, normalizer=normalizer
    )
    return pg.ActorCritic(policy, pg.ValueFunction(S, 16), normalizer, config)


def make_batch(seed=0, batch=B, horizon=H, terminal_rate=0.1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "observations": torch.randn(batch, horizon, S, generator=g),
        "actions": torch.randn(batch, horizon, A, generator=g),
        "rewards": torch.randn(batch, horizon, generator=g),
        "terminals": (torch.rand(batch, horizon, generator=g) < terminal_rate).float(),
    }


class StateDependent(torch.nn.Module):
    """A policy of the user's: raw observations, and nothing but forward."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(S, 16), torch.nn.Tanh())
        self.head = torch.nn.Linear(16, 2 * A)

    def forward(self, observations):
        mean, log_std = self.head(self.body(observations)).chunk(2, -1)
        return mean, 0.5 + log_std.exp()


class Wrapped(torch.nn.Module):
    """A Gaussian policy behind the protocol alone."""

    def __init__(self, policy, normed_inputs):
        super().__init__()
        self.inner, self.normed_inputs = policy, normed_inputs

    def forward(self, observations):
        return self.inner(observations)

    def distribution(self, inputs):
        return self.inner.distribution(inputs)


@pytest.mark.parametrize("normed_inputs", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"reward_rms": 0.1}, {"saturation_coef": 0.3}, {"normalize_advantages": False}]
)
def test_the_actors_gradient_is_what_an_update_follows(monkeypatch, normed_inputs, options):
    """Without a limit of its norm; nothing is changed by asking for it."""
    config = pg.A2CConfig(max_grad_norm=None, target_critic_decay=0.5, **options)
    actor_critic = make_actor_critic(config, normed_inputs)
    actor_critic.update(**make_batch(1))  # the target critic is another network than the critic
    before = copy.deepcopy([m.state_dict() for m in actor_critic.modules().values()])
    for p in actor_critic.policy.parameters():
        p.grad = None
    gradient = actor_critic.actor_gradient(**make_batch())
    assert all(p.grad is None for p in actor_critic.policy.parameters())
    for module, state in zip(actor_critic.modules().values(), before, strict=True):
        assert all(torch.equal(state[name], t) for name, t in module.state_dict().items())
    followed = []

    def step(skip):
        parameters = actor_critic.policy.parameters()
        followed.append(torch.cat([p.grad.flatten() for p in parameters]))

    monkeypatch.setattr(actor_critic.actor_optimizer, "step", step)
    actor_critic.update(**make_batch())
    assert gradient.abs().max() > 0
    assert torch.allclose(gradient, followed[0], rtol=1e-5, atol=1e-8)
    other = actor_critic.actor_gradient(**make_batch(), config=replace(config, gae_lambda=0.0))
    assert not torch.allclose(gradient, other, rtol=0.1)


def test_an_actors_gradient_that_is_not_finite_is_refused():
    batch = make_batch()
    batch["rewards"][0, 0] = math.nan
    with pytest.raises(pg.NonFiniteError, match="gradient of the actor's loss is not finite"):
        make_actor_critic().actor_gradient(**batch)
    with pytest.raises(pg.InputError, match="rewards must be of shape"):
        make_actor_critic().actor_gradient(**{**make_batch(), "rewards": torch.zeros(B, H, 1)})


@pytest.mark.parametrize("normed_inputs", [False, True])
def test_a_policy_behind_the_protocol_learns_the_same(normed_inputs):
    """But for the clip, which then includes log-std."""
    config = pg.A2CConfig(max_grad_norm=None, actor_learning_rate=1e-2)
    plain, wrapped = (make_actor_critic(config, normed_inputs) for _ in range(2))
    wrapped = pg.ActorCritic(
        Wrapped(wrapped.policy, normed_inputs), wrapped.value_function, wrapped.normalizer, config
    )
    for seed in range(3):
        metrics = plain.update(**make_batch(seed)), wrapped.update(**make_batch(seed))
        log_std_norm = metrics[0].pop("log_std_grad_norm")
        norms = [m.pop("actor_grad_norm") for m in metrics]
        assert norms[1] == pytest.approx(math.hypot(norms[0], log_std_norm), rel=1e-5)
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-6)
    for wanted, got in zip(plain.policy.parameters(), wrapped.policy.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_an_own_policy_is_clipped_whole():
    torch.manual_seed(0)
    config = pg.A2CConfig(max_grad_norm=1e-3)
    policy = StateDependent()
    actor_critic = pg.ActorCritic(policy, pg.ValueFunction(S, 16), make_normalizer(), config)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = actor_critic.update(**make_batch())
    assert "log_std_grad_norm" not in metrics and metrics["actor_grad_norm"] > 1e-3
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert all(not torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))
    with torch.no_grad():
        observations = actor_critic.normalizer.unnormalize(
            make_batch()["observations"], "observations"
        )
        _, std = policy(observations[:, :-1])
    assert metrics["policy_std"] == pytest.approx(std.mean().item(), rel=1e-2)


def test_the_value_function_may_read_another_space_than_the_policy():
    torch.manual_seed(0)
    policy, normalizer = StateDependent(), make_normalizer()
    actor_critic = pg.ActorCritic(
        policy, pg.ValueFunction(S, 16), normalizer, pg.A2CConfig(), normed_inputs=True
    )
    seen, batch = {}, make_batch()

    def remember(module, inputs):
        seen.setdefault(type(module).__name__, inputs[0].detach().clone())

    policy.register_forward_pre_hook(remember)
    actor_critic.value_function.register_forward_pre_hook(remember)
    metrics = actor_critic.update(**batch)
    assert torch.equal(seen["ValueFunction"], batch["observations"])
    raw = normalizer.unnormalize(batch["observations"], "observations")
    assert torch.equal(seen["StateDependent"], raw[:, :-1])
    assert metrics["reward"] == pytest.approx(batch["rewards"].mean().item(), abs=1e-6)


def test_what_a_policy_lacks_is_said():
    arguments = pg.ValueFunction(S, 16), make_normalizer(), pg.A2CConfig(saturation_coef=0.1)
    with pytest.raises(
        pg.InputError,
        match=r"saturation_coef must be 0 .* module `net.*got 0.1 and a StateDependent",
    ):
        pg.ActorCritic(StateDependent(), *arguments)
    policy = StateDependent()
    policy.network = torch.nn.Identity()
    with pytest.raises(pg.InputError, match=r"a call of the policy StateDependent, got \[\]"):
        pg.ActorCritic(policy, *arguments)
    pg.ActorCritic(pg.GaussianPolicy(S, A, 16), *arguments)
    with pytest.raises(
        pg.InputError, match="policy must be a torch.nn.Module to be trained, got <lambda>"
    ):
        pg.ActorCritic(lambda observations: observations, *arguments)


class Halved(pg.GaussianPolicy):
    def distribution(self, inputs):
        mean, std = super().distribution(inputs)
        return 0.5 * mean, std


class Shifted(pg.GaussianPolicy):
    def forward(self, observations):
        mean, std = super().forward(observations)
        return mean + 0.5, std


def hooked(*arguments, **options):
    policy = pg.GaussianPolicy(*arguments, **options)
    policy.register_forward_hook(lambda module, inputs, output: (0.1 * output[0], output[1]))
    return policy


@pytest.mark.parametrize("make", [pg.GaussianPolicy, Halved, Shifted, hooked])
def test_saturation_is_penalized_in_the_policy_as_it_is(make):
    """Its moments are its own, whichever way they come from the network's outputs."""
    results, policies = [], []
    for coef in (0.0, 0.1):
        torch.manual_seed(0)
        policies.append(make(S, A, 16, init_std=0.6))
        config = pg.A2CConfig(saturation_coef=coef, max_grad_norm=None)
        learner = pg.ActorCritic(policies[-1], pg.ValueFunction(S, 16), make_normalizer(), config)
        inputs = learner.normalizer.unnormalize(make_batch()["observations"], "observations")
        outputs = policies[-1].network(inputs[:, :-1])
        results.append(learner.update(**make_batch()))
    penalty = 0.1 * outputs.square().mean().item()
    got = results[1]["actor_loss"] - results[0]["actor_loss"]
    assert penalty > 1e-4 and got == pytest.approx(penalty, rel=1e-3)
    for name in ("action_mean", "action_std", "policy_std"):
        assert results[1][name] == results[0][name]
    assert results[1]["update_size_initial"] < 0.1, "of the moments that were differentiated"
    assert not policies[1].network._forward_hooks


def test_a_parametrized_log_std_is_clipped_with_the_rest():
    class Bounded(torch.nn.Module):
        def forward(self, x):
            return x.clamp(-1.0, 1.0)

    actor_critic = make_actor_critic()
    parametrize.register_parametrization(actor_critic.policy, "log_std", Bounded())
    actor_critic = pg.ActorCritic(
        actor_critic.policy, actor_critic.value_function, actor_critic.normalizer
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = actor_critic.update(**make_batch())
    assert "log_std_grad_norm" not in metrics


def test_a_frozen_log_std():
    actor_critic = make_actor_critic()
    actor_critic.policy.log_std.requires_grad_(False)
    before = actor_critic.policy.log_std.clone()
    assert "log_std_grad_norm" not in actor_critic.update(**make_batch())
    assert torch.equal(actor_critic.policy.log_std, before)


@pytest.mark.parametrize("batch", [1, 128, 2000])
def test_policy_std_is_the_mean_of_the_policys_std(batch):
    """Not of it expanded to every step, whose float32 mean is 1e-5 to 1e-4 off."""
    actor_critic = make_actor_critic()
    with torch.no_grad():
        actor_critic.policy.log_std.copy_(torch.tensor([0.123, -0.456]))
    std, entropy = actor_critic.policy.std.double(), 0.5 * math.log(2 * math.pi * math.e)
    metrics = actor_critic.update(**make_batch(batch=batch, horizon=10))
    assert metrics["policy_std"] == pytest.approx(std.mean().item(), rel=2e-7)
    wanted = (std.log() + entropy).sum().item()
    assert metrics["entropy"] == pytest.approx(wanted, rel=5e-7)


def snapshot(actor_critic):
    """Every weight, optimizer moment and learned number."""
    state = copy.deepcopy(actor_critic.state_dict())
    return state, copy.deepcopy({n: m.state_dict() for n, m in actor_critic.modules().items()})


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b


def policy_vector(actor_critic) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in actor_critic.policy.parameters()])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    horizon=st.integers(1, 9),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_gae_against_the_sum_of_its_definition(batch, horizon, gamma, gae_lambda, rate, seed):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, batch, horizon, generator=g, dtype=torch.float64)
    terminals = (torch.rand(batch, horizon, generator=g) < rate).double()
    got = generalized_advantages(rewards, values, terminals, gamma, gae_lambda)
    assert got.shape == (batch, horizon - 1)
    for b in range(batch):
        for t in range(horizon - 1):
            wanted, weight = 0.0, 1.0
            for u in range(t, horizon - 1):
                alive = 1 - terminals[b, u].item()
                bootstrap = gamma * alive * values[b, u + 1].item()
                wanted += weight * (rewards[b, u].item() + bootstrap - values[b, u].item())
                weight *= gamma * gae_lambda * alive
            assert got[b, t].item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("normed_inputs", [False, True])
@pytest.mark.parametrize("moments", [None, "all", "counted"])
def test_losses_against_a_naive_loop(normed_inputs, moments):
    config = pg.A2CConfig(entropy_coef=0.1, normalize_advantages=moments is not None)
    config = config if moments is None else replace(config, advantage_moments=moments)
    actor_critic = make_actor_critic(config, normed_inputs)
    batch, normalizer = make_batch(terminal_rate=0.2), actor_critic.normalizer
    observations, rewards = batch["observations"], batch["rewards"]
    if not normed_inputs:
        observations = normalizer.unnormalize(observations, "observations")
        rewards = normalizer.unnormalize(rewards, "rewards")
    actions = normalizer.unnormalize(batch["actions"], "actions")
    with torch.no_grad():
        mean, std = actor_critic.policy.distribution(observations)
        values = actor_critic.value_function(observations)
    terminals = batch["terminals"]
    advantages = generalized_advantages(rewards, values, terminals, config.gamma, config.gae_lambda)
    counted = advantages
    if moments == "counted":
        ended = [[terminals[b, : t + 1].any() for t in range(H - 1)] for b in range(B)]
        counted = advantages[~torch.tensor(ended)]
        assert 0 < len(counted) < advantages.numel()
    standard = (advantages - counted.mean()) / (counted.std() + 1e-8)
    actor_loss = critic_loss = 0.0
    for b in range(B):
        for t in range(H - 1):
            if terminals[b, : t + 1].any():
                break
            pi = torch.distributions.Normal(mean[b, t], std[b, t])
            advantage = (advantages if moments is None else standard)[b, t]
            actor_loss -= (pi.log_prob(actions[b, t]).sum() * advantage).item()
            actor_loss -= 0.1 * pi.entropy().sum().item()
            critic_loss += 0.5 * advantages[b, t].item() ** 2  # target - value, before any step
    metrics = actor_critic.update(**batch)
    assert metrics["actor_loss"] == pytest.approx(actor_loss / (B * (H - 1)), rel=1e-4, abs=1e-5)
    assert metrics["critic_loss"] == pytest.approx(critic_loss / (B * (H - 1)), rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_step_weights(weight):
    terminals = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    wanted = [[1, 1, 1], [1, weight, 0], [weight, 0, 0], [1, 1, weight]]
    assert step_weights(terminals, weight).tolist() == wanted


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_moments_count_steps_by_their_weight(weight):
    steps = torch.tensor([[3.0, -1.0, 2.0, 7.0]])
    weights = torch.tensor([[1.0, 1.0, 1.0, weight]])
    mean = (4.0 + 7.0 * weight) / (3.0 + weight)
    squares = sum(
        w * (x - mean) ** 2 for x, w in zip(*steps.tolist(), *weights.tolist(), strict=True)
    )
    wanted = (steps - mean) / (squares / (2.0 + weight)) ** 0.5
    assert torch.allclose(standardized(steps, weights), wanted, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_terminal_step_weighs_what_is_asked_for(weight):
    config = pg.A2CConfig(normalize_advantages=False, entropy_coef=0.0, gae_lambda=0.0)
    batch = make_batch(terminal_rate=0.0)
    batch["terminals"][:, 2:] = 1.0
    losses = []
    for share in (0.0, weight, 1.0):
        changed = replace(config, terminal_step_weight=share)
        metrics = make_actor_critic(changed).update(**batch)
        losses.append((metrics["actor_loss"], metrics["critic_loss"]))
    actor_critic, normalizer = make_actor_critic(config), make_normalizer()
    with torch.no_grad():
        value = actor_critic.value_function(batch["observations"][:, 2])
        reward = batch["rewards"][:, 2]
        mean, std = actor_critic.policy.distribution(batch["observations"][:, 2])
        action = normalizer.unnormalize(batch["actions"][:, 2], "actions")
        log_pi = torch.distributions.Normal(mean, std).log_prob(action).sum(-1)
        advantage = reward - value  # nothing follows
    added = [-(log_pi * advantage).sum() / (B * (H - 1))]
    added.append(0.5 * advantage.square().sum() / (B * (H - 1)))
    for without, half, whole, wanted in zip(*losses, added, strict=True):
        assert whole - without == pytest.approx(wanted.item(), rel=1e-3, abs=1e-4)
        assert half - without == pytest.approx(weight * wanted.item(), rel=1e-3, abs=1e-4)


def moved_moments(normalizer: pg.Normalizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Change the observations' moments and return what they were."""
    before = normalizer.observations_mean.clone(), normalizer.observations_scale.clone()
    normalizer.observations_mean += torch.linspace(-1.0, 2.0, S)
    normalizer.observations_scale *= torch.linspace(0.2, 5.0, S)
    return before


@pytest.mark.parametrize("policy_normed", [False, True])
@pytest.mark.parametrize("values_normed", [False, True])
def test_functions_of_raw_observations_survive_other_moments(policy_normed, values_normed):
    actor_critic = make_actor_critic(normed_inputs=policy_normed)
    actor_critic.normed_inputs = values_normed
    normalizer, raw = actor_critic.normalizer, 3.0 * torch.randn(64, S)
    critics = actor_critic.value_function, actor_critic.target_value_function

    def outputs():
        normed = normalizer.normalize(raw, "observations")
        inputs = normed if values_normed else raw
        with torch.no_grad():
            return [actor_critic.policy(raw)[0], *(critic(inputs) for critic in critics)]

    before = outputs()
    actor_critic.keep_functions(*moved_moments(normalizer))
    for was, now in zip(before, outputs(), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    terminal=st.integers(0, H - 1),
    options=st.sampled_from([{"normalize_advantages": False}, {"advantage_moments": "counted"}]),
)
def test_what_follows_a_terminal_carries_no_weight(seed, terminal, options):
    config = pg.A2CConfig(line_search=False, **options)
    batch = make_batch(seed, terminal_rate=0.0)
    batch["terminals"][:, terminal:] = 1.0
    other, noise = copy.deepcopy(batch), make_batch(seed + 1)
    other["actions"][:, terminal:] = noise["actions"][:, terminal:]
    # the terminal step's own reward is real, and earlier advantages may count it
    for field in ("observations", "rewards", "terminals"):
        other[field][:, terminal + 1 :] = noise[field][:, terminal + 1 :]
    results = []
    for data in (batch, other):
        actor_critic = make_actor_critic(config)
        metrics = actor_critic.update(**data)
        weights = {n: m.state_dict() for n, m in actor_critic.modules().items()}
        results.append((metrics["actor_loss"], metrics["critic_loss"], weights))
    assert_equal(results[0], results[1])
    if terminal == 0:
        assert results[0][:2] == (0.0, 0.0)


def test_the_reward_of_the_terminal_step_counts_for_the_steps_before():
    config = pg.A2CConfig(normalize_advantages=False)
    batch = make_batch(terminal_rate=0.0)
    batch["terminals"][:, 3:] = 1.0
    before = make_actor_critic(config).update(**batch)
    batch["rewards"][:, 3] += 1.0
    assert make_actor_critic(config).update(**batch)["critic_loss"] != before["critic_loss"]


def test_gradients_are_clipped_per_network():
    limit, batch = 1e-3, make_batch()
    free = make_actor_critic(pg.A2CConfig(max_grad_norm=None))
    clipped = make_actor_critic(pg.A2CConfig(max_grad_norm=limit))
    free.update(**batch)
    metrics = clipped.update(**batch)
    networks = (
        ("actor_grad_norm", free.policy.network, clipped.policy.network),
        ("critic_grad_norm", free.value_function, clipped.value_function),
    )
    for name, before, after in networks:
        wanted = torch.cat([p.grad.flatten() for p in before.parameters()])
        got = torch.cat([p.grad.flatten() for p in after.parameters()])
        assert wanted.norm() > 10 * limit
        assert metrics[name] == pytest.approx(wanted.norm().item(), rel=1e-5)
        torch.testing.assert_close(got, wanted * limit / wanted.norm(), rtol=1e-3, atol=1e-9)
    assert torch.equal(clipped.policy.log_std.grad, free.policy.log_std.grad)


def test_gradients_below_the_limit_are_left_alone():
    batch = make_batch()
    free = make_actor_critic(pg.A2CConfig(max_grad_norm=None))
    loose = make_actor_critic(pg.A2CConfig(max_grad_norm=1e3))
    assert free.update(**batch) == loose.update(**batch)
    assert_equal(snapshot(free), snapshot(loose))


@torch.no_grad()
def log_probs(policy, inputs, actions):
    """Of actions under a policy in float64."""
    return log_prob(actions, *copy.deepcopy(policy).double().distribution(inputs.double()))


def run_line_search(learning_rate, config, seed=0):
    """Update from a given learning rate; return metrics, weights before, direction and after."""
    searched = make_actor_critic(config, seed=seed)
    plain = make_actor_critic(replace(config, line_search=False), seed=seed)
    for actor_critic in (searched, plain):
        actor_critic.actor_optimizer.learning_rate.fill_(learning_rate)
    before, batch = policy_vector(searched), make_batch(seed)
    actions = searched.normalizer.unnormalize(batch["actions"], "actions")[:, :-1]
    old = log_probs(searched.policy, batch["observations"][:, :-1], actions)
    plain.update(**batch)
    metrics = searched.update(**batch)
    new = log_probs(searched.policy, batch["observations"][:, :-1], actions)
    # the policy's means are rounded before and after
    assert metrics["update_size"] == pytest.approx((new - old).abs().mean().item(), 1e-4, 1e-6)
    return metrics, before, policy_vector(plain) - before, policy_vector(searched) - before


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("learning_rate", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_line_search_scales_the_adam_direction_to_the_target(learning_rate, seed):
    config = pg.A2CConfig(actor_learning_rate=1e-1, target_update=0.02)
    metrics, before, direction, taken = run_line_search(learning_rate, config, seed)
    assert 0.8 * 0.02 <= metrics["update_size"] <= 1.2 * 0.02
    moves = metrics["linesearch_steps"] - 1
    scale = 0.8 ** (moves if metrics["update_size_initial"] > 0.02 else -moves)
    # one rounding of before + scale * direction, and the direction's own rounding scaled
    rounding = 2.0**-23 * before.abs() * (1 + scale)
    assert ((taken - scale * direction).abs() <= rounding + 1e-12).all()
    log_std = slice(0, A)
    names = [name for name, _ in make_actor_critic().policy.named_parameters()]
    assert names[0] == "log_std" and (direction[log_std] != 0).all() and (taken[log_std] != 0).all()


@pytest.mark.parametrize("learning_rate", [1e-6, 3e-5, 9.9e-5, 1e-4])
def test_line_search_stays_below_the_cap_where_the_target_is_out_of_reach(learning_rate):
    config = pg.A2CConfig(actor_learning_rate=1e-4, target_update=100.0)
    metrics, _, direction, taken = run_line_search(learning_rate, config)
    scale = (taken @ direction / (direction @ direction)).item()
    assert metrics["update_size"] < 100.0
    # as far as the search's steps of 1 / 0.8 go
    assert 0.8 * 1e-4 * (1 - 1e-3) < scale * learning_rate <= 1e-4 * (1 + 1e-3)


def test_line_search_ends_when_its_trials_are_spent():
    config = pg.A2CConfig(actor_learning_rate=1e3, target_update=1e6, line_search_max_steps=7)
    metrics, _, direction, taken = run_line_search(1e-6, config)
    assert metrics["linesearch_steps"] == 8  # the first step and seven trials
    scale = (taken @ direction / (direction @ direction)).item()
    assert scale == pytest.approx(1.25**7, rel=1e-2)


@pytest.mark.parametrize("target", [1e-5, 1e-2, 10.0])
def test_adam_moments_advance_once_per_update(target):
    config = pg.A2CConfig(actor_learning_rate=1e-2, target_update=target)
    searched = make_actor_critic(config)
    gradients = {p: torch.zeros_like(p) for p in searched.policy.parameters()}
    for update in range(1, 4):
        trials = searched.update(**make_batch(update))["linesearch_steps"]
        for parameter, mean in gradients.items():
            mean.lerp_(parameter.grad, 0.1)
            state = searched.actor_optimizer.state[parameter]
            assert state["step"].item() == update
            torch.testing.assert_close(state["exp_avg"], mean)
    assert trials > 1 or target == 10.0  # beyond reach at the cap: the first step stays


def test_without_line_search_the_adam_step_is_taken_as_it_is():
    config = pg.A2CConfig(actor_learning_rate=1e-2, target_update=1e-6, line_search=False)
    actor_critic, batch = make_actor_critic(config), make_batch()
    twin = copy.deepcopy(actor_critic.policy)
    metrics = actor_critic.update(**batch)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, fused=True)
    for ours, theirs in zip(actor_critic.policy.parameters(), twin.parameters(), strict=True):
        theirs.grad = ours.grad
    optimizer.step()
    assert_equal(twin.state_dict(), actor_critic.policy.state_dict())
    assert metrics["linesearch_steps"] == 1
    assert metrics["update_size"] == metrics["update_size_initial"] > 1e-4


@pytest.mark.parametrize("target, direction", [(1e-9, -1), (100.0, 1)])
def test_the_learned_learning_rate_moves_towards_the_target_update(target, direction):
    config = pg.A2CConfig(actor_learning_rate=1e-2, target_update=target)
    actor_critic = make_actor_critic(config)
    actor_critic.actor_optimizer.learning_rate.fill_(1e-3)
    with torch.no_grad():
        actor_critic.log_actor_learning_rate.fill_(math.log(1e-3))
    rates = [1e-3]
    for seed in range(5):
        rates.append(actor_critic.update(**make_batch(seed))["actor_learning_rate"])
    moves = [direction * math.log(b / a) for a, b in itertools.pairwise(rates)]
    assert moves[0] == pytest.approx(3e-4, rel=0.1)  # Adam's first step, and a little weight decay
    assert all(move > 0 for move in moves)
    assert actor_critic.actor_optimizer.learning_rate.item() == rates[-1]


@pytest.mark.parametrize("cap", [1e-5, 3e-5, 3e-4, 1e-2])
def test_the_learned_learning_rate_never_exceeds_its_cap(cap):
    actor_critic = make_actor_critic(pg.A2CConfig(actor_learning_rate=cap, target_update=100.0))
    for seed in range(3):
        rate = actor_critic.update(**make_batch(seed))["actor_learning_rate"]
        assert cap * (1 - 1e-5) < rate <= cap
        assert actor_critic.log_actor_learning_rate.item() <= math.log(cap) + 1e-6, "no wind-up"


def test_the_learning_rate_is_constant_unless_learned():
    config = pg.A2CConfig(learn_actor_learning_rate=False, target_update=1e-9)
    actor_critic = make_actor_critic(config)
    rate = actor_critic.update(**make_batch())["actor_learning_rate"]
    assert rate == actor_critic.actor_optimizer.learning_rate == pytest.approx(3e-5, rel=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_target_critic_is_the_average_of_the_critics_before_the_step(decay):
    actor_critic = make_actor_critic(pg.A2CConfig(target_critic_decay=decay))
    target, critic = actor_critic.target_value_function, actor_critic.value_function
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(torch.randn_like(parameter))
    pairs = zip(target.parameters(), critic.parameters(), strict=True)
    wanted = [decay * t.detach() + (1 - decay) * c.detach() for t, c in pairs]
    actor_critic.update(**make_batch())
    for got, average in zip(target.parameters(), wanted, strict=True):
        torch.testing.assert_close(got, average, rtol=1e-6, atol=1e-6)
        assert not got.requires_grad
    assert target is not critic and target.network[0].weight is not critic.network[0].weight


@pytest.mark.parametrize("shift, followed", [(5.0, "critic"), (-5.0, "target")])
def test_the_lesser_of_both_critics_is_bootstrapped_from(shift, followed):
    """With a target critic above or below the critic everywhere, all is as with that one alone."""

    def make(bootstrap, shift):
        config = pg.A2CConfig(target_critic_decay=1.0, bootstrap=bootstrap)
        actor_critic = make_actor_critic(config)
        with torch.no_grad():
            actor_critic.target_value_function.network[-1].bias.add_(shift)
        return actor_critic

    lesser, batch = make("lesser", shift), make_batch()
    alone = make("target", 0.0 if followed == "critic" else shift)
    observations = batch["observations"].flatten(0, 1)
    assert torch.equal(lesser.target_values(observations), alone.target_values(observations))
    assert lesser.update(**batch) == alone.update(**batch)
    assert_equal(policy_vector(lesser), policy_vector(alone))
    other = make("target", shift if followed == "critic" else 0.0)
    assert other.update(**batch)["critic_loss"] != lesser.update(**batch)["critic_loss"]


@pytest.mark.parametrize("progress, wanted", [(0.0, 0.02), (0.5, 0.011), (1.0, 0.002)])
def test_target_update_anneals_linearly(progress, wanted):
    config = pg.A2CConfig(actor_learning_rate=1.0, target_update=0.02, final_target_update=0.002)
    config = replace(config, line_search_tolerance=0.01, line_search_ratio=0.995)
    config = replace(config, line_search_max_steps=5000)
    actor_critic = make_actor_critic(config)
    actor_critic.actor_optimizer.learning_rate.fill_(1e-4)
    metrics = actor_critic.update(**make_batch(), progress=progress)
    assert metrics["update_size"] == pytest.approx(wanted, rel=0.0101)


@pytest.mark.parametrize("normed_inputs", [False, True])
def test_reward_rms(normed_inputs):
    config = pg.A2CConfig(reward_rms=0.5)
    actor_critic, batch = make_actor_critic(config, normed_inputs), make_batch()
    raw = 1.5 + 3.0 * batch["rewards"]
    wanted = raw * 0.5 / math.hypot(1.5, 3.0)
    metrics = actor_critic.update(**batch)
    assert metrics["reward"] == pytest.approx(wanted.mean().item(), rel=1e-4, abs=1e-6)


def test_metrics_of_standardized_actions():
    actor_critic, batch = make_actor_critic(), make_batch()
    mean, std = actor_critic.policy.distribution(batch["observations"][:, :-1])
    actions = actor_critic.normalizer.unnormalize(batch["actions"], "actions")[:, :-1]
    z = ((actions - mean) / std).detach().double()
    metrics = actor_critic.update(**batch)
    assert metrics["action_mean"] == pytest.approx(z.mean().item(), rel=1e-4)
    per_dimension = z.flatten(0, 1).std(0, correction=1)
    assert metrics["action_std"] == pytest.approx(per_dimension.mean().item(), rel=1e-4)
    assert metrics["policy_std"] == pytest.approx(0.6, rel=1e-5)
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    promised = "actor_loss critic_loss entropy action_mean action_std update_size_initial"
    promised += " update_size linesearch_steps actor_learning_rate"
    assert set(promised.split()) <= set(metrics)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("t", [0, H - 2, H - 1])
def test_input_that_is_not_finite_changes_nothing(field, value, t):
    t = min(t, H - 2) if field == "actions" else t  # the last action is not used
    actor_critic = make_actor_critic()
    actor_critic.update(**make_batch(1))
    before, batch = snapshot(actor_critic), make_batch(2)
    batch[field][3, t] = value
    with pytest.raises(pg.NonFiniteError, match="is (nan|inf|-inf)"):
        actor_critic.update(**batch)
    assert_equal(snapshot(actor_critic), before)

    undisturbed = make_actor_critic()
    undisturbed.update(**make_batch(1))
    assert actor_critic.update(**make_batch(3)) == undisturbed.update(**make_batch(3))
    assert_equal(snapshot(actor_critic), snapshot(undisturbed))


def test_a_step_measures_on_the_device_what_an_update_returns():
    stepped, updated = make_actor_critic(), make_actor_critic()
    for seed in range(2):
        found, wanted = stepped.step(**make_batch(seed)), updated.update(**make_batch(seed))
        assert all(value.shape == () and not value.requires_grad for value in found.values())
        assert {name: value.item() for name, value in found.items()} == wanted
    assert_equal(snapshot(stepped), snapshot(updated))


def test_a_step_on_what_is_not_finite_says_so_and_changes_nothing():
    actor_critic, batch = make_actor_critic(), make_batch(2)
    actor_critic.step(**make_batch(1))
    before = snapshot(actor_critic)
    batch["rewards"][3, 0] = math.nan
    assert not all(value.isfinite() for value in actor_critic.step(**batch).values())
    assert_equal(snapshot(actor_critic), before)


def test_an_update_of_a_size_that_is_not_finite_changes_nothing():
    """Losses and gradients are finite; the policy after the step is not."""
    actor_critic = make_actor_critic()
    actor_critic.update(**make_batch(1))
    actor_critic.actor_optimizer.learning_rate.fill_(1e30)
    before = snapshot(actor_critic)
    with pytest.raises(pg.NonFiniteError, match="update_size_initial is (nan|inf)"):
        actor_critic.update(**make_batch(2))
    assert_equal(snapshot(actor_critic), before)


@pytest.mark.parametrize("network", ["policy", "value_function", "target_value_function"])
def test_broken_weights_are_reported_and_nothing_else_breaks(network):
    actor_critic = make_actor_critic()
    actor_critic.update(**make_batch(1))
    with torch.no_grad():
        next(reversed(list(actor_critic.modules()[network].parameters()))).fill_(math.nan)
    healthy = {n: copy.deepcopy(m.state_dict()) for n, m in actor_critic.modules().items()}
    state = copy.deepcopy(actor_critic.state_dict())
    with pytest.raises(pg.NonFiniteError):
        actor_critic.update(**make_batch(2))
    assert_equal(actor_critic.state_dict(), state)
    for name, module in actor_critic.modules().items():
        if name != network:
            assert_equal(dict(module.state_dict()), dict(healthy[name]))


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_shapes_name_got_and_wanted(field):
    batch = make_batch()
    wanted = str(tuple(batch[field].shape))
    for wrong in (batch[field][:-1], batch[field][:, :-1], batch[field][..., None]):
        actor_critic = make_actor_critic()
        before = snapshot(actor_critic)
        with pytest.raises(pg.InputError) as error:
            actor_critic.update(**(batch | {field: wrong}))
        assert_equal(snapshot(actor_critic), before)
        message = str(error.value)
        if field != "observations":  # the batch and horizon that the others are held to
            assert message.startswith(field) and str(tuple(wrong.shape)) in message
            assert wanted in message


@pytest.mark.parametrize("batch, horizon", [(B, 1), (B, 0), (0, H), (1, 2)])
def test_too_few_steps_are_refused(batch, horizon):
    with pytest.raises(pg.InputError, match=f"must .*, got .*{batch}.*{horizon}"):
        make_actor_critic().update(**make_batch(batch=batch, horizon=horizon))


@pytest.mark.parametrize("batch, horizon", [(2, 2), (B, 2), (1, 3), (257, 10)])
def test_small_and_odd_sizes_work(batch, horizon):
    actor_critic = make_actor_critic(pg.A2CConfig(actor_learning_rate=0.1, target_update=0.01))
    before = policy_vector(actor_critic)
    metrics = actor_critic.update(**make_batch(batch=batch, horizon=horizon, terminal_rate=0))
    assert all(math.isfinite(value) for value in metrics.values())
    assert not torch.equal(policy_vector(actor_critic), before)


def test_strided_inputs_give_the_same():
    first, second, batch = make_actor_critic(), make_actor_critic(), make_batch()
    strided = {n: x.transpose(0, 1).contiguous().transpose(0, 1) for n, x in batch.items()}
    assert not strided["rewards"].is_contiguous()
    assert first.update(**batch) == pytest.approx(second.update(**strided), rel=1e-4)


def test_state_dict_round_trip_continues_identically():
    config = pg.A2CConfig(actor_learning_rate=1e-2)
    original = make_actor_critic(config)
    for seed in range(3):
        original.update(**make_batch(seed))
    restored = make_actor_critic(config, seed=9)
    for name, module in restored.modules().items():
        module.load_state_dict(original.modules()[name].state_dict())
    restored.load_state_dict(copy.deepcopy(original.state_dict()))
    for seed in range(3, 6):
        assert original.update(**make_batch(seed)) == restored.update(**make_batch(seed))
    assert_equal(snapshot(original), snapshot(restored))


def test_a_bandit_is_learnt():
    config = pg.A2CConfig(actor_learning_rate=3e-2, critic_learning_rate=1e-3, target_update=0.1)
    torch.manual_seed(0)
    normalizer = pg.Normalizer(S, A)
    policy = pg.GaussianPolicy(S, A, 16, init_std=0.5, normed_inputs=True, normalizer=normalizer)
    actor_critic = pg.ActorCritic(policy, pg.ValueFunction(S, 16), normalizer, config)
    best = torch.tensor([0.5, -0.3])
    for _ in range(200):
        observations = torch.randn(64, 2, S)
        with torch.no_grad():
            actions = torch.normal(*policy(observations))
        rewards = -(actions - best).square().sum(-1)
        actor_critic.update(observations, actions, rewards, torch.zeros(64, 2))
    mean, std = policy(torch.randn(200, S))
    assert ((mean - best).abs().mean(0) < 0.1).all()
    assert (std < 0.4).all(), "less exploration pays"


def test_saturation_coef_adds_the_mean_square_of_the_tanh_inputs():
    batch = make_batch()
    losses, inputs = {}, None
    for coefficient in (0.0, 0.5):
        actor_critic = make_actor_critic(pg.A2CConfig(saturation_coef=coefficient))
        inputs = actor_critic.policy.network(batch["observations"][:, :-1]).detach()
        losses[coefficient] = actor_critic.update(**batch)["actor_loss"]
    wanted = 0.5 * inputs.square().mean().item()
    assert losses[0.5] - losses[0.0] == pytest.approx(wanted, rel=1e-4)


def test_saturation_coef_brings_a_saturated_policy_back():
    def mean_input(coefficient):
        config = pg.A2CConfig(
            saturation_coef=coefficient, actor_learning_rate=1e-2, line_search=False
        )
        actor_critic = make_actor_critic(config)
        with torch.no_grad():
            actor_critic.policy.network[-1].bias.fill_(8.0)
        batch = make_batch()
        for _ in range(60):
            actor_critic.update(**batch)
        return actor_critic.policy.network(batch["observations"]).abs().mean().item()

    assert mean_input(0.3) < 0.9 * mean_input(0.0)
