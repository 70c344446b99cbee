"""Clocks: CUDA events on a GPU; on a CPU processor time with one thread, else the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from polygrad_fast.sampling.graphs import CapturedFunction

Call = Callable[[], object]


class CudaClock:
    """Time between two CUDA events around a call, the host's pauses within it included."""

    name = "cuda events"

    def __call__(self, call: Call) -> float:
        """Return the milliseconds of a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class HostClock:
    """Processor time with one thread, which other work on the machine disturbs least; on more
    threads the wall clock."""

    def __init__(self):
        one = torch.get_num_threads() == 1
        self.name = "processor time" if one else "wall clock"
        self._read = time.process_time if one else time.perf_counter

    def __call__(self, call: Call) -> float:
        """Return the milliseconds of a call."""
        start = self._read()
        call()
        return 1e3 * (self._read() - start)


def clock_of(device: torch.device) -> CudaClock | HostClock:
    """Return the clock for work on a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


def interleaved(
    calls: Mapping[str, Call],
    clock: CudaClock | HostClock,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 50,
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a change of the machine's speed meets all of them.

    The first round warms up and does not count, unless it takes longer than three times `seconds`:
    then it is the only one.

    Args:
        calls: by name.
        clock: see `clock_of`.
        seconds: for the measurement, roughly.

    Returns:
        The milliseconds of every counted call, by name.
    """

    def round_of_calls() -> dict[str, float]:
        return {name: clock(call) for name, call in calls.items()}

    first = round_of_calls()
    total = sum(first.values())
    if total > 3e3 * seconds:
        return {name: [ms] for name, ms in first.items()}
    wanted = int(1e3 * seconds / max(total, 1e-6))
    rounds = [round_of_calls() for _ in range(min(max(min_rounds, wanted), max_rounds))]
    return {name: [times[name] for times in rounds] for name in calls}


def repeated(call: Call, count: int, device: torch.device) -> Call:
    """Return a function that does `call`, which returns tensors, `count` times; on a GPU as one
    replay of a CUDA graph, without the host's launches."""

    def several(*_: Tensor) -> tuple[Tensor, ...]:
        for _ in range(count):
            out = call()
        return (out,) if torch.is_tensor(out) else tuple(out)

    if device.type != "cuda":
        return several
    captured = CapturedFunction(several, (torch.zeros(1, device=device),))
    return lambda: captured.graph.replay()  # holds what was captured
