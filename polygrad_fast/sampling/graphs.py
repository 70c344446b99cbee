"""CUDA graphs: the one file that captures and replays them."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from polygrad_fast.profiling import annotate

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


@contextlib.contextmanager
def _state_kept(generator: torch.Generator | None) -> Iterator[None]:
    """Put a generator's state back as it was; it lies on the host."""
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None:
            generator.set_state(state)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream per device for all captures: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def as_before_a_capture(device: torch.device) -> Iterator[None]:
    """Run the block on the stream of captures, between what comes before and after: calls there
    compile kernels and set libraries up, which no capture allows."""
    with torch.cuda.device(device):
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


class CapturedFunction:
    """One capture of `function`, replayed on copies of the inputs it is called with.

    Args:
        function: takes and returns CUDA tensors; launches kernels only (no `.item()`, no branch on
            a tensor). What it reads besides its arguments is read anew, at the captured addresses,
            by every replay.
        inputs: example arguments; shapes, dtypes and the device are fixed by them.
        warmups: runs beforehand, see `as_before_a_capture`; 0 for a function that changes what it
            reads, which the caller has run.
        generator: what the function draws from, besides torch's default. A replay draws from the
            state it has then; the capture leaves it as it was.
    """

    def __init__(
        self,
        function: Function,
        inputs: tuple[Tensor, ...],
        warmups: int = 2,
        generator: torch.Generator | None = None,
    ):
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        device = self.inputs[0].device
        with torch.cuda.device(device), _state_kept(generator):
            stream = _side_stream(device)
            with as_before_a_capture(device):
                for _ in range(warmups):
                    function(*self.inputs)
            gc.collect()
            self.graph = torch.cuda.CUDAGraph()
            if generator is not None:
                self.graph.register_generator_state(generator)
            capture = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
            with _garbage_collection_off(), capture:
                self.outputs = function(*self.inputs)
            self._done = torch.cuda.Event()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Replay on these inputs, on the current stream; the results are the caller's own."""
        # the last replay may be running on another stream
        torch.cuda.current_stream(self.inputs[0].device).wait_event(self._done)
        with annotate("graph_inputs"):
            for static, given in zip(self.inputs, inputs, strict=True):
                static.copy_(given)
        with annotate("graph_replay"):
            self.graph.replay()
        with annotate("graph_outputs"):
            results = tuple(output.clone() for output in self.outputs)
        self._done.record(torch.cuda.current_stream(self.inputs[0].device))
        return results


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
        self, key: Hashable, function: Function, inputs: tuple[Tensor, ...], **options
    ) -> tuple[Tensor, ...]:
        """Replay the capture of that key and these shapes, capturing `function` where there is
        none, with `CapturedFunction`'s options."""
        key = (key, tuple((tensor.shape, tensor.dtype) for tensor in inputs))
        entry = self._entries.pop(key, None)
        if entry is None:
            while len(self._entries) >= self.max_entries:
                self._entries.popitem(last=False)
            with annotate("graph_capture"):
                try:
                    entry = CapturedFunction(function, inputs, **options)
                except torch.OutOfMemoryError:  # make room: every capture holds its own buffers
                    self.clear()
                    torch.cuda.empty_cache()
                    entry = CapturedFunction(function, inputs, **options)
        self._entries[key] = entry
        return entry(*inputs)

    def clear(self) -> None:
        """Drop every capture and its memory."""
        self._entries.clear()
