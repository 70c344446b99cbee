"""Tables made of stored rows: a listing for terminals, and the README's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from polygrad_fast.benchmarking.rows import Row
from polygrad_fast.errors import InputError
from polygrad_fast.training.run_log import write_bytes_atomic

NOT_MEASURED = "not measured"
END = "<!-- end of table -->"


def listing(rows: Iterable[Row]) -> str:
    """Return rows as text, one line each; a sample's time also against the reference engine's."""
    rows = list(rows)
    reference = {
        _without_engine(row): row.ms
        for row in rows
        if row.case.get("engine") == "reference" and row.ms
    }
    lines = [
        ("case", "ms", "us/item", "TFLOP/s", "GB/s", "floor", "x ref", "GB", "checks", "status")
    ]
    for row in rows:
        base = reference.get(_without_engine(row))
        checks = ", ".join(
            f"{'NaN' if c.value is None else f'{c.value:.1e}'} <= {c.allowed:.1e}"
            for c in row.checks
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
                checks or "-",
                row.status,
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
        return f"<!-- table: {name} -->\n{TABLES[name](rows)}\n{END}"

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
    return "\n\n".join(f"## {name}\n\n{build(rows)}" for name, build in TABLES.items())


def _grid(header: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def _of(rows: list[Row], *benchmarks: str) -> list[Row]:
    """Return the rows of these benchmarks that have a result."""
    found = [row for row in rows if row.benchmark in benchmarks and row.status == "ok"]
    return sorted(found, key=lambda row: benchmarks.index(row.benchmark))


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _caption(rows: list[Row]) -> str:
    """Return machine, versions, commits, dates and commands of one machine's rows, in words."""
    first = rows[0]
    facts = [first.machine]
    if first.driver:
        facts.append(f"driver {first.driver}")
    facts.append(f"torch {first.torch}")
    if first.device == "cuda" and first.triton:
        facts.append(f"triton {first.triton}")
    commits = (f"{(r.commit or 'unknown')[:7]}{' (changed)' if r.dirty else ''}" for r in rows)
    facts.append(f"commit {', '.join(_unique(commits))}")
    facts += [", ".join(_unique(row.date[:10] for row in rows if row.date))]
    commands = _unique(f"`{row.command}`" for row in rows if row.command)
    return f"{'; '.join(filter(None, facts))}:\n{' and '.join(commands) or 'command unknown'}"


def _time(row: Row | None) -> str:
    """Return a row's time, and its share of the floor."""
    if row is None or row.ms is None:
        return NOT_MEASURED
    unit, value = ("ms", row.ms) if row.ms >= 1 else ("us", 1e3 * row.ms)
    share = "" if row.share_of_floor is None else f" ({row.share_of_floor:.0%})"
    return f"{value:.3g} {unit}{share}" if value < 999.5 else f"{value:,.0f} {unit}{share}"


def _quick_seeds(rows: list[Row]) -> str:
    """Return what the quick preset learns on each seed."""
    lines = []
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
    mujoco = _unique(str(row.mujoco) for row in rows)
    return (
        f"{_grid(header, lines)}\n\n"
        f"Returns over {', '.join(episodes)} fresh episodes (mean ± standard deviation); no\n"
        f"setting was tuned on these seeds; mujoco {', '.join(mujoco)}."
    )


def _sampler_steps(rows: list[Row]) -> str:
    """Return one diffusion step of engine "torch" beside its own GEMMs."""
    lines = []
    for row in rows:
        gemms, packed, reference = (
            row.values[f"{name}_ms"] for name in ("gemms", "packed", "reference")
        )
        lines.append(
            [
                row.dtype,
                str(row.case["batch"]),
                f"{row.ms:.2f}",
                f"{reference:.2f}",
                f"{reference / row.ms:.2f}x",
                f"{gemms:.2f} ({row.ms / gemms:.2f}x)",
                f"{packed:.2f} ({row.ms / packed:.2f}x)",
            ]
        )
    header = ["engine torch", "B", "ms per step", "reference", "faster", "its GEMMs", "packed"]
    return (
        f"{_grid(header, lines)}\n\n"
        "One diffusion step, paper-sized residual MLP, S = 17, A = 6, H = 10; medians of "
        "interleaved\nrounds. Its GEMMs alone take the milliseconds given, and in brackets is the "
        "engine's time\nover theirs: with weights in PyTorch's layout, and packed in oneDNN's, as "
        "the engine does."
    )


