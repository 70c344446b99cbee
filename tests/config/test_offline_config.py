"""Presets of the offline commands against the specification of policy-guided diffusion."""

import dataclasses
import json

import pytest

from polygrad_fast.config import (
    DiffuseConfig,
    IQLConfig,
    OfflineTrainConfig,
    PolicyGuidanceConfig,
    TD3BCConfig,
    TemporalUNetConfig,
    from_dict,
)
from polygrad_fast.errors import InputError

CLASSES = (DiffuseConfig, OfflineTrainConfig)


def test_released():
    config = DiffuseConfig.from_preset("released")
    assert (config.window_length, config.window_stride) == (32, 8)
    assert config.network == TemporalUNetConfig(features=1024, num_levels=3)
    training = config.training
    assert (training.batch_size, training.num_epochs, training.learning_rate) == (32, 10_000, 2e-3)
    assert (training.ema_decay, training.ema_interval) == (0.995, 10)
    assert config.validation_fraction == 0.05 and config.total_updates is None
    agent = OfflineTrainConfig.from_preset("released")
    assert agent.num_trajectories == 2**13 and agent.trajectory_rows == 129
    assert (agent.lifetime, agent.total_updates, agent.batch_size) == (10_000, 1_000_000, 256)
    assert agent.num_real == 16 and agent.first_unguided and agent.eval_episodes == 16
    assert agent.td3_bc == TD3BCConfig.released() and agent.iql == IQLConfig.released()
    assert agent.sampler.euler_from == "trajectory" and agent.sampler.num_inference_steps == 256
    assert agent.guidance.schedule == "linear"


def test_paper():
    config = DiffuseConfig.from_preset("paper")
    assert config.window_length == 16
    assert (config.training.batch_size, config.training.num_epochs) == (16, 250)
    agent = OfflineTrainConfig.from_preset("paper")
    assert agent.num_trajectories == 2**14 and agent.trajectory_rows == 16
    assert agent.lifetime == 250_000 and agent.num_real == 0
    assert agent.guidance == PolicyGuidanceConfig.paper()
    assert agent.td3_bc == TD3BCConfig.original()
    assert agent.sampler.euler_from == "churned"


def test_quick_starts_eulers_step_after_the_noise():
    """Few steps from before it widen the samples."""
    agent = OfflineTrainConfig.from_preset("quick")
    assert agent.sampler.num_inference_steps < 256 and agent.sampler.euler_from == "churned"
    assert agent.trajectory_rows is None


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("preset", ["released", "paper", "quick"])
def test_presets_survive_json(cls, preset):
    config = cls.from_preset(preset)
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(config))), cls) == config


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("preset", ["default", None])
def test_unknown_presets(cls, preset):
    with pytest.raises(InputError, match="preset must be one of .*'released', 'paper', 'quick'"):
        cls.from_preset(preset)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DiffuseConfig, {"window_length": 3}, "at least 4 for 3 levels of the network, got 3"),
        (DiffuseConfig, {"window_stride": 0}, "window_stride must be at least 1, got 0"),
        (DiffuseConfig, {"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\)"),
        (DiffuseConfig, {"total_updates": 0}, "total_updates must be None or a positive number"),
        (DiffuseConfig, {"sigma_data": 0.0}, "sigma_data must be positive"),
        (DiffuseConfig, {"log_interval": 0}, "log_interval must be at least 1"),
        (DiffuseConfig, {"checkpoint_interval": 0}, "checkpoint_interval must be at least 1"),
        (OfflineTrainConfig, {"total_updates": 0}, "total_updates must be at least 1, got 0"),
        (OfflineTrainConfig, {"real_share": -0.1}, r"real_share must be in \[0, 1\], got -0.1"),
        (OfflineTrainConfig, {"trajectory_rows": 1}, "trajectory_rows must be None or at least 2"),
        (OfflineTrainConfig, {"lifetime": 0}, "lifetime must be at least 1, got 0"),
        (OfflineTrainConfig, {"log_interval": 0}, "log_interval must be at least 1"),
        (OfflineTrainConfig, {"cpu_threads": 0}, "cpu_threads must be None or a positive number"),
        (OfflineTrainConfig, {"engine": "triton"}, "engine must be one of"),
    ],
)
def test_options_out_of_range(cls, options, message):
    with pytest.raises(InputError, match=message):
        cls(**options)
