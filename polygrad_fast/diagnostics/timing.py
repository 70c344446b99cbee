"""What imagining costs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from polygrad_fast.world_models import WorldModel


def seconds_per_1000(
    world_model: WorldModel,
    policy: Any,
    observations: Tensor,
    generator: torch.Generator | None = None,
    horizon: int | None = None,
    calls: int = 5,
) -> float:
    """Return the seconds of 1,000 trajectories, imagined from all raw observations [B, S] at a
    time: of all processors together, or by the clock on a GPU; the median of so many calls after a
    first one."""
    device, times = observations.device, []
    for _ in range(1 + calls):
        start = _clock(device)
        world_model.imagine(observations, policy, generator, horizon=horizon)
        times.append(_clock(device) - start)
    return 1000 / len(observations) * statistics.median(times[1:])


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
