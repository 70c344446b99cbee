"""Errors of imagined trajectories on world models whose answers are known."""

import json
import math

import gymnasium
import numpy as np
import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.data import ActionScaler
from polygrad_fast.data.environment import make_environment
from polygrad_fast.diagnostics.dynamics import (
    dynamics_report,
    dynamics_table,
    transition_errors,
)
from polygrad_fast.diagnostics.episodes import record_windows
from polygrad_fast.diagnostics.mujoco_replay import MujocoReplay, Played
from polygrad_fast.protocols import policy_moments
from polygrad_fast.sampling import TrajectoryBatch


class TrueModel:
    """A world model that is the simulator, for observations that are whole states."""

    longest_horizon = None

    def __init__(self, env_id, normalizer):
        self.replay = MujocoReplay(make_environment(env_id))
        self.normalizer = normalizer
        self.scaler = ActionScaler(self.replay.environment.action_space, True)

    def imagine(self, initial_observations, policy, generator=None, normalized=False, horizon=None):
        assert normalized
        normalizer = self.normalizer
        observations = [normalizer.unnormalize(initial_observations, "observations")]
        states = np.concatenate([np.full((len(observations[0]), 1), 5.0), observations[0]], axis=1)
        actions, rewards, terminals = [], [], []
        ended = np.zeros(len(states), dtype=bool)
        for _ in range(horizon):
            mean, std = policy_moments(policy, normalizer, observations[-1], normalized=False)
            actions.append(mean + std * torch.randn(mean.shape, generator=generator))
            taken = self.scaler.to_environment(actions[-1].detach().numpy())
            played = self.replay.play(states, taken[:, None])
            ended = ended | played.terminals[:, 0]
            rewards.append(torch.from_numpy(played.rewards[:, 0]).float())
            terminals.append(torch.from_numpy(ended).float())
            observations.append(torch.from_numpy(played.observations[:, 0]).float())
            states[:, 1:] = played.observations[:, 0]
        columns = (observations[:-1], actions, rewards, terminals)
        names = ("observations", "actions", "rewards", "terminals")
        return TrajectoryBatch(
            *(
                normalizer.normalize(torch.stack(part, dim=1), name).detach()
                for part, name in zip(columns, names, strict=True)
            )
        )


class WrongModel(TrueModel):
    """Wrong by a known amount: next observations by 0.3 t, rewards by 0.5, all normalized; every
    third trajectory ends after its second transition."""

    def imagine(self, *arguments, **options):
        batch = super().imagine(*arguments, **options)
        horizon = batch.rewards.shape[1]
        shift = 0.3 * torch.arange(horizon)[:, None]
        terminals = self.normalizer.unnormalize(batch.terminals, "terminals")
        terminals[::3, 1:] = 1.0
        terminals = self.normalizer.normalize(terminals, "terminals")
        return TrajectoryBatch(
            batch.observations + shift, batch.actions, batch.rewards + 0.5, terminals
        )


ENV_ID = "InvertedPendulum-v5"  # observations are whole states; no contacts, so no warm start


@pytest.fixture(scope="module")
def normalizer():
    return pg.Normalizer.from_moments(
        observations=(torch.tensor([0.0, 0.1, 0.0, -0.1]), torch.tensor([0.1, 0.05, 0.5, 0.8])),
        actions=(torch.zeros(1), torch.ones(1)),
        rewards=(torch.tensor(0.9), torch.tensor(0.2)),
        terminals=(torch.tensor(0.05), torch.tensor(0.2)),
    )


@pytest.fixture(scope="module")
def policy():
    """It falls after 10 to 30 steps."""
    torch.manual_seed(0)
    policy = pg.GaussianPolicy(4, 1, 8, init_std=0.15)
    with torch.no_grad():
        for parameter in policy.network[-1].parameters():
            parameter *= 0.1
    return policy


def report(model, policy, horizons=(5, 10), environment=None, **options):
    environment = make_environment(ENV_ID) if environment is None else environment
    scaler = ActionScaler(environment.action_space, True)
    options = {"num": 60, "batch_size": 18} | options
    return dynamics_report(
        environment, model, policy, model.normalizer, scaler, horizons, **options
    )


