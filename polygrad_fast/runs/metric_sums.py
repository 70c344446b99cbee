"""Sums of what is measured, on the device where it is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polygrad_fast.errors import NonFiniteError


class MetricSums:
    """Sums of quantities since the last row of metrics, for their means.

    Scalars on a device are added there, in float64; `check`, `means` and `state_dict` alone read
    them on the host, and wait for the device.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, ...], _Group | _Flags] = {}
        self._restored: dict[str, tuple[float, float]] = {}  # sums and counts before a resume

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add quantities that are measured together, by name: detached scalars on one device, or
        numbers."""
        found = list(values.values())
        if torch.is_tensor(found[0]):
            measured = torch.stack(found)
        else:
            measured = torch.tensor(found, dtype=torch.float64)
        self._group(tuple(values), measured.device).add(measured, 1)

    def add_rows(self, names: tuple[str, ...], rows: Tensor) -> None:
        """Add n measurements of some quantities, [n, number of names]."""
        self._group(names, rows.device).add(rows.double().sum(0), len(rows))

    def note(self, subject: str, finite: Mapping[str, Tensor]) -> None:
        """Note whether parts of something were finite, bool scalars by the parts' names."""
        key = (subject, *finite)
        if key not in self._groups:
            self._groups[key] = _Flags(subject, tuple(finite))
        self._groups[key].add(torch.stack(list(finite.values())))

    def _group(self, names: tuple[str, ...], device: torch.device) -> _Group:
        if names not in self._groups:
            before = [self._restored.pop(name, (0.0, 0.0)) for name in names]
            self._groups[names] = _Group(names, before, device)
        return self._groups[names]

    def check(self) -> None:
        """Raise NonFiniteError where something since the last row was not finite, naming what was
        measured first in the row."""
        for group in self._groups.values():
            group.check()

    def means(self) -> dict[str, float]:
        """Return the mean of each quantity by its name."""
        return {name: total / count for name, (total, count) in self._entries().items()}

    def clear(self) -> None:
        """Begin a new row."""
        self._groups, self._restored = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sum and the count of each quantity by its name."""
        return {name: list(entry) for name, entry in self._entries().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.clear()
        self._restored = {name: tuple(entry) for name, entry in state.items()}

    def _entries(self) -> dict[str, tuple[float, float]]:
        found = dict(self._restored)
        for group in self._groups.values():
            for name, (total, count) in group.entries().items():
                before = found.get(name, (0.0, 0.0))
                found[name] = before[0] + total, before[1] + count
        return found


def merged_sums(states: Sequence[Mapping[str, Any]]) -> MetricSums:
    """Return the sums of several `MetricSums.state_dict`, as of one that has measured it all."""
    merged: dict[str, tuple[float, float]] = {}
    for state in states:
        for name, (total, count) in state.items():
            before = merged.get(name, (0.0, 0.0))
            merged[name] = before[0] + total, before[1] + count
    sums = MetricSums()
    sums.load_state_dict(merged)
    return sums


class _Group:
    """Quantities that are measured together."""

    def __init__(
        self, names: tuple[str, ...], before: list[tuple[float, float]], device: torch.device
    ):
        self._names, self._before = names, [count for _, count in before]
        totals = [total for total, _ in before]
        self._sums = torch.tensor(totals, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, values: Tensor, count: int) -> None:
        self._sums += values
        self._count += count

    def entries(self) -> dict[str, tuple[float, float]]:
        counts = [before + self._count for before in self._before]
        return dict(zip(self._names, zip(self._sums.tolist(), counts, strict=True), strict=True))

    def check(self) -> None:
        """A sum of anything that is not finite stays so."""
        totals = self._sums.tolist()
        if math.isfinite(sum(totals)):
            return
        for name, value in zip(self._names, totals, strict=True):
            if not math.isfinite(value):
                part, _, quantity = name.partition("/")
                raise NonFiniteError(f"the {part}'s {quantity} is {value}")


class _Flags:
    """Whether parts of something were finite."""

    def __init__(self, subject: str, names: tuple[str, ...]):
        self._subject, self._names = subject, names
        self._all: Tensor | None = None

    def add(self, finite: Tensor) -> None:
        self._all = finite if self._all is None else self._all & finite

    def entries(self) -> dict[str, tuple[float, float]]:
        return {}

    def check(self) -> None:
        for name, fine in zip(self._names, self._all.tolist(), strict=True):
            if not fine:
                raise NonFiniteError(f"the {self._subject} {name} are not finite")
