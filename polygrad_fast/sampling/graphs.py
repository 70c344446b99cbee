"""CUDA graphs: the one file that captures and replays them."""

from __future__ import annotations

import contextlib
import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


@contextlib.contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """A collection during a capture may free a CUDA tensor, which invalidates the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CapturedFunction:
    """One capture of `function`, replayed on copies of the inputs it is called with.

    Args:
        function: takes and returns CUDA tensors; launches kernels only (no `.item()`, no branch on
            a tensor). What it reads besides its arguments is read anew, at the captured addresses,
            by every replay.
        inputs: example arguments; shapes, dtypes and the device are fixed by them.
        warmups: eager runs on a side stream beforehand, which compile kernels and set up libraries.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], warmups: int = 2):
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        device = self.inputs[0].device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(warmups):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            gc.collect()
            self.graph = torch.cuda.CUDAGraph()
            with _garbage_collection_off(), torch.cuda.graph(self.graph, stream=stream):
                self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Replay on these inputs, on the current stream; the results are the caller's own."""
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


class GraphCache:
    """Captured functions by key, least recently used dropped first.

    Not for concurrent calls: replays of one entry share its static tensors.

    Args:
        max_entries: captures kept, each with its own device memory.
    """

    def __init__(self, max_entries: int = 8):
        self.max_entries = max_entries
        self._entries: OrderedDict[Hashable, CapturedFunction] = OrderedDict()

    def __call__(
        self, key: Hashable, function: Function, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Replay the capture of that key and these shapes, capturing `function` where there is
        none."""
        key = (key, tuple((tensor.shape, tensor.dtype) for tensor in inputs))
        entry = self._entries.pop(key, None)
        if entry is None:
            while len(self._entries) >= self.max_entries:
                self._entries.popitem(last=False)
            entry = CapturedFunction(function, inputs)
        self._entries[key] = entry
        return entry(*inputs)

    def clear(self) -> None:
        """Drop every capture and its memory."""
        self._entries.clear()