def test_a_true_model_has_no_error(normalizer, policy):
    """But what float32 rounds."""
    found = report(TrueModel(ENV_ID, normalizer), policy)
    summary = found.summary()
    assert found.horizons == (5, 10) and found.is_native and found.num_blown_up == 0
    for name in ("mse", "floor", "median"):
        assert list(summary[name]) == ["5", "10"]
        assert all(value < 1e-9 for value in summary[name].values()), name
    assert all(value < 1e-9 for value in summary["reward_mse"].values())
    assert all(value == 1.0 for value in summary["terminal_agreement"].values())
    ended = found.imagined.squares.shape[1] - np.isfinite(found.imagined.squares).sum(axis=1)
    assert (ended > 0).any() and summary["left_out"]["10"] == pytest.approx(ended.mean() / 9)


def test_known_errors_are_measured(normalizer, policy):
    true, wrong = (
        report(model(ENV_ID, normalizer), policy, seed=3) for model in (TrueModel, WrongModel)
    )
    summary = wrong.summary()
    for row in wrong.rows():
        assert row["mse"] == pytest.approx((0.3 * row["step"]) ** 2, rel=1e-3)
        assert row["mse"] == pytest.approx(row["median"], rel=1e-3)
        assert row["floor_mse"] < 1e-9 and row["reward_mse"] == pytest.approx(0.25, rel=1e-3)
        assert row["missed_terminals"] == 0
    # pooled: of the steps that count
    counts = np.array([row["num"] for row in wrong.rows()])
    wanted = (counts[:4] * (0.3 * np.arange(1, 5)) ** 2).sum() / counts[:4].sum()
    assert summary["mse"]["5"] == pytest.approx(wanted, rel=1e-3)
    # every third trajectory ends after its second transition, if it has not ended before
    alive = np.isfinite(true.imagined.missed[::3, 1]) & np.isfinite(true.imagined.squares[::3, 1])
    assert 0 < alive.sum() <= 20
    assert wrong.rows()[1]["false_terminals"] == pytest.approx(
        alive.sum() / wrong.rows()[1]["transitions"]
    )
    assert np.isnan(wrong.imagined.squares[::3, 1:]).all()
    assert summary["left_out"]["10"] > true.summary()["left_out"]["10"]


def played(observations, rewards, terminals):
    return Played(
        np.array(observations, dtype=float)[..., None],
        np.array(rewards, dtype=float),
        np.array(terminals, dtype=bool),
    )


def test_which_transitions_count():
    """Written out by hand: one observation, of scale 2, rewards of scale 10."""
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.zeros(1), torch.tensor([2.0])),
        actions=(torch.zeros(1), torch.ones(1)),
        rewards=(torch.tensor(3.0), torch.tensor(10.0)),
    )
    nan = math.nan
    found = played(
        [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]],
    )
    true = played(
        [[3, 2, 1], [1, 2, 3], [1, nan, nan], [1, 2, 3]],
        [[10, 0, 0], [0, 20, 0], [0, nan, nan], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]],
    )
    errors = transition_errors(found, true, normalizer)
    assert np.allclose(
        errors.squares, [[1, 0, 1], [0, nan, nan], [nan, nan, nan], [0, 0, nan]], equal_nan=True
    )
    assert np.allclose(
        errors.reward_squares,
        [[1, 0, 0], [0, 4, nan], [0, nan, nan], [0, 0, 0]],
        equal_nan=True,
    )
    assert np.nansum(errors.missed) == errors.missed[2, 0] == 1
    assert np.nansum(errors.false) == errors.false[1, 1] == 1
    assert (errors.num_observations, errors.num_transitions) == (6, 9)
    assert errors.mse == pytest.approx(2 / 6, rel=1e-5) and errors.quantile(0.5) == 0.0
    assert errors.share_left_out == pytest.approx(0.5)
    assert errors.terminal_agreement == pytest.approx(7 / 9)
    # sums of deviations from the mean, per trajectory: 2 - 1, 0 - 1/3, 0 - 2/3
    assert errors.standard_error == pytest.approx(math.sqrt(1 + 1 / 9 + 4 / 9) / 6, rel=1e-5)
    blown_up = played([[nan] * 3] * 4, [[nan] * 3] * 4, [[0] * 3] * 4)
    nothing = transition_errors(found, blown_up, normalizer)
    assert nothing.mse is nothing.reward_mse is nothing.terminal_agreement is None
    assert nothing.standard_error is nothing.quantile(0.5) is None
    assert nothing.num_transitions == 0


def windows(environment, policy, normalizer, **options):
    scaler = ActionScaler(environment.action_space, True)
    options = {"num": 40, "num_steps": 9, "seed": 0} | options
    return record_windows(MujocoReplay(environment), policy, normalizer, scaler, **options)


