"""Named ranges for Nsight Systems and Nsight Compute (NVTX) and for torch.profiler.

`benchmarks/PROFILING.md` lists the ranges and shows how to record and read them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd import profiler as autograd_profiler

from polygrad_fast.arguments import as_output_file
from polygrad_fast.errors import InputError
from polygrad_fast.runs.files import replacing

DOMAIN = "polygrad_fast"
_PREFIX = f"{DOMAIN}::"


def _recorded_domain():
    """Return the NVTX domain where a tool records it, else None.

    Tools attach when a process starts, so that asking once, at import, is enough.
    """
    try:
        import nvtx

        # without a tool, `get_domain` returns a dummy of another type
        domain = nvtx.get_domain(DOMAIN) if nvtx.enabled() else None
        return domain if isinstance(domain, nvtx.Domain) else None
    except (ImportError, AttributeError):  # not installed; AttributeError: older than 0.2.12
        return None


_domain = _recorded_domain()


class _NoRange:
    """What `annotate` returns while nothing records."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, error_type, error, traceback) -> None:
        pass


_NO_RANGE = _NoRange()


class _Range:
    """One range, closed where it was opened: a profiler may start or stop in between."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        self._domain, self._record = _domain, None
        if self._domain is not None:
            self._domain.push_range(self._domain.get_event_attributes(message=self.name))
        if autograd_profiler._is_profiler_enabled:
            self._record = torch.profiler.record_function(_PREFIX + self.name)
            self._record.__enter__()

    def __exit__(self, error_type, error, traceback) -> None:
        if self._record is not None:
            self._record.__exit__(error_type, error, traceback)
        if self._domain is not None:
            self._domain.pop_range()


def annotate(name: str) -> contextlib.AbstractContextManager[None]:
    """Show the block in profiles: `with annotate("sample"): ...`.

    An NVTX range of the domain "polygrad_fast" where Nsight records it (with the package nvtx),
    and an entry "polygrad_fast::<name>" of a running torch.profiler. Otherwise about 0.1 us. Inside
    a CUDA graph's capture the range is that of the capture; replays do not show it. Not for
    compiled code.
    """
    if _domain is None and not autograd_profiler._is_profiler_enabled:
        return _NO_RANGE
    return _Range(name)


@contextlib.contextmanager
def capture(torch_profiler: bool = False) -> Iterator[torch.profiler.profile | None]:
    """Delimit what a profile shall hold, so that warm-up stays out; synchronizes with the GPU.

    The block is the range "capture" and, on a GPU, lies between cudaProfilerStart and
    cudaProfilerStop, which is what `nsys profile --capture-range=cudaProfilerApi` and
    `ncu --profile-from-start off` wait for.

    Args:
        torch_profiler: record with torch.profiler instead, which needs no other tool, and hand it
            out.
    """
    on_gpu = torch.cuda.is_available()
    with contextlib.ExitStack() as stack:
        profiler = None
        if on_gpu:
            torch.cuda.synchronize()
        if torch_profiler:
            profiler = stack.enter_context(torch.profiler.profile())
        elif on_gpu:
            torch.cuda.profiler.start()
            stack.callback(torch.cuda.profiler.stop)
        stack.enter_context(annotate("capture"))
        yield profiler
        if on_gpu:
            torch.cuda.synchronize()


def check_trace_path(path: str | Path) -> None:
    """Raise InputError where `write_trace` could not write: before any work is lost."""
    path = as_output_file(path, "the trace")
    probe = path.with_name(f".tmp-{path.name}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def write_trace(profiler: torch.profiler.profile, path: str | Path) -> None:
    """Write a Chrome trace, whole or not at all; compressed where the name ends in ".gz".

    Raises:
        InputError: `path` cannot be written.
    """
    check_trace_path(path)
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))


def range_table(profiler: torch.profiler.profile) -> str:
    """Return the recorded ranges as a tree: calls, host time in total, per call, and its share of
    the time of all outermost ranges."""
    found: dict[tuple[str, ...], list[float]] = {}
    events = [
        event
        for event in profiler.events()
        if event.name.startswith(_PREFIX) and event.device_type == torch.autograd.DeviceType.CPU
    ]
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        path, parent = (event.name,), event.cpu_parent
        while parent is not None:
            if parent.name.startswith(_PREFIX):
                path = (parent.name, *path)
            parent = parent.cpu_parent
        entry = found.setdefault(path, [0, 0.0])
        entry[0] += 1
        entry[1] += event.time_range.elapsed_us() / 1e3
    everything = sum(total for path, (_, total) in found.items() if len(path) == 1)
    order = {path: index for index, path in enumerate(found)}
    lines = [f"{'range':32}{'calls':>8}{'host ms':>12}{'ms per call':>13}{'share':>8}"]
    for path in sorted(found, key=lambda p: [order[p[: n + 1]] for n in range(len(p))]):
        calls, total = found[path]
        name = "  " * (len(path) - 1) + path[-1].removeprefix(_PREFIX)
        lines.append(
            f"{name:32}{calls:8}{total:12.3f}{total / calls:13.4f}{total / everything:8.1%}"
        )
    return "\n".join(lines)


def kernel_table(profiler: torch.profiler.profile, rows: int = 20) -> str:
    """Return torch.profiler's table of the operators, on a GPU kernels, that took most time."""
    devices = {event.device_type for event in profiler.events()}
    device = "cuda" if torch.autograd.DeviceType.CUDA in devices else "cpu"
    return profiler.key_averages().table(
        sort_by=f"self_{device}_time_total", row_limit=rows, max_name_column_width=60
    )
