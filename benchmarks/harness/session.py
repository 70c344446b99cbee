"""Measure cases: checks first, then a time, one row each."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from harness.rows import Check, Provenance, Row, RowFile
from harness.timing import Call, clock_of, interleaved
from harness.work import Ceilings, Work
from polygrad_fast.errors import InputError

TIMES = ("ms", "ms_min", "ms_max", "tflops", "gb_per_s", "share_of_floor")
MAX_RATES = {"products": 1.05, "copy": 1.5}
"""Largest rates that are believed, against the measured ceilings; reading alone may be faster than
copying."""


class WrongResult(Exception):
    """A check did not pass, so that there is no time."""


class NotMeasured(Exception):
    """The case is left out: its row is stored already, or the time is up."""


class Session:
    """Measures cases on one device and stores their rows.

    Args:
        device: where GPU work runs; "cuda" or "cpu".
        rows: where the rows go.
        provenance: of code and machine, for a device.
        time_budget: seconds until no further case is begun.
        resume: leave out cases whose row of this commit is stored.
        keep_dirty: leave out those of a changed tree too; nothing says that the changes are the
            same.
        small: seconds and ceilings for a try of the mechanics.
    """

    def __init__(
        self,
        device: torch.device,
        rows: RowFile,
        provenance: Callable[[torch.device], Provenance],
        time_budget: float = math.inf,
        resume: bool = False,
        small: bool = False,
        keep_dirty: bool = False,
    ):
        self.device, self.rows, self.small = device, rows, small
        self.time_budget, self._begin = time_budget, time.monotonic()
        self.resume, self.keep_dirty = resume, keep_dirty
        self._provenance_of = provenance
        self._provenances: dict[str, Provenance] = {}
        self._ceilings: dict[str, Ceilings] = {}

    def provenance(self, device: torch.device) -> Provenance:
        """Describe code and machine, once per device."""
        if device.type not in self._provenances:
            self._provenances[device.type] = self._provenance_of(device)
        return self._provenances[device.type]

    def ceilings(self, device: torch.device) -> Ceilings:
        """Return the device's ceilings."""
        if device.type not in self._ceilings:
            self._ceilings[device.type] = Ceilings(device, self.small)
        return self._ceilings[device.type]

    @contextlib.contextmanager
    def case(
        self, benchmark: str, dtype: str, device: torch.device | None = None, **case: Any
    ) -> Iterator[Case]:
        """Measure one case in the body of a `with`; whatever happens there becomes a row.

        Args:
            benchmark, dtype, case: what is measured, see `Row`.
            device: where the work runs, if not the session's device.

        Raises:
            NotMeasured: before the body.
        """
        device = device or self.device
        row = Row(
            **dataclasses.asdict(self.provenance(device)),
            benchmark=benchmark,
            dtype=dtype,
            case=case,
            status="error",
            error="the case ended without a time",
            smoke=self.small,
        )
        clean = self.keep_dirty or not row.dirty
        if self.resume and clean and self.rows.holds(row):
            raise NotMeasured("its row is stored")
        if time.monotonic() - self._begin > self.time_budget:
            raise NotMeasured(f"the time budget of {self.time_budget:.0f} s is spent")

        self.free()
        measured, start = Case(self, row, device), time.monotonic()
        try:
            yield measured
        except WrongResult as error:
            measured.fail("wrong", str(error))
        except InputError as error:
            measured.fail("not offered", str(error))
        except torch.OutOfMemoryError as error:
            measured.fail("out of memory", str(error).splitlines()[0])
        except Exception:  # any failure of one case: the next ones are still worth measuring
            measured.fail("error", traceback.format_exc()[-4000:])

        measured.update(seconds_spent=round(time.monotonic() - start, 1))
        self.rows.add(measured.row)

    def free(self) -> None:
        """Give back what the last case held and start its memory statistics anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def is_lost(self) -> bool:
        """Whether an error has made the device unusable for the rest of this process."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False


