"""Rows of benchmark results: their schema, what they say about code and machine, their files.

A file holds one JSON object per line. It is rewritten whole after every row, so that a run cut
short keeps what it measured.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import subprocess
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from polygrad_fast.errors import InputError
from polygrad_fast.runs.files import write_bytes_atomic
from polygrad_fast.runs.processor import Processor
from polygrad_fast.runs.versions import versions

STATUSES = ("ok", "wrong", "not offered", "out of memory", "error")
CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"
PRODUCTS = {
    "amx_bf16": " with AMX",
    "avx512_bf16": " with AVX-512 BF16",
    "avx512f": " with AVX-512",
    "avx2": " with AVX2",
}
"""Instruction sets of matrix products, the fastest first, in words."""


@dataclass(frozen=True)
class Check:
    """One comparison made before a time is taken: it passes if value <= allowed."""

    name: str
    value: float | None  # None: not finite
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the result was right."""
        return self.value is not None and self.value <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Code, machine and command that made a row; None where unknown.

    The processor's facts are those of `Processor`. Rows measured before they were recorded have
    only its name.
    """

    date: str | None  # UTC, ISO 8601
    command: str | None
    commit: str | None
    dirty: bool | None  # whether a tracked file outside benchmarks/results was changed
    tests: str  # "passed", "failed" or "not run", before the benchmark, on the same machine
    polygrad_fast: str
    device: str  # "cpu" or "cuda": where the measured work ran
    gpu: str | None
    driver: str | None
    processor: str | None
    processor_vendor: str | None = None
    processor_family: int | None = None
    processor_model: int | None = None
    instruction_sets: str | None = None
    platform: str | None
    threads: int
    python: str
    torch: str
    cuda: str | None
    triton: str | None
    numpy: str | None
    gymnasium: str | None
    mujoco: str | None

    @property
    def machine(self) -> str:
        """The GPU, or processor, what products it has instructions for, and number of threads."""
        if self.device == "cuda":
            return self.gpu or "an unknown GPU"
        plural = "" if self.threads == 1 else "s"
        return f"{self._processor_in_words}, {self.threads} thread{plural}"

    @property
    def _processor_in_words(self) -> str:
        name = re.sub(r"\((R|TM)\)", "", self.processor or "an unknown processor")
        if self.processor_family is None:
            return f"{name}, family not recorded"
        found = (self.instruction_sets or "").split()
        best = next((words for flag, words in PRODUCTS.items() if flag in found), "")
        model = "" if self.processor_model is None else f" model {self.processor_model}"
        return f"{name}, family {self.processor_family}{model}{best}"


@dataclass(frozen=True, kw_only=True)
class Row(Provenance):
    """One measured case. Times are in milliseconds per operation; only a row whose checks all
    passed has one.

    Attributes:
        benchmark, dtype, case: what was measured; with the machine they identify the row.
        status: one of `STATUSES`. error: what happened otherwise.
        checks: made before the time was taken.
        ms, ms_min, ms_max: median and range over `calls` timed calls of `repeats` operations each.
        clock: "cuda events", "processor time" or "wall clock".
        items, item: what one operation makes, for instance 1024 of "trajectory".
        flops, bytes: operations, and distinct bytes read and written, of one operation.
        tflops, gb_per_s: achieved. peak_tflops, peak_gb_per_s: measured on the same machine.
        floor_ms: the longer of flops and bytes at these peaks. share_of_floor: floor_ms / ms.
        values: other numbers; their names end in their units.
        curves: lists of numbers of one length, for instance a return at each evaluation.
        seconds_spent: on the whole case, checks included.
        smoke: whether the sizes are the tiny ones that only try the mechanics; no report shows it.
    """

    benchmark: str
    dtype: str
    case: dict[str, Any]
    status: str
    error: str | None = None
    checks: tuple[Check, ...] = ()
    ms: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    calls: int | None = None
    repeats: int | None = None
    clock: str | None = None
    items: int | None = None
    item: str | None = None
    flops: float | None = None
    bytes: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    peak_tflops: float | None = None
    peak_gb_per_s: float | None = None
    floor_ms: float | None = None
    share_of_floor: float | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds_spent: float | None = None
    smoke: bool = False

    def __post_init__(self):
        if self.status not in STATUSES:
            raise InputError(f"status {self.status!r}, wanted one of {list(STATUSES)}")
        for key, value in self.case.items():
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise InputError(f"the case's {key} is {value!r:.60}, wanted a number or a string")
        for key, value in self.values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, types.NoneType)):
                raise InputError(f"{self.name} has {key} {value!r:.60}, wanted a number")
        for key, curve in self.curves.items():
            if not all(type(y) in (int, float) and math.isfinite(y) for y in curve):
                raise InputError(f"{self.name} has the curve {key} {curve!r:.60}, wanted numbers")
        if len({len(curve) for curve in self.curves.values()}) > 1:
            raise InputError(f"{self.name} has curves of different lengths")
        if self.status == "ok" and self.ms is None and not self.values:
            raise InputError(f"{self.name} is ok, but has neither a time nor other values")
        if self.ms is not None:
            if self.status != "ok" or not self.checks or not all(c.passed for c in self.checks):
                raise InputError(f"{self.name} has a time, but not the checks passed before it")
            if not self.ms > 0:
                raise InputError(f"{self.name} has ms {self.ms}, wanted a positive time")
        for key, value in (*vars(self).items(), *self.values.items()):
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{self.name} has {key} {value}, wanted a finite number")

    @property
    def key(self) -> tuple:
        """What identifies the row: a later one of the same key replaces it."""
        case = tuple(sorted(self.case.items()))
        return self.benchmark, self.dtype, case, self.machine, self.smoke

    @property
    def name(self) -> str:
        """The case in words."""
        words = (f"{k}={v}" for k, v in self.case.items())
        return " ".join((self.benchmark, *words, self.dtype))

    @property
    def us_per_item(self) -> float | None:
        """Microseconds per item."""
        return None if self.ms is None or not self.items else 1e3 * self.ms / self.items

    @classmethod
    def from_json(cls, data: Any) -> Row:
        """Rebuild a row from its JSON object.

        Raises:
            InputError: a key is missing or unknown, or a value is of another type.
        """
        if not isinstance(data, dict):
            raise InputError(f"wanted a JSON object, got {data!r:.60}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        needed = {
            name
            for name, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        for problem, names in (
            ("lacks", needed - set(data)),
            ("has the unknown", set(data) - set(fields)),
        ):
            if names:
                raise InputError(f"the row {problem} {', '.join(sorted(names))}")
        hints = _hints()
        values = {}
        for name, value in data.items():
            if name == "checks":
                values[name] = tuple(_check_from(entry) for entry in _listed(value))
                continue
            if type(value) not in hints[name]:
                raise InputError(f"the row's {name} is {value!r:.60}")
            values[name] = value
        return cls(**values)


def _listed(value: Any) -> list:
    if not isinstance(value, list):
        raise InputError(f"the row's checks are {value!r:.60}, wanted a list")
    return value


def _check_from(entry: Any) -> Check:
    if not isinstance(entry, dict) or set(entry) != {"name", "value", "allowed"}:
        raise InputError(f"the row's check is {entry!r:.60}, wanted name, value and allowed")
    check = Check(**entry)
    numbers = (int, float)
    if type(check.allowed) not in numbers or type(check.value) not in (*numbers, types.NoneType):
        raise InputError(f"the row's check is {entry!r:.60}, wanted numbers")
    return check


def _hints() -> dict[str, tuple[type, ...]]:
    """Return the classes that each field's value may have; an integer may stand for a float."""
    allowed = {}
    for name, hint in typing.get_type_hints(Row).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        classes = tuple(typing.get_origin(part) or part for part in parts)
        allowed[name] = (*classes, int) if float in classes else classes
    return allowed


