"""Policy-guided trajectory diffusion (PolyGRAD, arXiv 2312.08533): a diffusion world model for
on-policy RL."""

from polygrad_fast._version import __version__
from polygrad_fast.agent import PolyGRAD
from polygrad_fast.config import A2CConfig, SamplerConfig, TrainConfig
from polygrad_fast.denoisers import ResidualMLPDenoiser, TransformerDenoiser
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy, ValueFunction
from polygrad_fast.protocols import Denoiser, Policy
from polygrad_fast.sampling import PolicyGuidedSampler, SampleNoise, TrajectoryBatch
from polygrad_fast.schedule import NoiseSchedule
from polygrad_fast.training.a2c import ActorCritic

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
    "SampleNoise",
    "SamplerConfig",
    "TrainConfig",
    "TrajectoryBatch",
    "TransformerDenoiser",
    "ValueFunction",
    "__version__",
]
