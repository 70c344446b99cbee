"""Interquartile means and their bootstrap intervals (Agarwal et al., arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


class Estimate(NamedTuple):
    """An interquartile mean, and the bounds of its interval."""

    iqm: float
    low: float
    high: float


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean along the last axis without a quarter of the n values at either end, n / 4
    rounded down: of fewer than 4 values the mean."""
    values = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(axis=-1)


def estimate(tasks: Sequence[Sequence[float]]) -> Estimate:
    """Return the interquartile mean of all values and its percentile interval of 95 %.

    The bootstrap is stratified: each task's runs are drawn anew from its own.

    Args:
        tasks: for each task the values of its runs, at least one.
    """
    generator = np.random.default_rng(SEED)
    drawn = [
        np.asarray(runs, dtype=np.float64)[
            generator.integers(len(runs), size=(RESAMPLES, len(runs)))
        ]
        for runs in tasks
    ]
    means = interquartile_mean(np.concatenate(drawn, axis=1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(interquartile_mean(np.concatenate(tasks))), float(low), float(high))


def estimated(values: Sequence[float | None]) -> dict[str, float]:
    """Return what a table says of the values of several seeds: how many there are ("seeds") and, if
    any, iqm, low, high, lowest and highest. None is no value."""
    counted = [value for value in values if value is not None]
    row: dict[str, float] = {"seeds": len(counted)}
    if counted:
        row |= estimate([counted])._asdict()
        row |= {"lowest": min(counted), "highest": max(counted)}
    return row
