"""A dataset's arrays, episodes and transitions."""

import dataclasses

import numpy as np
import pytest

from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.errors import InputError


def arrays(lengths=(3, 4, 2), terminal=(0,), cut=(1,)):
    """Return arrays of episodes: row i has the observation [i, -i], action [i], reward i."""
    rows = sum(lengths)
    last = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
    terminals[last[list(terminal)]] = True
    timeouts[last[list(cut)]] = True
    number = np.arange(rows, dtype=np.float32)
    return {
        "observations": np.stack((number, -number), axis=1),
        "actions": number[:, None] / 100,
        "rewards": number,
        "next_observations": np.stack((number + 1, -number - 1), axis=1),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def test_arrays_are_float32_and_cannot_be_written_to():
    given = arrays() | {"rewards": np.arange(9), "terminals": arrays()["terminals"].astype(float)}
    dataset = OfflineDataset(**given)
    assert dataset.rewards.dtype == dataset.observations.dtype == np.float32
    assert dataset.terminals.dtype == dataset.ends.dtype == bool
    assert (len(dataset), dataset.observation_dim, dataset.action_dim) == (9, 2, 1)
    for name in given:
        with pytest.raises(ValueError, match="read-only"):
            getattr(dataset, name)[0] = 0
    given["observations"][0] = 5  # the caller's stays writable
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.rewards = given["rewards"]


def test_episodes_end_at_terminals_timeouts_and_the_last_row():
    dataset = OfflineDataset(**arrays())
    assert np.flatnonzero(dataset.ends).tolist() == [2, 6, 8]
    assert dataset.num_episodes == 3
    assert dataset.episode_returns().tolist() == [3, 18, 15]


def test_episodes_are_taken_in_the_order_given():
    dataset = OfflineDataset(**arrays())
    taken = dataset.take_episodes(np.array([2, 0]))
    assert taken.rewards.tolist() == [7, 8, 0, 1, 2]
    assert taken.next_observations[:, 0].tolist() == [8, 9, 1, 2, 3]
    assert np.flatnonzero(taken.ends).tolist() == [1, 4]  # also after the unfinished one
    assert np.flatnonzero(taken.terminals).tolist() == [4] and not taken.timeouts.any()
    for episodes in ([3], [-1], []):
        with pytest.raises(InputError, match="dataset: .*episode"):
            dataset.take_episodes(np.array(episodes, dtype=int))


def test_split_holds_out_whole_episodes():
    given = arrays([5] * 40, terminal=range(40), cut=())
    dataset = OfflineDataset(**given)
    training, validation = dataset.split(0.06, seed=3)
    assert (training.num_episodes, validation.num_episodes) == (38, 2)
    assert training.rewards.tolist() == sorted(training.rewards.tolist())
    both = np.concatenate((training.rewards, validation.rewards))
    assert sorted(both.tolist()) == dataset.rewards.tolist()
    again = dataset.split(0.06, seed=3)[1].rewards
    assert np.array_equal(again, validation.rewards)
    drawn = {tuple(dataset.split(0.06, seed=seed)[1].rewards.tolist()) for seed in range(8)}
    assert len(drawn) > 4
    everything, nothing = dataset.split(0.02)
    assert everything is dataset and nothing is None
    with pytest.raises(InputError, match=r"validation_fraction must be in \[0, 1\), got 1"):
        dataset.split(1)


def test_transitions_leave_out_cut_off_steps_whose_next_observation_is_another_episodes():
    dataset = OfflineDataset(**arrays())
    transitions = dataset.transitions()
    assert transitions.rewards.tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    assert transitions.terminals.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert transitions.next_observations[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    whole = dataclasses.replace(dataset, true_next=True).transitions()
    assert whole.rewards.tolist() == dataset.rewards.tolist()
    transitions.rows.zero_()
    assert dataset.rewards[8] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.zeros((8, 1))}, "here: actions must have 9 rows as observations, got 8"),
        ({"rewards": np.zeros((9, 1))}, r"here: rewards must have shape \[steps\], got \[9, 1\]"),
        ({"actions": np.zeros(9)}, r"here: actions must have shape \[steps, size\], got \[9\]"),
        ({"actions": np.zeros((9, 0))}, r"actions must have shape .*, got \[9, 0\]"),
        ({"next_observations": np.zeros((9, 3))}, "must have 2 columns as observations, got 3"),
        ({"rewards": ["a"] * 9}, "here: rewards must be an array of numbers, got <U1"),
        ({"rewards": [[1], [1, 2]]}, "here: rewards must be an array of numbers, got list"),
        (
            {"rewards": np.array([0] * 8 + [1e39])},
            r"rewards\[8\] must be a finite float32 .* 1e\+39",
        ),
        ({"terminals": np.full(9, np.nan)}, r"here: terminals\[0\] must be 0 or 1, got nan"),
        ({"timeouts": np.array([0] * 8 + [2])}, r"here: timeouts\[8\] must be 0 or 1, got 2"),
        ({"timeouts": np.zeros((9, 1))}, r"timeouts must have shape \[steps\], got \[9, 1\]"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(InputError, match=message):
        OfflineDataset(**(arrays() | change), source="here")


def test_a_number_that_is_not_finite_is_named():
    given = arrays()
    given["observations"][4, 1] = np.nan
    with pytest.raises(InputError, match=r"here: observations\[4, 1\] must be .*, got nan"):
        OfflineDataset(**given, source="here")


def test_an_empty_dataset_is_refused():
    given = {name: array[:0] for name, array in arrays().items()}
    with pytest.raises(InputError, match="here: observations must hold at least one step"):
        OfflineDataset(**given, source="here")