def provenance(
    device: torch.device,
    command: str | None,
    commit: str | None = None,
    tests: str = "not run",
) -> Provenance:
    """Describe code and machine now.

    Args:
        device: where the measured work runs.
        command: what the user typed.
        commit: of the code, "-dirty" appended for a changed tree; None: asked of git.
        tests: how the tests ended, where they ran before.
    """
    found = versions()
    if commit is None:
        commit = found["git_commit"]
        if commit and commit.endswith("-dirty") and not code_changed(CHECKOUT):
            commit = commit.removesuffix("-dirty")
    processor = Processor.of_this_machine()
    on_gpu = device.type == "cuda"
    names = ("polygrad_fast", "platform", "python", "torch", "cuda", "triton")
    return Provenance(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        commit=commit and commit.removesuffix("-dirty"),
        dirty=commit and commit.endswith("-dirty"),
        tests=tests,
        device=device.type,
        gpu=found["gpu"] if on_gpu else None,
        driver=_driver() if on_gpu else None,
        processor=processor.name,
        processor_vendor=processor.vendor,
        processor_family=processor.family,
        processor_model=processor.model,
        instruction_sets=processor.instruction_sets,
        threads=torch.get_num_threads(),
        **{name: found[name] for name in (*names, "numpy", "gymnasium", "mujoco")},
    )


