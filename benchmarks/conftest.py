"""What every benchmark here has: options, selection of cases, the fixture `bench`, the table.

A benchmark is a test of pytest-benchmark whose case is measured by
`harness.session`; pytest-benchmark selects it (`--benchmark-only`) and is handed
the times, so that its table and its JSON show the ones in the rows.

    @pytest.mark.cases(of=list_cases)  # Setting -> [(importance, parameters)]
    def test_something(bench, batch):
        with bench.case("something", "float32", batch=batch) as case:
            case.check("largest error", (call() - wanted).abs().max(), 1e-4)
            case.time(call, items=batch, item="window", work=Work(flops, bytes))
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.report import listing
from harness.rows import RowFile, provenance
from harness.session import NotMeasured, Session
from polygrad_fast.errors import InputError

TIME_BUDGET = {"cpu": 240, "cuda": 480}
DEVICE_LOST = 75  # exit code: begin again with --resume
SESSION = pytest.StashKey[Session]()
LEFT_OUT = pytest.StashKey[list[str]]()


@dataclass(frozen=True)
class Setting:
    """What the cases of a benchmark depend on."""

    device: torch.device
    smoke: bool


Case = tuple[int, dict[str, Any]]  # importance, 0 first; parameters of the test


class ReplayedClock:
    """pytest-benchmark's timer: two readings per round, whose difference is a time measured
    before."""

    def __init__(self):
        self._readings: list[float] = []

    def load(self, seconds: Iterable[float]) -> None:
        """Set what the next rounds take."""
        self._readings = [reading for value in seconds for reading in (0.0, value)]

    def __call__(self) -> float:
        return self._readings.pop(0)


CLOCK = ReplayedClock()


def pytest_addoption(parser):
    group = parser.getgroup("polygrad_fast benchmarks")
    add = group.addoption
    add("--rows", type=Path, metavar="FILE", help="store the rows in this file (.jsonl)")
    add(
        "--resume",
        action="store_true",
        help="leave out cases whose row of this commit is stored; those of a changed tree only "
        "with --commit, for git cannot tell whether it was changed again",
    )
    add(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="begin no case after that; default: 240 on a CPU, 480 on a GPU",
    )
    add("--smoke", action="store_true", help="tiny sizes, to try the mechanics")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--commit", help="written to the rows, '-dirty' appended; default: asked of git")
    add(
        "--tests",
        choices=("passed", "failed", "not run"),
        default="not run",
        help="how the tests ended on this machine; noted in the rows",
    )


def pytest_configure(config):
    device = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda given, but torch finds no CUDA GPU")
    budget = config.getoption("time_budget")
    words = shlex.join(["pytest", *map(str, config.invocation_params.args)])
    if "OMP_NUM_THREADS" in os.environ:
        words = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} {words}"
    commit, tests = config.getoption("commit"), config.getoption("tests")
    try:
        config.stash[SESSION] = Session(
            torch.device(device),
            RowFile(config.getoption("rows")),
            lambda device: provenance(device, words, commit, tests),
            TIME_BUDGET[device] if budget is None else budget,
            config.getoption("resume"),
            config.getoption("smoke"),
            keep_dirty=commit is not None,
        )
    except InputError as error:
        raise pytest.UsageError(str(error)) from None
    # now: an edit during the session must not change what its rows say of the code that runs
    config.stash[SESSION].provenance(torch.device(device))
    config.stash[SESSION].provenance(torch.device("cpu"))
    config.stash[LEFT_OUT] = []


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    session = metafunc.config.stash[SESSION]
    list_cases: Callable[[Setting], list[Case]] = marker.kwargs["of"]
    cases = list_cases(Setting(session.device, session.small))
    names = [name for name in inspect.signature(metafunc.function).parameters if name != "bench"]
    metafunc.parametrize(
        names,
        [
            pytest.param(
                *(case[name] for name in names),
                id="-".join(v if isinstance(v, str) else f"{k}{v}" for k, v in case.items()),
                marks=pytest.mark.importance(importance),
            )
            for importance, case in cases
        ],
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))

    def importance(item) -> int:
        marker = item.get_closest_marker("importance")
        return marker.args[0] if marker else 0

    items.sort(key=importance)


class Bench:
    """The fixture: cases of the session as tests of pytest-benchmark."""

    def __init__(self, session: Session, benchmark, config):
        self.session, self.device = session, session.device
        self._benchmark, self._config = benchmark, config

    @contextlib.contextmanager
    def case(self, benchmark: str, dtype: str, control: bool = False, **case: Any):
        """`Session.case`, whose row decides how the test ends; a control's error is no failure."""
        session, fixture = self.session, self._benchmark
        try:
            manager = session.case(benchmark, dtype, **case)
            with manager as measured:
                yield measured
        except NotMeasured as reason:
            fixture.skipped = True
            self._config.stash[LEFT_OUT].append(str(reason))
            pytest.skip(f"not measured: {reason}")
        row = measured.row
        if session.is_lost():
            pytest.exit(
                f"{row.name}: {row.error}\nthe device is lost for this process; go on with "
                "--resume in a new one",
                returncode=DEVICE_LOST,
            )
        if measured.times:
            CLOCK.load(ms / 1e3 for ms in measured.times)
            fixture.group = benchmark
            fixture.extra_info.update(clock=row.clock, values=row.values)
            fixture.pedantic(lambda: None, rounds=len(measured.times))
            return
        fixture.skipped = True
        if row.status == "wrong" or (row.status == "error" and not control):
            pytest.fail(f"{row.name}: {row.status}: {row.error}", pytrace=False)
        pytest.skip(f"{row.status}: {row.error.splitlines()[-1]}")


@pytest.fixture
def bench(request, benchmark) -> Bench:
    """Measures the cases of a test."""
    return Bench(request.config.stash[SESSION], benchmark, request.config)


def pytest_terminal_summary(terminalreporter, config):
    rows, left_out = config.stash[SESSION].rows.added, config.stash[LEFT_OUT]
    if rows:
        terminalreporter.section("rows")
        terminalreporter.write_line(listing(rows))
    for reason in sorted(set(left_out)):
        terminalreporter.write_line(f"{left_out.count(reason)} cases not measured: {reason}")
