"""Results recorded from the released code of Policy-Guided Diffusion are met: datasets, offline
agents, evaluation. See recorded_pgd.py."""

import os

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from cases import part
from polygrad_fast.compat import pgd_agents
from polygrad_fast.config import IQLConfig, TD3BCConfig
from polygrad_fast.data.d4rl import REFERENCE_RETURNS, d4rl_environment, d4rl_score
from polygrad_fast.data.load import load_dataset
from polygrad_fast.data.windows import TrajectoryWindows
from polygrad_fast.evaluation.returns import evaluate_policy
from polygrad_fast.policy import log_prob
from polygrad_fast.transitions import Transitions
from recorded_pgd import INDEX, cases, recorded

WEIGHTS, GRADIENTS, LOSSES, OUTPUTS = 1e-6, 5e-6, 1e-6, 2e-6
"""Largest relative norm errors, those of the fixture's README."""
ACTOR_LOSS = 3e-6
"""Of IQL: small against its terms. A recorded one is 2.4e-6 from the same in float64."""


def relative_norm(got, wanted) -> float:
    """Return |got - wanted| / |wanted|."""
    assert got.shape == wanted.shape
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def assert_met(got: dict, wanted: dict, bound: float) -> None:
    """Every wanted array is met, and nothing else is there."""
    assert got.keys() == wanted.keys() and wanted
    for name, value in wanted.items():
        assert relative_norm(got[name], value) < bound, name


def moments(arrays, info):
    if not info["normalizes_observations"]:
        return None
    return arrays["observation_mean"], arrays["observation_std"]


def bounds(info):
    low, high = info["action_limits"]
    return [low] * info["action_dim"], [high] * info["action_dim"]


def shared_options(info):
    assert info["activation"] == "relu"
    return {
        "gamma": info["gamma"],
        "polyak": info["polyak"],
        "learning_rate": info["learning_rate"],
        "adam_eps": info["adam_eps"],
        "normalize_observations": info["normalizes_observations"],
    }


def batch_of(update):
    return Transitions.from_parts(
        update["batch.observation"],
        update["batch.action"],
        update["batch.reward"].squeeze(-1),
        update["batch.next_observation"],
        update["batch.done"].squeeze(-1),
    )


def trained(arrays):
    """Leave out targets."""
    return {name: value for name, value in arrays.items() if not name.startswith("target_")}


def d4rl_arrays(arrays):
    """Return the arrays of a D4RL file."""
    return {name: value.numpy() for name, value in part(arrays, "raw.").items()}


def assert_windows(windows: TrajectoryWindows, wanted: dict) -> None:
    assert windows.starts.tolist() == wanted["start"].tolist()
    every = windows.gather(torch.arange(len(windows)))
    assert relative_norm(every, wanted["windows"]) < LOSSES


@pytest.mark.parametrize("name", cases("dataset"))
def test_dataset(name, tmp_path):
    arrays, info = recorded(name), INDEX[name]
    np.savez(tmp_path / "raw.npz", **d4rl_arrays(arrays))
    dataset = load_dataset(tmp_path / "raw.npz")
    assert len(dataset) == info["rows"] - 1
    length, stride = info["trajectory_length"], info["stride"]
    number = int(info["validation_fraction"] * dataset.num_episodes)
    validation = arrays["split.validation_episodes"].numpy()
    assert len(validation) == number == dataset.split(info["validation_fraction"])[1].num_episodes
    for which, episodes in (("all", []), ("split", validation)):
        wanted = part(arrays, f"{which}.")
        windows = TrajectoryWindows(dataset.without(episodes), length, stride)
        assert_windows(windows, part(wanted, "train."))
        normalizer = windows.normalizer
        for moment in ("mean", "std"):
            fields = (
                wanted[f"normalizer.{f}.{moment}"] for f in ("obs", "action", "reward", "done")
            )
            assert relative_norm(getattr(normalizer, moment), torch.cat(list(fields))) < LOSSES
        raw = normalizer.unnormalize(windows.rows)
        again = normalizer.normalize(raw)
        assert relative_norm(again, windows.rows) < 1e-4  # tanh and arctanh near 0.999
    held_out = dataset.take_episodes(validation)
    assert_windows(
        TrajectoryWindows(held_out, length, stride, windows.normalizer), part(wanted, "validation.")
    )

    transitions, wanted = dataset.transitions(), part(arrays, "agent_data.")
    mean, std = transitions.observation_moments()
    got = {
        "observation": transitions.observations,
        "action": transitions.actions,
        "reward": transitions.rewards[:, None],
        "next_observation": transitions.next_observations,
        "done": transitions.terminals[:, None],
    }
    for key, value in got.items():
        assert torch.equal(value, wanted.pop(key)), key
    assert_met({"observation_mean": mean, "observation_std": std}, wanted, LOSSES)


