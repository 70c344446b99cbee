"""The gradient report on world models whose answers are known."""

import copy
import dataclasses
import math

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.diagnostics.gradient import policy_gradient_report
from polygrad_fast.diagnostics.rollouts import simulate
from polygrad_fast.diagnostics.simulator import Simulator
from polygrad_fast.diagnostics.table import table
from polygrad_fast.sampling import TrajectoryBatch


class TrueModel:
    """A world model that is the simulator."""

    def __init__(self, agent):
        self.agent, self.environment = agent, agent.make_evaluation_environment()
        self.simulator = None

    def dynamics(self):
        return None

    def imagine(self, initial_observations, policy, generator=None, normalized=False, horizon=None):
        assert normalized
        agent = self.agent
        if self.simulator is None:
            windows = agent.replay.sample(64, torch.Generator().manual_seed(0))
            first = (windows.observations, windows.actions, windows.rewards, windows.terminals)
            columns = [part[:, 0].numpy() for part in first]
            columns[1] = agent.action_scaler.to_environment(columns[1])
            scales = agent.normalizer.observations_scale, agent.normalizer.rewards_scale
            following = windows.observations[:, 1].numpy()
            scales = tuple(scale.numpy() for scale in scales)
            self.simulator = Simulator(self.environment, *columns, following, scales)
        return simulate(
            self.simulator,
            policy,
            agent.normalizer,
            agent.action_scaler,
            agent.normalizer.unnormalize(initial_observations, "observations"),
            agent.config.horizon if horizon is None else horizon,
            generator,
        )


class OffPolicyModel(TrueModel):
    """The simulator's trajectories with actions moved by half a deviation times the first state
    entries, which then are not those that led to the next states."""

    def imagine(self, *arguments, **options):
        batch = super().imagine(*arguments, **options)
        normalizer = self.agent.normalizer
        std = self.agent.policy.std.detach()
        raw = normalizer.unnormalize(batch.actions, "actions")
        shift = std * batch.observations[..., :3].clamp(-3, 3)
        return TrajectoryBatch(
            batch.observations,
            normalizer.normalize(raw + 0.5 * shift, "actions"),
            batch.rewards,
            batch.terminals,
        )


class WrongModel(TrueModel):
    """The simulator with rewards and next states of the opposite tendency, actions on-policy."""

    def imagine(self, *arguments, **options):
        batch = super().imagine(*arguments, **options)
        normalizer, policy = self.agent.normalizer, self.agent.policy
        start = batch.observations[:, :1]
        observations = start - (batch.observations - start)
        with torch.no_grad():
            there, here = (
                policy.distribution(batch.observations)[0],
                policy(normalizer.unnormalize(observations, "observations"))[0],
            )
        raw = normalizer.unnormalize(batch.actions, "actions") + here - there
        actions = normalizer.normalize(raw, "actions")
        return TrajectoryBatch(observations, actions, -batch.rewards, batch.terminals)


def report(agent, model, num=1024, **options):
    return policy_gradient_report(
        agent.make_evaluation_environment(),
        model,
        agent.training.learner,
        agent.replay,
        agent.action_scaler,
        num=num,
        **options,
    )


@pytest.fixture(scope="module")
def of_truth(agent):
    return report(agent, TrueModel(agent), newest=300)


def test_a_true_model_reaches_the_ceiling(of_truth):
    found = of_truth
    for part in (found.newest, found.newest_lambda_0, found.all, found.actions):
        assert part.ceiling > 0.8
        assert part.cosine > 0.9 * part.ceiling
        assert 0.7 < part.length_ratio < 1.4
    assert found.model > 0.999
    assert abs(found.on_policy.r2) < 0.02
    assert found.on_policy.ks < 2.5 * found.on_policy.ks_floor
    assert found.error.rms < 1e-3
    assert found.error.missed_terminals == found.error.false_terminals == 0
    assert found.share_repeated > 0.99 and found.num_newest <= 300 < found.num_all


def test_off_policy_actions_are_found_out(agent, of_truth):
    found = report(agent, OffPolicyModel(agent))
    assert found.on_policy.r2 > 0.1
    assert found.on_policy.std > 1.05
    assert found.newest.cosine < of_truth.newest.cosine - 0.1
    assert found.actions.cosine < of_truth.actions.cosine - 0.05


def test_a_wrong_model_is_found_out_and_its_actions_are_not_blamed(agent):
    found = report(agent, WrongModel(agent))
    assert found.newest_lambda_0.cosine < 0.3
    assert found.model < 0.3
    assert found.actions.cosine > 0.8 * found.actions.ceiling
    assert abs(found.on_policy.r2) < 0.02
    assert found.error.rms > 0.1 and found.error.reward_rms > 0.5


