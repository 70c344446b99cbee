"""The processes that train together, each with a part of every batch: torch.distributed.

Every process holds the same networks, optimizers and environment steps, and takes the same
decisions; environments, windows and imagined trajectories are split over them. What differs between
them goes through `Ranks`, whose single process leaves everything as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from polygrad_fast.errors import InputError

Result = TypeVar("Result")
BACKENDS = "cpu:gloo,cuda:nccl"
_MERGED: dict[str, Callable[[Tensor], Tensor]] = {  # [processes, n] -> [n]
    "first": lambda values: values[0],
    "mean": lambda values: values.mean(0),
    "lowest": lambda values: values.amin(0),
    "highest": lambda values: values.amax(0),
    "farthest": lambda values: values.gather(0, values.abs().argmax(0, keepdim=True))[0],
}


class Ranks:
    """A process that trains alone.

    Attributes:
        index: this process's number, from 0.
        number: how many there are.
    """

    index, number = 0, 1

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over all processes, the same bits in each."""

    def merge_(self, noted: Sequence[tuple[Tensor, str]]) -> None:
        """Replace what every process has noted on its part of the windows by one thing of all.

        Args:
            noted: tensors with the value that counts: the "first" process's, the "mean", the
                "lowest", the "highest" or, from 0, the "farthest".
        """

    def concatenate(self, rows: Tensor) -> Tensor:
        """Return the rows [n, ..] of all processes, [number n, ..], in their order."""
        return rows

    def own(self, rows: Tensor) -> Tensor:
        """Return this process's part of what `concatenate` returned, or of as many rows."""
        return rows

    def exchange(self, values: tuple) -> list[tuple]:
        """Return a tuple of vectors and numbers of every process, in their order."""
        return [values]

    def gather(self, thing: Any) -> list[Any]:
        """Return a thing of every process, in their order."""
        return [thing]

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in one of the processes."""
        return flag

    def first(self, function: Callable[[], Result]) -> Result:
        """Return what a function returns in the first process, which alone calls it."""
        return function()

    def check_multiples(self, **numbers: int) -> None:
        """Raise InputError unless numbers can be split evenly; names say what they are."""
        for name, value in numbers.items():
            if value % self.number:
                raise InputError(
                    f"{name} must be a multiple of the number of processes, {self.number}, got "
                    f"{value}"
                )


class ProcessGroup(Ranks):
    """One of the processes of torch.distributed's default group."""

    def __init__(self) -> None:
        self.index, self.number = dist.get_rank(), dist.get_world_size()

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.average_`; one call for all that are of one dtype."""
        for dtype in {tensor.dtype: None for tensor in tensors}:
            found = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in found])
            dist.all_reduce(flat)
            parts = flat.div_(self.number).split([tensor.numel() for tensor in found])
            for tensor, part in zip(found, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def merge_(self, noted: Sequence[tuple[Tensor, str]]) -> None:
        """See `Ranks.merge_`; one call for all."""
        if not noted:
            return
        everyone = self.concatenate(torch.cat([tensor.flatten() for tensor, _ in noted])[None])
        parts = everyone.split([tensor.numel() for tensor, _ in noted], dim=1)
        for (tensor, which), values in zip(noted, parts, strict=True):
            tensor.copy_(_MERGED[which](values).view_as(tensor))

    def concatenate(self, rows: Tensor) -> Tensor:
        """See `Ranks.concatenate`."""
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.number)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def own(self, rows: Tensor) -> Tensor:
        """See `Ranks.own`."""
        return rows.chunk(self.number)[self.index]

    def exchange(self, values: tuple) -> list[tuple]:
        """See `Ranks.exchange`; numbers in float64."""
        arrays = [np.asarray(value) for value in values]
        flat = torch.from_numpy(np.concatenate([a.ravel().astype(np.float64) for a in arrays]))
        parts = [torch.empty_like(flat) for _ in range(self.number)]
        dist.all_gather(parts, flat)
        ends = np.cumsum([array.size for array in arrays])[:-1]
        return [
            tuple(
                piece.reshape(array.shape).astype(array.dtype) if array.shape else piece.item()
                for piece, array in zip(np.split(part.numpy(), ends), arrays, strict=True)
            )
            for part in parts
        ]

    def gather(self, thing: Any) -> list[Any]:
        """See `Ranks.gather`."""
        found: list[Any] = [None] * self.number
        dist.all_gather_object(found, thing)
        return found

    def any(self, flag: bool) -> bool:
        """See `Ranks.any`."""
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def first(self, function: Callable[[], Result]) -> Result:
        """See `Ranks.first`."""
        result = [function() if self.index == 0 else None]
        dist.broadcast_object_list(result)
        return result[0]


def current_ranks() -> Ranks:
    """Return this process's place: that in torch.distributed's default group where it has joined
    one of several, else alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup()
    return Ranks()


def num_launched() -> int:
    """Return how many processes `torchrun` has begun, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that `torchrun` has begun, for the block; alone without it.

    Args:
        device: what they train on; each has a GPU of its own unless it is "cpu" or there is none.

    Raises:
        InputError: a certain GPU for all, or fewer GPUs than processes.
    """
    if num_launched() == 1:
        yield Ranks()
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device not in ("auto", "cuda"):
            raise InputError(
                f"device must be 'auto', 'cuda' or 'cpu' for processes of torchrun, got {device!r}"
            )
        if place >= gpus:
            raise InputError(
                f"each of torchrun's processes needs a GPU of its own, got {gpus} for at least "
                f"{place + 1}: give a smaller --nproc-per-node, or device 'cpu'"
            )
        torch.cuda.set_device(place)  # what "cuda" and "auto" then mean
    dist.init_process_group(BACKENDS if on_gpus else "gloo")
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()
