"""The policy that acts: the same numbers without module calls, and how old its copy is."""

from __future__ import annotations

import contextlib

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast.data import ActionScaler
from polygrad_fast.protocols import policy_moments
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.training.acting_policy import ActingPolicy, moments_of
from polygrad_fast.training.actor import Actor

S, A = 5, 3


def make_normalizer() -> pg.Normalizer:
    return pg.Normalizer.from_moments(
        observations=(torch.linspace(-1, 2, S), torch.linspace(0.5, 3, S)),
        actions=(torch.zeros(A), torch.ones(A)),
    )


def make_policy(normalizer, normed: bool = True, num_layers: int = 2) -> pg.GaussianPolicy:
    torch.manual_seed(0)
    policy = pg.GaussianPolicy(
        S, A, 32, num_layers, 0.7, 0.1, normed_inputs=normed, normalizer=normalizer
    )
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return policy


class OwnPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(S, A)
        self.register_buffer("shift", torch.zeros(A))

    def forward(self, observations):
        mean = self.linear(observations) + self.shift
        return mean, torch.ones_like(mean)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("shape", [(S,), (1, S), (7, S)])
@torch.no_grad()
def test_the_forward_without_modules_gives_the_same_bits(normed, num_layers, shape):
    normalizer = make_normalizer()
    policy = make_policy(normalizer, normed, num_layers)
    moments = moments_of(policy, normalizer)
    observations = torch.randn(shape)
    kept = observations.clone()
    for change in (0.0, 0.1):  # in place, seen without another call of `moments_of`
        for weight in policy.parameters():
            weight.add_(change)
        normalizer.observations_mean.add_(change)
        wanted = policy_moments(policy, normalizer, observations, normalized=False)
        for got, moment in zip(moments(observations), wanted, strict=True):
            assert torch.equal(got.expand_as(moment), moment)
    assert torch.equal(observations, kept)


@torch.no_grad()
def test_a_hook_and_a_policy_of_ones_own_are_called():
    normalizer = make_normalizer()
    policy = make_policy(normalizer)
    acting = ActingPolicy(policy, normalizer)
    policy.network[2].register_forward_hook(lambda module, inputs, output: 0 * output)
    acting.refresh()
    mean, _ = acting.moments(torch.randn(S))
    assert torch.equal(mean, torch.tanh(policy.network[3:](torch.zeros(32))))
    own = OwnPolicy()
    mean, std = ActingPolicy(own, normalizer).moments(torch.ones(S))
    assert torch.equal(mean, own.linear(torch.ones(S))) and std.tolist() == [1.0] * A


@pytest.mark.parametrize("kind", ["own", "GaussianPolicy"])
@torch.no_grad()
def test_a_copy_is_one_change_old(kind):
    normalizer = make_normalizer()
    policy = OwnPolicy() if kind == "own" else make_policy(normalizer)
    acting = ActingPolicy(policy, normalizer, is_copied=True)
    observation = torch.randn(S)

    def change(step: int) -> torch.Tensor:
        for tensor in (*policy.parameters(), *policy.buffers()):
            tensor.add_(0.05 * step)
        normalizer.observations_mean.add_(0.1 * step)
        policy.train(step % 2 == 0)
        return policy_moments(policy, normalizer, observation, normalized=False)[0]

    def acts() -> torch.Tensor:
        return acting.moments(observation)[0]

    policies = [policy_moments(policy, normalizer, observation, normalized=False)[0]]
    assert torch.equal(acts(), policies[0])
    for step in (1, 2, 3):
        acted = acts()
        policies.append(change(step))
        assert torch.equal(acts(), acted)  # not told yet
        acting.refresh()
        assert torch.equal(acts(), policies[-2]) and not torch.equal(acts(), policies[-1])
    after = policies[-1]
    state = acting.state_dict()
    acting.settle()
    assert torch.equal(acts(), after)
    other = ActingPolicy(policy, normalizer, is_copied=True)
    other.load_state_dict(state)
    assert not torch.equal(other.moments(observation)[0], after)
    newest = change(4)
    other.refresh()
    assert torch.equal(other.moments(observation)[0], after)
    other.load_state_dict({"acting_policy": None})  # of a checkpoint written on a CPU
    assert torch.equal(other.moments(observation)[0], newest)