def test_the_report_changes_nothing_and_a_seed_gives_it_again(agent):
    training = agent.training
    before = {name: tensor.clone() for name, tensor in training.weights().items()}
    streams = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in training.streams.state_dict().items()
    }
    first, again, other = (
        report(agent, agent.world_model, num=64, seed=seed).summary() for seed in (3, 3, 4)
    )
    assert first == again != other
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.weights().items())
    for name, value in training.streams.state_dict().items():
        same = torch.equal(value, streams[name]) if isinstance(value, torch.Tensor) else None
        assert same or value == streams[name], name
    assert all(p.grad is None for p in agent.policy.parameters())


def test_all_numbers_are_in_summary_and_table(of_truth):
    summary = of_truth.summary()
    assert summary["cosine"] == of_truth.newest.cosine
    assert summary["cosine_ceiling"] == of_truth.newest.ceiling
    assert summary["r2"] == of_truth.on_policy.r2
    assert summary["error/rms"] == of_truth.error.rms
    assert all(isinstance(value, (int, float)) for value in summary.values())
    assert all(math.isfinite(value) for value in summary.values())
    lines = table(of_truth).splitlines()
    assert len(lines) == 12 and all(len(line) < 220 for line in lines)
    assert lines[-1].startswith("critic: mean value")
    noisy = dataclasses.replace(of_truth.newest, ceiling=0.3)
    noisy = table(dataclasses.replace(of_truth, newest=noisy)).splitlines()
    assert len(noisy) == 13 and "mostly noise" in noisy[8]
    row = next(line for line in lines if line.startswith("model"))
    assert row.split()[-1] == f"{of_truth.model:.2f}"


def test_regularizers_do_not_flatter(agent):
    """A penalty whose gradient is the same on both sides would bring the cosine to 1."""
    learner = copy.copy(agent.training.learner)
    learner.config = dataclasses.replace(learner.config, saturation_coef=1e3, entropy_coef=1e3)
    arguments = (agent.replay, agent.action_scaler)
    found = policy_gradient_report(
        agent.make_evaluation_environment(), agent.world_model, learner, *arguments, num=64
    )
    plain = report(agent, agent.world_model, num=64)
    assert found.newest == plain.newest


def test_imagined_gradients_are_estimated_as_the_run_does_it(agent, monkeypatch):
    """Pathwise through the world model at hand, at the run's own lambda; by the score function
    where there are no slopes: simulated, of single steps, or of a model without dynamics."""
    learner = copy.copy(agent.training.learner)
    learner.config = dataclasses.replace(learner.config, gradient_estimator="pathwise")
    gradient, used = pg.ActorCritic.actor_gradient, []

    def noted(self, observations, actions, rewards, terminals, config=None, dynamics=None):
        used.append((config.gradient_estimator, observations.shape[1] > 2, dynamics))
        return gradient(self, observations, actions, rewards, terminals, config, dynamics)

    monkeypatch.setattr(pg.ActorCritic, "actor_gradient", noted)
    environment = agent.make_evaluation_environment()
    arguments = (agent.replay, agent.action_scaler)
    found = policy_gradient_report(environment, agent.world_model, learner, *arguments, num=64)
    assert found.estimator == "pathwise" and "imagined pathwise" in table(found)
    pathwise = [how for estimator, *how in used if estimator == "pathwise"]
    assert len(pathwise) == 4 and len(used) > 8
    assert all(whole and dynamics is not None for whole, dynamics in pathwise)
    used.clear()
    found = policy_gradient_report(environment, TrueModel(agent), learner, *arguments, num=64)
    assert {estimator for estimator, *_ in used} == {"score"} == {found.estimator}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 7}, "num must be an integer of at least 8, got 7"),
        ({"newest": 0}, "newest must be an integer of at least 1, got 0"),
        ({"seed": -1}, r"seed must be an integer in \[0, 4294967296\), got -1"),
    ],
)
def test_bad_arguments_are_refused(agent, options, message):
    with pytest.raises(pg.InputError, match=message):
        report(agent, agent.world_model, **{"num": 64, **options})


def test_another_environment_is_refused(agent):
    walker = pg.PolyGRAD("Walker2d-v5", preset="quick", device="cpu")
    with pytest.raises(
        pg.InputError, match="needs start observations in the replay buffer, got none"
    ):
        report(walker, walker.world_model, num=64)
    with pytest.raises(pg.InputError, match="must have observations of 11 entries .* got 3"):
        policy_gradient_report(
            pg.PolyGRAD("Pendulum-v1", preset="quick").make_evaluation_environment(),
            agent.world_model,
            agent.training.learner,
            agent.replay,
            agent.action_scaler,
        )
