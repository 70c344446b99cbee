"""Windows of datasets, their normalizer, and transitions of trajectories."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.data.windows import TrajectoryWindows, to_transitions, window_starts
from polygrad_fast.errors import InputError
from polygrad_fast.trajectory_normalizer import TrajectoryNormalizer, TrajectoryParts


def dataset_of(terminals, timeouts, seed=0):
    rows, generator = len(terminals), np.random.default_rng(seed)
    observations = generator.normal(3, 2, (rows + 1, 2))
    return OfflineDataset(
        observations[:-1],
        generator.uniform(-1, 1, (rows, 1)),
        generator.normal(size=rows),
        observations[1:],
        np.asarray(terminals, dtype=bool),
        np.asarray(timeouts, dtype=bool),
    )


def by_hand(dataset, length, stride):
    """Return the starts as the specification words them."""
    ends = dataset.terminals | dataset.timeouts
    valid = [
        i
        for i in range(len(dataset) - length + 1)
        if not any(ends[i + step] for step in range(length - 1))
    ]
    taken = set(valid[::stride])
    taken |= {i for i in valid if i == 0 or ends[i - 1]}
    taken |= {i for i in valid if dataset.terminals[i + length - 1]}
    return sorted(i for i in taken if not dataset.timeouts[i + length - 1])


@given(
    st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 3]), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_starts_are_the_released_ones(ends, length, stride):
    ends = np.array(ends)
    dataset = dataset_of(ends % 2 == 1, ends >= 2)
    starts = window_starts(dataset, length, stride)
    assert starts.tolist() == by_hand(dataset, length, stride)


def test_windows_and_moments():
    ends = np.zeros(30, dtype=int)
    ends[[9, 16]] = 1, 2
    dataset = dataset_of(ends == 1, ends == 2)
    windows = TrajectoryWindows(dataset, 5, 2)
    rows = np.concatenate(
        (
            dataset.observations,
            np.arctanh(np.clip(dataset.actions, -0.999, 0.999)),
            dataset.rewards[:, None],
            dataset.terminals[:, None],
        ),
        axis=1,
        dtype=np.float64,
    )
    raw = np.stack([rows[start : start + 5] for start in windows.starts.tolist()])
    mean, std = raw.mean((0, 1)), raw.std((0, 1))
    assert np.allclose(windows.normalizer.mean, mean, rtol=1e-6, atol=1e-7)
    assert np.allclose(windows.normalizer.std, std, rtol=1e-6)
    some = windows.gather(torch.tensor([2, 0, 2]))
    assert some.shape == (3, 5, 5) and some.dtype == torch.float32
    assert np.allclose(some, ((raw - mean) / std)[[2, 0, 2]], atol=1e-5)
    some.zero_()  # a gathered window is a copy
    assert windows.rows.abs().sum(1).min() > 0

    parts = windows.normalizer.unnormalize(windows.rows)
    assert np.allclose(parts.observations, dataset.observations, atol=1e-5)
    assert np.allclose(parts.actions, dataset.actions.clip(-0.999, 0.999), atol=1e-5)
    assert np.allclose(parts.rewards, dataset.rewards, atol=1e-5)
    assert parts.terminals.tolist() == dataset.terminals.astype(float).tolist()


def test_constant_channels_are_not_blown_up():
    rows = 40
    observations = np.full((rows + 1, 2), 0.1)
    observations[:, 1] = np.arange(rows + 1)
    dataset = OfflineDataset(
        observations[:-1], np.zeros((rows, 1)), np.full(rows, 1e3 / 3), observations[1:],
        np.zeros(rows), np.zeros(rows),
    )  # fmt: skip
    windows = TrajectoryWindows(dataset, 4)
    assert windows.normalizer.std[[0, 2, 3, 4]].tolist() == [1, 1, 1, 1]
    assert windows.rows[:, [0, 2, 3, 4]].abs().max() < 1e-4


def test_no_window_is_an_error():
    ends = np.zeros(10)
    ends[[3, 9]] = 1
    dataset = dataset_of(ends, np.zeros(10))
    with pytest.raises(InputError, match="windows of 7 steps .* the longest episode has 6 steps"):
        TrajectoryWindows(dataset, 7)
    assert TrajectoryWindows(dataset, 6).starts.tolist() == [4]
    with pytest.raises(InputError, match="stride of windows must be an integer of at least 1"):
        TrajectoryWindows(dataset, 2, 0)


def test_windows_hold_each_row_once():
    dataset = dataset_of(np.zeros(5000), np.zeros(5000))
    windows = TrajectoryWindows(dataset, 100)
    held = sum(value.nbytes for value in vars(windows).values() if torch.is_tensor(value))
    assert len(windows) == 4901 and held < 5000 * (5 * 4 + 8) + 100 * 8 + 1


def test_trajectories_give_transitions():
    batch, length = 3, 4
    number = torch.arange(batch * length, dtype=torch.float32).view(batch, length)
    parts = TrajectoryParts(
        torch.stack((number, -number), -1), number[..., None] / 10, number * 2, number % 2
    )
    transitions = to_transitions(parts)
    kept = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert transitions.observations.tolist() == [[i, -i] for i in kept]
    assert transitions.next_observations[:, 0].tolist() == [i + 1 for i in kept]
    assert transitions.actions.squeeze(1).tolist() == pytest.approx([i / 10 for i in kept])
    assert transitions.rewards.tolist() == [2 * i for i in kept]
    assert transitions.terminals.tolist() == [i % 2 for i in kept]
    with pytest.raises(InputError, match="L at least 2, got"):
        to_transitions(TrajectoryParts(*(part[:, :1] for part in parts)))


def test_moments_are_checked():
    good = torch.ones(5)
    for mean, std, message in (
        (torch.ones(4), good, "mean of trajectories must be 5 finite numbers"),
        (good, torch.full((5,), float("nan")), "std of trajectories must be 5 finite numbers"),
        (good, torch.tensor([1.0, 1, 0, 1, 1]), "std of trajectories must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            TrajectoryNormalizer(mean, std, 2, 1)
    normalizer = TrajectoryNormalizer(torch.arange(5), good * 2, 2, 1)
    assert (normalizer.action_mean.tolist(), normalizer.action_std.tolist()) == ([2], [2])


def test_actions_beyond_1_are_refused():
    dataset = dataset_of(np.zeros(10), np.zeros(10))
    actions = dataset.actions.copy()
    actions[4] = -1.0005  # rounding
    close = dataclasses.replace(dataset, actions=actions)
    assert TrajectoryWindows(close, 3).rows.isfinite().all()
    actions[4] = -2
    far = dataclasses.replace(dataset, actions=actions, source="here")
    with pytest.raises(InputError, match=r"here: actions must lie in \[-1, 1\] .* of size 2"):
        TrajectoryWindows(far, 3)
