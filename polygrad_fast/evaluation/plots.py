"""Figures of runs.

They need the extra `plots`; matplotlib is imported when a figure is drawn.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polygrad_fast.errors import InputError
from polygrad_fast.runs.files import write_bytes_atomic


def plot_learning_curve(metrics_csv: Path, output_png: Path, title: str) -> None:
    """Plot the return against environment steps, or updates, and write it to `output_png`.

    A line with a band of one standard deviation shows `eval/mean_reward` and `eval/std_reward`;
    points show `train/episode_return`. Uses matplotlib's Agg canvas directly: no display, no
    change to pyplot's state.

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


def _figure(width: float, height: float) -> Any:
    """Return a figure in inches, on matplotlib's Agg canvas: no display, no change to pyplot.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plots need the extra 'plots': pip install 'polygrad-fast[plots]'"
        ) from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.85, edgecolor="none", fontsize="small")


def _write(figure: Any, output_png: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes_atomic(output_png, image.getvalue())
