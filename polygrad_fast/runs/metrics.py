"""A run's metrics: metrics.csv and TensorBoard events."""

import contextlib
import csv
import errno
import io
import os
from collections.abc import Mapping
from pathlib import Path

from polygrad_fast.errors import InputError
from polygrad_fast.runs.files import naming, write_bytes_atomic

STEP_COLUMN = "env_step"
UPDATE_COLUMN = "update"
STEP_NAMES = {STEP_COLUMN: "environment step", UPDATE_COLUMN: "update"}
"""What the first column of a log may count, and its name in a sentence."""


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the rows of a metrics.csv.

    Each row maps column names to floats (the first: int); empty cells are left out, and a row
    that is incomplete or unreadable (the last one of a killed run) is skipped. Raises InputError if
    there is no such file or it is no log.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read as a metrics.csv: {error.strerror}") from None
    return _parse(text, path)[1]


def _parse(text: str, path: str | Path) -> tuple[list[str], list[dict[str, float]]]:
    """Return columns and rows of a log, without what was cut off after the last newline."""
    lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    columns = next(lines, [])
    if not columns:
        return [STEP_COLUMN], []
    if columns[0] not in STEP_NAMES:
        raise InputError(
            f"{path} must be a metrics log, whose first column is one of {list(STEP_NAMES)}, got "
            f"{columns[0]!r}"
        )
    rows = []
    for cells in lines:
        if len(cells) != len(columns):
            continue
        try:
            row: dict[str, float] = {columns[0]: int(cells[0])}
            for name, cell in zip(columns[1:], cells[1:], strict=True):
                if cell:
                    row[name] = float(cell)
        except ValueError:
            continue
        rows.append(row)
    return columns, rows


class MetricsLog:
    """Append metrics to a CSV file whose first column counts environment steps, or updates.

    Columns may appear at any time: the file is then rewritten atomically with the longer header;
    cells without a value are empty. Floats are written with `repr` and read back exactly. Every
    row is handed to the operating system at once and whole: a failed write (full disk) leaves the
    file as it was.

    Args:
        path: the CSV file; its folder is created.
        resume_step: continue an existing log from this step: its rows up to and including this
            step stay, later and half-written ones are dropped. None: start a new log.
        step_column: the first column, "env_step" or "update".

    Raises:
        InputError: `resume_step` is None and `path` holds rows already, or `path` is not a
            metrics log of such steps.
    """

    def __init__(
        self,
        path: str | Path,
        resume_step: int | None = None,
        step_column: str = STEP_COLUMN,
    ) -> None:
        self.path = Path(path)
        self._step_column = step_column
        self._columns = [step_column]
        rows: list[dict[str, float]] = []
        if self.path.exists():
            text = self.path.read_bytes().decode("utf-8", errors="replace")
            columns, rows = _parse(text, self.path)
            if rows and columns[0] != step_column:
                raise InputError(
                    f"{self.path} must be a metrics log with {step_column!r} as its first column, "
                    f"got {columns[0]!r}"
                )
            if resume_step is None and rows:
                raise InputError(
                    f"{self.path} holds {len(rows)} rows already: resume that run or choose "
                    "another folder"
                )
            if resume_step is not None and columns[0] == step_column:
                self._columns = columns
                rows = [row for row in rows if row[step_column] <= resume_step]
        self._rewrite(rows)

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows in the file, as `read_metrics` returns them."""
        return read_metrics(self.path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row. Values are anything `float()` takes; a CUDA tensor synchronises."""
        row = {self._step_column: int(step)}
        for name, value in metrics.items():
            if name == self._step_column or not name or not name.isprintable():
                raise ValueError(
                    f"a metric must have a printable name other than {self._step_column!r}, got "
                    f"{name!r}"
                )
            row[name] = float(value)
        added = [name for name in row if name not in self._columns]
        if added:
            rows = self.rows
            self._file.close()
            self._columns += added
            try:
                self._rewrite([*rows, row])
            except BaseException:
                self._columns = self._columns[: -len(added)]
                self._file = open(self.path, "ab", buffering=0)
                raise
        else:
            self._append(self._line(row))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _line(self, row: Mapping[str, float]) -> bytes:
        return _csv_line([repr(row[name]) if name in row else "" for name in self._columns])

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        lines = [_csv_line(self._columns), *(self._line(row) for row in rows)]
        write_bytes_atomic(self.path, b"".join(lines))
        # Unbuffered: what a failed write could not place must not come back with a later row.
        self._file = open(self.path, "ab", buffering=0)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        with naming(self.path):
            try:
                written = self._file.write(line)
                if written != len(line):
                    message = f"{os.strerror(errno.ENOSPC)}, {written} of {len(line)} bytes written"
                    raise OSError(errno.ENOSPC, message)
            except OSError:
                with contextlib.suppress(OSError):  # readers skip a row that was cut off
                    os.ftruncate(self._file.fileno(), size)
                raise


def _csv_line(cells: list[str]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()


class TensorboardLog:
    """Write scalars as TensorBoard events. Needs the extra `tensorboard`.

    Args:
        directory: folder of the event files; created.
        resume_step: hide events after this environment step that an earlier, killed process wrote.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, directory: str | Path, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "TensorBoard logging needs the extra 'tensorboard': "
                "pip install 'polygrad-fast[tensorboard]'"
            ) from error
        purge_step = None if resume_step is None else resume_step + 1
        self._directory = directory
        with naming(directory):
            self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, env_step: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar per entry at `env_step`."""
        with naming(self._directory):
            for name, value in metrics.items():
                self._writer.add_scalar(name, float(value), int(env_step))

    def close(self) -> None:
        with naming(self._directory):
            self._writer.close()

    def __enter__(self) -> "TensorboardLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
