"""Steps of the learner, in one CUDA graph where they can."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from polygrad_fast.learners import Learner
from polygrad_fast.sampling.graphs import GraphCache, as_before_a_capture

EAGER_STEPS = 3
"""Steps before a capture, which compile kernels and set up libraries."""


class LearnerSteps:
    """Take a learner's steps: on a GPU from a graph, from the fourth on, where it can be captured.

    Args:
        learner: see `Learner.capture_key`.
    """

    def __init__(self, learner: Learner):
        self._learner, self._graphs = learner, GraphCache(max_entries=2)
        self._key: Hashable | None = None
        self._eager_steps, self._names = 0, ()

    def __call__(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        progress: float,
    ) -> dict[str, Tensor]:
        """Take a step; see `Learner.step`."""
        key = self._learner.capture_key()
        if key is None:
            return self._learner.step(observations, actions, rewards, terminals, progress)
        if key != self._key:
            self._key, self._eager_steps = key, 0
        done = torch.full((), progress, device=rewards.device)
        inputs = observations, actions, rewards, terminals, done
        if self._eager_steps < EAGER_STEPS:
            self._eager_steps += 1
            with as_before_a_capture(rewards.device):
                values = self._step(*inputs)
        else:
            values = self._graphs(key, self._step, inputs, warmups=0)
        return dict(zip(self._names, values, strict=True))

    def _step(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self._learner.step(*inputs)
        self._names = tuple(found)
        return tuple(found.values())
