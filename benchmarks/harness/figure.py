"""What every picture drawn from rows is."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure(abc.ABC):
    """What one picture shows."""

    name: str

    @property
    def digest(self) -> str:
        """Of everything shown; stored in the picture."""
        shown = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(shown.encode()).hexdigest()

    @abc.abstractmethod
    def draw(self, picture) -> None:
        """Draw on an empty matplotlib figure."""
