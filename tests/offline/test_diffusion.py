"""Training of diffusion models, and their datasets' units."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from polygrad_fast.config import DiffuseConfig, EDMConfig, EDMTrainingConfig, TemporalUNetConfig
from polygrad_fast.data.load import load_dataset
from polygrad_fast.data.windows import TrajectoryWindows
from polygrad_fast.diffusion.edm import edm_loss, training_sigma
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.offline.diffusion import DiffusionTraining, load_diffusion
from polygrad_fast.offline.runs import diffuse
from polygrad_fast.offline.task import load_task
from polygrad_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from polygrad_fast.runs.metrics import read_metrics
from polygrad_fast.sampling.edm_sampler import EDMSampler


def rows_of(training, until):
    rows = []
    while training.num_updates < until:
        training.update()
        rows.append(training.metrics())
    return rows


def test_actions_are_scaled_to_the_bounds(dataset_file, task):
    raw = load_dataset(dataset_file)
    assert raw.actions.max() > 1.5
    assert np.allclose(task.dataset.actions, raw.actions / 2, atol=1e-6)
    assert np.array_equal(task.dataset.observations, raw.observations)
    assert task.identity["action_low"] == [-2.0] and task.identity["action_high"] == [2.0]
    assert np.allclose(task.scaler.to_environment(task.dataset.actions), raw.actions, atol=1e-6)


def write_npz(path, rows=30, actions=0.5, observation_dim=3):
    done = np.zeros(rows, dtype=bool)
    done[9::10] = True
    np.savez(
        path,
        observations=np.random.default_rng(0).normal(size=(rows, observation_dim)),
        actions=np.full((rows, 1), actions),
        rewards=np.zeros(rows),
        terminals=done,
        timeouts=~done & done,
    )
    return str(path)


def test_an_unknown_environment_has_actions_in_the_unit_interval(tmp_path):
    task = load_task(write_npz(tmp_path / "own.npz"))
    assert task.env_id is None and task.dataset.actions.max() == 0.5
    with pytest.raises(InputError, match=r"must lie in \[-1, 1\], the bounds of an unknown"):
        load_task(write_npz(tmp_path / "own.npz", actions=1.5))
    assert load_task(write_npz(tmp_path / "own.npz", actions=1.5), "Pendulum-v1").env_id


def test_d4rl_environments_need_not_be_made(tmp_path):
    path = write_npz(tmp_path / "hopper-medium-v2.npz", observation_dim=11)
    task = load_task(path)
    assert task.env_id == "Hopper-v2" and task.space.high.tolist() == [1.0]


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Nope-v1", "environment id must be one that gymnasium knows"),
        (
            "MountainCarContinuous-v0",
            r"\(2, 1\) as MountainCarContinuous-v0, got \(3, 1",
        ),
        ("CartPole-v1", "action space must be a Box"),
    ],
)
def test_wrong_environments_are_refused(dataset_file, env_id, message):
    with pytest.raises(InputError, match=message):
        load_task(str(dataset_file), env_id)


@pytest.mark.parametrize("at", [3, 7, 9])
def test_a_resumed_training_is_the_same_to_the_bit(task, tiny_diffuse, tmp_path, at):
    """19 windows make 2 batches of 8 an epoch: 3, 7 and 9 are within one."""
    whole = DiffusionTraining(task.dataset, tiny_diffuse, 1, "cpu")
    assert len(whole.windows) // 8 == 2
    rows = rows_of(whole, 12)
    part = DiffusionTraining(task.dataset, tiny_diffuse, 1, "cpu")
    head = rows_of(part, at)
    save_checkpoint(tmp_path / "c", part.weights(), part.state_dict(), {})
    weights, state, _ = load_checkpoint(tmp_path / "c")
    continued = DiffusionTraining(task.dataset, tiny_diffuse, 1, "cpu")
    torch.manual_seed(3)
    continued.load(weights, state, "here")
    assert head + rows_of(continued, 12) == rows
    assert rows[3] and rows[5] and not rows[0]
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, continued.weights()[name]), name


def test_an_epoch_takes_every_window_once(task, tiny_diffuse, monkeypatch):
    taken = []
    gather = TrajectoryWindows.gather

    def record(windows, index):
        taken.append(index.tolist())
        return gather(windows, index)

    training = DiffusionTraining(task.dataset, tiny_diffuse, 0, "cpu")
    monkeypatch.setattr(TrajectoryWindows, "gather", record)
    rows_of(training, 4)
    first, second = taken[0] + taken[1], taken[2] + taken[3]
    assert len(set(first)) == len(set(second)) == 16 and first != second


def test_number_of_updates(task, tiny_diffuse):
    config = dataclasses.replace(
        tiny_diffuse, total_updates=None, training=EDMTrainingConfig(batch_size=8, num_epochs=7)
    )
    assert DiffusionTraining(task.dataset, config, 0, "cpu").total_updates == 2 * 7
    many = dataclasses.replace(config, training=EDMTrainingConfig(batch_size=500))
    with pytest.raises(InputError, match="batch_size must be at most the number of windows, "):
        DiffusionTraining(task.dataset, many, 0, "cpu")


def test_the_validation_loss_is_that_of_the_averaged_network(task, tiny_diffuse):
    training = DiffusionTraining(task.dataset, tiny_diffuse, 0, "cpu")
    kept, held_out = task.dataset.split(0.2, 0)
    windows = TrajectoryWindows(held_out, 6, 40, training.normalizer)
    assert len(windows) < 8
    batch = windows.gather(torch.arange(len(windows)))
    state = np.random.SeedSequence((0,)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    sigma = training_sigma(torch.randn(len(batch), generator=generator), tiny_diffuse.training)
    noise = torch.randn(batch.shape, generator=generator)
    rows_of(training, 5)
    with torch.no_grad():
        wanted = edm_loss(training.trainer.ema_model, batch, sigma, noise, 1.0)
        other = edm_loss(training.network, batch, sigma, noise, 1.0)
    assert training.validation_loss() == pytest.approx(float(wanted), rel=1e-6)
    assert training.validation_loss() != pytest.approx(float(other), rel=1e-6)


def test_few_episodes_have_no_validation_loss(task, tiny_diffuse):
    config = dataclasses.replace(tiny_diffuse, validation_fraction=0.1)
    training = DiffusionTraining(task.dataset, config, 0, "cpu")
    rows = rows_of(training, 12)
    assert not any("diffusion/validation_loss" in row for row in rows)


def test_weights_that_are_not_finite_end_it(task, tiny_diffuse):
    training = DiffusionTraining(task.dataset, tiny_diffuse, 0, "cpu")
    with torch.no_grad():
        training.network.output.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="diffusion/loss must be finite, got nan by update 4"):
        rows_of(training, 12)


def test_a_run_directory_and_its_model(model_dir, task, tiny_diffuse):
    names = {path.name for path in model_dir.iterdir()}
    assert {"config.json", "versions.json", "metrics.csv", "checkpoints"} <= names
    rows = read_metrics(model_dir / "metrics.csv")
    assert [row["update"] for row in rows] == [0, 4, 6, 8, 12]
    assert "diffusion/validation_loss" in rows[0] and "diffusion/loss" in rows[1]
    kept = sorted(path.name for path in (model_dir / "checkpoints").iterdir())
    assert kept == ["step_000000010", "step_000000012"]
    model = load_diffusion(model_dir, "cpu")
    whole = DiffusionTraining(task.dataset, tiny_diffuse, 0, "cpu")
    rows_of(whole, 12)
    for name, tensor in whole.trainer.ema_model.state_dict().items():
        assert torch.equal(tensor, model.network.state_dict()[name]), name
    assert torch.equal(whole.normalizer.mean, model.normalizer.mean)
    assert torch.equal(whole.normalizer.std, model.normalizer.std)
    assert model.num_updates == 12 and model.config == tiny_diffuse


def test_another_dataset_is_not_resumed(model_dir, dataset_file, tiny_diffuse, tmp_path):
    other = load_dataset(dataset_file)
    arrays = {
        name: getattr(other, name) for name in ("observations", "actions", "next_observations")
    }
    arrays |= {name: getattr(other, name) for name in ("terminals", "timeouts")}
    np.savez(
        tmp_path / "other.npz", rewards=other.rewards + 1, recipe=json.dumps(other.recipe), **arrays
    )
    with pytest.raises(CheckpointError, match="dataset_fingerprint of .* as the run began"):
        diffuse(
            str(tmp_path / "other.npz"),
            model_dir,
            config=tiny_diffuse,
            device="cpu",
            resume=True,
        )


def test_gaussian_data_come_back():
    """A diffusion model of standard normal data has samples of their moments: from dataset to
    samples with the quick preset's sampler."""
    rng = np.random.default_rng(0)
    rows = 4000
    ends = np.zeros(rows, dtype=bool)
    ends[99::100] = True
    from polygrad_fast.data.offline_dataset import OfflineDataset

    observations = rng.normal(3.0, 2.0, (rows, 1)).astype(np.float32)
    dataset = OfflineDataset(
        observations,
        np.tanh(0.5 * rng.normal(size=(rows, 1))),
        rng.normal(size=rows),
        np.roll(observations, -1, axis=0),
        ends & False,
        ends,
    )
    config = DiffuseConfig(
        window_length=4,
        window_stride=1,
        network=TemporalUNetConfig(features=24, num_levels=2),
        training=EDMTrainingConfig(ema_decay=0.9),
        total_updates=300,
    )
    training = DiffusionTraining(dataset, config, 0, "cpu")
    rows_of(training, 300)
    sampler = EDMSampler(training.trainer.ema_model, EDMConfig.paper(num_inference_steps=16))
    sample = sampler.sample(500, 4, torch.Generator().manual_seed(0)).trajectories
    raw = training.normalizer.unnormalize(sample)
    assert float(raw.observations.mean()) == pytest.approx(3.0, abs=0.35)
    assert float(raw.observations.std()) == pytest.approx(2.0, abs=0.4)
