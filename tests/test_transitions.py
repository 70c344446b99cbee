"""Transitions in one table, and batches drawn from it."""

import pytest
import torch

from polygrad_fast.errors import InputError
from polygrad_fast.transitions import Transitions, distinct_integers


def made(rows=6, first=0):
    number = torch.arange(first, first + rows, dtype=torch.float32)
    parts = {
        "observations": torch.stack((number, number + 0.1), 1),
        "actions": number[:, None] + 0.2,
        "rewards": number + 0.3,
        "next_observations": torch.stack((number + 0.4, number + 0.5), 1),
        "terminals": number % 2,
    }
    return parts, Transitions.from_parts(**parts)


def test_parts_come_back():
    parts, transitions = made()
    for name, part in parts.items():
        assert torch.equal(getattr(transitions, name), part), name
    assert torch.equal(transitions.pairs, torch.cat((parts["observations"], parts["actions"]), 1))
    assert len(transitions) == 6
    both = Transitions.concatenate([transitions, made(3, 6)[1]])
    assert both.rewards.tolist() == pytest.approx([i + 0.3 for i in range(9)])
    mean, std = transitions.observation_moments()
    assert mean.tolist() == pytest.approx([2.5, 2.6])
    assert std.tolist() == pytest.approx([(35 / 12) ** 0.5] * 2)


def test_batches_are_rows_without_replacement():
    _, transitions = made(40)
    seen = set()
    for seed in range(60):
        batch = transitions.sample(5, torch.Generator().manual_seed(seed))
        numbers = batch.observations[:, 0]
        assert len(set(numbers.tolist())) == 5
        assert torch.equal(batch.actions[:, 0], numbers + 0.2)
        assert torch.equal(batch.terminals, numbers % 2)
        seen |= set(numbers.tolist())
    assert len(seen) == 40
    whole = transitions.sample(40, torch.Generator().manual_seed(0))
    assert sorted(whole.terminals.tolist()) == sorted(transitions.terminals.tolist())
    with pytest.raises(InputError, match=r"rows to draw must be an integer in \[1, 41\), got 41"):
        transitions.sample(41)


@pytest.mark.parametrize(("below", "count"), [(6, 3), (9, 3), (12, 3)])
def test_every_set_is_equally_likely(below, count):
    generator, draws = torch.Generator().manual_seed(0), 4000
    hits = torch.zeros(below)
    for _ in range(draws):
        drawn = distinct_integers(below, count, generator)
        assert len(drawn.unique()) == count and 0 <= drawn.min() and drawn.max() < below
        hits[drawn] += 1
    wanted = draws * count / below
    assert (hits - wanted).abs().max() < 5 * wanted**0.5


def test_wrong_shapes_are_named():
    parts, transitions = made()
    for name, change, message in (
        ("actions", torch.zeros(5, 1), r"actions must have shape \(6, 1\), got \(5, 1\)"),
        ("rewards", torch.zeros(6, 1), r"rewards must have shape \(6,\), got \(6, 1\)"),
        ("next_observations", torch.zeros(6, 3), r"next_observations must have shape \(6, 2\)"),
        ("terminals", torch.zeros(7), r"terminals must have shape \(6,\), got \(7,\)"),
        ("observations", torch.zeros(6), r"shapes \[N, S\] and \[N, A\], got \[6\] and \[6, 1\]"),
    ):
        with pytest.raises(InputError, match=message):
            Transitions.from_parts(**(parts | {name: change}))
    with pytest.raises(InputError, match=r"rows of transitions must have shape \[N, 7\] .* \[6, 8"):
        Transitions(torch.zeros(6, 8), 2, 1)
    with pytest.raises(InputError, match=r"of one observation and action dimension .* \[\(1, 3\)"):
        Transitions.concatenate([transitions, Transitions(torch.zeros(1, 7), 1, 3)])
