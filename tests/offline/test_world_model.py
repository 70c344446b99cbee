"""World models trained on a dataset."""

import dataclasses

import numpy as np
import pytest
import torch

from cases import changed, tiny_config
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.data.replay import ReplayBuffer
from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.offline.runs import fit_world_model
from polygrad_fast.offline.world_model import load_world_model, replay_of, split_episodes


def dataset(lengths=(7, 3, 1, 9, 5, 6), terminated=(True, False, True, True, False, False), seed=0):
    g, total = np.random.default_rng(seed), sum(lengths)
    last = np.cumsum(lengths) - 1
    terminals, ends = np.zeros(total, dtype=bool), np.zeros(total, dtype=bool)
    terminals[last[list(terminated)]], ends[last] = True, True
    observations = g.normal(size=(total, 3))
    actions, rewards = g.uniform(-1, 1, (total, 1)), g.normal(size=total)
    following = np.roll(observations, -1, axis=0)
    flags = terminals, ends & ~terminals
    return OfflineDataset(
        observations, actions, rewards, following, *flags, ends=ends, true_next=True, name="made"
    )


@pytest.mark.parametrize("horizon", [1, 4, 6])
def test_windows_are_those_of_steps_that_were_added_one_after_the_other(horizon):
    data = dataset()
    found = replay_of(data, horizon, torch.device("cpu"))
    wanted = ReplayBuffer(len(data), horizon, 3, 1)
    for i in range(len(data)):
        truncated = bool(data.ends[i] and not data.terminals[i])
        step = data.observations[i], data.actions[i], data.rewards[i], data.terminals[i], truncated
        wanted.add(*step)
    found.moments(), wanted.moments()
    states = found.state_dict(), wanted.state_dict()
    assert set(states[0]) == set(states[1])
    for name, value in states[1].items():
        same = torch.equal if torch.is_tensor(value) else lambda a, b: a == b
        assert same(states[0][name], value), name


def test_too_short_episodes_are_told():
    data = dataset((3, 2), (False, False))
    with pytest.raises(InputError, match="must have episodes of at least 4 steps, the horizon"):
        replay_of(data, 4, torch.device("cpu"))


def test_held_out_episodes_are_the_same_every_time():
    data = dataset()
    trained, measured = split_episodes(data, 0.4)
    assert (trained.num_episodes, measured.num_episodes) == (4, 2)
    again = split_episodes(data, 0.4)
    assert np.array_equal(again[1].observations, measured.observations)
    with pytest.raises(InputError, match="enough for a held-out share of 0.1, got 6"):
        split_episodes(data, 0.1)


@pytest.fixture
def source(tmp_path):
    path, made = tmp_path / "data.npz", dataset()
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    np.savez(path, **{name: getattr(made, name) for name in names})
    return str(path)


@pytest.mark.parametrize("world_model", ["trajectory_diffusion", "autoregressive", "ensemble"])
def test_a_resumed_training_is_the_uninterrupted_one(source, tmp_path, world_model):
    config = changed(tiny_config(), world_model=world_model, log_interval=2, checkpoint_interval=3)
    config = config.resolved("none")

    def begin(name, resume=False, seed=3, updates=7):
        options = {"held_out": 0.4, "seed": seed, "device": "cpu", "resume": resume}
        return fit_world_model(source, tmp_path / name, config, updates, **options)

    whole = begin("whole")
    assert whole.train(progress=False)
    cut = begin("cut")
    for _ in range(3):
        cut.training.update()
    training = cut.training
    cut.run.save(3, training.weights(), training.state_dict())
    resumed = begin("cut", resume=True)
    assert resumed.training.num_updates == 3 and resumed.train(progress=False)
    models = [load_world_model(tmp_path / name, device="cpu") for name in ("whole", "cut")]
    weights = [
        {
            f"{part}.{name}": tensor
            for part, module in trained.model.modules().items()
            for name, tensor in module.state_dict().items()
        }
        for trained in models
    ]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    trained, _ = split_episodes(dataset(), 0.4)
    mean = torch.from_numpy(trained.observations.mean(axis=0))
    assert torch.allclose(models[0].normalizer.observations_mean, mean, atol=1e-6)
    with pytest.raises(CheckpointError, match="total_updates of .* must be 7"):
        begin("cut", resume=True, updates=9)


def test_another_sampler_imagines_with_the_same_weights(source, tmp_path):
    config = changed(tiny_config(), log_interval=2, checkpoint_interval=3).resolved("none")
    fit_world_model(source, tmp_path / "run", config, 2, 0.4, device="cpu").train(progress=False)
    exact = dataclasses.replace(config.sampler, action_update="exact")
    found = load_world_model(tmp_path / "run", exact, "cpu")
    plain = load_world_model(tmp_path / "run", device="cpu")
    assert found.config.sampler == exact and plain.config.sampler == config.sampler
    for ours, others in zip(
        found.model.denoiser.parameters(), plain.model.denoiser.parameters(), strict=True
    ):
        assert torch.equal(ours, others)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        load_world_model(tmp_path / "none", device="cpu")
