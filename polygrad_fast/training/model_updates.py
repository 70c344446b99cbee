"""Updates of the world model on windows of the replay buffer, in one CUDA graph where they can."""

from __future__ import annotations

import torch
from torch import Tensor

from polygrad_fast.data import ReplayBuffer
from polygrad_fast.runs.metric_sums import MetricSums
from polygrad_fast.sampling.graphs import GraphCache, as_before_a_capture
from polygrad_fast.world_models import WorldModel

UPDATES_PER_REPLAY = 10
"""Updates in one graph, where so many are due at once. A multiple of most intervals of averaging,
so that one graph does for all."""
EAGER_UPDATES = 3
"""Updates before a capture, which compile kernels and set up libraries and the optimizer."""


class ModelUpdates:
    """Draw windows, train the world model on them, sum what was measured.

    On a GPU a graph gathers the windows, takes the gradient steps and moves the average; only where
    the windows are is drawn outside. Updates of a network that is not this library's run eagerly.

    Args:
        world_model, replay: what learns from what.
        batch_size: windows per update.
        generator: of all that is drawn.
        sums: where what was measured goes.
    """

    def __init__(
        self,
        world_model: WorldModel,
        replay: ReplayBuffer,
        batch_size: int,
        generator: torch.Generator,
        sums: MetricSums,
    ):
        self._world_model, self._replay, self._batch_size = world_model, replay, batch_size
        self._generator, self._sums = generator, sums
        self._names: tuple[str, ...] = ()  # of what an update measures
        self.reset()

    def reset(self) -> None:
        """Forget all captures: the tensors that they change have been replaced."""
        self._graphs, self._eager_updates = GraphCache(), 0

    def at_once(self, due: int) -> int:
        """Return how many of the updates that are due, at least 1, `take` is to take in one
        call."""
        if self._is_ready() and due >= UPDATES_PER_REPLAY:
            return UPDATES_PER_REPLAY
        return 1

    def take(self, count: int) -> None:
        """Take updates, as many as `at_once` returned."""
        shape = count, self._batch_size
        places = self._replay.draw(count * self._batch_size, self._generator).view(shape)
        if not self._is_ready():
            self._take_eagerly(places)
            return
        trainer = self._world_model.trainer
        before = trainer.num_updates

        def updates(places: Tensor) -> tuple[Tensor]:
            trainer.num_updates = before  # also where a capture is tried again
            return self._updates(places)

        rows = self._graphs(
            trainer.averaging(count), updates, (places,), warmups=0, generator=self._generator
        )
        trainer.num_updates = before + count  # a replay counts nothing, a capture did
        self._sums.add_rows(self._names, *rows)

    def _is_ready(self) -> bool:
        trainer = self._world_model.trainer
        return self._eager_updates >= EAGER_UPDATES and trainer.can_be_captured

    def _take_eagerly(self, places: Tensor) -> None:
        if self._world_model.trainer.can_be_captured:
            with as_before_a_capture(places.device):
                (rows,) = self._updates(places)
            self._eager_updates += 1
        else:
            (rows,) = self._updates(places)
        self._sums.add_rows(self._names, rows)

    def _updates(self, places: Tensor) -> tuple[Tensor]:
        """Take an update on the windows at each row of places, and return what was measured."""
        measured = []
        for row in places:
            found = self._world_model.update(self._replay.windows(row), self._generator)
            self._names = tuple(found)
            measured.append(torch.stack(list(found.values())))
        return (torch.stack(measured),)
