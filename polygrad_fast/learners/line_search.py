"""The line search of the actor's step (appendix A) without a choice on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polygrad_fast.config import A2CConfig

MAX_CORRECTIONS = 4
"""Trials after the first. In 600 updates of random policies, steps of 1 / 100 to 100 times the
target's size, all ended where a sequential search does, one of them after 4, most after 1."""
CHUNK_SIZE = 2**22
"""Numbers of predicted changes held at a time."""

Move = Callable[[Tensor], None]
"""Sets the weights to those of the step scaled by a scalar on the device."""
Measure = Callable[[], tuple[Tensor, Tensor]]
"""Returns, for each of N actions, the change of its log-probability by the step as it is scaled,
and the scale times the slope of this change at scale 0; [N] each."""


@dataclass(frozen=True)
class FoundStep:
    """Where a line search ended: scalars on the device."""

    initial_size: Tensor  # of the step when it is not scaled
    size: Tensor
    num_trials: Tensor  # a sequential search's


class LineSearch:
    """Scale a step by powers of `line_search_ratio` until mean |log pi_new - log pi_old| is within
    tolerance of a target: where a sequential search ends, from fewer trials.

    A sequential search shrinks a step that is too large and grows one that is too small, rung by
    rung of a ladder of scales, until a size is within tolerance, the target lies between this rung
    and the last, the next would be longer than the largest learning rate allows, or the trials are
    spent. Here one trial predicts all rungs: with the change c of an action's log-probability at
    scale s and its slope g, c(r s) = s g r + (c - s g) r^2. The rung where the search would end by
    these sizes and those measured already is tried next, and predicts anew, until it is one that
    was measured. At most `MAX_CORRECTIONS` times; if it is none then, the last one measured is
    taken.

    On a CPU, where reading costs nothing, it ends as soon as that is so; on another device every
    correction is made, so that nothing is read and a graph can hold it.

    Args:
        config: its options.
        device, dtype: of the policy's weights.

    Attributes:
        reads: whether it ends as soon as it can.
    """

    def __init__(self, config: A2CConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.reads = config, device.type == "cpu"
        num_rungs = config.line_search_max_steps + 1 if config.line_search else 1
        self._numbers = torch.arange(num_rungs, device=device)
        self._unknown = torch.full((num_rungs,), torch.nan, dtype=dtype, device=device)
        ratios = torch.tensor(
            [config.line_search_ratio, 1 / config.line_search_ratio], dtype=torch.float64
        )
        scales = ratios.unsqueeze(1) ** torch.arange(num_rungs)
        # the next rung's scale: no limit to shrinking, and none after the last
        following = torch.stack((torch.zeros(num_rungs), scales[1] * ratios[1]))
        following[:, -1] = torch.inf
        self._shrinking, self._growing = torch.stack((scales, following), 1).to(device, dtype)

    def __call__(
        self, move: Move, measure: Measure, target: float | Tensor, learning_rate: Tensor
    ) -> FoundStep:
        """Find the scale and move to it; the step is not scaled when this is called.

        Args:
            target: of the size.
            learning_rate: of the step when it is not scaled, a scalar on the device.

        Returns:
            What was found; sizes are not finite where a change was not.
        """
        config, numbers = self.config, self._numbers
        changes, slopes = measure()
        initial_size = changes.abs().mean()
        shrinking = initial_size > target
        scales, following = torch.where(shrinking, self._shrinking, self._growing)
        ends = following * learning_rate > config.actor_learning_rate
        bound = target * (1.0 + config.line_search_tolerance * (2.0 * shrinking - 1.0))
        sizes = torch.where(numbers == 0, initial_size, self._unknown)
        current = numbers[:1]

        def next_rung() -> tuple[Tensor, Tensor]:
            """Return where the search ends by what is known, [1], and whether that is measured."""
            measured = sizes.isfinite()
            expected = _expected_sizes(changes, slopes, scales / scales[current])
            expected = torch.where(measured, sizes, expected)
            # within tolerance, or the target lies between this rung and the last
            stops = ends | ((expected <= bound) == shrinking)
            rung = stops.int().argmax(0, keepdim=True)
            return rung, measured[rung]

        rung, is_measured = next_rung()
        for _ in range(MAX_CORRECTIONS if len(numbers) > 1 else 0):
            if self.reads and is_measured:
                break
            move(scales[rung].squeeze(0))
            changes, slopes = measure()
            current = rung
            sizes = torch.where(numbers == current, changes.abs().mean(), sizes)
            rung, is_measured = next_rung()
        rung = torch.where(is_measured, rung, current)
        if not (self.reads and rung == current):
            move(scales[rung].squeeze(0))
        return FoundStep(initial_size, sizes[rung].squeeze(0), rung.squeeze(0) + 1)


def _expected_sizes(changes: Tensor, slopes: Tensor, factors: Tensor) -> Tensor:
    """Return mean |g r + (c - g) r^2| over N actions for each of the factors r: [N], [N], [K] ->
    [K]."""
    means = [
        torch.lerp(slopes, changes, part.unsqueeze(1)).abs_().mean(1)
        for part in factors.split(max(1, CHUNK_SIZE // len(changes)))
    ]
    return factors * torch.cat(means)
