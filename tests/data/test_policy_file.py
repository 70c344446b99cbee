"""Policies in one file, beside the models that they were made of."""

import dataclasses
import json
import math

import gymnasium
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from polygrad_fast import cli
from polygrad_fast.data.load import load_dataset
from polygrad_fast.data.policy_file import PolicyFacts, StoredPolicy, load_policy, save_policy
from polygrad_fast.errors import InputError
from polygrad_fast.recipes import collect_from_file

ENV = "InvertedPendulum-v5"
FACTS = PolicyFacts(
    env_id=ENV,
    algorithm="PPO of stable_baselines3 2.7",
    activation="tanh",
    squashed=False,
    env_steps=300,
    seed=1,
    recipe="polygrad-fast baseline --env-id InvertedPendulum-v5",
    mean_return=400.0,
    std_return=3.0,
    episodes=100,
    evaluation_seed=7,
    versions={"numpy": None},
)


def make_policy(observation_dim=4, action_dim=1, seed=0, dependent=False, **facts):
    """Layers 4 -> 8 -> 8 -> 1 of numbers that half precision holds."""
    generator = np.random.default_rng(seed)

    def draw(*shape):
        return generator.normal(0, 0.4, shape).astype(np.float16).astype(np.float32)

    widths = (observation_dim, 8, 8, action_dim)
    layers = tuple((draw(to, of), draw(to)) for of, to in zip(widths, widths[1:], strict=False))
    log_std = draw(action_dim, 8) if dependent else None, draw(action_dim)
    bounds = np.full(action_dim, -3, np.float32), np.full(action_dim, 3, np.float32)
    return StoredPolicy(layers, log_std, bounds, dataclasses.replace(FACTS, **facts))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "policy.safetensors"
    save_policy(make_policy(), path)
    return path


def rewritten(path, change=lambda tensors: None, facts=None):
    """Store the same file with changed tensors, and other metadata where given."""
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors)
    if facts is not None:
        metadata = facts
    path.write_bytes(safetensors.numpy.save(tensors, metadata))


@pytest.mark.parametrize("dependent", [False, True])
def test_what_is_stored_comes_back(tmp_path, dependent):
    path, policy = tmp_path / "p.safetensors", make_policy(dependent=dependent)
    save_policy(policy, path)
    again = load_policy(path, ENV)
    assert again.facts == policy.facts and again.dims == (4, 1)
    observations = np.random.default_rng(1).normal(size=(5, 4))
    for draws in (None, 3):
        one, two = (
            p.act(observations, None if draws is None else np.random.default_rng(draws))
            for p in (policy, again)
        )
        assert np.array_equal(one, two)
    assert not np.array_equal(one, policy.act(observations))
    assert np.allclose(policy.act(observations[0]), policy.act(observations)[0], atol=1e-6)


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("squashed", [False, True])
def test_actions_are_those_of_the_gaussian(squashed, dependent):
    policy = make_policy(seed=2, squashed=squashed, dependent=dependent, activation="relu")
    observation = np.array([0.2, -0.1, 0.3, 0.1], np.float32)
    hidden = torch.from_numpy(observation)
    for weight, bias in policy.layers[:-1]:
        hidden = torch.relu(torch.from_numpy(weight) @ hidden + torch.from_numpy(bias))
    weight, bias = map(torch.from_numpy, policy.layers[-1])
    mean = (weight @ hidden + bias).item()
    weight, bias = policy.log_std
    log_std = bias[0] + (weight[0] @ hidden.numpy() if dependent else 0)

    def bounded(x):
        return 3 * np.tanh(x) if squashed else np.clip(x, -3, 3)

    assert policy.act(observation)[0] == pytest.approx(bounded(mean), abs=1e-5)
    draws = policy.act(np.tile(observation, (20_000, 1)), np.random.default_rng(0))[:, 0]
    wanted = bounded(mean + np.exp(log_std) * np.random.default_rng(1).normal(size=20_000))
    assert draws.mean() == pytest.approx(wanted.mean(), abs=0.1)
    assert draws.std() == pytest.approx(wanted.std(), rel=0.05)
    assert np.abs(draws).max() <= 3 and draws.std() > 0.1


def without_a_layer(tensors):
    del tensors["layers.1.bias"]


def with_a_nan(tensors):
    tensors["layers.0.bias"][0] = np.nan


def of_other_shapes(tensors):
    tensors["layers.1.weight"] = tensors["layers.1.weight"][:, :3].copy()


