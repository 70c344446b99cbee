"""Interpreted kernels between guards, their programs in random order.

Every tensor a kernel gets is copied between two margins of NaN. What it reads beyond its tensors
makes its results NaN; what it writes there raises. A result that depends on the order of the
programs, which a GPU does not promise, differs from run to run of a test.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import interpreter

MARGIN = 4096
"""Bytes on either side."""
POISON = 0xFF  # bytes of NaN in every floating dtype, and of -1


class Guarded:
    """A copy of some memory between its margins."""

    def __init__(self, storage: torch.UntypedStorage):
        self.given = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.bytes = torch.full((2 * MARGIN + len(self.given),), POISON, dtype=torch.uint8)
        self.inside = self.bytes[MARGIN : MARGIN + len(self.given)].copy_(self.given)

    def view(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the memory as one of the copy."""
        offset = MARGIN // tensor.element_size() + tensor.storage_offset()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(self.bytes.untyped_storage(), offset, tensor.size(), tensor.stride())

    def put_back(self, kernel: str) -> None:
        """Copy back what the kernel wrote.

        Raises:
            IndexError: it wrote into a margin.
        """
        self.given.copy_(self.inside)
        for name, margin in (("before", self.bytes[:MARGIN]), ("after", self.bytes[-MARGIN:])):
            if not (margin == POISON).all():
                raise IndexError(f"{kernel} wrote {name} a tensor of {len(self.given)} bytes")


def _guarded(launch):
    @torch.no_grad()
    def guarded(executor, *args, **kwargs):
        copies: dict[int, Guarded] = {}

        def placed(value):
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            if storage._cdata not in copies:
                copies[storage._cdata] = Guarded(storage)
            return copies[storage._cdata].view(value)

        launch(executor, *map(placed, args), **{k: placed(v) for k, v in kwargs.items()})
        for copy in copies.values():
            copy.put_back(executor.fn.__name__)

    return guarded


@contextlib.contextmanager
def guards(seed: int = 0) -> Iterator[None]:
    """Run interpreted kernels so for the length of the block."""
    builder, generator = type(interpreter.interpreter_builder), random.Random(seed)
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def dim(self, *sizes):
        self.order = list(itertools.product(*map(range, sizes)))
        generator.shuffle(self.order)
        set_dim(self, *sizes)

    def index(self, *programs):
        set_index(self, *self.order.pop())

    launch = _guarded(interpreter.GridExecutor.__call__)
    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.multiple(builder, set_grid_dim=dim, set_grid_idx=index),
    ):
        yield
