"""How many threads PyTorch computes with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def cpu_threads(count: int | None, device: torch.device) -> Iterator[None]:
    """Let PyTorch compute with so many threads within the block, as `TrainConfig.cpu_threads` asks
    for; None, or another device than a CPU: as they are."""
    if count is None or device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cpus() -> int:
    """Return how many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1
