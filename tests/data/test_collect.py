"""Playing episodes into datasets."""

import json
import sys
import types
import zipfile

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from polygrad_fast.data import collect
from polygrad_fast.data.collect import collect_episodes, random_actions
from polygrad_fast.data.sb3 import load_stable_baselines3
from polygrad_fast.errors import InputError


class Walk(gymnasium.Env):
    """Adds its action to a number; odd episodes end, even ones are cut off."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float64)

    def __init__(self, bound=2.0):
        self.action_space, self.episodes = Box(-bound, bound, (1,), np.float32), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.normal(size=1), 0
        self.episodes += 1
        return self.place.copy(), {}

    def step(self, action):
        self.place += action
        action[:] = 99  # a copy, or the record shows it
        self.steps += 1
        over = self.steps == 3 + self.episodes
        flags = over and self.episodes % 2 == 1, over and self.episodes % 2 == 0
        return self.place, float(self.place[0]), *flags, {}  # its own array, changed later


def test_steps_are_recorded_as_they_were():
    finished = []
    dataset = collect_episodes(
        Walk(), lambda observation: np.array([0.5]), 3, seed=4, recipe={"policy": "constant"},
        on_episode=lambda *result: finished.append(result),
    )  # fmt: skip
    assert np.flatnonzero(dataset.ends).tolist() == [3, 8, 14]
    assert np.flatnonzero(dataset.terminals).tolist() == [3, 14]
    assert np.flatnonzero(dataset.timeouts).tolist() == [8]
    assert (dataset.actions == 0.5).all()
    moved = dataset.next_observations - dataset.observations
    assert np.allclose(moved, 0.5, atol=1e-6)
    inside = ~dataset.ends[:-1]
    assert np.array_equal(dataset.next_observations[:-1][inside], dataset.observations[1:][inside])
    assert np.allclose(dataset.rewards, dataset.next_observations[:, 0])
    assert [length for _, length in finished] == [4, 5, 6]
    returns = np.array([value for value, _ in finished])
    assert np.allclose(returns, dataset.episode_returns())
    recipe = dataset.recipe
    assert recipe["policy"] == "constant" and recipe["episodes"] == 3 and recipe["seed"] == 4
    assert recipe["mean_return"] == pytest.approx(returns.mean())
    assert recipe["std_return"] == pytest.approx(returns.std())
    assert recipe["steps"] == 15 and recipe["versions"]["numpy"] == np.__version__
    json.dumps(recipe)


def test_a_seed_gives_the_same_dataset():
    def rewards(seed):
        env = gymnasium.make("Pendulum-v1")
        return collect_episodes(env, random_actions(env, seed), 2, seed, (0.0, 0.3)).rewards

    assert np.array_equal(rewards(0), rewards(0))
    assert not np.array_equal(rewards(0), rewards(1))


def test_noise_is_in_units_of_half_the_range_and_clipped():
    class Long(Walk):
        def step(self, action):
            self.steps += 1
            return self.place, 0.0, False, self.steps == 2000, {}

    dataset = collect_episodes(Long(), lambda observation: np.zeros(1), 3, 0, (0.0, 0.25, 3.0))
    still, quiet, loud = dataset.actions.reshape(3, 2000)
    assert (still == 0).all()
    assert quiet.std() == pytest.approx(0.5, rel=0.05)  # bounds -2 and 2
    assert np.abs(loud).max() == 2 and (np.abs(loud) == 2).mean() > 0.6


def test_unusable_arguments_and_environments_are_named(monkeypatch):
    act = random_actions(Walk(), 0)
    for arguments, message in (
        ((Walk(), act, 0), "num_episodes must be an integer of at least 1, got 0"),
        ((Walk(), act, 1, -1), "seed must be an integer of at least 0"),
        ((Walk(), act, 1, 0, (-0.1,)), "noise_std must be numbers of at least 0, got -0.1"),
        ((Walk(np.inf), act, 1, 0, (0.1,)), "noise_std must be 0 for Walk, whose actions have no"),
        ((gymnasium.make("CartPole-v1"), act, 1), "action space must be a Box"),
    ):
        with pytest.raises(InputError, match=message):
            collect_episodes(*arguments)
    monkeypatch.setattr(collect, "MAX_EPISODE_STEPS", 3)
    with pytest.raises(InputError, match="Walk, episode 1 must end some time .* got 3 steps"):
        collect_episodes(Walk(), act, 1)


class Model:
    """A stand-in for a model of Stable-Baselines3."""

    observation_space, action_space = Box(-1, 1, (3,)), Box(-2, 2, (1,))
    loaded = []

    @classmethod
    def load(cls, path, device):
        cls.loaded.append(path)
        return cls()

    def set_random_seed(self, seed):
        self.seed = seed

    def predict(self, observation, deterministic):
        return np.array([observation.sum() + self.seed + 100 * deterministic]), None


def save_model(path, **options):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", json.dumps(options))
    return path


def test_models_of_stable_baselines3(tmp_path, monkeypatch):
    path = save_model(tmp_path / "sac.zip", target_entropy=-1, gamma=0.99)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(InputError, match="sac.zip needs the package stable_baselines3"):
        load_stable_baselines3(path, (3, 1), True, 0)
    package = types.SimpleNamespace(SAC=Model)
    monkeypatch.setitem(sys.modules, "stable_baselines3", package)
    act = load_stable_baselines3(path, (3, 1), True, 5)
    assert act(np.ones(3)).tolist() == [108]
    assert load_stable_baselines3(path, (3, 1), False, 5)(np.ones(3)).tolist() == [8]
    assert Model.loaded == [path, path]
    with pytest.raises(InputError, match="observations of 4 and actions of 1 numbers, got shapes"):
        load_stable_baselines3(path, (4, 1), True, 0)
    with pytest.raises(InputError, match="must be a model of PPO, SAC, TD3, A2C, got another's"):
        load_stable_baselines3(save_model(tmp_path / "dqn.zip", gamma=1), (3, 1), True, 0)
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(InputError, match="text.zip is not a model of Stable-Baselines3"):
        load_stable_baselines3(tmp_path / "text.zip", (3, 1), True, 0)
    package.SAC = types.SimpleNamespace(load=lambda path, device: 1 / 0)
    with pytest.raises(InputError, match="sac.zip cannot be loaded .*: division by zero"):
        load_stable_baselines3(path, (3, 1), True, 0)
