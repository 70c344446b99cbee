"""World models: one file each, behind the interface in `base`."""

from polygrad_fast.world_models.autoregressive import Autoregressive
from polygrad_fast.world_models.autoregressive_diffusion import AutoregressiveDiffusion
from polygrad_fast.world_models.base import WorldModel, check_horizon
from polygrad_fast.world_models.build import build_world_model
from polygrad_fast.world_models.ensemble import Ensemble
from polygrad_fast.world_models.trajectory_diffusion import TrajectoryDiffusion
from polygrad_fast.world_models.transformer import Transformer

__all__ = [
    "Autoregressive",
    "AutoregressiveDiffusion",
    "Ensemble",
    "TrajectoryDiffusion",
    "Transformer",
    "WorldModel",
    "build_world_model",
    "check_horizon",
]
