"""Experiments that end in seconds."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from cases import changed, tiny_config
from polygrad_fast import recipes
from polygrad_fast.config import PGDScale, TrainingScale, WorldModelScale
from polygrad_fast.config import offline as presets
from polygrad_fast.config import train as train_presets
from polygrad_fast.reproduce.stages import Stages

ENV = "InvertedPendulum-v5"
TINY = PGDScale(
    env_ids=(ENV,),
    recipes=("medium-replay", "medium"),
    dataset_steps=80,
    data=("real", "unguided", "guided", "ensemble"),
    diffusion_updates=8,
    ensemble_updates=8,
    agent_updates=8,
    lifetime=3,
    num_trajectories=20,
    test_episodes=2,
    coefficients=(0.0, 1.0),
    lengths=(4, 6),
    targets=("random", "medium"),
    measured_trajectories=6,
)
TINY_TRAIN = tiny_config()
TINY_WORLD_MODELS = WorldModelScale(
    env_ids=(ENV,),
    dataset_steps=200,
    held_out=0.2,
    horizons=(3, 5),
    diffusion_steps=(6, 3),
    preset="quick",
    model_updates=6,
    model_batch_size=8,
    measured_trajectories=8,
    tuning_samples=2,
    tuning_trajectories=4,
    sigmas=(0.5, 0.1),
    timed_trajectories=4,
)
TINY_TRAININGS = TrainingScale(
    env_ids=(ENV,),
    total_timesteps=120,
    algorithms=("autoregressive", "ppo"),
    ablations=("base", "random_actions"),
)


def _offline_sizes():
    path = Path(__file__).parents[1] / "offline" / "conftest.py"
    spec = importlib.util.spec_from_file_location("offline_sizes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def short_trainings(monkeypatch):
    """Behaviour policies and models that train in a moment; any policy is medium."""
    sizes = _offline_sizes()
    diffuse = dataclasses.replace(sizes.TINY_DIFFUSE, window_length=4, window_stride=1)
    monkeypatch.setitem(presets.DIFFUSE_PRESETS, "quick", lambda: diffuse)
    monkeypatch.setitem(presets.DYNAMICS_PRESETS, "quick", lambda: sizes.TINY_DYNAMICS)
    monkeypatch.setitem(presets.OFFLINE_TRAIN_PRESETS, "quick", lambda: sizes.TINY_TRAIN)
    behaviour = changed(
        TINY_TRAIN, world_model="autoregressive", eval_interval=20, total_timesteps=100
    )
    monkeypatch.setattr(recipes, "behaviour_config", lambda env_id: behaviour)
    monkeypatch.setitem(train_presets.PRESETS, "quick", lambda: TINY_TRAIN)
    monkeypatch.setitem(recipes.RETURNS, "InvertedPendulum", (1.0, 1.0))


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture
def tiny_models():
    return TINY_WORLD_MODELS


@pytest.fixture
def tiny_trainings():
    return TINY_TRAININGS


@pytest.fixture
def told():
    return []


@pytest.fixture
def stages(tmp_path, told):
    return Stages(tmp_path / "out", told.append)
