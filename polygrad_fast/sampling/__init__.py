"""The samplers and their engines."""

from polygrad_fast.sampling.edm_sampler import EDMNoise, EDMSample, EDMSampler
from polygrad_fast.sampling.heun import FixedEntries
from polygrad_fast.sampling.noise import SampleNoise
from polygrad_fast.sampling.policy_score import PolicyGuidance
from polygrad_fast.sampling.sampler import PolicyGuidedSampler, TrajectoryBatch

__all__ = [
    "EDMNoise",
    "EDMSample",
    "EDMSampler",
    "FixedEntries",
    "PolicyGuidance",
    "PolicyGuidedSampler",
    "SampleNoise",
    "TrajectoryBatch",
]
