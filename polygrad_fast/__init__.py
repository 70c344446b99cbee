"""Policy-guided trajectory diffusion (PolyGRAD, arXiv 2312.08533): a diffusion world model for
on-policy RL."""

import importlib
from typing import TYPE_CHECKING, Any

from polygrad_fast._version import __version__

if TYPE_CHECKING:
    from polygrad_fast.agent import PolyGRAD
    from polygrad_fast.config import A2CConfig, SamplerConfig, TrainConfig
    from polygrad_fast.denoisers import (
        ResidualMLPDenoiser,
        RolloutDenoiser,
        TransformerDenoiser,
    )
    from polygrad_fast.diffusion.ddpm import NoiseSchedule
    from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
    from polygrad_fast.learners.a2c import ActorCritic
    from polygrad_fast.normalizer import Normalizer
    from polygrad_fast.policy import GaussianPolicy, ValueFunction
    from polygrad_fast.protocols import Denoiser, Policy
    from polygrad_fast.sampling import PolicyGuidedSampler, SampleNoise, TrajectoryBatch

__all__ = [
    "A2CConfig",
    "ActorCritic",
    "CheckpointError",
    "Denoiser",
    "GaussianPolicy",
    "InputError",
    "NoiseSchedule",
    "NonFiniteError",
    "Normalizer",
    "Policy",
    "PolicyGuidedSampler",
    "PolyGRAD",
    "ResidualMLPDenoiser",
    "RolloutDenoiser",
    "SampleNoise",
    "SamplerConfig",
    "TrainConfig",
    "TrajectoryBatch",
    "TransformerDenoiser",
    "ValueFunction",
    "__version__",
]

# Imported on first use: the command line's help needs no torch.
_MODULES = {
    "agent": ("PolyGRAD",),
    "config": ("A2CConfig", "SamplerConfig", "TrainConfig"),
    "denoisers": ("ResidualMLPDenoiser", "RolloutDenoiser", "TransformerDenoiser"),
    "errors": ("CheckpointError", "InputError", "NonFiniteError"),
    "normalizer": ("Normalizer",),
    "policy": ("GaussianPolicy", "ValueFunction"),
    "protocols": ("Denoiser", "Policy"),
    "sampling": ("PolicyGuidedSampler", "SampleNoise", "TrajectoryBatch"),
    "diffusion.ddpm": ("NoiseSchedule",),
    "learners.a2c": ("ActorCritic",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
