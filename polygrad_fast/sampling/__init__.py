"""The sampler and its engines."""

from polygrad_fast.sampling.noise import SampleNoise
from polygrad_fast.sampling.sampler import PolicyGuidedSampler, TrajectoryBatch

__all__ = ["PolicyGuidedSampler", "SampleNoise", "TrajectoryBatch"]
