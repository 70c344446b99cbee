"""The sampler and its engines."""

from polygrad_fast.sampling.sampler import PolicyGuidedSampler, SampleNoise, TrajectoryBatch

__all__ = ["PolicyGuidedSampler", "SampleNoise", "TrajectoryBatch"]
