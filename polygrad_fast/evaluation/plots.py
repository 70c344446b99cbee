"""Figures: a run's learning curve, and what the diagnostics found.

They need the extra `plots`; matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polygrad_fast.errors import InputError
from polygrad_fast.runs.files import write_bytes_atomic

ESTIMATE = "interquartile mean over seeds, bootstrap interval of 95 %"
FAR_BELOW = 1e-3
"""A floor of so little of the lowest error is told in the legend, not drawn."""


def check_plots() -> None:
    """Raise InputError where figures cannot be drawn: matplotlib is an extra."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except ImportError as error:
        raise InputError(
            "plots need the extra 'plots': pip install 'polygrad-fast[plots]'"
        ) from error


def plot_learning_curve(metrics_csv: Path, output_png: Path, title: str) -> None:
    """Plot the return against environment steps, or updates, and write it to `output_png`.

    A line with a band of one standard deviation shows `eval/mean_reward` and `eval/std_reward`;
    points show `train/episode_return`.

    Raises:
        InputError: matplotlib is missing, or `metrics_csv` is unreadable or has no finite
            `eval/mean_reward`.
    """
    figure = _figure(7.0, 4.2)
    from matplotlib.ticker import EngFormatter

    from polygrad_fast.runs.metrics import STEP_NAMES, read_metrics

    rows = read_metrics(metrics_csv)
    evaluations = [row for row in rows if math.isfinite(row.get("eval/mean_reward", math.nan))]
    episodes = [row for row in rows if "train/episode_return" in row]
    if not evaluations:
        raise InputError(
            f"{metrics_csv} has {len(rows)} rows, none with a finite eval/mean_reward to plot"
        )
    column = next(iter(rows[0]))
    steps = [row[column] for row in evaluations]
    mean = [row["eval/mean_reward"] for row in evaluations]
    std = [row.get("eval/std_reward", 0.0) for row in evaluations]

    axes = figure.add_subplot()
    if episodes:
        axes.plot(
            [row[column] for row in episodes],
            [row["train/episode_return"] for row in episodes],
            linestyle="none",
            marker=".",
            markersize=2.5,
            color="0.6",
            label="training episodes",
        )
    axes.fill_between(
        steps,
        [m - s for m, s in zip(mean, std, strict=True)],
        [m + s for m, s in zip(mean, std, strict=True)],
        color="tab:blue",
        alpha=0.2,
        linewidth=0,
        label="evaluation, ± 1 standard deviation",
    )
    axes.plot(steps, mean, color="tab:blue", marker="o", markersize=3, label="evaluation, mean")
    axes.set_title(title)
    axes.set_xlabel(f"{STEP_NAMES[column]}s")
    axes.set_ylabel("return of an episode")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(axes)
    _write(figure, output_png)


def plot_learning_curves(logs: Sequence[Path], output_png: Path, title: str) -> None:
    """Plot the mean return over several runs against environment steps, with a band from the lowest
    to the highest run and a thin line of each, and write it to `output_png`.

    At each step the mean is over the runs that have been evaluated there.

    Args:
        logs: the runs' metrics.csv.

    Raises:
        InputError: matplotlib is missing, or no run has a finite `eval/mean_reward`.
    """
    figure = _figure(7.0, 4.2)
    from matplotlib.ticker import EngFormatter

    from polygrad_fast.runs.metrics import STEP_COLUMN, STEP_NAMES, read_metrics

    curves = [
        {
            row[STEP_COLUMN]: row["eval/mean_reward"]
            for row in read_metrics(log)
            if math.isfinite(row.get("eval/mean_reward", math.nan))
        }
        for log in logs
    ]
    curves = [curve for curve in curves if curve]
    steps = sorted({step for curve in curves for step in curve})
    if not steps:
        raise InputError(f"{len(logs)} runs have no finite eval/mean_reward to plot")
    at = [[curve[step] for curve in curves if step in curve] for step in steps]
    axes = figure.add_subplot()
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color="tab:blue", linewidth=0.6, alpha=0.5)
    axes.fill_between(
        steps,
        [min(values) for values in at],
        [max(values) for values in at],
        color="tab:blue",
        alpha=0.2,
        linewidth=0,
        label="lowest to highest",
    )
    means = [sum(values) / len(values) for values in at]
    label = f"mean of {len(curves)} runs"
    axes.plot(steps, means, color="tab:blue", marker="o", markersize=3, label=label)
    axes.set_title(title)
    axes.set_xlabel(f"{STEP_NAMES[STEP_COLUMN]}s")
    axes.set_ylabel("return of an episode")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(axes)
    _write(figure, output_png)


