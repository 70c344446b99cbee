"""What a training still takes, from measured parts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg
from polygrad_fast.training import estimate
from polygrad_fast.training.estimate import (
    Speed,
    TimeLeft,
    in_words,
    num_updates,
    remaining_counts,
    time_left,
)


def due(steps: int, ratio: float) -> int:
    """Return how many updates fall on the last of `steps` steps."""
    return num_updates(steps, ratio) - num_updates(steps - 1, ratio)


@settings(max_examples=60, deadline=None)
@given(
    step=st.integers(0, 80),
    left=st.integers(0, 60),
    starts=st.integers(10, 50),
    delay=st.integers(0, 20),
    ratio=st.sampled_from([0.0, 0.25, 0.3, 1.0, 2.5]),
    interval=st.integers(1, 30),
)
def test_counts_are_those_of_the_training_loop(step, left, starts, delay, ratio, interval):
    target = step + left
    config = pg.TrainConfig(
        denoiser=replace(pg.TrainConfig().denoiser, updates_per_env_step=ratio, pretrain_updates=7),
        policy_updates_per_env_step=ratio,
        learning_starts=starts,
        policy_delay_steps=delay,
        eval_interval=interval,
    )
    counts = {"env_step": 0, "model_update": 0, "policy_update": 0, "evaluation": 0}
    for s in range(step + 1, target + 1):
        counts["env_step"] += 1
        counts["model_update"] += 7 * (s == starts) + due(s - starts, ratio)
        counts["policy_update"] += due(s - starts - delay, ratio)
        counts["evaluation"] += s == target or (s > starts and s % interval == 0)
    got = remaining_counts(config, step, target)
    assert got == (counts if left else {})


def test_seconds_are_counts_times_measured_seconds():
    counts = {"env_step": 1000, "model_update": 1000, "policy_update": 250, "evaluation": 2}
    seconds = {"env_step": 1e-3, "model_update": 0.05, "policy_update": 10.0}
    assert time_left(seconds, counts) == (pytest.approx(1 + 50 + 2500), True)
    assert time_left(seconds | {"evaluation": 3.0}, counts) == (pytest.approx(2557), True)
    # the prefill tells nothing, denoiser updates before the first policy update something
    assert time_left({"env_step": 1e-3}, counts) == (pytest.approx(1), False)
    del seconds["policy_update"]
    assert time_left(seconds, counts) == (pytest.approx(51), False)
    assert time_left(seconds, counts | {"policy_update": 0}) == (pytest.approx(51), True)
    assert time_left({}, {}) == (0, True)
    assert str(TimeLeft(720, True)) == "about 12 min"
    assert str(TimeLeft(6.7 * 3600, False)) == "more than 6.7 h"


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_first_slow_update_does_not_count(clock):
    clock.now, speed = 100.0, Speed(0)

    def take(name, seconds):
        with speed.measured(name):
            clock.now += seconds

    for seconds in (30.0, 0.5):  # the first one compiles
        take("policy_update", seconds)
        assert speed.typical() == {}
    take("policy_update", 0.5)
    take("evaluation", 2.0)
    assert speed.typical() == {"policy_update": 0.5, "evaluation": 2.0}
    for _ in range(25):
        take("policy_update", 0.25)
    assert speed.typical()["policy_update"] == 0.25


def test_rates_are_those_since_the_last_reading(clock):
    clock.now, speed = 0.0, Speed(40)
    for name, seconds in (("env_step", 1.0), ("model_update", 2.0), ("policy_update", 4.0)):
        with speed.measured(name):
            clock.now += seconds
    with pytest.raises(ZeroDivisionError), speed.measured("model_update"):  # does not count
        clock.now += 1.0
        1 / 0  # noqa: B018
    with speed.measured("sample"):
        clock.now += 2.0
    assert speed.read(60) == {
        "time/env_steps_per_s": 2.0, "time/updates_per_s": 0.2, "time/sample_ms": 2000.0,
    }  # fmt: skip
    clock.now += 5.0
    assert speed.read(70) == {"time/env_steps_per_s": 2.0}


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "0 s"), (59.6, "60 s"), (720, "12 min"), (6.7 * 3600, "6.7 h"), (30 * 86400, "30 days")],
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words