class Case:
    """One case being measured.

    Attributes:
        row: what is known of it so far. times: of every timed call, milliseconds per operation.
    """

    def __init__(self, session: Session, row: Row, device: torch.device):
        self.session, self.row, self.device = session, row, device
        self.times: list[float] = []

    def update(self, **changes: Any) -> None:
        """Change fields of the row."""
        self.row = dataclasses.replace(self.row, **changes)

    def fail(self, status: str, error: str) -> None:
        """Note a failure, and that there is no time, should it come after one."""
        self.times = []
        self.update(status=status, error=error, **dict.fromkeys(TIMES))

    def check(self, name: str, error: float, allowed: float) -> None:
        """Hold an error against the allowed one.

        Raises:
            WrongResult: it is larger, or one of them is not a number.
        """
        error, allowed = float(error), float(allowed)
        finite = math.isfinite(error) and math.isfinite(allowed)
        check = Check(name, error if finite else None, allowed if math.isfinite(allowed) else 0.0)
        self.update(checks=(*self.row.checks, check))
        if not check.passed:
            raise WrongResult(f"{name}: {error:.3g}, allowed {allowed:.3g}")

    def warm_up(self, call: Call) -> None:
        """Call twice, for captures and compilations, and note the peak of the GPU's memory that
        torch allocated (and reserved) since the case, or the last `free`, began."""
        call()
        call()
        if self.device.type == "cuda":
            gb = {
                "peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9,
                "peak_reserved_gb": torch.cuda.max_memory_reserved(self.device) / 1e9,
            }
            self.update(values=self.row.values | gb)

    def time(
        self,
        call: Call,
        items: int,
        item: str,
        work: Work | None = None,
        repeats: int = 1,
        beside: Mapping[str, Call] | None = None,
        seconds: float = 1.0,
        after: Callable[[], None] | None = None,
        **values: float,
    ) -> None:
        """Time a call and complete the row.

        Args:
            call: does the operation `repeats` times.
            items, item: what one operation makes, for instance 1024, "trajectory".
            work: of one operation.
            beside: calls to compare with, timed in turns with `call`; their medians become the
                row's values NAME_ms, per operation like `ms`.
            seconds: for the measurement, roughly.
            after: makes checks once the times are taken.
            values: other numbers for the row.

        Raises:
            RuntimeError: no check was made before.
            WrongResult: the work took less time than the machine needs for it (see `MAX_RATES`), or
                a check of `after` did not pass.
        """
        session, work = self.session, work or Work()
        if not self.row.checks:
            raise RuntimeError(f"{self.row.name}: a time was asked for before any check")

        clock = clock_of(self.device)
        calls = {"": call, **(beside or {})}
        times = interleaved(calls, clock, 0.0 if session.small else seconds)
        per_operation = {k: [ms / repeats for ms in v] for k, v in times.items()}
        if after is not None:
            after()

        self.times = per_operation.pop("")
        compared = {f"{k}_ms": statistics.median(v) for k, v in per_operation.items()}
        ms = statistics.median(self.times)
        ceilings, dtype = session.ceilings(self.device), self.row.dtype
        if not session.small:
            self._check_rates(ceilings, work, ms)
        floor_ms = ceilings.floor_ms(work, dtype)

        self.update(
            status="ok",
            error=None,
            ms=ms,
            ms_min=min(self.times),
            ms_max=max(self.times),
            calls=len(self.times),
            repeats=repeats,
            clock=clock.name,
            items=items,
            item=item,
            flops=work.flops,
            bytes=work.bytes,
            tflops=work.flops and work.flops / ms / 1e9,
            gb_per_s=work.bytes and work.bytes / ms / 1e6,
            peak_tflops=ceilings.tflops(dtype) if work.flops else None,
            peak_gb_per_s=ceilings.gb_per_s(work.bytes) if work.bytes else None,
            floor_ms=floor_ms,
            share_of_floor=floor_ms and floor_ms / ms,
            values=self.row.values | compared | values,
        )

    def _check_rates(self, ceilings: Ceilings, work: Work, ms: float) -> None:
        """Refuse a time in which the work cannot have been done."""
        dtype = self.row.dtype
        for kind, largest in MAX_RATES.items():
            floor = ceilings.floors_ms(work, dtype)[kind]
            if floor is not None and floor / ms > largest:  # measured when the machine was slow?
                ceilings.forget()
                floor = ceilings.floors_ms(work, dtype)[kind]
            if floor is not None and floor / ms > largest:
                raise WrongResult(
                    f"{ms:.3g} ms is {floor / ms:.0%} of what the {kind} counted as its work take "
                    f"at this machine's measured rate, {floor:.3g} ms; at most {largest:.0%} is "
                    "believed: the call left work out, or the work is counted wrongly"
                )