def plot_dynamics_errors(
    rows: Sequence[Mapping[str, float | None]], output_png: Path, title: str
) -> None:
    """Plot squared errors of imagined observations against the step, on a logarithmic axis, and
    write it to `output_png`.

    Args:
        rows: of each step, with step, mse, quartile_1, median, quartile_3 and floor_mse, in
            normalized units; None where nothing counts.

    Raises:
        InputError: matplotlib is missing.
    """
    figure = _figure(7.0, 4.2)
    axes = figure.add_subplot()
    # a logarithmic axis has no zero: an error of 0 leaves a gap
    columns = {
        name: np.array([math.nan if not row[name] else row[name] for row in rows])
        for name in ("step", "mse", "quartile_1", "median", "quartile_3", "floor_mse")
    }
    steps = columns["step"]
    band = columns["quartile_1"], columns["quartile_3"]
    axes.fill_between(
        steps, *band, color="tab:blue", alpha=0.2, linewidth=0, label="imagined, middle half"
    )
    axes.plot(steps, columns["mse"], color="tab:blue", marker="o", markersize=3, label="mean")
    axes.plot(steps, columns["median"], color="tab:blue", linestyle="--", label="median")
    floor = np.nanmax(columns["floor_mse"], initial=0.0)
    if floor < FAR_BELOW * np.nanmin(columns["quartile_1"], initial=math.inf):
        axes.plot([], [], color="0.4", label=f"the simulator's own: below {floor:.0e}")
    else:
        axes.plot(steps, columns["floor_mse"], color="0.4", label="the simulator's own, mean")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("step of the trajectory")
    axes.set_ylabel("squared error, normalized observations")
    _finish(axes)
    _write(figure, output_png)


def plot_standardized_actions(
    samples: Sequence[tuple[str, np.ndarray]], output_png: Path, title: str
) -> None:
    """Plot histograms of standardized actions against the standard normal, one panel each, and
    write it to `output_png`.

    Args:
        samples: (heading, values [n]) of each panel; values beyond 5 are shown at 5.

    Raises:
        InputError: matplotlib is missing.
    """
    num_columns = min(len(samples), 3)
    num_rows = math.ceil(len(samples) / num_columns)
    figure = _figure(3.0 * num_columns + 0.6, 2.6 * num_rows + 0.4)
    grid = np.linspace(-5, 5, 201)
    normal = np.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    for i, (heading, values) in enumerate(samples, 1):
        axes = figure.add_subplot(num_rows, num_columns, i)
        axes.hist(
            np.clip(values, -5, 5),
            bins=np.linspace(-5, 5, 81),
            density=True,
            color="tab:blue",
            alpha=0.5,
            label="imagined",
        )
        axes.plot(grid, normal, color="black", linewidth=1, label="N(0, 1)")
        axes.set_title(heading, fontsize="small")
        axes.set_xlabel("(a - mean) / sigma", fontsize="small")
        _finish(axes)
    figure.suptitle(title)
    _write(figure, output_png)


def plot_observations(
    imagined: np.ndarray, real: np.ndarray, ends: tuple[int, int], output_png: Path, title: str
) -> None:
    """Plot every entry of two sequences of observations [H, S], imagined and real, against the
    step, at most 24 of them, and write it to `output_png`.

    Args:
        ends: how many observations come up to the end of either, or H.

    Raises:
        InputError: matplotlib is missing.
    """
    num = min(imagined.shape[1], 24)
    num_columns = min(num, 4)
    num_rows = math.ceil(num / num_columns)
    figure = _figure(2.6 * num_columns + 0.4, 1.7 * num_rows + 0.5)
    for i in range(num):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        for values, end, style, label in (
            (real, ends[1], {"color": "black"}, "simulated"),
            (imagined, ends[0], {"color": "tab:blue", "linestyle": "--"}, "imagined"),
        ):
            axes.plot(range(end), values[:end, i], label=label, **style)
        axes.set_title(f"observation {i}", fontsize="small")
        _finish(axes, legend=i == 0)
    figure.suptitle(title)
    _write(figure, output_png)


