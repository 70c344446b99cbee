"""How long a training will still take, from what its parts have taken so far."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from polygrad_fast.config import TrainConfig

MEASUREMENTS = 3
"""Updates measured before an estimate: the first ones compile, capture and warm up."""
RECENT = 25


def num_updates(steps: int, ratio: float) -> int:
    """Return how many updates are due within the first `steps` steps at `ratio` per step."""
    return math.floor(max(steps, 0) * ratio)


def remaining_counts(config: TrainConfig, step: int, target: int) -> dict[str, int]:
    """Return how many environment steps, world model and policy updates and evaluations follow
    environment step `step` up to `target`."""
    c = config
    start = c.learning_starts
    ratios = {
        "model_update": (c.world_model_training.updates_per_env_step, start),
        "policy_update": (c.policy_updates_per_env_step, start + c.policy_delay_steps),
    }
    counts = {
        name: num_updates(target - first, ratio) - num_updates(step - first, ratio)
        for name, (ratio, first) in ratios.items()
    }
    if step < start <= target:
        counts["model_update"] += c.world_model_training.pretrain_updates
    # after the prefill at every multiple of the interval, and at the end
    done = max(step, min(start, target - 1))
    counts["evaluation"] = (target - 1) // c.eval_interval - done // c.eval_interval + 1
    return {"env_step": target - step} | counts if target > step else {}


class TimeLeft(NamedTuple):
    """Seconds that a training still takes; a lower bound where something that is still to come has
    not been measured yet (evaluations apart, which are left out until they are)."""

    seconds: float
    measured: bool

    def __str__(self) -> str:
        return f"{'about' if self.measured else 'more than'} {in_words(self.seconds)}"


def time_left(seconds: Mapping[str, float], counts: Mapping[str, int]) -> TimeLeft:
    """Return what `counts` take at `seconds` each."""
    total = sum(count * seconds.get(name, 0.0) for name, count in counts.items())
    unknown = {name for name, count in counts.items() if count and name not in seconds}
    return TimeLeft(total, unknown <= {"evaluation"})


class Speed:
    """How long the parts of a training take, and rates since the last reading.

    Args:
        step: the environment step at which the training begins.
    """

    def __init__(self, step: int) -> None:
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._begin(step)

    @contextlib.contextmanager
    def measured(self, name: str, count: int = 1) -> Iterator[None]:
        """Note how long one "env_step", "model_update", "policy_update", "evaluation", or "sample"
        of a policy update takes, unless it fails; `count` of them, where the block takes
        several."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._recent[name].append(seconds / count)
        self._seconds[name] += seconds
        self._counts[name] += count

    def typical(self) -> dict[str, float]:
        """Return the recent median of each part measured `MEASUREMENTS` times, or once if it is an
        evaluation, in seconds."""
        return {
            name: statistics.median(values)
            for name, values in self._recent.items()
            if len(values) >= MEASUREMENTS or name == "evaluation"
        }

    def read(self, step: int) -> dict[str, float]:
        """Return the rates between the last reading and environment step `step`, by the names of
        their columns."""
        elapsed = max(time.perf_counter() - self._time, 1e-9)
        rates = {"time/env_steps_per_s": (step - self._step) / elapsed}
        updates = self._counts["model_update"] + self._counts["policy_update"]
        if updates:
            rates["time/updates_per_s"] = updates / elapsed
        if self._counts["sample"]:
            rates["time/sample_ms"] = 1e3 * self._seconds["sample"] / self._counts["sample"]
        self._begin(step)
        return rates

    def _begin(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)


def in_words(seconds: float) -> str:
    """Return a duration in a unit that suits it: "40 s", "12 min", "6.7 h", "30 days"."""
    for unit, name, above in ((86400, "days", 2), (3600, "h", 1.5), (60, "min", 1.5)):
        if seconds >= above * unit:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 else f"{value:.1f} {name}"
    return f"{seconds:.0f} s"