def of_other_bounds(tensors):
    tensors["action_low"] = np.zeros(2, np.float16)


def facts_without(name):
    facts = dataclasses.asdict(FACTS)
    del facts[name]
    return {"polygrad_fast.policy": json.dumps(facts)}


def facts_with(**changed):
    return {"polygrad_fast.policy": json.dumps(dataclasses.asdict(FACTS) | changed)}


@pytest.mark.parametrize(
    ("change", "facts", "message"),
    [
        (without_a_layer, None, "damaged policy file: KeyError 'layers.1.bias'"),
        (with_a_nan, None, "damaged policy file: ValueError weights that are not finite"),
        (of_other_shapes, None, "damaged policy file: ValueError layers of shapes"),
        (of_other_bounds, None, "that are not of 1 actions"),
        (lambda tensors: None, {}, "must be a policy file, got safetensors that describe no pol"),
        (lambda tensors: None, facts_without("mean_return"), "damaged .* argument: 'mean_return'"),
        (lambda tensors: None, {"polygrad_fast.policy": "{"}, "damaged .*JSONDecodeError"),
        (lambda tensors: None, facts_with(mean_return=math.nan), "damaged .* mean_return nan"),
    ],
)
def test_a_damaged_file_is_named(path, change, facts, message):
    rewritten(path, change, facts)
    with pytest.raises(InputError, match=message):
        load_policy(path)


def test_tensors_that_numpy_does_not_have_are_named(path):
    safetensors.torch.save_file({"layers.0.bias": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(InputError, match="policy.safetensors is not a policy file: "):
        load_policy(path)


def test_another_file_or_environment_is_named(path, tmp_path):
    with pytest.raises(InputError, match="must be a policy of Hopper-v5, got one of InvertedPend"):
        load_policy(path, "Hopper-v5")
    with pytest.raises(InputError, match=r"dimensions \(11, 3\), got \(4, 1\)"):
        load_policy(path, ENV, (11, 3))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="policy.safetensors is not a policy file: "):
        load_policy(path)


def collect(out, *more):
    return cli.main(["data", "collect", "--out", str(out), "--no-progress", *map(str, more)])


def test_the_command_plays_a_file(path, tmp_path, capsys):
    words = ("--env-id", ENV, "--policy", path, "--episodes", "2")
    assert collect(tmp_path / "mean.npz", *words, "--deterministic") == 0
    mean = load_dataset(tmp_path / "mean.npz")
    policy = load_policy(path)
    assert np.allclose(mean.actions, policy.act(mean.observations), atol=1e-5)
    assert mean.recipe["trained_by"] == FACTS.recipe
    assert collect(tmp_path / "drawn.npz", *words) == 0
    drawn = load_dataset(tmp_path / "drawn.npz")
    assert not np.allclose(drawn.actions, policy.act(drawn.observations), atol=1e-2)
    capsys.readouterr()
    for wrong in (path, path.with_name("gone.safetensors")):
        assert collect(tmp_path / "no", "--env-id", "Pendulum-v1", "--policy", wrong) == 2
        err = capsys.readouterr().err
        assert wrong.name in err and err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_recipes_of_a_file(path, tmp_path, capsys):
    words = ("--env-id", ENV, "--policy", path, "--recipe", "mixed-noise", "--noise-std", "0", "1")
    assert collect(tmp_path / "mixed.npz", *words, "--steps", "30", "--seed", "4") == 0
    mixed = load_dataset(tmp_path / "mixed.npz")
    env = gymnasium.make(ENV)
    medium = collect_from_file("medium", path, env, 300.0, num_steps=30, seed=4)
    first = int(np.flatnonzero(medium.ends)[0]) + 1
    assert np.array_equal(mixed.actions[:first], medium.actions[:first])
    assert mixed.recipe["recipe"] == "mixed-noise" and mixed.recipe["noise_std"] == [0.0, 1.0]
    assert medium.recipe["noise_std"] == [] and medium.recipe["evaluated_return"] == 400.0
    assert medium.recipe["training_seed"] == 1 and len(medium) >= 30
    again = collect_from_file("medium", path, env, 300.0, num_steps=30, seed=4)
    assert np.array_equal(again.actions, medium.actions)
    capsys.readouterr()
    assert collect(tmp_path / "no.npz", *words, "--medium-return", "401") == 2
    assert "must have reached a mean return of 401 (--medium-return), got 400" in (
        capsys.readouterr().err
    )