def test_on_a_cpu_there_is_no_copy():
    normalizer = make_normalizer()
    policy = make_policy(normalizer)
    acting = ActingPolicy(policy, normalizer)
    assert acting.state_dict() == {"acting_policy": None}
    with torch.no_grad():
        policy.network[-1].bias.fill_(3.0)
        mean, _ = acting.moments(torch.zeros(S))
        assert torch.equal(mean, policy(torch.zeros(S))[0])


def test_a_policy_that_cannot_be_copied_is_refused_where_it_must_be():
    class Held(OwnPolicy):
        def __deepcopy__(self, memo):
            raise RuntimeError("holds a socket")

    normalizer = make_normalizer()
    ActingPolicy(Held(), normalizer)
    with pytest.raises(pg.InputError, match="policy Held cannot be copied to act.*holds a socket"):
        ActingPolicy(Held(), normalizer, is_copied=True)


def copied_agent(**arguments) -> pg.PolyGRAD:
    """An agent that acts as on a GPU."""
    config = tiny_config(policy_delay_steps=0, policy_updates_per_env_step=0.5)
    agent = pg.PolyGRAD("Pendulum-v1", config=config, **arguments)
    act_as_on_a_gpu(agent)
    return agent


def act_as_on_a_gpu(agent: pg.PolyGRAD) -> None:
    actor = agent.training.actor
    actor.acting = ActingPolicy(actor.policy, actor.normalizer, is_copied=True)


def weights_of(moments) -> list[float]:
    """What tells two policies apart: their means at some observations."""
    observations = torch.linspace(-1, 1, 12).reshape(4, 3)
    with torch.no_grad():
        return moments(observations)[0].flatten().tolist()


def test_training_acts_with_the_policy_before_the_last_policy_update():
    agent = copied_agent()
    training = agent.training
    trained = []  # after every update
    update = training.learner.step

    def watched(*arguments, **options):
        trained.append(weights_of(moments_of(agent.policy, agent.normalizer)))
        return update(*arguments, **options)

    training.learner.step = watched
    while agent.num_timesteps < agent.config.learning_starts + 10:
        agent.step()
        if len(trained) >= 2:
            acts = weights_of(training.actor.acting.moments)
            assert acts == trained[-1]  # as it was before that update
            assert acts != weights_of(moments_of(agent.policy, agent.normalizer))
    assert len(trained) == 5


def test_a_resumed_copy_is_as_old_as_it_was(tmp_path):
    """A run on a GPU is resumed by the policy that acted."""
    whole = copied_agent()
    whole.learn(60)
    whole.learn(40)
    first = copied_agent(run_dir=tmp_path)
    first.learn(60)
    state = load_checkpoint(tmp_path / "checkpoints" / "step_000000060")[1]
    second = copied_agent()
    second.training.load_weights(first.training.weights())
    second.training.load_state_dict(state)
    second.learn(40)
    for name, tensor in whole.training.weights().items():
        assert torch.equal(tensor, second.training.weights()[name]), name
    observations = [agent.environment.observation for agent in (whole, second)]
    np.testing.assert_array_equal(*observations)


@pytest.mark.parametrize("kind", ["own", "GaussianPolicy"])
def test_acting_does_not_wait_for_a_gpu(gpu, kind):
    """Telling of a change waits for the copy that the one before began, and for nothing else."""
    device = torch.device("cuda", 0)
    on_cpu = make_normalizer()
    policy = OwnPolicy() if kind == "own" else make_policy(on_cpu)
    normalizer = make_normalizer().to(device)
    if kind == "GaussianPolicy":
        object.__setattr__(policy, "normalizer", normalizer)
    policy = policy.to(device)
    scaler = ActionScaler(gymnasium.spaces.Box(-1, 1, (A,)), rescale=True)
    actor = Actor(policy, normalizer, scaler, device)
    observation = np.linspace(-1, 1, S).astype(np.float32)
    drawn = []
    if gpu is not None:
        gpu.syncs.clear()
    for step in range(4):
        with gpu.without_syncs() if gpu is not None else contextlib.nullcontext():
            drawn.append(actor.sample(observation, torch.Generator().manual_seed(0)))
            with torch.no_grad():
                for weight in policy.parameters():
                    weight.mul_(1.0 + 0.1 * step).add_(0.1)
        actor.acting.refresh()
    if gpu is not None:  # for the copy of the change before, which is one change behind
        assert gpu.syncs == {"Event.synchronize": 4}
    assert np.array_equal(drawn[0], drawn[1])  # the first change acts after the second
    assert len({action.tobytes() for action in drawn[1:]}) == 3
