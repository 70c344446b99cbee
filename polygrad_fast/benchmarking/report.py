"""Tables made of stored rows: a listing for terminals, and the README's."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from polygrad_fast.benchmarking.rows import Row
from polygrad_fast.errors import InputError
from polygrad_fast.training.run_log import write_bytes_atomic

NOT_MEASURED = "not measured"
END = "<!-- end of table -->"
TARGETS = {"float32": (1.15, 1.0), "bfloat16": (1.25, 2.3)}
"""Of engine "torch" on one CPU thread: its time over its GEMMs' at most, and the reference's over
its own at least."""


def listing(rows: Iterable[Row]) -> str:
    """Return rows as text, one line each; a sample's time also against the reference engine's."""
    rows = list(rows)
    reference = {
        _without_engine(row): row.ms
        for row in rows
        if row.case.get("engine") == "reference" and row.ms
    }
    lines = [("case", "ms", "us/item", "TFLOP/s", "GB/s", "floor", "x ref", "GB", "status")]
    for row in rows:
        base = reference.get(_without_engine(row))
        failed = "; ".join(
            f"{c.name}: {'NaN' if c.value is None else f'{c.value:.1e}'} > {c.allowed:.1e}"
            for c in row.checks
            if not c.passed
        )
        lines.append(
            (
                row.name,
                _number(row.ms, ".4g"),
                _number(row.us_per_item, ".4g"),
                _number(row.tflops, ".3g"),
                _number(row.gb_per_s, ".3g"),
                _number(row.share_of_floor, ".0%"),
                _number(base / row.ms if base and row.ms else None, ".2f"),
                _number(row.values.get("peak_memory_gb"), ".2f"),
                f"{row.status}, {failed}" if failed else row.status,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = range(1, 8)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _without_engine(row: Row) -> tuple:
    case = {k: v for k, v in row.case.items() if k != "engine"}
    return row.benchmark, row.machine, tuple(sorted(case.items()))


def _number(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"


def render(text: str, rows: Iterable[Row]) -> str:
    """Return a text with everything between its table markers made anew from rows.

    A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, NAME one of `TABLES`.

    Raises:
        InputError: there is no marker, or a table has no such name, no end or no rows.
    """
    rows = list(rows)

    def table(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise InputError(f"the table {name!r} is not one of {list(TABLES)}")
        return f"<!-- table: {name} -->\n{build(name, rows)}\n{END}"

    begin = r"<!-- table: (\w+) -->"
    whole = rf"{begin}\n(?:(?!<!-- ).*\n)*{re.escape(END)}"
    tables, begins = len(re.findall(whole, text)), len(re.findall(begin, text))
    if tables == 0 or tables != begins:
        raise InputError(
            f"{begins} tables begin with '<!-- table: NAME -->' and {tables} of them end with "
            f"'{END}', wanted at least one, and an end for each"
        )
    return re.sub(whole, table, text)


def stale_tables(text: str, rows: Iterable[Row]) -> list[str]:
    """Return the names of the tables in a text that differ from the rows'."""
    wanted = render(text, rows)
    pattern = rf"<!-- table: (\w+) -->\n(.*?){re.escape(END)}"
    pairs = zip(
        re.findall(pattern, text, re.DOTALL), re.findall(pattern, wanted, re.DOTALL), strict=True
    )
    return [name for (name, got), (_, new) in pairs if got != new]


def all_tables(rows: Iterable[Row]) -> str:
    """Return every table, one after the other."""
    rows = list(rows)
    return "\n\n".join(f"## {name}\n\n{build(name, rows)}" for name in TABLES)


def build(name: str, rows: Iterable[Row]) -> str:
    """Return one table.

    Raises:
        InputError: a row lacks what the table shows, or has something else in its place.
    """
    try:
        return TABLES[name]([row for row in rows if not row.smoke])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"the table {name!r} cannot be made of these rows: {type(error).__name__} {error}"
        ) from error


