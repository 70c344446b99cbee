"""Named ranges for Nsight Systems and Nsight Compute (NVTX) and for torch.profiler.

The ranges are listed in benchmarks/PROFILING.md.
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd import profiler as autograd_profiler

DOMAIN = "polygrad_fast"


def _recorded_domain():
    """Return the NVTX domain where a tool records it, else None.

    Tools attach when a process starts, so that asking once, at import, is enough.
    """
    try:
        import nvtx

        # without a tool, `get_domain` returns a dummy of another type
        domain = nvtx.get_domain(DOMAIN) if nvtx.enabled() else None
        return domain if isinstance(domain, nvtx.Domain) else None
    except (ImportError, AttributeError):  # not installed; AttributeError: older than 0.2.11
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
            self._record = torch.profiler.record_function(f"{DOMAIN}::{self.name}")
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
