"""Figures drawn from stored rows; they need the extra ``plots``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from polygrad_fast.benchmarking.rows import Row
from polygrad_fast.errors import InputError

MODELS = {"residual_mlp": "residual MLP", "transformer": "transformer"}


def draw_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw every figure that there are rows for and return the files, .png each.

    - batch: time per trajectory against the batch size, at the shortest horizon of each network.
    - figure_4: time per trajectory against the horizon, at the largest batch that was measured at
      most horizons; as the paper's figure 4, seconds per 1000 trajectories against their length,
      for the two of its world models that are implemented here.

    Raises:
        InputError: matplotlib is missing, or no row holds the time of a whole sample.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "plots need the extra 'plots': pip install 'polygrad-fast[plots]'"
        ) from error
    samples = [row for row in rows if row.benchmark == "sample" and row.ms is not None]
    if not samples:
        raise InputError("no row holds the time of a whole sample (benchmark 'sample') to plot")
    lines: dict[tuple, list[Row]] = {}
    for row in samples:
        key = (row.machine, row.case["denoiser"], row.case["engine"], row.dtype)
        lines.setdefault(key, []).append(row)

    by_batch, by_horizon = {}, {}
    for (machine, denoiser, engine, dtype), found in sorted(lines.items()):
        name = f"{MODELS.get(denoiser, denoiser)}, {engine} {dtype}"
        shortest = min(row.case["horizon"] for row in found)
        points = {r.case["batch"]: r for r in found if r.case["horizon"] == shortest}
        by_batch[f"{name}, H = {shortest}", machine] = points
        batches = [row.case["batch"] for row in found]
        batch = max(batches, key=lambda b: (batches.count(b), b))
        points = {r.case["horizon"]: r for r in found if r.case["batch"] == batch}
        by_horizon[f"{name}, B = {batch}", machine] = points

    steps = ", ".join(sorted({f"K = {row.case['steps']}" for row in samples}))
    time = f"ms per trajectory ({steps})"
    files = {
        "batch": (by_batch, "batch size B", time),
        "figure_4": (
            by_horizon,
            "trajectory length H",
            f"{time} = seconds per 1000 trajectories",
        ),
    }
    return [
        _draw(folder / f"{name}.png", points, x_label, y_label)
        for name, (points, x_label, y_label) in files.items()
    ]


def _draw(path: Path, lines: dict, x_label: str, y_label: str) -> Path:
    """Draw one panel per machine, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    machines = list(dict.fromkeys(machine for _, machine in lines))
    figure = Figure(figsize=(6.4 * len(machines), 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, machine in zip(figure.subplots(1, len(machines), squeeze=False)[0], machines,
                             strict=True):  # fmt: skip
        for name, points in ((name, p) for (name, m), p in lines.items() if m == machine):
            xs = sorted(points)
            style = "--" if name.startswith("transformer") else "-"
            axes.plot(
                xs, [points[x].us_per_item / 1e3 for x in xs], style, marker="o", ms=4, label=name
            )
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label, title=machine)
        ticks = sorted({x for (_, m), points in lines.items() if m == machine for x in points})
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="x-small", framealpha=0.85, edgecolor="none")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