def plot_offline_comparison(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    returns: Mapping[str, Sequence[float]],
    output_png: Path,
    title: str,
) -> None:
    """Plot evaluations of agents that learn from several kinds of data, and their dataset's mean
    return.

    Args:
        curves: updates and mean returns, by kind of data.
        returns: of the last agents' test episodes by kind of data, drawn as a point with a bar of
            one standard deviation; "dataset": of the dataset's episodes.
        output_png: where it goes.
        title: above the figure.

    Raises:
        InputError: matplotlib is missing.
    """
    figure = _figure(7.0, 4.2)
    from matplotlib.ticker import EngFormatter

    axes = figure.add_subplot()
    end = max(updates[-1] for updates, _ in curves.values())
    for number, (name, (updates, means)) in enumerate(curves.items()):
        (line,) = axes.plot(updates, means, marker="o", markersize=3, label=f"{name} data")
        values = returns[name]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        axes.errorbar(
            [end * (1.03 + 0.025 * number)],
            [mean],
            [std],
            marker="s",
            markersize=5,
            capsize=3,
            color=line.get_color(),
        )
    dataset = sum(returns["dataset"]) / len(returns["dataset"])
    axes.axhline(dataset, color="0.4", linestyle="--", linewidth=1, label="dataset, mean")
    axes.set_title(title)
    axes.set_xlabel("updates of the agent (squares: test episodes, ± 1 standard deviation)")
    axes.set_ylabel("return of an episode")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(axes)
    _write(figure, output_png)


def plot_estimates(
    panels: Mapping[str, Mapping[str, Sequence[tuple[str, float, float, float]]]],
    output_png: Path,
    label: str,
    title: str,
    log: bool = False,
) -> None:
    """Plot estimates with their intervals, a panel per task, and write the figure to `output_png`.

    Args:
        panels: heading -> series -> (category, value, low, high) of each point.
        output_png: where it goes.
        label: of the values.
        title: above the figure.
        log: values on a logarithmic axis.

    Raises:
        InputError: matplotlib is missing.
    """
    figure, grid = _panels(panels)
    for number, (axes, series) in enumerate(zip(grid, panels.values(), strict=True)):
        categories = list(dict.fromkeys(point[0] for points in series.values() for point in points))
        for i, (name, points) in enumerate(series.items()):
            shift = 0.6 * ((i + 0.5) / len(series) - 0.5)
            values = np.array([point[1:] for point in points])
            bars = np.abs(values[:, 1:] - values[:, :1]).T
            places = [categories.index(point[0]) + shift for point in points]
            axes.errorbar(
                places,
                values[:, 0],
                bars,
                fmt="o",
                markersize=4,
                capsize=2,
                linewidth=1,
                label=name,
            )
        axes.set_xticks(range(len(categories)), categories, rotation=30, ha="right")
        axes.set_ylabel(label, fontsize="small")
        if log:
            axes.set_yscale("log")
        _finish(axes, legend=number == 0)
    _entitle(figure, title)
    _write(figure, output_png)


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    output_png: Path,
    labels: tuple[str, str],
    title: str,
    log: bool = False,
) -> None:
    """Plot estimates with their intervals as curves, a panel per task, and write the figure to
    `output_png`.

    Args:
        panels: heading -> series -> (x, value, low, high) of each point.
        output_png: where it goes.
        labels: of x and values.
        title: above the figure.
        log: values on a logarithmic axis, where 0 leaves a gap.

    Raises:
        InputError: matplotlib is missing.
    """
    figure, grid = _panels(panels)
    from matplotlib.ticker import EngFormatter

    styles = _Styles()
    for axes, series in zip(grid, panels.values(), strict=True):
        for name, points in series.items():
            x, value, low, high = np.array(points, dtype=np.float64).T
            if log:
                value, low, high = (np.where(part > 0, part, np.nan) for part in (value, low, high))
            style = styles.of(name)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(x, value, linewidth=1.2, label=name, **style)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(labels[0], fontsize="small")
        axes.set_ylabel(labels[1], fontsize="small")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _finish(axes, legend=False)
    _legend_below(figure, grid)
    _entitle(figure, title)
    _write(figure, output_png)