def test_windows_are_of_episodes_as_they_were_played(normalizer, policy):
    environment = make_environment(ENV_ID)
    found = windows(environment, policy, normalizer)
    assert found.states.shape == (40, 5) and found.actions.shape == (40, 9, 1)
    assert np.array_equal(found.states[:, 1:].astype(np.float32), found.observations)
    assert len(np.unique(found.states, axis=0)) == 40 and found.num_episodes > 5
    again = MujocoReplay(environment).play_in_a_loop(found.states, found.actions)
    assert np.array_equal(again.terminals, found.played.terminals)
    assert np.array_equal(np.isnan(again.rewards), np.isnan(found.played.rewards))
    np.testing.assert_allclose(again.observations, found.played.observations, atol=1e-6)
    ended = found.played.terminals.any(axis=1)
    assert 0 < ended.sum() <= 40 and (np.abs(found.actions) < 3).all()
    # actions are the policy's
    mean, std = policy(torch.from_numpy(found.observations))
    z = (torch.from_numpy(found.actions[:, 0]) / 3 - mean) / std
    assert abs(z.mean().item()) < 0.5 and 0.7 < z.std().item() < 1.3


def test_a_seed_gives_the_same_windows_again_and_another_gives_others(normalizer, policy):
    first, again, other = (
        windows(make_environment(ENV_ID), policy, normalizer, seed=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(first.states, again.states)
    assert np.array_equal(first.actions, again.actions)
    assert not np.array_equal(first.states, other.states)


def test_reports_are_reproducible_and_independent_of_the_batch_size_of_playing(agent):
    """Of a Hopper with an untrained model."""

    def found(**options):
        return dynamics_report(
            agent.make_evaluation_environment(),
            agent.world_model,
            agent.policy,
            agent.normalizer,
            agent.action_scaler,
            (2, 20),
            num=32,
            **options,
        )

    first, again, other = found(), found(threads=2), found(seed=1)
    assert first.summary() == again.summary() != other.summary()
    assert first.rows() == again.rows() and len(first.rows()) == 19
    assert first.is_native and first.floor.mse < 1e-6
    assert 1e-3 < first.imagined.first(1).mse < first.imagined.mse
    assert json.loads(json.dumps(first.summary())) == first.summary()
    lines = dynamics_table(first).splitlines()
    assert len(lines) == 4 and all(len(line) < 110 for line in lines)
    assert f"{first.imagined.num_observations:,} of 608 imagined" in lines[-1]


def test_horizons_are_checked_before_any_work(agent):
    diffusion = pg.PolyGRAD("Hopper-v5", preset="quick", device="cpu")
    parts = (diffusion.policy, diffusion.normalizer, diffusion.action_scaler)
    for horizons, message in [
        ((10, 50), "horizon must be at most 5, the whole trajectory .*, got 50: train one with"),
        ((1, 5), "horizon must be an integer of at least 2, got 1"),
        ((), "horizons must be at least one integer, got none"),
    ]:
        with pytest.raises(pg.InputError, match=message):
            dynamics_report(None, diffusion.world_model, *parts, horizons)
    for wrong in ({"num": 0}, {"seed": -1}):
        (name,) = wrong
        with pytest.raises(pg.InputError, match=f"{name} must be an integer"):
            dynamics_report(None, diffusion.world_model, *parts, (5,), **wrong)


def test_episodes_that_are_too_short_are_told(normalizer, policy):
    class Balanced(gymnasium.Wrapper):
        def step(self, action):
            observation, reward, _, truncated, info = self.env.step(action)
            return observation, reward, False, truncated, info

    environment = gymnasium.wrappers.TimeLimit(Balanced(make_environment(ENV_ID)), 12)
    assert windows(environment, policy, normalizer, num_steps=12).states.shape == (40, 5)
    message = "must have episodes of at least 13 steps for that horizon, got 12 in the longest of"
    with pytest.raises(pg.InputError, match=f"^{ENV_ID} {message} 10$"):
        windows(environment, policy, normalizer, num_steps=13)


def test_a_model_that_imagines_nan_is_told(normalizer, policy):
    class Broken(TrueModel):
        def imagine(self, *arguments, **options):
            batch = super().imagine(*arguments, **options)
            return TrajectoryBatch(
                batch.observations, batch.actions, batch.rewards * math.nan, batch.terminals
            )

    with pytest.raises(pg.NonFiniteError, match="the imagined rewards are not finite"):
        report(Broken(ENV_ID, normalizer), policy)
