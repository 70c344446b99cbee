"""A small dataset, and configurations that train in a moment."""

import pytest

from polygrad_fast.config import (
    DiffuseConfig,
    DynamicsConfig,
    EDMConfig,
    EDMTrainingConfig,
    EnsembleConfig,
    IQLConfig,
    OfflineTrainConfig,
    TD3BCConfig,
    TemporalUNetConfig,
)
from polygrad_fast.data.collect import collect_episodes, random_actions
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.write import write_dataset
from polygrad_fast.offline.runs import diffuse, fit_ensemble
from polygrad_fast.offline.task import load_task

TINY_DIFFUSE = DiffuseConfig(
    window_length=6,
    window_stride=40,
    validation_fraction=0.2,
    network=TemporalUNetConfig(features=24, num_levels=2),
    training=EDMTrainingConfig(batch_size=8, ema_decay=0.5, ema_interval=2),
    total_updates=12,
    validation_interval=6,
    log_interval=4,
    checkpoint_interval=5,
)
TINY_DYNAMICS = DynamicsConfig(
    window_length=5,
    ensemble=EnsembleConfig(
        num_members=3, num_elites=2, hidden_dim=16, num_layers=1, batch_size=32
    ),
    total_updates=12,
    log_interval=4,
    checkpoint_interval=5,
)
TINY_TRAIN = OfflineTrainConfig(
    td3_bc=TD3BCConfig(hidden_dim=16),
    iql=IQLConfig(hidden_dim=16),
    sampler=EDMConfig.paper(num_inference_steps=3),
    total_updates=12,
    batch_size=16,
    real_share=0.25,
    num_trajectories=20,
    trajectory_rows=None,
    sampling_batch_size=8,
    lifetime=4,
    eval_interval=6,
    eval_episodes=2,
    log_interval=5,
    checkpoint_interval=5,
)


@pytest.fixture(scope="session")
def dataset_file(tmp_path_factory):
    """Five random episodes of Pendulum-v1, whose actions are in [-2, 2]."""
    path = tmp_path_factory.mktemp("data") / "pendulum.npz"
    env = make_environment("Pendulum-v1")
    write_dataset(collect_episodes(env, random_actions(env, 0), 5), path, env)
    return path


@pytest.fixture(scope="session")
def task(dataset_file):
    return load_task(str(dataset_file))


@pytest.fixture(scope="session")
def model_dir(dataset_file, tmp_path_factory):
    """Run directory of a diffusion model."""
    path = tmp_path_factory.mktemp("models") / "diffusion"
    diffuse(str(dataset_file), path, config=TINY_DIFFUSE, device="cpu").train(progress=False)
    return path


@pytest.fixture(scope="session")
def ensemble_dir(dataset_file, tmp_path_factory):
    """Run directory of a dynamics ensemble."""
    path = tmp_path_factory.mktemp("models") / "ensemble"
    run = fit_ensemble(str(dataset_file), path, config=TINY_DYNAMICS, device="cpu")
    run.train(progress=False)
    return path


@pytest.fixture
def tiny_dynamics():
    return TINY_DYNAMICS


@pytest.fixture
def tiny_diffuse():
    return TINY_DIFFUSE


@pytest.fixture
def tiny_train():
    return TINY_TRAIN