def code_changed(checkout: Path) -> bool:
    """Whether git finds a tracked file changed besides the stored rows, which every new row
    changes; also if git does not answer."""
    command = ["git", "-C", str(checkout), "diff", "--quiet", "HEAD", "--", f":!{RESULTS}"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode != 0
    except (OSError, subprocess.SubprocessError):
        return True


def _driver() -> str | None:
    """Return the version of the GPU's driver, None where unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return output.stdout.split("\n")[0].strip() or None


def read_rows(path: str | Path) -> list[Row]:
    """Read a file of rows.

    Raises:
        InputError: there is none, a line is no row, or two rows are of the same case and machine.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}; wanted rows of benchmarks") from None
    rows: dict[tuple, Row] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = Row.from_json(json.loads(line))
        except (ValueError, TypeError) as error:  # InputError and JSON's error are ValueErrors
            raise InputError(f"{path}, line {number}: {error}") from None
        if row.key in rows:
            raise InputError(f"{path}, line {number}: a second row of {row.name}")
        rows[row.key] = row
    return list(rows.values())


def read_folder(folder: str | Path) -> list[Row]:
    """Read every file of rows (*.jsonl) in a folder, in alphabetical order.

    Raises:
        InputError: there is no such file, one cannot be read or is empty, or two hold the same
            case and machine.
    """
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise InputError(f"{folder} holds no rows (*.jsonl); wanted a folder such as "
                         "benchmarks/results")  # fmt: skip
    rows, origin = [], {}
    for path in paths:
        found = read_rows(path)
        if not found:
            raise InputError(f"{path} is empty; wanted rows of benchmarks")
        for row in found:
            if row.key in origin:
                raise InputError(f"{path} and {origin[row.key]} both hold a row of {row.name}")
            origin[row.key] = path
            rows.append(row)
    return rows


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a file of rows; a reader finds the old or the new one."""
    lines = (json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n" for row in rows)
    write_bytes_atomic(path, "".join(lines).encode())


class RowFile:
    """A file that rows are added to; a row takes the place of the stored one of its key.

    Args:
        path: created with the first row. None: the rows are only kept here.

    Raises:
        InputError: the file is there and cannot be read.
    """

    def __init__(self, path: str | Path | None):
        self.path = Path(path) if path is not None else None
        stored = read_rows(self.path) if self.path is not None and self.path.exists() else []
        self._rows = {row.key: row for row in stored}
        self.added: list[Row] = []

    @property
    def rows(self) -> list[Row]:
        """All rows, the oldest first."""
        return list(self._rows.values())

    def holds(self, row: Row) -> bool:
        """Whether a row of the same key is stored, of the same commit and equally clean a tree."""
        stored = self._rows.get(row.key)
        return stored is not None and (stored.commit, stored.dirty) == (row.commit, row.dirty)

    def add(self, row: Row) -> None:
        """Add or replace a row, in the file too."""
        self._rows[row.key] = row
        self.added.append(row)
        if self.path is not None:
            write_rows(self.path, self._rows.values())
