"""Parameters side by side in memory, so that one call moves them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Every parameter begins at a multiple of so many numbers, a cache line of float32."""


class FlatWeights:
    """Turn parameters into views of one buffer per dtype and device; their values stay.

    Args:
        parameters: dense; each keeps its shape, and must not be given another memory later.

    Attributes:
        parameters: as given. buffers: what they are views of, leaves for an optimizer; what lies
            between two parameters is 0.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        self._places = []  # of each parameter: its buffer, and where it begins there
        for parameter in self.parameters:
            kind = parameter.dtype, parameter.device
            start = sizes.get(kind, 0)
            self._places.append((kind, start))
            sizes[kind] = start + -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self._kinds = list(sizes)
        self.buffers = [
            nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
            for (dtype, device), size in sizes.items()
        ]
        with torch.no_grad():
            for parameter, view in zip(self.parameters, self.views(self.buffers), strict=True):
                parameter.data = view.copy_(parameter)

    def views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Return each parameter's part, in its shape, of tensors that are laid out as `buffers`."""
        of_kind = dict(zip(self._kinds, buffers, strict=True))
        return [
            of_kind[kind].detach()[start : start + parameter.numel()].view(parameter.shape)
            for parameter, (kind, start) in zip(self.parameters, self._places, strict=True)
        ]

    def indices(self, buffer: int) -> list[int]:
        """Return which of the parameters lie in a buffer, by its number."""
        return [i for i, (kind, _) in enumerate(self._places) if kind == self._kinds[buffer]]