def _samples(rows: list[Row]) -> str:
    """Return whole samples, one line per shape, one column per engine and dtype."""

    def shape(row: Row) -> tuple:
        return tuple(row.case[name] for name in ("denoiser", "horizon", "batch"))

    def column(row: Row) -> str:
        return f"{row.case['engine']} {row.dtype}"

    columns = sorted(_unique(map(column, rows)))
    by_place = {(shape(row), column(row)): row for row in rows}
    lines = [
        [place[0].replace("_", " "), *map(str, place[1:])]
        + [_time(by_place.get((place, name))) for name in columns]
        for place in sorted(_unique(map(shape, rows)))
    ]
    return _grid(["denoiser", "H", "B", *columns], lines)


def _parts(rows: list[Row]) -> str:
    """Return one line per case."""
    lines = []
    for row in rows:
        case = ", ".join(f"{k.replace('env_id', 'on')} {v}" for k, v in row.case.items())
        numbers = (_number(row.tflops, ".3g"), _number(row.gb_per_s, ".3g"))
        cells = [row.benchmark, case.replace("_", " "), row.dtype, _time(row), *numbers]
        lines.append(cells)
    return _grid(["what", "case", "dtype", "time (of floor)", "TFLOP/s", "GB/s"], lines)


def _kernels(rows: list[Row]) -> str:
    """Return one line per case, on a GPU those of the paper's batch only."""
    return _parts([r for r in rows if r.device == "cpu" or 1024 in r.case.values()])


def _environments(rows: list[Row]) -> str:
    """Return steps per second in environments and in the simulator."""
    horizons = sorted({r.case["horizon"] for r in rows if r.benchmark == "dynamics replay"})
    lines = []
    for name in _unique(row.case["env_id"] for row in rows):
        cells = dict.fromkeys(["step", "bare", *horizons], NOT_MEASURED)
        for row in (row for row in rows if row.case["env_id"] == name):
            if row.benchmark == "environment step":
                cells["step"] = f"{1e3 / row.ms:,.0f}"
                cells["bare"] = f"{1e3 / row.values['bare_ms']:,.0f}"
            else:
                cells[row.case["horizon"]] = f"{1e3 / row.ms:,.0f}"
        lines.append([name, *cells.values()])
    header = ["steps per second", "environment", "bare gymnasium"]
    return _grid(header + [f"dynamics replay, H = {horizon}" for horizon in horizons], lines)


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
                part = [row for row in own if row.machine == machine]
                parts.append(f"{self.grid(part)}\n\n{_caption(part)}")
            if not own:
                parts.append(f"On a {'GPU' if device == 'cuda' else 'CPU'}: {NOT_MEASURED}.")
        return "\n\n".join(parts)


EVERYWHERE = ("cpu", "cuda")
TABLES = {
    "quick_seeds": Table(_quick_seeds, ("quick_seeds",)),
    "sampler_cpu": Table(_sampler_steps, ("sampler step",)),
    "samples": Table(_samples, ("sample",), EVERYWHERE),
    "updates": Table(
        _parts, ("denoiser update", "A2C update", "whole update", "replay windows"), EVERYWHERE
    ),
    "kernels": Table(_kernels, ("residual_mlp layer", "guided_step"), EVERYWHERE),
    "environments": Table(_environments, ("environment step", "dynamics replay")),
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