def plot_tradeoffs(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    output_png: Path,
    labels: tuple[str, str],
    title: str,
) -> None:
    """Plot estimates with their intervals against a cost, both on logarithmic axes, a panel per
    task, and write the figure to `output_png`.

    Args:
        panels: heading -> series -> (cost, value, low, high) of each point, all positive; points of
            a series are joined.
        output_png: where it goes.
        labels: of cost and values.
        title: above the figure.

    Raises:
        InputError: matplotlib is missing.
    """
    figure, grid = _panels(panels)
    styles = _Styles()
    for axes, series in zip(grid, panels.values(), strict=True):
        for name, points in series.items():
            cost, value, low, high = np.array(sorted(points), dtype=np.float64).T
            bars = np.abs(np.stack([value - low, high - value]))
            style = styles.of(name)
            axes.errorbar(
                cost, value, bars, marker="o", markersize=4, capsize=2, label=name, **style
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(labels[0], fontsize="small")
        axes.set_ylabel(labels[1], fontsize="small")
        _finish(axes, legend=False)
    _legend_below(figure, grid)
    _entitle(figure, title)
    _write(figure, output_png)


def plot_densities(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    edges: np.ndarray,
    output_png: Path,
    num_columns: int,
    title: str,
) -> None:
    """Plot histograms as densities against the standard normal, a panel per task, and write the
    figure to `output_png`.

    Args:
        panels: heading -> series -> counts [n], not all 0.
        edges: of the bins, all of one width, [n + 1].
        output_png: where it goes.
        num_columns: panels beside each other.
        title: above the figure.

    Raises:
        InputError: matplotlib is missing.
    """
    figure, grid = _panels(panels, num_columns)
    styles = _Styles()
    normal = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    for axes, series in zip(grid, panels.values(), strict=True):
        for name, counts in series.items():
            density = counts / (counts.sum() * (edges[1] - edges[0]))
            style = styles.of(name)
            axes.stairs(density, edges, label=name, linewidth=1, **style)
        axes.plot(edges, normal, color="black", linewidth=1, linestyle=":", label="N(0, 1)")
        axes.set_xlabel("(a - mean) / sigma", fontsize="small")
        _finish(axes, legend=False)
    _legend_below(figure, grid)
    figure.suptitle(title)
    _write(figure, output_png)


class _Styles:
    """A colour and a line style for each name, the same in all panels."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def of(self, name: str) -> dict[str, str]:
        if name not in self._names:
            self._names.append(name)
        number = self._names.index(name)
        return {"color": f"C{number % 10}", "linestyle": ("-", "--", "-.")[number // 10 % 3]}


def _panels(panels: Mapping[str, Any], num_columns: int = 3) -> tuple[Any, list[Any]]:
    """Return a figure with axes under each heading."""
    num_columns = max(1, min(len(panels), num_columns))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = _figure(3.6 * num_columns + 0.6, 2.9 * num_rows + 0.5)
    grid = []
    for number, heading in enumerate(panels, 1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        axes.tick_params(labelsize="small")
        axes.set_title(heading, fontsize="medium")
        grid.append(axes)
    return figure, grid


def _legend_below(figure: Any, grid: Sequence[Any]) -> None:
    """Name every series of the panels once, below them."""
    handles = {}
    for axes in grid:
        found, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small"
    )


def _figure(width: float, height: float) -> Any:
    """Return a figure in inches, on matplotlib's Agg canvas: no display, no change to pyplot."""
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Any, legend: bool = True) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(framealpha=0.85, edgecolor="none", fontsize="small")


def _write(figure: Any, output_png: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes_atomic(output_png, image.getvalue())


def _entitle(figure: Any, title: str) -> None:
    """Say above a figure what it shows, and that its points are estimates over seeds."""
    figure.suptitle(f"{title}\n({ESTIMATE})", fontsize=11)
