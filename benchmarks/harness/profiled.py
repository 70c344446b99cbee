"""What the scripts for profilers share: options, the part that is recorded, its report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from harness import sampler_case
from polygrad_fast import profiling
from polygrad_fast.errors import InputError
from polygrad_fast.sampling.sampler import ENGINES


class Parser(argparse.ArgumentParser):
    """Options of such a script; bad input is one line and exit code 2."""

    def __init__(self, script: str, purpose: str):
        super().__init__(
            prog=Path(script).name,
            description=f"{purpose} for a profiler, or under torch.profiler; see "
            "benchmarks/PROFILING.md.",
        )
        self.add_argument("--engine", choices=ENGINES, default="auto")
        self.add_argument("--dtype", choices=("auto", *sampler_case.DTYPES), default="auto")
        self.add_argument(
            "--torch-profiler",
            type=Path,
            metavar="OUT.json",
            help="write a Chrome trace (or .json.gz)",
        )
        self.add_argument(
            "--kernel-times", action="store_true", help="run torch.profiler and print its table"
        )

    def error(self, message: str) -> None:
        """Report bad input in one line and leave with exit code 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)

    def run(
        self,
        arguments: list[str] | None,
        sizes: tuple[str, ...],
        script: Callable[[argparse.Namespace], None],
    ) -> int:
        """Read the command line, check that `sizes` are at least 1, and run the script."""
        options = self.parse_args(arguments)
        for name, least in (*((size, 1) for size in sizes), ("warmup", 0)):
            got = getattr(options, name)
            if got is not None and got < least:
                self.error(f"--{name.replace('_', '-')} must be at least {least}, got {got}")
        try:
            if options.torch_profiler:
                profiling.check_trace_path(options.torch_profiler)
            script(options)
        except (InputError, OSError) as error:
            self.error(str(error))
        return 0


def record(
    options: argparse.Namespace, call: Callable[[], None], describe: Callable[[float], str]
) -> None:
    """Make a call inside the capture range, print what `describe` says of its milliseconds and the
    tables asked for, and write the trace.

    Args:
        options: of `Parser`.
    """
    profiled = options.torch_profiler is not None or options.kernel_times
    with profiling.capture(torch_profiler=profiled) as profiler:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        milliseconds = 1e3 * (time.perf_counter() - start)
    print(f"{describe(milliseconds)}, profilers slow it down")
    if profiler is not None:
        print(profiling.range_table(profiler))
    if options.kernel_times:
        print(profiling.kernel_table(profiler))
    if options.torch_profiler:
        profiling.write_trace(profiler, options.torch_profiler)
        print(f"trace in {options.torch_profiler}: open it in https://ui.perfetto.dev")
