"""Configuration: groups of options, and presets of them."""

from polygrad_fast.config.edm import (
    EDMConfig,
    EDMTrainingConfig,
    PolicyGuidanceConfig,
    TemporalUNetConfig,
)
from polygrad_fast.config.groups import (
    A2CConfig,
    DenoiserConfig,
    GuidanceConfig,
    NormalizerConfig,
    PolicyConfig,
    SamplerConfig,
    ScheduleConfig,
    check_choices,
)
from polygrad_fast.config.offline import DiffuseConfig, DynamicsConfig, OfflineTrainConfig
from polygrad_fast.config.offline_agents import IQLConfig, OfflineAgentConfig, TD3BCConfig
from polygrad_fast.config.options import from_dict
from polygrad_fast.config.reproduce import PGDScale, TrainingScale, WorldModelScale
from polygrad_fast.config.train import PRESETS, TrainConfig
from polygrad_fast.config.world_models import (
    AutoregressiveConfig,
    AutoregressiveDiffusionConfig,
    EnsembleConfig,
    TransformerModelConfig,
)

__all__ = [
    "A2CConfig",
    "AutoregressiveConfig",
    "AutoregressiveDiffusionConfig",
    "DenoiserConfig",
    "DiffuseConfig",
    "DynamicsConfig",
    "EDMConfig",
    "EDMTrainingConfig",
    "EnsembleConfig",
    "GuidanceConfig",
    "IQLConfig",
    "NormalizerConfig",
    "OfflineAgentConfig",
    "OfflineTrainConfig",
    "PGDScale",
    "PRESETS",
    "PolicyConfig",
    "PolicyGuidanceConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "TD3BCConfig",
    "TemporalUNetConfig",
    "TrainConfig",
    "TrainingScale",
    "TransformerModelConfig",
    "WorldModelScale",
    "check_choices",
    "from_dict",
]
