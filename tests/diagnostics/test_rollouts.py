"""What the simulator says is what the environment does."""

import dataclasses

import numpy as np
import pytest
import torch

from polygrad_fast.diagnostics.gradient import _BothWays
from polygrad_fast.diagnostics.rollouts import simulate, simulator_outcomes, transitions
from polygrad_fast.protocols import policy_moments


@pytest.fixture(scope="module")
def ways(agent):
    return _BothWays(
        agent.make_evaluation_environment(),
        agent.world_model,
        agent.training.learner,
        agent.replay,
        agent.action_scaler,
        seed=0,
        batch_size=64,
    )


@pytest.fixture(scope="module")
def batch(agent, ways):
    starts = agent.replay.initial_observations()
    return ways.simulate(starts[::4])


def raw(agent, batch, name):
    return agent.normalizer.unnormalize(getattr(batch, name), name)


def test_simulated_trajectories_are_the_environments(agent, ways, batch):
    """Played again without anything of the code under test but the first state."""
    observations, actions = raw(agent, batch, "observations"), raw(agent, batch, "actions")
    rewards, flags = raw(agent, batch, "rewards"), ways.flags(batch)
    environment = ways.simulator.environment
    for i in range(0, len(observations), 5):
        ways.simulator.set(observations[i, 0].numpy())
        for t in range(agent.config.horizon):
            action = agent.action_scaler.to_environment(actions[i, t].numpy())
            following, reward, terminated, _, _ = environment.step(action)
            assert rewards[i, t].item() == pytest.approx(reward, abs=1e-4)
            assert bool(flags[i, t]) == terminated
            if terminated:
                break
            if t + 1 < agent.config.horizon:
                wanted = observations[i, t + 1].numpy()
                np.testing.assert_allclose(following, wanted, atol=2e-4, rtol=1e-4)


def test_past_a_terminal_step_simulated_trajectories_are_padded_as_windows_are(agent, ways, batch):
    flags = ways.flags(batch)
    assert (flags[:, 1:] >= flags[:, :-1]).all()
    padded = flags[:, :-1] == 1
    assert 20 < padded.sum() < padded.numel() / 2
    for name in ("observations", "actions"):
        values = getattr(batch, name)
        assert torch.equal(values[:, 1:][padded], values[:, :-1][padded])
    assert raw(agent, batch, "rewards")[:, 1:][padded].abs().max() < 1e-5


def test_simulated_actions_are_drawn_from_the_policy(agent, ways):
    starts = agent.replay.initial_observations()
    simulated = ways.simulate(starts.repeat(4, 1))
    mean, std = policy_moments(
        agent.policy, agent.normalizer, simulated.observations, normalized=True
    )
    z = (raw(agent, simulated, "actions") - mean) / std
    z = z[ways.flags(simulated) == 0]
    assert len(z) > 3000
    assert z.mean().abs() < 0.03 and (z.std() - 1).abs() < 0.03
    first, second = (
        simulate(
            ways.simulator,
            agent.policy,
            agent.normalizer,
            agent.action_scaler,
            starts[:8],
            3,
            torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1)
    )
    assert torch.equal(first.actions, second.actions)


def test_the_simulators_outcomes_of_simulated_steps_are_those_steps(agent, ways, batch):
    steps = transitions(batch, ways.flags(batch))
    outcomes = simulator_outcomes(ways.simulator, agent.normalizer, agent.action_scaler, steps)
    assert torch.equal(outcomes.observations, steps.observations)
    assert torch.equal(outcomes.actions, steps.actions)
    assert torch.equal(outcomes.terminals, steps.terminals)
    assert torch.allclose(outcomes.rewards, steps.rewards, atol=1e-3)
    goes_on = steps.terminals == 0
    difference = (outcomes.next_observations - steps.next_observations)[goes_on]
    assert difference.abs().max() < 1e-3
    _, _, error = ways.simulator_outcomes([steps, steps])
    assert error.rms < 1e-4 and error.reward_rms < 1e-3
    assert error.missed_terminals == error.false_terminals == error.unsimulated == 0


def test_errors_of_outcomes_are_measured(agent, ways, batch):
    """Wrong by a known amount, in normalized units."""
    steps = transitions(batch, ways.flags(batch))
    n = len(steps.rewards)
    wrong = torch.arange(n) % 3
    ends = steps.terminals.bool()
    shifted = type(steps)(
        steps.observations,
        steps.actions,
        steps.rewards - 0.5,
        torch.where(wrong == 0, 1 - steps.terminals, steps.terminals),
        steps.next_observations + 0.3,
    )
    _, _, error = ways.simulator_outcomes([shifted])
    assert error.rms == pytest.approx(0.3, rel=1e-3)
    assert error.median == pytest.approx(0.3, rel=1e-3)
    assert error.reward_rms == pytest.approx(0.5, rel=1e-3)
    assert error.missed_terminals == pytest.approx((ends & (wrong == 0)).sum().item() / n)
    assert error.false_terminals == pytest.approx((~ends & (wrong == 0)).sum().item() / n)
    assert error.missed_terminals > 0


def test_steps_from_impossible_states_are_left_out_and_counted(agent, ways, batch):
    steps = transitions(batch, ways.flags(batch))
    far = steps.observations.clone()
    far[::4, 5:] = 1e9
    impossible = type(steps)(
        far, steps.actions, steps.rewards, steps.terminals, steps.next_observations
    )
    shown, true, error = ways.simulator_outcomes([impossible])
    assert error.unsimulated == pytest.approx(0.25, abs=0.01)
    assert len(shown[0].rewards) == len(true[0].rewards)
    assert torch.isfinite(true[0].rewards).all()


def test_single_steps_have_the_advantages_of_lambda_0(agent, ways, batch):
    """And they are the steps up to the first terminal one."""
    flags = ways.flags(batch)
    lengths = torch.where(flags.any(1), flags.argmax(1) + 1, agent.config.horizon).clamp(
        max=agent.config.horizon - 1
    )
    steps = transitions(batch, flags)
    assert len(steps.rewards) == lengths.sum()
    whole = steps.as_trajectories()
    assert torch.equal(whole["observations"][:, 1], steps.next_observations)
    learner = agent.training.learner
    gradients = [
        learner.actor_gradient(
            **whole, config=dataclasses.replace(learner.config, gae_lambda=gae_lambda)
        )
        for gae_lambda in (0.0, 0.9)
    ]
    assert torch.equal(*gradients)
