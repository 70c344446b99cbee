"""Action scaling: bounds are kept, and there and back is the same."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polygrad_fast.data.actions import ActionScaler
from polygrad_fast.errors import InputError

finite = st.floats(-100, 100, width=32)


@st.composite
def bounded_spaces(draw):
    size = draw(st.integers(1, 4))
    low = draw(arrays(np.float32, size, elements=finite))
    width = draw(arrays(np.float32, size, elements=st.floats(0.0625, 100, width=32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return Box(low.astype(dtype), (low + width).astype(dtype), dtype=dtype)


@settings(max_examples=100, deadline=None)
@given(space=bounded_spaces(), data=st.data())
def test_rescaled_actions_stay_in_bounds_and_come_back(space, data):
    scaler = ActionScaler(space, rescale=True)
    shape = data.draw(st.sampled_from([space.shape, (1, *space.shape), (3, *space.shape)]))
    action = data.draw(arrays(np.float32, shape, elements=st.floats(-2, 2, width=32)))
    raw = scaler.to_environment(action)
    assert raw.dtype == space.dtype and raw.shape == shape
    assert (raw >= space.low).all() and (raw <= space.high).all()
    back = scaler.from_environment(raw)
    assert back.dtype == np.float32 and back.shape == shape
    # An error of one float32 rounding of the largest bound, seen through the space's width.
    largest = np.maximum(np.abs(space.low), np.abs(space.high))
    slack = 2 * largest * 2.0**-23 / (space.high - space.low).astype(np.float64) + 1e-6
    assert (np.abs(back - np.clip(action, -1, 1)) <= slack).all()
    assert scaler.low.tolist() == [-1] * space.shape[0]
    assert scaler.high.tolist() == [1] * space.shape[0]


def test_rescaling_maps_ends_to_bounds_and_middle_to_middle():
    low, high = np.array([-2, 0, 3], dtype=np.float32), np.array([2, 5, 3], dtype=np.float32)
    scaler = ActionScaler(Box(low, high), rescale=True)
    actions = np.array([[-1, -1, -1], [0, 0, 0], [1, 1, 1], [-9, 9, 0.5]])
    raw = [[-2, 0, 3], [0, 2.5, 3], [2, 5, 3], [-2, 5, 3]]
    assert scaler.to_environment(actions).tolist() == raw
    # The third bounds are equal: every action is the same there and 0 stands for it.
    back = [[-1, -1, 0], [0, 0, 0], [1, 1, 0], [-1, 1, 0]]
    assert scaler.from_environment(np.array(raw)).tolist() == back


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (5, 3), elements=st.floats(-1e6, 1e6, width=32)))
def test_without_rescaling_actions_are_only_clipped_to_finite_bounds(action):
    low = np.array([-1, -np.inf, -np.inf], dtype=np.float32)
    high = np.array([2, 7, np.inf], dtype=np.float32)
    for rescale in (False, True):  # an infinite bound switches rescaling off
        scaler = ActionScaler(Box(low, high), rescale=rescale)
        assert not scaler.rescaled
        assert np.array_equal(scaler.low, low) and np.array_equal(scaler.high, high)
        assert np.array_equal(scaler.to_environment(action), np.clip(action, low, high))
        assert np.array_equal(scaler.from_environment(action), action)
    bounded = ActionScaler(Box(-2.0, 2.0, (3,)), rescale=False)
    assert bounded.low.tolist() == [-2, -2, -2] and not bounded.rescaled
    assert np.array_equal(bounded.to_environment(action), np.clip(action, -2, 2))


def test_action_scaler_names_wrong_shapes_and_spaces():
    scaler = ActionScaler(Box(-1.0, 1.0, (3,)), rescale=True)
    for bad in (np.zeros(2), np.zeros((4, 1)), np.zeros((1, 1, 3)), np.float32(0)):
        for convert in (scaler.to_environment, scaler.from_environment):
            with pytest.raises(InputError, match=r"must have shape \(3,\) or \(N, 3\), got \("):
                convert(bad)
    with pytest.raises(InputError, match=r"got Discrete\(2\)"):
        ActionScaler(gymnasium.spaces.Discrete(2), rescale=True)