@pytest.mark.parametrize("name", cases("td3_bc"))
def test_td3_bc(name):
    arrays, info = recorded(name), INDEX[name]
    config = TD3BCConfig.released(
        alpha=info["alpha"],
        policy_noise=info["policy_noise"],
        noise_clip=info["noise_clip"],
        action_max=info["action_max"],
        critic_updates=info["critic_updates"],
        **shared_options(info),
    )
    before = part(arrays, "before.")
    agent = pgd_agents.load_td3_bc(before, *bounds(info), config, moments(arrays, info))
    assert_met(trained(pgd_agents.export_agent(agent)), before, 1e-12)

    gradients = []
    step = agent.step

    def recording_step(which, loss):
        step(which, loss)
        gradients.append((which, loss, pgd_agents.export_agent(agent, gradients=True)))

    for u in range(1, info["updates"] + 1):
        update = part(arrays, f"update_{u}.")
        agent.step = recording_step
        gradients.clear()
        metrics = agent.update(batch_of(update), noise=update["target_noise"])
        assert metrics.keys() == {
            "q1_loss", "q2_loss", "actor_loss", "q_mean", "lambda", "bc_loss"
        }  # fmt: skip
        assert_met(metrics, {key: update[key] for key in metrics}, LOSSES)

        (first, _, actor), *critics = gradients
        assert first == "policy" and len(critics) == info["critic_updates"]
        assert_met(part(actor, "actor."), part(update, "gradient.actor."), GRADIENTS)
        for k, (which, _, gradient) in enumerate(critics, 1):
            assert which == "critics"
            for q in ("q1", "q2"):
                wanted = part(update, f"gradient.{q}.{k}.")
                assert_met(part(gradient, f"{q}."), wanted, GRADIENTS)
        assert_met(pgd_agents.export_agent(agent), part(arrays, f"after_{u}."), WEIGHTS)
        observations = update["batch.observation"]
        action = agent.policy(observations)
        assert relative_norm(action, update["policy_action"]) < OUTPUTS
        acted, _ = agent.predict(observations.numpy())
        assert relative_norm(torch.from_numpy(acted), update["policy_action"]) < OUTPUTS


@pytest.mark.parametrize("name", cases("iql"))
def test_iql(name):
    arrays, info = recorded(name), INDEX[name]
    config = IQLConfig.released(
        expectile=info["tau"],
        beta=info["beta"],
        max_weight=info["advantage_weight_max"],
        log_std_min=info["log_std_min"],
        log_std_max=info["log_std_max"],
        **shared_options(info),
    )
    before = part(arrays, "before.")
    agent = pgd_agents.load_iql(before, *bounds(info), config, moments(arrays, info))
    assert_met(trained(pgd_agents.export_agent(agent)), before, 1e-12)
    for u in range(1, info["updates"] + 1):
        update = part(arrays, f"update_{u}.")
        metrics = agent.update(batch_of(update))
        assert metrics.keys() == {"actor_loss", "q_loss", "value_loss"}
        actor_loss = metrics.pop("actor_loss")
        assert relative_norm(actor_loss, update["actor_loss"]) < ACTOR_LOSS
        assert_met(metrics, {key: update[key] for key in metrics}, LOSSES)
        gradients = pgd_agents.export_agent(agent, gradients=True)
        assert_met(gradients, part(update, "gradient."), GRADIENTS)
        assert_met(pgd_agents.export_agent(agent), part(arrays, f"after_{u}."), WEIGHTS)
        mean, std = agent.policy.score_parameters(update["batch.observation"])
        assert relative_norm(mean, update["policy_mean"]) < OUTPUTS
        assert relative_norm(std, update["policy_std"]) < OUTPUTS
        log_probs = log_prob(update["batch.action"], mean, std)
        assert relative_norm(log_probs, update["policy_log_probability"]) < OUTPUTS


class Recorded(gymnasium.Env):
    """Gives recorded rewards and ends; it goes on by itself after an end, as the recording did."""

    observation_space, action_space = Box(-1, 1, (1,)), Box(-1, 1, (1,))

    def __init__(self, rewards, dones):
        self.results = zip(rewards.tolist(), dones.tolist(), strict=True)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        reward, done = next(self.results)
        return np.zeros(1, dtype=np.float32), reward, done, False, {}


@pytest.mark.parametrize("name", cases("evaluation"))
def test_evaluation(name):
    arrays, info = recorded(name), INDEX[name]
    workers = range(info["workers"])
    environments = [Recorded(arrays["rewards"][:, w], arrays["dones"][:, w]) for w in workers]
    result = evaluate_policy(
        lambda observations: np.zeros((len(observations), 1)),
        environments,
        seeds=list(workers),
        max_episode_steps=info["steps"],
    )
    wanted = arrays["returns"].T[~arrays["returns"].T.isnan()]
    assert relative_norm(torch.from_numpy(result.returns).float(), wanted) < LOSSES
    ended = [arrays["returns"][:, w].isfinite().nonzero() for w in workers]
    assert result.lengths.tolist() == [int(step) + 1 for step in ended if len(step)]
    assert result.mean_reward == pytest.approx(arrays["mean_return"].item(), rel=LOSSES)
    score = d4rl_score(info["environment"], result.mean_reward)
    assert score == pytest.approx(arrays["mean_score"].item(), rel=LOSSES)
    wanted = info["reference_min"], info["reference_max"]
    assert REFERENCE_RETURNS[d4rl_environment(info["environment"])] == wanted


def test_every_offline_case_is_checked():
    checked = cases("dataset", "td3_bc", "iql", "evaluation")
    diffusion = cases(
        "denoiser", "denoiser_loss", "denoiser_training", "preconditioning", "schedules", "sample"
    )
    assert checked and sorted(INDEX) == sorted((*checked, *diffusion))


def test_defaults_are_the_released_settings():
    if "POLYGRAD_RECORDED_PGD" in os.environ:
        pytest.skip("another recording may have other settings")
    info = INDEX["td3_bc_a"]
    options = ("alpha", "policy_noise", "noise_clip", "action_max", "critic_updates")
    assert TD3BCConfig() == TD3BCConfig(
        **{option: info[option] for option in options}, **shared_options(info)
    )
    info = INDEX["iql_a"]
    assert IQLConfig() == IQLConfig(
        expectile=info["tau"], beta=info["beta"], max_weight=info["advantage_weight_max"],
        **shared_options(info),
    )  # fmt: skip
