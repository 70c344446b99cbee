"""Replay of trajectories whose first state is imagined."""

import numpy as np
import pytest

from polygrad_fast.data.collect import collect_episodes, random_actions
from polygrad_fast.data.environment import make_environment
from polygrad_fast.diagnostics.simulator import Simulator
from polygrad_fast.diagnostics.trajectories import trajectory_errors


@pytest.fixture(scope="module")
def parts():
    """A simulator of InvertedPendulum-v5, and true trajectories of 4 rows."""
    env = make_environment("InvertedPendulum-v5")
    data = collect_episodes(env, random_actions(env, 0), 12)
    scale = data.observations.std(0) + 1e-6
    columns = (data.observations, data.actions, data.rewards, data.terminals.astype(np.float32))
    simulator = Simulator(env, *columns, data.next_observations, (scale, np.ones(1)))
    ends = np.append(0, np.cumsum(data.ends))
    starts = [i for i in range(len(data) - 4) if ends[i] == ends[i + 3]]
    rows = np.array(starts)[:, None] + np.arange(4)
    return simulator, data.observations[rows], data.actions[rows], scale


def test_true_trajectories_have_no_error(parts):
    simulator, observations, actions, scale = parts
    terminals = np.zeros(observations.shape[:2])
    errors = trajectory_errors(simulator, observations, actions, terminals, scale)
    assert errors.shape == (len(observations), 3) and np.isfinite(errors).all()
    assert errors.max() < 1e-6


def test_a_wrong_row_is_wrong_by_what_it_is_off_and_nothing_after_an_end_counts(parts):
    simulator, observations, actions, scale = parts
    wrong = observations.copy()
    wrong[:, 2] += 0.5 * scale
    terminals = np.zeros(observations.shape[:2])
    terminals[0, 1:] = 1.0
    errors = trajectory_errors(simulator, wrong, actions, terminals, scale)
    assert np.allclose(errors[1:, 1], 0.25, atol=1e-3) and errors[1:, 2].max() < 1e-6
    assert np.isfinite(errors[0]).tolist() == [True, False, False]


def test_nothing_after_the_simulators_end_counts(parts):
    simulator, observations, actions, scale = parts
    fallen = observations.copy()
    fallen[:, 0] = [0.0, 0.19, 0.0, 3.0]  # falls in the first step
    terminals = np.zeros(observations.shape[:2])
    errors = trajectory_errors(simulator, fallen, actions, terminals, scale)
    assert np.isnan(errors[:, 1:]).all()
