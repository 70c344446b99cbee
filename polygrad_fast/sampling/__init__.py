"""The sampler and its engines."""

from polygrad_fast.sampling.components import SampleNoise
from polygrad_fast.sampling.sampler import PolicyGuidedSampler, TrajectoryBatch

__all__ = ["PolicyGuidedSampler", "SampleNoise", "TrajectoryBatch"]
