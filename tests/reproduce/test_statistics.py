"""Interquartile means and intervals."""

import numpy as np
import pytest

from polygrad_fast.reproduce.statistics import estimate, interquartile_mean


def test_a_quarter_at_either_end_does_not_count():
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, -50.0])) == 1.5
    assert interquartile_mean(np.arange(8.0)) == 3.5
    assert interquartile_mean(np.array([3.0, 1.0, 5.0])) == 3.0  # of 3 values the mean
    assert interquartile_mean(np.array([[0.0, 1, 2, 99], [4, 5, 6, 7]])).tolist() == [1.5, 5.5]


def test_intervals_cover_the_mean_as_often_as_they_say():
    g = np.random.default_rng(1)
    covered = []
    for _ in range(120):
        found = estimate([g.normal(2.0, 1.0, 24)])
        assert found.low <= found.iqm <= found.high
        covered.append(found.low <= 2.0 <= found.high)
    assert 0.85 < np.mean(covered) <= 1.0


def test_runs_are_drawn_from_their_own_task():
    """Two tasks of equal runs each: whatever is drawn is the same, so the interval is a point."""
    found = estimate([[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]])
    assert found.low == found.high == found.iqm
    assert estimate([[4.0]]) == (4.0, 4.0, 4.0)
    wide = estimate([[0.0, 10.0, 0.0, 10.0, 0.0, 10.0]])
    assert wide.high - wide.low > 3 and estimate([[0.0, 10.0]]) == estimate([[0.0, 10.0]])
    assert wide.iqm == pytest.approx(5.0)
