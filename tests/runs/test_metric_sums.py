import math

import fake_cuda
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg
from polygrad_fast.runs.metric_sums import MetricSums

numbers = st.floats(-1e6, 1e6, width=32)


def scalars(values, dtype=torch.float32):
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), st.integers(0, 8))
def test_means_are_those_of_float64_and_a_resume_continues_them_exactly(rows, cut):
    whole, part = MetricSums(), MetricSums()
    total = 0.0
    for i, (a, b) in enumerate(rows):
        total += a
        for sums in (whole, part):
            sums.add(scalars({"a/x": a, "a/y": b}))
            sums.add({"train/z": b})
        if i == cut:
            state, part = part.state_dict(), MetricSums()
            part.load_state_dict(state)
            assert part.means() == whole.means()
    assert whole.means() == part.means()
    assert whole.means()["a/x"] == total / len(rows)
    assert whole.means()["train/z"] == pytest.approx(sum(b for _, b in rows) / len(rows))
    assert part.state_dict() == whole.state_dict()
    assert list(whole.state_dict()) == ["a/x", "a/y", "train/z"]
    whole.clear()
    assert whole.means() == {} == whole.state_dict()


def test_quantities_may_be_of_several_dtypes_and_be_measured_in_several_companies():
    sums = MetricSums()
    sums.add(scalars({"a/x": 1.0}) | scalars({"a/y": 1e-9 + 1}, torch.float64))
    sums.add(scalars({"a/x": 4.0}))
    assert sums.means() == {"a/x": 2.5, "a/y": 1e-9 + 1}
    state, resumed = sums.state_dict(), MetricSums()
    resumed.load_state_dict(state)
    resumed.add(scalars({"a/x": 7.0}))
    assert resumed.means() == {"a/x": 4.0, "a/y": 1e-9 + 1}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_was_not_finite_once_is_named_at_the_next_check(value):
    sums = MetricSums()
    sums.add(scalars({"denoiser/loss": 1.0, "denoiser/reward_loss": 1.0}))
    sums.check()
    sums.add(scalars({"denoiser/loss": 1.0, "denoiser/reward_loss": value}))
    for _ in range(3):
        sums.add(scalars({"denoiser/loss": 1.0, "denoiser/reward_loss": 1.0}))
    with pytest.raises(pg.NonFiniteError, match=f"^the denoiser's reward_loss is {value}$"):
        sums.check()
    sums.clear()
    sums.check()


def test_what_was_noted_as_not_finite_is_named():
    sums = MetricSums()
    for rewards in (True, False, True):
        finite = {"observations": torch.tensor(True), "rewards": torch.tensor(rewards)}
        sums.note("imagined", finite)
    assert sums.means() == {}
    with pytest.raises(pg.NonFiniteError, match="^the imagined rewards are not finite$"):
        sums.check()


def test_adding_reads_nothing_on_the_host():
    with fake_cuda.installed() as gpu:
        sums, one = MetricSums(), torch.ones((), device="cuda")
        for _ in range(2):
            sums.add({"a/x": one, "a/y": one})
            sums.note("imagined", {"rewards": one > 0})
        with gpu.without_syncs() as launches:
            sums.add({"a/x": one, "a/y": one})
            sums.note("imagined", {"rewards": one > 0})
        assert launches == {"stack": 2, "add_": 1, "gt": 1, "bitwise_and": 1}
        with gpu.without_syncs(), pytest.raises(fake_cuda.HostSync):
            sums.check()
        assert sums.means() == {"a/x": 1.0, "a/y": 1.0}