def _grid(header: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def _of(rows: list[Row], *benchmarks: str) -> list[Row]:
    """Return the rows of these benchmarks."""
    found = [row for row in rows if row.benchmark in benchmarks]
    return sorted(found, key=lambda row: benchmarks.index(row.benchmark))


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _provenance(rows: list[Row]) -> str:
    """Return what was run where, one line per machine, versions and command."""
    shown = {name: table.benchmarks for name, table in TABLES.items() if isinstance(table, Table)}
    lines = {}
    for name, benchmarks in shown.items():
        for row in _of(rows, *benchmarks):
            facts = [row.machine]
            if row.driver:
                facts.append(f"driver {row.driver}")
            for package in ("torch", "triton", "gymnasium", "mujoco"):
                version = getattr(row, package)
                if version and (package != "triton" or row.device == "cuda"):
                    facts.append(f"{package} {version}")
            if row.tests == "failed":
                facts.append("after tests that failed")
            command = f"`{row.command}`" if row.command else "command unknown"
            lines.setdefault((command, ", ".join(facts)), []).append((name, row))
    texts = []
    for (command, facts), found in lines.items():
        names = ", ".join(_unique(name for name, _ in found))
        commits = _unique(
            f"{(r.commit or 'unknown')[:7]}{' (changed)' if r.dirty else ''}" for _, r in found
        )
        dates = _unique(row.date[:10] for _, row in found if row.date)
        texts.append(
            f"- {names}: {command}\n"
            f"  on {facts}; {', '.join([f'commit {commit}' for commit in commits] + dates)}."
        )
    return "\n".join(texts) or f"{NOT_MEASURED}."


def _time(row: Row | None) -> str:
    """Return a row's time, marked where it is of one call, and its share of the floor."""
    if row is None:
        return NOT_MEASURED
    if row.ms is None:
        return _failure(row)
    unit, value = ("ms", row.ms) if row.ms >= 1 else ("us", 1e3 * row.ms)
    share = "" if row.share_of_floor is None else f" ({row.share_of_floor:.0%})"
    number = f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
    return f"{number} {unit}{_mark(row)}{share}"


def _failure(row: Row) -> str:
    """Return how a row without a time ended."""
    if row.status == "ok":
        raise ValueError(f"{row.name} is ok, but has no ms")
    return row.status


def _mark(row: Row) -> str:
    return "*" if row.calls == 1 else ""


def _quick_seeds(rows: list[Row]) -> str:
    """Return what the quick preset learns on each seed."""
    lines = []
    rows = [row for row in rows if row.status == "ok"]
    for row in rows:
        v = row.values
        lines.append(
            [
                row.case["env_id"],
                str(row.case["seed"]),
                f"{v['untrained_mean_reward']:.0f}",
                f"{v['best_mean_reward']:.0f} ± {v['best_std_reward']:.0f}",
                f"{v['last_mean_reward']:.0f} ± {v['last_std_reward']:.0f}",
                f"{v['env_steps']:,.0f}",
                f"{v['train_seconds'] / 60:.1f}",
            ]
        )
    header = ["environment", "seed", "untrained", "best policy", "last policy", "steps", "minutes"]
    episodes = _unique(f"{row.values['episodes']:.0f}" for row in rows)
    return (
        f"{_grid(header, lines)}\n\n"
        f"Returns over {', '.join(episodes)} fresh episodes (mean ± standard deviation); no\n"
        "setting was tuned on these seeds."
    )


def _sampler_steps(rows: list[Row]) -> str:
    """Return one diffusion step of engine "torch" beside its own GEMMs."""
    lines, missed = [], []
    for row in rows:
        batch, steps = row.case["batch"], row.case["steps"]
        if row.ms is None:
            lines.append([row.dtype, str(batch), str(steps), _failure(row), "-", "-", "-", "-"])
            continue
        gemms, packed, reference = (
            row.values[f"{name}_ms"] for name in ("gemms", "packed", "reference")
        )
        lines.append(
            [
                row.dtype,
                str(batch),
                str(steps),
                f"{row.ms:.2f}{_mark(row)}",
                f"{reference:.2f}",
                f"{reference / row.ms:.2f}x",
                f"{gemms:.2f} ({row.ms / gemms:.2f}x)",
                f"{packed:.2f} ({row.ms / packed:.2f}x)",
            ]
        )
        most, least = TARGETS[row.dtype]
        if row.ms / gemms > most or reference / row.ms < least:
            missed.append(f"{row.dtype} B = {batch}")
    header = ["engine torch", "B", "K", "ms per step", "reference", "faster", "its GEMMs", "packed"]
    most, least = (
        " and ".join(f"{values[i]:g} ({dtype})" for dtype, values in TARGETS.items())
        for i in range(2)
    )
    return (
        f"{_grid(header, lines)}\n\n"
        "One of K diffusion steps, paper-sized residual MLP, S = 17, A = 6, H = 10; medians of\n"
        "interleaved rounds. Its GEMMs alone take the milliseconds given, and in brackets is the\n"
        "engine's time over theirs: with weights in PyTorch's layout, and packed in oneDNN's, as\n"
        f"the engine does. Aimed at: at most {most} times\nthe former, and a reference "
        f"that takes at least {least} times as long;\n"
        f"{'missed at ' + ', '.join(missed) if missed else 'met in all of them'}."
    )


def _samples(rows: list[Row]) -> str:
    """Return whole samples, one line per shape; of each engine float32 and, of its other dtypes,
    the one that is the fastest at most shapes."""

    def shape(row: Row) -> tuple:
        return tuple(row.case[name] for name in ("denoiser", "horizon", "batch"))

    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.ms is not None and row.dtype != "float32":
            times.setdefault((row.case["engine"], shape(row)), {})[row.dtype] = row.ms
    wins = collections.Counter(
        (engine, min(by_dtype, key=by_dtype.get)) for (engine, _), by_dtype in times.items()
    )
    fastest = {engine: dtype for (engine, dtype), _ in reversed(wins.most_common())}
    engines = ((row.case["engine"], row.dtype) for row in rows)
    columns = sorted(
        {(e, dtype) for e, dtype in engines if dtype in ("float32", fastest.get(e, dtype))}
    )
    by_place = {(shape(row), row.case["engine"], row.dtype): row for row in rows}
    lines = [
        [place[0].replace("_", " "), *map(str, place[1:])]
        + [_time(by_place.get((place, *column))) for column in columns]
        for place in sorted(_unique(map(shape, rows)))
    ]
    header = ["denoiser", "H", "B", *(f"{engine} {dtype}" for engine, dtype in columns)]
    widths: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        if "hidden_dim" in row.values:
            by_width = widths.setdefault(row.case["denoiser"].replace("_", " "), {})
            by_width.setdefault(f"{row.values['hidden_dim']:.0f}", []).append(row.case["horizon"])
    texts = (
        f"{kind} "
        + ", ".join(
            f"{width} (H = {', '.join(map(str, sorted(set(horizons))))})"
            for width, horizons in by_width.items()
        )
        for kind, by_width in widths.items()
    )
    grid = _grid(header, lines)
    return f"{grid}\n\nHidden widths: {'; '.join(texts)}." if widths else grid


def _case(row: Row) -> str:
    """Return a row's case in words, with what a whole update consists of."""
    parts = [f"{k.replace('env_id', 'on')} {v}" for k, v in row.case.items()]
    if {"env_steps", "denoiser_updates"} <= set(row.values):
        parts.append(f"environment steps {row.values['env_steps']:.0f}")
        parts.append(f"denoiser updates {row.values['denoiser_updates']:.0f}")
    return ", ".join(parts).replace("_", " ")


def _updates(rows: list[Row]) -> str:
    """Return one line per case."""
    lines = [[row.benchmark, _case(row), row.dtype, _time(row)] for row in rows]
    return _grid(["what", "case", "dtype", "time (of floor)"], lines)


def _kernels(rows: list[Row]) -> str:
    """Return one line per case; on a GPU only those of the paper's batch, width and horizon."""
    paper = {"rows": 1024, "batch": 1024, "width": 1024, "horizon": 10}
    lines = [
        [row.benchmark, _case(row), row.dtype, _time(row)]
        + [_number(row.tflops, ".3g"), _number(row.gb_per_s, ".3g")]
        for row in rows
        if row.device == "cpu" or all(row.case.get(k, v) == v for k, v in paper.items())
    ]
    return _grid(["what", "case", "dtype", "time (of floor)", "TFLOP/s", "GB/s"], lines)


def _environments(rows: list[Row]) -> str:
    """Return steps per second in environments and in the simulator."""
    horizons = sorted({r.case["horizon"] for r in rows if r.benchmark == "dynamics replay"})
    lines = []

    def per_second(row: Row, ms: float | None) -> str:
        return _failure(row) if ms is None else f"{1e3 / ms:,.0f}{_mark(row)}"

    for name in _unique(row.case["env_id"] for row in rows):
        cells = dict.fromkeys(["step", "bare", *horizons], NOT_MEASURED)
        for row in (row for row in rows if row.case["env_id"] == name):
            if row.benchmark == "environment step":
                cells["step"] = per_second(row, row.ms)
                cells["bare"] = per_second(row, row.ms and row.values["bare_ms"])
            else:
                cells[row.case["horizon"]] = per_second(row, row.ms)
        lines.append([name, *cells.values()])
    header = ["environment", "agent's wrapper, steps/s", "bare gymnasium"]
    return _grid(header + [f"simulator's replay, H = {horizon}" for horizon in horizons], lines)


@dataclass(frozen=True)
class Table:
    """A table of the README, made once for every machine that measured it.

    Attributes:
        grid: makes it of the rows of one machine.
        benchmarks: whose rows it shows.
        devices: "cpu", "cuda" or both; those without rows are said to be not measured.
    """

    grid: Callable[[list[Row]], str]
    benchmarks: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)

    def __call__(self, rows: list[Row]) -> str:
        """Return the table of all rows that belong to it."""
        found = _of(rows, *self.benchmarks)
        parts = []
        for device in self.devices:
            own = [row for row in found if row.device == device]
            for machine in _unique(row.machine for row in own):
                text = self.grid([row for row in own if row.machine == machine])
                note = "; `*`: of one call, not a median" if "* |" in text or "* (" in text else ""
                parts.append(f"{text}\n\nOn {machine}{note}.")
            if not own:
                parts.append(f"On a {'GPU' if device == 'cuda' else 'CPU'}: {NOT_MEASURED}.")
        return "\n\n".join(parts)


EVERYWHERE = ("cpu", "cuda")
TABLES = {
    "quick_seeds": Table(_quick_seeds, ("quick_seeds",)),
    "sampler_cpu": Table(_sampler_steps, ("sampler step",)),
    "samples": Table(_samples, ("sample",), EVERYWHERE),
    "updates": Table(
        _updates, ("denoiser update", "A2C update", "whole update", "replay windows"), EVERYWHERE
    ),
    "kernels": Table(_kernels, ("residual_mlp layer", "guided_step"), EVERYWHERE),
    "environments": Table(_environments, ("environment step", "dynamics replay")),
    "provenance": _provenance,
}


def update_readme(path: Path, rows: Iterable[Row], check: bool) -> list[str]:
    """Write a file's tables anew, or only look; return the names of those that differed.

    Raises:
        InputError: the file cannot be read, or its markers are wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from None
    try:
        stale = stale_tables(text, rows)
        if stale and not check:
            write_bytes_atomic(path, render(text, rows).encode())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return stale
