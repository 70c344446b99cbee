"""What replaces `torch.cuda` and what of PyTorch and triton asks for it; see `fake_cuda`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from fake_cuda import DEVICE, HOST, FakeCuda, Graph
from torch.utils._python_dispatch import _disable_current_modes

from polygrad_fast.sampling import graphs

REAL_GENERATOR = torch.Generator
PROPERTIES = SimpleNamespace(
    name="fake",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 10**9,
    L2_cache_size=50 * 2**20,
)


class _GeneratorKind(type(REAL_GENERATOR)):
    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, REAL_GENERATOR)


class Generator(REAL_GENERATOR, metaclass=_GeneratorKind):
    """A generator of either device."""

    def __new__(cls, device: str | torch.device = "cpu"):
        made = super().__new__(cls, "cpu")
        made.on = DEVICE if torch.device(device).type == "cuda" else HOST
        return made

    def __init__(self, device: str | torch.device = "cpu"):
        pass

    device = property(lambda self: self.on)


class DefaultGenerator:
    """The device's own generator: what is drawn on it without one comes from the host's own."""

    device = DEVICE

    def get_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


class Stream:
    """A stream; everything runs in order."""

    def __init__(self, gpu: FakeCuda):
        self.gpu = gpu

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def synchronize(self) -> None:
        self.gpu.sync("Stream.synchronize")


class Event:
    """An event; everything runs in order."""

    def __init__(self, gpu: FakeCuda):
        self.gpu = gpu

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.sync("Event.synchronize")


def runtime(gpu: FakeCuda) -> dict[str, object]:
    """Return what replaces functions and classes of `torch.cuda`."""
    stream = Stream(gpu)

    class CUDAGraph(Graph):
        def replay(self) -> None:
            gpu.launch("graph replay", super().replay)
            with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
                super().replay()

    def ignored(*args, **kwargs):
        return contextlib.nullcontext()

    def debug_mode(mode: str | int) -> None:
        gpu.forbids_syncs = mode in ("error", 2)

    return dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: DEVICE.index,
        get_device_capability=lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        get_device_name=lambda device=None: PROPERTIES.name,
        get_device_properties=lambda device=None: PROPERTIES,
        mem_get_info=lambda device=None: (PROPERTIES.total_memory,) * 2,
        memory_allocated=lambda device=None: 0,
        memory_reserved=lambda device=None: 0,
        max_memory_allocated=lambda device=None: 0,
        empty_cache=lambda: None,
        synchronize=lambda device=None: gpu.sync("synchronize"),
        set_sync_debug_mode=debug_mode,
        device=ignored,
        stream=ignored,
        Stream=lambda *args, **kwargs: Stream(gpu),
        Event=lambda *args, **kwargs: Event(gpu),
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        CUDAGraph=CUDAGraph,
        graph=gpu.capture,
        is_current_stream_capturing=lambda: gpu.capturing is not None,
        default_generators=(DefaultGenerator(),),
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )


def _counted(gpu: FakeCuda, launch: Callable, runs: bool) -> Callable:
    """Return the interpreter's launch of a kernel, counted."""

    def counted(executor, *args, **kwargs):
        def again() -> None:
            if runs:
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    launch(executor, *args, **kwargs)

        gpu.launch(executor.fn.__name__, again)
        again()

    return counted


@contextlib.contextmanager
def replaced(gpu: FakeCuda, runs_kernels: bool) -> Iterator[None]:
    """Replace what asks for the driver, for the length of the block."""
    autocast = torch.autocast.__init__

    def autocast_on_host(self, device_type, *args, **kwargs) -> None:
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **runtime(gpu)))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", autocast_on_host))
        try:
            from triton.runtime.interpreter import GridExecutor
        except ImportError:
            pass
        else:
            launch = _counted(gpu, GridExecutor.__call__, runs_kernels)
            stack.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        graphs._side_stream.cache_clear()
        stack.callback(graphs._side_stream.cache_clear)
        yield
